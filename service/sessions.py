r"""The life of live sequences: who owns each slot, which step it expects, what may be resent, when it ends.

    open --> OPEN --close--> DRAINING --last answer--> CLOSED
              |  \--linger or idle limit--> EXPIRED
              |   \--fault of the server--> FAILED
              \--disconnect--> OPEN and detached (if it lingers) --resume--> OPEN

Laws, for each session:

    expected = applied + queued: the position of the next new step; a step is admitted at exactly that position
    an entry that overlaps applied or queued steps never applies them again: kept answers are replayed, queued ones come
    a rejected entry moves neither expected nor state; later ones are refused until the expected position is sent
    after the end no step is admitted, and its name is free

No clock and no I/O: `now` is seconds on the caller's monotonic clock. Facts that every step touches are columns by
slot; a Details object exists only for sessions that asked for a name, a linger or a replay window.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from service.errors import AnswersNotKept, Exhausted, PositionGap, ServiceError, SessionNotFound, StepAborted

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Array = npt.NDArray[Any]
NO_LINK = 0
"""Link of a session that is detached: it lingers without a connection."""
NEVER = -1


class SessionState(IntEnum):
    """Where a slot's session stands."""

    OPEN = 1
    DRAINING = 2
    CLOSED = 3
    EXPIRED = 4
    FAILED = 5


@dataclass(slots=True, kw_only=True)
class Terms:
    """What a client asks of a session when it opens it."""

    session_id: str = ""
    linger_s: float = 0.0
    replay_window: int = 0
    resume_only: bool = False


@dataclass(slots=True)
class Kept:
    """One answer that may be asked for again."""

    position: int
    num_steps: int
    """Steps that it answers: [position, position + num_steps)."""
    outputs: list[Array]
    """Every output, [num_steps, ...]."""


@dataclass(slots=True)
class Details:
    """Of a session that asked for more than to be stepped."""

    terms: Terms
    kept: deque[Kept] = field(default_factory=deque)
    kept_from: int = 0
    """Answers of steps before it are gone."""
    expires_at: float = np.inf


@dataclass(slots=True)
class Admission:
    """Outcome of `admit`, by entry."""

    is_admitted: Bools
    skips: Ints
    """Leading steps of each entry that were applied or queued before."""
    refusals: list[tuple[int, ServiceError]]
    """(entry, error) of those not admitted."""
    replays: list[tuple[int, int, int]]
    """(entry, start, stop): applied steps whose kept answers are to be delivered again."""


class SessionTable:
    """Every live session of one model version, by slot."""

    def __init__(self, num_slots: int, *, max_inflight_steps: int) -> None:
        self.max_inflight_steps = max_inflight_steps
        self.num_live = 0
        self.num_replaying = 0
        """Sessions with a replay window."""
        self.state = np.full(num_slots, SessionState.CLOSED, dtype=np.int8)
        self.link = np.zeros(num_slots, dtype=np.int64)
        self.handle = np.zeros(num_slots, dtype=np.int64)
        self.expected = np.zeros(num_slots, dtype=np.int64)
        self.applied = np.zeros(num_slots, dtype=np.int64)
        self.sent = np.zeros(num_slots, dtype=np.int64)
        self._rejected_at = np.full(num_slots, NEVER, dtype=np.int64)
        self._used_at = np.zeros(num_slots, dtype=np.float64)
        self._slot_by_name: dict[str, int] = {}
        self.details: dict[int, Details] = {}

    def open(self, slot: int, link: int, handle: int, terms: Terms, now: float) -> None:
        """Begin a session at position 0 on a slot that has none. The caller has looked its name up with `find`."""
        self.state[slot] = SessionState.OPEN
        self.link[slot] = link
        self.handle[slot] = handle
        self.expected[slot] = self.applied[slot] = self.sent[slot] = 0
        self._rejected_at[slot] = NEVER
        self._used_at[slot] = now
        self.num_live += 1
        self.num_replaying += bool(terms.replay_window)
        if terms.session_id or terms.replay_window:
            self.details[slot] = Details(terms)
        if terms.session_id:
            self._slot_by_name[terms.session_id] = slot

    def find(self, terms: Terms) -> int | None:
        """Slot of the live session with that name, or None. Raises SessionNotFound where the terms want a live one."""
        if terms.session_id:
            slot = self._slot_by_name.get(terms.session_id)
            if slot is not None:
                return slot
        if terms.resume_only:
            raise SessionNotFound(
                f"session {terms.session_id!r} is not live: it was closed, expired, or never opened here; "
                "open it without resume_only and send from position 0",
                field="session_id",
            )
        return None

    def resume(self, slot: int, link: int, handle: int, terms: Terms, now: float) -> None:
        """Attach a live session to another link; counting by default goes on at the expected position."""
        details = self.details[slot]
        self.num_replaying += bool(terms.replay_window) - bool(details.terms.replay_window)
        self._forget(details, int(self.applied[slot]) - min(terms.replay_window, details.terms.replay_window))
        details.terms = terms
        details.expires_at = np.inf
        self.link[slot] = link
        self.handle[slot] = handle
        self.state[slot] = SessionState.OPEN
        self.sent[slot] = self.expected[slot]
        self._rejected_at[slot] = NEVER
        self._used_at[slot] = now

    def detach(self, slot: int, now: float) -> bool:
        """Leave a session without a link if its terms say so. Returns False where it should end instead."""
        details = self.details.get(slot)
        if details is None or not details.terms.linger_s or self.state[slot] != SessionState.OPEN:
            return False
        self.link[slot] = NO_LINK
        details.expires_at = now + details.terms.linger_s
        return True

    def drain(self, slot: int) -> None:
        """Take no more steps; the name is free for a new session at once."""
        self.state[slot] = SessionState.DRAINING
        self._free_name(slot)

    def end(self, slot: int, state: SessionState) -> None:
        """End a session: CLOSED, EXPIRED or FAILED."""
        self.state[slot] = state
        self.link[slot] = NO_LINK
        self.num_live -= 1
        self._free_name(slot)
        details = self.details.pop(slot, None)
        if details is not None:
            self.num_replaying -= bool(details.terms.replay_window)

    def expired(self, now: float, idle_limit_s: float) -> list[tuple[int, float, float]]:
        """Sessions past their linger, or unused past the limit (0: none): (slot, idle seconds, limit).

        The caller spares those whose steps are queued or running.
        """
        over = [
            (slot, now - self._used_at[slot], details.terms.linger_s)
            for slot, details in self.details.items()
            if details.expires_at <= now
        ]
        if idle_limit_s:
            is_idle = (self.state == SessionState.OPEN) & (self._used_at <= now - idle_limit_s)
            known = {slot for slot, *_ in over}
            over += [
                (slot, now - self._used_at[slot], idle_limit_s)
                for slot in np.flatnonzero(is_idle).tolist()
                if slot not in known
            ]
        return over

    def admit(
        self, slots: Ints, lengths: Ints, positions: Ints | None, now: float, refused: Bools | None = None
    ) -> Admission:
        """Decide which entries are new steps, resent ones, or out of order; count the new ones as queued.

        slots      [n] live sessions, each once
        lengths    [n] steps
        positions  [n] of the first steps; None counts on from what was sent
        refused    [n] entries that the caller rejects for another reason; they count as sent
        """
        if positions is None:
            positions = self.sent[slots]
        self.sent[slots] = positions + lengths
        self._used_at[slots] = now
        expected = self.expected[slots]
        is_admitted = positions == expected
        is_admitted &= expected - self.applied[slots] + lengths <= self.max_inflight_steps
        if refused is not None and refused.any():
            is_admitted &= ~refused
            self._rejected_at[slots[refused]] = self.expected[slots[refused]]
        skips = np.zeros(len(slots), dtype=np.int64)
        admission = Admission(is_admitted, skips, [], [])
        if not is_admitted.all():
            for entry in np.flatnonzero(~is_admitted).tolist():
                if refused is None or not refused[entry]:
                    self._settle(entry, int(slots[entry]), int(positions[entry]), int(lengths[entry]), admission)
        self.expected[slots[is_admitted]] += (lengths - skips)[is_admitted]
        return admission

    def _settle(self, entry: int, slot: int, position: int, length: int, admission: Admission) -> None:
        """Decide about one entry that is not simply the next one."""
        expected, applied = int(self.expected[slot]), int(self.applied[slot])
        if position > expected:
            if self._rejected_at[slot] == expected:
                error: ServiceError = StepAborted(
                    f"an earlier step was rejected, so position {position} was not applied; send from {expected}",
                    metadata={"expected_position": str(expected)},
                )
            else:
                error = PositionGap(position=position, expected=expected)
            admission.refusals.append((entry, error))
            return
        skip = expected - position
        fresh = max(0, length - skip)
        if position < applied:
            details = self.details.get(slot)
            oldest = details.kept_from if details and details.terms.replay_window else applied
            if position < oldest:
                error = AnswersNotKept(position=position, oldest=oldest, expected=expected)
                admission.refusals.append((entry, error))
                return
        if fresh and expected - applied + fresh > self.max_inflight_steps:
            self._rejected_at[slot] = expected
            error = Exhausted(
                f"{expected - applied} steps of this session are unanswered and {fresh} more came, the limit "
                f"(max_inflight_steps) is {self.max_inflight_steps}; wait for answers, then send from {expected}",
                field="lengths",
                retry_after_s=0.1,
            )
            admission.refusals.append((entry, error))
            return
        if position < applied:
            admission.replays.append((entry, position, min(position + length, applied)))
        admission.skips[entry] = min(skip, length)
        admission.is_admitted[entry] = fresh > 0

    def queue(self, slots: Ints, lengths: Ints) -> None:
        """Count steps as queued that need no admission: those of sequences that came whole."""
        self.expected[slots] += lengths

    def reject(self, slot: int, num_steps: int) -> None:
        """Take back queued steps that will not be run; the next ones are refused until they are sent again."""
        self.expected[slot] -= num_steps
        self._rejected_at[slot] = self.expected[slot]

    def reject_sent(self, slot: int) -> tuple[int, int]:
        """Count a message whose steps can't be read as sent and rejected. Returns (its position, the one expected)."""
        position, expected = int(self.sent[slot]), int(self.expected[slot])
        self.sent[slot] = position + 1
        self._rejected_at[slot] = expected
        return position, expected

    def advance(self, slots: Ints, counts: Ints, now: float) -> None:
        """Count queued steps as applied."""
        self.applied[slots] += counts
        self._used_at[slots] = now

    def keep(self, slot: int, kept: Kept) -> None:
        """Keep an answer for a resend, as far as the session's window reaches."""
        details = self.details[slot]
        details.kept.append(kept)
        self._forget(details, kept.position + kept.num_steps - details.terms.replay_window)

    def kept_rows(self, slot: int, start: int, stop: int) -> list[Array]:
        """Every output of applied steps [start, stop), which are kept: each [stop - start, ...]."""
        parts = []
        for kept in self.details[slot].kept:
            first, last = max(start, kept.position), min(stop, kept.position + kept.num_steps)
            if first < last:
                parts.append([y[first - kept.position : last - kept.position] for y in kept.outputs])
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    def acknowledge(self, slot: int, position: int) -> None:
        """Forget answers of steps before `position`."""
        details = self.details.get(slot)
        if details is not None:
            self._forget(details, min(position, int(self.applied[slot])))

    def _free_name(self, slot: int) -> None:
        details = self.details.get(slot)
        if details is not None and self._slot_by_name.get(details.terms.session_id) == slot:
            del self._slot_by_name[details.terms.session_id]

    @staticmethod
    def _forget(details: Details, before: int) -> None:
        details.kept_from = max(details.kept_from, before)
        kept = details.kept
        while kept and kept[0].position + kept[0].num_steps <= before:
            kept.popleft()
