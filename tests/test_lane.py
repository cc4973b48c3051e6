"""service.lane without a server: steps in, events out, on a clock that the test moves."""

import numpy as np
import pytest

from service.errors import (
    BadValue,
    DeadlineExpired,
    Exhausted,
    Overloaded,
    PositionGap,
    RunFailed,
    SessionExpired,
    StepAborted,
)
from service.events import Closed, StepsFailed
from service.sessions import SessionState, Terms
from tests.lanes import Client, drive, equal, finish, lane_maker, run_alone, steps

MARK = np.float32(777.0)
"""A run with this value in it fails."""


@pytest.fixture(params=["host", "device"])
def lane_of(repository, request):
    """The states are where the parameter says: nothing else may differ."""
    return lane_maker(repository, keeps_states=request.param == "device")


@pytest.fixture
def lane(lane_of):
    return lane_of("lstm")


def fail_on_mark(lane, monkeypatch):
    run = lane.runner.run

    def fails(slots, inputs, lengths):
        if (inputs["x"] == MARK).any():
            raise RunFailed("the mark was in it")
        return run(slots, inputs, lengths)

    monkeypatch.setattr(lane.runner, "run", fails)


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["lstm", "coupled"])
def test_sessions_that_come_and_go_get_the_numbers_that_they_get_alone(lane_of, model):
    lane = lane_of(model, max_batch_rows=5, max_chunk_steps=4)
    rng = np.random.default_rng(0)
    xs = [steps(seed, int(rng.integers(1, 40))) for seed in range(12)]
    clients = [Client(lane, wants_states=True) for _ in xs]
    sent = dict.fromkeys(range(12), 0)
    for client in clients:
        client.open()
    while sent:
        for index in rng.choice(list(sent), size=min(4, len(sent)), replace=False).tolist():
            count = int(rng.integers(1, 9))
            x = xs[index][sent[index] : sent[index] + count]
            if len(x):
                clients[index].send({0: x})
                sent[index] += len(x)
            else:
                lane.close(clients[index].link, 0)
                del sent[index]
        lane.flush()
        if (run := lane.next_run(0.0)) is not None:
            finish(lane, run)
    drive(lane)
    for client, x in zip(clients, xs, strict=True):
        alone = run_alone(lane, x)
        equal(client.rows(), alone.y)
        [closed] = client.told(Closed)
        assert (closed.position, closed.state, client.events[-1]) == (len(x), SessionState.CLOSED, closed)
        for mine, expected in zip(closed.final_states, alone.states, strict=True):
            equal(mine, expected)
    assert (lane.slab.num_allocated, lane.num_sessions) == (0, 0)
    assert (max(lane.tally.run_rows) == 1) == (model == "coupled")


def test_rows_find_their_steps_though_the_sessions_of_a_message_run_in_another_order(lane):
    client = Client(lane)
    x, y = steps(1, 2), steps(2, 1)
    client.send({client.open(): x[:1]})
    lane.flush()
    run = lane.next_run(0.0)
    client.send({0: x[1:], client.open(): y})
    lane.flush()
    finish(lane, run)
    drive(lane)
    assert lane.tally.run_rows == {1: 1, 2: 1}
    equal(client.rows(0), run_alone(lane, x).y)
    equal(client.rows(1), run_alone(lane, y).y)


def test_a_client_that_wants_last_steps_alone_gets_those_of_each_entry(lane):
    client = Client(lane, emit_last=True)
    xs = {client.open(): steps(seed, count) for seed, count in ((1, 13), (2, 16), (3, 20))}
    client.send(xs)
    drive(lane)
    assert lane.tally.run_rows == {4: 1, 1: 1}  # the last goes on for four steps
    for handle, x in xs.items():
        [(position, row)] = client.answers(handle)
        assert position == len(x) - 1
        equal(row, run_alone(lane, x).y[-1])


def test_a_bad_value_rejects_its_entry_alone_and_what_follows_it(lane):
    client = Client(lane)
    good, bad = client.open(), client.open()
    x = steps(1, 3)
    broken = x.copy()
    broken[1, 2] = np.nan
    client.send({bad: broken, good: x})
    client.send({bad: x[:1]})
    drive(lane)
    equal(client.rows(good), run_alone(lane, x).y)
    first, second = client.told(StepsFailed)
    assert (first.position, first.num_steps, first.expected, type(first.error)) == (0, 3, 0, BadValue)
    assert "x: element 2 of step 1 is nan" in str(first.error)
    assert (second.position, second.num_steps, type(second.error)) == (3, 1, StepAborted)
    client.send({bad: x}, positions=[0])
    drive(lane)
    equal(client.rows(bad), run_alone(lane, x).y)


def test_a_session_begins_with_the_state_that_it_is_given(lane):
    x = steps(2, 9)
    first, second = Client(lane, wants_states=True), Client(lane)
    first.send({first.open(): x[:4]})
    lane.finish(first.link, 0.0)
    drive(lane)
    second.open()
    for index, row in enumerate(first.told(Closed)[0].final_states):
        lane.slab.write(second.link.sessions[0].slot, index, row)
    second.send({0: x[4:]})
    drive(lane)
    equal(np.concatenate([first.rows(), second.rows()]), run_alone(lane, x).y)


# ---- faults ---------------------------------------------------------------------------------------------------------


def test_a_row_that_fails_by_itself_is_lost_alone(lane, monkeypatch):
    fail_on_mark(lane, monkeypatch)
    client = Client(lane)
    xs = {client.open(): steps(seed, 4) for seed in range(4)}
    client.send({handle: x[:1] for handle, x in xs.items()})
    drive(lane)
    marked = xs[2].copy()
    marked[2] = MARK
    client.send({handle: (marked if handle == 2 else x)[1:3] for handle, x in xs.items()})
    drive(lane)
    client.send({handle: xs[handle][3:] for handle in (0, 1, 3)})
    drive(lane)
    for handle in (0, 1, 3):
        equal(client.rows(handle), run_alone(lane, xs[handle]).y)
    equal(client.rows(2), run_alone(lane, xs[2][:1]).y)
    [failed], [closed] = client.told(StepsFailed), client.told(Closed)
    assert (failed.handle, failed.position, failed.num_steps, failed.is_over) == (2, 1, 2, True)
    assert isinstance(failed.error, RunFailed)
    assert (closed.handle, closed.position, closed.state) == (2, 1, SessionState.FAILED)
    assert (lane.slab.num_allocated, list(client.link.sessions), len(client.link.members)) == (3, [0, 1, 3], 3)


def test_steps_that_arrive_while_their_session_fails_reach_nobody_else(lane, monkeypatch):
    fail_on_mark(lane, monkeypatch)
    client, other = Client(lane), Client(lane)
    client.send({client.open(): np.full((1, 3), MARK, np.float32)})
    lane.flush()
    run = lane.next_run(0.0)
    client.send({0: steps(1, 2)})
    finish(lane, run)
    x = steps(2, 3)
    other.send({other.open(): x})
    drive(lane)
    equal(other.rows(), run_alone(lane, x).y)
    [failed] = client.told(StepsFailed)
    assert (failed.num_steps, failed.is_over, client.answers()) == (3, True, [])


def test_a_row_cancelled_while_it_runs_does_not_touch_the_next_owner(lane_of):
    lane = lane_of("lstm", max_sessions=2, max_predict_sequences=1, max_batch_rows=1)
    gone = Client(lane)
    gone.send({gone.open(): steps(1, 20)})
    lane.flush()
    run = lane.next_run(0.0)
    lane.drop(gone.link, 0.0)
    before, after = Client(lane), Client(lane)
    x = steps(2, 20)
    before.send({before.open(): x})
    finish(lane, run)
    drive(lane)
    equal(before.rows(), run_alone(lane, x).y)
    after.send({after.open(): x})
    assert after.link.sessions[0].slot == 0  # which the cancelled row has written to
    drive(lane)
    equal(after.rows(), run_alone(lane, x).y)
    assert (gone.events, lane.slab.num_allocated) == ([], 2)


def test_a_failed_run_of_cancelled_rows_frees_them(lane, monkeypatch):
    fail_on_mark(lane, monkeypatch)
    client = Client(lane)
    client.send({client.open(): np.full((1, 3), MARK, np.float32), client.open(): steps(1, 1)})
    lane.flush()
    run = lane.next_run(0.0)
    lane.drop(client.link, 0.0)
    finish(lane, run)
    assert (client.events, lane.slab.num_allocated, lane.num_sessions) == ([], 0, 0)


# ---- limits ---------------------------------------------------------------------------------------------------------


def test_steps_past_their_deadline_are_rejected_with_those_behind_them(lane):
    client = Client(lane)
    late, other = client.open(), client.open()
    x = steps(1, 4)
    client.send({late: x[:2]}, deadline=1.0)
    client.send({late: x[2:3], other: x})
    drive(lane, now=1.0)
    equal(client.rows(other), run_alone(lane, x).y)
    expired, behind = client.told(StepsFailed)
    assert (expired.position, expired.num_steps, type(expired.error)) == (0, 2, DeadlineExpired)
    assert (behind.position, behind.num_steps, type(behind.error)) == (2, 1, StepAborted)
    assert expired.expected == behind.expected == 0
    client.send({late: x[3:]})
    client.send({late: x}, positions=[0], deadline=9.0)
    drive(lane, now=2.0)
    equal(client.rows(late), run_alone(lane, x).y)


def test_positions_of_one_message_do_not_number_the_steps_of_another(lane):
    client, other = Client(lane), Client(lane)
    x = steps(1, 2)
    client.send({client.open(): x}, positions=[3])
    drive(lane)
    client.send({0: x})
    other.send({other.open(): x}, positions=[0])
    drive(lane)
    assert [failed.position for failed in client.told(StepsFailed)] == [3, 5]
    equal(other.rows(), run_alone(lane, x).y)


def test_a_deadline_stays_with_its_entry_though_others_are_refused(lane):
    client = Client(lane)
    gap, late, bad = client.open(), client.open(), client.open()
    x = steps(1, 2)
    client.send({gap: x, bad: np.full((1, 3), np.nan, np.float32)}, positions=[5, 0])
    client.send({late: x}, deadline=1.0)
    drive(lane, now=1.0)
    errors = {failed.handle: type(failed.error) for failed in client.told(StepsFailed)}
    assert errors == {bad: BadValue, gap: PositionGap, late: DeadlineExpired}


@pytest.mark.parametrize("linger_s", [0.0, 5.0])
def test_a_client_that_has_sent_all_is_told_the_end_though_its_steps_expire(lane, linger_s):
    client = Client(lane)
    client.send({client.open(Terms(session_id="a", linger_s=linger_s)): steps(1, 2)}, deadline=1.0)
    lane.finish(client.link, 0.5)
    drive(lane, now=2.0)
    assert [type(event) for event in client.events] == [StepsFailed, Closed]
    assert client.events[1].state == (SessionState.OPEN if linger_s else SessionState.CLOSED)
    assert (client.link.members, lane.num_sessions) == (set(), bool(linger_s))


def test_a_full_queue_refuses_what_does_not_fit_and_nothing_else(lane_of):
    lane = lane_of("lstm", max_queued_steps=10)
    client, other = Client(lane), Client(lane)
    x = steps(1, 6)
    client.send({client.open(): x})
    other.send({other.open(): x})
    drive(lane)
    equal(client.rows(), run_alone(lane, x).y)
    [refused] = other.told(StepsFailed)
    assert (refused.num_steps, refused.expected, refused.error.retry_after_s) == (6, 0, 0.25)
    assert isinstance(refused.error, Overloaded)
    assert lane.tally.rejected == {"OVERLOADED": 1}
    other.send({0: x}, positions=[0])
    drive(lane)
    equal(other.rows(), run_alone(lane, x).y)


def test_sessions_are_limited_and_a_refused_one_uses_its_handle_up(lane_of):
    lane = lane_of("lstm", max_sessions=1)
    client = Client(lane)
    client.open()
    with pytest.raises(Exhausted, match=r"1 sessions are live, the limit \(max_sessions\) is 1"):
        client.open()
    lane.close(client.link, 0)
    assert client.open() == 2


def test_a_session_whose_steps_are_refused_is_not_idle(lane_of):
    lane = lane_of("lstm", session_idle_s=5.0)
    client = Client(lane)
    client.send({client.open(): np.full((1, 3), np.nan)}, now=3.0)
    lane.expire(7.9)
    assert lane.num_sessions == 1
    lane.expire(8.0)
    assert lane.num_sessions == 0


def test_an_idle_session_expires_but_not_one_whose_steps_are_under_way(lane_of):
    lane = lane_of("lstm", session_idle_s=5.0)
    client = Client(lane)
    idle, waiting, sending = client.open(), client.open(), client.open()
    x = steps(1, 2)
    client.send({waiting: x})
    lane.flush()
    run = lane.next_run(0.0)
    client.send({sending: x})
    lane.expire(5.0)
    [failed], [closed] = client.told(StepsFailed), client.told(Closed)
    assert (failed.handle, type(failed.error), failed.is_over) == (idle, SessionExpired, True)
    assert (closed.handle, closed.state) == (idle, SessionState.EXPIRED)
    finish(lane, run, 6.0)
    drive(lane, 6.0)
    lane.expire(10.9)
    assert lane.num_sessions == 2
    assert [client.rows(handle).shape for handle in (waiting, sending)] == [(2, 2), (2, 2)]
    lane.expire(11.0)
    assert (lane.slab.num_allocated, client.link.members) == (0, set())
