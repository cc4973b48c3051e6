"""Models of several workers: what one is told, all do, and whoever is started again does as the others."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from service.client import Client
from service.pb.inference import inference_pb2 as pb
from service.pb.inference import inference_pb2_grpc as pb_grpc
from service.pb.rnnserve.v1 import rnnserve_pb2 as native
from service.pb.rnnserve.v1 import rnnserve_pb2_grpc as native_grpc
from tests.oip.calls import array, refused, step
from tests.onnx_models import build
from tests.rpc import Received, Requests, code_of, details, frame, open_stream, predict, run_alone, sequences
from tests.workers import Fleet, fleet_of, value, wait_until

MODELS = ("told", "broken", "sessions", "sequences", "load")
"""One for each test."""
NAMED = native.SessionOpen(session_id="s", linger=Duration(seconds=60))


def save(root: Path, name: str, version: int) -> None:
    """Put a version there as one should: under a hidden name, and then renamed."""
    file = build("gru", seed=version).save(root / f".{name}", "new", version)
    (root / name).mkdir(exist_ok=True)
    file.parent.rename(root / name / str(version))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    build("lstm").save(root, "lstm")  # by it the tests find out which worker they are connected to
    for name in MODELS:
        save(root, name, 1)
    return root


class Both:
    """A connection to each of two workers."""

    def __init__(self, fleet: Fleet, stack: ExitStack) -> None:
        self.fleet = fleet
        self.channels = [stack.enter_context(fleet.connect_to(index)) for index in range(2)]
        self.calls = [pb_grpc.GRPCInferenceServiceStub(channel) for channel in self.channels]
        self.native = [native_grpc.SequenceServiceStub(channel) for channel in self.channels]

    def states(self, index: int, model: str) -> list[str]:
        """State of each version, as a worker tells it."""
        models = self.calls[index].RepositoryIndex(pb.RepositoryIndexRequest()).models
        return [each.state for each in models if each.name == model]

    def versions(self, model: str) -> list[list[str]]:
        """What each worker itself serves."""
        answers = [stub.ListModels(native.ListModelsRequest()).models for stub in self.native]
        return [[each.version for each in models if each.name == model] for models in answers]

    def load(self, index: int, model: str) -> None:
        self.calls[index].RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=model))

    def unload(self, index: int, model: str) -> None:
        self.calls[index].RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=model))

    def restart(self, index: int) -> None:
        """Kill a worker, wait until it is there again, and connect to it."""
        old = self.fleet.worker(index)
        num = self.fleet.log.count(said := f"worker {index} is ready")
        old.kill()
        wait_until(lambda: self.fleet.log.count(said) > num and self.fleet.is_ready(), timeout_s=30)
        self.channels[index].close()
        self.channels[index] = channel = self.fleet.connect_to(index)
        self.calls[index] = pb_grpc.GRPCInferenceServiceStub(channel)
        self.native[index] = native_grpc.SequenceServiceStub(channel)


@pytest.fixture(scope="module")
def both(root: Path) -> Iterator[Both]:
    with fleet_of(root, "--watch", "3600") as fleet, ExitStack() as stack:  # calls change things, not the clock
        both = Both(fleet, stack)
        yield both
        for channel in both.channels:
            channel.close()


def test_what_one_worker_is_told_all_do(both: Both, root: Path) -> None:
    [x] = sequences(1, 1, 6, 6)
    save(root, "told", 2)
    save(root, "new", 7)
    both.load(0, "told")
    both.load(1, "new")
    assert both.versions("told") == [[2], [2]]
    assert both.versions("new") == [[7], [7]]
    for index in range(2):
        assert both.states(index, "told")[-1] == "READY"
        answer = predict(both.native[index], "told", [x])
        rows = np.frombuffer(answer.outputs[0].data, "<f4").reshape(-1, 2)
        np.testing.assert_array_equal(rows, run_alone(root, "told", x, version=2))
    both.unload(1, "new")
    assert both.versions("new") == [[], []]
    error = refused(both.calls[0].RepositoryModelUnload, pb.RepositoryModelUnloadRequest(model_name="new"))
    assert (code_of(details(error)), "no model 'new' is served; served: broken, load, lstm" in error.details()) == (
        "NOT_FOUND",
        True,
    )
    both.restart(0)  # it does not bring back what was unloaded
    assert both.versions("new") == [[], []]
    assert both.versions("told") == [[2], [2]]
    both.load(0, "new")
    assert both.versions("new") == [[7], [7]]


def test_what_is_broken_is_served_by_none_and_told_by_all(both: Both, root: Path) -> None:
    path = root / "broken" / "2" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes(b"no model")
    error = refused(both.calls[1].RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name="broken"))
    assert (code_of(details(error)), "version 2: " in error.details()) == ("FAILED_PRECONDITION", True)
    assert both.versions("broken") == [[1], [1]]
    both.restart(1)
    for stub in both.native:
        found = stub.ListModels(native.ListModelsRequest()).broken
        assert [(each.name, each.version) for each in found] == [("broken", 2)]
    assert both.states(0, "broken") == both.states(1, "broken") == ["READY", "UNAVAILABLE"]
    assert value(both.fleet.page(), "rnnserve_broken_models") == 1


class Stream:
    """A stream that opens the session "s", by name alone."""

    def __init__(self, stub: native_grpc.SequenceServiceStub, **opened: object) -> None:
        self.requests, self.received = Requests(), Received()
        self._responses = stub.StreamPredict(iter(self.requests), timeout=60)
        self.requests.put(open_stream("sessions", sessions=[NAMED], **opened))
        self.received.take(next(self._responses))

    def step(self, x: np.ndarray, start: int, stop: int) -> None:
        self.requests.put(frame(x[start:stop], handles=[0], positions=[start]))
        while any(position not in self.received.steps[0] for position in range(start, stop)):
            self.received.take(next(self._responses))

    def leave(self) -> None:
        """Half-close: the session lingers."""
        self.requests.close()
        self.received.take_all(self._responses)


def test_sessions_of_a_retired_version_still_move(both: Both, root: Path) -> None:
    """From worker to worker after an upgrade, to one that was started again too, until they end."""
    [x] = sequences(2, 1, 12, 12)
    expected = run_alone(root, "sessions", x)
    rows: dict[int, np.ndarray] = {}

    def go_on(index: int, start: int, stop: int, **opened: object) -> Stream:
        stream = Stream(both.native[index], **opened)
        assert stream.received.opened.version == 1
        assert stream.received.sessions[0].resumed is (start > 0)
        stream.step(x, start, stop)
        rows.update(stream.received.steps[0])
        return stream

    go_on(0, 0, 3).leave()
    save(root, "sessions", 2)
    both.load(1, "sessions")
    assert both.versions("sessions") == [[2], [2]]
    assert both.states(0, "sessions") == ["UNLOADING", "READY"]
    go_on(1, 3, 6).leave()  # it does not know of the version
    go_on(0, 6, 9, version=1).leave()  # it does
    both.restart(1)
    last = go_on(1, 9, 12)
    np.testing.assert_array_equal(np.array([rows[position] for position in range(12)]), expected)
    assert both.states(0, "sessions") == ["UNLOADING", "READY"]
    last.requests.put(frame(closes=[0]))
    last.leave()
    wait_until(lambda: both.states(0, "sessions") == ["UNAVAILABLE", "READY"])
    new = Stream(both.native[0])
    assert (new.received.opened.version, new.received.sessions[0].resumed) == (2, False)
    new.leave()


def test_sequences_of_a_retired_version_still_move(both: Both, root: Path) -> None:
    """Those of the Open Inference Protocol, whose clients know of no version."""
    [x] = sequences(3, 1, 9, 9)
    answers = [both.calls[0].ModelInfer(step("sequences", 5, x[:3], sequence_start=True))]
    save(root, "sequences", 2)
    both.load(0, "sequences")
    answers.append(both.calls[1].ModelInfer(step("sequences", 5, x[3:6])))
    answers.append(both.calls[0].ModelInfer(step("sequences", 5, x[6:])))
    assert [each.model_version for each in answers] == ["1"] * 3
    np.testing.assert_array_equal(np.concatenate([array(each)[0] for each in answers]), run_alone(root, "sequences", x))
    begun = both.calls[1].ModelInfer(
        step("sequences", 5, x[:4], sequence_start=True)
    )  # in place of the one that lives there
    assert begun.model_version == "2"
    wait_until(lambda: both.states(0, "sequences") == ["UNAVAILABLE", "READY"])
    rest = both.calls[0].ModelInfer(step("sequences", 5, x[4:], sequence_end=True))
    rows = np.concatenate([array(begun)[0], array(rest)[0]])
    np.testing.assert_array_equal(rows, run_alone(root, "sequences", x, version=2))


def test_upgrades_under_load_lose_nothing(both: Both, root: Path) -> None:
    """Clients on connections of both workers, with sessions that are left and resumed, and whole sequences."""
    xs = sequences(4, 8, 30, 30)
    is_over = threading.Event()
    known = {(version, i): run_alone(root, "load", x) for version in (1,) for i, x in enumerate(xs)}

    def expected(version: int, i: int) -> np.ndarray:
        if (version, i) not in known:
            known[version, i] = run_alone(root, "load", xs[i], version=version)
        return known[version, i]

    def live(i: int) -> set[int]:
        versions = set()
        with Client(both.fleet.address) as one, Client(both.fleet.address) as other:
            for number in itertools.count():
                if is_over.is_set() and number % 2 == 0:
                    return versions
                terms = {"session_id": f"{i}/{number}", "linger": 60}
                with one.stream("load", **terms) as stream:
                    rows = [stream.step(row) for row in xs[i][:15]]
                    version = stream.version
                with other.stream("load", **terms) as stream:
                    assert (stream.version, stream.resumed) == (version, True)
                    rows += [stream.step(row) for row in xs[i][15:]]
                    stream.close()
                np.testing.assert_array_equal(np.array(rows), expected(version, i))
                answer = other.predict("load", [xs[i]])
                np.testing.assert_array_equal(answer[0], expected(answer.version, i))
                versions |= {version, answer.version}
        return versions

    with ThreadPoolExecutor(len(xs)) as pool:
        calls = [pool.submit(live, i) for i in range(len(xs))]
        try:
            for version in (2, 3, 4):
                save(root, "load", version)
                both.load(version % 2, "load")
                wait_until(lambda: not both.states(0, "load").count("UNLOADING") or any(call.done() for call in calls))
        finally:
            is_over.set()
        seen = [call.result() for call in calls]
    assert set.union(*seen) >= {2, 3, 4}
