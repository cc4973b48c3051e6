"""What is in the repository and what is served, and following the one with the other: calls, and `--watch`."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Protocol

from service.changes import Key, Settling, changes, of_model, wanted
from service.config import Settings
from service.errors import (
    ConfigError,
    ModelBroken,
    ModelNotFound,
    RepositoryUnreachable,
    ServiceError,
    Unavailable,
)
from service.holdings import Holdings

log = logging.getLogger(__name__)
READY, LOADING, UNLOADING, UNAVAILABLE = "READY", "LOADING", "UNLOADING", "UNAVAILABLE"
Entry = tuple[str, int, str, str]
"""Model, version, state, and the reason for it."""


class Hands(Protocol):
    """Do what is decided: one server for itself (hands.py), or all workers alike (fleet.py)."""

    @property
    def is_stopping(self) -> bool:
        """Whether nothing is to be loaded any more."""

    async def load(self, key: Key, fingerprint: str) -> None:
        """Have a version ready that takes no work yet. Raises ModelBroken and its kin, and then nothing has changed."""

    async def switch(self, serve: Collection[Key], retire: Collection[Key], grace_s: float) -> None:
        """Let versions that are ready take work, in place of those of the same numbers, and let others leave, at once.

        grace_s  after which what is live on those that leave is ended; it hurries those that leave already
        """

    async def leaving(self) -> dict[Key, int]:
        """Versions on their way out, and how many sessions are live on each."""

    async def tell_broken(self) -> None:
        """Let those who tell of broken versions know of a change."""


class Catalog:
    """Decides what is served, on the running loop."""

    def __init__(self, settings: Settings, holdings: Holdings, hands: Hands) -> None:
        """Begin with what was loaded at start.

        hands  do what is decided
        """
        self._settings = settings
        self._holdings = holdings
        self._hands = hands
        self.is_changing = asyncio.Lock()
        """Held while something changes."""
        self._settling = Settling(holdings.found)
        self._first_seen: dict[Key, tuple[str, float]] = {}  # fingerprint, and when it was first seen
        self._unloaded: set[str] = set()  # models, by a call
        self._loading: Key | None = None
        self._is_unreachable = False
        self._watcher: asyncio.Task[None] | None = None

    # ---- what there is ----------------------------------------------------------------------------------------------

    async def entries(self, *, is_ready: bool) -> list[Entry]:
        """List versions in order; is_ready: only those that are served."""
        holdings, policies = self._holdings, self._settings.version_policy
        known = dict.fromkeys(holdings.prints, (READY, ""))
        if is_ready:
            return [(*key, *state) for key, state in sorted(known.items())]
        if self._watcher is None:
            with suppress(RepositoryUnreachable):
                self._settling.see((await asyncio.to_thread(holdings.storage.look)).prints)
        for each in holdings.broken:
            key = (each.name, each.version)
            if key in known:  # its files were replaced
                known[key] = (READY, f"its files have changed, and the new ones can't be loaded: {each.error}")
            else:
                known[key] = (UNAVAILABLE, str(each.error))
        for key, num_sessions in (await self._hands.leaving()).items():
            known.setdefault(key, (UNLOADING, f"{num_sessions} live sessions go on"))
        picked = wanted(self._settling.last, holdings.prints, holdings.broken_prints, policies)
        for key in self._settling.last:
            known.setdefault(key, self._why_not(key, is_wanted=key in picked))
        for name in {name for name, _ in known}:
            for version in policies.of(name).named:
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
        holdings = self._holdings
        async with self.is_changing:
            found = await asyncio.to_thread(holdings.storage.look)
            if not of_model(found.prints, name):
                raise ModelNotFound(
                    f"no version of model {name!r} is in the repository: put it at {name}/1/model.onnx",
                    field="model_name",
                )
            self._unloaded.discard(name)
            self._settling.believe(found.prints, name)
            holdings.take_faults(found)
            holdings.mend(of_model(holdings.broken_prints, name))
            faults = await self._follow([name])
        if faults:
            raise ModelBroken("; ".join(f"version {version}: {error}" for (_, version), error in faults.items()))

    async def unload(self, name: str) -> None:
        """Serve no version of a model until it is loaded by a call. Returns at once; what is live goes on for a while.

        Raises ModelNotFound where it is not served.
        """
        async with self.is_changing:
            served = of_model(self._holdings.prints, name)
            if not served:
                others = ", ".join(sorted({model for model, _ in self._holdings.prints})) or "none"
                raise ModelNotFound(f"no model {name!r} is served; served: {others}", field="model_name")
            self._unloaded.add(name)
            leaving = [key for key in await self._hands.leaving() if key[0] == name]
            await self._hands.switch([], [*served, *leaving], self._settings.drain_s)
            for key in served:
                self._holdings.prints.pop(key, None)

    # ---- following the repository -----------------------------------------------------------------------------------

    def watch(self) -> None:
        """Begin to look at the repository every so often, if that is set."""
        if self._settings.watch:
            self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.watch)
            try:
                await self.look()
            except Unavailable as error:
                log.warning("the repository is not followed: %s", error)
            except Exception:
                log.exception("a bug in following the repository")

    async def look(self) -> None:
        """Look at the repository, and follow what it has shown twice in a row."""
        holdings = self._holdings
        async with self.is_changing:
            try:
                found = await asyncio.to_thread(holdings.storage.look)
            except RepositoryUnreachable as error:
                if not self._is_unreachable:
                    log.warning("%s; what is served goes on", error)
                self._is_unreachable = True
                return
            self._is_unreachable = False
            self._note_first_seen(found.prints)
            believed = self._settling.look(found.prints)
            was_broken = list(holdings.broken)
            holdings.take_faults(found)
            gone = [key for key in holdings.broken_prints if key not in found.prints and key not in believed]
            holdings.mend(gone)
            await self._follow(self._models)
            if holdings.broken != was_broken:
                await self._hands.tell_broken()
            self._first_seen = {key: self._first_seen[key] for key in believed if key in self._first_seen}

    def _note_first_seen(self, prints: dict[Key, str]) -> None:
        now = time.monotonic()
        for key, fingerprint in prints.items():
            if self._first_seen.get(key, ("",))[0] != fingerprint:
                self._first_seen[key] = (fingerprint, now)

    @property
    def _models(self) -> list[str]:
        """Every model that is believed to be there, or is served."""
        return sorted({model for model, _ in (*self._settling.believed, *self._holdings.prints)})

    async def follow(self) -> None:
        """Load and retire what is to be of what is believed of the repository already."""
        async with self.is_changing:
            await self._follow(self._models)

    async def _follow(self, models: Iterable[str]) -> dict[Key, ServiceError]:
        """Load and retire what is to be of some models. Returns what could not be loaded, and why."""
        faults: dict[Key, ServiceError] = {}
        for model in models:
            faults |= await self._follow_one(model)
        return faults

    async def _follow_one(self, model: str) -> dict[Key, ServiceError]:
        holdings, faults, loaded = self._holdings, dict[Key, ServiceError](), dict[Key, float]()
        found, served = of_model(self._settling.believed, model), of_model(holdings.prints, model)
        tried = of_model(holdings.broken_prints, model)
        while not self._hands.is_stopping:
            todo = changes(found, served, tried, self._settings.version_policy, self._unloaded)
            if not todo.load:
                break
            for key in todo.load:
                tried[key], self._loading, began = found[key], key, time.monotonic()
                try:
                    await self._hands.load(key, found[key])
                except (ModelBroken, RepositoryUnreachable, ConfigError) as error:
                    log.error("%s/%d can't be loaded: %s", *key, error)
                    holdings.add_broken(key, error, found[key])
                    faults[key] = error
                else:
                    served[key], loaded[key] = found[key], time.monotonic() - began
                    holdings.mend([key])
                finally:
                    self._loading = None
        else:
            return faults
        if loaded or todo.retire:
            await self._hands.switch(loaded, todo.retire, self._settings.retire_s or math.inf)
            holdings.prints.update({key: served[key] for key in loaded})
            for key in todo.retire:
                holdings.prints.pop(key, None)
        if loaded or faults:
            await self._hands.tell_broken()
        for key, load_s in loaded.items():
            known_as, seen_at = self._first_seen.get(key, ("", math.inf))
            waited_s = max(time.monotonic() - seen_at, load_s) if known_as == found[key] else load_s
            log.info("%s/%d is served, %.2f s after it was seen; %.2f s of them to load it", *key, waited_s, load_s)
        return faults

    def close(self) -> None:
        """Follow nothing more: the server stops."""
        if self._watcher is not None:
            self._watcher.cancel()
