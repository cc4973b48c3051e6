"""The load generator's account of what is in flight, against the server's own admission, by hypothesis."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.client._inflight import InFlight
from service.errors import Overloaded
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.rpc.status import status_of
from service.sessions import Session, Terms, admit

LIMIT = 2**30


class Stream(RuleBasedStateMachine):
    """One stream of some sessions: messages reach the server late, and answers come in pieces."""

    @initialize(num_sessions=st.integers(1, 3), num_steps=st.integers(1, 4))
    def open(self, num_sessions: int, num_steps: int) -> None:
        self.num_steps = num_steps
        self.in_flight = InFlight(num_sessions, num_steps)
        self.sessions = [Session(handle, None, handle, Terms(), 0.0) for handle in range(num_sessions)]
        self.travelling: list[tuple[int, list[int]]] = []
        self.refused: set[int] = set()
        """Messages that had steps refused."""
        self.is_to_settle = False
        self.over: dict[int, bool] = {}
        self.num_sent = 0
        self.num_answered = 0

    @precondition(lambda self: not self.in_flight.must_wait)
    @rule()
    def send(self) -> None:
        positions = self.in_flight.send(float(self.num_sent))
        assert positions == ([session.expected for session in self.sessions] if self.is_to_settle else [])
        self.is_to_settle = False
        self.travelling.append((self.num_sent, positions))
        self.num_sent += 1

    @precondition(lambda self: self.travelling)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        """The server takes the oldest message, and has no room for some of its sessions."""
        number, positions = self.travelling.pop(0)
        full = data.draw(st.sets(st.sampled_from(range(len(self.sessions)))))
        faults = {entry: Overloaded("full", retry_after_s=0.5) for entry in full}
        admission = admit(self.sessions, [self.num_steps] * len(self.sessions), positions or None, LIMIT, faults)
        answer = pb.StreamAnswer()
        for entry, error in admission.refusals if admission else ():
            session = self.sessions[entry]
            self.refused.add(number)
            self.is_to_settle = True
            answer.errors.add(
                handle=entry,
                position=session.sent - self.num_steps,
                length=self.num_steps,
                kind=pb.STEP_ERROR_KIND_STEP_REJECTED,
                status=status_of(error),
                expected_position=session.expected,
            )
        self.take(answer)

    @precondition(lambda self: any(session.applied < session.expected for session in self.sessions))
    @rule(data=st.data())
    def run(self, data: st.DataObject) -> None:
        """The server answers some queued steps, of one session or more."""
        answer = pb.StreamAnswer()
        for session in self.sessions:
            length = data.draw(st.integers(0, session.expected - session.applied))
            if length:
                answer.handles.append(session.handle)
                answer.positions.append(session.applied)
                answer.lengths.append(length)
                session.applied += length
        self.num_answered += sum(answer.lengths)
        self.take(answer)

    def take(self, answer: pb.StreamAnswer) -> None:
        num_steps, outcomes = self.in_flight.take(answer)
        assert num_steps == sum(answer.lengths)
        for since, is_refused in outcomes:
            assert since not in self.over, "a message that is over twice"
            assert is_refused == (since in self.refused)
            self.over[since] = is_refused

    @invariant()
    def is_over_when_the_server_is_done(self) -> None:
        """What neither travels nor waits at the server is over, and the other way round."""
        if not hasattr(self, "travelling"):
            return
        is_idle = not self.travelling and all(session.applied == session.expected for session in self.sessions)
        assert self.in_flight.is_empty == is_idle == (len(self.over) == self.num_sent)
        if is_idle:
            refused = sum(self.in_flight.refused_steps.values())
            assert refused + self.num_answered == self.num_sent * self.num_steps * len(self.sessions)
            assert (Counter(self.over.values())[True] > 0) == (refused > 0)


TestStream = Stream.TestCase
TestStream.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
