"""Live sequences of the Open Inference Protocol: sessions that are known by model and sequence_id.

A sequence belongs to no connection. It lives from the request with sequence_start until the one with sequence_end is
answered, or until it has had no request for longer than sequence_idle_s, whichever calls its requests come in. Laws:

    requests of a sequence are answered from one state, in the order in which they were read
    a request that is refused moves nothing, not even to its end; those that were read before every earlier one was
        answered or refused are refused with it, so that no step is silently left out
    sequence_start begins with zero states, whatever lived under that id before
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from service.engine import Engine
from service.errors import ServiceError, SessionNotFound, Unavailable
from service.events import NEVER, Answer, Event, Link, Steps, StepsFailed
from service.facts import current
from service.rpc.oip.inference import Inference
from service.rpc.oip.options import Options
from service.rpc.oip.tensors import Given, InferPlan
from service.sessions import SessionState, Terms
from service.tally import Cause

OpenSession = Callable[[Link, Terms, float], tuple[int, int, bool]]
"""As Lane.open."""
Key = tuple[str, str, int | str]
"""Model, its version as the request writes it, and sequence_id."""
MOST_SWEEP_S = 1.0
"""Longest time between two looks for idle sequences."""


class Sequence:
    """One live sequence, and its requests that are not answered."""

    def __init__(
        self, table: SequenceTable, key: Key, plan: InferPlan, terms: Terms, open_session: OpenSession, now: float
    ) -> None:
        """Open a session, or take over one that is live. Raises what open_session does."""
        self.key = key
        self.plan = plan
        self._table = table
        self._link = Link(self._on_event, plan.all_outputs, name=str(key[2]))
        self._line: deque[Inference] = deque()
        handle, self._sent, _ = open_session(self._link, terms, now)  # position of the next request's first step
        self._session = self._link.sessions[handle]
        self.is_ending = False
        """Whether it takes no more requests, and ends once those that wait are answered."""
        self._cause = Cause.CLOSED
        self._ends_anyway = False  # even if the request that was to end it is refused
        self.patterns: list[bytes] = []
        """What its requests look like: see repeat.py."""

    @property
    def is_open(self) -> bool:
        """Whether requests find it."""
        return self._table.find(self.key) is self

    @property
    def is_over(self) -> bool:
        """Whether its session has ended."""
        return self._session.state is not SessionState.OPEN

    def is_idle(self, since: float) -> bool:
        """Whether nothing waits, and nothing has run since then."""
        return not self._line and self._session.used_at <= since

    def submit(self, engine: Engine, inference: Inference, given: Given, options: Options) -> None:
        """Take the next steps."""
        inference.expect(given, self._sent, ends=options.is_end)
        num_steps = inference.num_steps
        lengths = None if num_steps == 1 else [num_steps]
        steps = Steps(self._link, [self._session], [self._sent], lengths, given.data)
        if options.timeout_s != NEVER:
            steps.deadline = engine.clock() + options.timeout_s
        self._sent += num_steps
        self.is_ending = options.is_end
        self._line.append(inference)
        if engine.watch is not None:
            self._link.trace = current().trace
        engine.submit(self.plan.lane, steps)

    def end(self, cause: Cause = Cause.CLOSED) -> None:
        """End it once every request is answered, whatever becomes of them."""
        self._cause = cause
        self.is_ending = self._ends_anyway = True
        self._settle()

    def _settle(self) -> None:
        """Where nothing waits any more: end, or count on from what was applied."""
        if self._line:
            return
        if self.is_ending:
            self._table.leave(self)
            self.plan.lane.end(self._session, SessionState.CLOSED, self._cause)
            self._link.sink = _ignore  # a cycle of references less
        else:
            self._sent = self._session.expected

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Answer):
            if not self._line:  # it was brought along from another worker, which has told that it is lost
                return
            inference = self._line[0]
            if inference.take(event):
                self._line.popleft()
                self._settle()
                inference.finish()
        elif isinstance(event, StepsFailed):
            if event.is_over:
                self._lose(event.error)
            else:
                self._refuse(event)
        elif self._line or not self.is_ending:
            self._lose(
                Unavailable(
                    f"sequence {self.key[2]!r} went on over another connection while this request was under way: wait "
                    "for every answer before you change connections, and begin it again"
                )
            )

    def _refuse(self, event: StepsFailed) -> None:
        """Some steps were not applied: fail their requests."""
        until = event.position + event.num_steps
        refused = [each for each in self._line if event.position <= each.position < until]
        self._line = deque(each for each in self._line if each not in refused)
        if any(each.ends for each in refused):
            self.is_ending = self._ends_anyway
        self._settle()
        for each in refused:
            each.fail(event.error)

    def _lose(self, error: ServiceError) -> None:
        """The session is over: fail every request."""
        self._table.leave(self)
        self._link.sink = _ignore
        lost, self._line = self._line, deque()
        for each in lost:
            each.fail(error)


class SequenceTable:
    """Every live sequence."""

    def __init__(self, engine: Engine, on_leave: Callable[[Sequence], None]) -> None:
        """Begin with none.

        on_leave  is told of every sequence that is forgotten
        """
        self._engine = engine
        self._on_leave = on_leave
        self._live: dict[Key, Sequence] = {}
        self._is_sweeping = False

    def begin(self, key: Key, plan: InferPlan, terms: Terms, open_session: OpenSession) -> Sequence:
        """Begin a sequence in place of the one that lives under the key, if one does. Raises what open_session does."""
        sequence = Sequence(self, key, plan, terms, open_session, self._engine.clock())
        for spelling in (key, _other_spelling(key, plan)):
            before = self._live.get(spelling)
            if before is not None and (spelling == key or before.plan is plan):
                self.leave(before)
                before.end()
        self._live[key] = sequence
        if not self._is_sweeping and plan.lane.settings.sequence_idle_s:
            self._is_sweeping = True
            asyncio.get_running_loop().call_later(self._sweep_s, self._sweep)
        return sequence

    def find(self, key: Key) -> Sequence | None:
        """Find the sequence that takes requests under exactly that key."""
        sequence = self._live.get(key)
        return None if sequence is None or sequence.is_ending else sequence

    def find_spelled(self, key: Key, plan: InferPlan) -> Sequence | None:
        """Find a sequence of a model version that may have been begun with its other spelling."""
        for spelling in (key, _other_spelling(key, plan)):
            sequence = self.find(spelling)
            if sequence is not None and sequence.plan is plan:
                return sequence
        return None

    def missing(self, key: Key) -> SessionNotFound:
        """Say that there is no such sequence, and what to do."""
        limit_s = self._engine.settings.sequence_idle_s
        idle = f", was without requests for {limit_s:g} s (sequence_idle_s)" if limit_s else ""
        return SessionNotFound(
            f"sequence {key[2]!r} of model {key[0]!r} is not live: it was never begun, has ended{idle}, or lives on "
            "another server; send its first request with sequence_start=true",
            field="parameters.sequence_id",
        )

    def leave(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        if self._live.get(sequence.key) is sequence:
            del self._live[sequence.key]
            self._on_leave(sequence)

    @property
    def _sweep_s(self) -> float:
        return min(MOST_SWEEP_S, self._engine.settings.sequence_idle_s / 4)

    def _sweep(self) -> None:
        """End what has been idle for too long."""
        since = self._engine.clock() - self._engine.settings.sequence_idle_s
        for sequence in [each for each in self._live.values() if each.is_idle(since)]:
            sequence.end(Cause.EXPIRED)
        self._is_sweeping = bool(self._live)
        if self._is_sweeping:
            asyncio.get_running_loop().call_later(self._sweep_s, self._sweep)


def _ignore(event: Event) -> None:
    """What happens to a sequence that is over."""


def _other_spelling(key: Key, plan: InferPlan) -> Key:
    """The same sequence where requests name the version, if this key leaves it out, and the other way round."""
    model, version, sequence_id = key
    return model, "" if version else str(plan.lane.version), sequence_id
