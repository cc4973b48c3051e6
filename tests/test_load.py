"""The load generator and `rnnserve bench`, against a real server: they count what the server counts."""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from service.client import AsyncClient, _pace
from service.client._pace import Pacer
from service.client.errors import FailedPrecondition, RnnserveError, Unavailable
from service.client.info import ModelInfo
from service.client.load import Load, drive, percentile
from service.lane import Lane
from service.rpc.server import Server
from tests.serving import Served, serving_here, until


async def model_of(server: Server, name: str = "lstm") -> ModelInfo:
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        return await client.model(name)


def address(server: Server) -> str:
    return f"127.0.0.1:{server.port}"


@pytest.mark.parametrize(
    "load",
    [
        Load(streams=3),
        Load(streams=2, steps=5),
        Load(kind="frames", streams=2, sessions=9),
        Load(kind="frames", sessions=5, steps=20),
        Load(kind="predict", streams=2, sessions=4, longest=30),
        Load(streams=4, rate=100.0),
        Load(kind="frames", streams=2, sessions=9, steps=3, rate=50.0),
        Load(kind="predict", streams=2, sessions=4, steps=7, rate=20.0),
    ],
)
async def test_counts_what_the_server_counts(repository: Path, load: Load) -> None:
    seen = []
    async with serving_here(repository) as server:
        lane = server.engine.lane("lstm")
        measured = await drive(
            address(server),
            await model_of(server),
            load,
            seconds=0.3,
            warmup_s=0.1,
            on_begin=lambda: seen.append(lane.tally.steps),
            on_end=lambda: seen.append(lane.tally.steps),
        )
    in_flight = load.streams * sum(load.lengths)
    assert abs(measured.num_steps - (seen[1] - seen[0])) <= 2 * in_flight
    assert measured.num_steps > 0
    assert 0 < measured.percentile_ms(50) <= measured.percentile_ms(99)
    assert not measured.refused_steps
    if load.rate:
        messages = load.rate * load.streams * measured.seconds
        assert abs(measured.num_steps / sum(load.lengths) - messages) <= max(3 * load.streams, 0.5 * messages)
        assert percentile(measured.late_ms, 0) >= 0
    else:
        assert not len(measured.late_ms)


def test_lengths_are_spread_from_one_to_the_longest() -> None:
    assert Load(kind="predict", sessions=5, longest=9).lengths == [1, 3, 5, 7, 9]
    assert Load(kind="frames", sessions=3, steps=2).lengths == [2, 2, 2]
    assert Load(steps=4).lengths == [4]


# Overload


def rejected(lane: Lane) -> int:
    return sum(lane.tally.rejected.values())


@pytest.mark.parametrize(
    "load",
    [
        Load(streams=6, steps=20, rate=1000.0),
        Load(kind="frames", streams=3, sessions=50, rate=1000.0),
        Load(kind="frames", sessions=60),
    ],
)
async def test_refused_steps_are_counted_and_their_sessions_go_on(repository: Path, load: Load) -> None:
    """The queue has no room for a message of each stream; a refused session goes on where it is expected."""
    async with serving_here(repository, max_queued_steps=40) as server:
        lane = server.engine.lane("lstm")
        measured = await drive(address(server), await model_of(server), load, seconds=0.6, warmup_s=0.0)
        assert set(lane.tally.rejected) <= {"OVERLOADED", "STEP_ABORTED"}
        assert measured.refused_steps["RESOURCE_EXHAUSTED"] > 0
        assert 0.8 * rejected(lane) <= sum(measured.refused_steps.values()) / load.steps <= rejected(lane)
        assert 0.8 * lane.tally.steps <= measured.num_steps <= lane.tally.steps
        assert measured.num_steps > load.streams * sum(load.lengths)
        assert len(measured.refusals_ms) > 0


@pytest.mark.parametrize("rate", [0.0, 200.0])
async def test_refused_calls_of_predict_are_counted(repository: Path, rate: float) -> None:
    load = Load(kind="predict", streams=8, sessions=4, steps=500, rate=rate)
    async with serving_here(repository, max_queued_steps=6_000) as server:
        measured = await drive(address(server), await model_of(server), load, seconds=0.4, warmup_s=0.0)
        assert measured.refused_steps == {"RESOURCE_EXHAUSTED": 2_000 * len(measured.refusals_ms)}
        assert len(measured.refusals_ms) > 0
        assert measured.num_steps == 2_000 * len(measured.latencies_ms) > 0


@pytest.mark.parametrize(
    "load",
    [
        Load(steps=50),
        Load(steps=50, rate=100.0),
        Load(kind="predict", steps=50),
        Load(kind="predict", steps=50, rate=100.0),
    ],
)
async def test_what_the_server_never_takes_ends_the_load(repository: Path, load: Load) -> None:
    async with serving_here(repository, max_queued_steps=40) as server:
        with pytest.raises(RnnserveError, match="max_queued_steps") as caught:
            await drive(address(server), await model_of(server), load, seconds=5.0)
        assert caught.value.code == "RESOURCE_EXHAUSTED"


async def test_a_model_that_answers_at_the_end_is_no_model_for_steps(repository: Path) -> None:
    async with serving_here(repository) as server:
        model = await model_of(server, "bilstm")
        with pytest.raises(FailedPrecondition, match="kind predict"):
            await drive(address(server), model, Load(), seconds=0.1)
        assert (await drive(address(server), model, Load(kind="predict", steps=3), seconds=0.1)).num_steps > 0


@pytest.mark.parametrize("rate", [0.0, 50.0])
async def test_a_server_that_goes_away_ends_the_load(repository: Path, rate: float) -> None:
    async with serving_here(repository) as server:
        model = await model_of(server)
        load = drive(address(server), model, Load(streams=2, rate=rate), seconds=20.0)
        loading = asyncio.create_task(load)
        lane = server.engine.lane("lstm")
        await until(lambda: lane.tally.steps > 0)
        await server.stop()
        with pytest.raises(Unavailable):
            await asyncio.wait_for(loading, 5)


# Pace


@pytest.mark.parametrize("timer", ["_KernelTimer", "_LoopTimer"])
async def test_pacer_wakes_in_order_and_never_early(timer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pace, "_KernelTimer", getattr(_pace, timer))
    pacer = Pacer()
    began = time.perf_counter()
    delays = [*np.random.default_rng(0).uniform(-0.01, 0.05, 50).tolist(), 0.5]
    woken: list[tuple[float, float]] = []

    async def wait(delay: float) -> None:
        await pacer.until(began + delay)
        woken.append((delay, time.perf_counter() - began))

    cancelled = asyncio.create_task(wait(0.04))
    tasks = [asyncio.create_task(wait(delay)) for delay in delays]
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait_for(asyncio.gather(*tasks), 5)
    pacer.close()
    assert all(at >= delay for delay, at in woken)
    assert [delay for delay, _ in woken if delay > 0.01] == sorted(delay for delay in delays if delay > 0.01)
    assert all(at < delays[-1] for _, at in woken[:-1])  # the one that was set last does not hold up the others


# The command


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("rnnserve"), "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_bench_prints_a_line_for_each_number_of_streams(served: Served) -> None:
    result = bench("lstm", "--server", served.address, "--streams", "1,3", "--seconds", "0.2", "--json")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["streams"] for row in rows] == [1, 3]
    for row in rows:
        assert row["steps_per_s"] == row["messages_per_s"] > 0
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["refused_steps"] == {}
        assert "late_p99_ms" not in row


def test_bench_prints_a_table(served: Served) -> None:
    arguments = ["--kind", "frames", "--sessions", "5", "--steps", "2", "--streams", "2", "--rate", "40"]
    result = bench("lstm", "--server", served.address, "--seconds", "0.5", *arguments)
    assert result.returncode == 0, result.stderr
    title, header, row = result.stdout.splitlines()
    assert title.endswith("2 steps of each of 5 sessions a message, paced, 40 a second of each stream")
    assert header.split("  ")[-1].strip() == "refused"
    figures = dict(
        zip(["streams", "steps", "messages", "p50", "p90", "p99", "late", "refused"], row.split(), strict=True)
    )
    assert figures["streams"] == "2"
    assert int(figures["steps"]) == pytest.approx(2 * 40 * 10, rel=0.5)
    assert float(figures["late"]) <= float(figures["p99"])
    assert figures["refused"] == "0"


def test_bench_says_what_is_wrong(served: Served) -> None:
    for arguments, word in (
        (["lstn"], "lstn"),
        (["lstm", "--streams", "1,x"], "1,16,64"),
        (["lstm", "--sessions", "4"], "--kind frames"),
        (["lstm", "--longest", "4"], "--kind predict"),
        (["bilstm"], "kind predict"),
    ):
        result = bench(*arguments, "--server", served.address)
        assert result.returncode in (1, 2)
        assert word in result.stderr
        assert "Traceback" not in result.stderr
