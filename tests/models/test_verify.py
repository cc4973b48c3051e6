"""The gate: what it passes, and what it refuses."""

import itertools

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from models.errors import ParityError
from models.export import export_net
from models.spec import LENGTHS, MODEL_FILE
from models.verify import gate
from tests.models.conftest import make_task
from tests.models.exports import TRAINING, exported_net, make_net, node, renamed_inputs


@pytest.fixture(scope="module")
def exported():
    """A two-layer LSTM that passes, with what the gate was given."""
    net, model, spec = exported_net(cell="lstm", layers=2)
    return net, model, spec.graph


def part_of(net):
    [part] = net.graphs(make_task())
    return part


def refusal(exported, spoil):
    net, model, graph = exported
    spoiled = onnx.ModelProto()
    spoiled.CopyFrom(model)
    spoil(spoiled)
    with pytest.raises(ParityError) as caught:
        gate(part_of(net), spoiled.SerializeToString(), graph)
    return caught.value


def test_gate_passes_what_is_right(exported):
    net, model, graph = exported
    parity, golden = gate(part_of(net), model.SerializeToString(), graph)
    assert parity.max_abs_error <= parity.tolerance == 1e-5
    assert [g.inputs[LENGTHS].array().max() for g in golden] == [5, 5]
    assert [bool(g.inputs["state.1.c"].array().any()) for g in golden] == [False, True]


def test_gate_refuses_two_states_swapped(exported):
    swap = {"state.0.h": "state.1.h", "state.1.h": "state.0.h"}
    error = refusal(exported, lambda model: renamed_inputs(model, swap))
    assert "nonzero initial states" in error.case
    assert error.error > 1e-3
    assert str(error).startswith("not written: torch and onnxruntime differ by ")
    assert f"{error.error:.3g} in {error.output!r}" in str(error)


def test_gate_refuses_hidden_and_cell_state_swapped(exported):
    swap = {"state.0.h": "state.0.c", "state.0.c": "state.0.h"}
    assert refusal(exported, lambda model: renamed_inputs(model, swap)).error > 1e-3


def test_gate_refuses_next_states_swapped(exported):
    def spoil(model):
        swap = {"state.0.h.next": "state.1.h.next", "state.1.h.next": "state.0.h.next"}
        for each in model.graph.node:
            each.output[:] = [swap.get(name, name) for name in each.output]

    assert refusal(exported, spoil).output in {"state.0.h.next", "state.1.h.next"}


def test_gate_refuses_a_gate_without_its_bias(exported):
    def spoil(model):
        [bias] = [each for each in model.graph.initializer if each.name == "layer.1.B"]
        values = numpy_helper.to_array(bias).copy()
        values[:, 12:18] = 0.0  # the forget gate's: i o f c, six units each
        bias.CopyFrom(numpy_helper.from_array(values, bias.name))

    assert refusal(exported, spoil).case == "1 rows of up to 1 steps, nonzero initial states"


def test_gate_refuses_gates_in_another_order(exported):
    def spoil(model):
        [weights] = [each for each in model.graph.initializer if each.name == "layer.0.R"]
        values = numpy_helper.to_array(weights).reshape(1, 4, 6, 6)[:, [0, 2, 1, 3]].reshape(1, 24, 6)
        weights.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), weights.name))

    assert refusal(exported, spoil).error > 1e-3


def test_gate_refuses_lengths_that_are_not_wired(exported):
    def spoil(model):
        node(model, "LSTM", 1).input[4] = ""

    error = refusal(exported, spoil)
    assert error.output.startswith("state.1.")
    assert "4 rows" not in error.case  # one step each: nothing is ragged


def test_gate_refuses_a_graph_that_forgets_its_state(exported):
    def spoil(model):
        node(model, "LSTM", 0).input[5] = ""

    assert "nonzero initial states" in refusal(exported, spoil).case


def test_gate_refuses_a_head_off_by_little(exported):
    def spoil(model):
        [bias] = [each for each in model.graph.initializer if each.name == "head.bias"]
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32([1e-4, 0, 0]), bias.name))

    error = refusal(exported, spoil)
    assert error.output == "y"
    assert 1e-5 < error.error < 1e-4


def amplifying_net(gain, cell="rnn"):
    """A net whose recurrent weights make more of every rounding error, step by step."""
    net = make_net(make_task(), cell=cell, layers=2)
    with torch.no_grad():
        for layer in net.recurrent:
            layer.rnn.weight_hh_l0.mul_(gain)
    return net


def test_gate_allows_what_rounding_does_to_torch_itself():
    net = amplifying_net(3, cell="lstm")
    files, spec = export_net(net, make_task(), TRAINING)
    model = onnx.load_from_string(files[MODEL_FILE])
    assert 1e-5 < spec.parity.tolerance < 1e-4
    assert spec.parity.max_abs_error < spec.parity.tolerance
    swap = {"state.0.h": "state.0.c", "state.0.c": "state.0.h"}
    assert refusal((net, model, spec.graph), lambda spoiled: renamed_inputs(spoiled, swap)).error > 1e-2


def test_gate_refuses_a_net_whose_answers_are_all_rounding():
    with pytest.raises(ParityError, match="allowed is 1e-03"):
        export_net(amplifying_net(6), make_task(), TRAINING)


def test_gate_is_deterministic(exported):
    net, model, graph = exported
    first, second = (gate(part_of(net), model.SerializeToString(), graph) for _ in range(2))
    for a, b in itertools.zip_longest(first[1], second[1]):
        assert a.inputs == b.inputs
