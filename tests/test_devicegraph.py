"""service.devicegraph: the model stays as it is, its states become rows of slabs, and what can't be is refused."""

import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from models.spec import METADATA_KEY
from service.devicegraph import SLOTS, read_graph, rows_name, slab_name, slots_name, step_graph, write_graph
from service.errors import ConfigError, ModelBroken
from tests.lanes import equal
from tests.onnx_models import build

LSTM = build("lstm", layers=2)
STATES = LSTM.spec.graph.states


def changed(change):
    file = onnx.load_from_string(LSTM.content)
    change(file)
    return file.SerializeToString()


def test_only_the_states_change_places():
    before = onnx.load_from_string(LSTM.content)
    after = onnx.load_from_string(step_graph(LSTM.content, LSTM.spec.graph))
    onnx.checker.check_model(after, full_check=True)
    assert after.opset_import == before.opset_import
    assert {each.key: each.value for each in after.metadata_props} == {METADATA_KEY: LSTM.spec.to_json()}
    assert [node for node in after.graph.node if not node.name.startswith("rnnserve.")] == list(before.graph.node)
    assert list(after.graph.initializer)[:-1] == list(before.graph.initializer)
    names = [state.name for state in STATES]
    assert [v.name for v in after.graph.input] == ["x", "lengths", SLOTS, *(f"rnnserve.slab.{n}" for n in names)]
    assert [v.name for v in after.graph.output] == ["y", *(f"rnnserve.written.{n}" for n in names)]


def test_rows_are_written_to_slots_of_each_state_and_read_back():
    writer, reader = (ort.InferenceSession(make(STATES)) for make in (write_graph, read_graph))
    rng = np.random.default_rng(0)
    slabs = {slab_name(s): rng.standard_normal((6, *s.row_shape)).astype(np.float32) for s in STATES}
    expected = [slab.copy() for slab in slabs.values()]
    feeds = dict(slabs)
    for state, slots, slab in zip(STATES, ([4, 0], [], [5], [1, 2, 3]), expected, strict=True):
        rows = rng.standard_normal((len(slots), *state.row_shape)).astype(np.float32)
        feeds |= {slots_name(state): np.array(slots, np.int64), rows_name(state): rows}
        slab[slots] = rows
    written = writer.run(None, feeds)
    for ours, theirs in zip(written, expected, strict=True):
        equal(ours, theirs)
    slots = np.array([5, 0, 1])
    for ours, theirs in zip(
        reader.run(None, {SLOTS: slots, **dict(zip(slabs, written, strict=True))}), expected, strict=True
    ):
        equal(ours, theirs[slots])


def older(file):
    file.opset_import[0].version = 10


def taken(file):
    file.graph.node[0].name = SLOTS


def unmoved(file):
    """The cell state of layer 1 is not computed from what it was: LSTM takes zeros for it."""
    lstm = [node for node in file.graph.node if node.op_type == "LSTM"][1]
    lstm.input.pop()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(older), "opset 10 has no ScatterND.*export with 11 on"),
        (changed(taken), f"names that begin with 'rnnserve.' are the server's own: {SLOTS}"),
        (changed(unmoved), r"state.1.c.next is not computed from state.1.c.*--provider cpu"),
        (b"ORTM in another format", "need a file in ONNX's own format"),
    ],
)
def test_a_model_whose_states_can_not_be_slabs_is_refused(content, message):
    with pytest.raises(ModelBroken, match=message):
        step_graph(content, LSTM.spec.graph)


def test_a_model_without_states_is_refused():
    with pytest.raises(ModelBroken, match=r"without states has none to keep on a device.*--provider cpu"):
        step_graph(LSTM.content, LSTM.spec.graph.model_copy(update={"states": ()}))


def test_a_state_that_a_subgraph_captures_is_one_it_is_computed_from():
    def in_a_branch(file):
        nodes = file.graph.node
        copy = next(node for node in nodes if "state.0.h.in" in node.output)
        branches = {}
        for name in ("then", "else"):
            node = helper.make_node("Transpose", ["state.0.h"], [f"{name}.out"], perm=[1, 0, 2])
            out = helper.make_tensor_value_info(f"{name}.out", onnx.TensorProto.FLOAT, (1, "batch", 8))
            branches[f"{name}_branch"] = helper.make_graph([node], name, [], [out])
        at = list(nodes).index(copy)
        nodes.remove(copy)
        file.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "always"))
        nodes.insert(at, helper.make_node("If", ["always"], ["state.0.h.in"], **branches))

    ort.InferenceSession(step_graph(changed(in_a_branch), LSTM.spec.graph))


def test_without_onnx_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"pip install 'rnnserve\[gpu\]', or serve with --provider cpu") as caught:
        step_graph(LSTM.content, LSTM.spec.graph)
    assert caught.value.field == "provider"
