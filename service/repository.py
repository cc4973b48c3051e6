"""Loads models: <repository>/<model>/<version>/model.onnx. What is broken is said loudly and served without."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from models.spec import DESCRIPTION_FILE, MODEL_FILE, Layout, Spec
from service.backend import Backend, check_provider
from service.changes import Key, Prints, changes
from service.config import Settings
from service.errors import ConfigError, ModelBroken, RepositoryUnreachable, RunFailed
from service.holdings import Holdings, open_storage
from service.lane import Lane
from service.probe import probe
from service.spill import SpillStore
from service.versions import VersionPolicies, VersionPolicy
from service.warmup import warm_up

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Loaded(Holdings):
    """What a repository holds, loaded."""

    lanes: list[Lane] = field(default_factory=list)
    store: SpillStore | None = None
    """Takes the states of idle sessions; whoever serves the lanes closes it after them."""

    def add(self, lane: Lane, fingerprint: str) -> None:
        """Take in what was loaded."""
        key = (lane.name, lane.version)
        self.lanes.append(lane)
        self.prints[key] = fingerprint
        self.mend([key])


def load_repository(settings: Settings, *, wanted: Prints | None = None, keeps_states: bool | None = None) -> Loaded:
    """Load the versions that the policy picks of every model, in the order of name and version.

    wanted        versions to load, whatever the policy, and what their files are known by
    keeps_states  as Backend takes it
    Raises ConfigError where the repository, the provider or the spill store as a whole can't work.
    """
    check_provider(settings.provider)
    storage = open_storage(settings)
    try:
        found = storage.look()
    except RepositoryUnreachable as error:
        storage.close()
        raise ConfigError(f"repository {error}", field="repository") from error
    store = SpillStore(settings.spill_store) if settings.spill_store else None
    loaded = Loaded(storage=storage, store=store, found=found.prints)
    loaded.take_faults(found)
    policies = settings.version_policy if wanted is None else VersionPolicies(VersionPolicy())
    prints = found.prints if wanted is None else wanted
    tried: dict[Key, str] = {}
    while keys := changes(prints, loaded.prints, tried, policies).load:
        for key in keys:
            tried[key] = fingerprint = prints[key]
            try:
                loaded.add(load_found(settings, loaded, key, fingerprint, keeps_states=keeps_states), fingerprint)
            except (ModelBroken, RepositoryUnreachable) as error:
                loaded.add_broken(key, error, fingerprint)
    loaded.lanes.sort(key=lambda lane: (lane.name, lane.version))
    return loaded


def load_found(
    settings: Settings, loaded: Loaded, key: Key, fingerprint: str, *, keeps_states: bool | None = None
) -> Lane:
    """Load a version whose files are known by that. Raises ModelBroken, RepositoryUnreachable and ConfigError."""
    storage = loaded.storage
    storage.fetch(key, fingerprint)
    local = settings.model_copy(update={"repository": storage.root})
    lane = load_version(local, *key, loaded.store, keeps_states=keeps_states)
    storage.check(key, fingerprint)
    lane.fingerprint = fingerprint
    return lane


def load_version(
    settings: Settings, name: str, version: int, store: SpillStore | None = None, *, keeps_states: bool | None = None
) -> Lane:
    """Load and probe one model version.

    store         takes the states of idle sessions, if there are to be any
    keeps_states  as Backend takes it
    Raises ModelBroken and ConfigError.
    """
    began = time.perf_counter()
    path = Path(settings.repository) / name / str(version) / MODEL_FILE
    if not path.is_file():
        raise ModelBroken(f"{path}: no such file")
    backend = _load_backend(settings, path, keeps_states=keeps_states)
    if shared := [t.name for t in backend.graph.inputs if t.layout is Layout.SHARED]:
        raise ModelBroken(f"{path}: inputs {', '.join(shared)} are shared by all sequences, which can't be served")
    encoder = None
    if backend.spec.encoder is not None:
        encoder = _load_encoder(settings, name, version, backend, keeps_states=keeps_states)
    if fault := ungenerable(backend.spec):
        raise ModelBroken(f"{path}: {fault}")
    lane = _lane(settings, name, version, backend, store, encoder)
    lane.tally.load_seconds = time.perf_counter() - began
    return lane


def _load_backend(settings: Settings, path: Path, *, keeps_states: bool | None) -> Backend:
    """Load a file, as a model.toml beside it says if there is one. Raises ModelBroken and ConfigError."""
    load = partial(Backend, path, provider=settings.provider, device_id=settings.device_id, keeps_states=keeps_states)
    if not path.with_name(DESCRIPTION_FILE).is_file():
        return load()
    from service.adapter import adapt  # a server whose models need none of it starts sooner without
    from service.adoptcheck import check_steps

    adapted = adapt(path)
    backend = load(adapted=adapted)
    if adapted.suspect is not None:
        check_steps(path, adapted.suspect, backend)
    return backend


def _load_encoder(settings: Settings, name: str, version: int, decoder: Backend, *, keeps_states: bool | None) -> Lane:
    """Load the file that a decoder's spec names. Raises ModelBroken where it is another one, and ConfigError."""
    graph = decoder.spec.graphs[1]
    path = Path(settings.repository) / name / str(version) / graph.file
    if "/" in graph.file or "\\" in graph.file:
        raise ModelBroken(f"{path}: the encoder belongs beside {MODEL_FILE}, under a plain name")
    backend = Backend(
        path,
        provider=settings.provider,
        device_id=settings.device_id,
        keeps_states=keeps_states,
        encoder_of=decoder.spec,
    )
    if backend.digest != graph.sha256:
        raise ModelBroken(
            f"{path}: its SHA-256 is {backend.digest}, but {MODEL_FILE} was exported with {graph.sha256 or 'none'}: "
            "export both together again"
        )
    if others := [t.name for t in graph.inputs if t.layout is not Layout.PER_STEP]:
        raise ModelBroken(f"{path}: inputs {', '.join(others)} are not per step, which an encoder's have to be")
    return _lane(settings, name, version, backend, None, None)


def _lane(
    settings: Settings, name: str, version: int, backend: Backend, store: SpillStore | None, encoder: Lane | None
) -> Lane:
    """Probe a graph and make room for its sequences. Raises ModelBroken."""
    path = Path(settings.repository) / name / str(version) / backend.graph.file
    try:
        exactness = probe(backend, settings.max_batch_rows)
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
        lane = Lane(name, version, backend, exactness, settings, store, encoder)
        warm_up(lane)
    except MemoryError as error:
        raise ModelBroken(f"{path}: no memory for the states of all sequences: lower max_sessions ({error})") from error
    except (ModelBroken, RunFailed) as error:
        raise ModelBroken(f"{path}: {error}") from error
    return lane


def ungenerable(spec: Spec) -> str:
    """Say why a model that generates can't be served; empty where it can, or does not generate."""
    generation, graph = spec.generation, spec.graph
    if generation is None:
        return ""
    stepped = [t for t in graph.inputs if t.layout is Layout.PER_STEP]
    if [t.name for t in stepped] != ([generation.token_input] if generation.token_input else []):
        return f"per-step inputs {[t.name for t in stepped]}: one that generates takes ids of its last choice alone"
    if generation.token_input:
        scores = next(t for t in graph.outputs if t.name == generation.scores_output)
        if stepped[0].dtype != "int64" or scores.layout is not Layout.PER_STEP or len(scores.row_shape) != 1:
            return f"{generation.token_input} has to be int64 and {scores.name} a row of log-probabilities a step"
    elif any(t.layout is not Layout.PER_STEP for t in graph.outputs):
        return "outputs of a model that feeds no ids back have to be per step"
    given = {} if spec.encoder is None else {t.name: t for t in spec.encoder.outputs}
    for tensor in graph.inputs:
        if tensor.layout is Layout.PER_SOURCE_STEP:
            found = given.get(tensor.name)
            if found is None or found.layout is not Layout.PER_STEP or found.row_shape != tensor.row_shape:
                return f"{tensor.name} is of every step of the source, and no encoder gives it so"
    return ""
