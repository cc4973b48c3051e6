"""Imported Keras models answer as Keras does."""

import keras
import numpy as np
import pytest
from keras import layers

from models.importers.keras_model import Names
from models.spec import LENGTHS, Layout, StepMode
from tests.models.keras_models import (
    FEATURES,
    assert_equal_to_keras,
    functional,
    imported,
    saved,
    sequences,
    sequential,
    served,
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
OPTIONS = {
    "keras2": lambda: sequential(
        layers.LSTM(4, recurrent_activation="hard_sigmoid", return_sequences=True),
        layers.GRU(4, recurrent_activation="hard_sigmoid", reset_after=False),
    ),
    "activations": lambda: sequential(
        layers.SimpleRNN(4, activation="elu", return_sequences=True),
        layers.LSTM(4, activation="softsign", recurrent_activation="tanh", return_sequences=True),
        layers.GRU(4, activation="relu", use_bias=False, return_sequences=True),
        layers.SimpleRNN(4, activation=None, use_bias=False, unroll=False),
    ),
    "decomposed": lambda: sequential(
        layers.Bidirectional(layers.GRU(4, activation="gelu", return_sequences=True)),
        layers.LSTM(4, recurrent_activation="silu"),
        layers.RepeatVector(3),
        layers.SimpleRNN(3, activation="mish", return_sequences=True),
    ),
    "bidirectional": lambda: sequential(
        layers.Bidirectional(layers.GRU(4, reset_after=False, return_sequences=True), merge_mode="mul"),
        layers.Bidirectional(
            layers.SimpleRNN(4, activation="relu"), backward_layer=layers.SimpleRNN(4, go_backwards=True)
        ),
    ),
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


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in OPTIONS.items()])
def test_options_of_recurrent_layers(make, tmp_path):
    model = make()
    assert_equal_to_keras(model, imported(saved(model, tmp_path), tmp_path))


@pytest.mark.full
@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in MERGED.items()])
def test_merge_modes(make, tmp_path):
    model = make()
    assert_equal_to_keras(model, imported(saved(model, tmp_path), tmp_path))


def test_one_input_unrolls_as_many_steps_as_are_asked_for(tmp_path):
    model = keras.Sequential(
        [
            layers.Input((2,)),
            layers.Dense(4, activation="tanh"),
            layers.RepeatVector(6),
            layers.GRU(5, return_sequences=True),
            layers.LSTM(4, return_sequences=True),
            layers.TimeDistributed(layers.Dense(2)),
        ]
    )
    file = imported(saved(model, tmp_path), tmp_path, Names(input_names=("season", "year"), output_unit="MW"))
    graph = file.spec.graph
    assert file.spec.step_mode[0] is StepMode.GENERATIVE
    assert (file.spec.topology, file.spec.generation.max_steps) == ("one-to-many", 6)
    assert (graph.inputs[0].layout, graph.inputs[0].element_names) == (Layout.PER_SEQUENCE, ("season", "year"))
    assert (graph.outputs[0].layout, graph.outputs[0].unit) == (Layout.PER_STEP, "MW")
    x = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    zeros = {state.name: np.zeros((3, *state.row_shape), np.float32) for state in graph.states}
    found = file.runtime({"x": x, LENGTHS: np.array([6, 2, 6], np.int32)} | zeros)["y"]
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(found[[0, 2]], expected[[0, 2]], atol=1e-5)
    np.testing.assert_allclose(found[1, :2], expected[1, :2], atol=1e-5)


@pytest.mark.parametrize("kind", ["masking", "mask_zero"])
def test_lengths_stand_for_masked_padding(kind, tmp_path):
    """What Keras is told by a mask, and we by lengths; steps masked within a sequence are left out of ours."""
    ids = kind == "mask_zero"
    first = layers.Embedding(9, 3, mask_zero=True) if ids else layers.Masking(0.0)
    stack = [first, layers.Bidirectional(layers.LSTM(4, return_sequences=True)), layers.GRU(3)]
    model = keras.Sequential([layers.Input((None,) if ids else (None, FEATURES)), *stack])
    file = imported(saved(model, tmp_path), tmp_path)
    rows = sequences(file)
    padded = np.zeros((len(rows), 9, *rows[0].shape[1:]), rows[0].dtype)
    for place, (at, row) in enumerate(zip(padded, rows, strict=True)):
        steps = np.array([0, 1, 3, 4, 5, 7, 8])[: len(row)] if place == 0 else np.arange(len(row))
        at[steps] = row
    np.testing.assert_allclose(served(file, rows), model.predict(padded, verbose=0), atol=1e-5)


def test_spec_tells_where_a_model_came_from(tmp_path):
    path = saved(tutorial(layers.GRU), tmp_path)
    file = imported(path, tmp_path, Names(input_unit="m3/h", output_names=("flow",)))
    training = file.spec.training
    assert training.recipe["file"] == "model.keras"
    assert training.recipe["keras"] == keras.__version__
    assert len(training.recipe["sha256"]) == 64
    assert f"Keras {keras.__version__}" in training.data_set
    assert file.spec.graph.inputs[0].unit == "m3/h"
    assert file.spec.graph.outputs[0].element_names == ("flow",)
    assert file.spec.num_parameters == sum(int(np.prod(v.shape)) for v in tutorial(layers.GRU).trainable_variables)
