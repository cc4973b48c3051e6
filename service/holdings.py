"""A repository, and what is known of it: what is served, what is broken, and by what its files are known."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from service.changes import Key
from service.config import Settings
from service.errors import ConfigError, RepositoryUnreachable, ServiceError
from service.storage import Found, LocalStorage, Storage


@dataclass(frozen=True, slots=True)
class Broken:
    """A model version that is in the repository but can't be served."""

    name: str
    version: int
    """0 where the model as a whole is at fault."""
    error: ServiceError
    fingerprint: str = ""
    """Of the files; see storage.Found."""


@dataclass(slots=True, kw_only=True)
class Holdings:
    """What is known of a repository."""

    storage: Storage
    """Where it lies; whoever is the last to use it closes it."""
    found: dict[Key, str] = field(default_factory=dict)
    """What was in it at start, as storage.Found has it."""
    prints: dict[Key, str] = field(default_factory=dict)
    """What the files of the versions that are served were known by when they were loaded."""
    broken: list[Broken] = field(default_factory=list)
    """In the order of name and version."""

    def mend(self, keys: Iterable[Key]) -> None:
        """Count versions as broken no more."""
        mended = set(keys)
        self.broken[:] = [each for each in self.broken if (each.name, each.version) not in mended]

    def add_broken(self, key: Key, error: ServiceError, fingerprint: str = "") -> None:
        """Note why a version can't be served."""
        self.mend([key])
        self._put(Broken(*key, error, fingerprint))

    def take_faults(self, found: Found) -> None:
        """Note which models are misplaced now."""
        self.broken[:] = [each for each in self.broken if each.version]
        for model, error in found.faults:
            self._put(Broken(model, 0, error))

    def _put(self, broken: Broken) -> None:
        insort(self.broken, broken, key=lambda each: (each.name, each.version))

    @property
    def broken_prints(self) -> dict[Key, str]:
        """What the files of versions were known by that could not be loaded, though they could be read."""
        return {
            (each.name, each.version): each.fingerprint
            for each in self.broken
            if each.fingerprint and not isinstance(each.error, RepositoryUnreachable)
        }


def open_storage(settings: Settings) -> Storage:
    """Find the repository. Raises ConfigError."""
    root = settings.repository
    if isinstance(root, str):
        from service.remote import RemoteStorage  # fsspec takes its time to import

        return RemoteStorage(root, settings.repository_cache)
    if not root.is_dir():
        advice = (
            "it is a file; name the directory that holds <model>/<version>/model.onnx"
            if root.exists()
            else f"make it, then `rnnserve export RUN --repository {root}`"
        )
        raise ConfigError(
            f"repository {root} is no directory: {advice}",
            field="repository",
        )
    return LocalStorage(root)
