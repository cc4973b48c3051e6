"""SequenceMachine behind a network that delays and breaks: every applied step's output comes once and in order."""

import math

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.client import StepRejected
from service.client._sequence import SequenceMachine
from service.client._terms import SequenceTerms
from service.client.errors import Unavailable
from tests.client.toy import SUM, ToySession, merge

LOST = Unavailable("the connection was lost")


class Network(RuleBasedStateMachine):
    """A caller, a machine, a network that delays and breaks, and a server."""

    @initialize(emit=st.sampled_from(["all", "last"]))
    def begin(self, emit):
        self.server = ToySession(emit=emit)
        self.machine = SequenceMachine(
            SUM, SequenceTerms(emit=emit, session_id="s", linger_s=60, replay_window=6, version=1)
        )
        self.sent = []  # chunks without outcome, oldest first
        self.applied = []  # steps whose outputs the caller has
        self.last = 0.0
        self.number = 0
        self.connect()

    def connect(self):
        [opening] = self.machine.open_requests()
        self.to_server = []
        self.to_client = []
        self.to_server += self.machine.receive(self.server.connect(opening.open))

    @precondition(lambda self: self.machine.room > 0)
    @rule(length=st.integers(1, 4), is_bad=st.sampled_from([False, False, False, True]))
    def send(self, length, is_bad):
        length = min(length, self.machine.room)
        values = np.arange(self.number + 1, self.number + length + 1, dtype=np.float32)
        self.number += length
        if is_bad:
            values[length // 2] = math.nan
        send = self.machine.begin()
        self.to_server += self.machine.add(send, {"x": values[:, None]}, is_last=True)
        self.sent.append(values.tolist())

    @rule(piece=st.integers(1, 3))
    def server_reads(self, piece):
        if self.to_server:
            self.to_client.append(self.server.take(self.to_server.pop(0).frame, piece))

    @rule(count=st.integers(1, 3), is_merged=st.booleans())
    def client_reads(self, count, is_merged):
        batch, self.to_client = self.to_client[:count], self.to_client[count:]
        answers = [answer for group in batch for answer in group]
        for part in [answers] if is_merged else [[answer] for answer in answers]:
            for response in merge(part):
                self.to_server += self.machine.receive(response)

    @rule(is_delivered=st.booleans())
    def connection_breaks(self, is_delivered):
        if is_delivered:  # what the client had written may arrive without an answer
            for request in self.to_server:
                self.server.take(request.frame, 1)
        assert self.machine.end(LOST)
        self.connect()

    @precondition(lambda self: self.machine.is_ready)
    @rule()
    def caller_takes(self):
        xs = self.sent.pop(0)
        rejection = None
        try:
            outputs = self.machine.take()
        except StepRejected as error:
            rejection = error
        if rejection is not None:
            assert rejection.code in ("INVALID_ARGUMENT", "ABORTED")
            assert rejection.expected_position == len(self.applied)
            return
        rows = outputs["y"].reshape(-1).tolist()
        if self.server.emit == "last":
            self.last += sum(xs)
            assert rows == [self.last]
            self.applied += xs
            return
        assert len(rows) == len(xs)
        for x, row in zip(xs, rows, strict=True):
            self.last += x
            assert row == self.last
            self.applied.append(x)

    @invariant()
    def what_the_caller_has_was_applied(self):
        if hasattr(self, "server"):
            assert self.server.applied[: len(self.applied)] == self.applied
            assert self.machine.ledger.num_unanswered <= self.machine.window

    def teardown(self):
        if not hasattr(self, "server"):
            return
        while self.machine.ledger.num_pending:
            while self.to_server or self.to_client:
                self.server_reads(1)
                self.client_reads(1, is_merged=False)
            assert self.machine.is_ready
            self.caller_takes()
        assert self.sent == []
        assert self.applied == self.server.applied
        assert self.machine.ledger.position == len(self.applied)
        assert self.machine.ledger.num_unanswered == 0


TestNetwork = Network.TestCase
TestNetwork.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
