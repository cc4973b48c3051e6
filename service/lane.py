"""One served model version: its sessions, scheduler and backend, put together without a clock or I/O.

Steps come in through `submit`, wait in an inbox so that messages that arrive together are queued together, and leave as
events to their links. The life of a run is  next_run -> Run.execute (on any thread) -> complete,  or `fail` where
execute raised.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from models.spec import StepMode
from service.backend import Backend
from service.config import Settings
from service.entries import join
from service.errors import (
    RunFailed,
    ServiceError,
    SpillFailed,
)
from service.events import Link, Steps, StepsFailed
from service.paging import Pager
from service.probe import Exactness
from service.roster import Roster
from service.runs import Run, advance
from service.scheduler import Batch, Dropped
from service.sessions import Session, SessionState, admit
from service.spill import SpillStore

Array = npt.NDArray[Any]


class Lane(Roster):
    """One served model version."""

    def __init__(
        self,
        name: str,
        version: int,
        backend: Backend,
        exactness: Exactness,
        settings: Settings,
        store: SpillStore | None = None,
        encoder: Lane | None = None,
    ) -> None:
        """Make room for sessions.

        store    takes the states of those that are too many for memory
        encoder  reads the sources that this one, a decoder, begins from
        """
        super().__init__(name, version, backend, exactness, settings, store)
        self.encoder = encoder
        self.fingerprint = ""
        """What its files were known by when they were loaded: see storage.Found."""
        self.run_costs: dict[tuple[int, int], float] = {}
        """Seconds of a run by its rows and steps, rounded up to powers of two: what the engine begins with."""
        self._pager: Pager | None = None
        if self.residence is not None:
            self._pager = Pager(self.residence, self.scheduler, self._refuse)

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
            self.scheduler.submit(
                slots,
                entries.lengths,
                entries.starts,
                entries.inputs,
                deadlines=entries.deadlines,
                arrived=entries.arrived,
            )

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
            self.free(self.scheduler.complete(batch))

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
            self.free(cancelled)
        if self.step_mode is not StepMode.GENERATIVE:  # whose calls are counted by service.generate
            self._count_requests(batch, cancelled, now, seconds)
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

    def _count_requests(self, batch: Batch, cancelled: set[int], now: float, seconds: float) -> None:
        is_first, is_last = batch.is_first, batch.is_last
        if cancelled:
            is_left = [slot not in cancelled for slot in batch.slots]
            is_first, is_last = ([a and b for a, b in zip(is_left, each, strict=True)] for each in (is_first, is_last))
        self.tally.count_requests(batch.arrived, is_first, is_last, now, seconds)

    def fail(self, run: Run, now: float) -> None:
        """A run failed: run each row alone, so that only sequences that fail by themselves are lost."""
        for index, slot in enumerate(run.batch.slots):
            part = self.runs.make(run.batch.row(index))
            try:
                outputs = part.execute()
            except RunFailed as error:
                self.lose([slot], error)
                self.scheduler.complete(part.batch)
                self.free([slot])
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
            self.free([slot])
        elif isinstance(error, SpillFailed):
            self._take_back(session, [(session.expected - session.applied, error)], now)
        else:
            self._fail(session, error, SessionState.FAILED)
