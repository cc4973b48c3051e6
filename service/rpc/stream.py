"""One StreamPredict call: frames to steps, events to answers. No reading and no waiting for the client here.

A frame is checked as a whole before it changes anything. What is wrong with one session is told in-band and leaves the
others alone; what is wrong with the frame rejects the steps of all of its sessions, in-band too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import grpc.aio
import numpy.typing as npt

from service.engine import Engine
from service.errors import Exhausted, InvalidInput, ServiceError, SessionNotFound, ShapeMismatch
from service.events import Answer, Event, Link, Steps, StepsFailed
from service.facts import current
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.rpc.answers import CLOSE_REASONS, EVENT_BYTES, AnswerWriter, drain_message
from service.rpc.codec import STEP_MODES, LanePlan
from service.rpc.handoff import Mover
from service.rpc.repeat import Repeat, learn
from service.rpc.requests import Opening, check_columns, lengths_of_frame, read_request, terms_of
from service.rpc.status import status_of
from service.sessions import SessionState, Terms

log = logging.getLogger(__name__)
Array = npt.NDArray[Any]
SLICE = 32
"""Sessions that are opened or closed in one turn of the event loop, at most."""
HELD_ROWS = 64
"""Answers to a part of what came in one message wait for more of it, until there are so many."""
CHECK_STEPS = 1024
"""Steps that are taken between two looks for room, at most."""


class Stream:
    """Holds the sessions of one call and the messages that wait to be written."""

    def __init__(self, engine: Engine, plan: LanePlan, opening: Opening, mover: Mover | None) -> None:
        """Begin a stream, which `open` opens.

        mover  brings sessions from other workers; None where there are none
        """
        self._engine = engine
        self._plan = plan
        self._lane = lane = plan.lane
        self._mover = mover
        self._open_session = lane.open if mover is None else mover.open
        self.answers: list[Answer] = []
        """Wait to be written."""
        self.held: tuple[pb.StreamFrame, bytes] | None = None
        """A frame, and its message, that `take` has put off for `take_held`."""
        self._writer = AnswerWriter([plan.output_plans[index] for index in opening.outputs])
        self._facts = current()
        trace = self._facts.trace
        self._link = Link(self._on_event, opening.outputs, emit_last=opening.emit_last, trace=trace)
        engine.attach(self._link)
        self._facts.serve(lane.name, lane.version)
        self._waiting: list[bytes] = []
        self._events = pb.StreamAnswer()
        self._num_events = 0
        self._num_unsent_bytes = 0
        self._num_held_rows = 0  # answered, and not written
        self._num_unchecked_steps = 0  # taken since room was last looked for
        self._check_steps = min(lane.settings.max_inflight_steps // 4, CHECK_STEPS)
        self._has_frames = False
        self._repeat: Repeat | None = None
        self._num_missed = 0  # frames since the last that repeated another
        self._is_finishing = False
        self._wakeup: asyncio.Future[None] | None = None
        self._has_written = asyncio.Event()

    async def open(self, terms: Sequence[Terms]) -> None:
        """Open the stream's first sessions; faults of single ones are told in-band."""
        lane = self._lane
        opened = pb.StreamOpened(
            model=lane.name,
            version=lane.version,
            digest=lane.backend.digest,
            step_mode=STEP_MODES[lane.step_mode],
            max_inflight_steps=lane.settings.max_inflight_steps,
        )
        if len(terms) == 1:
            self._facts.session_id = terms[0].session_id
        for number, each in enumerate(terms, 1):
            opened.sessions.append(self._open(each, is_first=True))
            if number % SLICE == 0:
                await asyncio.sleep(0)
        self._waiting.append(pb.StreamPredictResponse(opened=opened).SerializeToString())

    # ---- requests ---------------------------------------------------------------------------------------------------

    def take(self, raw: bytes) -> None:
        """Apply one message. Raises InvalidInput where it is no frame."""
        steps = None if self._repeat is None else self._repeat.read(raw)
        if steps is not None:
            self._num_missed = 0
            self._num_unchecked_steps += len(steps.sessions)
            self._engine.submit(self._lane, steps)
            return
        request = read_request(raw)
        if request.WhichOneof("message") != "frame":
            raise InvalidInput("a stream is opened once; every later message is a `frame`", field="open")
        frame = request.frame
        if (self._mover is not None and frame.opens) or len(frame.opens) + len(frame.closes) > SLICE:
            self.held = frame, raw
        else:
            for _ in self._apply(frame, raw):
                pass

    async def take_held(self) -> None:
        """Apply the frame that was put off: with pauses, and once the sessions that it opens by name are here."""
        held, self.held = self.held, None
        if held is None:
            return
        frame = held[0]
        async with self._mover.brought(self._terms_in(frame)) if self._mover and frame.opens else nullcontext():
            for _ in self._apply(*held):
                await asyncio.sleep(0)

    def _apply(self, frame: pb.StreamFrame, raw: bytes) -> Iterator[None]:
        """Apply a frame; where it opens or closes many sessions, others may have their turn at each yield."""
        lane, link = self._lane, self._link
        is_first, self._has_frames = not self._has_frames, True
        if is_first and not link.num_opened and not frame.opens:
            opened = self._open(Terms(), is_first=True)
            if opened.HasField("status"):
                self._tell_opened(opened)
        handles = list(frame.handles) or ([0] if frame.tensors else [])
        try:
            steps, once, terms = self._check(frame, handles)
        except ServiceError as error:
            self._reject_all(handles, error, frame)
            return
        for index, session in enumerate(terms):
            if index and index % SLICE == 0:
                yield
            opened = self._open(session, self._plan.given(once, index), is_first=is_first)
            if not opened.HasField("status") and not opened.resumed:
                for state, name in enumerate(self._plan.states):
                    if name in once:
                        lane.slab.write(link.sessions[opened.handle].slot, state, once[name][index])
            self._tell_opened(opened)
        for handle, position in zip(handles, frame.acked_positions, strict=False):
            if handle in link.sessions:
                link.sessions[handle].acknowledge(position)
        if steps is not None:
            self._submit(steps, handles)
            self._num_missed += 1
            if self._num_missed.bit_count() == 1 and self._plan.takes_any_bytes:  # ever more seldom if it is in vain
                self._repeat = learn(steps, raw, frame)
        for index, handle in enumerate(frame.closes):
            if index and index % SLICE == 0:
                yield
            self._close(handle)
        self._wake()

    def finish(self) -> None:
        """The client has sent all."""
        self._is_finishing = True
        self._lane.finish(self._link, self._engine.clock())
        self._engine.wake()
        self._wake()

    def finish_writing(self) -> None:
        """Let the writer end when it has written what waits, whatever its sessions do."""
        self._is_finishing = True
        self.drop()
        self._wake()

    def drop(self) -> None:
        """The call is over, however it came to that."""
        self._facts.steps_in += self._num_unchecked_steps
        self._facts.num_sequences = self._link.num_opened
        self._engine.drop(self._lane, self._link)

    def announce_drain(self, grace_s: float) -> None:
        """Tell the client that what it has open will end, after so long if that is finite."""
        self._waiting.append(drain_message(grace_s))
        self._wake()

    def _check(self, frame: pb.StreamFrame, handles: list[int]) -> tuple[Steps | None, dict[str, Array], list[Terms]]:
        """Check without touching a session: (steps, what opens are given by name, their terms). Raises ServiceError."""
        limit = self._lane.settings.max_steps_per_message
        if len(frame.opens) + len(frame.closes) > limit:
            raise Exhausted(f"more opens and closes in one message than max_steps_per_message allows, {limit}")
        terms = [terms_of(session, self._lane.settings) for session in frame.opens]
        inputs, num_rows, once = self._plan.read(frame.tensors, "tensors")
        for name, rows in once.items():
            if len(rows) != len(terms):
                raise ShapeMismatch(f"{name} has {len(rows)} rows for {len(terms)} opens", field="tensors")
        num = len(handles)
        check_columns(frame, handles)
        if not inputs:
            if frame.lengths:
                raise ShapeMismatch("lengths without tensors", field="lengths")
            return None, once, terms
        if not num:
            raise InvalidInput("steps without handles: name the sessions that they are for", field="handles")
        steps = Steps(self._link, [], list(frame.positions) or None, lengths_of_frame(frame, num, num_rows), inputs)
        if frame.HasField("timeout"):
            steps.deadline = self._engine.clock() + frame.timeout.ToNanoseconds() / 1e9
        return steps, once, terms

    def _terms_in(self, frame: pb.StreamFrame) -> list[Terms]:
        """What a frame asks of the sessions that it opens: nothing if it is malformed."""
        try:
            return self._check(frame, list(frame.handles) or ([0] if frame.tensors else []))[2]
        except ServiceError:
            return []

    def _open(self, terms: Terms, given: list[Array] | None = None, *, is_first: bool = False) -> pb.SessionOpened:
        link, now = self._link, self._engine.clock()
        handle = link.num_opened
        try:
            # What a stream begins with goes on even where its version was retired a moment ago, as what is live does.
            is_retired = not is_first and self._engine.is_retired(self._lane)
            is_new = is_retired and not (terms.session_id and self._lane.has_any([terms.session_id]))
            self._engine.check_open(self._lane if is_new else None)
            handle, position, was_live = self._open_session(link, terms, now, given)
        except ServiceError as error:
            link.num_opened = handle + 1
            return pb.SessionOpened(handle=handle, session_id=terms.session_id, status=status_of(error))
        self._facts.note("session opened", handle=handle, session_id=terms.session_id)
        return pb.SessionOpened(handle=handle, session_id=terms.session_id, position=position, resumed=was_live)

    def _close(self, handle: int) -> None:
        try:
            self._lane.close(self._link, handle)
        except ServiceError as error:
            self._on_event(StepsFailed(handle, 0, 0, error, 0, is_over=True))
        self._engine.wake()

    def _submit(self, steps: Steps, handles: list[int]) -> None:
        """Hand steps to the engine; those of handles that are not open are rejected, the others go on."""
        sessions = self._link.sessions
        try:
            steps.sessions = [sessions[handle] for handle in handles]
        except KeyError:
            self._submit_known(steps, handles)
        else:
            self._num_unchecked_steps += len(handles) if steps.lengths is None else sum(steps.lengths)
            self._engine.submit(self._lane, steps)

    def _submit_known(self, steps: Steps, handles: list[int]) -> None:
        sessions = self._link.sessions
        lengths = steps.lengths or [1] * len(handles)
        for index, handle in enumerate(handles):
            if handle not in sessions:
                error = SessionNotFound(
                    f"handle {handle} is not open on this stream (closed, ended, or never opened): open a session and "
                    "send from position 0",
                    field="handles",
                )
                position = steps.positions[index] if steps.positions else 0
                self._lane.tally.count_rejected(error.reason)
                self._on_event(StepsFailed(handle, position, lengths[index], error, 0, is_over=True))
        known = [index for index, handle in enumerate(handles) if handle in sessions]
        if not known:
            return
        starts = [0, *accumulate(lengths)]
        inputs = []
        for tensor, data in zip(self._plan.inputs.values(), steps.inputs, strict=True):
            size = tensor.row_bytes
            inputs.append(b"".join(data[starts[i] * size : starts[i + 1] * size] for i in known))
        kept = Steps(
            self._link,
            [],
            [steps.positions[index] for index in known] if steps.positions else None,
            [lengths[index] for index in known],
            inputs,
            steps.deadline,
        )
        self._submit(kept, [handles[index] for index in known])

    def _reject_all(self, handles: list[int], error: ServiceError, frame: pb.StreamFrame) -> None:
        """A frame that is malformed changes nothing: every session that it names is told, every open is refused."""
        link = self._link
        self._lane.flush()
        for asked in frame.opens:
            handle = link.num_opened
            link.num_opened += 1
            self._tell_opened(pb.SessionOpened(handle=handle, session_id=asked.session_id, status=status_of(error)))
        for handle in dict.fromkeys(handles):
            session = link.sessions.get(handle)
            if session is None:
                self._on_event(StepsFailed(handle, 0, 0, error, 0, is_over=True))
            elif frame.tensors:
                position = session.reject_sent(1)
                self._on_event(StepsFailed(handle, position, 1, error, session.expected))
            else:
                self._on_event(StepsFailed(handle, session.sent, 0, error, session.expected))
        if not handles and not frame.opens:
            expected = link.sessions[0].expected if 0 in link.sessions else 0
            self._on_event(StepsFailed(0, expected, 0, error, expected))
        self._lane.tally.count_rejected(error.reason)
        self._wake()

    def _tell_opened(self, opened: pb.SessionOpened) -> None:
        self._events.opened.append(opened)
        self._count_event()

    def _count_event(self) -> None:
        self._num_events += 1
        self._num_unsent_bytes += EVENT_BYTES
        self._wake()

    # ---- answers ----------------------------------------------------------------------------------------------------

    @property
    def wants_room(self) -> bool:
        """Whether it is time to look if too much waits; mostly not."""
        return self._num_unchecked_steps >= self._check_steps or self._num_unsent_bytes > 0

    async def has_room(self) -> None:
        """Wait while too much is unanswered or unread, so that a client that reads slowly is read from slowly.

        What is queued counts by the size of its answers. A stream of one session is read from no more while half of
        its queue is full; where there are more, one full queue must not hold up the others, so it is refused.
        """
        settings = self._lane.settings
        while not self._lane.is_whole:
            self._facts.steps_in += self._num_unchecked_steps
            self._num_unchecked_steps = 0
            num_steps = self._link.num_unanswered
            is_full = len(self._link.members) == 1 and num_steps > settings.max_inflight_steps // 2
            num_bytes = num_steps * self._writer.step_bytes + self._num_unsent_bytes
            if not is_full and num_bytes <= settings.max_unsent_bytes:
                return
            self._has_written.clear()
            await self._has_written.wait()

    async def write_to(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Write answers as they come, until the client has sent all and every session has ended, or it is gone."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                while self.answers or self._num_events or self._waiting:
                    for message in self._pack():
                        await context.write(message)
                    self._has_written.set()
                if self._is_finishing and not self._link.members:
                    return
                self._wakeup = loop.create_future()
                await self._wakeup
        except grpc.aio.InternalError:  # a message can't be written any more: the connection broke
            log.debug("a client of %s is gone", self._lane.name)
        finally:
            self._has_written.set()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Answer):
            num_rows = len(event.outputs[0])
            self.answers.append(event)
            self._num_unsent_bytes += self._writer.step_bytes * num_rows
            self._num_held_rows += num_rows
            if event.goes_on and self._num_held_rows < HELD_ROWS:
                return
        elif isinstance(event, StepsFailed):
            kind = pb.STEP_ERROR_KIND_SESSION_FAILED if event.is_over else pb.STEP_ERROR_KIND_STEP_REJECTED
            self._events.errors.add(
                handle=event.handle,
                position=event.position,
                length=event.num_steps,
                kind=kind,
                status=status_of(event.error),
                expected_position=event.expected,
            )
            self._facts.note("steps refused", handle=event.handle, position=event.position, reason=event.error.reason)
            self._count_event()
        elif event.state is not SessionState.OPEN:
            reason = pb.CLOSE_REASON_TAKEN_OVER if event.is_taken_over else CLOSE_REASONS[event.state]
            self._events.closed.add(handle=event.handle, position=event.position, reason=reason)
            self._facts.note("session closed", handle=event.handle, steps=event.position)
            self._count_event()
        self._wake()

    def _wake(self) -> None:
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    def _pack(self) -> list[bytes]:
        """Take all that waits: answers that are ready together travel together, as far as a message holds them."""
        messages, self._waiting = self._waiting, []
        answers, self.answers = self.answers, []
        self._facts.steps_out += self._num_held_rows
        self._num_unsent_bytes = self._num_held_rows = 0
        if answers or self._num_events:
            events = None
            if self._num_events:
                events, self._events = self._events, pb.StreamAnswer()
                self._num_events = 0
            messages += self._writer.write(answers, events)
        return messages
