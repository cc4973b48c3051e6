"""The model versions of a server: which are served, and which are here besides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import ModelNotFound
from service.lane import Lane


class Shelf:
    """Finds model versions.

        ready --> served --> retired --> forgotten

    Requests find what is served. Those that have found a version go on with it, whatever becomes of it meanwhile.
    """

    def __init__(self) -> None:
        self._lanes: dict[str, dict[int, Lane]] = {}
        self._ready: set[Lane] = set()
        self._retired: set[Lane] = set()
        self._held: Counter[Lane] = Counter()

    # ---- life -------------------------------------------------------------------------------------------------------

    def prepare(self, lane: Lane) -> None:
        """Take in a version that is to be served."""
        self._ready.add(lane)

    def add(self, lane: Lane) -> None:
        """Serve a version, prepared or not; one of the same number is found no more, and is to be retired."""
        if lane not in self._ready:
            self.prepare(lane)
        self._ready.discard(lane)
        self._lanes.setdefault(lane.name, {})[lane.version] = lane

    def retire(self, lane: Lane) -> None:
        """Find a version no more; what is live on it, or has found it already, goes on."""
        versions = self._lanes.get(lane.name, {})
        if versions.get(lane.version) is lane:
            del versions[lane.version]
            if not versions:
                del self._lanes[lane.name]
        self._ready.discard(lane)
        self._retired.add(lane)

    def forget(self, lane: Lane) -> None:
        """Let go of a version that is retired, or was not to be served after all, and is not used."""
        self._retired.discard(lane)
        self._ready.discard(lane)

    # ---- what there is ----------------------------------------------------------------------------------------------

    @property
    def lanes(self) -> list[Lane]:
        """Served model versions in the order of name and version."""
        return [lane for _, versions in sorted(self._lanes.items()) for _, lane in sorted(versions.items())]

    @property
    def live_lanes(self) -> list[Lane]:
        """Those, and retired ones that are not yet forgotten; of two with one name and version that which is served."""
        named = {(lane.name, lane.version): lane for lane in (*self._retired, *self.lanes)}
        return [lane for _, lane in sorted(named.items())]

    def lane(self, model: str, version: int = 0, *, or_retired: bool = False) -> Lane:
        """Find a served model version; version 0 is the newest. Raises ModelNotFound, naming those there are.

        or_retired  whether one on which something is still live will do
        """
        versions = self._lanes.get(model)
        if or_retired and version not in (0, *(versions or ())):
            for lane in self._retired:
                if (lane.name, lane.version) == (model, version):
                    return lane
        if versions is None:
            served = ", ".join(sorted(self._lanes)) or "none"
            raise ModelNotFound(f"no model {model!r} is served; served: {served}", field="model")
        if version == 0:
            return versions[max(versions)]
        if version not in versions:
            served = ", ".join(map(str, sorted(versions)))
            raise ModelNotFound(f"model {model!r} has no version {version}; served: {served}", field="version")
        return versions[version]

    @property
    def retired(self) -> list[Lane]:
        """Retired versions that are not yet forgotten, in the order of name and version."""
        return sorted(self._retired, key=lambda lane: (lane.name, lane.version)) if self._retired else []

    def is_retired(self, lane: Lane) -> bool:
        """Whether a version is retired."""
        return lane in self._retired

    def besides(self, model: str) -> list[Lane]:
        """Versions of a model that are here and not served: retired, or not yet served. Mostly there are none."""
        return [lane for lane in (*self._retired, *self._ready) if lane.name == model]

    # ---- use --------------------------------------------------------------------------------------------------------

    def hold(self, lane: Lane) -> None:
        """Count a version as used until it is released, though nothing may live on it meanwhile."""
        self._held[lane] += 1

    def release(self, lane: Lane) -> None:
        """Give up a hold."""
        self._held[lane] -= 1
        if not self._held[lane]:
            del self._held[lane]

    @contextmanager
    def holding(self, lane: Lane) -> Iterator[None]:
        """Hold a version within the block."""
        self.hold(lane)
        try:
            yield
        finally:
            self.release(lane)

    def is_held(self, lane: Lane) -> bool:
        """Whether someone holds a version."""
        return lane in self._held
