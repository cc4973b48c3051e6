"""The repository of models while it is served: what is on disk, and loading what is not served."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from service.engine import Engine
from service.errors import InvalidInput, ModelBroken, ModelNotFound, Unimplemented
from service.lane import Lane
from service.pb.inference import inference_pb2 as pb
from service.repository import Broken, Loaded, load_version, models_on_disk

READY, UNAVAILABLE = "READY", "UNAVAILABLE"
OnLoad = Callable[[Lane], Awaitable[None]]


class Repository:
    """Lists and loads model versions of a server that runs."""

    def __init__(self, engine: Engine, loaded: Loaded, on_load: OnLoad | None) -> None:
        """Begin with what was loaded at start.

        on_load  is told of what is loaded later; None where nothing can be
        """
        self._engine = engine
        self._loaded = loaded
        self._on_load = on_load
        self._is_loading = asyncio.Lock()

    def index(self, *, is_ready: bool) -> pb.RepositoryIndexResponse:
        """List model versions; is_ready: only those that are served."""
        entries = {(lane.name, lane.version): (READY, "") for lane in self._engine.lanes}
        if not is_ready:
            for each in self._loaded.broken:
                entries.setdefault((each.name, each.version), (UNAVAILABLE, str(each.error)))
            for name, versions in models_on_disk(self._engine.settings.repository).items():
                for version in versions:
                    entries.setdefault((name, version), (UNAVAILABLE, "it is not loaded"))
        response = pb.RepositoryIndexResponse()
        for (name, version), (state, reason) in sorted(entries.items()):
            response.models.add(name=name, version=str(version or ""), state=state, reason=reason)
        return response

    async def load(self, name: str) -> None:
        """Serve every version of a model that is on disk and not served.

        Raises ModelNotFound where there is none, ModelBroken for versions that can't be served; the others are.
        """
        if self._on_load is None:
            raise Unimplemented("each of several workers loads its models when it starts: start the server again")
        self._engine.check_open()
        async with self._is_loading:
            versions = models_on_disk(self._engine.settings.repository).get(name, [])
            if not versions:
                raise ModelNotFound(
                    f"no version of model {name!r} is in the repository: put it at {name}/1/model.onnx",
                    field="model_name",
                )
            served = {lane.version for lane in self._engine.lanes if lane.name == name}
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
        assert self._on_load is not None  # noqa: S101  checked by load
        await self._on_load(lane)


def check_name(repository_name: str) -> None:
    """Raise InvalidInput for the name of a repository: there is one, and it has none."""
    if repository_name:
        raise InvalidInput(f"no repository {repository_name!r}: there is one, without a name", field="repository_name")
