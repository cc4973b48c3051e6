"""One served model version: its slots, sessions, scheduler and backend, put together without a clock or I/O.

A *link* is whoever holds sessions: a connected stream, or a Predict call. Steps come in through `submit`, wait in an
inbox so that messages that arrive together are queued together, and leave as events to their links. The life of a run
is  next_run -> Run.execute (on any thread) -> complete,  or `fail` where execute raised.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from models.spec import Layout, StepMode
from service.backend import Backend, Exactness
from service.config import Settings
from service.entries import Gathered, join
from service.errors import (
    Exhausted,
    NotFound,
    RunFailed,
    ServiceError,
    SessionExpired,
    SpillFailed,
)
from service.events import Closed, Link, Steps, StepsFailed
from service.paging import Pager
from service.residence import Residence
from service.runs import AnySlab, Run, RunMaker, advance, make_runner
from service.scheduler import Batch, BatchConfig, Dropped, Scheduler
from service.sessions import Session, SessionState, SessionTable, Terms, admit
from service.spill import SpillStore
from service.tally import Tally

Array = npt.NDArray[Any]
SLICE = 32
"""Sessions of a link that end in one turn of the event loop, at most."""


class Lane:
    """One served model version."""

    def __init__(
        self,
        name: str,
        version: int,
        backend: Backend,
        exactness: Exactness,
        settings: Settings,
        store: SpillStore | None = None,
    ) -> None:
        """Make room for sessions; a store takes the states of those that are too many for memory."""
        self.name = name
        self.version = version
        self.backend = backend
        self.exactness = exactness
        self.settings = settings
        self.graph = backend.graph
        self.step_mode, self.step_mode_reason = backend.spec.step_mode
        self.is_whole = self.step_mode is StepMode.BUFFERED
        self.step_inputs = [t for t in self.graph.inputs if t.layout is Layout.PER_STEP]
        self.is_output_per_step = [t.layout is Layout.PER_STEP for t in self.graph.outputs]
        self.tally = Tally()
        self.attained_s = 0.0  # see policies.Served
        is_coupled = exactness.verdict == "coupled" and not settings.batch_coupled_models
        # Cancelled sequences hold their slot until the run that they are in completes: room for one batch of them.
        num_slots = settings.max_sessions + settings.max_predict_sequences + settings.max_batch_rows
        max_resident = settings.max_sessions if self.is_whole or store is None else settings.max_resident_sessions
        num_rows = num_slots - settings.max_sessions + max_resident
        self.runner = make_runner(backend, num_rows, settings.max_batch_rows, settings.compute_threads)
        self.slab: AnySlab | Residence = self.runner.slab
        self.sessions = SessionTable()
        self.scheduler = Scheduler(
            num_slots,
            BatchConfig(
                max_rows=1 if is_coupled else settings.max_batch_rows,
                max_chunk_steps=settings.max_chunk_steps if exactness.is_chunkable else 1,
                whole=self.is_whole,
            ),
        )
        self.residence: Residence | None = None
        """Knows whose state is in memory; None where all are, as for a model that needs the whole sequence."""
        self._pager: Pager | None = None
        if store is not None and not self.is_whole:
            self.slab = self.residence = Residence(
                self.slab, self.graph.states, num_slots, max_resident, store, self.scheduler.is_running, self.tally
            )
            self._pager = Pager(self.residence, self.scheduler, self._refuse)
        self.num_predicting = 0
        """Sequences of Predict calls that hold a slot."""
        self.num_waiting_steps = 0
        """Steps of those that wait for one."""
        self.runs = RunMaker(backend, self.runner, settings.max_batch_rows, self.residence)
        self.row_types = [(np.dtype(t.dtype), (-1, *t.row_shape)) for t in self.step_inputs]
        self.inbox: list[Steps] = []
        """What has arrived and is not queued."""
        self.together: list[Link] = []
        """Links whose sessions are together."""
        self._detaching: set[Session] = set()  # they linger once what is queued is answered
        self.gathered = Gathered()

    # ---- sessions ---------------------------------------------------------------------------------------------------

    @property
    def num_sessions(self) -> int:
        """Live sessions of streams."""
        return len(self.sessions) - self.num_predicting

    def open(self, link: Link, terms: Terms, now: float) -> tuple[int, int, bool]:
        """Open or resume a session. Returns (handle, position expected next, whether it was resumed).

        A handle is used up even if this raises: SessionNotFound, Exhausted.
        """
        handle = link.num_opened
        link.num_opened += 1
        session = self.find(terms, now)
        if session is None:
            if self.num_sessions >= self.settings.max_sessions:
                raise Exhausted(
                    f"{self.num_sessions} sessions are live, the limit (max_sessions) is {self.settings.max_sessions}; "
                    "close some first, or ask again later",
                    retry_after_s=1.0,
                )
            slot = int(self.slab.allocate(1)[0]) if self.residence is None else self.residence.admit()
            session = self.sessions.open(slot, link, handle, terms, now)
            self.tally.sequences += 1
            was_live = False
        else:
            self.flush()
            self._detaching.discard(session)
            self._leave(session, SessionState.CLOSED, is_taken_over=True)
            self.sessions.resume(session, link, handle, terms, now)
            was_live = True
        self.scheduler.prioritize(session.slot, terms.priority)
        link.sessions[handle] = session
        link.version += 1
        link.members.add(session)
        return handle, session.expected, was_live

    def close(self, link: Link, handle: int) -> None:
        """End a session once its queued steps are answered."""
        session = link.sessions.get(handle)
        if session is None:
            raise NotFound(f"handle {handle} is not open on this stream", field="closes")
        self.flush()
        del link.sessions[handle]
        link.version += 1
        self.sessions.drain(session)
        if inputs := self.gathered.take(session):
            self.scheduler.submit([session.slot], [len(inputs[0])], [0], inputs)
        if not self.scheduler.is_busy(session.slot):
            self.end(session, SessionState.CLOSED)

    def finish(self, link: Link, now: float) -> None:
        """The client has sent all: close every session once it is answered, or detach it if it lingers."""
        self.flush()
        for handle, session in list(link.sessions.items()):
            if not session.terms.linger_s:
                self.close(link, handle)
            elif self.scheduler.is_busy(session.slot):
                self._detaching.add(session)
            else:
                self._detach(session, now)

    def drop(self, link: Link, now: float) -> bool:
        """The connection is gone: free some of its sessions, or detach those that linger. Returns whether all are."""
        self.flush()
        link.sink = lambda _: None
        link.is_gone = True
        link.sessions.clear()
        link.version += 1
        for session in list(islice(link.members, SLICE)):
            self._let_go(session, now)
        return not link.members

    def find(self, terms: Terms, now: float) -> Session | None:
        """Find the live session of that name. Raises SessionNotFound where the terms want one and there is none."""
        session = self.sessions.find(terms)
        if session is not None and session.link is not None and session.link.is_gone:  # its turn to go has not come yet
            self._let_go(session, now)
            session = self.sessions.find(terms)
        return session

    def _let_go(self, session: Session, now: float) -> None:
        """Free a session whose connection is gone, or detach it if it lingers."""
        session.link.members.discard(session)
        if not self.sessions.detach(session, now):
            self.end(session, SessionState.CLOSED)

    def expire(self, now: float) -> None:
        """End sessions that are past their linger or idle limit."""
        self.flush()
        for session, idle_s, limit_s in self.sessions.expired(now, self.settings.session_idle_s):
            if not self.scheduler.is_busy(session.slot):
                error = SessionExpired(session.name, idle_s=idle_s, limit_s=limit_s)
                self._fail(session, error, SessionState.EXPIRED)
        if self.residence is not None:
            self.residence.sweep()

    def _detach(self, session: Session, now: float) -> None:
        self._detaching.discard(session)
        self._leave(session, SessionState.OPEN)
        self.sessions.detach(session, now)

    def _leave(self, session: Session, state: SessionState, *, is_taken_over: bool = False) -> None:
        """Take a session from its link, and tell the link."""
        link: Link | None = session.link
        if link is None:
            return
        closed = Closed(session.handle, session.applied, state, is_taken_over)
        if link.wants_states and state is SessionState.CLOSED:
            try:
                closed.final_states = [row[0] for row in self.slab.read(np.array([session.slot]))]
            except RunFailed as error:
                link.sink(StepsFailed(session.handle, session.applied, 0, error, session.applied, is_over=True))
        link.sessions.pop(session.handle, None)
        link.version += 1
        link.members.discard(session)
        link.sink(closed)

    def end(self, session: Session, state: SessionState) -> None:
        """End a session and free its slot: at once, or when the run that holds it completes."""
        link: Link | None = session.link
        if link is not None:
            self.num_predicting -= link.is_predicting
            self._leave(session, state)
        self.sessions.end(session, state)
        self._detaching.discard(session)
        self.gathered.take(session)
        if not self.scheduler.cancel(session.slot):
            self.slab.free(np.array([session.slot]))
        self.scheduler.prioritize(session.slot)

    def _fail(self, session: Session, error: ServiceError, state: SessionState) -> None:
        """End a session through a fault or a limit of the server, and tell its link why."""
        self.flush()  # what has arrived for a session must not outlive it
        link: Link | None = session.link
        if link is not None:
            self.tally.count_rejected(error.reason)
            lost = session.expected - session.applied
            link.sink(StepsFailed(session.handle, session.applied, lost, error, session.applied, is_over=True))
        self.end(session, state)

    # ---- steps in ---------------------------------------------------------------------------------------------------

    @property
    def num_queued_steps(self) -> int:
        """Steps that are queued or running, or kept until their whole sequence has come."""
        return self.scheduler.num_queued_steps + self.gathered.num_steps + self.num_waiting_steps

    def submit(self, steps: Steps, now: float) -> None:
        """Take steps; they are queued by the next `flush`, together with what else has arrived by then."""
        steps.arrived_at = now
        self.inbox.append(steps)

    def flush(self) -> None:
        """Queue what has arrived, and let every session count for itself."""
        while self.together:
            self.part(self.together[-1])
        if not self.inbox:
            return
        inbox, self.inbox = self.inbox, []
        if len(inbox) == 1:
            self._queue(inbox, inbox[0].sessions)
            return
        sessions = [session for steps in inbox for session in steps.sessions]
        if len(set(sessions)) == len(sessions):
            self._queue(inbox, sessions)
        else:  # several messages for one session: in order
            for steps in inbox:
                self._queue([steps], steps.sessions)

    def part(self, link: Link) -> None:
        """Part the sessions of a link that are together."""
        if link.crew is not None:
            link.crew.part()
            link.crew = None
        self.together.remove(link)

    def _queue(self, messages: list[Steps], sessions: list[Session]) -> None:
        """Admit and schedule entries, one a session."""
        entries = join(messages, sessions, self.row_types)
        for session in sessions:
            session.used_at = messages[0].arrived_at
        faults = entries.faults(self.step_inputs, self.settings, self.num_queued_steps)
        if self.graph.fixed_steps is not None:
            faults |= entries.too_long(self.graph.fixed_steps)
        admission = admit(sessions, entries.lengths, entries.positions, self.settings.max_inflight_steps, faults)
        if admission is not None:
            for index, error in admission.refusals:
                session, length = sessions[index], entries.lengths[index]
                self._tell_failed(session, session.sent - length, length, error)
            for index, start, stop in admission.replays:
                self.runs.replay(sessions[index], start, stop, is_entry_whole=stop - start == entries.lengths[index])
            entries.skip(admission.skips)
            if not entries.sessions:
                return
        if self.is_whole:
            self.gathered.add(entries)
        else:
            slots = [session.slot for session in entries.sessions]
            self.scheduler.submit(slots, entries.lengths, entries.starts, entries.inputs, deadlines=entries.deadlines)

    def _tell_failed(self, session: Session, position: int, num_steps: int, error: ServiceError) -> None:
        self.tally.count_rejected(error.reason)
        if session.link is not None:
            session.link.sink(StepsFailed(session.handle, position, num_steps, error, session.expected))

    # ---- runs -------------------------------------------------------------------------------------------------------

    def next_run(self, now: float) -> Run | None:
        """Form the next run, or None if nothing is ready."""
        for dropped in self.scheduler.expire(now):
            self._tell_expired(dropped, now)
        batch = self.scheduler.next_batch() if self._pager is None else self._pager.next_batch(now)
        if batch is None:
            return None
        try:
            return self.runs.make(batch)
        except Exception:
            self.abandon(batch)
            raise

    def abandon(self, batch: Batch, error: RunFailed | None = None) -> None:
        """End the sessions of a batch that lost states, a bug, or want of memory keep from being completed."""
        if self.scheduler.is_in_flight(batch):
            self.lose(batch.slots, error or RunFailed("the server failed to run this step; its log says how"))
            self.slab.free(np.array(sorted(self.scheduler.complete(batch))))

    def lose(self, slots: list[int], error: ServiceError) -> None:
        """End the sessions that hold some slots."""
        for session in [self.sessions.by_slot[slot] for slot in slots if slot in self.sessions.by_slot]:
            self._fail(session, error, SessionState.FAILED)

    def complete(self, run: Run, outputs: list[Array], now: float, seconds: float) -> None:
        """Take the results of a run: answer links, end what drains."""
        batch = run.batch
        self.tally.count_run(len(batch.slots), sum(batch.counts), seconds)
        cancelled = self.scheduler.complete(batch)
        if cancelled:
            self.slab.free(np.array(sorted(cancelled)))
        by_slot = self.sessions.by_slot
        positions, rows_of, ending = advance(batch, cancelled, by_slot, now)
        outputs = self.runs.flatten(batch, outputs)
        if self.sessions.num_replaying:
            for rows in rows_of.values():
                self.runs.keep(batch, outputs, rows, positions, by_slot)
        for link, rows in rows_of.items():
            if link is not None and (answer := self.runs.answer(link, batch, outputs, rows, positions, by_slot)):
                link.sink(answer)
        for session in ending:
            if not self.scheduler.is_busy(session.slot):
                self.end(session, SessionState.CLOSED)
        if self._detaching:
            for session in [s for s in self._detaching if not self.scheduler.is_busy(s.slot)]:
                self._detach(session, now)

    def fail(self, run: Run, now: float) -> None:
        """A run failed: run each row alone, so that only sequences that fail by themselves are lost."""
        for index, slot in enumerate(run.batch.slots):
            part = self.runs.make(run.batch.row(index))
            try:
                outputs = part.execute()
            except RunFailed as error:
                self.lose([slot], error)
                self.scheduler.complete(part.batch)
                self.slab.free(np.array([slot]))
            else:
                self.complete(part, outputs, now, 0.0)

    def _tell_expired(self, dropped: Dropped, now: float) -> None:
        session = self.sessions.by_slot[dropped.slot]
        self._take_back(session, session.expired_parts(dropped.num_expired, dropped.num_behind), now)

    def _take_back(self, session: Session, parts: list[tuple[int, ServiceError]], now: float) -> None:
        """Reject all that was queued for a session and is not any more: (number of steps, why), in order."""
        session.reject(sum(count for count, _ in parts))
        position = session.expected
        for count, error in parts:
            if count:
                self._tell_failed(session, position, count, error)
            position += count
        if session.state is SessionState.DRAINING:
            self.end(session, SessionState.CLOSED)
        elif session in self._detaching:
            self._detach(session, now)

    def _refuse(self, slot: int, error: ServiceError, now: float) -> None:
        """A slot's state can't be had: reject what was queued for it, or end its session if the state is lost."""
        session = self.sessions.by_slot.get(slot)
        if session is None:  # dropped while it waited
            self.slab.free(np.array([slot]))
        elif isinstance(error, SpillFailed):
            self._take_back(session, [(session.expected - session.applied, error)], now)
        else:
            self._fail(session, error, SessionState.FAILED)
