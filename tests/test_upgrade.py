"""An upgrade under load: live sessions finish on their version, new ones open on the new, and nothing fails."""

from __future__ import annotations

import asyncio
import itertools
import math
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from service.client import AsyncClient, Client, NotFound, SessionFailed
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from tests.generating import LETTERS, Oracle, save, tokens
from tests.onnx_models import build
from tests.rpc import Received, Requests, frame, open_stream, run_alone, sequences
from tests.serving import serving, serving_here, until

LATEST = {"version_policy": "latest:1", "watch": 3600}  # the test looks, not the clock
NUM_LIVE, NUM_STEPS = 48, 60


@pytest.fixture
def root(tmp_path: Path) -> Path:
    build("gru", layers=2, seed=1).save(tmp_path, "m", 1)
    return tmp_path


async def test_upgrades_under_load_lose_nothing(root: Path) -> None:
    """Three upgrades, each by a folder that appears, while sessions of all versions are live, among Predict calls."""
    async with serving_here(root, **LATEST) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        xs = sequences(5, NUM_LIVE, NUM_STEPS, NUM_STEPS)
        begun: list[int] = []  # version of each session, in the order of xs
        rows: list[list[np.ndarray]] = [[] for _ in xs]
        predicted: list[tuple[int, np.ndarray]] = []
        is_over = asyncio.Event()
        steps_wait = asyncio.Event()

        async def live(index: int) -> None:
            async with client.stream("m") as stream:
                begun[index:] = [stream.version]
                for number, x in enumerate(xs[index]):
                    if number == NUM_STEPS // 2:
                        await steps_wait.wait()
                    rows[index].append(await stream.step(x))
                assert stream.version == begun[index]

        async def predict() -> None:
            for index in itertools.count():
                if is_over.is_set():
                    return
                answer = await client.predict("m", [xs[index % NUM_LIVE]])
                predicted.append((answer.version, answer[0]))
                np.testing.assert_array_equal(answer[0], expected(answer.version, index % NUM_LIVE))

        known: dict[tuple[int, int], np.ndarray] = {}

        def expected(version: int, index: int) -> np.ndarray:
            if (version, index) not in known:
                known[version, index] = run_alone(root, "m", xs[index], version=version)
            return known[version, index]

        predicting = [asyncio.create_task(predict()) for _ in range(4)]
        living: list[asyncio.Task[None]] = []
        for version in (1, 2, 3, 4):
            if version > 1:
                build("gru", layers=2, seed=version).save(root, "m", version)
                await server.catalog.look()
                await server.catalog.look()
            for _ in range(NUM_LIVE // 4):
                living.append(asyncio.create_task(live(len(living))))
                await until(lambda: len(begun) == len(living))
        assert [lane.version for lane in server.engine.retired] == [1, 2, 3]
        assert all(lane.num_sessions == NUM_LIVE // 4 for lane in (*server.engine.retired, *server.engine.lanes))
        steps_wait.set()
        await asyncio.gather(*living)
        is_over.set()
        await asyncio.gather(*predicting)
        assert begun == sorted([1, 2, 3, 4] * (NUM_LIVE // 4))
        for index, version in enumerate(begun):
            np.testing.assert_array_equal(np.array(rows[index]), expected(version, index))
        assert [version for version, _ in predicted] == sorted(version for version, _ in predicted)
        assert {version for version, _ in predicted} >= {1, 4}
        await until(lambda: not server.hands.retirer.leaving)
        assert [lane.version for lane in server.engine.lanes] == [4]


def test_what_is_being_generated_is_finished_by_its_version(tmp_path: Path) -> None:
    """An encoder-decoder, whose calls hold nothing for a moment between the two."""
    for folder, seed in (("now", 2), ("later", 5)):
        save(tokens(seed, encoder=True), tmp_path / folder, "m")
    oracles = [Oracle(tmp_path / folder, "m") for folder in ("now", "later")]
    sources = [np.random.default_rng(seed).integers(0, LETTERS, 12).tolist() for seed in range(8)]
    is_over = threading.Event()

    def generate(stub, source) -> set[int]:
        versions = set()
        tensor = pb.Tensor(name="x", data=np.array(source, "<i8").tobytes(), lengths=[len(source)])
        while not is_over.is_set():
            started, *parts = stub.Generate(pb.GenerateRequest(model="m", inputs=[tensor]))
            version = started.started.version
            ids = [each for part in parts for each in part.output.ids]
            assert ids == oracles[version - 1].decode([1], source).ids
            versions.add(version)
        return versions

    root = tmp_path / "now"
    with serving(root, **LATEST) as served, served.stub() as stub, ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(generate, stub, source) for source in sources]
        served.wait_until(lambda: served.lane("m").tally.sequences > 50 or any(call.done() for call in calls))
        shutil.copytree(tmp_path / "later" / "m" / "1", root / "m" / "2")
        for _ in range(2):
            served.run(served.server.catalog.look())
        served.wait_until(lambda: not served.server.hands.retirer.leaving)
        served.wait_until(lambda: served.lane("m").tally.sequences > 50)
        is_over.set()
        assert served.lane("m").version == 2
        assert all(call.result() == {1, 2} for call in calls)


def test_stream_is_told_that_it_may_go_on_without_a_limit(root: Path) -> None:
    [first] = sequences(7, 1, 6, 6)
    with serving(root, **LATEST) as served, served.stub() as stub:
        requests = Requests()
        requests.put(open_stream("m"))
        requests.put(frame(first[:2], opens=[pb.SessionOpen()], handles=[0]))
        answers = stub.StreamPredict(iter(requests))
        received = Received()
        while not received.steps:
            received.take(next(answers))
        build("gru", layers=2, seed=2).save(root, "m", 2)
        for _ in range(2):
            served.run(served.server.catalog.look())
        while not received.drains:
            received.take(next(answers))
        assert not received.drains[0].HasField("grace")
        requests.put(frame(first[2:], opens=[pb.SessionOpen()], handles=[0]))
        requests.close()
        received.take_all(answers)
        np.testing.assert_array_equal(received.rows(0), run_alone(root, "m", first))
        assert "m/1 is being unloaded: open a new stream" in received.sessions[-1].status.message


async def test_gateway_is_told_to_open_what_is_new_elsewhere(root: Path) -> None:
    xs = sequences(6, 2, 6, 6)
    async with serving_here(root, **LATEST) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        async with client.gateway("m") as gateway:
            events = gateway.receive()
            first = gateway.open()
            await gateway.send({first: xs[0][:3]})
            rows = []
            while sum(map(len, rows)) < 3:
                rows += [each.output(entry) for each in [await anext(events)] for entry in range(len(each.handles))]
            build("gru", layers=2, seed=2).save(root, "m", 2)
            for _ in range(2):
                await server.catalog.look()
            assert (await anext(events)).drain_s == math.inf
            gateway.open()
            await gateway.send({first: xs[0][3:]})
            opened = []
            while sum(map(len, rows)) < 6:
                event = await anext(events)
                opened += event.opened
                rows += [event.output(entry) for entry in range(len(event.handles))]
            np.testing.assert_array_equal(np.concatenate(rows), run_alone(root, "m", xs[0]))
            assert "m/1 is being unloaded: open a new stream" in str(opened[-1].error)
        async with client.gateway("m") as gateway:
            assert (gateway.version, gateway.model.version) == (2, 2)


def test_sessions_end_where_a_limit_is_set(root: Path) -> None:
    [x] = sequences(8, 1, 4, 4)
    with serving(root, **LATEST, retire_s=0.1) as served, Client(served.address) as client:
        stream = client.stream("m").open()
        stream.step(x[0])
        build("gru", layers=2, seed=2).save(root, "m", 2)
        for _ in range(2):
            served.run(served.server.catalog.look())
        served.wait_until(lambda: not served.server.hands.retirer.leaving)
        with pytest.raises(SessionFailed, match="m/1 was unloaded: open a new session"):
            stream.step(x[1])
        assert stream.drain_s == pytest.approx(0.1)
        np.testing.assert_array_equal(client.predict("m", [x])[0], run_alone(root, "m", x, version=2))


def test_session_that_lingers_is_resumed_on_its_version(root: Path) -> None:
    """By name alone, as by a client that has begun anew and knows of no version."""
    [x] = sequences(9, 1, 6, 6)
    with serving(root, **LATEST) as served, Client(served.address) as client:
        with client.stream("m", session_id="s", linger=60) as stream:
            rows = [stream.step(each) for each in x[:3]]
        build("gru", layers=2, seed=2).save(root, "m", 2)
        for _ in range(2):
            served.run(served.server.catalog.look())
        with Client(served.address) as other, other.stream("m", session_id="s") as stream:
            assert (stream.version, stream.resumed, stream.model.version) == (1, True, 1)
            rows += [stream.step(each) for each in x[3:]]
        np.testing.assert_array_equal(np.array(rows), run_alone(root, "m", x))
        served.wait_until(lambda: not served.server.hands.retirer.leaving)
        with client.stream("m", session_id="s") as stream:
            assert (stream.version, stream.resumed) == (2, False)
        with pytest.raises(NotFound, match="model 'm' has no version 1; served: 2"), client.stream("m", version=1):
            pass


def test_stream_without_sessions_does_not_keep_a_version(root: Path) -> None:
    with serving(root, **LATEST) as served, served.stub() as stub:
        requests = Requests()
        requests.put(open_stream("m"))
        answers = stub.StreamPredict(iter(requests))
        assert next(answers).opened.version == 1
        shutil.rmtree(root / "m" / "1")
        for _ in range(2):
            served.run(served.server.catalog.look())
        with pytest.raises(grpc.RpcError, match="m/1 was unloaded"):
            for _ in answers:
                pass
        requests.close()
        served.wait_until(lambda: not served.server.hands.retirer.leaving)
