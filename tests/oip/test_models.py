"""What the protocol tells of the server and its models, and what it refuses."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service.pb.inference import inference_pb2 as pb
from service.rpc.oip.servicer import ABSENT, SERVICE_NAME
from tests.oip.calls import refused, request, step, stub_of
from tests.rpc import code_of, details
from tests.serving import Served, serving


def test_server_tells_of_itself(stub) -> None:
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    assert stub.ServerReady(pb.ServerReadyRequest()).ready
    metadata = stub.ServerMetadata(pb.ServerMetadataRequest())
    assert (metadata.name, metadata.version) == ("rnnserve", version("rnnserve"))
    assert {"sequence", "statistics", "model_configuration", "schedule_policy"} <= set(metadata.extensions)


@pytest.mark.parametrize(
    ("model", "asked", "is_ready"), [("gru", "", True), ("gru", "1", True), ("gru", "3", False), ("nope", "", False)]
)
def test_ready_models(stub, model: str, asked: str, is_ready: bool) -> None:
    assert stub.ModelReady(pb.ModelReadyRequest(name=model, version=asked)).ready is is_ready


def test_metadata_lists_tensors_with_their_batch(stub) -> None:
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="gru"))
    assert (metadata.name, list(metadata.versions), metadata.platform) == ("gru", ["1", "2"], "onnxruntime_onnx")
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("x", "FP32", [-1, -1, 3])]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [("y", "FP32", [-1, -1, 2])]
    tokens = stub.ModelMetadata(pb.ModelMetadataRequest(name="tokens", version="1"))
    assert [(t.datatype, list(t.shape)) for t in tokens.inputs] == [("INT64", [-1, -1])]
    final = stub.ModelMetadata(pb.ModelMetadataRequest(name="bigru"))
    assert [list(t.shape) for t in final.outputs] == [[-1, 2]]


def test_configuration_of_a_stepping_model(repository: Path) -> None:
    with (
        serving(repository, sequence_idle_s=2.5, max_sessions=77, max_batch_rows=32) as served,
        stub_of(served) as stub,
    ):
        config = stub.ModelConfig(pb.ModelConfigRequest(name="lstm")).config
        assert (config.name, config.backend, config.max_batch_size) == ("lstm", "onnxruntime", 32)
        assert config.WhichOneof("scheduling_choice") == "sequence_batching"
        assert config.sequence_batching.max_sequence_idle_microseconds == 2_500_000
        assert config.sequence_batching.oldest.max_candidate_sequences == 77
        assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [("x", pb.TYPE_FP32, [-1, 3])]
        assert [(t.name, t.data_type, list(t.dims)) for t in config.output] == [("y", pb.TYPE_FP32, [-1, 2])]
        assert stub.ModelConfig(pb.ModelConfigRequest(name="coupled")).config.max_batch_size == 1


def test_configuration_of_a_model_that_needs_whole_sequences(stub) -> None:
    config = stub.ModelConfig(pb.ModelConfigRequest(name="bigru")).config
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert config.dynamic_batching.priority_levels == 3
    assert config.dynamic_batching.default_priority_level == 2
    assert [list(t.dims) for t in config.output] == [[2]]


def statistics(stub, **fields: str) -> dict[tuple[str, str], pb.ModelStatistics]:
    found = stub.ModelStatistics(pb.ModelStatisticsRequest(**fields)).model_stats
    return {(each.name, each.version): each for each in found}


def test_statistics_grow_with_what_was_done(repository: Path) -> None:
    x = np.zeros((4, 3), dtype=np.float32)
    with serving(repository) as served, stub_of(served) as stub:
        everything = statistics(stub)
        assert ("gru", "1") in everything
        assert ("gru", "2") in everything
        assert all(not each.inference_count and not each.last_inference for each in everything.values())
        sent = [step("lstm", 1, x[:1], sequence_start=t == 0) for t in range(10)]
        assert len(list(stub.ModelStreamInfer(iter(sent)))) == 10
        stub.ModelInfer(request("lstm", np.stack([x] * 5)))
        refused(stub.ModelInfer, request("lstm", x + np.nan))
        [after] = statistics(stub, name="lstm").values()
        assert after.inference_count == 10 + 5
        assert 2 <= after.execution_count <= served.on_loop(lambda: served.lane("lstm").tally.runs)
        stats = after.inference_stats
        assert [d.count for d in (stats.success, stats.queue, stats.compute_infer, stats.compute_output)] == [11] * 4
        assert (stats.fail.count, stats.fail.ns > 0) == (1, True)
        parts = [stats.queue, stats.compute_input, stats.compute_infer, stats.compute_output]
        assert all(part.ns for part in parts[1:])
        assert sum(part.ns for part in parts) == pytest.approx(stats.success.ns, rel=1e-3)
        assert after.last_inference > 1.6e12  # milliseconds
        assert statistics(stub, name="gru", version="1").keys() == {("gru", "1")}
        assert statistics(stub, name="gru").keys() == {("gru", "1"), ("gru", "2")}
        with pytest.raises(grpc.RpcError, match="no model 'nope'"):
            statistics(stub, name="nope")


def test_executions_are_runs_of_the_requests(repository: Path) -> None:
    """Steps that come one after another take a run each; ten sequences that are sent at once fewer."""
    x = np.zeros((1, 3), dtype=np.float32)
    with serving(repository) as served, stub_of(served) as stub:
        for t in range(10):
            stub.ModelInfer(step("lstm", 1, x, sequence_start=t == 0))
        [one] = statistics(stub, name="lstm").values()
        assert (one.inference_count, one.execution_count) == (10, 10)
        assert one.execution_count == served.on_loop(lambda: served.lane("lstm").tally.runs)


@pytest.mark.parametrize("name", sorted(ABSENT))
def test_absent_calls_say_so(served: Served, name: str) -> None:
    with grpc.insecure_channel(served.address) as channel:
        call = channel.unary_unary(f"/{SERVICE_NAME}/{name}")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"")
    assert code_of(details(caught.value)) == "UNIMPLEMENTED"
    assert f"{name}: this server does not support {ABSENT[name]}" in caught.value.details()


def test_reflection_knows_the_service(served: Served) -> None:
    with grpc.insecure_channel(served.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE_NAME),
        ]
        listed, described = stub.ServerReflectionInfo(iter(asked))
    assert SERVICE_NAME in [service.name for service in listed.list_services_response.service]
    [content] = described.file_descriptor_response.file_descriptor_proto
    assert b"ModelStreamInfer" in content
