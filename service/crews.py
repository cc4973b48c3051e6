"""Sessions of one link that advance together: what is the same for all of them is counted once.

A gateway sends one step for each of its sessions in frame after frame. Counting them one by one would be most of the
cost of a frame. A crew counts frames instead, and `part` writes into each session what it has missed. Laws:

    while a crew is together, sent, expected and applied of its sessions lag behind by the frames that it counted
    after `part` they are what they would have been without the crew
    whoever looks at a session of a crew that is together parts it first: Lane.flush does

No clock and no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from service.sessions import Session
from service.slots import Slots


class Crew:
    """Sessions with one step each in every frame."""

    __slots__ = ("_first", "_is_uniform", "_num_frames", "_used_at", "handles", "is_together", "sessions", "slots")

    def __init__(self, sessions: list[Session]) -> None:
        self.sessions = sessions
        self.handles = [session.handle for session in sessions]
        self.slots: Slots = np.empty(0, dtype=np.int64)
        """Of the sessions, while it is together."""
        self.is_together = False
        self._first: list[int] = []  # positions expected when it came together
        self._is_uniform = False
        self._num_frames = 0
        self._used_at = 0.0

    def gather(self) -> bool:
        """Come together, unless a session was sent steps that were not admitted. None may have queued steps."""
        sessions = self.sessions
        first = [session.expected for session in sessions]
        if [session.sent for session in sessions] != first:
            return False
        self._first = first
        self._is_uniform = first.count(first[0]) == len(first)
        self._num_frames = 0
        self.slots = np.array([session.slot for session in sessions], dtype=np.int64)
        self.is_together = True
        return True

    def positions(self) -> list[int]:
        """Position that each session expects."""
        num = self._num_frames
        if self._is_uniform:
            return [self._first[0] + num] * len(self._first)
        return [position + num for position in self._first]

    def expects(self, positions: Sequence[int | None]) -> bool:
        """Whether steps at those positions (None counts on) are the next ones."""
        return all(given is None or given == next_ for given, next_ in zip(positions, self.positions(), strict=True))

    def advance(self, now: float) -> None:
        """Count one step of every session that was sent, admitted and applied."""
        self._num_frames += 1
        self._used_at = now

    def part(self) -> None:
        """Let each session count for itself again."""
        if self._num_frames:
            for session, position in zip(self.sessions, self.positions(), strict=True):
                session.sent = session.expected = session.applied = position
                session.used_at = self._used_at
        self.is_together = False
