"""Sequences whose steps are made of the answers to those before, as work for their lane's scheduler.

Laws:

    a sequence holds its slots (beams: as many as the search is wide) from its first step to its end
    it has at most one entry queued in each; the next is made of the answer to the last
    while a caller does not take what is made, nothing more is queued for its sequences
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from models.spec import Generation
from service.beams import BeamSearch
from service.entries import queue_full
from service.errors import Exhausted, RunFailed, ServiceError
from service.events import Answer, Event, Link, StepsFailed
from service.facts import current
from service.generation import ENTRY_BYTES, End, FinishReason, Made, Request
from service.lane import Lane
from service.predict import open_sequences
from service.sampling import Draws, choose
from service.sessions import Session, SessionState

Array = npt.NDArray[Any]
MADE_BYTES = 1024 * 1024
"""Most that is made ahead of a caller, beyond one run: what is made travels in one message."""


class Decoding(ABC):
    """A call: begins its sequences as slots come free, and makes the next step of each of its answer."""

    def __init__(
        self,
        lane: Lane,
        generation: Generation,
        request: Request,
        states: list[Array | None],
        constants: list[list[Array] | Array],
    ) -> None:
        """Check that there is room. Raises Exhausted, and Overloaded when the lane's queue has none."""
        self.lane = lane
        self.priority = request.priority
        self.width = request.beams
        self.arrived_at = 0.0
        self._generation = generation
        self._request = request
        self._states = states
        self._constants = constants
        self._made = Made()
        self._has_news = asyncio.Event()
        self._error: ServiceError | None = None
        self._num_fed = 0
        self._num_done = 0
        self._held: list[tuple[Session, Array | int]] = []  # next entries, while the caller is slow
        settings = lane.settings
        self._limit = min(MADE_BYTES, settings.max_unsent_bytes)
        if self.width > settings.max_predict_sequences:
            raise Exhausted(
                f"{self.width} beams need as many slots, the limit (max_predict_sequences) is "
                f"{settings.max_predict_sequences}",
                field="beams",
            )
        num_steps = sum(map(len, request.prompts)) or request.num
        if lane.num_queued_steps + num_steps > settings.max_queued_steps:
            raise queue_full(num_steps, lane.num_queued_steps, settings)
        outputs = request.outputs
        if generation.token_input:
            outputs = [[t.name for t in lane.graph.outputs].index(generation.scores_output)]
        self.link = Link(
            self._take, outputs, emit_last=bool(generation.token_input), is_predicting=True, trace=current().trace
        )

    # ---- as predict.Call --------------------------------------------------------------------------------------------

    @property
    def is_fed(self) -> bool:
        """Whether every sequence has been begun."""
        return self._num_fed == self._request.num

    @property
    def num_held(self) -> int:
        """Slots that it holds."""
        return len(self.link.members)

    def feed(self, room: int, now: float) -> None:
        """Begin sequences in at most `room` more slots."""
        first = self._num_fed
        num = min(room // self.width, self._request.num - first)
        self._num_fed += num
        chosen = np.repeat(np.arange(first, first + num), self.width)  # the sequence of each slot
        sessions = open_sequences(
            self.lane,
            self.link,
            len(chosen),
            [rows if rows is None else rows[chosen] for rows in self._states],
            now,
            self.priority,
            [
                rows[chosen] if isinstance(rows, np.ndarray) else [rows[each] for each in chosen.tolist()]
                for rows in self._constants
            ],
        )
        for index in range(num):
            self._start(first + index, sessions[index * self.width : (index + 1) * self.width])
        self._queue()

    def withdraw(self) -> None:
        """Feed no more; `drop` frees what is held."""
        self._held = []

    # ---- the caller's side ------------------------------------------------------------------------------------------

    async def take(self) -> Made | None:
        """Wait for what is made next; None when every sequence has ended. Raises what ended the call."""
        while not self._made:
            if self._error is not None:
                raise self._error
            if self._num_done == self._request.num:
                return None
            self._has_news.clear()
            await self._has_news.wait()
        made, self._made = self._made, Made()
        return made

    def resume(self) -> None:
        """The caller has got rid of what it took: go on with what was held back."""
        self._queue()

    # ---- the lane's side --------------------------------------------------------------------------------------------

    def _take(self, event: Event) -> None:
        if isinstance(event, StepsFailed):
            self._fail(event.error)
        elif isinstance(event, Answer) and self._error is None:
            try:
                self._go_on(event)
            except ServiceError as error:
                self._fail(error)
            self._queue()
            self._has_news.set()

    def _fail(self, error: ServiceError) -> None:
        self._error = self._error or error
        self._held = []
        self._has_news.set()

    def _queue(self) -> None:
        """Queue the next entries, unless the caller has much to take."""
        if not self._held or self._made.num_bytes > self._limit or self._error is not None:
            return
        held, self._held = self._held, []
        if self._generation.token_input:
            tokens = [np.atleast_1d(np.asarray(entry, dtype=np.int64)) for _, entry in held]
            lengths = [len(ids) for ids in tokens]
            payload = [np.concatenate(tokens)]
        else:
            lengths, payload = [int(entry) for _, entry in held], []
        for (session, _), length in zip(held, lengths, strict=True):
            session.expected += length
        starts = [0, *accumulate(lengths)][:-1]
        arrived = None
        if self.link.trace is not None:  # the first entries have waited as long as the call has
            arrived = [0.0 if session.applied else self.arrived_at for session, _ in held]
        slots = [session.slot for session, _ in held]
        self.lane.scheduler.submit(slots, lengths, starts, payload, arrived=arrived)

    def _end(self, sessions: list[Session]) -> None:
        """A sequence is over: its slots are free at once."""
        self._num_done += 1
        for session in sessions:
            self.lane.end(session, SessionState.CLOSED)

    @abstractmethod
    def _start(self, sequence: int, sessions: list[Session]) -> None:
        """Hold the first entry of a sequence ready."""

    @abstractmethod
    def _go_on(self, answer: Answer) -> None:
        """Take the answer to an entry of each of some sequences. Raises RunFailed where scores are no numbers."""


class Chain(Decoding):
    """Sequences of which one id after another is chosen, or drawn."""

    @dataclass(slots=True, eq=False)
    class _Live:
        sequence: int
        session: Session
        draws: Draws | None
        num_ids: int = 0
        total: float = 0.0

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._lives: dict[int, Chain._Live] = {}  # by handle

    def _start(self, sequence: int, sessions: list[Session]) -> None:
        [session] = sessions
        seeds = self._request.seeds
        draws = Draws(seeds[sequence]) if self._request.choice.temperature else None
        self._lives[session.handle] = Chain._Live(sequence, session, draws)
        self._held.append((session, self._request.prompts[sequence]))

    def _go_on(self, answer: Answer) -> None:
        scores = answer.outputs[0]
        _check(scores)
        lives = [self._lives[handle] for handle in answer.handles]
        draws = None
        if self._request.choice.temperature:
            draws = np.array([live.draws.at(live.num_ids) for live in lives if live.draws is not None])
        chosen = choose(scores, self._request.choice, draws)
        log_probs = scores[np.arange(len(lives)), chosen].tolist()
        made, end_id, max_steps = self._made, self._generation.end_id, self._request.max_steps
        for live, each, log_prob in zip(lives, chosen.tolist(), log_probs, strict=True):
            live.total += log_prob
            if each == end_id:
                self._finish(live, FinishReason.END)
                continue
            made.add(live.sequence, 0, live.num_ids, [each], [log_prob])
            live.num_ids += 1
            if live.num_ids == max_steps:
                self._finish(live, FinishReason.MAX_STEPS)
            else:
                self._held.append((live.session, each))

    def _finish(self, live: Chain._Live, reason: FinishReason) -> None:
        del self._lives[live.session.handle]
        self._made.ends.append(End(live.sequence, 0, reason, live.num_ids, live.total, live.total))
        self._end([live.session])


class Beams(Decoding):
    """Sequences that are searched for, each in as many slots as the search is wide: path i has its state in slot i."""

    @dataclass(slots=True, eq=False)
    class _Live:
        sequence: int
        sessions: list[Session]
        search: BeamSearch
        rows: dict[int, Array] = field(default_factory=dict)
        """Log-probabilities that came for each live path."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._lives: dict[int, tuple[Beams._Live, int]] = {}  # and number of the path, by handle

    def _start(self, sequence: int, sessions: list[Session]) -> None:
        request = self._request
        search = BeamSearch(
            width=self.width,
            num_wanted=request.num_hypotheses,
            max_steps=request.max_steps,
            end_id=self._generation.end_id,
            normalization=request.normalization,
        )
        live = Beams._Live(sequence, sessions, search)
        for path, session in enumerate(sessions):
            self._lives[session.handle] = live, path
        self._held.append((sessions[0], request.prompts[sequence]))

    def _go_on(self, answer: Answer) -> None:
        scores = answer.outputs[0]
        _check(scores)
        sources: list[int] = []  # slots whose state goes on in another one
        targets: list[int] = []
        for handle, row in zip(answer.handles, scores, strict=True):
            live, path = self._lives[handle]
            live.rows[path] = row
            search, sessions = live.search, live.sessions
            if len(live.rows) < len(search.live):
                continue
            rows, live.rows = live.rows, {}
            parents = search.advance(np.stack([rows[each] for each in range(len(rows))]))
            for path, parent in enumerate(parents):
                if path != parent:
                    sources.append(sessions[parent].slot)
                    targets.append(sessions[path].slot)
                self._held.append((sessions[path], search.live[path].ids[-1]))
            if not parents:
                self._finish(live)
        if targets:
            distinct = sorted(set(sources))
            states = self.lane.slab.read(np.array(distinct, dtype=np.int64))
            at = [distinct.index(slot) for slot in sources]
            for index, values in enumerate(states):
                self.lane.slab.write(np.array(targets, dtype=np.int64), index, values[at])

    def _finish(self, live: Beams._Live) -> None:
        for rank, found in enumerate(live.search.results):
            path = found.path
            if path.ids:
                self._made.add(live.sequence, rank, 0, list(path.ids), list(path.log_probs))
            reason = FinishReason.END if found.is_ended else FinishReason.MAX_STEPS
            self._made.ends.append(End(live.sequence, rank, reason, len(path.ids), path.total, found.score))
        for session in live.sessions:
            del self._lives[session.handle]
        self._end(live.sessions)


class Unrolling(Decoding):
    """Sequences whose every step sees the same inputs: their entries are chunks of steps without inputs."""

    @dataclass(slots=True, eq=False)
    class _Live:
        sequence: int
        session: Session
        num_steps: int = 0
        num_queued: int = 0
        """Steps that are queued or held, up to the end of an entry."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._lives: dict[int, Unrolling._Live] = {}  # by handle
        specs = self.lane.graph.outputs
        self._step_bytes = sum(
            int(np.prod(specs[index].row_shape)) * np.dtype(specs[index].dtype).itemsize for index in self.link.outputs
        )

    def _start(self, sequence: int, sessions: list[Session]) -> None:
        [session] = sessions
        live = self._lives[session.handle] = Unrolling._Live(sequence, session)
        self._hold(live)

    def _hold(self, live: Unrolling._Live) -> None:
        most = self.lane.scheduler.config.max_chunk_steps
        live.num_queued = min(most, self._request.max_steps - live.num_steps)
        self._held.append((live.session, live.num_queued))

    def _go_on(self, answer: Answer) -> None:
        made = self._made
        made.outputs.append(list(answer.outputs))
        for handle, length in zip(answer.handles, answer.lengths, strict=True):
            live = self._lives[handle]
            made.sequences.append(live.sequence)
            made.hypotheses.append(0)
            made.positions.append(live.num_steps)
            made.lengths.append(length)
            made.num_bytes += ENTRY_BYTES + length * self._step_bytes
            live.num_steps += length
            live.num_queued -= length
            if live.num_steps == self._request.max_steps:
                del self._lives[handle]
                made.ends.append(End(live.sequence, 0, FinishReason.MAX_STEPS, live.num_steps, 0.0, 0.0))
                self._end([live.session])
            elif not live.num_queued:  # else the rest of the entry comes with another run
                self._hold(live)


def _check(scores: Array) -> None:
    """Raise RunFailed where the model gave no log-probabilities."""
    if np.isnan(scores).any() or (scores.max(axis=1) == -np.inf).any():
        raise RunFailed("the model's log-probabilities are no numbers: it can't be generated from with these inputs")
