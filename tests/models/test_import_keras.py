"""Imported Keras models answer as Keras does."""

import keras
import pytest
from keras import layers

from tests.models.keras_models import (
    FEATURES,
    assert_equal_to_keras,
    functional,
    imported,
    saved,
    sequential,
)

CELLS = {"rnn": layers.SimpleRNN, "lstm": layers.LSTM, "gru": layers.GRU}


def tutorial(cell):
    """Two layers of a cell, dropout, and a head: the shape that most models have."""
    return sequential(cell(6, return_sequences=True), layers.Dropout(0.2), cell(5), layers.Dense(1))


def every_step():
    """What looks at one row at a time, over steps."""
    return sequential(
        layers.Normalization(mean=[1.0, -2.0, 3.0], variance=[4.0, 1.0, 0.5]),
        layers.Masking(),
        layers.TimeDistributed(layers.Dense(6, activation="gelu")),
        layers.GRU(5, return_sequences=True, activity_regularizer="l2"),
        layers.SpatialDropout1D(0.3),
        layers.LayerNormalization(),
        layers.LSTM(4, return_sequences=True, use_bias=False, stateful=False, dropout=0.2, recurrent_dropout=0.1),
        layers.BatchNormalization(),
        layers.PReLU(shared_axes=[1]),
        layers.Rescaling(2.0, offset=-1.0),
        layers.Dense(3, use_bias=False),
        layers.LeakyReLU(0.1),
        layers.TimeDistributed(layers.LayerNormalization(epsilon=0.1, center=False)),
    )


def text():
    """Ids in, one answer out."""
    return keras.Sequential(
        [
            layers.Input((None,)),
            layers.Embedding(11, 4, mask_zero=True),
            layers.Bidirectional(layers.LSTM(3, return_sequences=True)),
            layers.Bidirectional(layers.GRU(4)),
            layers.Dense(5, activation="relu"),
            layers.ReLU(max_value=1.5, negative_slope=0.1, threshold=0.2),
            layers.ELU(0.7),
            layers.Dense(3),
            layers.Softmax(),
        ]
    )


def forecaster():
    """An encoder, and a decoder that unrolls what it says: four rows for each answer."""
    return sequential(
        layers.LSTM(5),
        layers.RepeatVector(4),
        layers.Bidirectional(layers.GRU(3, return_sequences=True), merge_mode="ave"),
        layers.SimpleRNN(3, return_sequences=True, go_backwards=True),
        layers.TimeDistributed(layers.Dense(2)),
    )


def collapsed():
    """A window that is read to its end, laid flat, and cut anew."""
    return sequential(
        layers.Bidirectional(layers.SimpleRNN(4)),
        layers.RepeatVector(3),
        layers.LSTM(4, return_sequences=True),
        layers.Flatten(),
        layers.Dense(6),
        layers.Reshape((3, -1)),
        layers.LSTM(2),
        layers.Activation("tanh"),
    )


def chain():
    """A functional chain with masks, a model within it, and two unlike layers side by side."""
    first = keras.Input((None, FEATURES))
    inner = keras.Sequential([layers.Input((None, 4)), layers.LSTM(3, return_sequences=True), layers.Dense(4)])
    side = layers.Bidirectional(
        layers.GRU(3, return_sequences=True), backward_layer=layers.LSTM(3, return_sequences=True, go_backwards=True)
    )
    return functional(first, layers.Dense(4), inner, layers.Masking(), side, layers.SimpleRNN(3, activation="relu"))


def backwards():
    """Layers that read from the end and answer in that order."""
    return sequential(
        layers.LSTM(3, return_sequences=True, go_backwards=True),
        layers.GRU(4, return_sequences=True, go_backwards=True),
        layers.SimpleRNN(3, go_backwards=True),
    )


def convolved():
    """Causal convolutions before a recurrent layer."""
    return sequential(
        layers.Conv1D(4, 3, padding="causal", dilation_rate=2, activation="relu"),
        layers.Conv1D(4, 1, padding="causal"),
        layers.Conv1D(6, 2, padding="causal", groups=2, use_bias=False),
        layers.GRU(3, return_sequences=True),
    )


MODELS = {f"tutorial-{name}": lambda cell=cell: tutorial(cell) for name, cell in CELLS.items()} | {
    each.__name__: each for each in (every_step, text, forecaster, collapsed, chain, backwards, convolved)
}
MERGED = {
    f"{name}-{mode}-{'all' if every else 'last'}": lambda cell=cell, mode=mode, every=every: sequential(
        layers.Bidirectional(cell(3, return_sequences=every), merge_mode=mode)
    )
    for name, cell in CELLS.items()
    for mode in ("concat", "sum", "mul", "ave")
    for every in (True, False)
}


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in MODELS.items()])
def test_imported_model_answers_as_keras_does(make, tmp_path):
    model = make()
    assert_equal_to_keras(model, imported(saved(model, tmp_path), tmp_path))
