"""Laws of live sequences, whatever comes in one turn of the loop: no gRPC, so that the order of things is certain."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.config import load_settings
from service.engine import Engine
from service.errors import Unavailable
from service.lane import Lane
from service.pb.inference import inference_pb2 as pb
from service.repository import load_version
from service.rpc.oip.desk import Desk
from service.rpc.oip.inference import OVERHEAD_BYTES, Inference
from service.rpc.oip.stream import InferStream
from tests.lanes import equal
from tests.oip.calls import array, request, step
from tests.rpc import run_alone
from tests.serving import until

BAD = np.full((1, 3), np.nan, dtype=np.float32)


@pytest.fixture(scope="module")
def lane(repository: Path) -> Lane:
    return load_version(load_settings({"repository": repository, "max_chunk_steps": 4}), "lstm", 1)


@asynccontextmanager
async def desk_of(lane: Lane) -> AsyncIterator[Desk]:
    engine = Engine(lane.settings)
    engine.add(lane)
    engine.start()
    try:
        yield Desk(engine)
    finally:
        engine.stop()


class Asked:
    """A request that was handed in."""

    def __init__(self, desk: Desk, message: pb.ModelInferRequest) -> None:
        self._has_answer = asyncio.Event()
        self.inference = Inference(lambda _: self._has_answer.set())
        desk.submit(message, self.inference)

    async def rows(self) -> np.ndarray | str:
        """Its answer [steps, 2], or why there is none."""
        await self._has_answer.wait()
        if self.inference.response is None:
            return str(self.inference.error)
        return array(pb.ModelInferResponse.FromString(self.inference.response))[0]


def steps_of(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3)).astype(np.float32)


async def test_steps_behind_a_refused_one_are_refused_with_it(lane: Lane, repository: Path) -> None:
    x = steps_of(0, 30)
    async with desk_of(lane) as desk:
        burst = [
            Asked(desk, step("lstm", 1, x[:20], sequence_start=True)),
            Asked(desk, step("lstm", 1, BAD)),
            Asked(desk, step("lstm", 1, x[20:], sequence_end=True)),
        ]
        first, bad, behind = [await each.rows() for each in burst]
        assert "element 0 of step 0 is nan" in bad
        assert "an earlier step was rejected, so position 21 was not applied" in behind
        assert lane.num_sessions == 1
        again = await Asked(desk, step("lstm", 1, x[20:], sequence_end=True)).rows()
        equal(np.concatenate([first, again]), run_alone(repository, "lstm", x))
        assert lane.num_sessions == 0


async def test_whoever_waits_is_told_why_a_sequence_is_lost(lane: Lane) -> None:
    async with desk_of(lane) as desk:
        waiting = Asked(desk, step("lstm", 1, steps_of(0, 9), sequence_start=True))
        desk._engine.end_all(lane, Unavailable("the lane is closed"))
        assert await waiting.rows() == "the lane is closed"
        assert "is not live" in await Asked(desk, step("lstm", 1, steps_of(0, 1))).rows()


async def test_room_is_what_is_neither_answered_nor_read(lane: Lane) -> None:
    """A stream takes no more than its limit at once, of steps and of whole sequences, and all of it again once read."""
    sent = [step("lstm", 1, steps_of(0, 40), sequence_start=True), request("lstm", steps_of(0, 40)[None])]
    async with desk_of(lane) as desk:
        for message in sent:
            stream = InferStream(desk, lane.settings.model_copy(update={"max_unsent_bytes": 4_000}))
            num = 0
            while not stream.wants_room:
                stream.take(message.SerializeToString())
                num += 1
            # An answer and its request: 40 steps of (3 + 2) float32, and what goes with them.
            assert num == 4_000 // (40 * (3 + 2) * 4 + OVERHEAD_BYTES) + 1
            waits = asyncio.create_task(stream.has_room())
            for left in range(num, 0, -1):
                assert stream.wants_room is (left == num)
                await until(lambda: stream.is_ready)  # noqa: B023
                assert not pb.ModelStreamInferResponse.FromString(stream.pop()).error_message
                stream._has_written.set()
            await waits
            assert (stream._num_line_bytes, stream._num_line_steps) == (0, 0)
        await Asked(desk, step("lstm", 1, steps_of(0, 1), sequence_end=True)).rows()


async def test_start_does_not_wait_for_what_is_queued_under_its_id(lane: Lane, repository: Path) -> None:
    first, second = steps_of(1, 30), steps_of(2, 9)
    async with desk_of(lane) as desk:
        burst = [
            Asked(desk, step("lstm", 1, first, sequence_start=True)),
            Asked(desk, step("lstm", 1, second[:5], sequence_start=True)),
            Asked(desk, step("lstm", 1, second[5:], sequence_end=True)),
        ]
        rows = [await each.rows() for each in burst]
        equal(rows[0], run_alone(repository, "lstm", first))
        equal(np.concatenate(rows[1:]), run_alone(repository, "lstm", second))
        assert lane.num_sessions == 0


async def test_end_that_was_refused_does_not_come_back_behind_a_new_start(lane: Lane) -> None:
    async with desk_of(lane) as desk:
        burst = [
            Asked(desk, step("lstm", 1, BAD, sequence_start=True, sequence_end=True)),
            Asked(desk, step("lstm", 1, steps_of(0, 1), sequence_start=True, sequence_end=True)),
        ]
        bad, good = [await each.rows() for each in burst]
        assert "is nan" in bad
        assert not isinstance(good, str)
        assert "is not live" in await Asked(desk, step("lstm", 1, steps_of(0, 1))).rows()
        assert lane.num_sessions == 0


async def test_executions_are_runs_whoever_shares_them(lane: Lane) -> None:
    async with desk_of(lane) as desk:
        counts = pb.ModelStatistics()
        for number in range(1, 6):
            await Asked(desk, step("lstm", number, steps_of(number, 1), sequence_start=True)).rows()
        desk.plan(lane)[1].fill(counts)
        assert (counts.inference_count, counts.execution_count) == (5, 5)
        burst = [Asked(desk, step("lstm", number, steps_of(number, 1), sequence_end=True)) for number in range(1, 6)]
        for each in burst:
            await each.rows()
        desk.plan(lane)[1].fill(counts)
        assert (counts.inference_count, counts.execution_count) == (10, 6)


@dataclass
class Life:
    """What a sequence should be: its applied steps, and whether one was refused since all were answered."""

    applied: list[np.ndarray] = field(default_factory=list)
    is_refusing: bool = False


requests_of = st.lists(
    st.tuples(
        st.integers(1, 3),  # sequence
        st.integers(1, 9),  # steps
        st.sampled_from(["", "", "", "start", "end", "start and end"]),
        st.sampled_from(["good"] * 5 + ["bad"]),
        st.booleans(),  # whether all that came before is answered first
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(requests_of)
def test_any_requests_are_answered_as_their_sequences_alone(
    lane: Lane, repository: Path, plan: list[tuple[int, int, str, str, bool]]
) -> None:
    asyncio.run(_play(lane, repository, plan))
    assert lane.num_sessions == 0
    assert lane.slab.num_allocated == 0


async def _play(lane: Lane, repository: Path, plan: list[tuple[int, int, str, str, bool]]) -> None:
    lives: dict[int, Life] = {}
    doomed: dict[int, Life] = {}  # sequences whose end was refused: they live again once that is known
    waiting: list[tuple[Asked, Life | None, int]] = []
    seen: defaultdict[int, list[np.ndarray]] = defaultdict(list)

    async def settle() -> None:
        for asked, life, count in waiting:
            rows = await asked.rows()
            if life is None:
                assert isinstance(rows, str)
            else:
                assert not isinstance(rows, str), rows
                seen[id(life)].append(rows)
                assert len(rows) == count
        waiting.clear()
        for number, life in doomed.items():
            lives.setdefault(number, life)
        doomed.clear()
        for life in lives.values():
            life.is_refusing = False

    everyone: list[Life] = []
    async with desk_of(lane) as desk:
        for seed, (number, count, flags, quality, is_settled) in enumerate(plan):
            if is_settled:
                await settle()
            x = steps_of(seed, count)
            if "start" in flags:
                doomed.pop(number, None)
                lives[number] = Life()
                everyone.append(lives[number])
            life = lives.get(number)
            is_good = life is not None and not life.is_refusing and quality == "good"
            sent = np.concatenate([x, BAD]) if quality == "bad" else x
            message = step("lstm", number, sent, sequence_start="start" in flags, sequence_end="end" in flags)
            waiting.append((Asked(desk, message), life if is_good else None, count))
            if life is not None:
                if is_good:
                    life.applied.append(x)
                else:
                    life.is_refusing = True
                if "end" in flags:
                    del lives[number]
                    if not is_good:
                        doomed[number] = life
        await settle()
        for number in list(lives):
            rows = await Asked(desk, step("lstm", number, steps_of(99, 1), sequence_end=True)).rows()
            assert not isinstance(rows, str)
    for life in everyone:
        if life.applied:
            equal(np.concatenate(seen[id(life)]), run_alone(repository, "lstm", np.concatenate(life.applied)))
