"""The short way of most steps: what has arrived is one batch, and nothing stands before it.

One step each of sessions that have nothing queued, in a lane where nothing is queued or running, is a batch already:
entries, queues and turns would be made only to be taken apart again. `board` looks whether that is so, and changes
nothing that can be seen; `arrive` moves the sessions on. In between nothing else may happen to the lane, so the run
must be short enough for the event loop. Whatever does not qualify takes the long way through Lane.flush, with the same
results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from service.crews import Crew
from service.events import NEVER, Answer, Steps
from service.inputs import bad_rows
from service.lane import Lane
from service.slots import Slots

Array = npt.NDArray[Any]


@dataclass(slots=True)
class Express:
    """A batch that is made of messages in a lane's inbox."""

    lane: Lane
    messages: list[Steps]
    slots: Slots
    rows: Slots
    """Of the runner's slab."""
    inputs: dict[str, Array]

    def execute(self) -> list[Array]:
        """Compute the outputs, [rows, 1, ...] and [rows, ...]. Raises RunFailed."""
        return self.lane.runner.run(self.rows, self.inputs, self.lane.runs.ones[: len(self.rows)])


def num_rows(lane: Lane) -> tuple[int, int]:
    """Messages of the inbox, from its front, that can go together by the short way, and their sessions; or (0, 0)."""
    if lane.scheduler.num_queued_steps or lane.is_whole or lane.sessions.num_replaying:
        return 0, 0
    limit = min(lane.scheduler.config.max_rows, lane.settings.max_queued_steps)
    messages = rows = 0
    for message in lane.inbox:
        if message.lengths is not None or message.deadline != NEVER or message.link.emit_last:
            return 0, 0
        rows += len(message.sessions)
        if rows > limit:
            if lane.scheduler.has_classes:
                return 0, 0  # who goes first is to be looked at
            return messages, rows - len(message.sessions)
        messages += 1
    return messages, rows


def board(lane: Lane, num_messages: int) -> Express | None:
    """Make a batch of the first messages of the inbox, or None where an entry needs a closer look."""
    messages = lane.inbox[:num_messages]
    if num_messages > 1 and len({message.link for message in messages}) < num_messages:
        return None  # a session may be in two of them
    numbers: list[int] = []
    parts: list[Slots] = []
    for message in messages:
        crew, link = message.crew, message.link
        if link.crew is not crew and link.crew is not None:
            lane.part(link)
        if crew is not None:
            if not _is_ready(lane, crew, message):
                return None
            if numbers:
                parts.append(np.array(numbers, dtype=np.int64))
                numbers = []
            parts.append(crew.slots)
            continue
        positions = message.positions
        for index, session in enumerate(message.sessions):
            sent = session.sent if positions is None or positions[index] is None else positions[index]
            if sent != session.expected:
                return None
            numbers.append(session.slot)
    if numbers:
        parts.append(np.array(numbers, dtype=np.int64))
    slots = parts[0] if len(parts) == 1 else np.concatenate(parts)
    passes = lane.settings.non_finite == "pass"
    inputs = {}
    for index, (tensor, (dtype, shape)) in enumerate(zip(lane.step_inputs, lane.row_types, strict=True)):
        data = messages[0].inputs[index] if num_messages == 1 else b"".join([m.inputs[index] for m in messages])
        x = np.frombuffer(data, dtype).reshape(shape)
        if bad_rows(tensor, x, passes_non_finite=passes) is not None:
            return None
        inputs[tensor.name] = x[:, None]
    if lane.constants is not None:
        lane.constants.gather(slots, inputs)
    rows = slots
    if lane.residence is not None:
        if not lane.residence.holds(slots):
            return None
        rows = lane.residence.rows(slots)
    return Express(lane, messages, slots, rows, inputs)


def _is_ready(lane: Lane, crew: Crew, message: Steps) -> bool:
    """Whether a crew is or comes together, and these are its next steps."""
    if not crew.is_together:
        if not crew.gather():
            return False
        message.link.crew = crew
        lane.together.append(message.link)
    return message.positions is None or crew.expects(message.positions)


def arrive(express: Express, outputs: list[Array], now: float, seconds: float) -> None:
    """Take the results of the run: move sessions, answer links."""
    lane, num = express.lane, len(express.rows)
    del lane.inbox[: len(express.messages)]
    tally, messages = lane.tally, express.messages
    tally.count_run(num, num, seconds)
    if len(messages) == num:  # they have come in this order
        times = [message.arrived_at for message in messages]
        tally.queue_durations.observe_since(times, now - seconds)
        tally.request_durations.observe_since(times, now)
    else:
        for message in messages:
            waited = now - message.arrived_at
            tally.queue_durations.observe(max(waited - seconds, 0.0), len(message.sessions))
            tally.request_durations.observe(waited, len(message.sessions))
    outputs = [y[:, 0] if is_per_step else y for y, is_per_step in zip(outputs, lane.is_output_per_step, strict=True)]
    start = 0
    for message in messages:
        crew, link, sessions = message.crew, message.link, message.sessions
        stop = start + len(sessions)
        if crew is not None:
            handles, positions = crew.handles, crew.positions()
            crew.advance(now)
        else:
            handles, positions = [], []
            for session in sessions:
                position = session.expected
                handles.append(session.handle)
                positions.append(position)
                session.sent = session.expected = session.applied = position + 1
                session.used_at = now
        rows = [outputs[index][start:stop] for index in link.outputs]
        link.sink(Answer(handles, positions, [1] * len(positions), rows))
        start = stop
