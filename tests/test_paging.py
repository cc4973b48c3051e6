"""Lanes with more sessions than memory holds: nobody can tell, but by the time that it takes."""

import numpy as np
import pytest

from service import express
from service.config import load_settings
from service.errors import Overloaded, RunFailed, SpillFailed, SpillLost, StepAborted
from service.events import Closed, Steps, StepsFailed
from service.predict import submit_sequences
from service.repository import load_version
from service.residence import MOVED_ROWS
from service.sessions import SessionState, Terms
from tests.lanes import Client, drive, equal, finish, run_alone, steps


@pytest.fixture
def lane_of(repository, store):
    """Make lanes that spill to the store, under the settings that are given."""

    def make(model="lstm", **settings):
        values = load_settings({"repository": repository, "spill_store": store.path, **settings})
        return load_version(values, model, 1, store)

    return make


def open_many(client, count, steps_each=4):
    """Open sessions. Returns {handle: all steps that it will send}."""
    return {client.open(): steps(seed, steps_each) for seed in range(count)}


def fill_disk(store, *, is_full=True):
    store._db.execute(f"PRAGMA query_only = {'ON' if is_full else 'OFF'}")


def is_spilled(client, handle):
    slot = client.link.sessions[handle].slot
    return client.lane.residence.absent([slot]) == [slot]


def damage(store, client, handle):
    """Damage the spilled state of a session."""
    assert is_spilled(client, handle)
    key = client.lane.residence._base + client.link.sessions[handle].slot
    store._db.execute("UPDATE state SET checksum = checksum + 1 WHERE key = ?", (key,))


@pytest.mark.parametrize("model", ["lstm", "gru", "coupled"])
def test_more_sessions_than_memory_holds_get_the_numbers_that_they_get_alone(lane_of, store, model):
    lane = lane_of(model, max_resident_sessions=3, max_batch_rows=8, max_chunk_steps=2)
    client = Client(lane, wants_states=True)
    xs = open_many(client, 20, steps_each=7)
    for start, stop in ((0, 1), (1, 5), (5, 7)):
        client.send({handle: x[start:stop] for handle, x in xs.items()})
        drive(lane)
        assert (lane.residence.num_resident, lane.residence.num_spilled) == (3, 17)
    for handle in xs:
        lane.close(client.link, handle)
    for handle, x in xs.items():
        alone = run_alone(lane, x)
        equal(client.rows(handle), alone.y)
        [closed] = [closed for closed in client.told(Closed) if closed.handle == handle]
        for mine, expected in zip(closed.final_states, alone.states, strict=True):
            equal(mine, expected)
    lane.expire(0.0)
    assert (lane.num_sessions, lane.slab.num_allocated, len(store)) == (0, 0, 0)
    assert lane.tally.spills == lane.tally.restores + 17 > 60


def test_states_that_a_device_keeps_are_spilled_too(repository, store):
    values = {"max_resident_sessions": 3, "spill_store": store.path, "repository": repository}
    lane = load_version(load_settings(values), "lstm", 1, store, keeps_states=True)
    client = Client(lane)
    xs = open_many(client, 10)
    for start, stop in ((0, 1), (1, 4)):
        client.send({handle: x[start:stop] for handle, x in xs.items()})
        drive(lane)
    for handle, x in xs.items():
        np.testing.assert_allclose(client.rows(handle), run_alone(lane, x).y, rtol=1e-6)
    assert (lane.residence.num_resident, lane.residence.num_spilled) == (3, 7)


def test_a_batch_is_cut_so_that_no_part_moves_many(lane_of, store):
    lane = lane_of(max_resident_sessions=100)
    client = Client(lane)
    xs = open_many(client, 300)
    client.send({handle: x[:1] for handle, x in xs.items()})
    lane.flush()
    moved = lane.tally.restores
    while (run := lane.next_run(0.0)) is not None:
        assert lane.tally.restores - moved <= MOVED_ROWS
        moved = lane.tally.restores
        finish(lane, run)
    assert moved > 200
    assert all(len(client.rows(handle)) == 1 for handle in xs)


def test_sessions_in_memory_go_by_the_short_way_and_the_others_come_back_for_it(lane_of):
    lane = lane_of(max_resident_sessions=2)
    client = Client(lane)
    xs = open_many(client, 3)

    sent = dict.fromkeys(xs, 0)

    def is_short(*handles):
        """Send the next step of each; whether they go by the short way."""
        sessions = [client.link.sessions[handle] for handle in handles]
        data = b"".join(xs[handle][sent[handle]].tobytes() for handle in handles)
        lane.submit(Steps(client.link, sessions, None, None, [data]), 0.0)
        sent.update({handle: sent[handle] + 1 for handle in handles})
        boarded = express.board(lane, 1)
        if boarded is None:
            drive(lane)
            return False
        express.arrive(boarded, boarded.execute(), 0.0, 0.0)
        return True

    ways = [is_short(1, 2), is_short(0, 2), is_short(2, 0), is_short(1), is_short(1)]
    assert ways == [True, False, True, False, True]
    for handle, x in xs.items():
        equal(client.rows(handle), run_alone(lane, x[: sent[handle]]).y)


def test_sequences_of_predict_stay_in_memory(lane_of):
    lane = lane_of(max_resident_sessions=1, max_predict_sequences=5)
    client, call = Client(lane), Client(lane, is_predicting=True, wants_states=True)
    xs = open_many(client, 3)
    whole = [steps(seed, 9) for seed in range(10, 15)]
    submit_sequences(lane, call.link, [np.concatenate(whole)], list(range(0, 45, 9)), [9] * 5, [None, None], 0.0)
    client.send(xs)
    drive(lane)
    for handle, x in enumerate(whole):
        equal(call.rows(handle), run_alone(lane, x).y)
    for handle, x in xs.items():
        equal(client.rows(handle), run_alone(lane, x).y)
    assert lane.residence.num_resident == 1


def test_a_model_that_needs_the_whole_sequence_spills_nothing(lane_of):
    lane = lane_of("bilstm", max_resident_sessions=1)
    client = Client(lane)
    xs = open_many(client, 5)
    client.send(xs)
    lane.finish(client.link, 0.0)
    drive(lane)
    for handle, x in xs.items():
        equal(client.rows(handle), run_alone(lane, x).y)
    assert (lane.residence, lane.tally.spills) == (None, 0)


def test_a_session_opens_only_where_one_in_memory_does_not_run(lane_of):
    lane = lane_of(max_resident_sessions=2)
    client = Client(lane)
    xs = open_many(client, 2)
    client.send(xs)
    lane.flush()
    run = lane.next_run(0.0)
    with pytest.raises(Overloaded, match="all 2 sessions in memory are in use") as caught:
        client.open()
    assert (caught.value.retry_after_s, lane.num_sessions) == (0.25, 2)
    finish(lane, run)
    assert client.open() == 3
    for handle, x in xs.items():
        equal(client.rows(handle), run_alone(lane, x).y)


def test_steps_that_need_room_wait_for_the_run_that_holds_it(lane_of, store):
    lane = lane_of(max_resident_sessions=1)
    client = Client(lane)
    xs = open_many(client, 2)
    client.send({1: xs[1]})
    lane.flush()
    run = lane.next_run(0.0)
    client.send({0: xs[0]})
    lane.flush()
    assert lane.next_run(0.0) is None
    finish(lane, run)
    drive(lane)
    for handle, x in xs.items():
        equal(client.rows(handle), run_alone(lane, x).y)


def test_a_row_that_fails_by_itself_is_lost_alone_wherever_states_lie(lane_of, monkeypatch):
    lane = lane_of(max_resident_sessions=2)
    client = Client(lane)
    xs = open_many(client, 4)
    run = lane.runner.run

    def fails(rows, inputs, lengths):
        if len(rows) > 1 or np.isin(inputs["x"], xs[3][1]).any():
            raise RunFailed("more than one row, or the bad one")
        return run(rows, inputs, lengths)

    client.send({handle: x[:1] for handle, x in xs.items()})
    drive(lane)
    monkeypatch.setattr(lane.runner, "run", fails)
    client.send({handle: x[1:] for handle, x in xs.items()})
    drive(lane)
    [failed] = client.told(StepsFailed)
    assert (failed.handle, type(failed.error)) == (3, RunFailed)
    for handle in range(3):
        equal(client.rows(handle), run_alone(lane, xs[handle]).y)
    lane.drop(client.link, 0.0)
    assert (lane.num_sessions, lane.slab.num_allocated) == (0, 0)


# ---- faults of the store --------------------------------------------------------------------------------------------


def test_a_full_disk_rejects_the_steps_that_need_room_and_no_others(lane_of, store):
    lane = lane_of(max_resident_sessions=2)
    client = Client(lane)
    xs = open_many(client, 4)
    client.send({handle: x[:1] for handle, x in xs.items()})
    drive(lane)
    fill_disk(store)
    spilled = [handle for handle in xs if is_spilled(client, handle)]
    client.send({handle: x[1:3] for handle, x in xs.items()})
    client.send({handle: x[3:] for handle, x in xs.items()})
    drive(lane)
    failed = client.told(StepsFailed)
    assert [(f.handle, f.position, f.num_steps, f.expected, f.is_over) for f in failed] == [
        (handle, 1, 3, 1, False) for handle in spilled
    ]
    assert {type(f.error) for f in failed} == {SpillFailed}
    assert lane.tally.rejected == {"SPILL_FAILED": 2}
    with pytest.raises(SpillFailed):
        client.open()
    client.send({spilled[0]: xs[spilled[0]][3:]})
    drive(lane)
    assert isinstance(client.told(StepsFailed)[-1].error, StepAborted)
    fill_disk(store, is_full=False)
    client.send({handle: xs[handle][1:] for handle in spilled}, positions=[1, 1])
    drive(lane)
    for handle, x in xs.items():
        equal(client.rows(handle), run_alone(lane, x).y)
    assert (lane.num_sessions, lane.num_queued_steps, lane.tally.spill_errors) == (4, 0, 2)


@pytest.mark.parametrize("linger_s", [0.0, 5.0])
def test_a_client_that_has_sent_all_is_told_the_end_though_the_disk_is_full(lane_of, store, linger_s):
    lane = lane_of(max_resident_sessions=1)
    client, other = Client(lane), Client(lane)
    client.open(Terms(session_id="a", linger_s=linger_s))
    other.open()
    fill_disk(store)
    client.send({0: steps(1, 2)})
    lane.finish(client.link, 0.0)
    drive(lane)
    assert [type(event) for event in client.events] == [StepsFailed, Closed]
    assert client.events[1].state == (SessionState.OPEN if linger_s else SessionState.CLOSED)
    assert lane.slab.num_allocated == lane.num_sessions == 1 + bool(linger_s)


def test_a_state_that_cannot_be_read_back_ends_its_session_alone(lane_of, store):
    lane = lane_of(max_resident_sessions=2)
    client = Client(lane)
    xs = open_many(client, 5)
    client.send({handle: x[:1] for handle, x in xs.items()})
    drive(lane)
    lost = next(handle for handle in xs if is_spilled(client, handle))
    damage(store, client, lost)
    client.send({handle: x[1:3] for handle, x in xs.items()})
    lane.flush()
    client.send({handle: x[3:] for handle, x in xs.items()})
    drive(lane)
    [failed], [closed] = client.told(StepsFailed), client.told(Closed)
    assert (failed.handle, failed.position, failed.num_steps, failed.is_over) == (lost, 1, 3, True)
    assert (type(failed.error), closed.handle, closed.state) == (SpillLost, lost, SessionState.FAILED)
    for handle, x in xs.items():
        if handle != lost:
            equal(client.rows(handle), run_alone(lane, x).y)
    assert (lane.num_sessions, lane.slab.num_allocated, lane.tally.rejected) == (4, 4, {"SPILL_LOST": 1})


def test_a_session_whose_state_is_lost_still_closes(lane_of, store):
    lane = lane_of(max_resident_sessions=1)
    client = Client(lane, wants_states=True)
    open_many(client, 2)
    damage(store, client, 0)
    lane.close(client.link, 0)
    [failed], [closed] = client.told(StepsFailed), client.told(Closed)
    assert (type(failed.error), failed.num_steps, closed.handle, closed.final_states) == (SpillLost, 0, 0, None)
    assert (lane.num_sessions, lane.slab.num_allocated) == (1, 1)


def test_a_session_that_is_dropped_while_its_state_waits_is_freed(lane_of, store):
    lane = lane_of(max_resident_sessions=1)
    gone, client = Client(lane), Client(lane)
    gone.open()
    x = steps(1, 1)
    client.send({client.open(): x})
    gone.send({0: x})
    lane.flush()
    run = lane.next_run(0.0)  # the other's; the first waits for room
    damage(store, gone, 0)
    lane.drop(gone.link, 0.0)
    finish(lane, run)
    drive(lane)
    equal(client.rows(), run_alone(lane, x).y)
    assert (lane.slab.num_allocated, lane.num_sessions, gone.events) == (1, 1, [])


def test_a_bug_in_bringing_states_back_ends_those_sessions_alone(lane_of, monkeypatch, caplog):
    lane = lane_of(max_resident_sessions=1)
    client = Client(lane)
    xs = open_many(client, 2)
    monkeypatch.setattr(lane.residence, "bring_back", None)
    client.send(xs)
    drive(lane)
    [failed] = client.told(StepsFailed)
    assert (failed.handle, type(failed.error), failed.is_over) == (0, RunFailed, True)
    equal(client.rows(1), run_alone(lane, xs[1]).y)
    assert (lane.slab.num_allocated, lane.num_queued_steps) == (1, 0)
    assert "a bug in bringing states back" in caplog.text
