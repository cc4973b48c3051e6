"""The sequences of one served model version, and who holds them: opened, handed on, detached, ended.

A *link* is whoever holds sessions: a connected stream, or a call. What a sequence is given once, beside its steps, is
put down when it begins (`service.constants`), and its slot is free for another when it ends.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from models.spec import Layout
from service.backend import Backend
from service.config import Settings
from service.constants import Constants
from service.entries import Gathered
from service.errors import Exhausted, InvalidInput, NotFound, RunFailed, ServiceError, SessionExpired, Unavailable
from service.events import Closed, Link, Steps, StepsFailed
from service.probe import Exactness
from service.residence import Residence
from service.runs import AnySlab, RunMaker, make_runner
from service.scheduler import BatchConfig, Scheduler
from service.sessions import Session, SessionState, SessionTable, Terms
from service.spill import SpillStore
from service.tally import Cause, Tally

log = logging.getLogger("rnnserve.access")
Array = npt.NDArray[Any]
SLICE = 32
"""Sessions of a link that end in one turn of the event loop, at most."""
_CAUSES = {
    SessionState.CLOSED: Cause.CLOSED,
    SessionState.EXPIRED: Cause.EXPIRED,
    SessionState.FAILED: Cause.FAILED,
}


class Roster(ABC):
    """Slots and sessions of one model version."""

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
        self.about = {"facts": {"model": name, "version": version}}
        """For log lines, as their `extra`."""
        self.backend = backend
        self.exactness = exactness
        self.settings = settings
        self.graph = backend.graph
        self.step_mode, self.step_mode_reason = backend.spec.step_mode
        self.is_whole = backend.is_whole
        self.step_inputs = [t for t in self.graph.inputs if t.layout is Layout.PER_STEP]
        self.is_output_per_step = [t.layout is Layout.PER_STEP for t in self.graph.outputs]
        self.tally = Tally()
        self.attained_s = 0.0  # see policies.Served
        max_rows = min(settings.max_batch_rows, backend.spec.max_batch or settings.max_batch_rows)
        if exactness.verdict == "coupled" and not settings.batch_coupled_models:
            max_rows = 1
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
                max_rows=max_rows,
                max_chunk_steps=settings.max_chunk_steps if exactness.is_chunkable else 1,
                whole=self.is_whole,
            ),
        )
        self._begins = [(n, s.begins.array()) for n, s in enumerate(self.graph.states) if s.begins is not None]
        self.residence: Residence | None = None
        """Knows whose state is in memory; None where all are, as for a model that needs the whole sequence."""
        if store is not None and not self.is_whole:
            self.slab = self.residence = Residence(
                self.slab, self.graph.states, num_slots, max_resident, store, self.scheduler.is_running, self.tally
            )
        self.num_predicting = 0
        """Sequences of Predict calls that hold a slot."""
        self.num_waiting_steps = 0
        """Steps of those that wait for one."""
        self.constants = Constants(self.graph, num_slots) if Constants.of(self.graph) else None
        """What each sequence is given once; None where the model takes nothing so."""
        self.runs = RunMaker(backend, self.runner, settings.max_batch_rows, self.residence, self.constants)
        self.row_types = [(np.dtype(t.dtype), (-1, *t.row_shape)) for t in self.step_inputs]
        self.inbox: list[Steps] = []
        """What has arrived and is not queued."""
        self.together: list[Link] = []
        """Links whose sessions are together."""
        self._detaching: set[Session] = set()  # they linger once what is queued is answered
        self.gathered = Gathered()

    @abstractmethod
    def flush(self) -> None:
        """Queue what has arrived, and let every session count for itself."""

    @property
    def num_sessions(self) -> int:
        """Live sessions of streams."""
        return len(self.sessions) - self.num_predicting

    def open(self, link: Link, terms: Terms, now: float, given: list[Array] | None = None) -> tuple[int, int, bool]:
        """Open or resume a session. Returns (handle, position expected next, whether it was resumed).

        given  what a new one is given once, as `service.constants` takes it for one sequence
        A handle is used up even if this raises: SessionNotFound, Exhausted, InvalidInput.
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
            if self.constants is not None and given is None:
                raise InvalidInput(
                    f"{self.name} takes {', '.join(self.constants.names)} once a sequence: open it in a frame that "
                    "carries them, a row for each session that it opens",
                    field="tensors",
                )
            slot = int(self.slab.allocate(1)[0]) if self.residence is None else self.residence.admit()
            self.begin([slot])
            if self.constants is not None and given is not None:
                self.constants.put([slot], [[row] for row in given])
            session = self.sessions.open(slot, link, handle, terms, now)
            self.tally.sequences += 1
            self.tally.sessions_opened += 1
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

    def begin(self, slots: Sequence[int]) -> None:
        """Give slots that were taken just now the states that the model begins with, where those are no zeros."""
        for index, row in self._begins:
            self.slab.write(np.array(slots, dtype=np.int64), index, np.broadcast_to(row, (len(slots), *row.shape)))

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
            self.scheduler.submit([session.slot], [len(inputs[0])], [0], inputs, arrived=[session.used_at])
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

    def has_any(self, names: Iterable[str]) -> bool:
        """Whether a session of one of those names is live."""
        return any(self.sessions.find(Terms(session_id=name)) is not None for name in names)

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
            self.end(session, SessionState.CLOSED, Cause.DISCONNECTED)

    def expire(self, now: float) -> None:
        """End sessions that are past their linger or idle limit."""
        self.flush()
        for session, idle_s, limit_s in self.sessions.expired(now, self.settings.session_idle_s):
            is_call = session.link is not None and session.link.is_predicting
            if not is_call and not self.scheduler.is_busy(session.slot):
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

    def end(self, session: Session, state: SessionState, cause: Cause | None = None) -> None:
        """End a session and free its slot: at once, or when the run that holds it completes.

        cause  where the state does not tell
        """
        link: Link | None = session.link
        if link is None or not link.is_predicting:
            self.tally.sessions_ended[cause or _CAUSES[state]] += 1
            if self.settings.access_log == "sessions":
                self._log_end(session, cause or _CAUSES[state])
        if link is not None:
            self.num_predicting -= link.is_predicting
            self._leave(session, state)
        self.sessions.end(session, state)
        self._detaching.discard(session)
        self.gathered.take(session)
        if not self.scheduler.cancel(session.slot):
            self.free([session.slot])
        self.scheduler.prioritize(session.slot)

    def _log_end(self, session: Session, cause: Cause) -> None:
        facts = {**self.about["facts"], "cause": cause.value, "steps": session.applied}
        if name := session.terms.session_id or (session.link.name if session.link is not None else ""):
            facts["session_id"] = name
        log.info("session", extra={"facts": facts})

    def free(self, slots: Iterable[int]) -> None:
        """Give back slots whose sequences have ended."""
        numbers = sorted(slots)
        if self.constants is not None:
            self.constants.drop(numbers)
        self.slab.free(np.array(numbers, dtype=np.int64))

    def _fail(self, session: Session, error: ServiceError, state: SessionState) -> None:
        """End a session through a fault or a limit of the server, and tell its link why."""
        self.flush()  # what has arrived for a session must not outlive it
        link: Link | None = session.link
        if link is not None:
            self.tally.count_rejected(error.reason)
            lost = session.expected - session.applied
            link.sink(StepsFailed(session.handle, session.applied, lost, error, session.applied, is_over=True))
        self.end(session, state, Cause.DRAINED if isinstance(error, Unavailable) else None)
