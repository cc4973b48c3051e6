"""service.policies: turns of classes, and time shared between models on a clock that the test moves."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.policies import PATIENCE, LeastServed, Priority, Turns

HIGH, NORMAL, LOW = Priority


def test_the_highest_class_that_waits_is_first_until_another_is_due():
    turns = Turns()
    for _ in range(PATIENCE - 1):
        assert turns.order([HIGH, NORMAL, LOW]) == [HIGH, NORMAL, LOW]
        turns.end([HIGH, NORMAL, LOW], [HIGH])
    assert turns.order([HIGH, LOW]) == [LOW, HIGH]
    assert turns.order([HIGH, NORMAL, LOW]) == [NORMAL, HIGH, LOW]
    turns.end([HIGH, NORMAL, LOW], [NORMAL])
    assert turns.order([HIGH, NORMAL, LOW]) == [LOW, HIGH, NORMAL]
    turns.end([HIGH, NORMAL, LOW], [LOW, HIGH])
    assert turns.order([HIGH, NORMAL, LOW]) == [HIGH, NORMAL, LOW]


@given(st.lists(st.sets(st.sampled_from(Priority), min_size=1), max_size=100))
def test_no_class_that_waits_is_passed_over_more_often_than_patience_allows(ready):
    turns, num_passed = Turns(), dict.fromkeys(Priority, 0)
    for waiting in map(sorted, ready):
        first, *_ = turns.order(waiting)
        turns.end(waiting, [first])
        for rank in Priority:
            num_passed[rank] = num_passed[rank] + 1 if rank in waiting and rank != first else 0
        assert max(num_passed.values()) <= PATIENCE


@dataclass(eq=False)
class Model:
    cost: float
    attained_s: float = 0.0
    time: float = 0.0

    def run(self):
        self.attained_s += self.cost
        self.time += self.cost


def share(shares, models, seconds):
    """Serve models that always have work. Returns the time that each got."""
    before = [model.time for model in models]
    while sum(model.time for model in models) - sum(before) < seconds:
        shares.pick(models).run()
    return [model.time - start for model, start in zip(models, before, strict=True)]


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=5), st.floats(0.0, 20.0))
def test_models_that_have_work_get_equal_time_within_one_run_of_each(costs, seconds):
    models = [Model(cost) for cost in costs]
    got = share(LeastServed(), models, seconds)
    for one, time in zip(models, got, strict=True):
        for other, other_time in zip(models, got, strict=True):
            assert abs(time - other_time) <= one.cost + other.cost + 1e-6


def test_a_model_whose_runs_take_twenty_times_as_long_gets_no_more():
    assert share(LeastServed(), [Model(1.0), Model(20.0)], 2000.0) == pytest.approx([1000.0, 1000.0], abs=20.0)


def test_an_idle_model_comes_back_with_no_more_credit_than_the_busy_ones():
    shares, idle, busy = LeastServed(), Model(1.0), Model(1.0)
    share(shares, [idle, busy], 10.0)
    share(shares, [busy], 1000.0)
    assert share(shares, [idle, busy], 100.0) == pytest.approx([50.0, 50.0], abs=2.0)


def test_credit_is_not_hoarded_though_the_busy_model_has_nothing_to_run_when_the_idle_one_comes_back():
    shares, idle, busy = LeastServed(), Model(1.0), Model(1.0)
    share(shares, [busy], 1000.0)
    shares.pick([idle]).run()  # between two runs of the busy one, whose clients have not sent again yet
    assert share(shares, [idle, busy], 100.0) == pytest.approx([50.0, 50.0], abs=2.0)


def test_a_light_model_runs_when_it_has_work_beside_a_heavy_one():
    shares, light, heavy = LeastServed(), Model(1.0), Model(20.0)
    share(shares, [heavy], 100.0)
    for _ in range(10):  # one step at a time, sent while the heavy one runs
        assert shares.pick([heavy, light]) is light
        light.run()
        assert shares.pick([heavy]) is heavy
        heavy.run()
