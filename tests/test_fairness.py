"""What holds under load: nobody starves, late work is not run, models share time, and refusals come at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest

from service.engine import Engine
from service.errors import DeadlineExpired, Overloaded, RunFailed
from service.events import Answer, Event, Steps, StepsFailed
from service.lane import Lane
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.policies import Priority
from service.predict import CallLine, PredictCall, Sequences
from service.sessions import Terms
from service.tally import Tally
from tests.lanes import Client, drive, equal, finish, lane_maker, run_alone, steps
from tests.onnx_models import build
from tests.rpc import Received, Requests, code_of, details, frame, info_of, open_stream, predict, retry_of
from tests.serving import serving

LaneMaker = Callable[..., Lane]


@pytest.fixture
def lane_of(repository: Path) -> LaneMaker:
    return lane_maker(repository)


def whole(x: np.ndarray, num: int = 1, **fields: object) -> Sequences:
    """One sequence, `num` times."""
    return Sequences(
        inputs=[np.concatenate([x] * num)], lengths=np.full(num, len(x)), states=[None, None], outputs=[0], **fields
    )


def num_runs_until(lane: Lane, holds: Callable[[], object], line: CallLine | None = None) -> int:
    """Run until something holds. Returns the number of runs that it took."""
    for num_runs in range(10_000):
        if holds():
            return num_runs
        if line is not None:
            line.feed(0.0)
        lane.flush()
        finish(lane, lane.next_run(0.0))
    raise AssertionError("it never came to hold")


# ---- sessions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bulk", [1, 30])
def test_one_step_is_answered_within_two_runs_beside_ten_thousand_in_one_message(lane_of, num_bulk):
    lane = lane_of("lstm")
    bulk, single = Client(lane), Client(lane)
    bulk.send({bulk.open(): steps(seed, 10_000 // num_bulk) for seed in range(num_bulk)})
    single.open()
    x = steps(99, 8)
    for position, row in enumerate(x):
        lane.flush()
        run = lane.next_run(0.0)
        single.send({0: row[None]})  # while a run goes on
        finish(lane, run)
        assert num_runs_until(lane, lambda position=position: len(single.answers()) > position) <= 2
    equal(single.rows(), run_alone(lane, x).y)
    assert 0 < lane.scheduler.num_queued_steps < 10_000
    drive(lane)
    assert sum(len(bulk.rows(handle)) for handle in bulk.link.sessions) == 10_000 // num_bulk * num_bulk


@pytest.mark.parametrize("settings", [{}, {"max_batch_rows": 8}, {"max_batch_rows": 1}])
def test_a_high_step_waits_for_the_run_that_goes_on_whatever_else_is_queued(lane_of, settings):
    lane = lane_of("lstm", **settings)
    low, normal, high = Client(lane), Client(lane), Client(lane)
    low.send({low.open(Terms(priority=Priority.LOW)): steps(seed, 1000) for seed in range(20)})
    normal.send({normal.open(): steps(seed, 1000) for seed in range(20)})
    high.open(Terms(priority=Priority.HIGH))
    waits = []
    for position, row in enumerate(steps(98, 40)):
        lane.flush()
        run = lane.next_run(0.0)
        high.send({0: row[None]})
        finish(lane, run)
        waits.append(num_runs_until(lane, lambda position=position: len(high.answers()) > position))
    # A batch of one row can't share with the class that is due.
    assert (max(waits), waits.count(2) > 0) == ((2, True) if lane.scheduler.config.max_rows == 1 else (1, False))
    assert sum(waits) <= len(waits) * 8 / 7 + 1


def test_room_that_high_steps_leave_goes_to_lower_ones_in_the_same_run(lane_of):
    lane = lane_of("lstm", max_batch_rows=4)
    clients = {priority: Client(lane) for priority in (Priority.LOW, Priority.NORMAL, Priority.HIGH)}
    for priority, client in clients.items():
        client.send({client.open(Terms(priority=priority)): steps(handle, 1) for handle in range(2)})
    lane.flush()
    finish(lane, lane.next_run(0.0))
    assert {priority.name: len(client.told(Answer)) for priority, client in clients.items()} == {
        "LOW": 0,
        "NORMAL": 1,
        "HIGH": 1,
    }
    finish(lane, lane.next_run(0.0))
    assert lane.tally.run_rows == {4: 1, 2: 1}


def test_a_priority_ends_with_its_session_and_changes_when_it_is_resumed(lane_of):
    lane = lane_of("lstm", max_batch_rows=1, max_sessions=2)
    client, other = Client(lane), Client(lane)
    other.open()
    client.open(Terms(session_id="a", linger_s=9.0, priority=Priority.LOW))
    client.send({0: steps(1, 3)})
    other.send({0: steps(2, 1)})
    assert num_runs_until(lane, lambda: other.answers()) == 1
    again = Client(lane)
    again.open(Terms(session_id="a", linger_s=9.0, priority=Priority.HIGH))
    other.send({0: steps(2, 1)})
    again.send({0: steps(1, 1)})
    assert num_runs_until(lane, lambda: len(again.answers()) == 4) == 2
    lane.close(again.link, 0)
    drive(lane)
    new = Client(lane)
    new.open()  # in the slot of the one that was closed
    other.send({0: steps(2, 1)})
    new.send({0: steps(3, 1)})
    assert num_runs_until(lane, lambda: len(other.answers()) == 3) == 1
    assert new.answers() == []


# ---- late work ------------------------------------------------------------------------------------------------------


def test_steps_that_expire_while_a_run_goes_on_are_not_run(lane_of):
    lane = lane_of("lstm", max_batch_rows=16)
    client = Client(lane)
    client.send({client.open(): steps(seed, 1) for seed in range(100)}, deadline=1.0)
    lane.flush()
    run = lane.next_run(0.0)
    finish(lane, run, now=2.0)
    assert lane.next_run(2.0) is None
    assert (lane.tally.runs, lane.tally.steps) == (1, 16)
    assert [type(failed.error) for failed in client.told(StepsFailed)] == [DeadlineExpired] * 84


async def test_a_call_that_is_given_up_is_run_no_further(lane_of):
    lane = lane_of("lstm", max_batch_rows=8)
    async with engine_of(lane) as engine:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await engine.predict(lane, whole(steps(1, 60), 1000))
        await engine.predict(lane, whole(steps(2, 5)))
        num_steps = lane.tally.steps
        await engine.predict(lane, whole(steps(2, 5)))
        assert lane.tally.steps == num_steps + 5 < 60_000
        assert (lane.num_queued_steps, lane.num_predicting, lane.slab.num_allocated) == (0, 0, 0)


# ---- calls ----------------------------------------------------------------------------------------------------------


async def test_a_call_of_one_sequence_does_not_wait_for_one_of_thousands(lane_of):
    lane = lane_of("lstm", max_predict_sequences=64, max_batch_rows=16)
    line = CallLine(lane)
    bulk = PredictCall(lane, whole(steps(1, 200), 5000))
    line.append(bulk)
    num_runs_until(lane, lambda: lane.tally.runs == 20, line)
    x = steps(2, 3)
    single = PredictCall(lane, whole(x))
    line.append(single)
    assert num_runs_until(lane, single.result.done, line) <= 4
    equal(single.result.result().outputs[0], run_alone(lane, x).y)
    assert not bulk.is_fed
    bulk.withdraw()
    lane.drop(bulk.link, 0.0)


async def test_calls_of_many_sequences_share_the_slots_evenly(lane_of):
    lane = lane_of("lstm", max_predict_sequences=60, max_batch_rows=16)
    line = CallLine(lane)
    calls = [PredictCall(lane, whole(steps(1, 2), 3000)) for _ in range(3)]
    for call in calls:
        line.append(call)
    num_runs_until(lane, lambda: lane.tally.runs == 200, line)
    done = [call._num_done for call in calls]
    assert max(done) <= 1.25 * min(done)
    assert all(call.num_held <= 30 for call in calls)
    num_runs_until(lane, lambda: all(call.result.done() for call in calls), line)
    assert not line


async def test_high_calls_get_slots_first_and_low_ones_have_their_turn(lane_of):
    lane = lane_of("lstm", max_predict_sequences=1)
    line = CallLine(lane)
    low = PredictCall(lane, whole(steps(1, 1), 3, priority=Priority.LOW))
    line.append(low)
    order = []
    while not low.result.done():
        high = PredictCall(lane, whole(steps(2, 1), priority=Priority.HIGH))
        line.append(high)
        while not high.result.done():
            num_done = low._num_done
            assert num_runs_until(lane, lambda before=lane.tally.runs: lane.tally.runs > before, line) == 1
            order.append("low" if low._num_done > num_done else "high")
            assert len(order) < 100
    assert order == (["high"] * 7 + ["low"]) * 3 + ["high"]


async def test_sequences_of_a_high_call_run_before_those_of_a_low_one(lane_of):
    lane = lane_of("lstm", max_batch_rows=4)
    line = CallLine(lane)
    low = PredictCall(lane, whole(steps(1, 100), 200, priority=Priority.LOW))
    high = PredictCall(lane, whole(steps(2, 1), 4, priority=Priority.HIGH))
    line.append(low)
    num_runs_until(lane, lambda: lane.tally.runs == 3, line)
    line.append(high)
    assert num_runs_until(lane, high.result.done, line) == 1


async def test_a_call_that_waits_no_more_is_not_fed(lane_of):
    lane = lane_of("lstm", max_predict_sequences=1)
    line = CallLine(lane)
    calls = [PredictCall(lane, whole(steps(1, 2))) for _ in range(3)]
    for call in calls:
        line.append(call)
    line.discard(calls[1])
    line.discard(calls[1])
    num_runs_until(lane, lambda: calls[2].result.done(), line)
    assert [call.result.done() for call in calls] == [True, False, True]
    assert not line


# ---- models ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def engine_of(*lanes: Lane, **arguments: object) -> AsyncIterator[Engine]:
    engine = Engine(lanes[0].settings, **arguments)
    for lane in lanes:
        engine.add(lane)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


class LiveClient(Client):
    """One whose steps an engine runs."""

    def __init__(self, lane: Lane) -> None:
        super().__init__(lane)
        self.was_told = asyncio.Event()

    def _take(self, event: Event) -> None:
        super()._take(event)
        self.was_told.set()

    async def answered(self, num_steps: int) -> None:
        while len(self.answers()) < num_steps:
            self.was_told.clear()
            await self.was_told.wait()


@dataclass(slots=True)
class Runs(Tally):
    """Notes the time of every run, and tells when there were so many."""

    goal: int = 0
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    seconds: list[float] = field(default_factory=list)

    def count_run(self, num_rows: int, num_steps: int, seconds: float) -> None:
        Tally.count_run(self, num_rows, num_steps, seconds)
        self.seconds.append(seconds)
        if len(self.seconds) == self.goal:
            self.reached.set()


async def test_models_with_work_get_equal_time_though_one_has_longer_runs(tmp_path):
    build("lstm", hidden=8).save(tmp_path, "small")
    build("lstm", hidden=256).save(tmp_path, "large")
    lane_of = lane_maker(tmp_path)
    lanes = [lane_of("large", max_batch_rows=64), lane_of("small", max_batch_rows=64)]
    for lane in lanes:
        lane.tally = Runs()
    lanes[0].tally.goal = 12
    async with engine_of(*lanes) as engine:
        calls = [asyncio.create_task(engine.predict(lane, whole(steps(1, 64), 16_000))) for lane in lanes]
        await lanes[0].tally.reached.wait()
        large, small = (lane.tally.seconds for lane in lanes)
        for call in calls:
            assert not call.done()
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    assert abs(sum(large) - sum(small)) <= max(large) + max(small)
    assert len(small) > 3 * len(large)  # by turns they would be equal


async def test_short_ways_count_as_time(lane_of):
    lane = lane_of("lstm", inline_run_ms=1e6)
    async with engine_of(lane) as engine:
        client = LiveClient(lane)
        client.open()
        for position in range(20):
            sessions = [client.link.sessions[0]]
            engine.submit(lane, Steps(client.link, sessions, None, None, [steps(position, 1).tobytes()]))
            await client.answered(position + 1)
    assert lane.tally.runs == 20
    assert lane.attained_s == pytest.approx(lane.tally.run_seconds) != 0


async def test_runs_that_fail_count_as_time(lane_of, monkeypatch):
    lane = lane_of("lstm")
    now = [0.0]

    def fails(*_: object) -> None:
        now[0] += 1.0
        raise RunFailed("nothing works")

    monkeypatch.setattr(lane.runner, "run", fails)
    async with engine_of(lane, clock=lambda: now[0]) as engine:
        with pytest.raises(RunFailed):
            await engine.predict(lane, whole(steps(1, 5), 3))
    assert lane.attained_s == 3.0  # each row alone


# ---- overload -------------------------------------------------------------------------------------------------------


def test_overload_is_refused_at_once_and_the_accepted_load_is_answered(repository, monkeypatch):
    x = steps(1, 100)
    with serving(repository, max_queued_steps=100, inline_run_ms=0) as served, served.stub() as stub:
        lane = served.lane("lstm")
        gate, began, run = threading.Event(), threading.Event(), lane.runner.run

        def waits(*arguments: object) -> object:
            began.set()
            assert gate.wait(20)
            return run(*arguments)

        monkeypatch.setattr(lane.runner, "run", waits)
        requests = Requests()
        responses, received = stub.StreamPredict(iter(requests), timeout=30), Received()
        requests.put(open_stream("lstm"))
        requests.put(frame(x))
        assert began.wait(10)
        for _ in range(20):  # while a run goes on
            with pytest.raises(grpc.RpcError) as caught:
                predict(stub, "lstm", [x[:50]])
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert info_of(details(caught.value)).reason == "OVERLOADED"
            assert retry_of(details(caught.value)) == 0.25
            assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "250"
        requests.put(frame(steps(2, 50), handles=[1], opens=[pb.SessionOpen()]))
        served.wait_until(lambda: lane.num_sessions == 2)
        assert not received.steps
        gate.set()
        requests.close()
        for response in responses:
            received.take(response)
    [error] = received.errors
    assert (error.handle, code_of(error.status), retry_of(error.status)) == (1, "RESOURCE_EXHAUSTED", 0.25)
    np.testing.assert_array_equal(received.rows(0), run_alone(lane, x).y)
    assert (lane.tally.steps, received.num_answers) == (100, 100)


def test_what_is_refused_costs_the_accepted_load_no_run(lane_of):
    lane = lane_of("lstm", max_queued_steps=1000, max_batch_rows=10)
    accepted = Client(lane)
    accepted.send({accepted.open(): steps(seed, 1) for seed in range(1000)})
    lane.flush()
    for wave in range(100):
        late = Client(lane)
        late.send({late.open(): steps(seed, 1) for seed in range(100)})
        lane.flush()
        failed = late.told(StepsFailed)
        assert len(failed) == (100 if wave == 0 else 90)  # told before another run; each run made room for ten
        assert all(isinstance(each.error, Overloaded) and each.error.retry_after_s for each in failed)
        finish(lane, lane.next_run(0.0))
        assert sum(len(answer.handles) for answer in accepted.told(Answer)) == 10 * (wave + 1)
