"""Counts for the metrics, of one lane and of gRPC calls: plain numbers and buckets, cheap enough for every run."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import compress

from service.errors import ServiceError

DURATIONS_S = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
"""Upper bounds of buckets, seconds: from a run of one small step to what a client has long given up."""


class Cause(StrEnum):
    """Why a session ended, or went."""

    CLOSED = "closed"
    """Its client closed it, or ended its stream."""
    DISCONNECTED = "disconnected"
    """Its connection is gone, and it does not linger."""
    EXPIRED = "expired"
    """It was idle, or lingered, past its limit."""
    FAILED = "failed"
    """A fault of the server ended it."""
    DRAINED = "drained"
    """Its model version was unloaded."""


CALLS_S = (
    *(0.0, 0.00001, 0.00005, 0.0001, 0.0003, 0.0006, 0.0008, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008),
    *(0.01, 0.013, 0.016, 0.02, 0.025, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5),
    *(0.65, 0.8, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0),
)
"""Bounds of the durations of calls, and"""
CALLS_BYTES = (0.0, *(float(4**power) for power in (5, 5.5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)))
"""of the sizes of their messages, as gRPC's proposal A66 asks for."""


class Histogram:
    """How many values there were up to each bound, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float] = DURATIONS_S) -> None:
        """Begin with none; bounds ascend, and the last bucket has none."""
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(self.counts)

    def observe(self, value: float, weight: int = 1) -> None:
        """Count a value, `weight` times."""
        self.counts[bisect_left(self.bounds, value)] += weight
        self.sum += weight * value

    def observe_since(self, times: list[float], now: float) -> None:
        """Count now - t for each of some times, which ascend: a few comparisons, however many there are."""
        bounds, counts, num = self.bounds, self.counts, len(times)
        self.sum += num * now - sum(times)
        if not num:
            return
        at, high = 0, bisect_left(bounds, now - times[0])
        low = bisect_left(bounds, now - times[-1])
        while high > low:  # times before now - bounds[high - 1] are more than that bound ago
            stop = bisect_left(times, now - bounds[high - 1], at)
            counts[high] += stop - at
            at, high = stop, high - 1
        counts[low] += num - at


@dataclass(slots=True)
class Tally:
    """What a lane has done since it was loaded."""

    load_seconds: float = 0.0
    """Time that loading and probing it took."""
    steps: int = 0
    runs: int = 0
    run_rows_sum: int = 0
    run_rows: dict[int, int] = field(default_factory=dict)
    """Runs by number of rows, rounded up to a power of two."""
    run_durations: Histogram = field(default_factory=Histogram)
    queue_durations: Histogram = field(default_factory=Histogram)
    """From the arrival of a request to the beginning of its first run."""
    request_durations: Histogram = field(default_factory=Histogram)
    """From the arrival of a request to the end of its last run."""
    sequences: int = 0
    sessions_opened: int = 0
    sessions_ended: dict[Cause, int] = field(default_factory=lambda: dict.fromkeys(Cause, 0))
    """By cause; one that goes on in another worker has not ended."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Refusals by reason."""
    outputs: int = 0
    """Outputs of sequences that make them by themselves: ids, or steps."""
    first_outputs: Histogram = field(default_factory=Histogram)
    """From a call to the first output of each of its sequences."""
    next_outputs: Histogram = field(default_factory=Histogram)
    """From an output to the next one of its sequence."""
    spills: int = 0
    """States moved out of memory, to the spill store."""
    restores: int = 0
    """States moved back."""
    spill_errors: int = 0
    """Failures of the spill store."""

    @property
    def run_seconds(self) -> float:
        """Time of all runs."""
        return self.run_durations.sum

    def count_run(self, num_rows: int, num_steps: int, seconds: float) -> None:
        """Count a run."""
        bucket = 1 << (num_rows - 1).bit_length()
        self.runs += 1
        self.steps += num_steps
        self.run_rows_sum += num_rows
        self.run_rows[bucket] = self.run_rows.get(bucket, 0) + 1
        self.run_durations.observe(seconds)

    def count_requests(
        self, arrived: list[float], is_first: list[bool], is_last: list[bool], now: float, seconds: float
    ) -> None:
        """Count the requests that a run has begun and ended, one a row; it took so many seconds, until now."""
        began_at = now - seconds
        if False not in is_last and False not in is_first:  # mostly
            times = sorted(arrived)
            self.queue_durations.observe_since(times, began_at)
            self.request_durations.observe_since(times, now)
            return
        self.queue_durations.observe_since(sorted(compress(arrived, is_first)), began_at)
        self.request_durations.observe_since(sorted(compress(arrived, is_last)), now)

    def count_rejected(self, reason: str) -> None:
        """Count a refusal."""
        self.rejected[reason] = self.rejected.get(reason, 0) + 1

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Count what the block raises."""
        try:
            yield
        except ServiceError as error:
            self.count_rejected(error.reason)
            raise


@dataclass(slots=True)
class Ended:
    """Calls of one method that ended with one status."""

    durations: Histogram = field(default_factory=lambda: Histogram(CALLS_S))
    sent: Histogram = field(default_factory=lambda: Histogram(CALLS_BYTES))
    """Bytes of the messages of each."""
    received: Histogram = field(default_factory=lambda: Histogram(CALLS_BYTES))


@dataclass(slots=True)
class CallTally:
    """What gRPC calls a server has had."""

    started: dict[str, int] = field(default_factory=dict)
    """By method."""
    ended: dict[tuple[str, str], Ended] = field(default_factory=dict)
    """By method and status."""

    def begin(self, method: str) -> None:
        """Count a call that begins."""
        self.started[method] = self.started.get(method, 0) + 1

    def end(self, method: str, status: str, seconds: float, sent: int, received: int) -> None:
        """Count its end."""
        ended = self.ended.get((method, status))
        if ended is None:
            ended = self.ended[method, status] = Ended()
        ended.durations.observe(seconds)
        ended.sent.observe(sent)
        ended.received.observe(received)
