"""A message that opens or closes many sessions is taken in slices, with turns for others in between."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from service.config import load_settings
from service.engine import Engine
from service.errors import SessionNotFound
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.repository import load_version
from service.rpc.codec import LanePlan
from service.rpc.requests import read_open
from service.rpc.stream import SLICE, Stream
from service.sessions import Terms


@pytest.fixture
def stream(repository):
    settings = load_settings({"repository": repository, "max_sessions": 9 * SLICE})
    engine, lane = Engine(settings), load_version(settings, "lstm", 1)
    engine.add(lane)
    plan = LanePlan(lane)
    return Stream(engine, plan, read_open(plan, pb.StreamOpen(model="lstm")), None)


async def turns_of(work) -> int:
    """Do something, and count the turns that others have meanwhile."""
    num = 0

    async def count() -> None:
        nonlocal num
        while True:
            await asyncio.sleep(0)
            num += 1

    counting = asyncio.create_task(count())
    await work
    counting.cancel()
    return num


def answered(stream: Stream) -> pb.StreamAnswer:
    merged = pb.StreamAnswer()
    for message in stream._pack():
        merged.MergeFrom(pb.StreamPredictResponse.FromString(message).answer)
    return merged


async def test_many_opens_and_closes_leave_turns_to_others(stream):
    many = 4 * SLICE
    assert await turns_of(stream.open([Terms()] * many)) >= 2
    [opened] = stream._pack()
    handles = [each.handle for each in pb.StreamPredictResponse.FromString(opened).opened.sessions]
    assert handles == list(range(many))

    opens = pb.StreamFrame(opens=[pb.SessionOpen() for _ in range(many)])
    stream.take(pb.StreamPredictRequest(frame=opens).SerializeToString())
    assert stream.held is not None
    assert not answered(stream).opened
    assert await turns_of(stream.take_held()) >= 2
    assert [each.handle for each in answered(stream).opened] == list(range(many, 2 * many))

    closes = pb.StreamFrame(closes=range(many))
    stream.take(pb.StreamPredictRequest(frame=closes).SerializeToString())
    assert await turns_of(stream.take_held()) >= 2
    assert [each.handle for each in answered(stream).closed] == list(range(many))


async def test_few_are_taken_at_once(stream):
    await stream.open([])
    stream._pack()
    opens = pb.StreamFrame(opens=[pb.SessionOpen() for _ in range(SLICE)])
    stream.take(pb.StreamPredictRequest(frame=opens).SerializeToString())
    assert stream.held is None
    assert len(answered(stream).opened) == SLICE


async def test_many_sessions_that_are_lost_with_their_connection_leave_turns_to_others(stream):
    engine, lane = stream._engine, stream._lane
    engine.start()
    names = [Terms(session_id=f"s{number}") for number in range(4 * SLICE)]
    lingering = Terms(session_id="lingers", linger_s=60.0)
    await stream.open([*names, lingering])
    stream.drop()
    assert 0 < lane.num_sessions < 4 * SLICE + 1
    # A name is free at once, whether or not its session's turn to go has come; one that lingers is still there.
    left = [each for each in names if lane.sessions.find(each) is not None]
    assert lane.find(left[0], engine.clock()) is None
    with pytest.raises(SessionNotFound):
        lane.find(dataclasses.replace(left[1], resume_only=True), engine.clock())
    assert lane.find(lingering, engine.clock()).link is None
    async with asyncio.timeout(10):
        while lane.num_sessions > 1:  # noqa: ASYNC110  what it waits for is the engine's own turns
            await asyncio.sleep(0)
    assert lane.slab.num_allocated == 1
    engine.stop()
