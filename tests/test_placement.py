"""Where nodes run is told at load: in the log, in the announcement, and by GetModel."""

import logging
from collections import Counter

import onnx
import onnxruntime as ort
import pytest
from onnxruntime.quantization import quantize_dynamic

from service.backend import Backend
from service.config import load_settings
from service.device import DeviceRunner
from service.devicegraph import step_graph
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.placement import Node, Placement
from service.repository import load_repository
from service.rpc.announcement import announcement_of
from service.rpc.codec import model_message
from tests.onnx_models import build

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
FALLEN = Placement(
    CUDA, [Node("a", "LSTM", CUDA), Node("b", "RNN", CPU), Node("", "Shape", CPU), Node("c", "LSTM", CUDA)]
)


def test_every_node_is_placed_on_the_cpu(tmp_path):
    model = build("lstm", layers=2)
    backend = Backend(model.save(tmp_path, "m"))
    assert (backend.placement.provider, backend.placement.fallbacks) == (CPU, [])
    assert {node.provider for node in backend.placement.nodes} == {CPU}
    counts = {op_type: len(nodes) for op_type, _, nodes in backend.placement.groups()}
    assert counts == {"LSTM": 2, "Transpose": 12, "Reshape": 2, "MatMul": 1, "Add": 1}
    assert str(backend.placement) == "18 of 18 nodes on CPUExecutionProvider"
    moves = Counter(node.op_type for node in DeviceRunner(backend, 4).placement.nodes) - Counter(counts)
    assert moves == {"Gather": 4, "ScatterND": 4, "Reshape": 1}


def test_operators_of_other_domains_are_told_apart(tmp_path):
    path = build("lstm", hidden=32).save(tmp_path, "m")
    quantize_dynamic(path, path.with_name("int8.onnx"))
    operators = [operator for operator, _, _ in Backend(path.with_name("int8.onnx")).placement.groups()]
    assert "com.microsoft.DynamicQuantizeLSTM" in operators
    fallen = Placement(CUDA, [Node("q", "com.microsoft.DynamicQuantizeLSTM", CPU)])
    assert [str(node) for node in fallen.recurrent_fallbacks] == ["com.microsoft.DynamicQuantizeLSTM q"]


def test_what_fell_back_is_told_by_name():
    assert str(FALLEN) == f"2 of 4 nodes on {CUDA}; elsewhere: RNN b ({CPU}), Shape ({CPU})"
    assert [(op, provider, [n.name for n in nodes]) for op, provider, nodes in FALLEN.groups()] == [
        ("LSTM", CUDA, ["a", "c"]),
        ("RNN", CPU, ["b"]),
        ("Shape", CPU, [""]),
    ]


@pytest.fixture
def fallen(tmp_path, monkeypatch):
    """A repository whose model claims to have been placed like FALLEN."""
    build("lstm").save(tmp_path, "m")
    monkeypatch.setattr(Backend, "place", lambda *_: FALLEN)
    return load_settings({"repository": tmp_path})


def test_recurrent_nodes_that_fell_back_are_a_warning(fallen, caplog, capsys):
    loaded = load_repository(fallen)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"m/1: RNN b on {CPU}, since ")
    announcement_of(loaded).show("h", 1, 2)
    assert f"    {FALLEN}\n" in capsys.readouterr().out


def test_nothing_is_said_of_nodes_that_are_where_they_should_be(tmp_path, caplog, capsys):
    build("lstm").save(tmp_path, "m")
    settings = load_settings({"repository": tmp_path})
    loaded = load_repository(settings)
    announcement_of(loaded).show("h", 1, 2)
    assert not caplog.records
    assert "nodes on" not in capsys.readouterr().out


def test_models_say_where_their_nodes_run(fallen):
    [lane] = load_repository(fallen).lanes
    lane.backend.provider = CUDA
    assert list(model_message(lane).placement) == [
        pb.PlacedNodes(op_type="LSTM", provider=CUDA, count=2),
        pb.PlacedNodes(op_type="RNN", provider=CPU, count=1, fallback_names=["b"]),
        pb.PlacedNodes(op_type="Shape", provider=CPU, count=1, fallback_names=[""]),
    ]


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["lstm", "gru"])
def on_gpu(request, tmp_path):
    path = build(request.param, layers=2).save(tmp_path, "m")
    return Backend(path, provider="cuda")


@pytest.mark.gpu
def test_recurrent_nodes_and_those_that_move_states_run_on_the_gpu(on_gpu):
    assert on_gpu.placement.recurrent_fallbacks == []
    placement = DeviceRunner(on_gpu, 16).placement
    assert {node.provider for node in placement.nodes if node.op_type in ("LSTM", "GRU", "Gather", "ScatterND")} == {
        CUDA
    }


@pytest.mark.gpu
def test_no_state_is_copied_to_the_host(on_gpu, tmp_path):
    """Copies within a graph are nodes of their own, put in last."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(step_graph(on_gpu.content, on_gpu.graph), options, providers=[CUDA])
    operators = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert {"Gather", "ScatterND"} <= operators
    assert not operators & {"MemcpyToHost", "MemcpyFromHost"}
