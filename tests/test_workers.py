"""Several workers behind one port, as processes: what one of them does, or suffers, is its own affair."""

from __future__ import annotations

import signal
import socket
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from google.protobuf.duration_pb2 import Duration

from service.client import Client
from service.config import load_settings
from service.errors import ConfigError
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.pb.rnnserve.v1 import rnnserve_pb2_grpc as pb_grpc
from service.rpc import supervisor
from service.rpc.metrics import left_behind, merge, read_page, write_page
from service.telemetry import OVER_WORKERS
from tests.client.proxy import proxied
from tests.onnx_models import build
from tests.rpc import Received, Requests, frame, open_stream, run_alone, sequences
from tests.serving import Served
from tests.workers import LSTM, Fleet, command, fleet_of, value, wait_until

LINGERING = {"linger": Duration(seconds=60), "replay_window": 8}


class Stream:
    """A stream of one session on a connection of its own."""

    def __init__(self, channel: grpc.Channel, x: np.ndarray, **opened: object) -> None:
        self.requests = Requests()
        self.received = Received()
        self._x = x
        self._responses = pb_grpc.SequenceServiceStub(channel).StreamPredict(iter(self.requests), timeout=60)
        self.requests.put(open_stream("lstm", **opened))
        self.received.take(next(self._responses))

    def step(self, start: int, stop: int) -> None:
        """Send steps one by one, and wait for their answers."""
        for position in range(start, stop):
            self.requests.put(frame(self._x[position : position + 1], positions=[position]))
        while any(position not in self.received.steps[0] for position in range(start, stop)):
            self.received.take(next(self._responses))

    def end(self) -> None:
        """Half-close, and take the rest."""
        self.requests.close()
        for response in self._responses:
            self.received.take(response)

    def until_drained(self) -> None:
        while not self.received.drains:
            self.received.take(next(self._responses))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    build("lstm").save(root, "lstm")
    build("lstm", bidirectional=True).save(root, "bilstm")
    return root


@pytest.fixture(scope="module")
def fleet(models: Path) -> Iterator[Fleet]:
    """Two workers, for tests that leave them as they were."""
    with fleet_of(models) as running:
        yield running


def test_connections_land_on_both_workers_and_one_page_sums_them(fleet: Fleet, models: Path) -> None:
    assert "2 workers" in fleet.announced[0]
    assert any(line.startswith("  lstm/1  lstm8") for line in fleet.announced)
    xs = sequences(61, 16, 5, 5)
    before = fleet.page()
    with ExitStack() as stack:
        streams = [Stream(stack.enter_context(fleet.connect()), x) for x in xs]
        for stream in streams:
            stream.step(0, 5)
        counts = fleet.per_worker("rnnserve_sessions")
        assert min(counts) > 0
        assert sum(counts) == 16
        page = fleet.page()
        for stream in streams:
            stream.end()
    for stream, x in zip(streams, xs, strict=True):
        np.testing.assert_array_equal(stream.received.rows(0), run_alone(models, "lstm", x))
    assert value(page, "rnnserve_sessions", **LSTM) == 16
    assert value(page, "rnnserve_steps_total", **LSTM) - value(before, "rnnserve_steps_total", **LSTM) == 80
    assert value(page, "rnnserve_batch_size_count", **LSTM) == value(page, "rnnserve_runs_total", **LSTM) > 0
    assert value(page, "rnnserve_batch_size_bucket", le="+Inf", **LSTM) == value(page, "rnnserve_runs_total", **LSTM)
    assert value(page, "rnnserve_slots", **LSTM) == 2 * fleet.per_worker("rnnserve_slots")[0]
    assert value(page, "rnnserve_model_exactness", verdict="exact", **LSTM) == 1
    assert value(page, "rnnserve_workers") == 2
    assert value(page, "rnnserve_worker_restarts_total") == 0
    assert fleet.get("/livez") == fleet.get("/readyz") == "ok\n"


def test_a_session_is_resumed_on_another_worker_with_its_kept_answers(fleet: Fleet, models: Path) -> None:
    (x,) = sequences(62, 1, 40, 40)
    named = [pb.SessionOpen(session_id="resumed", **LINGERING)]
    with fleet.connect_to(0) as first, fleet.connect_to(1) as second:
        old = Stream(first, x, sessions=named)
        old.step(0, 20)
        old.end()
        assert fleet.per_worker("rnnserve_sessions") == [1, 0]
        new = Stream(second, x, sessions=named)
        [opened] = new.received.sessions
        assert (opened.resumed, opened.position) == (True, 20)
        assert fleet.per_worker("rnnserve_sessions") == [0, 1]
        new.step(15, 30)
        back = Stream(first, x)  # its session comes in a frame
        back.requests.put(frame(x[30:], opens=named, handles=[0], positions=[30]))
        back.requests.put(frame(closes=[0]))
        back.end()
        new.end()
    assert new.received.closed[0].reason == pb.CLOSE_REASON_TAKEN_OVER
    assert (back.received.sessions[-1].resumed, back.received.sessions[-1].position) == (True, 30)
    alone = run_alone(models, "lstm", x)
    for received, start, stop in ((new.received, 15, 30), (back.received, 30, 40)):
        assert sorted(received.steps[0]) == list(range(start, stop))
        for position, y in received.steps[0].items():
            np.testing.assert_array_equal(y, alone[position])
    assert fleet.per_worker("rnnserve_sessions") == [0, 0]


def test_a_malformed_frame_moves_no_session(fleet: Fleet) -> None:
    (x,) = sequences(63, 1, 5, 5)
    named = [pb.SessionOpen(session_id="stays", **LINGERING)]
    with fleet.connect_to(0) as first, fleet.connect_to(1) as second:
        old = Stream(first, x, sessions=named)
        new = Stream(second, x)
        new.requests.put(frame(x, opens=named, handles=[0, 0], lengths=[2, 3]))
        new.requests.put(frame(closes=[0]))
        new.end()
        assert fleet.per_worker("rnnserve_sessions") == [1, 0]
        old.step(0, 5)
        old.requests.put(frame(closes=[0]))
        old.end()
    assert new.received.sessions[-1].status.message == "a handle stands in a frame at most once"


def test_a_name_opened_everywhere_at_once_is_one_session(fleet: Fleet) -> None:
    (x,) = sequences(64, 1, 5, 5)
    named = [pb.SessionOpen(session_id="wanted", **LINGERING)]
    with fleet.connect_to(0) as first, fleet.connect_to(1) as second:
        streams: list[Stream] = []
        threads = [
            threading.Thread(target=lambda channel: streams.append(Stream(channel, x, sessions=named)), args=[channel])
            for channel in [first, second] * 4
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(fleet.per_worker("rnnserve_sessions")) == 1
        assert [stream.received.sessions[0].resumed for stream in streams].count(False) == 1
        for stream in streams:
            stream.requests.put(frame(closes=[0]))
            stream.end()
    reasons = [stream.received.closed[0].reason for stream in streams]
    assert sorted(reasons) == [pb.CLOSE_REASON_CLIENT] + [pb.CLOSE_REASON_TAKEN_OVER] * 7
    assert fleet.per_worker("rnnserve_sessions") == [0, 0]


def test_a_client_resumes_wherever_it_comes_to(fleet: Fleet, models: Path) -> None:
    (x,) = sequences(67, 1, 400, 400)
    before = fleet.per_worker("rnnserve_steps_total")
    with (
        proxied(fleet.address) as proxy,
        Client(proxy.address) as client,
        client.stream("lstm", session_id="roams", linger=60.0, replay_window=16) as stream,
    ):
        proxy.cut_at(*range(900, 9900, 900))
        rows = np.array(list(stream.run(iter(x))))
        stream.close()
    assert proxy.num_cuts >= 8
    np.testing.assert_array_equal(rows, run_alone(models, "lstm", x))
    after = fleet.per_worker("rnnserve_steps_total")
    assert min(np.subtract(after, before)) > 0
    assert sum(after) - sum(before) == 400
    assert fleet.per_worker("rnnserve_sessions") == [0, 0]


def test_a_worker_that_is_killed_is_nobody_elses_affair_and_sigterm_drains_all(models: Path, tmp_path: Path) -> None:
    (x,) = sequences(65, 1, 60, 60)
    place = tmp_path / "models"
    place.symlink_to(models)
    with fleet_of(place, "--drain-s", "20") as fleet, fleet.connect_to(0) as first, fleet.connect_to(1) as second:
        lost, kept = Stream(first, x), Stream(second, x)
        lost.step(0, 20)
        kept.step(0, 20)
        before = fleet.page()
        place.unlink()  # so that a new worker can't start at first
        fleet.worker(0).kill()
        with pytest.raises(grpc.RpcError) as caught:
            lost.end()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        kept.step(20, 40)
        wait_until(lambda: value(fleet.page(), "rnnserve_workers") == 1)
        assert value(fleet.page(), "rnnserve_ready") == 0
        page = fleet.page()
        assert not fleet.is_ready()
        assert fleet.get("/livez") == "ok\n"
        assert value(page, "rnnserve_sessions", **LSTM) == 1
        steps = value(page, "rnnserve_steps_total", **LSTM)
        assert steps == value(before, "rnnserve_steps_total", **LSTM) + 20
        wait_until(lambda: fleet.log.count("could not start") == 1)
        place.symlink_to(models)
        wait_until(fleet.is_ready)
        assert "worker 0 was ended by SIGKILL, and its sessions are lost; it is started again in 0.5 s" in fleet.log
        assert f"could not start: repository {place} is no directory" in fleet.log
        assert "it is started again in 1.0 s" in fleet.log
        page = fleet.page()
        assert value(page, "rnnserve_steps_total", **LSTM) >= steps
        assert value(page, "rnnserve_worker_restarts_total") == 2
        assert value(page, "rnnserve_ready") == 1
        with fleet.connect_to(0) as again:
            served = Stream(again, x)
            served.step(0, 40)
            workers = [fleet.worker(index) for index in range(2)]
            fleet.process.send_signal(signal.SIGTERM)
            for stream in (served, kept):
                stream.until_drained()
            assert not fleet.is_ready()
            for stream in (served, kept):
                stream.step(40, 60)
                stream.end()
                np.testing.assert_array_equal(stream.received.rows(0), run_alone(models, "lstm", x))
        assert fleet.process.wait(timeout=20) == 0
        assert not any(worker.is_running() for worker in workers)
        assert not list(fleet.scratch.glob("rnnserve-*"))


def test_a_supervisor_that_is_killed_leaves_nothing_behind(models: Path, tmp_path: Path) -> None:
    spilling = ("--max-resident-sessions", "8", "--spill-store", str(tmp_path / "states.db"))
    with fleet_of(models, *spilling) as fleet:
        assert {path.name for path in tmp_path.iterdir()} == {"states.db.0", "states.db.1"}
        port = int(fleet.address.rpartition(":")[2])
        workers = [fleet.worker(index) for index in range(2)]
        assert {worker.ppid() for worker in workers} == {fleet.process.pid}
        fleet.process.kill()
        psutil.wait_procs(workers, timeout=10)
        assert not any(worker.is_running() for worker in workers)
        assert not list(fleet.scratch.glob("rnnserve-*"))
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", port))


def test_ports_of_others_are_refused(fleet: Fleet, models: Path) -> None:
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # it would share its port with anybody
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = str(stranger.getsockname()[1])
        for option, taken in (("--port", port), ("--http-port", port), ("--port", fleet.address.rpartition(":")[2])):
            with command(models, option, taken) as (process, _, errors):
                assert process.wait(timeout=20) == 2
                assert errors.read_text().startswith(f"error: can't listen on 127.0.0.1:{taken}")


def test_what_keeps_a_worker_from_starting_is_said_once(models: Path) -> None:
    with command(models, "--provider", "cuda") as (process, scratch, errors):
        assert process.wait(timeout=30) == 2
        assert process.stdout.read() == ""
        assert errors.read_text().startswith("error: provider 'cuda' needs CUDAExecutionProvider")
        assert errors.read_text().count("\n") == 1
        assert list(scratch.iterdir()) == [errors]


async def test_what_can_not_be_done_here_says_what_to_do(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings({"repository": models, "workers": 2, "port": 0, "http_port": 0})
    long = tmp_path / ("long" * 20)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(ConfigError, match="TMPDIR"):
        await supervisor.run(settings)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="--workers 1"):
        await supervisor.run(settings)


def test_merged_pages_sum_what_counts_and_show_facts_once() -> None:
    page = read_page(
        b'# TYPE a_total counter\na_total{m="x"} 3.0\n# TYPE b gauge\nb 2.0\n'
        b"# TYPE rnnserve_broken_models gauge\nrnnserve_broken_models 4.0\n"
    )
    other = read_page(b'# TYPE a_total counter\na_total{m="x"} 1.0\na_total{m="y"} 5.0\n')
    text = write_page(merge([page, other, left_behind(page)])).decode()
    assert 'a_total{m="x"} 7.0' in text
    assert 'a_total{m="y"} 5.0' in text
    assert "\nb 2.0" in text
    assert "\nrnnserve_broken_models 4.0" in text


def test_every_gauge_was_thought_about(served: Served) -> None:
    """A gauge is summed over workers unless OVER_WORKERS says otherwise; a new one has to be put on one side."""
    summed = {"rnnserve_sessions", "rnnserve_slots_used", "rnnserve_slots", "rnnserve_queued_steps"}
    summed |= {"rnnserve_max_sessions"}
    summed |= {"rnnserve_sessions_resident", "rnnserve_sessions_spilled"}
    summed |= {"process_virtual_memory_bytes", "process_resident_memory_bytes", "process_open_fds"}
    with urllib.request.urlopen(f"http://127.0.0.1:{served.server.http_port}/metrics") as response:
        gauges = {metric.name for metric in read_page(response.read()) if metric.type == "gauge"}
    assert gauges == summed | OVER_WORKERS.keys()
