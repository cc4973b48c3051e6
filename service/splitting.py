"""Whether a batch is worth splitting over threads: decided by what it was measured to cost each way.

Waking a thread takes about as long as some dozens of steps of a small model, and it may have to share a core: how large
a batch must be for that to pay can't be known beforehand. Batches of about one size are tried each way some times; then
the cheapest way is taken, and now and then another one, in case things have changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

TRIALS = 4
"""Runs of each way before one is preferred; the first of each is not counted, since it makes what later ones find."""
RECHECK = 256
"""Runs between two trials of a way that is not the cheapest."""
SMOOTHING = 0.2
"""Weight of the newest measurement in a way's cost."""


@dataclass(slots=True)
class _Way:
    parts: int
    num_tried: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class _Size:
    ways: list[_Way]
    num_runs: int = 0
    next_trial: int = 0


class Splitter:
    """Chooses among 1, 2, 4, ... parts, up to a number of threads."""

    def __init__(self, threads: int) -> None:
        self._options = [1 << power for power in range(threads.bit_length()) if 1 << power < threads]
        self._options.append(threads)
        self._sizes: dict[tuple[int, int], _Size] = {}

    def choose(self, num_rows: int, num_steps: int) -> int:
        """Number of parts for the next run, each of at least one row."""
        size = self._size(num_rows, num_steps)
        size.num_runs += 1
        for way in size.ways:
            if way.num_tried < TRIALS:
                return way.parts
        if size.num_runs % RECHECK == 0:
            size.next_trial += 1
            return size.ways[size.next_trial % len(size.ways)].parts
        return min(size.ways, key=_cost).parts

    def learn(self, num_rows: int, num_steps: int, parts: int, seconds: float) -> None:
        """Note what a run took."""
        for way in self._size(num_rows, num_steps).ways:
            if way.parts == parts:
                way.num_tried += 1
                known = seconds if way.num_tried <= 2 else way.seconds
                way.seconds = known + SMOOTHING * (seconds - known)

    def _size(self, num_rows: int, num_steps: int) -> _Size:
        """Batches are of one size if their rows and their steps, rounded up to powers of two, are the same."""
        key = ((num_rows - 1).bit_length(), (num_steps - 1).bit_length())
        size = self._sizes.get(key)
        if size is None:
            fewest = (1 << key[0]) // 2 + 1  # rows that a batch of this size may have
            size = self._sizes[key] = _Size([_Way(parts) for parts in self._options if parts <= fewest])
        return size


def _cost(way: _Way) -> float:
    return way.seconds


def spans(num_rows: int, parts: int) -> list[tuple[int, int]]:
    """Cut rows into parts that differ by one row at most: [(first, past the last)]."""
    cuts = [num_rows * part // parts for part in range(parts + 1)]
    return list(pairwise(cuts))
