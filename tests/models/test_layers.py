"""Recurrent layers in eager torch against the formulas."""

import numpy as np
import pytest
import torch

from models.layers import STATES, Recurrent
from models.options import LayerOptions
from tests.oracles import Weights, run_layer

CELLS = [("rnn", "tanh"), ("rnn", "relu"), ("gru", "tanh"), ("lstm", "tanh")]
LENGTHS = np.array([7, 1, 4], dtype=np.int32)
"""Of a batch eight steps long: even the longest row has padding."""


def torch_weights(layer: Recurrent) -> list[Weights]:
    """The layer's weights by direction, as the oracle takes them."""
    return [
        Weights(
            *(
                getattr(layer.rnn, f"{name}_l0{suffix}").detach().numpy()
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
        )
        for suffix in ("", "_reverse")[: layer.directions]
    ]


@pytest.fixture(params=CELLS, ids=lambda cell: "-".join(cell))
def cell(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["forward", "bidirectional"])
def layer(request, cell):
    torch.manual_seed(3)
    options = LayerOptions(activation=cell[1], bias_initializer="random_uniform=-0.5:0.5")
    return Recurrent(cell[0], 4, 6, bidirectional=request.param, options=options).eval()


def random_inputs(layer, *, zero=False):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((3, 8, 4)).astype(np.float32)
    shape = (3, layer.directions, layer.hidden)
    states = [rng.uniform(-1, 1, shape).astype(np.float32) * (not zero) for _ in STATES[layer.cell]]
    return x, states


def run(layer, x, lengths, states):
    with torch.no_grad():
        y, last = layer(
            torch.from_numpy(x).transpose(0, 1),
            torch.from_numpy(lengths),
            tuple(torch.from_numpy(state) for state in states),
        )
    return y.transpose(0, 1).numpy(), [state.numpy() for state in last]


def test_ragged_batch_with_states_is_the_formula(layer):
    x, states = random_inputs(layer)
    y, last = run(layer, x, LENGTHS, states)
    expected_y, expected_last = run_layer(
        layer.cell, x, LENGTHS, torch_weights(layer), states, layer.options.activation
    )
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(y[row, :length], expected_y[row, :length], atol=1e-6)
    for found, expected in zip(last, expected_last, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_padding_changes_nothing(layer):
    x, states = random_inputs(layer)
    poisoned = x.copy()
    poisoned[1, 1:] = 1e6
    poisoned[2, 4:] = np.nan
    y, last = run(layer, x, LENGTHS, states)
    same_y, same_last = run(layer, poisoned, LENGTHS, states)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(y[row, :length], same_y[row, :length])
    for state, same in zip(last, same_last, strict=True):
        np.testing.assert_array_equal(state, same)


@pytest.mark.parametrize("begins", ["zero", "given"])
def test_outputs_for_training_are_those_of_forward(layer, begins):
    x, states = random_inputs(layer, zero=begins == "zero")
    y, _ = run(layer, x, LENGTHS, states)
    steps, first = torch.from_numpy(x).transpose(0, 1), tuple(map(torch.from_numpy, states)) * (begins == "given")
    with torch.no_grad():
        quick = layer.outputs(steps, torch.from_numpy(LENGTHS), first).transpose(0, 1).numpy()
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(quick[row, :length], y[row, :length], atol=1e-6)


def test_absorbed_scaling_takes_raw_inputs(layer):
    x, states = random_inputs(layer)
    shift, scale = np.array([5.0, -3.0, 0.0, 1.0], np.float32), np.array([2.0, 0.1, 7.0, 1.0], np.float32)
    expected_y, expected_last = run(layer, x, LENGTHS, states)
    layer.absorb(shift, scale)
    y, last = run(layer, x * scale + shift, LENGTHS, states)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(y[row, :length], expected_y[row, :length], atol=1e-5)
    for found, expected in zip(last, expected_last, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_zero_length_is_refused(layer):
    x, states = random_inputs(layer)
    with pytest.raises(RuntimeError, match="Length of all samples has to be greater than 0"):
        run(layer, x, np.array([7, 0, 4], dtype=np.int32), states)


def test_a_bidirectional_layer_has_no_other_way_to_go():
    with pytest.raises(ValueError, match="a bidirectional layer goes backwards too"):
        Recurrent("gru", 4, 6, bidirectional=True, options=LayerOptions(go_backwards=True))
