"""Clients that die or cancel at any moment: nobody else's outputs change, and no slot leaks."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.pb.rnnserve.v1 import rnnserve_pb2_grpc as pb_grpc
from tests.onnx_models import build
from tests.rpc import Received, Requests, array, code_of, frame, open_stream, predict, run_alone, sequences
from tests.serving import Served, serving, serving_here

VICTIM = textwrap.dedent(
    """
    import sys
    import grpc, numpy as np
    from service.pb.rnnserve.v1 import rnnserve_pb2 as pb, rnnserve_pb2_grpc as pb_grpc
    from tests.rpc import frame, open_stream

    def requests():
        yield open_stream("lstm", sessions=[pb.SessionOpen()] * 5)
        while True:
            x = np.ones((20, 3), np.float32)
            yield frame(*[x] * 5, handles=range(5))

    responses = pb_grpc.SequenceServiceStub(grpc.insecure_channel(sys.argv[1])).StreamPredict(requests())
    for number, _ in enumerate(responses):
        if number == 3:
            print("streaming", flush=True)
    """
)


def test_killed_clients_leave_the_others_alone(repository: Path) -> None:
    (x,) = sequences(31, 1, 400, 400)
    with serving(repository) as served, served.stub() as stub:
        victims = [
            subprocess.Popen([sys.executable, "-c", VICTIM, served.address], stdout=subprocess.PIPE) for _ in range(3)
        ]
        requests = Requests()
        responses = stub.StreamPredict(iter(requests), timeout=60)
        requests.put(open_stream("lstm"))
        received = Received()
        lane = served.lane("lstm")
        try:
            for position in range(100):
                requests.put(frame(x[position : position + 1]))
            for victim in victims:
                assert victim.stdout.readline() == b"streaming\n"
            assert served.on_loop(lambda: lane.num_sessions) == 16
            for count, victim in enumerate(victims, start=1):
                victim.kill()
                for position in range(100 * count, 100 * count + 100):
                    requests.put(frame(x[position : position + 1]))
                victim.wait()
        finally:
            for victim in victims:
                victim.kill()
                victim.wait()
                victim.stdout.close()
        served.wait_until(lambda: lane.num_sessions == 1)
        served.wait_until(lambda: lane.slab.num_allocated == 1)
        requests.close()
        for response in responses:
            received.take(response)
        np.testing.assert_array_equal(received.rows(0), run_alone(repository, "lstm", x))
        assert served.on_loop(lambda: lane.slab.num_allocated) == 0
        assert served.on_loop(lambda: lane.scheduler.num_queued_steps) == 0


moments = st.lists(
    st.tuples(
        st.sampled_from(["stream", "frames", "buffered", "predict"]),
        st.integers(0, 12),  # frames sent before the cancellation
        st.integers(0, 12),  # answers awaited before it
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two")
    build("lstm").save(root, "lstm")
    build("lstm", bidirectional=True).save(root, "bilstm")
    return root


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moments=moments, seed=st.integers(0, 2**16))
def test_calls_cancelled_at_random_moments(two_models: Path, moments: list[tuple[str, int, int]], seed: int) -> None:
    (x,) = sequences(seed, 1, 60, 60)
    noise = sequences(seed + 1, 12, 1, 30)

    async def cancel(stub: pb_grpc.SequenceServiceStub, kind: str, num_frames: int, num_answers: int) -> None:
        if kind == "predict":
            tensor = pb.Tensor(data=b"".join(n.tobytes() for n in noise), lengths=[len(n) for n in noise])
            call = stub.Predict(pb.PredictRequest(model="lstm", inputs=[tensor]))
            for _ in range(num_frames):
                await asyncio.sleep(0)
            call.cancel()
            return
        call = stub.StreamPredict()
        opens = [pb.SessionOpen()] * (4 if kind == "frames" else 1)
        await call.write(open_stream("bilstm" if kind == "buffered" else "lstm", sessions=opens))
        for part in noise[:num_frames]:
            await call.write(frame(*[part] * len(opens), handles=range(len(opens))))
        if kind != "buffered":
            received = Received()
            while received.num_answers < len(opens) * sum(map(len, noise[: min(num_answers, num_frames)])):
                received.take(await call.read())
        call.cancel()

    async def run() -> np.ndarray:
        async with serving_here(two_models) as server:
            address = f"127.0.0.1:{server.port}"
            y = await stream_beside_cancellations(address)
            for lane in server.engine.lanes:
                for _ in range(10_000):  # turns of the loop, in which the server hears of the cancellations
                    await asyncio.sleep(0)
                    held = (lane.slab.num_allocated, lane.num_queued_steps, len(lane.sessions), lane.num_predicting)
                    if not any(held):
                        break
                assert held == (0, 0, 0, 0)
            return y

    async def stream_beside_cancellations(address: str) -> np.ndarray:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = pb_grpc.SequenceServiceStub(channel)
            call = stub.StreamPredict()
            await call.write(open_stream("lstm"))
            received = Received()
            for index, (kind, num_frames, num_answers) in enumerate(moments):
                for row in x[10 * index : 10 * index + 10]:
                    await call.write(frame(row[None]))
                await cancel(stub, kind, num_frames, num_answers)
            if len(moments) < 6:
                await call.write(frame(x[10 * len(moments) :]))
            await call.done_writing()
            while (response := await call.read()) is not grpc.aio.EOF:
                received.take(response)
            assert not received.errors
            return received.rows(0)

    y = asyncio.run(asyncio.wait_for(run(), timeout=30))
    np.testing.assert_array_equal(y, run_alone(two_models, "lstm", x))


@pytest.fixture
def served(repository: Path) -> Iterator[Served]:
    """A server for one test: sessions of others may linger on the shared one."""
    with serving(repository) as running:
        yield running


def test_session_with_a_linger_outlives_its_connection(served: Served, repository: Path) -> None:
    (x,) = sequences(32, 1, 30, 30)
    lane = served.lane("lstm")
    named = pb.SessionOpen(session_id="a", linger=Duration(seconds=60), replay_window=8)
    with served.stub() as stub:
        requests = Requests()
        responses = stub.StreamPredict(iter(requests), timeout=30)
        requests.put(open_stream("lstm", sessions=[named, pb.SessionOpen(session_id="b")]))
        requests.put(frame(x[:20], x[:20], handles=[0, 1]))
        received = Received()
        while sum(map(len, received.steps.values())) < 40:
            received.take(next(responses))
        responses.cancel()
        requests.close()
        served.wait_until(lambda: lane.num_sessions == 1)
        again = [open_stream("lstm", sessions=[named]), frame(x[15:], positions=[15])]
        resumed = Received.all(stub.StreamPredict(iter(again), timeout=30))
        assert (resumed.sessions[0].resumed, resumed.sessions[0].position) == (True, 20)
        assert sorted(resumed.steps[0]) == list(range(15, 30))
        alone = run_alone(repository, "lstm", x)
        for position, y in resumed.steps[0].items():
            np.testing.assert_array_equal(y, alone[position])
        only = pb.SessionOpen(session_id="b", resume_only=True)
        gone = Received.all(stub.StreamPredict(iter([open_stream("lstm", sessions=[only])])))
        assert code_of(gone.sessions[0].status) == "NOT_FOUND"
        # It lingers again after the half-close; closing it frees it.
        closing = [open_stream("lstm", sessions=[named]), frame(closes=[0])]
        assert Received.all(stub.StreamPredict(iter(closing))).closed[0].position == 30
    assert served.on_loop(lambda: lane.slab.num_allocated) == 0


def test_newest_connection_takes_a_session_over(served: Served, repository: Path) -> None:
    (x,) = sequences(33, 1, 20, 20)
    named = pb.SessionOpen(session_id="t", linger=Duration(seconds=60))
    with served.stub() as stub:
        requests = Requests()
        old = stub.StreamPredict(iter(requests), timeout=30)
        requests.put(open_stream("lstm", sessions=[named]))
        requests.put(frame(x[:8]))
        received = Received()
        while len(received.steps[0]) < 8:
            received.take(next(old))
        taken = Received.all(
            stub.StreamPredict(iter([open_stream("lstm", sessions=[named]), frame(x[8:]), frame(closes=[0])]))
        )
        requests.put(frame(x[8:9]))
        requests.close()
        for response in old:
            received.take(response)
    assert received.closed[0].reason == pb.CLOSE_REASON_TAKEN_OVER
    assert [(e.handle, code_of(e.status)) for e in received.errors] == [(0, "NOT_FOUND")]
    rows = [taken.steps[0][position] for position in range(8, 20)]
    np.testing.assert_array_equal(rows, run_alone(repository, "lstm", x)[8:])


def test_lingering_and_idle_sessions_expire(repository: Path) -> None:
    (x,) = sequences(34, 1, 5, 5)
    with serving(repository, session_idle_s=0.3) as served, served.stub() as stub:
        lane = served.lane("lstm")
        requests = Requests()
        responses = stub.StreamPredict(iter(requests), timeout=30)
        requests.put(open_stream("lstm"))
        requests.put(frame(x))
        received = Received()
        while 0 not in received.closed:
            received.take(next(responses))
        requests.put(frame(x))
        requests.close()
        for response in responses:
            received.take(response)
        assert received.closed[0].reason == pb.CLOSE_REASON_EXPIRED
        assert [(e.kind, code_of(e.status)) for e in received.errors] == [
            (pb.STEP_ERROR_KIND_SESSION_FAILED, "NOT_FOUND")
        ] * 2
        assert "idle" in received.errors[0].status.message
        brief = pb.SessionOpen(session_id="brief", linger=Duration(nanos=1_000_000))
        Received.all(stub.StreamPredict(iter([open_stream("lstm", sessions=[brief]), frame(x)])))
        served.wait_until(lambda: lane.slab.num_allocated == 0)


def test_client_that_stops_reading_is_throttled(tmp_path: Path) -> None:
    build("gru", features=256, hidden=4, outputs=1000).save(tmp_path, "broad")
    x = np.ones((64, 256), np.float32)
    num_frames, step_bytes = 400, 4000  # 26 MB of requests, 100 MB of answers
    with serving(tmp_path, max_unsent_bytes=1_000_000) as served, served.stub() as stub:
        lane = served.lane("broad")
        sent = threading.Event()

        def requests() -> Iterator[pb.StreamPredictRequest]:
            yield open_stream("broad")
            for _ in range(num_frames):
                yield frame(x)
            sent.set()

        responses = stub.StreamPredict(requests())
        next(responses)
        steps = [-1]

        def is_still() -> bool:
            steps.append(lane.tally.steps)
            return len(steps) > 500 and steps[-1] == steps[-400]

        served.wait_until(is_still)
        assert not sent.is_set(), "the client could send all without reading"
        assert steps[-1] * step_bytes < 25_000_000
        with served.stub() as other:
            y = array(predict(other, "broad", [x]).outputs[0])
        np.testing.assert_array_equal(y, run_alone(tmp_path, "broad", x))
        received = sum(sum(response.answer.lengths) for response in responses)
        assert received == num_frames * 64
        assert sent.is_set()
