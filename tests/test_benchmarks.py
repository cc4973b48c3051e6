"""The benchmarks' own parts: what they write, what they count, what they call flat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import soak
from benchmarks.churn import NUM_GATEWAY, cycle
from benchmarks.measure import FEATURES, OUTPUTS, Raw, Result, Settings, in_turns, ratio
from benchmarks.processes import Process, echo, flags_of_serve
from benchmarks.ramps import raw_costs
from benchmarks.report import JSON, draw, line, write_json
from service.client import AsyncClient
from service.client.load import Load, drive
from service.config import Settings as ServerSettings
from tests.onnx_models import build
from tests.serving import serving_here, until

TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "measured": (int, float, type(None)),
    "unit": (str,),
    "budget": (int, float, type(None)),
    "is_at_least": (bool,),
    "holds": (bool, type(None)),
    "detail": (dict,),
    "machine": (dict,),
}
RESULT = Result("a / b", 1.25, "x", 1.5, detail={"first_us": 5.0, "second_us": 4.0, "load": {"streams": 2}})


def check_schema(path: Path) -> list[dict]:
    """Check a file of results, and return them."""
    results = json.loads(path.read_text())
    assert results
    for result in results:
        assert {name: type(value) for name, value in result.items() if not isinstance(value, TYPES[name])} == {}
        assert result.keys() == TYPES.keys()
        assert {"cpu", "cores", "onnxruntime"} <= result["machine"].keys()
        assert (result["holds"] is None) == (result["budget"] is None)
        if result["budget"] is not None:
            is_within = result["measured"] <= result["budget"]
            assert result["holds"] == (result["measured"] >= result["budget"] if result["is_at_least"] else is_within)
    names = [result["name"] for result in results]
    assert len(set(names)) == len(names)
    return results


def test_committed_results_are_whole(tmp_path: Path) -> None:
    results = check_schema(JSON)
    starts = (
        "one-step messages",
        "frames of 256",
        "Predict, 64",
        "closed loop, 1000",
        "paced, 64",
        "onnxruntime alone",
    )
    for start in starts:
        assert any(result["name"].startswith(start) for result in results), start
    assert sum(result["budget"] is not None for result in results) >= 10
    draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_committed_soak_is_whole(tmp_path: Path) -> None:
    [result] = check_schema(soak.JSON)
    samples = result["detail"]["samples"]
    assert {len(column) for column in samples.values()} == {len(samples["seconds"])}
    soak.draw(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_written_has_the_schema(tmp_path: Path) -> None:
    floor = Result("floor", 0.8, "x", 0.95, is_at_least=True)
    write_json([RESULT, floor, Result("no budget", float("nan"), "ms")], tmp_path / "results.json")
    ours, missed, none = check_schema(tmp_path / "results.json")
    assert (ours["holds"], missed["holds"], none["holds"]) == (True, False, None)
    assert ours["detail"] == {"first_us": 5.0, "second_us": 4.0, "load": {"streams": 2}}
    assert none["measured"] is None


def test_a_comparison_is_the_median_of_its_rounds() -> None:
    numbers = iter([2.0, 1.0, 30.0, 10.0, 8.0, 2.0])
    pairs = in_turns(Settings(3, 0.0), lambda: next(numbers), lambda: next(numbers))
    assert pairs == [[2.0, 1.0], [30.0, 10.0], [8.0, 2.0]]
    result = ratio("a / b", pairs, "us", 2.5, more=7)
    assert (result.measured, result.holds) == (3.0, False)
    detail = {"first_us": 8.0, "second_us": 2.0, "lowest": 2.0, "highest": 4.0, "rounds": 3, "more": 7}
    assert result.detail == detail
    words = "a / b 3.00 x <= 2.5 MISSED 8.00 / 2.00 us, rounds 2.00 to 4.00, more 7"
    assert line(result).split() == words.split()


def test_raw_costs_are_those_of_one_step(tmp_path: Path) -> None:
    build("lstm", features=FEATURES, hidden=64, outputs=OUTPUTS).save(tmp_path, "lstm")
    costs = list(raw_costs(tmp_path, Settings(rounds=1, seconds=0.1)))
    assert [cost.detail["batch"] for cost in costs] == [1, 4, 16, 64, 256]
    assert costs[0].measured > 2 * costs[-1].measured > 0  # a step alone costs more than one of many
    assert Raw(tmp_path).step_us(16, 0.05, steps=16) < costs[0].measured


# What the operating system says


def test_cpu_time_counts_every_process() -> None:
    """A server's workers count, while they live and after."""
    busy = "import time\nwhile time.process_time() < {}: pass\n"
    parent = (
        "import subprocess, sys\n"
        f"worker = subprocess.Popen([sys.executable, '-c', {busy.format(0.3) + 'print(1, flush=True); input()'!r}], "
        "stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "worker.stdout.readline()\n"
        "print(1, flush=True)\n"
        "input()\n"
        "worker.communicate(b'1')\n"
        "print(1, flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        server = Process("", process.pid, 0.0)
        process.stdout.readline()
        alive_s, alive_bytes = server.cpu_s(), server.memory_bytes()
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        after_s, after_bytes = server.cpu_s(), server.memory_bytes()
        process.communicate("\n")
    assert 0.25 < alive_s < after_s + 0.05 < 5.0  # accounts of the living and of the ended round differently
    assert 0 < after_bytes < alive_bytes


def test_flags_are_those_of_the_server() -> None:
    assert {f"--{name.replace('_', '-')}" for name in ServerSettings.model_fields} <= flags_of_serve()
    assert "--nonsense" not in flags_of_serve()


@pytest.mark.parametrize(
    "load", [Load(streams=2), Load(streams=2, steps=5), Load(kind="frames", sessions=7), Load(streams=2, rate=50.0)]
)
async def test_echo_answers_as_the_server_does(bare_echo: Process, repository: Path, load: Load) -> None:
    async with serving_here(repository) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        model = await client.model("lstm")
    measured = await drive(bare_echo.target, model, load, seconds=0.2, warmup_s=0.1)
    assert measured.num_steps > 0
    assert measured.num_steps == pytest.approx(len(measured.latencies_ms) * sum(load.lengths), rel=0.1)


@pytest.fixture(scope="module")
def bare_echo():
    with echo(2) as process:
        yield process


# The soak


async def test_churn_ends_sessions_in_every_way(repository: Path) -> None:
    async with serving_here(repository) as server:
        lane = server.engine.lane("lstm")
        await cycle(f"127.0.0.1:{server.port}", "lstm", "name")
        assert lane.tally.sequences == NUM_GATEWAY + 3 + 4
        assert not lane.tally.rejected
        await until(lambda: lane.num_sessions == 1)  # the one that is left to expire
        await until(lambda: lane.num_sessions == 0)
        assert lane.slab.num_allocated == 0


def samples_of(own_kib: np.ndarray) -> soak.Samples:
    n = len(own_kib)
    flat = [0.0] * n
    return soak.Samples([float(s) for s in range(n)], own_kib.tolist(), own_kib.tolist(), flat, flat, flat, flat)


def test_soak_tells_a_leak_from_flat_memory() -> None:
    seconds = np.arange(600)
    noise = np.random.default_rng(0).normal(0, 200, 600)
    warm_up = 20_000 * (1 - np.exp(-seconds / 40))
    flat = soak.judge(samples_of(80_000 + warm_up + noise))
    assert flat.holds is True
    assert abs(flat.measured) < 50
    leak = soak.judge(samples_of(80_000 + warm_up + noise + seconds / 60 * 400))
    assert leak.holds is False
    assert leak.measured == pytest.approx(400, abs=50)
    assert leak.budget == pytest.approx(0.01 * 100_000 / 5, rel=0.05)
    spike = np.where(seconds == 450, 30_000, 0)
    assert soak.judge(samples_of(80_000 + warm_up + noise + spike)).holds is True
