"""What a stream of the load generator has sent and not been told the outcome of. Pure.

Laws:
    a message is over when each of its sessions has been answered, or refused, all the steps that it has in it
    after a refusal nothing is sent until all that is in flight is over; then every session goes on, by name of its
    position, where the server expects it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from service.client._status import step_error
from service.client.errors import ProtocolError, SessionFailed
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb

FOLLOWING = "ABORTED"
"""Code of steps that came behind a refused one."""
REFUSED = "RESOURCE_EXHAUSTED"
"""Code of what a loaded server may refuse, with the time to try again after; all else is a fault of the load."""


class Outcome(NamedTuple):
    """A message that is over."""

    since: float
    """When it was due."""
    is_refused: bool
    """Whether any step of it was refused."""


@dataclass(slots=True)
class _Message:
    since: float
    num_open: int
    """Sessions that it still has steps of."""
    is_refused: bool = False


class InFlight:
    """Messages of one stream, each with as many steps of each of its sessions, whose handles count from 0."""

    def __init__(self, num_sessions: int, num_steps: int) -> None:
        self._num_steps = num_steps
        self._base = [0] * num_sessions  # positions that the messages are counted from
        self._num_over = [0] * num_sessions  # messages since then whose steps are all answered
        self._messages: dict[int, _Message] = {}
        self._num_sent = 0
        self._expected: dict[int, int] = {}  # where refused sessions go on
        self.refused_steps: dict[str, int] = {}
        """Refused steps by code, since it was last emptied."""
        self.retry_after_s = 0.0
        """When the last refusal said to try again."""

    @property
    def is_empty(self) -> bool:
        """Whether all that was sent is over."""
        return not self._messages

    @property
    def must_wait(self) -> bool:
        """Whether nothing may be sent, since a refusal is to be settled first."""
        return bool(self._expected) and bool(self._messages)

    def send(self, since: float) -> list[int]:
        """Note a message that is sent. Returns the positions that it must name; none where they count on."""
        positions = self._settle() if self._expected else []
        self._messages[self._num_sent] = _Message(since, len(self._base))
        self._num_sent += 1
        return positions

    def take(self, answer: pb.StreamAnswer) -> tuple[int, list[Outcome]]:
        """Take an answer. Returns the steps that it answers, and the messages that it ends.

        Raises RnnserveError for an outcome that load is no reason for.
        """
        outcomes: list[Outcome] = []
        num_answered = 0
        for handle, position, length in zip(answer.handles, answer.positions, answer.lengths, strict=True):
            num_answered += length
            num_over = (position + length - self._base[handle]) // self._num_steps
            for number in range(self._num_over[handle], num_over):
                self._end(number, outcomes)
            self._num_over[handle] = num_over
        for error in answer.errors:
            self._refuse(error, outcomes)
        if answer.closed:
            raise ProtocolError(f"the server closed session {answer.closed[0].handle} under load")
        return num_answered, outcomes

    def _refuse(self, error: pb.StepError, outcomes: list[Outcome]) -> None:
        cause = step_error(error)
        has_hope = cause.code == FOLLOWING or (cause.code == REFUSED and cause.retry_after_s is not None)
        if isinstance(cause, SessionFailed) or not has_hope:
            raise cause
        number = (error.position - self._base[error.handle]) // self._num_steps
        self._messages[number].is_refused = True
        self._end(number, outcomes)
        self._expected[error.handle] = error.expected_position
        self.refused_steps[cause.code] = self.refused_steps.get(cause.code, 0) + error.length
        if cause.retry_after_s is not None:
            self.retry_after_s = cause.retry_after_s

    def _end(self, number: int, outcomes: list[Outcome]) -> None:
        message = self._messages[number]
        message.num_open -= 1
        if not message.num_open:
            del self._messages[number]
            outcomes.append(Outcome(message.since, message.is_refused))

    def _settle(self) -> list[int]:
        """Count from where the server stands."""
        sent = self._num_sent * self._num_steps
        self._base = [self._expected.get(handle, base + sent) for handle, base in enumerate(self._base)]
        self._num_over = [0] * len(self._base)
        self._num_sent = 0
        self._expected.clear()
        return self._base
