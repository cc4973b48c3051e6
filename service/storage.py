"""Where models lie, <repository>/<model>/<version>/: what is there, and by what it is known that files have changed."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from models.spec import MODEL_FILE
from service.changes import Key
from service.errors import ModelBroken, RepositoryUnreachable
from service.versions import MAX_VERSION


@dataclass(slots=True)
class Found:
    """What a look at a repository has found."""

    prints: dict[Key, str] = field(default_factory=dict)
    """Versions, whether they can be served or not, and what their files are known by."""
    faults: list[tuple[str, ModelBroken]] = field(default_factory=list)
    """Models that are misplaced."""

    def add(self, model: str, folders: dict[str, str], *, misnamed: Iterable[str], at: str) -> None:
        """Take in a model.

        folders   what is known of the folders in it by their names, of other names than versions have too
        misnamed  those of them that hold a model file under another name
        at        where the model is
        """
        misnamed = sorted(misnamed)
        for name in misnamed:
            error = ModelBroken(f"{at}/{name}: not a version: name it by a number from 1 on, without leading zeros")
            self.faults.append((model, error))
        versions = {int(name): each for name, each in folders.items() if is_version(name)}
        if not versions and not misnamed:
            error = ModelBroken(f"{at}: no version in it: the file belongs at {model}/1/{MODEL_FILE}")
            self.faults.append((model, error))
        self.prints.update({(model, version): each for version, each in sorted(versions.items())})


class Storage(ABC):
    """A repository, wherever it is. Its methods take their time: they are called on threads."""

    root: Path
    """Local folder that versions are loaded from, <root>/<model>/<version>."""

    @abstractmethod
    def look(self) -> Found:
        """Find what is there. Raises RepositoryUnreachable."""

    def fetch(self, key: Key, fingerprint: str) -> None:  # noqa: B027 - they may be there already
        """Bring a version's files under `root`, where they must be those that are known by that.

        Raises RepositoryUnreachable, and ModelBroken where they are others by now.
        """

    def check(self, key: Key, fingerprint: str) -> None:  # noqa: B027 - nobody may be able to change them
        """Raise ModelBroken where the files under `root` are others than those that are known by that."""

    def close(self) -> None:  # noqa: B027 - most have nothing to do
        """Remove what was needed only while the server ran."""


class LocalStorage(Storage):
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def look(self) -> Found:
        """Find what is there. Raises RepositoryUnreachable."""
        found = Found()
        try:
            for model in _folders(self.root):
                folders = {path.name: _fingerprint(path) for path in _folders(model)}
                misnamed = [each for each in folders if not is_version(each) and (model / each / MODEL_FILE).exists()]
                found.add(model.name, folders, misnamed=misnamed, at=str(model))
        except OSError as error:
            raise RepositoryUnreachable(f"{error.filename or self.root}: {error.strerror}") from error
        return found

    def check(self, key: Key, fingerprint: str) -> None:
        """Raise ModelBroken where the files have changed."""
        if _fingerprint(self.root / key[0] / str(key[1])) != fingerprint:
            raise ModelBroken(f"{key[0]}/{key[1]}: its files are being changed")


def is_version(name: str) -> bool:
    """Whether a folder's name is a version's."""
    return name.isascii() and name.isdecimal() and not name.startswith("0") and int(name) <= MAX_VERSION


def fingerprint_of(files: Iterable[tuple[str, int, object]]) -> str:
    """What files are known by: (path, size, what else changes with the content)."""
    return hashlib.sha256(repr(sorted(files, key=lambda each: each[0])).encode()).hexdigest()[:16]


def _fingerprint(version: Path) -> str:
    """Read sizes and times of a folder's files, hidden ones aside. One that vanishes just now counts as gone."""
    files = []
    for folder, below, names in os.walk(version):
        below[:] = [each for each in below if not each.startswith(".")]
        for name in names:
            path = Path(folder, name)
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if not name.startswith("."):
                files.append((str(path.relative_to(version)), status.st_size, status.st_mtime_ns))
    return fingerprint_of(files)


def _folders(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
