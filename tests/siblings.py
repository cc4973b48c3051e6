"""Workers without processes: engines on one loop, each with its unix socket, that ask each other as workers do."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
from aiohttp import web

from service.config import load_settings
from service.engine import Engine
from service.events import Closed, Steps
from service.repository import load_version
from service.rpc.handoff import Handoff
from service.rpc.peers import Peer, Place
from service.sessions import Terms
from service.spill import SpillStore
from tests.lanes import Client


class Worker:
    """An engine with one lane, and its part in moving sessions."""

    def __init__(
        self, repository: Path, model: str, place: Place, *, keeps_states: bool | None = None, **values: object
    ) -> None:
        if "max_resident_sessions" in values:
            values["spill_store"] = place.folder / f"{place.index}.states"
        values = load_settings({"repository": repository, "max_sessions": 64, **values})
        self.engine = Engine(values)
        self.store = SpillStore(values.spill_store) if values.spill_store else None
        self.lane = load_version(values, model, 1, self.store, keeps_states=keeps_states)
        self.engine.add(self.lane)
        self.handoff = Handoff(self.engine, [Peer(each.path) for each in place.siblings], place.index)
        self._path = place.path

    async def start(self) -> None:
        app = web.Application()
        app.add_routes(self.handoff.routes())
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self._path)).start()
        self.engine.start()

    async def stop(self) -> None:
        await self._runner.cleanup()
        await self.handoff.close()
        self.engine.stop()
        if self.store is not None:
            self.store.close()

    def stream(self, **link: object) -> Stream:
        return Stream(self, **link)

    @property
    def names(self) -> set[str]:
        return {session.terms.session_id for session in self.lane.sessions.by_slot.values()}


class Stream(Client):
    """A stream of one named session on one worker."""

    def __init__(self, worker: Worker, **link: object) -> None:
        super().__init__(worker.lane, **link)
        self.worker = worker
        self.position = -1
        self.was_live = False

    async def open_by_name(self, name: str = "a", **terms: object) -> Stream:
        wanted = Terms(**{"session_id": name, "linger_s": 60.0, **terms})
        worker = self.worker
        mover = worker.handoff.mover(worker.lane, self.link.outputs, emit_last=self.link.emit_last)
        async with mover.brought([wanted]):
            _, self.position, self.was_live = mover.open(self.link, wanted, worker.engine.clock())
        return self

    def put(self, x: np.ndarray, position: int | None = None) -> None:
        """Send steps; the engine runs them when it comes to it."""
        [session] = self.link.sessions.values()
        positions = None if position is None else [position]
        self.worker.engine.submit(self.lane, Steps(self.link, [session], positions, [len(x)], [x.tobytes()]))

    async def answered(self, num: int) -> None:
        """Wait for so many answered steps."""
        await until(lambda: len(self.answers()) >= num)

    def drop(self) -> None:
        """The connection breaks."""
        self.worker.engine.drop(self.lane, self.link)

    @property
    def is_over(self) -> bool:
        return bool(self.told(Closed))


async def until(holds: Callable[[], bool], pause_s: float = 0.001) -> None:
    """Let others run until something holds. Without a pause this thread may keep a run on another from ending."""
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110  what it waits for is the engine's own turns
            await asyncio.sleep(pause_s)


@asynccontextmanager
async def workers_of(
    repository: Path, model: str = "lstm", num: int = 2, **values: object
) -> AsyncIterator[list[Worker]]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        workers = [Worker(repository, model, Place(Path(folder), index, num), **values) for index in range(num)]
        for worker in workers:
            await worker.start()
        try:
            yield workers
        finally:
            for worker in workers:
                await worker.stop()


def rows_from(stream: Stream, start: int, stop: int) -> np.ndarray:
    answers = stream.answers()
    assert [position for position, _ in answers] == list(range(start, stop))
    return np.array([row for _, row in answers])
