"""Lanes without a server, for tests: links that note what they are told, and runs on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from service.config import load_settings
from service.errors import RunFailed, StatesLost
from service.events import Answer, Closed, Event, Link, Steps
from service.lane import Lane
from service.repository import load_version
from service.runs import Run
from service.sessions import Terms

Rows = np.ndarray


def lane_maker(repository: Path, *, keeps_states: bool | None = None) -> Callable[..., Lane]:
    """A function that makes lanes of a repository's models, under the settings that it is given."""

    def make(model: str, **settings: object) -> Lane:
        return load_version(load_settings({"repository": repository, **settings}), model, 1, keeps_states=keeps_states)

    return make


class Client:
    """A link, and what it was told."""

    def __init__(self, lane: Lane, **link: object) -> None:
        self.lane = lane
        self.events: list[Event] = []
        self.link = Link(self._take, **{"outputs": [0], **link})

    def open(self, terms: Terms | None = None, now: float = 0.0) -> int:
        """Open a session. Returns its handle."""
        return self.lane.open(self.link, terms or Terms(), now)[0]

    def send(
        self, xs: dict[int, Rows], positions: list[int] | None = None, deadline: float = np.inf, now: float = 0.0
    ) -> None:
        """Send steps {handle: rows}."""
        lengths = [len(x) for x in xs.values()]
        sessions = [self.link.sessions[handle] for handle in xs]
        data = b"".join(x.astype(np.float32).tobytes() for x in xs.values())
        self.lane.submit(Steps(self.link, sessions, positions, lengths, [data], deadline), now)

    def _take(self, event: Event) -> None:
        over = {closed.handle for closed in self.told(Closed)}
        assert not over & set(event.handles if isinstance(event, Answer) else [event.handle]), "an event after the end"
        self.events.append(event)

    def told(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    def answers(self, handle: int = 0, output: int = 0) -> list[tuple[int, Rows]]:
        """[(position, row)] of a per-step output in the order of arrival."""
        rows = []
        for answer in self.told(Answer):
            at = 0
            for each, position, length in zip(answer.handles, answer.positions, answer.lengths, strict=True):
                values = answer.outputs[output][at : at + length]
                rows += [(position + i, row) for i, row in enumerate(values) if each == handle]
                at += length
            assert at == len(answer.outputs[output])
        return rows

    def rows(self, handle: int = 0) -> Rows:
        """Answered rows, which are those of positions 0, 1, 2, ..."""
        answers = self.answers(handle)
        assert [position for position, _ in answers] == list(range(len(answers)))
        return np.array([row for _, row in answers])


@dataclass
class Alone:
    """What a sequence gets whole, in a batch of one."""

    y: Rows
    states: list[Rows]


def run_alone(lane: Lane, x: Rows) -> Alone:
    states = [np.zeros((1, *s.row_shape), s.dtype) for s in lane.graph.states]
    outputs, states = lane.backend.run({"x": x[None]}, np.array([len(x)], np.int32), states)
    return Alone(outputs[0][0], [state[0] for state in states])


def drive(lane: Lane, now: float = 0.0) -> None:
    """Run all that is ready."""
    lane.flush()
    while (run := lane.next_run(now)) is not None:
        finish(lane, run, now)


def finish(lane: Lane, run: Run, now: float = 0.0) -> None:
    """Execute a run that was begun, and hand its results to the lane."""
    try:
        outputs = run.execute()
    except StatesLost as error:
        lane.abandon(run.batch, error)
    except RunFailed:
        lane.fail(run, now)
    else:
        lane.complete(run, outputs, now, 0.0)


def steps(seed: int, count: int) -> Rows:
    return np.random.default_rng(seed).standard_normal((count, 3)).astype(np.float32)


def equal(rows: Rows, expected: Rows) -> None:
    """Demand the same shape, type and values."""
    np.testing.assert_array_equal(rows, expected, strict=True)
