"""Drives every lane on one asyncio loop: whatever is ready runs now, nobody waits for a batch to fill.

A run that is measured to be short happens on the loop itself; a long one happens on a thread, one at a time, while the
loop goes on receiving. Lanes with work share the time of runs evenly, whatever one run of each takes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import Context
from typing import Any, NamedTuple

import numpy.typing as npt

from service import express
from service.config import Settings
from service.errors import RunFailed, ServiceError, StatesLost, Unavailable
from service.events import Link, Steps
from service.lane import Lane
from service.policies import LeastServed
from service.predict import Call, CallLine, PredictCall, Prediction, Sequences
from service.runs import Run
from service.scheduler import Batch
from service.shelf import Shelf

log = logging.getLogger(__name__)
Array = npt.NDArray[Any]

Watch = Callable[[Lane, express.Express | Batch, float, float], None]
EXPIRY_TICK_S = 0.25
_UNKNOWN = float("inf")
UNWATCHED = 4
"""How much longer a run may hold the loop while no stream is connected: a thread costs more than the wait."""
COST_SMOOTHING = 0.2
"""Weight of the newest measurement in a run's expected cost."""
OUTLIER = 2.0
"""A run counts as at most so many times what was expected: where others use the machine, one in some hundreds takes ten
times as long, and must not send those that follow to a thread."""


class Engine(Shelf):
    """Holds the lanes, and runs their batches."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.settings = settings
        self.clock = clock
        self.is_draining = False
        self._waiting: dict[Lane, CallLine] = {}
        self._shares = LeastServed()
        self._links: set[Link] = set()  # of streams
        self._costs: dict[_Key, float] = {}
        self._is_awake = False
        self._is_on_thread = False
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rnnserve-run")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ticker: asyncio.TimerHandle | None = None
        self.watch: Watch | None = None
        """Is told of every run before its results are handed out: (lane, work, when it ended, its seconds)."""
        self._context = Context()
        """Of runs, which are no call's own: else they would be made in that of whoever woke the engine."""

    # ---- models -----------------------------------------------------------------------------------------------------

    def prepare(self, lane: Lane) -> None:
        """Make room for the work of a model version, which finds it only once it is served."""
        super().prepare(lane)
        for each in _both(lane):
            self._waiting[each] = CallLine(each)
        self._costs |= {(lane, *size): seconds for size, seconds in lane.run_costs.items()}

    def is_used(self, lane: Lane) -> bool:
        """Whether anything lives, waits or runs in a lane, or it still has rows in the spill store."""
        if self.is_held(lane):
            return True
        for each in _both(lane):
            if each.sessions or each.inbox or self._waiting[each] or each.scheduler.num_queued_steps:
                return True
        return lane.residence is not None and lane.residence.num_stale > 0

    def end_all(self, lane: Lane, error: ServiceError) -> None:
        """End what lives in a lane, and tell whoever it is why."""
        for each in _both(lane):
            each.lose(list(each.sessions.by_slot), error)

    def forget(self, lane: Lane) -> None:
        """Let go of a version that is retired, or was not to be served after all, and is not used."""
        super().forget(lane)
        for each in _both(lane):
            del self._waiting[each]
        self._costs = {key: cost for key, cost in self._costs.items() if key[0] in self._waiting}

    # ---- work -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._tick()

    def stop(self) -> None:
        """End: no run begins after it."""
        if self._ticker is not None:
            self._ticker.cancel()
        self._loop = None
        self._executor.shutdown(wait=True)

    def check_open(self, lane: Lane | None = None) -> None:
        """Raise Unavailable while the server drains, or where that model version is unloaded."""
        if self.is_draining:
            raise Unavailable("this server is stopping: use another one, or try again after a while", retry_after_s=1.0)
        if lane is not None and self.is_retired(lane):
            raise Unavailable(
                f"{lane.name}/{lane.version} is being unloaded: open a new stream, of a version that is served"
            )

    def attach(self, link: Link) -> None:
        """Count a stream, until it is detached or dropped."""
        self._links.add(link)

    def detach(self, link: Link) -> None:
        """Count a stream no more, whose sessions, if it has any, go on."""
        self._links.discard(link)

    def submit(self, lane: Lane, steps: Steps) -> None:
        """Take steps of live sessions; their answers come to the link as events."""
        lane.submit(steps, self.clock())
        if len(self._links) == 1 and not self._is_awake and not self._is_on_thread:
            self._pump()  # there is nobody to wait for
        else:
            self.wake()

    async def predict(self, lane: Lane, sequences: Sequences) -> Prediction:
        """Run whole sequences. Cancelling it frees what they hold."""
        self.check_open()
        with lane.tally.refusals():
            call = PredictCall(lane, sequences)
        with self.queued(lane, call):
            return await call.result

    @contextmanager
    def queued(self, lane: Lane, call: Call) -> Iterator[None]:
        """Begin a call's sequences as slots come free, and free what they hold at the end of the block."""
        if lane not in self._waiting:
            call.withdraw()
            raise Unavailable(f"{lane.name}/{lane.version} is unloaded: use a version that is served")
        call.arrived_at = self.clock()
        self._waiting[lane].append(call)
        self.wake()
        try:
            yield
        finally:
            call.withdraw()
            self.drop(lane, call.link)
            self._waiting[lane].discard(call)

    def drop(self, lane: Lane, link: Link) -> None:
        """A link is gone: free what it holds."""
        self._links.discard(link)
        while not lane.drop(link, self.clock()):
            if self._loop is not None:
                self._loop.call_soon(self.drop, lane, link)  # what others sent has its turn in between
                break
        self.wake()

    def wake(self) -> None:
        """Look for work once this turn of the loop has taken in what has arrived."""
        if not self._is_awake and not self._is_on_thread and self._loop is not None:
            self._is_awake = True
            self._loop.call_soon(self._pump, context=self._context)

    def _pump(self) -> None:
        """Run one batch of the lane that has had the least time among those that have one."""
        self._is_awake = False
        if self._is_on_thread or self._loop is None:
            return
        now = self.clock()
        busy = self._busy()
        while busy:
            lane = self._shares.pick(busy)
            busy.remove(lane)
            if lane.inbox and not self._waiting[lane] and self._run_express(lane):
                return
            lane.flush()
            self._waiting[lane].feed(now)
            try:
                run = lane.next_run(now)
            except Exception:
                log.exception("a run of %s could not be made", lane.name, extra=lane.about)
                self.wake()
                return
            if run is not None:
                self._dispatch(_Job(lane, run))
                return

    def _busy(self) -> list[Lane]:
        """Lanes that may have something to run; no run goes on."""
        return [lane for lane, calls in self._waiting.items() if lane.inbox or calls or lane.scheduler.num_queued_steps]

    def _run_express(self, lane: Lane) -> bool:
        """Run what has arrived by the short way, if it is one batch that is known to take little time."""
        num_messages, num_rows = express.num_rows(lane)
        key = (lane, (num_rows - 1).bit_length(), 0)
        if not num_rows or not self._is_short(key):
            return False
        boarded = express.board(lane, num_messages)
        if boarded is None:
            return False
        began = time.perf_counter()
        try:
            outputs = boarded.execute()
        except StatesLost as error:
            log.error("a run of %s with %d rows failed: %s", lane.name, num_rows, error, extra=lane.about)
            lane.lose(boarded.slots.tolist(), error)
            self.wake()
            return True
        except RunFailed:
            return False  # nothing has changed; the long way finds out whose fault it is
        seconds = time.perf_counter() - began
        self._learn(key, seconds)
        lane.attained_s += seconds
        try:
            now = self.clock()
            if self.watch is not None:
                self.watch(lane, boarded, now, seconds)
            express.arrive(boarded, outputs, now, seconds)
        except Exception:
            log.exception("a bug in taking the results of a run of %s", lane.name, extra=lane.about)
        if self._busy():
            self.wake()
        return True

    def _dispatch(self, job: _Job) -> None:
        assert self._loop is not None  # noqa: S101  checked by _pump
        if self._is_short(job.key):
            try:
                outcome: _Outcome | RunFailed = job.execute()
            except RunFailed as error:
                outcome = error
            self._finish(job, outcome)
        else:
            self._is_on_thread = True
            self._loop.run_in_executor(self._executor, job.execute).add_done_callback(
                lambda done: self._leave_thread(job, done)
            )

    def _leave_thread(self, job: _Job, done: asyncio.Future[_Outcome]) -> None:
        self._is_on_thread = False
        self._finish(job, done.exception() or done.result())

    def _finish(self, job: _Job, outcome: _Outcome | BaseException) -> None:
        """Hand a run's results to its lane; whatever happens, the server goes on."""
        lane, now = job.lane, self.clock()
        try:
            if isinstance(outcome, BaseException):
                num_rows = len(job.run.batch.slots)
                log.error("a run of %s with %d rows failed: %s", lane.name, num_rows, outcome, extra=lane.about)
                if isinstance(outcome, StatesLost):
                    lane.abandon(job.run.batch, outcome)
                else:
                    lane.fail(job.run, now)
                lane.attained_s += self.clock() - now
            else:
                lane.attained_s += outcome.seconds
                self._learn(job.key, outcome.seconds)
                if self.watch is not None:
                    self.watch(lane, job.run.batch, now, outcome.seconds)
                lane.complete(job.run, outcome.outputs, now, outcome.seconds)
        except Exception:
            log.exception("a bug in taking the results of a run of %s", lane.name, extra=lane.about)
            lane.abandon(job.run.batch)
        self.wake()

    def _is_short(self, key: _Key) -> bool:
        """Whether a run is known to take so little time that it may happen on the loop."""
        limit_ms = self.settings.inline_run_ms * (1 if self._links else UNWATCHED)
        return self._costs.get(key, _UNKNOWN) <= limit_ms / 1000

    def _learn(self, key: _Key, seconds: float) -> None:
        known = self._costs.get(key, seconds)
        self._costs[key] = known + COST_SMOOTHING * (min(seconds, OUTLIER * known) - known)

    def _tick(self) -> None:
        """End what has expired, every so often."""
        if self._loop is None:
            return
        for lane in list(self._waiting):
            lane.expire(self.clock())
        self._ticker = self._loop.call_later(EXPIRY_TICK_S, self._tick)


def _both(lane: Lane) -> tuple[Lane, ...]:
    """A lane, and the encoder's before it if it has one."""
    return (lane,) if lane.encoder is None else (lane.encoder, lane)


_Key = tuple[Lane, int, int]
"""A run's lane, and its rows and steps rounded up to powers of two: what its cost is remembered by."""


class _Outcome(NamedTuple):
    outputs: list[Array]
    seconds: float


class _Job:
    """A run of a lane."""

    __slots__ = ("key", "lane", "run")

    def __init__(self, lane: Lane, run: Run) -> None:
        self.lane = lane
        self.run = run
        self.key = (lane, (len(run.batch.slots) - 1).bit_length(), (run.batch.steps - 1).bit_length())

    def execute(self) -> _Outcome:
        began = time.perf_counter()
        outputs = self.run.execute()
        return _Outcome(outputs, time.perf_counter() - began)
