"""Loads by NVIDIA's perf_analyzer, as it is used against Triton: what a step costs a server, and beside which other.

`make test-compat` installs it. `--peer TARGET,PID,MODEL` names a server of the same protocol, Triton for one, that runs
on this machine and serves an LSTM of the same size as `lstm`, one step a request: the two take turns.
"""

from __future__ import annotations

import csv
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import grpc

from benchmarks.measure import FEATURES, HIDDEN, OUTPUTS, Result, Settings, in_turns, ratio
from benchmarks.processes import Process, rnnserve
from service.pb.inference import inference_pb2 as pb
from service.pb.inference import inference_pb2_grpc as pb_grpc
from tests.onnx_models import build

PROGRAM = Path(__file__).resolve().parent.parent / ".venv-compat" / "bin" / "perf_analyzer"
STEPS = 50
"""Of each sequence."""
STREAMS = (1, 16, 64, 128)
COMPARED = (16, 64)
"""Numbers of streams at which a peer is compared."""
WINDOWS = 3
"""That the tester measures, mostly."""
SEQUENCES = (
    *("--sequence-length", str(STEPS), "--sequence-length-variation", "0"),
    *("--sequence-id-range", "1:1000000000"),
)
STREAMED = ("--streaming", *SEQUENCES)


@dataclass(frozen=True)
class Analyzed:
    """What a load came to, by the tester's own measure, and by the server's counts of all of its requests."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    num_requests: int
    num_runs: int
    num_failed: int
    cpu_s: float
    """Of the server."""

    def figures(self, steps: int = 1) -> dict[str, float]:
        """For the detail of a result; steps: of each request."""
        return {
            "steps_per_s": self.requests_per_s * steps,
            "cpu_us_per_step": self.cpu_s / self.num_requests / steps * 1e6,
            "p50_ms": self.p50_ms,
            "p99_ms": self.p99_ms,
            "mean_batch": self.num_requests / max(1, self.num_runs),
        }


def analyze(server: Process, model: str, shape: str, concurrency: int, seconds: float, *flags: str) -> Analyzed:
    """Put a load on a server for three times so many seconds. Raises RuntimeError with what went wrong.

    shape  of a request's tensor x, without the batch, such as "1,32"; empty: the model has only one
    flags  more of perf_analyzer's
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.csv")
        command = [
            *(PROGRAM, "-m", model, "--service-kind", "triton", "-i", "grpc", "-u", server.target, "-f", report),
            *("--concurrency-range", str(concurrency), "-p", str(int(1000 * seconds))),
            *("-s", "999", "-r", str(4 * WINDOWS)),  # however unsteady it is, unless a window saw nothing at all
            *("--input-data", "zero"),  # its random bytes are NaN now and then, which is refused
            *(("--shape", f"x:{shape}") if shape else ()),
            *flags,
        ]
        before, cpu_before = _statistics(server, model), server.cpu_s()
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60 + 20 * seconds)
        cpu_s, after = server.cpu_s() - cpu_before, _statistics(server, model)
        if done.returncode or "error" in (done.stdout + done.stderr).lower():
            raise RuntimeError(f"perf_analyzer: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        [row] = csv.DictReader(report.read_text(encoding="utf-8").splitlines())
    return Analyzed(
        requests_per_s=float(row["Inferences/Second"]),
        p50_ms=float(row["p50 latency"]) / 1000,
        p99_ms=float(row["p99 latency"]) / 1000,
        num_requests=after.inference_stats.success.count - before.inference_stats.success.count,
        num_runs=after.execution_count - before.execution_count,
        num_failed=after.inference_stats.fail.count - before.inference_stats.fail.count,
        cpu_s=cpu_s,
    )


def _statistics(server: Process, model: str) -> pb.ModelStatistics:
    with grpc.insecure_channel(server.target) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        return stub.ModelStatistics(pb.ModelStatisticsRequest(name=model)).model_stats[0]


def perf_analyzer(repository: Path, settings: Settings) -> Iterator[Result]:
    """Streams of sequences of 50 steps, one a request; whole sequences in single calls; a peer in turns."""
    if not PROGRAM.exists():
        print("perf_analyzer is not installed: `make test-compat` installs it; then measure again")
        return
    build("lstm", bidirectional=True, features=FEATURES, hidden=HIDDEN, outputs=OUTPUTS).save(repository, "bilstm")
    with rnnserve(repository) as ours:
        for streams in STREAMS:
            rounds = [
                analyze(ours, "lstm", f"1,{FEATURES}", streams, settings.seconds / WINDOWS, *STREAMED).figures()
                for _ in range(settings.rounds)
            ]
            yield _cpu(f"perf_analyzer, {streams} stream{'s' if streams > 1 else ''} of sequences", rounds)
        for calls in (1, 8):
            rounds = [
                analyze(ours, "bilstm", f"{STEPS},{FEATURES}", calls, settings.seconds / WINDOWS).figures(STEPS)
                for _ in range(settings.rounds)
            ]
            yield _cpu(f"perf_analyzer, {calls} call{'s' if calls > 1 else ''} of whole sequences at once", rounds)
        if settings.peer:
            target, pid, model = settings.peer.split(",")
            peer = Process(target, int(pid), 0.0)
            for streams in COMPARED:
                yield _compare(ours, peer, model, streams, settings)


def _cpu(name: str, rounds: list[dict[str, float]]) -> Result:
    figures = {name: median(each[name] for each in rounds) for name in rounds[0]}
    return Result(f"{name}: server CPU per step", figures["cpu_us_per_step"], "us", detail=figures)


def _compare(ours: Process, peer: Process, model: str, streams: int, settings: Settings) -> Result:
    seconds = settings.seconds / WINDOWS
    pairs = in_turns(
        settings,
        lambda: analyze(peer, model, "", streams, seconds, *STREAMED).figures()["cpu_us_per_step"],
        lambda: analyze(ours, "lstm", f"1,{FEATURES}", streams, seconds, *STREAMED).figures()["cpu_us_per_step"],
    )
    return ratio(f"perf_analyzer, {streams} streams of sequences: CPU per step of {model} / ours", pairs, "us")
