"""Sequences of the Open Inference Protocol that live on another worker, and come to where they are wanted.

A sequence is a session with a name here, so that `service.rpc.handoff` can move it. Requests of one sequence that wait
for that keep their order: each has its turn.
"""

from __future__ import annotations

import asyncio

from service.engine import Engine
from service.events import Event, Link
from service.lane import Lane
from service.rpc.handoff import Handoff, Mover
from service.rpc.oip.options import Options
from service.rpc.oip.sequences import Key, Sequence, SequenceTable
from service.rpc.oip.tensors import InferPlan
from service.sessions import SessionState, Terms

POLL_S = 0.002
"""Time between looks whether the sequence that is replaced has answered its last request."""


class Movers:
    """Brings sequences, one claim to each at a time."""

    def __init__(self, engine: Engine, handoff: Handoff) -> None:
        self._engine = engine
        self._handoff = handoff
        self._turns: dict[_Name, tuple[asyncio.Lock, int]] = {}  # and for how many requests

    def is_moving(self, key: Key) -> bool:
        """Whether requests wait for their turn with a sequence, so that others have to wait behind them."""
        return _name(key) in self._turns

    def reserve(self, key: Key) -> asyncio.Lock:
        """Have a request wait for its turn: it is to lock what this returns, and to give it back by `release`."""
        lock, num = self._turns.get(_name(key), (asyncio.Lock(), 0))
        self._turns[_name(key)] = lock, num + 1
        return lock

    def release(self, key: Key) -> None:
        """A request has had its turn, or wants it no more."""
        lock, num = self._turns.pop(_name(key))
        if num > 1:
            self._turns[_name(key)] = lock, num - 1

    async def find_home(self, key: Key, lane: Lane) -> Lane | None:
        """Find another version than the one a request has found, on which its sequence lives on any worker.

        There is none unless the model's version has just changed.
        """
        model, version, _ = key
        others = [
            each
            for each in (*self._engine.lanes, *self._engine.besides(model))
            if each.name == model and each is not lane and version in ("", str(each.version))
        ]
        if not self._engine.besides(model):
            return None
        home = next((each for each in others if each.has_any([_session_id(key)])), None)
        if home is None:
            home = await self._handoff.find_home(others, [_session_id(key)])
        return home if home in (*self._engine.lanes, *self._engine.besides(model)) else None

    async def end_at(self, lane: Lane, key: Key) -> None:
        """End the sequence that lives on a version that was replaced, wherever it lived."""
        terms = Terms(session_id=_session_id(key))
        mover = self._handoff.mover(lane, [], emit_last=False)
        with self._engine.holding(lane):
            async with mover.brought([terms]):
                if lane.find(terms, self._engine.clock()) is not None:
                    link = Link(_ignore, [])
                    handle, _, _ = mover.open(link, terms, self._engine.clock())
                    lane.end(link.sessions[handle], SessionState.CLOSED)

    async def bring(self, table: SequenceTable, key: Key, plan: InferPlan, options: Options) -> Sequence:
        """Begin a sequence, in place of one that lives on any worker, or have the one that lives come here.

        Raises SessionNotFound where none lives and none is to begin, and SessionBusy, Unavailable and Exhausted.
        """
        lane = plan.lane
        terms = Terms(session_id=_session_id(key), resume_only=not options.is_start, priority=options.priority)
        mover = self._handoff.mover(lane, plan.all_outputs, emit_last=False)
        async with mover.brought([terms]) as refused:
            for error in refused.values():
                raise error
            if options.is_start:
                self._engine.check_open()
                await self._end(table, key, plan, mover, terms)
            elif lane.find(Terms(session_id=terms.session_id), self._engine.clock()) is None:
                raise table.missing(key)
            return table.begin(key, plan, terms, mover.open)

    async def _end(self, table: SequenceTable, key: Key, plan: InferPlan, mover: Mover, terms: Terms) -> None:
        """End the sequence that lives under the name, wherever it lived."""
        lane = plan.lane
        old = table.find_spelled(key, plan)
        if old is not None:
            old.end()
        while old is not None and not old.is_over:  # noqa: ASYNC110  its last request is to be answered first
            await asyncio.sleep(POLL_S)
        if lane.find(terms, self._engine.clock()) is not None:
            link = Link(_ignore, plan.all_outputs)
            handle, _, _ = mover.open(link, terms, self._engine.clock())
            lane.end(link.sessions[handle], SessionState.CLOSED)


def _session_id(key: Key) -> str:
    """Name of a sequence's session."""
    return f"inference/{key[2]!r}"


_Name = tuple[str, int | str]


def _name(key: Key) -> _Name:
    """Model and sequence: requests of different versions wait for each other too, which does no harm."""
    return key[0], key[2]


def _ignore(event: Event) -> None:
    """Nobody waits for what was replaced."""
