"""Sessions that move between workers: engines in one process, each with its unix socket, asked as workers ask."""

from __future__ import annotations

import asyncio
import socket
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import AnswersNotKept, Exhausted, SessionBusy, SessionNotFound
from service.events import Closed, StepsFailed
from service.rpc import handoff, peers
from service.sessions import Terms
from tests.lanes import equal, run_alone, steps
from tests.siblings import Stream, rows_from, until, workers_of


@pytest.mark.parametrize("model", ["lstm", "gru", "tokens"])
async def test_a_session_goes_on_where_it_stood_with_its_kept_answers(repository, model):
    async with workers_of(repository, model) as (a, b):
        x = steps(1, 40) if model != "tokens" else np.random.default_rng(1).integers(0, 11, 40)
        old = await a.stream().open_by_name(replay_window=8)
        old.put(x[:20])
        await old.answered(20)
        old.drop()
        new = await b.stream().open_by_name(replay_window=8)
        assert (new.position, new.was_live, a.names, b.names) == (20, True, set(), {"a"})
        assert (a.lane.slab.num_allocated, b.lane.slab.num_allocated) == (0, 1)
        assert (a.lane.tally.sequences, b.lane.tally.sequences) == (1, 0)
        new.put(x[12:], 12)
        await new.answered(28)
        alone = run_alone(a.lane, x).y
        equal(rows_from(new, 12, 40), alone[12:])
        equal(old.rows(), alone[:20])


@pytest.mark.parametrize("values", [{"keeps_states": True}, {"max_resident_sessions": 2}], ids=["device", "spilled"])
async def test_states_move_wherever_they_are_kept(repository, values):
    async with workers_of(repository, **values) as (a, b):
        xs = {name: steps(ord(name), 30) for name in "abcdef"}
        for name, x in xs.items():
            stream = await a.stream().open_by_name(name)
            stream.put(x[:20])
            await stream.answered(20)
        assert a.lane.residence is None or a.lane.residence.num_spilled == 4
        moved = dict(zip(xs, await asyncio.gather(*(b.stream().open_by_name(name) for name in xs)), strict=True))
        for name, stream in moved.items():
            stream.put(xs[name][20:])
            await stream.answered(10)
            equal(rows_from(stream, 20, 30), run_alone(a.lane, xs[name]).y[20:])
        assert (a.names, a.lane.slab.num_allocated, b.names) == (set(), 0, set(xs))


async def test_a_state_that_is_lost_keeps_no_other_from_moving(repository):
    async with workers_of(repository, max_resident_sessions=2) as (a, b):
        for name in "abcd":
            stream = await a.stream().open_by_name(name)
            stream.put(steps(1, 5))
            await stream.answered(5)
        a.store.delete([a.lane.residence._base + slot for slot in a.lane.residence._spilled][:1])
        wanted = [Terms(session_id=name, linger_s=60.0) for name in "abcd"]
        mover = b.handoff.mover(b.lane, [0], emit_last=False)
        async with mover.brought(wanted) as refused:
            assert (len(refused), len(b.names), a.names) == (1, 3, set())
        [(name, error)] = refused.items()
        assert isinstance(error, SessionBusy)
        assert not (await b.stream().open_by_name(name)).was_live


async def test_a_session_that_finds_no_room_waits_for_it(repository, monkeypatch):
    async with workers_of(repository) as (a, b):
        await a.stream().open_by_name()
        slots = b.lane.slab.allocate(b.lane.slab.num_free)  # as if Predict calls held all
        opening = asyncio.create_task(b.stream().open_by_name())
        await until(lambda: not a.names)
        await asyncio.sleep(2 * handoff.ROOM_S)
        b.lane.slab.free(slots)
        assert (await opening).was_live
        slots = a.lane.slab.allocate(a.lane.slab.num_free)
        monkeypatch.setattr(handoff, "FINISH_S", 0.1)
        with pytest.raises(Exhausted, match="room for 0"):
            await a.stream().open_by_name()


async def test_what_is_queued_is_finished_and_answered_on_the_new_stream(repository):
    async with workers_of(repository, max_chunk_steps=1) as (a, b):
        x = steps(2, 1000)
        old = await a.stream().open_by_name()
        old.put(x[:950])
        new = await b.stream().open_by_name()
        assert [closed.is_taken_over for closed in old.told(Closed)] == [True]
        assert new.position == 950
        new.put(x[950:])
        num_old = len(old.answers())
        assert num_old < 950
        await new.answered(1000 - num_old)
        alone = run_alone(a.lane, x).y
        equal(rows_from(new, num_old, 1000), alone[num_old:])


async def test_queued_answers_are_what_the_new_stream_wants(repository):
    async with workers_of(repository, max_chunk_steps=1) as (a, b):
        x = steps(3, 2000)
        old = await a.stream().open_by_name()
        old.put(x[:1500])
        old.put(x[1500:])
        new = await b.stream(emit_last=True).open_by_name()
        alone = run_alone(a.lane, x).y
        assert len(old.answers()) < 1500
        assert [position for position, _ in new.answers()] == [1499, 1999]
        equal(np.array([row for _, row in new.answers()]), alone[[1499, 1999]])


async def test_a_sequence_that_waits_to_be_whole_moves_with_its_steps(repository):
    async with workers_of(repository, "bilstm") as (a, b):
        x = steps(4, 30)
        old = await a.stream().open_by_name()
        old.put(x[:20])
        new = await b.stream().open_by_name()
        assert (new.position, a.lane.num_queued_steps, b.lane.num_queued_steps) == (20, 0, 20)
        new.put(x[20:])
        b.lane.close(new.link, 0)
        b.engine.wake()
        await new.answered(30)
        equal(new.rows(), run_alone(b.lane, x).y)


async def test_anonymous_sessions_ask_nobody(repository, monkeypatch):
    async with workers_of(repository) as (a, _):
        monkeypatch.setattr(handoff, "ask_all", None)
        assert not (await a.stream().open_by_name("", linger_s=0.0)).was_live


async def test_resume_only_finds_what_a_sibling_holds_and_nothing_else(repository):
    async with workers_of(repository) as (a, b):
        await a.stream().open_by_name()
        assert (await b.stream().open_by_name(resume_only=True)).was_live
        with pytest.raises(SessionNotFound):
            await b.stream().open_by_name("b", resume_only=True)


async def test_acknowledged_answers_are_not_kept_on_the_other_side_either(repository):
    async with workers_of(repository) as (a, b):
        x = steps(7, 20)
        old = await a.stream().open_by_name(replay_window=8)
        old.put(x)
        await old.answered(20)
        old.link.sessions[0].acknowledge(17)
        new = await b.stream().open_by_name(replay_window=8)
        new.put(x[16:], 16)
        new.put(x[17:], 17)
        await new.answered(3)
        [failed] = new.told(StepsFailed)
        assert (type(failed.error), failed.expected) == (AnswersNotKept, 20)
        equal(rows_from(new, 17, 20), run_alone(a.lane, x).y[17:])


async def test_a_holder_that_wants_it_back_waits_for_it_to_have_moved(repository):
    async with workers_of(repository, max_chunk_steps=1) as (a, b):
        old = await a.stream().open_by_name()
        old.put(steps(8, 1000))
        moved = b.stream()
        moving = asyncio.create_task(moved.open_by_name())
        await until(lambda: old.is_over)
        back = await a.stream().open_by_name()
        await moving
        assert (moved.position, moved.was_live, moved.is_over) == (1000, True, True)
        assert (back.position, back.was_live, back.is_over) == (1000, True, False)
        assert (a.names, b.names) == ({"a"}, set())


async def test_a_crowd_moves(repository):
    async with workers_of(repository, max_sessions=400) as (a, b):
        names = [f"session {number}" for number in range(200)]
        opened = await asyncio.gather(*(a.stream().open_by_name(name) for name in names))
        assert not any(stream.was_live for stream in opened)
        moved = await asyncio.gather(*(b.stream().open_by_name(name) for name in names))
        assert all(stream.was_live for stream in moved)
        assert (a.names, b.names) == (set(), set(names))


async def test_a_session_stays_if_its_opener_has_given_up(repository, monkeypatch):
    async with workers_of(repository, max_chunk_steps=1) as (a, b):
        old = await a.stream().open_by_name()
        old.put(steps(9, 1500))
        monkeypatch.setattr(peers, "PATIENCE_S", 0.001)
        with pytest.raises(SessionBusy):
            await b.stream().open_by_name()
        await until(lambda: not a.lane.num_queued_steps)
        assert (a.names, b.names) == ({"a"}, set())
        monkeypatch.undo()
        assert (await b.stream().open_by_name()).position == 1500


async def test_many_workers_that_open_a_name_at_once_leave_one_session(repository):
    async with workers_of(repository, num=4) as workers:
        for _ in range(5):
            streams = [worker.stream() for worker in workers for _ in range(2)]
            await asyncio.gather(*(stream.open_by_name() for stream in streams))
            assert sum(not stream.was_live for stream in streams) in (0, 1)  # only the very first one is new
            assert [worker.names for worker in workers].count({"a"}) == 1
            assert [stream.is_over for stream in streams].count(False) == 1
        assert sum(worker.lane.tally.sequences for worker in workers) == 1


async def test_an_opener_that_is_gone_leaves_the_session_where_it_came_to(repository):
    async with workers_of(repository) as (a, b):
        x = steps(5, 30)
        old = await a.stream().open_by_name()
        old.put(x[:10])
        await old.answered(10)
        opening = asyncio.create_task(b.stream().open_by_name())
        await until(lambda: old.is_over, pause_s=0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await until(lambda: b.names)
        new = await a.stream().open_by_name()
        assert (new.position, b.names) == (10, set())
        new.put(x[10:])
        await new.answered(20)
        equal(rows_from(new, 10, 30), run_alone(a.lane, x).y[10:])


async def test_an_opener_that_is_gone_does_not_take_it_from_a_later_one(repository):
    async with workers_of(repository) as (a, b):
        await a.stream().open_by_name()
        for num_turns in range(40):
            opening = asyncio.create_task(b.stream().open_by_name())
            for _ in range(num_turns):
                await asyncio.sleep(0)
            opening.cancel()
            last = await a.stream().open_by_name()
            await until(lambda: not b.handoff._claims)
            assert (last.was_live, last.is_over, a.names, b.names) == (True, False, {"a"}, set())


async def test_a_session_without_linger_ends_with_an_opener_that_is_gone(repository):
    async with workers_of(repository) as (a, b):
        old = await a.stream().open_by_name(linger_s=0.0)
        opening = asyncio.create_task(b.stream().open_by_name(linger_s=0.0))
        await until(lambda: old.is_over, pause_s=0)
        opening.cancel()
        await until(lambda: not b.handoff._claims)
        assert (a.names, b.names, b.lane.slab.num_allocated) == (set(), set(), 0)


async def test_a_session_that_is_busy_for_long_is_refused_and_goes_on(repository, monkeypatch):
    monkeypatch.setattr(handoff, "FINISH_S", 0.02)
    async with workers_of(repository, max_chunk_steps=1) as (a, b):
        x = steps(6, 3000)
        old = await a.stream().open_by_name(replay_window=8)
        old.put(x)
        with pytest.raises(SessionBusy, match="another worker"):
            await b.stream().open_by_name()
        assert (old.is_over, a.names) == (True, {"a"})
        await until(lambda: not a.lane.num_queued_steps)
        new = await b.stream().open_by_name(replay_window=8)
        assert new.position == 3000
        new.put(x[-4:], 2996)
        await new.answered(4)
        equal(rows_from(new, 2996, 3000), run_alone(a.lane, x).y[-4:])


async def test_a_full_worker_leaves_the_session_where_it_is(repository):
    async with workers_of(repository, max_sessions=1) as (a, b):
        await a.stream().open_by_name("a")
        await b.stream().open_by_name("b")
        with pytest.raises(Exhausted, match="max_sessions"):
            await b.stream().open_by_name("a")
        assert (a.names, b.names) == ({"a"}, {"b"})


async def test_another_model_file_is_another_session(repository):
    async with workers_of(repository) as (a, b):
        await a.stream().open_by_name()
        a.lane.backend.digest = "another"
        assert not (await b.stream().open_by_name()).was_live
        assert (a.names, b.names) == ({"a"}, {"a"})


async def test_siblings_that_are_dead_or_hang_are_passed_over(repository, monkeypatch):
    monkeypatch.setattr(peers, "ALIVE_S", 0.2)
    async with workers_of(repository, num=3) as (a, b, c):
        held = await a.stream().open_by_name()
        await c.stop()
        began = time.monotonic()
        assert (await b.stream().open_by_name()).was_live  # dead: nobody listens
        assert time.monotonic() - began < 0.15
        assert held.is_over
        with socket.socket(socket.AF_UNIX) as hanging:
            c._path.unlink(missing_ok=True)
            hanging.bind(str(c._path))
            hanging.listen()
            began = time.monotonic()
            assert (await a.stream().open_by_name()).was_live
            assert 0.2 <= time.monotonic() - began < 2
        await c.start()


acts = st.lists(
    st.tuples(
        st.sampled_from(["open", "open", "send", "drop", "race", "cancel"]),
        st.sampled_from("abc"),
        st.integers(0, 2),  # worker
        st.integers(1, 60),  # steps
    ),
    max_size=25,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts=acts)
def test_whatever_happens_a_name_is_one_session_with_the_numbers_of_its_sequence(repository, acts):
    """Streams open, break, race and are cancelled on three workers, with steps queued at any moment."""
    xs = {name: steps(ord(name), 60 * 26) for name in "abc"}

    async def run() -> None:
        async with workers_of(repository, num=3) as workers:
            sent = dict.fromkeys("abc", 0)
            told: dict[str, dict[int, np.ndarray]] = {name: {} for name in "abc"}
            holders: dict[str, Stream] = {}
            streams: list[tuple[str, Stream]] = []

            async def open_on(index: int, name: str) -> Stream:
                stream = workers[index].stream()
                streams.append((name, stream))
                return await stream.open_by_name(name)

            for act, name, index, num in acts:
                if act == "open":
                    holders[name] = await open_on(index, name)
                    assert holders[name].position == sent[name]
                elif act == "race":
                    rivals = await asyncio.gather(*(open_on(each, name) for each in range(3)))
                    [holders[name]] = [stream for stream in rivals if not stream.is_over]
                    assert holders[name].position == sent[name]
                elif act == "cancel":
                    opening = asyncio.create_task(open_on(index, name))
                    for _ in range(num):
                        await asyncio.sleep(0)
                    opening.cancel()
                    await asyncio.gather(opening, return_exceptions=True)
                    _, stream = streams[-1]
                    if stream.position >= 0 and not stream.is_over:
                        holders[name] = stream
                elif name in holders and not holders[name].is_over:
                    if act == "send":
                        holders[name].put(xs[name][sent[name] : sent[name] + num])
                        sent[name] += num
                    else:
                        holders[name].drop()
                        del holders[name]
            for name in "abc":
                last = await open_on(0, name)
                last.put(xs[name][sent[name] : sent[name] + 1])
                await until(lambda: any(at == sent[name] for at, _ in last.answers()))  # noqa: B023  at once
                sent[name] += 1
            for worker in workers[1:]:
                assert worker.names == set()
                assert worker.lane.slab.num_allocated == 0
                assert not worker.lane.num_queued_steps
            assert workers[0].names == {"a", "b", "c"}
            for name, stream in streams:
                for position, row in stream.answers():
                    assert position not in told[name], "answered twice"
                    told[name][position] = row
            for name, rows in told.items():
                alone = run_alone(workers[0].lane, xs[name][: sent[name]]).y
                for position, row in rows.items():
                    equal(row, alone[position])

    asyncio.run(asyncio.wait_for(run(), timeout=60))
