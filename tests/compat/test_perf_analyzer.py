"""NVIDIA's load tester, as it is used against Triton: no request may fail, and the server's counts must be its own."""

from __future__ import annotations

import csv
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.measure import FEATURES
from benchmarks.processes import Process
from service.pb.inference import inference_pb2 as pb
from tests.compat.conftest import BIN

PERF_ANALYZER = BIN / "perf_analyzer"
SEQUENCES = (
    *("--sequence-length", "50", "--sequence-length-variation", "0"),
    *("--sequence-id-range", "1:1000000000"),
)
Statistics = Callable[[str], pb.ModelStatistics]

pytestmark = pytest.mark.skipif(
    not PERF_ANALYZER.exists(), reason="`make test-compat` says why it could not install it"
)


def analyze(server: Process, model: str, shape: str, concurrency: int, folder: Path, *flags: str) -> dict[str, str]:
    """Put a load on the server for some seconds. Returns what was measured."""
    report = folder / "report.csv"
    command = [
        *(PERF_ANALYZER, "-m", model, "--shape", shape, "--service-kind", "triton", "-i", "grpc", "-u", server.target),
        *("--concurrency-range", str(concurrency), "-p", "1000", "-r", "3", "-s", "999", "-f", report),
        *("--input-data", "zero"),  # its random bytes are NaN now and then, which the server refuses
    ]
    done = subprocess.run([*command, *flags], check=False, capture_output=True, text=True, timeout=60)
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-2000:]
    assert "error" not in (done.stdout + done.stderr).lower(), done.stdout + done.stderr
    [row] = csv.DictReader(report.read_text().splitlines())
    return row


def check(before: pb.ModelStatistics, after: pb.ModelStatistics, measured: dict[str, str]) -> int:
    """Compare the server's counts with the client's. Returns how many requests there were."""
    stats = after.inference_stats
    num = stats.success.count - before.inference_stats.success.count
    assert stats.fail.count == before.inference_stats.fail.count
    assert stats.queue.count - before.inference_stats.queue.count == num
    assert after.inference_count - before.inference_count == num
    assert 0 < after.execution_count - before.execution_count <= num
    assert num >= 2 * float(measured["Inferences/Second"]) * 0.5  # it measured for seconds, and warmed up
    return num


@pytest.mark.parametrize("concurrency", [1, 16, 64, 128])
def test_streams_of_sequences(server: Process, statistics: Statistics, tmp_path: Path, concurrency: int) -> None:
    before = statistics("steps")
    measured = analyze(server, "steps", f"x:1,{FEATURES}", concurrency, tmp_path, "--streaming", *SEQUENCES)
    after = statistics("steps")
    num = check(before, after, measured)
    if concurrency >= 16:  # they did run together
        assert num / (after.execution_count - before.execution_count) > 1.5


@pytest.mark.parametrize("concurrency", [1, 16])
def test_sequences_over_single_calls(server: Process, statistics: Statistics, tmp_path: Path, concurrency: int) -> None:
    before = statistics("steps")
    measured = analyze(server, "steps", f"x:1,{FEATURES}", concurrency, tmp_path, "--async", *SEQUENCES)
    check(before, statistics("steps"), measured)


@pytest.mark.parametrize("concurrency", [1, 16])
def test_whole_sequences(server: Process, statistics: Statistics, tmp_path: Path, concurrency: int) -> None:
    before = statistics("whole")
    measured = analyze(server, "whole", f"x:50,{FEATURES}", concurrency, tmp_path)
    check(before, statistics("whole"), measured)


def test_no_sequence_is_left_behind(server: Process) -> None:
    """The tester ends those that it has begun."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics", timeout=10) as response:
        page = response.read().decode()
    [line] = [each for each in page.splitlines() if each.startswith('rnnserve_sessions{model="steps"')]
    assert float(line.split()[-1]) == 0
