"""What passes between a lane and those who hold its sessions: steps go in, events come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from service.crews import Crew
from service.errors import ServiceError
from service.facts import Trace
from service.sessions import Session, SessionState

Array = npt.NDArray[Any]
NEVER = float("inf")


@dataclass(slots=True)
class Answer:
    """Outputs of one or many sessions of a link, in columns."""

    handles: list[int]
    positions: list[int]
    """Of each entry's first answered step."""
    lengths: list[int]
    """Rows of each entry in every per-step output."""
    outputs: list[Array]
    """The link's outputs in its order: per-step [sum(lengths), ...], per-sequence [entries, ...]."""
    goes_on: bool = False
    """Whether more steps of each entry were sent in the same message, and are queued."""


@dataclass(slots=True)
class StepsFailed:
    """Steps of one session that were not applied."""

    handle: int
    position: int
    num_steps: int
    error: ServiceError
    expected: int
    is_over: bool = False
    """Whether the session ended with it."""


@dataclass(slots=True)
class Closed:
    """The end of one session, after the last of its answers."""

    handle: int
    position: int
    """Steps that were applied."""
    state: SessionState
    """OPEN for a session that goes on without this link."""
    is_taken_over: bool = False
    final_states: list[Array] | None = None
    """Rows of its states, if the link wants them."""


Event = Answer | StepsFailed | Closed


@dataclass(slots=True, eq=False)
class Link:
    """Whoever holds sessions and takes their events: a connected stream, or a Predict call."""

    sink: Callable[[Event], None]
    outputs: list[int]
    """Which of the model's outputs to answer, by index."""
    emit_last: bool = False
    """Answer only the last step of each entry."""
    wants_states: bool = False
    """Tell the final states when a session closes."""
    is_predicting: bool = False
    """Whether it holds whole sequences of a Predict call, not sessions."""
    sessions: dict[int, Session] = field(default_factory=dict)
    """Sessions that take steps, by handle."""
    members: set[Session] = field(default_factory=set)
    """Those, and the draining ones."""
    num_opened: int = 0
    """Handles given out."""
    version: int = 0
    """Grows whenever `sessions` changes."""
    crew: Crew | None = None
    """Sessions that are together, if any are."""
    trace: Trace | None = None
    """Of the call that it is for, if that is recorded."""
    name: str = ""
    """Of its one session, where the terms of that don't say."""
    is_gone: bool = False
    """Whether its connection has ended: what it still holds is about to go."""

    @property
    def num_unanswered(self) -> int:
        """Steps of its sessions that are queued or running."""
        return sum(session.expected - session.applied for session in self.members)


@dataclass(slots=True)
class Steps:
    """Steps of some sessions of one link, checked against the model's shapes."""

    link: Link
    sessions: list[Session]
    """Open ones, each once."""
    positions: Sequence[int] | None
    """Of each entry's first step; None counts on from what was sent."""
    lengths: list[int] | None
    """None: one step each."""
    inputs: list[bytes]
    """Per-step inputs in the model's order, each [sum(lengths), ...] as raw bytes."""
    deadline: float = NEVER
    crew: Crew | None = None
    """The sessions, if they have come one step each in frame after frame."""
    arrived_at: float = 0.0
