"""service.sessions: which steps are admitted, replayed and refused; names, links, and ends."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.errors import AnswersNotKept, Exhausted, PositionGap, SessionNotFound, StepAborted
from service.sessions import NO_LINK, Kept, SessionState, SessionTable, Terms

MAX_INFLIGHT = 6


def ints(values):
    return np.array(values, dtype=np.int64)


def table_with(*terms):
    """A table with a session a slot, all of link 1."""
    table = SessionTable(8, max_inflight_steps=MAX_INFLIGHT)
    for slot, each in enumerate(terms or [Terms()]):
        table.open(slot, 1, slot, each, 0.0)
    return table


def admit(table, length, position=None, slot=0, now=0.0):
    """Admit one entry. Returns (steps admitted, steps to replay, type of the refusal)."""
    before = table.expected.copy()
    admission = table.admit(ints([slot]), ints([length]), None if position is None else ints([position]), now)
    fresh = length - int(admission.skips[0]) if admission.is_admitted[0] else 0
    assert table.expected[slot] == before[slot] + fresh
    replayed = [step for _, start, stop in admission.replays for step in range(start, stop)]
    refusal = type(admission.refusals[0][1]) if admission.refusals else None
    return fresh, replayed, refusal


def apply(table, count, slot=0, now=0.0):
    """Apply queued steps and keep their answers where asked for: position p is answered by p and by -p."""
    start = int(table.applied[slot])
    table.advance(ints([slot]), ints([count]), now)
    if slot in table.details and table.details[slot].terms.replay_window:
        answers = np.arange(start, start + count)
        table.keep(slot, Kept(start, count, [answers, -answers[:, None]]))


def test_steps_count_on_by_default_and_by_position():
    table = table_with()
    assert [admit(table, 2), admit(table, 1, 2), admit(table, 3)] == [(2, [], None), (1, [], None), (3, [], None)]
    assert (table.expected[0], table.applied[0]) == (6, 0)


def test_a_gap_is_refused_and_names_the_expected_position():
    table = table_with()
    admit(table, 2)
    admission = table.admit(ints([0]), ints([1]), ints([5]), 0.0)
    [(entry, error)] = admission.refusals
    assert (entry, type(error), error.metadata) == (0, PositionGap, {"expected_position": "2"})
    assert "position 5 skips ahead: expected 2; send from position 2" in str(error)
    assert admit(table, 1) == (0, [], PositionGap)  # the default counts on from what was sent
    assert admit(table, 1, 2) == (1, [], None)
    assert admit(table, 1) == (1, [], None)


def test_steps_behind_a_rejected_one_are_aborted_until_it_is_sent_again():
    table = table_with(Terms(), Terms())
    refused = np.array([True, False])
    admission = table.admit(ints([0, 1]), ints([2, 1]), None, 0.0, refused)
    assert (admission.is_admitted.tolist(), admission.refusals) == ([False, True], [])
    assert (table.expected[0], table.sent[0]) == (0, 2)
    assert admit(table, 1) == (0, [], StepAborted)
    assert admit(table, 1, 7) == (0, [], StepAborted)
    assert admit(table, 1, slot=1) == (1, [], None)
    assert admit(table, 1, 0) == (1, [], None)
    assert admit(table, 1, 7) == (0, [], PositionGap)


def test_steps_taken_back_are_expected_again():
    table = table_with()
    admit(table, 3)
    apply(table, 1)
    table.reject(0, 2)
    assert table.expected[0] == 1
    assert admit(table, 1) == (0, [], StepAborted)
    assert admit(table, 2, 1) == (2, [], None)


def test_a_message_that_cannot_be_read_rejects_one_step():
    table = table_with()
    admit(table, 3)
    assert table.reject_sent(0) == (3, 3)
    assert table.reject_sent(0) == (4, 3)
    assert admit(table, 1) == (0, [], StepAborted)
    assert admit(table, 1, 3) == (1, [], None)


def test_an_overlap_is_replayed_as_kept_and_applied_only_where_it_is_new():
    table = table_with(Terms(replay_window=10))
    admit(table, 5)
    apply(table, 2)
    apply(table, 1)
    assert admit(table, 3, 0) == (0, [0, 1, 2], None)  # all applied
    assert admit(table, 4, 1) == (0, [1, 2], None)  # two of them are queued: their answers come by themselves
    assert admit(table, 2, 3) == (0, [], None)  # all queued
    assert admit(table, 5, 1) == (1, [1, 2], None)
    assert [y.tolist() for y in table.kept_rows(0, 1, 3)] == [[1, 2], [[-1], [-2]]]
    assert table.expected[0] == 6
    assert admit(table, 1, 0) == (0, [0], None)
    assert admit(table, 1) == (0, [1], None)  # the default counts on from the step that was sent again


def test_answers_that_are_not_kept_are_not_replayed():
    table = table_with()
    admit(table, 3)
    apply(table, 2)
    admission = table.admit(ints([0]), ints([4]), ints([1]), 0.0)
    [(_, error)] = admission.refusals
    assert isinstance(error, AnswersNotKept)
    assert error.metadata["expected_position"] == "3"
    assert (table.expected[0], admission.replays) == (3, [])
    assert admit(table, 2, 2) == (1, [], None)  # in flight, then new


def test_the_window_is_kept_to_the_step_and_what_is_acknowledged_is_forgotten():
    table = table_with(Terms(replay_window=4))
    admit(table, 6)
    apply(table, 3)
    apply(table, 3)
    assert admit(table, 1, 1) == (0, [], AnswersNotKept)
    assert admit(table, 4, 2) == (0, [2, 3, 4, 5], None)
    table.acknowledge(0, 4)
    assert admit(table, 1, 3) == (0, [], AnswersNotKept)
    assert admit(table, 2, 4) == (0, [4, 5], None)
    table.acknowledge(0, 99)  # as far as answers have been made
    assert admit(table, 1, 5) == (0, [], AnswersNotKept)
    assert not table.details[0].kept
    admit(table, 1, 6)
    apply(table, 1)
    assert admit(table, 1, 6) == (0, [6], None)


def test_more_unanswered_steps_than_the_limit_are_refused_whole():
    table = table_with()
    assert admit(table, MAX_INFLIGHT - 1) == (MAX_INFLIGHT - 1, [], None)
    admission = table.admit(ints([0]), ints([2]), None, 0.0)
    [(_, error)] = admission.refusals
    assert (type(error), error.retry_after_s) == (Exhausted, 0.1)
    assert "5 steps of this session are unanswered and 2 more came, the limit (max_inflight_steps) is 6" in str(error)
    assert admit(table, 1) == (0, [], StepAborted)
    apply(table, 1)
    assert admit(table, 2, 5) == (2, [], None)


def test_an_overlap_counts_its_new_steps_alone_against_the_limit():
    table = table_with(Terms(replay_window=9))
    admit(table, 5)
    apply(table, 3)
    assert admit(table, 9, 0) == (4, [0, 1, 2], None)
    assert admit(table, 10, 0) == (0, [], Exhausted)


def test_a_name_is_found_until_its_session_drains_or_ends():
    terms = Terms(session_id="a")
    table = table_with(terms, Terms(session_id="b"))
    assert (table.find(terms), table.find(Terms(session_id="b")), table.find(Terms())) == (0, 1, None)
    table.drain(0)
    assert table.find(terms) is None
    table.open(2, 1, 2, terms, 0.0)
    table.end(0, SessionState.CLOSED)  # must not free the name of its successor
    assert table.find(terms) == 2
    table.end(1, SessionState.FAILED)
    with pytest.raises(SessionNotFound, match=r"session 'b' is not live.*open it without resume_only") as caught:
        table.find(Terms(session_id="b", resume_only=True))
    assert caught.value.field == "session_id"
    assert (table.num_live, table.details.keys()) == (1, {2})


def test_only_a_session_that_lingers_is_detached_and_only_once_is_it_over():
    table = table_with(Terms(session_id="a", linger_s=5.0), Terms(session_id="b"), Terms())
    assert [table.detach(slot, 10.0) for slot in range(3)] == [True, False, False]
    assert table.link[0] == NO_LINK
    assert table.expired(14.9, 0.0) == []
    assert table.expired(15.0, 0.0) == [(0, 15.0, 5.0)]
    table.resume(0, 2, 7, Terms(session_id="a", linger_s=1.0), 14.0)
    assert (table.link[0], table.handle[0]) == (2, 7)
    assert table.expired(99.0, 0.0) == []
    table.drain(0)
    assert table.detach(0, 20.0) is False


def test_a_resumed_session_counts_on_from_the_expected_position_whatever_was_sent():
    table = table_with(Terms(session_id="a", linger_s=5.0))
    admit(table, 2)
    assert admit(table, 2, 7) == (0, [], PositionGap)
    table.reject_sent(0)
    table.resume(0, 2, 0, Terms(session_id="a"), 1.0)
    assert admit(table, 1, 9) == (0, [], PositionGap)  # nothing was rejected on this link
    table.resume(0, 3, 0, Terms(session_id="a"), 1.0)
    assert admit(table, 2) == (2, [], None)


def test_a_window_that_was_dropped_for_a_while_keeps_nothing_from_before():
    table = table_with(Terms(session_id="a", replay_window=4))
    admit(table, 3)
    apply(table, 3)
    table.resume(0, 1, 0, Terms(session_id="a"), 0.0)
    assert (table.num_replaying, len(table.details[0].kept)) == (0, 0)
    assert admit(table, 2, 3) == (2, [], None)
    apply(table, 2)
    table.resume(0, 1, 0, Terms(session_id="a", replay_window=4), 0.0)
    admit(table, 2, 5)
    apply(table, 2)
    assert table.num_replaying == 1
    assert admit(table, 3, 4) == (0, [], AnswersNotKept)
    assert admit(table, 2, 5) == (0, [5, 6], None)


def test_a_session_is_idle_from_its_last_step_or_answer_on():
    table = table_with(Terms(), Terms(), Terms())
    table.drain(2)
    admit(table, 1, slot=1, now=1.0)
    assert table.expired(4.9, 5.0) == []
    assert table.expired(6.0, 5.0) == [(0, 6.0, 5.0), (1, 5.0, 5.0)]
    apply(table, 1, slot=1, now=2.0)
    assert table.expired(6.0, 5.0) == [(0, 6.0, 5.0)]
    assert table.expired(99.0, 0.0) == []


class SessionMachine(RuleBasedStateMachine):
    """Every admitted step has a number of its own; an oracle of plain lists knows which must be applied and kept."""

    @initialize()
    def start(self):
        self.table = SessionTable(4, max_inflight_steps=MAX_INFLIGHT)
        self.live = {}
        self.now = 0.0

    def session(self, data):
        return data.draw(st.sampled_from(sorted(self.live)))

    @precondition(lambda self: len(self.live) < 4)
    @rule(name=st.sampled_from(["", "a", "b"]), window=st.sampled_from([0, 1, 3, 20]), linger=st.sampled_from([0.0, 2]))
    def open(self, name, window, linger):
        terms = Terms(session_id=name, replay_window=window, linger_s=linger)
        named = [slot for slot, s in self.live.items() if name and s.terms.session_id == name and not s.is_draining]
        found = self.table.find(terms)
        assert found == (named[0] if named else None)
        if found is None:
            slot = min(set(range(4)) - self.live.keys())
            self.table.open(slot, 1, 0, terms, self.now)
            session = SimpleNamespace(applied=0, queued=0, kept_from=0, rejected_at=None, is_draining=False)
            self.live[slot] = session
        else:
            session = self.live[found]
            session.kept_from = max(session.kept_from, session.applied - min(session.terms.replay_window, window))
            self.table.resume(found, 2, 0, terms, self.now)
            session.rejected_at = None
        session.terms = terms
        session.sent = session.applied + session.queued
        session.over_at = None
        session.used_at = self.now

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def admit(self, data):
        slots = data.draw(st.lists(st.sampled_from(sorted(self.live)), unique=True, min_size=1))
        lengths = [data.draw(st.integers(1, 4)) for _ in slots]
        positions = None
        if data.draw(st.booleans()):
            near = st.integers(-4, 2)
            positions = [max(0, self.live[slot].applied + self.live[slot].queued + data.draw(near)) for slot in slots]
        refused = data.draw(st.none() | st.lists(st.booleans(), min_size=len(slots), max_size=len(slots)))
        admission = self.table.admit(
            ints(slots), ints(lengths), positions and ints(positions), self.now, refused and np.array(refused)
        )
        refusals, replays = [], []
        for entry, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            session = self.live[slot]
            expected = session.applied + session.queued
            first = positions[entry] if positions else session.sent
            steps = range(first, first + length)
            session.sent, session.used_at = first + length, self.now
            applied = [step for step in steps if step < session.applied]
            fresh = [step for step in steps if step >= expected]
            error = None
            if refused and refused[entry]:
                fresh, applied, session.rejected_at = [], [], expected
            elif first > expected:
                error = StepAborted if session.rejected_at == expected else PositionGap
            elif applied and (not session.terms.replay_window or first < session.kept_from):
                error = AnswersNotKept
            elif fresh and session.queued + len(fresh) > MAX_INFLIGHT:
                error, session.rejected_at = Exhausted, expected
            if error:
                refusals.append((entry, error))
            elif applied:
                replays.append((entry, applied[0], applied[-1] + 1))
            assert bool(admission.is_admitted[entry]) == bool(fresh and not error)
            if fresh and not error:
                assert admission.skips[entry] == length - len(fresh)
                session.queued += len(fresh)
        assert [(entry, type(error)) for entry, error in admission.refusals] == refusals
        assert admission.replays == replays
        for entry, start, stop in replays:
            answers = np.arange(start, stop)
            one, other = self.table.kept_rows(slots[entry], start, stop)
            np.testing.assert_array_equal(one, answers)
            np.testing.assert_array_equal(other, -answers[:, None])

    @precondition(lambda self: any(s.queued for s in self.live.values()))
    @rule(data=st.data())
    def apply(self, data):
        slot = data.draw(st.sampled_from([slot for slot, s in sorted(self.live.items()) if s.queued]))
        session = self.live[slot]
        count = data.draw(st.integers(1, session.queued))
        apply(self.table, count, slot, self.now)
        session.used_at = self.now
        session.applied += count
        session.queued -= count
        session.kept_from = max(session.kept_from, session.applied - session.terms.replay_window)

    @precondition(lambda self: any(s.queued for s in self.live.values()))
    @rule(data=st.data())
    def take_back(self, data):
        slot = data.draw(st.sampled_from([slot for slot, s in sorted(self.live.items()) if s.queued]))
        session = self.live[slot]
        count = data.draw(st.integers(1, session.queued))
        self.table.reject(slot, count)
        session.queued -= count
        session.rejected_at = session.applied + session.queued

    @precondition(lambda self: self.live)
    @rule(data=st.data(), ahead=st.integers(-3, 2))
    def acknowledge(self, data, ahead):
        slot = self.session(data)
        session = self.live[slot]
        position = max(0, session.applied + ahead)
        self.table.acknowledge(slot, position)
        session.kept_from = max(session.kept_from, min(position, session.applied))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def detach_or_end(self, data):
        slot = self.session(data)
        session = self.live[slot]
        is_detached = self.table.detach(slot, self.now)
        assert is_detached == bool(
            session.terms.linger_s
            and not session.is_draining
            and (session.terms.session_id or session.terms.replay_window)
        )
        if is_detached:
            session.over_at = self.now + session.terms.linger_s
        else:
            self.table.end(slot, SessionState.CLOSED)
            del self.live[slot]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def drain(self, data):
        slot = self.session(data)
        if self.live[slot].over_at is None:
            self.table.drain(slot)
            self.live[slot].is_draining = True

    @rule(elapsed=st.sampled_from([0.0, 1.0, 1.5]), idle_limit=st.sampled_from([0.0, 2.0]))
    def expire(self, elapsed, idle_limit):
        self.now += elapsed
        over = {}
        for slot, s in self.live.items():
            if s.over_at is not None and s.over_at <= self.now:
                over[slot] = (self.now - s.used_at, s.terms.linger_s)
            elif idle_limit and not s.is_draining and s.used_at + idle_limit <= self.now:
                over[slot] = (self.now - s.used_at, idle_limit)
        assert {slot: (idle_s, limit_s) for slot, idle_s, limit_s in self.table.expired(self.now, idle_limit)} == over
        for slot in over:
            self.table.end(slot, SessionState.EXPIRED)
            del self.live[slot]

    @invariant()
    def the_table_agrees(self):
        table = self.table
        assert table.num_live == len(self.live)
        assert table.num_replaying == sum(s.terms.replay_window > 0 for s in self.live.values())
        for slot, session in self.live.items():
            assert (table.applied[slot], table.expected[slot]) == (session.applied, session.applied + session.queued)
            if (
                slot in table.details
            ):  # what is kept ends at the last step; its first answer may reach out of the window
                kept = table.details[slot].kept
                steps = [step for answer in kept for step in range(answer.position, answer.position + answer.num_steps)]
                assert steps == list(range(session.applied - len(steps), session.applied))
                assert not kept or len(steps) - kept[0].num_steps < session.terms.replay_window


TestSessions = SessionMachine.TestCase
TestSessions.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
