"""The models of a server that runs: what is on disk, what is served, loading and unloading.

Unloading is a drain of one version. New work is refused at once; what is live has `drain_s` to end, and is then ended
with the reason; last, whoever keeps something of the version lets go of it, so that its memory is given back.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from grpc_health.v1 import health, health_pb2

from service.engine import Engine
from service.errors import ModelBroken, ModelNotFound, Unavailable, Unimplemented
from service.lane import Lane
from service.repository import Broken, Loaded, load_version, models_on_disk

log = logging.getLogger(__name__)
READY, UNLOADING, UNAVAILABLE = "READY", "UNLOADING", "UNAVAILABLE"
END_S = 1.0
"""Longest wait for clients that are told that it is over."""
POLL_S = 0.02
"""Time between looks whether a version that is unloaded is still in use."""


class Streams(Protocol):
    """Connected clients of model versions."""

    def announce_unload(self, lane: Lane, grace_s: float) -> None:
        """Tell clients of a version that it will be gone after so long."""

    def are_open(self, lane: Lane) -> bool:
        """Whether clients of a version are connected."""

    def end_all(self, lane: Lane, error: Unavailable) -> None:
        """End the calls of clients of a version, and tell them why."""


class Catalog:
    """Loads and unloads model versions, on the running loop."""

    def __init__(
        self, engine: Engine, loaded: Loaded, health_of: health.aio.HealthServicer, *, can_change: bool = True
    ) -> None:
        """Begin with what was loaded at start.

        health_of   tells of every version that is served
        can_change  whether anything may be loaded or unloaded later
        """
        self._engine = engine
        self._loaded = loaded
        self._health = health_of
        self._can_change = can_change
        self._is_loading = asyncio.Lock()
        self._leaving: dict[Lane, asyncio.Task[None]] = {}
        self.streams: Sequence[Streams] = ()
        """Whose clients are told when a version is unloaded."""
        self.keepers: Sequence[Callable[[Lane], None]] = ()
        """Whoever keeps something of a version: called when they are to forget it."""

    async def announce(self, lane: Lane) -> None:
        """Let health say that a version is served."""
        await self._set_health(lane, is_served=True)

    def entries(self, *, is_ready: bool) -> list[tuple[str, int, str, str]]:
        """List (model, version, state, reason) in order; is_ready: only those that are served."""
        known = {(lane.name, lane.version): (READY, "") for lane in self._engine.lanes}
        if not is_ready:
            for lane in self._leaving:
                known.setdefault((lane.name, lane.version), (UNLOADING, "what is live may end"))
            for each in self._loaded.broken:
                known.setdefault((each.name, each.version), (UNAVAILABLE, str(each.error)))
            for name, versions in models_on_disk(self._engine.settings.repository).items():
                for version in versions:
                    known.setdefault((name, version), (UNAVAILABLE, "it is not loaded"))
        return [(*key, *state) for key, state in sorted(known.items())]

    # ---- load -------------------------------------------------------------------------------------------------------

    async def load(self, name: str) -> None:
        """Serve every version of a model that is on disk and not served.

        Raises ModelNotFound where there is none, ModelBroken for versions that can't be served; the others are.
        """
        self._check()
        self._engine.check_open()
        async with self._is_loading:
            versions = models_on_disk(self._engine.settings.repository).get(name, [])
            if not versions:
                raise ModelNotFound(
                    f"no version of model {name!r} is in the repository: put it at {name}/1/model.onnx",
                    field="model_name",
                )
            served = {lane.version for lane in self._lanes(name)}
            faults = []
            for version in [each for each in versions if each not in served]:
                try:
                    await self._load_version(name, version)
                except ModelBroken as error:
                    faults.append(f"version {version}: {error}")
        if faults:
            raise ModelBroken("; ".join(faults))

    async def _load_version(self, name: str, version: int) -> None:
        """Load one version on a thread, so that the others are served meanwhile. Raises ModelBroken."""
        settings, broken = self._engine.settings, self._loaded.broken
        try:
            lane = await asyncio.to_thread(load_version, settings, name, version, self._loaded.store)
        except ModelBroken as error:
            broken[:] = [each for each in broken if (each.name, each.version) != (name, version)]
            broken.append(Broken(name, version, error))
            raise
        broken[:] = [each for each in broken if (each.name, each.version) not in ((name, version), (name, 0))]
        self._engine.add(lane)
        await self.announce(lane)
        log.info("%s/%d is loaded", name, version)

    # ---- unload -----------------------------------------------------------------------------------------------------

    async def unload(self, name: str) -> None:
        """Serve no version of a model any more. Returns at once; what is live goes on for a while.

        Raises ModelNotFound where it is not served.
        """
        self._check()
        async with self._is_loading:
            self._engine.lane(name)
            for lane in self._lanes(name):
                self._engine.retire(lane)
                await self._set_health(lane, is_served=False)
                self._leaving[lane] = asyncio.create_task(self._leave(lane))

    async def _leave(self, lane: Lane) -> None:
        engine, grace_s = self._engine, self._engine.settings.drain_s
        for each in self.streams:
            each.announce_unload(lane, grace_s)
        await self._emptied(lane, grace_s)
        self._end_all(lane)
        await asyncio.sleep(POLL_S)  # whoever was told is to hear of it
        await self._emptied(lane, END_S)
        await _until(lambda: not engine.is_used(lane))
        engine.forget(lane)
        for forget in self.keepers:
            forget(lane)
        if lane in self._loaded.lanes:
            self._loaded.lanes.remove(lane)
        await asyncio.sleep(POLL_S)
        gc.collect()  # a call that was cut off leaves a cycle behind, with the version in it
        del self._leaving[lane]
        log.info("%s/%d is unloaded", lane.name, lane.version)

    def _end_all(self, lane: Lane) -> None:
        """End what is live, and tell whoever it is why."""
        error = Unavailable(
            f"{lane.name}/{lane.version} was unloaded: open a new session, of a version that is served, and begin anew"
        )
        self._engine.end_all(lane, error)
        for each in self.streams:
            each.end_all(lane, error)

    async def _emptied(self, lane: Lane, longest_s: float) -> None:
        """Wait until a version has no clients and nothing to run, but not for ever."""
        with suppress(TimeoutError):
            async with asyncio.timeout(longest_s):
                await _until(
                    lambda: not self._engine.is_used(lane) and not any(each.are_open(lane) for each in self.streams)
                )

    def close(self) -> None:
        """Unload nothing more: the server stops."""
        for task in self._leaving.values():
            task.cancel()

    def _check(self) -> None:
        if not self._can_change:
            raise Unimplemented("each of several workers loads its models when it starts: start the server again")

    def _lanes(self, name: str) -> list[Lane]:
        return [lane for lane in self._engine.lanes if lane.name == name]

    async def _set_health(self, lane: Lane, *, is_served: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in (lane.name, f"{lane.name}/{lane.version}"):
            await self._health.set(name, status.SERVING if is_served else status.NOT_SERVING)


async def _until(holds: Callable[[], bool]) -> None:
    """Wait until something holds, asked again and again."""
    while not holds():  # noqa: ASYNC110  nothing tells of it
        await asyncio.sleep(POLL_S)
