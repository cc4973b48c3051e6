"""What a server does when its models change: loads, lets take work, lets leave."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Collection

from grpc_health.v1 import health, health_pb2

from service.changes import Key
from service.engine import Engine
from service.errors import ModelNotFound
from service.lane import Lane
from service.repository import Loaded, load_found
from service.rpc.retiring import Retirer

log = logging.getLogger(__name__)


class OwnHands:
    """Hands of one server, on the running loop: see catalog.Hands."""

    def __init__(self, engine: Engine, loaded: Loaded, health_of: health.aio.HealthServicer) -> None:
        """health_of  tells of every version that is served."""
        self._engine = engine
        self._loaded = loaded
        self._health = health_of
        self._ready: dict[Key, Lane] = {}
        self.retirer = Retirer(engine, self._forget)
        """Lets versions leave."""

    @property
    def is_stopping(self) -> bool:
        """Whether the server drains."""
        return self._engine.is_draining

    @property
    def prints(self) -> dict[Key, str]:
        """What the files of those that are served were known by."""
        return {(lane.name, lane.version): lane.fingerprint for lane in self._engine.lanes}

    @property
    def leaving_prints(self) -> dict[Key, str]:
        """What the files of those on their way out were known by."""
        return {(lane.name, lane.version): lane.fingerprint for lane in self.retirer.leaving}

    async def announce(self) -> None:
        """Let health say what is served."""
        for lane in self._engine.lanes:
            await self._set_health((lane.name, lane.version))

    async def load(self, key: Key, fingerprint: str) -> None:
        """Load a version on a thread, so that the others are served meanwhile. Raises ModelBroken and its kin."""
        if self.prints.get(key) == fingerprint:
            return
        lane = await asyncio.to_thread(load_found, self._engine.settings, self._loaded, key, fingerprint)
        self.drop(key)
        self._ready[key] = lane
        self._engine.prepare(lane)

    def drop(self, key: Key) -> None:
        """Let go of what was loaded and is not to be served."""
        if (lane := self._ready.pop(key, None)) is not None:
            self._engine.forget(lane)

    async def switch(self, serve: Collection[Key], retire: Collection[Key], grace_s: float) -> None:
        """Let versions that are ready take work, and let others leave, in one turn of the loop."""
        late = self.retirer.leaving if math.isfinite(grace_s) else []
        leaving = [lane for lane in (*self._engine.lanes, *late) if (lane.name, lane.version) in retire]
        for key in serve:
            if (lane := self._ready.pop(key, None)) is None:
                continue  # it is served
            if (replaced := self._find(key)) is not None:
                leaving.append(replaced)
            self._loaded.lanes.append(lane)
            self._engine.add(lane)
        for lane in leaving:
            self.retirer.begin(lane, grace_s)
        for key in {*serve, *((lane.name, lane.version) for lane in leaving)}:
            await self._set_health(key)

    async def begin_retired(self, key: Key, fingerprint: str) -> None:
        """Load a version for sessions that may come to it from others, but for nothing new. Raises as `load`."""
        await self.load(key, fingerprint)
        if (lane := self._ready.pop(key, None)) is not None:
            self._loaded.lanes.append(lane)
            self.retirer.begin(lane)

    async def leaving(self) -> dict[Key, int]:
        """Versions on their way out, and how many sessions are live on each."""
        found: dict[Key, int] = {}
        for lane in self.retirer.leaving:
            key = (lane.name, lane.version)
            found[key] = found.get(key, 0) + lane.num_sessions
        return found

    async def tell_broken(self) -> None:
        """Nothing to do: they look at the same list."""

    def _find(self, key: Key) -> Lane | None:
        try:
            return self._engine.lane(*key)
        except ModelNotFound:
            return None

    def _forget(self, lane: Lane) -> None:
        if lane in self._loaded.lanes:
            self._loaded.lanes.remove(lane)

    async def _set_health(self, key: Key) -> None:
        """Tell of a model, and of one of its versions, whether they are served."""
        status = health_pb2.HealthCheckResponse
        names = {key[0]: any(lane.name == key[0] for lane in self._engine.lanes)}
        names["/".join(map(str, key))] = self._find(key) is not None
        for name, is_served in names.items():
            await self._health.set(name, status.SERVING if is_served else status.NOT_SERVING)
