"""The short way of most steps: what has arrived is one batch, and nothing stands before it.

One step each of sessions that have nothing queued, in a lane where nothing is queued or running, is a batch already:
entries, queues and turns would be made only to be taken apart again. `board` looks whether that is so, and touches
nothing; `arrive` moves the sessions on. In between nothing else may happen to the lane, so the run must be short enough
for the event loop. Whatever does not qualify takes the long way through Lane.flush, with the same results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from service.entries import join
from service.events import Answer, Steps
from service.inputs import bad_rows
from service.lane import Lane
from service.runs import Run
from service.scheduler import Batch
from service.sessions import Session

Array = npt.NDArray[Any]


@dataclass(slots=True)
class Express:
    """A batch that is made of the messages in a lane's inbox."""

    lane: Lane
    messages: list[Steps]
    sessions: list[Session]
    positions: list[int]
    run: Run


def num_rows(lane: Lane) -> int:
    """Sessions that the inbox has steps for; 0 where they can't all go by the short way."""
    if lane.scheduler.num_queued_steps or lane.is_whole or lane.sessions.num_replaying:
        return 0
    num = 0
    for message in lane.inbox:
        if message.lengths is not None or message.has_deadline or message.link.emit_last:
            return 0
        num += len(message.sessions)
    limit = min(lane.scheduler.config.max_rows, lane.settings.max_queued_steps)
    return num if num <= limit else 0


def board(lane: Lane) -> Express | None:
    """Make a batch of the inbox, or None, leaving it as it was, where an entry needs a closer look."""
    messages = lane.inbox
    if len(messages) == 1:
        sessions = messages[0].sessions
    else:
        sessions = [session for message in messages for session in message.sessions]
        if len(set(sessions)) < len(sessions):
            return None
    positions = [session.expected for session in sessions]
    entries = join(messages, sessions, lane.row_types)
    sent = [session.sent for session in sessions]
    if entries.positions is not None:
        sent = [after if given is None else given for given, after in zip(entries.positions, sent, strict=True)]
    if sent != positions:
        return None
    passes = lane.settings.non_finite == "pass"
    for tensor, x in zip(lane.step_inputs, entries.inputs, strict=True):
        if bad_rows(tensor, x, passes_non_finite=passes) is not None:
            return None
    num = len(sessions)
    batch = Batch(
        slots=[session.slot for session in sessions],
        counts=entries.lengths,
        starts=entries.starts,
        steps=1,
        is_last=[],
        payloads=[entries.inputs] * num,
    )
    return Express(lane, messages, sessions, positions, lane.runs.make(batch))


def arrive(express: Express, outputs: list[Array], now: float, seconds: float) -> None:
    """Take the results of the run: move sessions, answer links."""
    lane, num = express.lane, len(express.sessions)
    lane.inbox = []
    lane.tally.count_run(num, num, seconds)
    for session in express.sessions:
        session.sent = session.expected = session.applied = session.expected + 1
        session.used_at = now
    outputs = lane.runs.flatten(express.run.batch, outputs)
    start = 0
    for message in express.messages:
        stop = start + len(message.sessions)
        link = message.link
        rows = [outputs[index][start:stop] for index in link.outputs]
        handles = [session.handle for session in message.sessions]
        link.sink(Answer(handles, express.positions[start:stop], [1] * (stop - start), rows))
        start = stop
