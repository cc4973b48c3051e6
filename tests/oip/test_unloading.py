"""Unloading: new work is refused, what is live may end, and then everything is given back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.pb.inference import inference_pb2 as pb
from service.pb.rnnserve.v1 import rnnserve_pb2 as native
from tests.lanes import equal
from tests.oip.calls import array, refused, request, step, stub_of
from tests.onnx_models import build
from tests.rpc import Received, Requests, code_of, details, frame, open_stream, run_alone, sequences
from tests.serving import Served, serving
from tests.workers import wait_until

LONG, SHORT = 60.0, 0.2


@pytest.fixture
def root(tmp_path: Path) -> Path:
    build("gru", layers=2).save(tmp_path, "m", 1)
    build("gru", layers=2, seed=1).save(tmp_path, "m", 2)
    build("lstm").save(tmp_path, "other")
    return tmp_path


def unload(stub, name: str = "m") -> None:
    stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=name))


def states(stub) -> dict[str, str]:
    models = stub.RepositoryIndex(pb.RepositoryIndexRequest()).models
    return {f"{m.name}/{m.version}": m.state for m in models}


@contextmanager
def given_back(served: Served) -> Iterator[None]:
    """What takes the memory of m must be gone soon after the block, though no collection happens by itself."""
    refs = []
    for version in (1, 2):
        lane = served.server.engine.lane("m", version)
        refs += [weakref.ref(each) for each in (lane, lane.backend, lane.runner, lane.slab)]
        del lane
    gc.collect()
    gc.disable()
    try:
        yield
        served.wait_until(lambda: all(ref() is None for ref in refs))
    finally:
        gc.enable()


def test_live_sequence_ends_in_its_own_time(root: Path) -> None:
    [x] = sequences(1, 1, 6, 6)
    with serving(root, drain_s=LONG) as served, stub_of(served) as stub, given_back(served):
        stub.ModelInfer(step("m", 1, x[:2], sequence_start=True))
        unload(stub)
        assert states(stub)["m/2"] == "UNLOADING"
        for message in (request("m", x[None]), step("m", 2, x, sequence_start=True)):
            error = refused(stub.ModelInfer, message)
            assert code_of(details(error)) == "NOT_FOUND"
            assert "served: other" in error.details()
        assert not stub.ModelReady(pb.ModelReadyRequest(name="m")).ready
        rows = [array(stub.ModelInfer(step("m", 1, x[2:4])))[0]]
        rows.append(array(stub.ModelInfer(step("m", 1, x[4:], sequence_end=True)))[0])
        equal(np.concatenate(rows), run_alone(root, "m", x, version=2)[2:])


def test_live_sequence_that_takes_too_long_is_ended(root: Path) -> None:
    [x] = sequences(2, 1, 2, 2)
    with serving(root, drain_s=SHORT) as served, stub_of(served) as stub, given_back(served):
        stub.ModelInfer(step("m", 1, x, sequence_start=True))
        unload(stub)
        wait_until(lambda: states(stub) == {"m/1": "UNAVAILABLE", "m/2": "UNAVAILABLE", "other/1": "READY"})
        error = refused(stub.ModelInfer, step("m", 1, x))
        assert "no model 'm' is served" in error.details()


def test_stream_is_told_and_ends_in_its_own_time(root: Path) -> None:
    [x] = sequences(3, 1, 6, 6)
    with serving(root, drain_s=LONG) as served, stub_of(served) as stub, served.stub() as calls, given_back(served):
        requests = Requests()
        requests.put(open_stream("m"))
        requests.put(frame(x[:2], opens=[native.SessionOpen()], handles=[0]))
        answers = calls.StreamPredict(iter(requests))
        received = Received()
        while not received.steps:
            received.take(next(answers))
        unload(stub)
        while not received.drains:
            received.take(next(answers))
        assert received.drains[0].grace.seconds == LONG
        requests.put(frame(x[2:], opens=[native.SessionOpen()], handles=[0]))
        requests.close()
        received.take_all(answers)
        equal(received.rows(0), run_alone(root, "m", x, version=2))
        assert "m/2 is being unloaded" in received.sessions[-1].status.message


def test_stream_that_takes_too_long_is_ended(root: Path) -> None:
    [x] = sequences(4, 1, 3, 3)
    with serving(root, drain_s=SHORT) as served, stub_of(served) as stub, served.stub() as calls, given_back(served):
        requests = Requests()
        requests.put(open_stream("m"))
        requests.put(frame(x, opens=[native.SessionOpen()], handles=[0]))
        answers = calls.StreamPredict(iter(requests))
        received = Received()
        while not received.steps:
            received.take(next(answers))
        unload(stub)
        with pytest.raises(grpc.RpcError) as caught:
            received.take_all(answers)
        requests.close()
        assert code_of(details(caught.value)) == "UNAVAILABLE"
        assert "m/2 was unloaded" in caught.value.details()
        [error] = received.errors
        assert "m/2 was unloaded: open a new session" in error.status.message
        assert received.closed[0].reason == native.CLOSE_REASON_FAILED


def test_whole_sequences_that_run_are_finished(root: Path) -> None:
    x = np.random.default_rng(5).standard_normal((200, 100, 3)).astype(np.float32)
    with serving(root, drain_s=LONG) as served, stub_of(served) as stub, given_back(served):
        call = stub.ModelInfer.future(request("m", x))
        served.wait_until(lambda: served.lane("m").num_predicting > 0)
        unload(stub)
        rows = array(call.result())
        equal(rows[7], run_alone(root, "m", x[7], version=2))


def test_unloaded_model_can_be_loaded_again(root: Path) -> None:
    [x] = sequences(6, 1, 4, 4)
    with serving(root, drain_s=LONG) as served, stub_of(served) as stub:
        stub.ModelInfer(step("m", 1, x[:2], sequence_start=True))
        unload(stub)
        with grpc.insecure_channel(served.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            asked = health_pb2.HealthCheckRequest(service="m/2")
            assert health.Check(asked).status == health_pb2.HealthCheckResponse.NOT_SERVING
            stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="m"))
            assert health.Check(asked).status == health_pb2.HealthCheckResponse.SERVING
        assert states(stub) == {"m/1": "READY", "m/2": "READY", "other/1": "READY"}
        old = array(stub.ModelInfer(step("m", 1, x[2:], sequence_end=True)))[0]  # it lives on what was unloaded
        equal(old, run_alone(root, "m", x, version=2)[2:])
        new = stub.ModelInfer(step("m", 1, x, sequence_start=True, sequence_end=True))
        equal(array(new)[0], run_alone(root, "m", x, version=2))
        served.wait_until(lambda: not served.server.engine.retired)
        assert stub.ModelReady(pb.ModelReadyRequest(name="m")).ready


def test_spilled_states_are_given_back(root: Path, tmp_path: Path) -> None:
    x = np.zeros((1, 3), dtype=np.float32)
    spill = {"max_resident_sessions": 2, "spill_store": tmp_path / "states.db"}
    with serving(root, drain_s=SHORT, **spill) as served, stub_of(served) as stub:
        for sequence_id in range(1, 9):
            stub.ModelInfer(step("m", sequence_id, x, sequence_start=True))
        lane = served.lane("m")
        assert lane.residence.num_spilled == 6
        unload(stub)
        served.wait_until(lambda: not served.server.engine.retired)
        assert not lane.residence.num_stale
        assert served.server._store._db.execute("SELECT count(*) FROM state").fetchone() == (0,)


def test_model_that_is_not_served(root: Path) -> None:
    with serving(root) as served, stub_of(served) as stub:
        with pytest.raises(grpc.RpcError, match="no model 'nope' is served; served: m, other"):
            unload(stub, "nope")
        unload(stub)
        with pytest.raises(grpc.RpcError, match="no model 'm' is served; served: other"):
            unload(stub)


def test_server_stops_while_a_model_is_leaving(root: Path) -> None:
    x = np.zeros((1, 3), dtype=np.float32)
    with serving(root, drain_s=SHORT) as served, stub_of(served) as stub:
        stub.ModelInfer(step("m", 1, x, sequence_start=True))
        unload(stub)
