"""Lanes and servers whose states stay on a device: the same bits, and what is lost where a run fails halfway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from service import express
from service.client import Client as Remote
from service.device import DeviceRunner
from service.errors import RunFailed, StatesLost
from service.events import Closed, StepsFailed
from service.lane import Lane
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.sessions import SessionState
from tests.lanes import Client, drive, equal, lane_maker, run_alone, steps
from tests.onnx_models import build
from tests.rpc import Received, Requests, array, code_of, info_of, open_stream, predict, sequences
from tests.serving import Served, serving

MARK = np.float32(777.0)
"""A run with this value in it fails in the middle of its graph."""


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that looks up a row 1000 of a table of one row, if an input is the mark."""
    root = tmp_path_factory.mktemp("fragile")
    path = build("lstm").save(root, "fragile")
    file = onnx.load(path)
    constants = {"mark": MARK, "far": np.int64(1000), "table": np.zeros(1, np.float32)}
    file.graph.initializer.extend(numpy_helper.from_array(np.array(v), name) for name, v in constants.items())
    file.graph.node[-1].output[0] = "y.before"
    file.graph.node.extend(
        helper.make_node(op, inputs, [output], **attributes)
        for op, inputs, output, attributes in (
            ("Equal", ["x", "mark"], "is_mark", {}),
            ("Cast", ["is_mark"], "marks", {"to": onnx.TensorProto.INT64}),
            ("ReduceMax", ["marks"], "any", {"keepdims": 0}),
            ("Mul", ["any", "far"], "row", {}),
            ("Gather", ["table", "row"], "zero", {}),
            ("Add", ["y.before", "zero"], "y", {}),
        )
    )
    onnx.save(file, path)
    return root


@pytest.fixture(scope="module")
def on_device(repository: Path) -> Iterator[Served]:
    with serving(repository, keeps_states=True) as running:
        yield running


# ---- the same bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["lstm", "gru", "bilstm", "bigru"])
def test_whole_sequences_and_their_final_states(served: Served, on_device: Served, model: str) -> None:
    assert isinstance(on_device.lane(model).runner, DeviceRunner)
    assert not isinstance(served.lane(model).runner, DeviceRunner)
    found = []
    for server in (served, on_device):
        with Remote(server.address) as client:
            first = client.predict(model, sequences(1, 40, 1, 50), return_state=True)
            then = client.predict(model, sequences(2, 40, 1, 50), states=first.states, return_state=True)
        found.append([*first, *first.states.values(), *then, *then.states.values()])
    for theirs, ours in zip(*found, strict=True):
        equal(ours, theirs)


@pytest.mark.parametrize("inline_run_ms", [0, 1000])
def test_streams_of_sessions_that_come_and_go(repository: Path, inline_run_ms: int) -> None:
    xs = sequences(3, 24, 5, 30)
    with serving(repository, keeps_states=True, inline_run_ms=inline_run_ms, max_chunk_steps=4) as server:
        lane = server.lane("lstm")
        with Remote(server.address) as client:
            for part in (xs[:8], xs[8:16], xs[16:]):  # each takes over the slots of the one before
                with client.gateway("lstm") as gateway:
                    handles = [gateway.open() for _ in part]
                    for at in range(0, 30, 3):
                        gateway.send({h: x[at : at + 3] for h, x in zip(handles, part, strict=True) if at < len(x)})
                    gateway.end()
                    rows: dict[int, list[np.ndarray]] = {handle: [] for handle in handles}
                    for events in gateway.receive():
                        for handle, outputs in events:
                            rows[handle].append(outputs)
                for handle, x in zip(handles, part, strict=True):
                    equal(np.concatenate(rows[handle]), run_alone(lane, x).y)
        assert server.on_loop(lambda: lane.slab.num_allocated) == 0


# ---- runs that fail halfway -----------------------------------------------------------------------------------------


def marked(x: np.ndarray, at: int) -> np.ndarray:
    x = x.copy()
    x[at] = MARK
    return x


@pytest.mark.parametrize("keeps_states", [False, True])
def test_a_run_that_may_have_moved_states_ends_its_sessions_and_no_others(fragile: Path, keeps_states: bool) -> None:
    lane = lane_maker(fragile, keeps_states=keeps_states)("fragile")
    client = Client(lane)
    xs = {client.open(): steps(seed, 4) for seed in range(4)}
    client.send({handle: x[:1] for handle, x in xs.items()})
    drive(lane)
    client.send({1: marked(xs[1], 2)[1:3], 2: xs[2][1:3]})
    drive(lane)
    lost = [1, 2] if keeps_states else [1]  # on the host, rows that failed are run again one by one
    client.send({handle: x[1:] for handle, x in xs.items() if handle in (0, 3)})
    drive(lane)
    failures, ends = client.told(StepsFailed), client.told(Closed)
    assert [(f.handle, f.position, f.num_steps, f.is_over) for f in failures] == [(h, 1, 2, True) for h in lost]
    assert {isinstance(f.error, StatesLost) for f in failures} == {keeps_states}
    assert [(c.handle, c.position, c.state) for c in ends] == [(h, 1, SessionState.FAILED) for h in lost]
    for handle in (0, 3):
        equal(client.rows(handle), run_alone(lane, xs[handle]).y)
    assert lane.slab.num_allocated == 4 - len(lost)
    x = steps(9, 3)
    handles = [client.open() for _ in lost]  # they get the slots that were freed
    client.send(dict.fromkeys(handles, x))
    drive(lane)
    for handle in handles:
        equal(client.rows(handle), run_alone(lane, x).y)


def fail_next_run(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next run fail once it has moved the states."""
    step = lane.runner._step
    run = step.run

    def fail() -> None:
        monkeypatch.setattr(step, "run", run)
        run()
        raise RunFailed("the device is gone for a moment")

    monkeypatch.setattr(step, "run", fail)


@pytest.mark.parametrize("inline_run_ms", [0, 1000])
def test_a_server_tells_those_whose_states_are_lost_and_serves_on(
    repository: Path, monkeypatch: pytest.MonkeyPatch, inline_run_ms: int
) -> None:
    boarded: list[Lane] = []
    board = express.board
    monkeypatch.setattr(express, "board", lambda lane, num: boarded.append(lane) or board(lane, num))
    (x,) = sequences(4, 1, 6, 6)
    requests = Requests()
    received = Received()
    with serving(repository, keeps_states=True, inline_run_ms=inline_run_ms) as server, server.stub() as stub:
        lane = server.lane("lstm")

        def send(*rows: np.ndarray, handles: list[int]) -> None:
            """One step each, as plain frames have them, and wait for what is said to it."""
            message = pb.StreamFrame(handles=handles)
            message.tensors.add(data=b"".join(row.tobytes() for row in rows))
            requests.put(pb.StreamPredictRequest(frame=message))
            told = received.num_answers + len(received.errors) + len(handles)
            while received.num_answers + len(received.errors) < told:
                received.take(next(responses))

        opens = [pb.SessionOpen() for _ in range(3)]
        requests.put(open_stream("lstm", sessions=opens))
        responses = stub.StreamPredict(iter(requests), timeout=30)
        received.take(next(responses))
        for row in x[:3]:
            send(row, row, row, handles=[0, 1, 2])
        for handles in ([0, 1], [2]):
            send(*[x[3]] * len(handles), handles=handles)  # how long runs of as many rows take is known from now on
        server.on_loop(lambda: fail_next_run(lane, monkeypatch))
        num_boarded = len(boarded)
        send(x[4], x[4], handles=[0, 1])
        assert len(boarded) - num_boarded == (inline_run_ms > 0)  # by the short way, and not again
        send(x[4], handles=[2])
        requests.close()
        for response in responses:
            received.take(response)
        assert [(e.handle, e.position, code_of(e.status)) for e in received.errors] == [
            (0, 4, "INTERNAL"),
            (1, 4, "INTERNAL"),
        ]
        assert {e.kind for e in received.errors} == {pb.STEP_ERROR_KIND_SESSION_FAILED}
        assert {info_of(e.status).reason for e in received.errors} == {"STATES_LOST"}
        assert {h: c.reason for h, c in received.closed.items()} == {
            0: pb.CLOSE_REASON_FAILED,
            1: pb.CLOSE_REASON_FAILED,
            2: pb.CLOSE_REASON_CLIENT,
        }
        equal(received.rows(2), run_alone(lane, x[:5]).y)
        server.on_loop(lambda: fail_next_run(lane, monkeypatch))
        with pytest.raises(grpc.RpcError) as caught:
            predict(stub, "lstm", [x, x])
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        equal(array(predict(stub, "lstm", [x]).outputs[0]), run_alone(lane, x).y)
        assert server.on_loop(lambda: lane.slab.num_allocated) == 0


def test_final_states_that_can_not_be_read_are_a_failure_and_free_their_slot(repository: Path) -> None:
    lane = lane_maker(repository, keeps_states=True)("lstm")
    client = Client(lane, wants_states=True)
    x = steps(5, 3)
    client.send({client.open(): x})
    drive(lane)
    reader, lane.slab._reader._binding = lane.slab._reader._binding, None
    lane.close(client.link, 0)
    lane.slab._reader._binding = reader
    [failed], [closed] = client.told(StepsFailed), client.told(Closed)
    assert (failed.position, failed.num_steps, failed.is_over) == (3, 0, True)
    assert isinstance(failed.error, RunFailed)
    assert (closed.state, closed.final_states) == (SessionState.CLOSED, None)
    assert lane.slab.num_allocated == 0
