"""The load generator and `rnnserve bench`, against a real server: they count what the server counts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from service.client import AsyncClient
from service.client.load import Load, drive
from tests.serving import Served, serving_here


@pytest.mark.parametrize(
    "load",
    [
        Load(streams=3),
        Load(streams=2, steps=5),
        Load(kind="frames", streams=2, sessions=9),
        Load(kind="predict", streams=2, sessions=4, longest=30),
        Load(streams=4, rate=100.0),
    ],
)
async def test_counts_what_the_server_counts(repository: Path, load: Load) -> None:
    seen = []
    async with serving_here(repository) as server:
        lane = server.engine.lane("lstm")
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            model = await client.model("lstm")
        measured = await drive(
            f"127.0.0.1:{server.port}",
            model,
            load,
            seconds=0.3,
            warmup_s=0.1,
            on_begin=lambda: seen.append(lane.tally.steps),
            on_end=lambda: seen.append(lane.tally.steps),
        )
    in_flight = load.streams * load.sessions * max(load.steps, load.longest)
    assert abs(measured.num_steps - (seen[1] - seen[0])) <= 2 * in_flight
    assert measured.num_steps > 0
    assert 0 < measured.percentile_ms(50) <= measured.percentile_ms(99)
    if load.rate:
        assert measured.num_steps <= load.rate * load.streams * measured.seconds * 1.5


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("rnnserve"), "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_bench_prints_a_line_for_each_number_of_streams(served: Served) -> None:
    result = bench("lstm", "--server", served.address, "--streams", "1,3", "--seconds", "0.2", "--json")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["streams"] for row in rows] == [1, 3]
    assert all(row["steps_per_s"] == row["messages_per_s"] > 0 for row in rows)


def test_bench_says_what_is_wrong(served: Served) -> None:
    for arguments, word in ((["lstn"], "lstn"), (["lstm", "--streams", "1,x"], "1,16,64")):
        result = bench(*arguments, "--server", served.address)
        assert result.returncode in (1, 2)
        assert word in result.stderr
