"""NVIDIA's load tester, as it is used against Triton: no request may fail, and the server's counts must be its own."""

from __future__ import annotations

import urllib.request

import pytest

from benchmarks.measure import FEATURES
from benchmarks.perf_analyzer import PROGRAM, SEQUENCES, STREAMED, STREAMS, WINDOWS, Analyzed, analyze
from benchmarks.processes import Process

SECONDS = 1.0

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="`make test-compat` says why it could not install it")


def check(load: Analyzed) -> None:
    """No request failed, and the server has seen at least what was measured."""
    assert load.num_failed == 0
    assert load.num_requests >= 0.5 * load.requests_per_s * SECONDS * WINDOWS
    assert 0 < load.num_runs <= load.num_requests


@pytest.mark.parametrize("streams", STREAMS)
def test_streams_of_sequences(server: Process, streams: int) -> None:
    load = analyze(server, "steps", f"1,{FEATURES}", streams, SECONDS, *STREAMED)
    check(load)
    if streams > 1:  # they did run together
        assert load.figures()["mean_batch"] > 1.5
    else:
        assert load.num_runs == load.num_requests


@pytest.mark.parametrize("concurrency", [1, 16])
def test_sequences_over_single_calls(server: Process, concurrency: int) -> None:
    check(analyze(server, "steps", f"1,{FEATURES}", concurrency, SECONDS, "--async", *SEQUENCES))


@pytest.mark.parametrize("concurrency", [1, 16])
def test_whole_sequences(server: Process, concurrency: int) -> None:
    check(analyze(server, "whole", f"50,{FEATURES}", concurrency, SECONDS))


def test_no_sequence_is_left_behind(server: Process) -> None:
    """The tester ends those that it has begun."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics", timeout=10) as response:
        page = response.read().decode()
    [line] = [each for each in page.splitlines() if each.startswith('rnnserve_sessions{model="steps"')]
    assert float(line.split()[-1]) == 0
