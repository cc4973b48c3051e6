"""Every option as a graph: its form, and its answers against torch, step by step."""

import numpy as np
import onnx
import pytest

from models.export import export_net
from models.options import LayerOptions
from models.runtime import Runtime
from models.spec import LENGTHS, MODEL_FILE, StepMode
from tests.models.conftest import make_task
from tests.models.exports import TRAINING, make_net

NATIVE = [
    ({"activation": "linear", "recurrent_activation": "hard_sigmoid"}, "operator"),
    ({"activation": "softsign", "recurrent_activation": "hard_sigmoid_v2", "go_backwards": True}, "operator"),
    ({"activation": "elu", "bidirectional": True}, "operator"),
    ({"use_bias": False, "reset_after": False, "merge_mode": "mul", "bidirectional": True}, "operator"),
]
DECOMPOSED = [
    ({"activation": "gelu"}, "decomposed"),
    ({"recurrent_activation": "hard_silu", "go_backwards": True, "use_bias": False}, "decomposed"),
    ({"activation": "selu", "reset_after": False, "bidirectional": True, "merge_mode": "ave"}, "decomposed"),
]
UNROLLED = [
    ({"unroll": 3}, "unrolled"),
    ({"unroll": 3, "activation": "gelu", "bidirectional": True, "merge_mode": "sum"}, "unrolled"),
]


@pytest.mark.parametrize(
    "cell", [pytest.param("rnn", marks=pytest.mark.full), "gru", pytest.param("lstm", marks=pytest.mark.full)]
)
@pytest.mark.parametrize(("settings", "form"), NATIVE + DECOMPOSED + UNROLLED)
def test_every_option_passes_the_gate_in_its_form(cell, settings, form):
    if cell == "rnn" and "activation" not in settings and form == "decomposed":
        form = "operator"  # it has no gates
    task = make_task(kind="regression")
    layers = 1 if form == "unrolled" else 2
    net = make_net(task, cell=cell, layers=layers, **settings)
    if settings.get("activation") in ("linear", "elu"):
        _tame(net)
    files, spec = export_net(net, task, TRAINING)
    operators = spec.graph.operators
    directions = 2 if settings.get("bidirectional") else 1
    assert [layer.form for layer in spec.layers] == [form] * layers
    assert operators.get(cell.upper(), 0) == (layers if form == "operator" else 0)
    assert operators.get("Scan", 0) == (layers * directions if form == "decomposed" else 0)
    assert spec.graph.fixed_steps == settings.get("unroll")
    is_causal = not (settings.get("bidirectional") or settings.get("go_backwards") or settings.get("unroll"))
    assert (spec.step_mode[0] is StepMode.STEPPING) == is_causal
    model = onnx.load_from_string(files[MODEL_FILE])
    assert {opset.domain for opset in model.opset_import} == {""}


def _tame(net):
    """Keep states of activations without a bound from growing over hundreds of steps."""
    for layer in net.recurrent:
        layer.rnn.weight_hh_l0.data.mul_(0.3)


def test_a_scan_is_exact_in_a_batch_and_in_chunks():
    """As the server runs it: rows that end early beside others, states carried on."""
    task = make_task()
    net = make_net(task, cell="lstm", activation="mish")
    files, spec = export_net(net, task, TRAINING)
    runtime = Runtime(files[MODEL_FILE])
    rng = np.random.default_rng(3)
    x = rng.standard_normal((3, 8, 2)).astype(np.float32)
    states = {s.name: rng.uniform(-1, 1, (3, *s.row_shape)).astype(np.float32) for s in spec.graph.states}
    lengths = np.array([8, 3, 1], np.int32)
    together = runtime({"x": x, LENGTHS: lengths, **states})
    for row, length in enumerate(lengths.tolist()):
        given = {name: state[row : row + 1] for name, state in states.items()}
        for step in range(length):
            alone = runtime({"x": x[row : row + 1, step : step + 1], LENGTHS: np.ones(1, np.int32), **given})
            np.testing.assert_allclose(alone["y"][0, 0], together["y"][row, step], atol=1e-6)
            given = {s.name: alone[s.next_name] for s in spec.graph.states}
        for state in spec.graph.states:
            np.testing.assert_allclose(given[state.name][0], together[state.next_name][row], atol=1e-6)


def test_options_that_need_no_graph_leave_it_as_it_is():
    task = make_task()
    plain, _ = export_net(make_net(task), task, TRAINING)
    dropping = make_net(
        task, dropout=0.5, recurrent_dropout=0.5, kernel_regularizer="l2=0.1", kernel_constraint="non_neg"
    )
    same, spec = export_net(dropping, task, TRAINING)
    graphs = [onnx.load_from_string(files[MODEL_FILE]).graph for files in (plain, same)]
    assert [node.op_type for node in graphs[0].node] == [node.op_type for node in graphs[1].node]
    assert spec.layers[0].form == "operator"
    assert LayerOptions().unroll == 0
