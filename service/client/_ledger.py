"""What a sequence has sent and what became of it: steps go in, their outputs and rejections come out. Pure.

A *send* is what the caller sent in one go; it has one outcome. It travels as one or more *spans*, one a frame.

Laws:

    outcomes come in the order of sends, each once
    an output that comes again after a resend is dropped; the first one counts
    a rejected span makes all that was sent behind it stale: the server aborts that
    once the caller has taken the rejection, its next send goes to the position that the server expects
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from service.client._answers import Entry
from service.client.errors import StepRejected, error_for
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.tensors import Array

Outputs = dict[str, Array]
"""Outputs by name: [steps, ...] per step, one row [...] of a per-sequence output or under "last"."""


@dataclass(slots=True, eq=False)
class Send:
    """What the caller sent in one go."""

    per_step: list[Outputs] = field(default_factory=list)
    """Rows of its steps so far, in order."""
    rest: Outputs = field(default_factory=dict)
    """Outputs that have one row for all of it: the latest."""
    num_open: int = 0
    """Spans that are not settled."""
    is_complete: bool = False
    """Whether all of its spans are known."""
    is_rejected: bool = False
    is_discarded: bool = False

    def outputs(self) -> Outputs:
        """Everything that has come."""
        pieces = self.per_step
        if len(pieces) == 1:
            return pieces[0] | self.rest
        names = pieces[0] if pieces else ()
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in names} | self.rest


@dataclass(slots=True, eq=False)
class Span:
    """Steps [position, position + length) that went out in one frame."""

    send: Send
    position: int
    length: int
    inputs: list[pb.Tensor]
    """Kept for a resend."""
    num_done: int = 0
    """Leading steps whose outputs are here."""
    stale_for: StepRejected | None = None
    """Rejection of steps that it was sent behind."""
    error: StepRejected | None = None

    @property
    def end(self) -> int:
        """Position after its last step."""
        return self.position + self.length

    @property
    def expects(self) -> int:
        """Position of the first step whose output is not here."""
        return self.position + self.num_done

    @property
    def is_settled(self) -> bool:
        """Whether nothing is to come for it."""
        return self.error is not None or self.num_done == self.length


class Ledger:
    """The account of one sequence."""

    def __init__(self) -> None:
        self.position = 0
        """Position of the next step to send."""
        self.num_unanswered = 0
        """Steps that were sent and are not settled."""
        self._spans: deque[Span] = deque()
        self._sends: deque[Send] = deque()
        self._outcomes: deque[Outputs | StepRejected] = deque()
        self._unseen: StepRejected | None = None

    @property
    def is_awaiting(self) -> bool:
        """Whether sends have no outcome yet."""
        return bool(self._sends)

    @property
    def is_rewound(self) -> bool:
        """Whether a rejection is known that the caller has not taken: what it sends goes behind the rejected steps."""
        return self._unseen is not None

    @property
    def num_pending(self) -> int:
        """Outcomes that the caller is to take, those to come included."""
        return len(self._outcomes) + sum(not send.is_discarded for send in self._sends)

    @property
    def has_outcome(self) -> bool:
        """Whether `take` gives or raises something."""
        return bool(self._outcomes)

    @property
    def acknowledged(self) -> int:
        """Position before which every output is here."""
        owed = (span.expects for span in self._spans if span.error is None and span.stale_for is None)
        return next(owed, self.position)

    # ---- what goes out ----------------------------------------------------------------------------------------------

    def begin(self) -> Send:
        """Begin a send."""
        send = Send()
        self._sends.append(send)
        return send

    def abort(self, send: Send, length: int) -> None:
        """Add a span that is not sent, since the caller has yet to learn that one before it was rejected."""
        span = Span(send, self.position, length, [])
        span.error = _aborted(span, self.position)
        send.num_open += 1
        self._spans.append(span)

    def adopt(self, num_steps: int) -> None:
        """Expect answers to steps that another stream sent: their outcome comes first."""
        send = self.begin()
        send.is_complete = True
        self.add(send, num_steps, [])

    def add(self, send: Send, length: int, inputs: list[pb.Tensor]) -> Span:
        """Add a span at the next position."""
        span = Span(send, self.position, length, inputs)
        send.num_open += 1
        self._spans.append(span)
        self.num_unanswered += length
        self.position += length
        return span

    def complete(self, send: Send) -> None:
        """No more spans will be added to a send."""
        send.is_complete = True
        self.settle()

    def discard(self) -> None:
        """Drop every outcome that was not taken, those to come included."""
        self._outcomes.clear()
        self._unseen = None
        for send in self._sends:
            send.is_discarded = True

    def clear(self) -> None:
        """Expect no more answers. Outcomes that are here stay."""
        self._spans.clear()
        self._sends.clear()
        self.num_unanswered = 0

    def resends(self, expected: int, *, is_partial: bool, is_last: bool) -> Iterator[tuple[Span, int]]:
        """Find what a resumed session needs again: spans, and how many of their first steps not.

        expected    position of the next step that the server takes
        is_partial  the server needs only the steps that it does not have (a buffered model)
        is_last     a span has one output, that of its last step
        """
        for span in self._spans:
            skip = span.num_done
            if is_partial or (is_last and span.position < expected < span.end):
                skip = max(skip, min(expected - span.position, span.length))
            if not span.is_settled and skip < span.length:
                yield span, skip

    # ---- what comes back --------------------------------------------------------------------------------------------

    def answer_steps(self, entry: Entry) -> bool:
        """Take outputs of [position, position + length); returns whether all of them were awaited, or known."""
        at, end = entry.position, entry.position + entry.length
        for span in self._live():
            at = max(at, min(end, span.expects))
            if at == end or at > span.expects:
                break
            count = min(end - at, span.length - span.num_done)
            start = at - entry.position
            if entry.per_step:
                span.send.per_step.append({name: rows[start : start + count] for name, rows in entry.per_step.items()})
            self._count_done(span, count)
            at += count
            if at == end:
                span.send.rest = entry.rest
        return at == end

    def answer_last(self, entry: Entry, *, is_whole: bool) -> bool:
        """Take the output of one span's last step, or of all of them if it is one of the whole sequence."""
        spans = [span for span in self._live() if span.end <= entry.position + 1]
        if not spans or spans[-1].end != entry.position + 1 or (len(spans) > 1 and not is_whole):
            return False
        spans[-1].send.rest = {name: rows[0] for name, rows in entry.per_step.items()} | entry.rest
        for span in spans:
            self._count_done(span, span.length)
        return True

    def reject(self, error: StepRejected) -> None:
        """Take a rejection. One of steps that were rejected already says nothing new."""
        at, end = error.position, error.position + error.length
        span = next((s for s in self._spans if not s.is_settled and s.expects <= at < s.end), None)
        if span is None:
            return
        if span.stale_for is None:
            self.position = error.expected_position
            self._unseen = None if span.send.is_discarded else error
            spans = list(self._spans)
            for later in spans[spans.index(span) + 1 :]:
                later.stale_for = error
        if at > span.expects:
            span = self._split(span, at)
        self._settle_with(span, error)
        for stale in self._spans:
            if stale.stale_for is not None and not stale.is_settled and span.end <= stale.position < end:
                self._settle_with(stale, error)

    def abort_stale(self) -> None:
        """Settle what the server would have aborted, had the connection lasted."""
        for span in self._spans:
            if span.stale_for is not None and not span.is_settled:
                self._settle_with(span, _aborted(span, span.stale_for.expected_position))

    def settle(self) -> None:
        """Turn what is settled into outcomes."""
        while self._spans and self._spans[0].is_settled:
            span = self._spans.popleft()
            send = span.send
            send.num_open -= 1
            if span.error is not None and not send.is_rejected:
                send.is_rejected = True  # of its spans the first rejected one tells
                if send.per_step:
                    self._emit(send, send.outputs())
                self._emit(send, span.error)
            self._finish_sends()
        self._finish_sends()

    def take(self) -> Outputs:
        """Give the next outcome, which must be here. Raises StepRejected if that is what it is."""
        outcome = self._outcomes.popleft()
        if isinstance(outcome, StepRejected):
            if outcome is self._unseen:
                self._unseen = None
            raise outcome
        return outcome

    def _live(self) -> Iterator[Span]:
        """Spans that the server owes outputs."""
        return (span for span in self._spans if not span.is_settled and span.stale_for is None)

    def _count_done(self, span: Span, count: int) -> None:
        span.num_done += count
        self.num_unanswered -= count

    def _settle_with(self, span: Span, error: StepRejected) -> None:
        span.error = error
        self.num_unanswered -= span.length - span.num_done

    def _split(self, span: Span, at: int) -> Span:
        """Cut a span in two, since outputs are owed before `at`. Returns the second part."""
        rest = Span(span.send, at, span.end - at, [], stale_for=span.stale_for)
        span.length = at - span.position
        span.send.num_open += 1
        self._spans.insert(self._spans.index(span) + 1, rest)
        return rest

    def _finish_sends(self) -> None:
        while self._sends and self._sends[0].is_complete and not self._sends[0].num_open:
            send = self._sends.popleft()
            if not send.is_rejected and (send.per_step or send.rest):
                self._emit(send, send.outputs())

    def _emit(self, send: Send, outcome: Outputs | StepRejected) -> None:
        if not send.is_discarded:
            self._outcomes.append(outcome)


def _aborted(span: Span, expected: int) -> StepRejected:
    cause = error_for("ABORTED", "", reason="STEP_ABORTED")
    message = f"an earlier step was rejected, so position {span.position} was not applied; send from {expected}"
    return StepRejected(
        message, handle=0, position=span.position, length=span.length, expected_position=expected, cause=cause
    )
