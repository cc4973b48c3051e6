"""Batches are split where that was measured to be faster, and cut evenly."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.splitting import RECHECK, TRIALS, Splitter, spans


def ways(splitter: Splitter, num_runs: int, cost, num_rows: int = 64) -> Counter:
    """Parts that were chosen, how often; cost(parts) is what a run takes."""
    chosen = Counter()
    for _ in range(num_runs):
        parts = splitter.choose(num_rows, 1)
        splitter.learn(num_rows, 1, parts, cost(parts))
        chosen[parts] += 1
    return chosen


@pytest.mark.parametrize(("threads", "options"), [(2, {1, 2}), (3, {1, 2, 3}), (8, {1, 2, 4, 8})])
def test_every_way_is_tried_and_the_fastest_taken(threads, options):
    for fastest in options:
        splitter = Splitter(threads)
        assert ways(splitter, TRIALS * len(options), lambda n: abs(n - fastest) + 1.0) == dict.fromkeys(options, TRIALS)  # noqa: B023
        assert ways(splitter, 100, lambda n: abs(n - fastest) + 1.0) == {fastest: 100}  # noqa: B023


def test_another_way_is_taken_once_it_is_faster():
    splitter = Splitter(2)
    ways(splitter, 50, lambda n: 1.0 if n == 1 else 2.0)
    later = ways(splitter, 60 * RECHECK, lambda n: 1.0 if n == 2 else 2.0)
    assert later[2] > later[1] * 5


def test_the_first_run_of_a_way_does_not_count():
    splitter = Splitter(2)
    slow_once = iter([100.0])
    assert ways(splitter, 50, lambda n: next(slow_once, 1.0) if n == 2 else 5.0)[2] == 50 - TRIALS


def test_sizes_are_judged_apart():
    splitter = Splitter(2)
    ways(splitter, 20, lambda n: float(n), num_rows=4)
    ways(splitter, 20, lambda n: 1.0 / n, num_rows=64)
    assert [splitter.choose(num_rows, 1) for num_rows in (4, 3, 64, 33)] == [1, 1, 2, 2]


@given(st.integers(1, 16), st.integers(1, 300), st.integers(1, 20))
def test_parts_are_even_and_cover_every_row_once(threads, num_rows, num_steps):
    splitter = Splitter(threads)
    for _ in range(TRIALS * 6):
        parts = splitter.choose(num_rows, num_steps)
        splitter.learn(num_rows, num_steps, parts, 1.0 / parts)
        cut = spans(num_rows, parts)
        assert [row for start, stop in cut for row in range(start, stop)] == list(range(num_rows))
        sizes = [stop - start for start, stop in cut]
        assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1
