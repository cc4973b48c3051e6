"""How a model version leaves a server that runs.

New work finds it no more at once. What is live goes on, for a limited time or for as long as it lasts. Last, whoever
keeps something of the version lets go of it, so that its memory is given back.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from service.engine import Engine
from service.errors import Unavailable
from service.lane import Lane

log = logging.getLogger(__name__)
END_S = 1.0
"""Longest wait for clients that are told that it is over."""
POLL_S, MOST_POLL_S = 0.02, 0.5
"""Time between looks whether a version is still in use: at first, and after a while."""


class Streams(Protocol):
    """Connected clients of model versions."""

    def announce_unload(self, lane: Lane, grace_s: float) -> None:
        """Tell clients of a version that it will be gone after so long; infinity for no limit."""

    def are_open(self, lane: Lane) -> bool:
        """Whether clients of a version are connected."""

    def end_all(self, lane: Lane, error: Unavailable) -> None:
        """End the calls of clients of a version, and tell them why."""


@dataclass(slots=True)
class _Leaving:
    """A version on its way out."""

    task: asyncio.Task[None]
    ends_at: float
    """When what is live is ended, on the loop's clock."""


class Retirer:
    """Lets model versions leave, on the running loop."""

    def __init__(self, engine: Engine, on_gone: Callable[[Lane], None]) -> None:
        """Prepare.

        on_gone  called once nothing of a version is left here
        """
        self._engine = engine
        self._on_gone = on_gone
        self._leaving: dict[Lane, _Leaving] = {}
        self.streams: Sequence[Streams] = ()
        """Whose clients are told."""
        self.is_used_elsewhere: Callable[[Lane], Awaitable[bool]] = _nowhere
        """Asks other workers, whose sessions may come here, whether anything is live on a version."""
        self.keepers: Sequence[Callable[[Lane], None]] = ()
        """Whoever keeps something of a version: called when they are to forget it."""

    @property
    def leaving(self) -> list[Lane]:
        """Versions on their way out."""
        return list(self._leaving)

    def begin(self, lane: Lane, grace_s: float = math.inf) -> None:
        """Let a version leave, and end what is live on it after so long; one that leaves already may be hurried."""
        ends_at = asyncio.get_running_loop().time() + grace_s
        if (known := self._leaving.get(lane)) is not None:
            known.ends_at = min(known.ends_at, ends_at)
        else:
            self._engine.retire(lane)
            task = asyncio.create_task(self._leave(lane))
            task.add_done_callback(self._trim)  # while it runs it holds the version
            self._leaving[lane] = _Leaving(task, ends_at)
        for each in self.streams:
            each.announce_unload(lane, grace_s)

    def _trim(self, done: asyncio.Task[None]) -> None:
        """Give what a version took back to the operating system, on a thread."""
        if not done.cancelled():
            asyncio.get_running_loop().run_in_executor(None, _give_back)

    def close(self) -> None:
        """Let nothing more leave: the server stops."""
        for each in self._leaving.values():
            each.task.cancel()

    async def _leave(self, lane: Lane) -> None:
        engine, clock = self._engine, asyncio.get_running_loop().time
        idle_until = clock() + engine.settings.drain_s  # for streams without sessions
        await self._wait(
            lambda: (
                clock() >= self._leaving[lane].ends_at
                or not (engine.is_used(lane) or (self._has_streams(lane) and clock() < idle_until))
            )
        )
        self._end_all(lane)
        await asyncio.sleep(POLL_S)  # whoever was told is to hear of it
        told_until = clock() + END_S
        await self._wait(lambda: clock() >= told_until or not (engine.is_used(lane) or self._has_streams(lane)))
        await self._wait(lambda: not engine.is_used(lane))
        while await self.is_used_elsewhere(lane) or engine.is_used(lane):  # noqa: ASYNC110  nothing tells of it
            await asyncio.sleep(MOST_POLL_S)
        engine.forget(lane)
        for forget in self.keepers:
            forget(lane)
        self._on_gone(lane)
        await asyncio.sleep(POLL_S)
        gc.collect()  # a call that was cut off leaves a cycle behind, with the version in it
        del self._leaving[lane]
        log.info("%s/%d is unloaded", lane.name, lane.version)

    def _has_streams(self, lane: Lane) -> bool:
        return any(each.are_open(lane) for each in self.streams)

    def _end_all(self, lane: Lane) -> None:
        """End what is live, and tell whoever it is why."""
        error = Unavailable(
            f"{lane.name}/{lane.version} was unloaded: open a new session, of a version that is served, and begin anew"
        )
        self._engine.end_all(lane, error)
        for each in self.streams:
            each.end_all(lane, error)

    @staticmethod
    async def _wait(holds: Callable[[], bool]) -> None:
        """Wait until something holds, asked again and again, ever more seldom."""
        poll_s = POLL_S
        while not holds():
            await asyncio.sleep(poll_s)
            poll_s = min(1.1 * poll_s, MOST_POLL_S)


async def _nowhere(_: Lane) -> bool:
    """There are no others."""
    return False


def _give_back() -> None:
    """Have the C library give back what is free: glibc keeps hundreds of MB of a large model's weights for itself."""
    with suppress(AttributeError, OSError, TypeError):  # other C libraries have nothing to trim
        ctypes.CDLL(None).malloc_trim(0)
