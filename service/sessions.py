r"""The life of live sequences: who holds each slot, which step it expects, what may be resent, when it ends.

    open --> OPEN --close--> DRAINING --last answer--> CLOSED
              |  \--linger or idle limit--> EXPIRED
              |   \--fault of the server--> FAILED
              \--disconnect--> OPEN and detached (if it lingers) --resume--> OPEN

Laws, for each session:

    expected = applied + queued: the position of the next new step; a step is admitted at exactly that position
    an entry that overlaps applied or queued steps never applies them again: kept answers are replayed, queued ones come
    a rejected entry moves neither expected nor state; later ones are refused until the expected position is sent
    after the end no step is admitted, and its name is free

No clock and no I/O: `now` is seconds on the caller's monotonic clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from service.errors import (
    AnswersNotKept,
    DeadlineExpired,
    Exhausted,
    PositionGap,
    ServiceError,
    SessionNotFound,
    StepAborted,
)
from service.policies import Priority

Array = npt.NDArray[Any]
NEVER = -1


class SessionState(IntEnum):
    """Where a session stands."""

    OPEN = 1
    DRAINING = 2
    CLOSED = 3
    EXPIRED = 4
    FAILED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a client asks of a session when it opens it."""

    session_id: str = ""
    linger_s: float = 0.0
    replay_window: int = 0
    resume_only: bool = False
    priority: Priority = Priority.NORMAL


ANONYMOUS = Terms()


@dataclass(slots=True)
class Kept:
    """One answer that may be asked for again."""

    position: int
    num_steps: int
    """Steps that it answers: [position, position + num_steps)."""
    outputs: list[Array]
    """Every output, [num_steps, ...]."""


class Session:
    """One live sequence."""

    __slots__ = (
        "applied",
        "expected",
        "expires_at",
        "handle",
        "kept",
        "kept_from",
        "link",
        "rejected_at",
        "sent",
        "slot",
        "state",
        "terms",
        "used_at",
    )

    def __init__(self, slot: int, link: Any, handle: int, terms: Terms, now: float) -> None:
        """Begin at position 0.

        slot    row of its state
        link    whoever takes its events; None while it is detached
        handle  its number on the link
        """
        self.slot = slot
        self.link = link
        self.handle = handle
        self.terms = terms
        self.state = SessionState.OPEN
        self.expected = 0
        self.applied = 0
        self.sent = 0
        self.rejected_at = NEVER
        self.used_at = now
        self.expires_at = np.inf
        self.kept: deque[Kept] | None = deque() if terms.replay_window else None
        self.kept_from = 0

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"session {self.terms.session_id!r}" if self.terms.session_id else f"session with handle {self.handle}"

    def resume(self, link: Any, handle: int, terms: Terms, now: float) -> None:
        """Attach it to another link; counting by default goes on at the expected position."""
        self._forget(self.applied - min(terms.replay_window, self.terms.replay_window))
        if not terms.replay_window:
            self.kept = None
        elif self.kept is None:
            self.kept = deque()
        self.link = link
        self.handle = handle
        self.terms = terms
        self.state = SessionState.OPEN
        self.sent = self.expected
        self.rejected_at = NEVER
        self.used_at = now
        self.expires_at = np.inf

    def reject(self, num_steps: int) -> None:
        """Take back queued steps that will not be run; the next ones are refused until they are sent again."""
        self.expected -= num_steps
        self.rejected_at = self.expected

    def expired_parts(self, num_expired: int, num_behind: int) -> list[tuple[int, ServiceError]]:
        """Say why all queued steps are to be rejected: (number of steps, why), those whose time ran out first."""
        expected = self.expected - num_expired - num_behind
        late = DeadlineExpired(f"{num_expired} steps waited past their timeout; send from {expected}")
        return [
            (num_expired, late),
            (num_behind, StepAborted(f"queued behind steps whose timeout passed; send from {expected}")),
        ]

    def reject_sent(self, num_steps: int) -> int:
        """Count steps as sent and rejected that never came to be queued. Returns the position of the first."""
        position = self.sent
        self.sent += num_steps
        self.rejected_at = self.expected
        return position

    def keep(self, kept: Kept) -> None:
        """Keep an answer for a resend, as far as the window reaches."""
        assert self.kept is not None  # noqa: S101  its terms have a replay window
        self.kept.append(kept)
        self._forget(kept.position + kept.num_steps - self.terms.replay_window)

    def kept_rows(self, start: int, stop: int) -> list[Array]:
        """Every output of applied steps [start, stop), which are kept: each [stop - start, ...]."""
        parts = []
        for kept in self.kept or ():
            first, last = max(start, kept.position), min(stop, kept.position + kept.num_steps)
            if first < last:
                parts.append([y[first - kept.position : last - kept.position] for y in kept.outputs])
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    def acknowledge(self, position: int) -> None:
        """Forget answers of steps before `position`."""
        self._forget(min(position, self.applied))

    def _forget(self, before: int) -> None:
        self.kept_from = max(self.kept_from, before)
        kept = self.kept
        while kept and kept[0].position + kept[0].num_steps <= before:
            kept.popleft()

    def settle(self, position: int, length: int, limit: int) -> tuple[int, tuple[int, int] | None]:
        """Decide about an entry that is not simply the next one.

        Returns (leading steps to skip, applied steps [start, stop) whose kept answers are to be delivered again).
        Raises PositionGap, StepAborted, AnswersNotKept and Exhausted.
        """
        expected, applied = self.expected, self.applied
        if position > expected:
            if self.rejected_at == expected:
                raise StepAborted(
                    f"an earlier step was rejected, so position {position} was not applied; send from {expected}",
                    metadata={"expected_position": str(expected)},
                )
            raise PositionGap(position=position, expected=expected)
        oldest = self.kept_from if self.kept is not None else applied
        if position < applied and position < oldest:
            raise AnswersNotKept(position=position, oldest=oldest, expected=expected)
        fresh = max(0, length - (expected - position))
        if fresh and expected - applied + fresh > limit:
            self.rejected_at = expected
            raise Exhausted(
                f"{expected - applied} steps of this session are unanswered and {fresh} more came, the limit "
                f"(max_inflight_steps) is {limit}; wait for answers, then send from {expected}",
                field="lengths",
                retry_after_s=0.1,
            )
        self.expected += fresh
        replay = (position, min(position + length, applied)) if position < applied else None
        return length - fresh, replay


@dataclass(slots=True)
class Admission:
    """Outcome of `admit`; entries are numbered as they came."""

    skips: dict[int, int]
    """Leading steps of an entry that were applied or queued before: all of them where nothing is new."""
    refusals: list[tuple[int, ServiceError]]
    """Entries that were not admitted, and why."""
    replays: list[tuple[int, int, int]]
    """(entry, start, stop): applied steps whose kept answers are to be delivered again."""


def admit(
    sessions: Sequence[Session],
    lengths: Sequence[int],
    positions: Sequence[int | None] | None,
    limit: int,
    faults: dict[int, ServiceError],
) -> Admission | None:
    """Decide which entries are new steps, resent ones, or out of order; count the new ones as queued.

    sessions   [n] open ones, each once
    lengths    [n] steps
    positions  [n] of the first steps; None counts on from what was sent
    limit      most steps of one session that may be unanswered
    faults     entries that the caller refuses for another reason; they count as sent
    Returns None if every entry is admitted whole, which is nearly always.
    """
    admission = None
    for entry, session in enumerate(sessions):
        position = session.sent if positions is None else positions[entry]
        if position is None:
            position = session.sent
        after = position + lengths[entry]
        session.sent = after
        if position == session.expected and after - session.applied <= limit and not faults:
            session.expected = after
            continue
        admission = admission or Admission({}, [], [])
        try:
            if entry in faults:
                session.rejected_at = session.expected
                raise faults[entry]
            skip, replay = session.settle(position, lengths[entry], limit)
        except ServiceError as error:
            admission.skips[entry] = lengths[entry]
            admission.refusals.append((entry, error))
        else:
            if skip:
                admission.skips[entry] = skip
            if replay:
                admission.replays.append((entry, *replay))
    return admission


class SessionTable:
    """Every live session of one model version."""

    def __init__(self) -> None:
        self.by_slot: dict[int, Session] = {}
        self.num_replaying = 0
        """Sessions with a replay window."""
        self._by_name: dict[str, Session] = {}
        self._lingering: set[Session] = set()

    def __len__(self) -> int:
        return len(self.by_slot)

    def open(self, slot: int, link: Any, handle: int, terms: Terms, now: float) -> Session:
        """Begin a session on a slot that has none. The caller has looked its name up with `find`."""
        session = self.by_slot[slot] = Session(slot, link, handle, terms, now)
        self.num_replaying += session.kept is not None
        if terms.session_id:
            self._by_name[terms.session_id] = session
        return session

    def find(self, terms: Terms) -> Session | None:
        """Find the live session of that name. Raises SessionNotFound where the terms want one and there is none."""
        session = self._by_name.get(terms.session_id)
        if session is None and terms.resume_only:
            raise SessionNotFound(
                f"session {terms.session_id!r} is not live: it was closed, expired, or never opened here; "
                "open it without resume_only and send from position 0",
                field="session_id",
            )
        return session

    def resume(self, session: Session, link: Any, handle: int, terms: Terms, now: float) -> None:
        """Attach a live session to another link."""
        self.num_replaying += bool(terms.replay_window) - (session.kept is not None)
        self._lingering.discard(session)
        session.resume(link, handle, terms, now)

    def detach(self, session: Session, now: float) -> bool:
        """Leave a session without a link if its terms say so. Returns False where it should end instead."""
        if not session.terms.linger_s or session.state is not SessionState.OPEN:
            return False
        session.link = None
        session.expires_at = now + session.terms.linger_s
        self._lingering.add(session)
        return True

    def drain(self, session: Session) -> None:
        """Take no more steps; the name is free for a new session at once."""
        session.state = SessionState.DRAINING
        self._free_name(session)

    def end(self, session: Session, state: SessionState) -> None:
        """End a session: CLOSED, EXPIRED or FAILED."""
        session.state = state
        session.link = None
        del self.by_slot[session.slot]
        self.num_replaying -= session.kept is not None
        self._lingering.discard(session)
        self._free_name(session)

    def expired(self, now: float, idle_limit_s: float) -> list[tuple[Session, float, float]]:
        """Sessions past their linger, or unused past the limit (0: none): (session, idle seconds, limit).

        The caller spares those whose steps are queued or running.
        """
        over = [(s, now - s.used_at, s.terms.linger_s) for s in self._lingering if s.expires_at <= now]
        if idle_limit_s:
            over += [
                (s, now - s.used_at, idle_limit_s)
                for s in self.by_slot.values()
                if s.state is SessionState.OPEN and s.used_at <= now - idle_limit_s and s not in self._lingering
            ]
        return over

    def _free_name(self, session: Session) -> None:
        if self._by_name.get(session.terms.session_id) is session:
            del self._by_name[session.terms.session_id]
