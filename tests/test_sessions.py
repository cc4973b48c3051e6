"""service.sessions: which steps are admitted, replayed and refused; names, links, and ends."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.errors import AnswersNotKept, BadValue, Exhausted, PositionGap, SessionNotFound, StepAborted
from service.sessions import Admission, Kept, SessionState, SessionTable, Terms, admit

MAX_INFLIGHT = 6


def table_with(*terms):
    """A table with a session a slot, all of link 1, and the sessions."""
    table = SessionTable()
    return table, *(table.open(slot, 1, slot, each, 0.0) for slot, each in enumerate(terms))


def session_with(**terms):
    return table_with(Terms(**terms))[1]


def send(session, length, position=None, fault=None):
    """Send one entry. Returns (steps admitted, steps to replay, type of the refusal)."""
    before = session.expected
    faults = {} if fault is None else {0: fault}
    admission = admit([session], [length], None if position is None else [position], MAX_INFLIGHT, faults)
    if admission is None:
        assert session.expected == before + length
        return length, [], None
    fresh = length - admission.skips.get(0, 0)
    assert session.expected == before + fresh
    replayed = [step for _, start, stop in admission.replays for step in range(start, stop)]
    return fresh, replayed, type(admission.refusals[0][1]) if admission.refusals else None


def refusal(session, length, position=None):
    """Send one entry that is refused. Returns the error."""
    admission = admit([session], [length], None if position is None else [position], MAX_INFLIGHT, {})
    [(_, error)] = admission.refusals
    assert (admission.skips, admission.replays) == ({0: length}, [])
    return error


def apply(session, count):
    """Apply queued steps and keep their answers where asked for: position p is answered by p and by -p."""
    start = session.applied
    session.applied += count
    if session.kept is not None:
        answers = np.arange(start, start + count)
        session.keep(Kept(start, count, [answers, -answers[:, None]]))


def test_steps_count_on_by_default_and_by_position():
    session = session_with()
    assert [send(session, 2), send(session, 1, 2), send(session, 3)] == [(2, [], None), (1, [], None), (3, [], None)]


def test_a_gap_is_refused_and_names_the_expected_position():
    session = session_with()
    send(session, 2)
    error = refusal(session, 1, 5)
    assert (type(error), error.metadata) == (PositionGap, {"expected_position": "2"})
    assert "position 5 skips ahead: expected 2; send from position 2" in str(error)
    assert send(session, 1) == (0, [], PositionGap)  # the default counts on from what was sent
    assert send(session, 1, 2) == (1, [], None)
    assert send(session, 1) == (1, [], None)


def test_steps_behind_a_rejected_one_are_aborted_until_it_is_sent_again():
    _, session, other = table_with(Terms(), Terms())
    fault = BadValue("NaN")
    admission = admit([session, other], [2, 1], None, MAX_INFLIGHT, {0: fault})
    assert (admission.skips, admission.refusals) == ({0: 2}, [(0, fault)])
    assert (session.expected, session.sent, other.expected) == (0, 2, 1)
    assert send(session, 1) == (0, [], StepAborted)
    assert send(session, 1, 7) == (0, [], StepAborted)
    assert send(other, 1) == (1, [], None)
    assert send(session, 1, 0) == (1, [], None)
    assert send(session, 1, 7) == (0, [], PositionGap)


def test_steps_taken_back_are_expected_again():
    session = session_with()
    send(session, 3)
    apply(session, 1)
    session.reject(2)
    assert send(session, 1) == (0, [], StepAborted)
    assert send(session, 2, 1) == (2, [], None)


def test_a_message_that_cannot_be_read_rejects_what_it_was_for():
    session = session_with()
    send(session, 3)
    assert session.reject_sent(1) == 3
    assert session.reject_sent(2) == 4
    assert send(session, 1) == (0, [], StepAborted)
    assert send(session, 1, 3) == (1, [], None)


def test_an_overlap_is_replayed_as_kept_and_applied_only_where_it_is_new():
    session = session_with(replay_window=10)
    send(session, 5)
    apply(session, 2)
    apply(session, 1)
    assert send(session, 3, 0) == (0, [0, 1, 2], None)  # all applied
    assert send(session, 4, 1) == (0, [1, 2], None)  # two of them are queued: their answers come by themselves
    assert send(session, 2, 3) == (0, [], None)  # all queued
    assert send(session, 5, 1) == (1, [1, 2], None)
    assert [y.tolist() for y in session.kept_rows(1, 3)] == [[1, 2], [[-1], [-2]]]
    assert send(session, 1, 0) == (0, [0], None)
    assert send(session, 1) == (0, [1], None)  # the default counts on from the step that was sent again


def test_answers_that_are_not_kept_are_not_replayed():
    session = session_with()
    send(session, 3)
    apply(session, 2)
    error = refusal(session, 4, 1)
    assert (type(error), error.metadata["expected_position"]) == (AnswersNotKept, "3")
    assert send(session, 2, 2) == (1, [], None)  # in flight, then new


def test_the_window_is_kept_to_the_step_and_what_is_acknowledged_is_forgotten():
    session = session_with(replay_window=4)
    send(session, 6)
    apply(session, 3)
    apply(session, 3)
    assert send(session, 1, 1) == (0, [], AnswersNotKept)
    assert send(session, 4, 2) == (0, [2, 3, 4, 5], None)
    session.acknowledge(4)
    assert send(session, 1, 3) == (0, [], AnswersNotKept)
    assert send(session, 2, 4) == (0, [4, 5], None)
    session.acknowledge(99)  # as far as answers have been made
    assert send(session, 1, 5) == (0, [], AnswersNotKept)
    assert not session.kept
    send(session, 1, 6)
    apply(session, 1)
    assert send(session, 1, 6) == (0, [6], None)


def test_more_unanswered_steps_than_the_limit_are_refused_whole():
    session = session_with()
    assert send(session, MAX_INFLIGHT - 1) == (MAX_INFLIGHT - 1, [], None)
    error = refusal(session, 2)
    assert (type(error), error.retry_after_s) == (Exhausted, 0.1)
    assert "5 steps of this session are unanswered and 2 more came, the limit (max_inflight_steps) is 6" in str(error)
    assert send(session, 1) == (0, [], StepAborted)
    apply(session, 1)
    assert send(session, 2, 5) == (2, [], None)


def test_an_overlap_counts_its_new_steps_alone_against_the_limit():
    session = session_with(replay_window=9)
    send(session, 5)
    apply(session, 3)
    assert send(session, 9, 0) == (4, [0, 1, 2], None)
    assert send(session, 10, 0) == (0, [], Exhausted)


def test_a_name_is_found_until_its_session_drains_or_ends():
    terms = Terms(session_id="a")
    table, first, second = table_with(terms, Terms(session_id="b"))
    assert (table.find(terms), table.find(Terms(session_id="b")), table.find(Terms())) == (first, second, None)
    table.drain(first)
    assert table.find(terms) is None
    successor = table.open(2, 1, 2, terms, 0.0)
    table.end(first, SessionState.CLOSED)  # must not free the name of its successor
    assert table.find(terms) is successor
    table.end(second, SessionState.FAILED)
    assert [session.state.name for session in (first, successor, second)] == ["CLOSED", "OPEN", "FAILED"]
    with pytest.raises(SessionNotFound, match=r"session 'b' is not live.*open it without resume_only") as caught:
        table.find(Terms(session_id="b", resume_only=True))
    assert caught.value.field == "session_id"
    assert (len(table), table.by_slot) == (1, {2: successor})


def test_only_a_session_that_lingers_is_detached_and_only_once_is_it_over():
    table, lingering, *others = table_with(Terms(session_id="a", linger_s=5.0), Terms(session_id="b"), Terms())
    assert [table.detach(session, 10.0) for session in (lingering, *others)] == [True, False, False]
    assert (lingering.link, others[0].link) == (None, 1)
    assert table.expired(14.9, 0.0) == []
    assert table.expired(15.0, 0.0) == [(lingering, 15.0, 5.0)]
    table.resume(lingering, 2, 7, Terms(session_id="a", linger_s=1.0), 14.0)
    assert (lingering.link, lingering.handle) == (2, 7)
    assert (table.expired(99.0, 0.0), len(table.expired(99.0, 5.0))) == ([], 3)
    table.drain(lingering)
    assert table.detach(lingering, 20.0) is False


def test_a_resumed_session_counts_on_from_the_expected_position_whatever_was_sent():
    table, session = table_with(Terms(session_id="a", linger_s=5.0))
    send(session, 2)
    assert send(session, 2, 7) == (0, [], PositionGap)
    session.reject_sent(1)
    table.resume(session, 2, 0, Terms(session_id="a"), 1.0)
    assert send(session, 1, 9) == (0, [], PositionGap)  # nothing was rejected on this link
    table.resume(session, 3, 0, Terms(session_id="a"), 1.0)
    assert send(session, 2) == (2, [], None)


def test_a_window_that_was_dropped_for_a_while_keeps_nothing_from_before():
    table, session = table_with(Terms(session_id="a", replay_window=4))
    send(session, 3)
    apply(session, 3)
    table.resume(session, 1, 0, Terms(session_id="a"), 0.0)
    assert (table.num_replaying, session.kept) == (0, None)
    assert send(session, 2, 3) == (2, [], None)
    apply(session, 2)
    table.resume(session, 1, 0, Terms(session_id="a", replay_window=4), 0.0)
    send(session, 2, 5)
    apply(session, 2)
    assert table.num_replaying == 1
    assert send(session, 3, 4) == (0, [], AnswersNotKept)
    assert send(session, 2, 5) == (0, [5, 6], None)


def test_a_session_is_idle_from_its_last_use_on_and_not_while_it_lingers():
    terms = Terms(session_id="a", linger_s=100.0)
    table, idle, used, draining, lingering = table_with(Terms(), Terms(), Terms(), terms)
    table.drain(draining)
    table.detach(lingering, 0.0)
    used.used_at = 2.0
    assert table.expired(4.9, 5.0) == []
    assert table.expired(6.0, 5.0) == [(idle, 6.0, 5.0)]
    assert table.expired(7.0, 5.0) == [(idle, 7.0, 5.0), (used, 5.0, 5.0)]
    assert table.expired(99.0, 0.0) == []


class SessionMachine(RuleBasedStateMachine):
    """Every admitted step has a number of its own; an oracle of plain lists knows which must be applied and kept."""

    @initialize()
    def start(self):
        self.table = SessionTable()
        self.live = {}  # the oracle's sessions by slot
        self.now = 0.0

    def session(self, data):
        return data.draw(st.sampled_from(sorted(self.live)))

    @precondition(lambda self: len(self.live) < 4)
    @rule(name=st.sampled_from(["", "a", "b"]), window=st.sampled_from([0, 1, 3, 20]), linger=st.sampled_from([0.0, 2]))
    def open(self, name, window, linger):
        terms = Terms(session_id=name, replay_window=window, linger_s=linger)
        named = [slot for slot, s in self.live.items() if name and s.terms.session_id == name and not s.is_draining]
        real = self.table.find(terms)
        assert real is (self.live[named[0]].real if named else None)
        if real is None:
            slot = min(set(range(4)) - self.live.keys())
            real = self.table.open(slot, 1, 0, terms, self.now)
            session = SimpleNamespace(real=real, applied=0, queued=0, kept_from=0, rejected_at=None, is_draining=False)
            self.live[slot] = session
        else:
            session = self.live[named[0]]
            session.kept_from = max(session.kept_from, session.applied - min(session.terms.replay_window, window))
            self.table.resume(real, 2, 0, terms, self.now)
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
        near = st.integers(-4, 2)
        positions = None
        if data.draw(st.booleans()):
            expected = [self.live[slot].applied + self.live[slot].queued for slot in slots]
            positions = [data.draw(st.none() | near.map(lambda d, at=at: max(0, at + d))) for at in expected]
        fault = BadValue("refused")
        faults = dict.fromkeys(data.draw(st.sets(st.integers(0, len(slots) - 1))), fault)
        sessions = [self.live[slot].real for slot in slots]
        admission = admit(sessions, lengths, positions, MAX_INFLIGHT, faults)
        admission = admission or Admission({}, [], [])
        refusals, replays = [], []
        for entry, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            session = self.live[slot]
            expected = session.applied + session.queued
            first = session.sent if positions is None or positions[entry] is None else positions[entry]
            steps = range(first, first + length)
            session.sent = first + length
            applied = [step for step in steps if step < session.applied]
            fresh = [step for step in steps if step >= expected]
            error = None
            if entry in faults:
                error, session.rejected_at = BadValue, expected
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
            num_fresh = 0 if error else len(fresh)
            assert length - admission.skips.get(entry, 0) == num_fresh
            session.queued += num_fresh
        assert [(entry, type(error)) for entry, error in admission.refusals] == refusals
        assert admission.replays == replays
        for entry, start, stop in replays:
            answers = np.arange(start, stop)
            one, other = sessions[entry].kept_rows(start, stop)
            np.testing.assert_array_equal(one, answers)
            np.testing.assert_array_equal(other, -answers[:, None])

    @precondition(lambda self: any(s.queued for s in self.live.values()))
    @rule(data=st.data())
    def apply(self, data):
        slot = data.draw(st.sampled_from([slot for slot, s in sorted(self.live.items()) if s.queued]))
        session = self.live[slot]
        count = data.draw(st.integers(1, session.queued))
        apply(session.real, count)
        session.real.used_at = session.used_at = self.now
        session.applied += count
        session.queued -= count
        session.kept_from = max(session.kept_from, session.applied - session.terms.replay_window)

    @precondition(lambda self: any(s.queued for s in self.live.values()))
    @rule(data=st.data())
    def take_back(self, data):
        slot = data.draw(st.sampled_from([slot for slot, s in sorted(self.live.items()) if s.queued]))
        session = self.live[slot]
        count = data.draw(st.integers(1, session.queued))
        session.real.reject(count)
        session.queued -= count
        session.rejected_at = session.applied + session.queued

    @precondition(lambda self: self.live)
    @rule(data=st.data(), ahead=st.integers(-3, 2))
    def acknowledge(self, data, ahead):
        slot = self.session(data)
        session = self.live[slot]
        position = max(0, session.applied + ahead)
        session.real.acknowledge(position)
        session.kept_from = max(session.kept_from, min(position, session.applied))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def detach_or_end(self, data):
        slot = self.session(data)
        session = self.live[slot]
        is_detached = self.table.detach(session.real, self.now)
        assert is_detached == bool(session.terms.linger_s and not session.is_draining)
        if is_detached:
            session.over_at = self.now + session.terms.linger_s
        else:
            self.table.end(session.real, SessionState.CLOSED)
            del self.live[slot]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def drain(self, data):
        slot = self.session(data)
        if self.live[slot].over_at is None:
            self.table.drain(self.live[slot].real)
            self.live[slot].is_draining = True

    @rule(elapsed=st.sampled_from([0.0, 1.0, 1.5]), idle_limit=st.sampled_from([0.0, 2.0]))
    def expire(self, elapsed, idle_limit):
        self.now += elapsed
        over = {}
        for slot, s in self.live.items():
            if s.over_at is not None:
                if s.over_at <= self.now:
                    over[slot] = (self.now - s.used_at, s.terms.linger_s)
            elif idle_limit and not s.is_draining and s.used_at + idle_limit <= self.now:
                over[slot] = (self.now - s.used_at, idle_limit)
        expired = self.table.expired(self.now, idle_limit)
        assert {session.slot: (idle_s, limit_s) for session, idle_s, limit_s in expired} == over
        for slot in over:
            self.table.end(self.live.pop(slot).real, SessionState.EXPIRED)

    @invariant()
    def the_table_agrees(self):
        assert self.table.by_slot == {slot: session.real for slot, session in self.live.items()}
        assert self.table.num_replaying == sum(s.terms.replay_window > 0 for s in self.live.values())
        for session in self.live.values():
            real = session.real
            assert (real.applied, real.expected) == (session.applied, session.applied + session.queued)
            assert (real.kept is not None) == (session.terms.replay_window > 0)
            # What is kept ends at the last step; its first answer may reach out of the window.
            kept = real.kept or ()
            steps = [step for answer in kept for step in range(answer.position, answer.position + answer.num_steps)]
            assert steps == list(range(session.applied - len(steps), session.applied))
            assert not kept or len(steps) - kept[0].num_steps < session.terms.replay_window


TestSessions = SessionMachine.TestCase
TestSessions.settings = settings(max_examples=250, stateful_step_count=30, deadline=None)
