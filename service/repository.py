"""Models on disk: <repository>/<model>/<version>/model.onnx. What is broken is said loudly and served without."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from models.spec import MODEL_FILE, Layout
from service.backend import Backend, check_provider
from service.config import Settings
from service.errors import ConfigError, ModelBroken, RunFailed, ServiceError
from service.lane import Lane
from service.spill import SpillStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Broken:
    """A model version that is on disk but can't be served."""

    name: str
    version: int
    """0 where the model as a whole is at fault."""
    error: ServiceError


@dataclass(slots=True)
class Loaded:
    """What a repository holds."""

    lanes: list[Lane] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    store: SpillStore | None = None
    """Takes the states of idle sessions; whoever serves the lanes closes it after them."""


def load_repository(settings: Settings, *, keeps_states: bool | None = None) -> Loaded:
    """Load every version of every model, in the order of name and version.

    keeps_states  as Backend takes it
    Raises ConfigError where the repository, the provider or the spill store as a whole can't work.
    """
    root = settings.repository
    if not root.is_dir():
        raise ConfigError(
            f"repository {root} is no directory: make it, then `rnnserve export RUN --repository {root}`",
            field="repository",
        )
    check_provider(settings.provider)
    loaded = Loaded(store=SpillStore(settings.spill_store) if settings.spill_store else None)
    for model in _folders(root):
        versions = _versions(model)
        misnamed = [path for path in _folders(model) if not _is_version(path.name) and (path / MODEL_FILE).exists()]
        for path in misnamed:
            error = ModelBroken(f"{path}: not a version: name it by a number from 1 on, without leading zeros")
            loaded.broken.append(Broken(model.name, 0, error))
        if not versions and not misnamed:
            error = ModelBroken(f"{model}: no version in it: the file belongs at {model.name}/1/{MODEL_FILE}")
            loaded.broken.append(Broken(model.name, 0, error))
        for version in versions:
            try:
                lane = load_version(settings, model.name, version, loaded.store, keeps_states=keeps_states)
                loaded.lanes.append(lane)
            except ModelBroken as error:
                loaded.broken.append(Broken(model.name, version, error))
    return loaded


def load_version(
    settings: Settings, name: str, version: int, store: SpillStore | None = None, *, keeps_states: bool | None = None
) -> Lane:
    """Load and probe one model version.

    store         takes the states of idle sessions, if there are to be any
    keeps_states  as Backend takes it
    Raises ModelBroken and ConfigError.
    """
    path = settings.repository / name / str(version) / MODEL_FILE
    if not path.is_file():
        raise ModelBroken(f"{path}: no such file")
    backend = Backend(path, provider=settings.provider, device_id=settings.device_id, keeps_states=keeps_states)
    others = [t.name for t in backend.graph.inputs if t.layout is not Layout.PER_STEP]
    if others:
        raise ModelBroken(f"{path}: inputs {', '.join(others)} are not per step, and only those can be served")
    try:
        exactness = backend.probe(settings.max_batch_rows)
    except Exception as error:  # whatever is wrong with this file, the others are served
        raise ModelBroken(f"{path}: it loads, but a first run fails: {error}") from error
    if slow := backend.placement.recurrent_fallbacks:
        log.warning(
            "%s/%d: %s on %s, since %s has no kernel for it with these attributes (activations, clip, peepholes, "
            "linear_before_reset): states and activations are copied to and fro in every run",
            name,
            version,
            ", ".join(map(str, slow)),
            slow[0].provider,
            backend.provider,
        )
    try:
        return Lane(name, version, backend, exactness, settings, store)
    except MemoryError as error:
        raise ModelBroken(f"{path}: no memory for the states of all sequences: lower max_sessions ({error})") from error
    except (ModelBroken, RunFailed) as error:
        raise ModelBroken(f"{path}: {error}") from error


def models_on_disk(root: Path) -> dict[str, list[int]]:
    """Versions of every model in a repository, whether they can be served or not."""
    return {model.name: versions for model in _folders(root) if (versions := _versions(model))}


def _versions(model: Path) -> list[int]:
    return sorted(int(path.name) for path in _folders(model) if _is_version(path.name))


def _folders(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))


def _is_version(name: str) -> bool:
    return name.isascii() and name.isdecimal() and not name.startswith("0") and int(name) < 2**63
