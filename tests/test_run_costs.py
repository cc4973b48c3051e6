"""What a run is expected to cost decides where it happens, and is learned from runs."""

import pytest

from service.config import load_settings
from service.engine import Engine
from service.repository import load_version


@pytest.fixture
def engine(repository):
    return Engine(load_settings({"repository": repository, "inline_run_ms": 2.0}))


@pytest.fixture
def key(engine, repository):
    lane = load_version(engine.settings, "lstm", 1)
    engine.attach(object())  # a stream is connected
    return lane, 8, 0


def test_unknown_runs_are_not_taken_for_short(engine, key):
    assert not engine._is_short(key)


def test_one_slow_run_among_fast_ones_changes_nothing(engine, key):
    for seconds in [0.0006] * 10 + [0.05]:
        engine._learn(key, seconds)
    assert engine._is_short(key)


def test_runs_that_have_become_slow_are_noticed(engine, key):
    for seconds in [0.0006] * 10 + [0.005] * 20:
        engine._learn(key, seconds)
    assert not engine._is_short(key)


def test_a_slow_beginning_is_forgotten(engine, key):
    for seconds in [0.02] + [0.0006] * 20:
        engine._learn(key, seconds)
    assert engine._is_short(key)


def test_longer_runs_are_short_enough_while_nobody_streams(engine, key):
    engine._learn(key, 0.005)
    assert not engine._is_short(key)
    engine._links.clear()
    assert engine._is_short(key)
