"""The models of a server that runs: what is in the repository, what is served, and following the one with the other.

A version is loaded on a thread while the others are served, and takes work once it has been probed. The one that it
replaces then leaves: see retiring.py.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from contextlib import suppress

from grpc_health.v1 import health, health_pb2

from service.changes import Key, Settling, changes, of_model, wanted
from service.engine import Engine
from service.errors import (
    ConfigError,
    ModelBroken,
    ModelNotFound,
    RepositoryUnreachable,
    ServiceError,
    Unimplemented,
)
from service.lane import Lane
from service.repository import Loaded, load_found
from service.rpc.retiring import Retirer

log = logging.getLogger(__name__)
READY, LOADING, UNLOADING, UNAVAILABLE = "READY", "LOADING", "UNLOADING", "UNAVAILABLE"
Entry = tuple[str, int, str, str]
"""Model, version, state, and the reason for it."""


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
        self._settings = engine.settings
        self._health = health_of
        self._can_change = can_change
        self._is_changing = asyncio.Lock()
        self._settling = Settling(loaded.found)
        self._first_seen: dict[Key, tuple[str, float]] = {}  # fingerprint, and when it was first seen
        self._unloaded: set[str] = set()  # models, by a call
        self._loading: Key | None = None
        self._is_unreachable = False
        self._watcher: asyncio.Task[None] | None = None
        self.retirer = Retirer(engine, self._forget)
        """Lets versions leave."""

    async def announce(self, lane: Lane) -> None:
        """Let health say that a version is served."""
        await self._set_health(lane)

    # ---- what there is ----------------------------------------------------------------------------------------------

    async def entries(self, *, is_ready: bool) -> list[Entry]:
        """List versions in order; is_ready: only those that are served."""
        known: dict[Key, tuple[str, str]] = {(lane.name, lane.version): (READY, "") for lane in self._engine.lanes}
        if is_ready:
            return [(*key, *state) for key, state in sorted(known.items())]
        if self._watcher is None:
            with suppress(RepositoryUnreachable):
                self._settling.see((await asyncio.to_thread(self._loaded.storage.look)).prints)
        for each in self._loaded.broken:
            key = (each.name, each.version)
            if key in known:  # its files were replaced
                known[key] = (READY, f"its files have changed, and the new ones can't be loaded: {each.error}")
            else:
                known[key] = (UNAVAILABLE, str(each.error))
        for lane in self.retirer.leaving:
            reason = f"{lane.num_sessions} live sessions go on"
            known.setdefault((lane.name, lane.version), (UNLOADING, reason))
        picked = wanted(
            self._settling.last, self._loaded.prints, self._loaded.broken_prints, self._settings.version_policy
        )
        for key in self._settling.last:
            known.setdefault(key, self._why_not(key, is_wanted=key in picked))
        for name in {name for name, _ in known}:
            for version in self._settings.version_policy.of(name).named:
                known.setdefault((name, version), (UNAVAILABLE, "the version policy names it, but it is not there"))
        return [(*key, *state) for key, state in sorted(known.items())]

    def _why_not(self, key: Key, *, is_wanted: bool) -> tuple[str, str]:
        """Say why a version in the repository is not served, though nothing is wrong with it."""
        model = key[0]
        if key == self._loading:
            return LOADING, "it is being loaded"
        if model in self._unloaded:
            return UNAVAILABLE, "the model was unloaded by a call: load it by another"
        if not is_wanted:
            return UNAVAILABLE, f"the version policy, {self._settings.version_policy.of(model)}, leaves it out"
        if self._watcher is not None:
            return UNAVAILABLE, f"it is loaded once its files stay the same for {self._settings.watch:g} s"
        return UNAVAILABLE, "it is not loaded: it came after the server's start"

    # ---- calls ------------------------------------------------------------------------------------------------------

    async def load(self, name: str) -> None:
        """Serve what the policy picks of a model as it is in the repository now, unloaded or broken before or not.

        Raises ModelNotFound where there is none, ModelBroken for versions that can't be served; the others are.
        """
        self._check()
        self._engine.check_open()
        async with self._is_changing:
            found = await asyncio.to_thread(self._loaded.storage.look)
            if not of_model(found.prints, name):
                raise ModelNotFound(
                    f"no version of model {name!r} is in the repository: put it at {name}/1/model.onnx",
                    field="model_name",
                )
            self._unloaded.discard(name)
            self._settling.believe(found.prints, name)
            self._loaded.take_faults(found)
            self._loaded.mend(of_model(self._loaded.broken_prints, name))
            faults = await self._follow(name)
        if faults:
            raise ModelBroken("; ".join(f"version {version}: {error}" for (_, version), error in faults.items()))

    async def unload(self, name: str) -> None:
        """Serve no version of a model until it is loaded by a call. Returns at once; what is live goes on for a while.

        Raises ModelNotFound where it is not served.
        """
        self._check()
        async with self._is_changing:
            self._engine.lane(name)
            self._unloaded.add(name)
            lanes = [*self._engine.lanes, *self.retirer.leaving]
            for lane in [each for each in lanes if each.name == name]:
                await self._retire(lane, self._settings.drain_s)

    def _check(self) -> None:
        if not self._can_change:
            raise Unimplemented("each of several workers loads its models when it starts: start the server again")

    # ---- following the repository -----------------------------------------------------------------------------------

    def watch(self) -> None:
        """Begin to look at the repository every so often, if that is set."""
        if self._settings.watch and self._can_change:
            self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.watch)
            try:
                await self.look()
            except Exception:
                log.exception("a bug in following the repository")

    async def look(self) -> None:
        """Look at the repository, and follow what it has shown twice in a row."""
        async with self._is_changing:
            try:
                found = await asyncio.to_thread(self._loaded.storage.look)
            except RepositoryUnreachable as error:
                if not self._is_unreachable:
                    log.warning("%s; what is served goes on", error)
                self._is_unreachable = True
                return
            self._is_unreachable = False
            self._note_first_seen(found.prints)
            believed = self._settling.look(found.prints)
            self._loaded.take_faults(found)
            self._loaded.mend(key for key in self._loaded.broken_prints if key not in found.prints)
            await self._follow()
            self._first_seen = {key: self._first_seen[key] for key in believed if key in self._first_seen}

    def _note_first_seen(self, prints: dict[Key, str]) -> None:
        now = time.monotonic()
        for key, fingerprint in prints.items():
            if self._first_seen.get(key, ("",))[0] != fingerprint:
                self._first_seen[key] = (fingerprint, now)

    async def _follow(self, model: str | None = None) -> dict[Key, ServiceError]:
        """Load and retire what is to be, of one model or of all. Returns what could not be loaded, and why."""
        faults: dict[Key, ServiceError] = {}
        tried = self._loaded.broken_prints
        while True:
            found, served = self._settling.believed, self._loaded.prints
            if model is not None:
                found, served = of_model(found, model), of_model(served, model)
            todo = changes(found, served, tried, self._settings.version_policy, self._unloaded)
            if not todo.load or self._engine.is_draining:
                break
            for key in todo.load:
                tried[key] = found[key]
                try:
                    await self._load(key, found[key])
                except (ModelBroken, RepositoryUnreachable, ConfigError) as error:
                    log.error("%s/%d can't be loaded: %s", *key, error)
                    self._loaded.add_broken(key, error, found[key])
                    faults[key] = error
        lanes = {(lane.name, lane.version): lane for lane in self._engine.lanes}
        for key in todo.retire:
            await self._retire(lanes[key], self._settings.retire_s or math.inf)
        return faults

    async def _load(self, key: Key, fingerprint: str) -> None:
        """Serve a version, in place of the one of the same number. Raises ModelBroken and its kin."""
        began, self._loading = time.monotonic(), key
        try:
            lane = await asyncio.to_thread(load_found, self._settings, self._loaded, key, fingerprint)
        finally:
            self._loading = None
        replaced = next((each for each in self._engine.lanes if (each.name, each.version) == key), None)
        self._loaded.add(lane, fingerprint)
        self._engine.add(lane)
        await self._set_health(lane)
        if replaced is not None:
            await self._retire(replaced, self._settings.retire_s or math.inf)
        now = time.monotonic()
        known_as, seen_at = self._first_seen.get(key, ("", began))
        waited_s = now - (seen_at if known_as == fingerprint else began)
        log.info("%s/%d is served, %.2f s after it was seen; %.2f s of them to load it", *key, waited_s, now - began)

    async def _retire(self, lane: Lane, grace_s: float) -> None:
        self.retirer.begin(lane, grace_s)
        key = (lane.name, lane.version)
        if not any((each.name, each.version) == key for each in self._engine.lanes):
            self._loaded.prints.pop(key, None)
        await self._set_health(lane)

    def _forget(self, lane: Lane) -> None:
        if lane in self._loaded.lanes:
            self._loaded.lanes.remove(lane)

    async def _set_health(self, lane: Lane) -> None:
        """Tell of a model, and of one of its versions, whether they are served."""
        status, lanes = health_pb2.HealthCheckResponse, [each for each in self._engine.lanes if each.name == lane.name]
        for name, is_served in (
            (lane.name, bool(lanes)),
            (f"{lane.name}/{lane.version}", any(each.version == lane.version for each in lanes)),
        ):
            await self._health.set(name, status.SERVING if is_served else status.NOT_SERVING)

    def close(self) -> None:
        """Follow nothing more: the server stops."""
        if self._watcher is not None:
            self._watcher.cancel()
        self.retirer.close()
