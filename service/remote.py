"""Repositories in object stores: listed by fsspec, and fetched into a folder of this machine version by version.

    <cache>/<digest of the URL>/<model>/<version>/...                 a version as it was when it was fetched
    <cache>/<digest of the URL>/<model>/.<version>.fetched            what its files were known by then
    <cache>/<digest of the URL>/<model>/.<version>.<random>/          one that is being fetched

Laws:

    a version's folder is there with all of its files or not at all, however a fetch ends
    what is in the cache as it is in the repository is not fetched again, by this process or by another
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec
from filelock import FileLock

from models.spec import MODEL_FILE
from service.changes import Key
from service.errors import ConfigError, ModelBroken, RepositoryUnreachable
from service.storage import Found, Storage, fingerprint_of, is_version

log = logging.getLogger(__name__)
T = TypeVar("T")
Info = Mapping[str, Any]

ATTEMPTS = 3
"""How often something is tried, beyond what the file system's own library does."""
FIRST_DELAY_S = 0.5
"""Time before the second attempt; it doubles."""
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
"""What to install for each protocol."""
CHANGING = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "updated", "created")
"""Fields of file systems that change with a file's content, the best first."""
HOPELESS = (FileNotFoundError, PermissionError, ModelBroken)
"""What another attempt won't mend."""


class RemoteStorage(Storage):
    """A repository behind a URL."""

    def __init__(self, url: str, cache: Path | None) -> None:
        """Connect.

        cache  folder for what is fetched, kept; None for one that `close` removes
        Raises ConfigError for a URL that can't be one, and for a library that is not installed.
        """
        self._url = url.rstrip("/")
        protocol = url.partition("://")[0]
        try:
            self._fs, self._path = fsspec.core.url_to_fs(self._url)
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            advice = f"pip install 'rnnserve[{extra}]'" if extra else str(error)
            raise ConfigError(
                f"repository {url}: {protocol}:// needs a library: {advice}", field="repository"
            ) from error
        except Exception as error:
            raise ConfigError(f"repository {url}: {error}", field="repository") from error
        self._temporary = tempfile.TemporaryDirectory(prefix="rnnserve-cache-") if cache is None else None
        folder = cache or Path(self._temporary.name if self._temporary else "")
        self.root = folder / hashlib.sha256(self._url.encode()).hexdigest()[:16]
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"can't make {self.root}: {error.strerror}", field="repository_cache") from error

    def look(self) -> Found:
        """Find what is there. Raises RepositoryUnreachable; a repository without any files counts as that, too."""
        found = self._attempt(self._url, self._look)
        self._prune(found)
        return found

    def fetch(self, key: Key, fingerprint: str) -> None:
        """Bring a version into the cache, if it is not there. Raises RepositoryUnreachable and ModelBroken."""
        folder, marker = self._places(key)
        folder.parent.mkdir(exist_ok=True)
        with FileLock(folder.with_name(f".{key[1]}.lock")):
            if _read(marker) == fingerprint and folder.is_dir():
                return
            url = f"{self._url}/{key[0]}/{key[1]}"
            began = time.monotonic()
            with tempfile.TemporaryDirectory(prefix=f".{key[1]}.", dir=folder.parent) as scratch:
                fetched = Path(scratch, "fetched")
                self._attempt(url, lambda: self._fetch(key, fingerprint, fetched))
                marker.unlink(missing_ok=True)
                if folder.exists():
                    folder.rename(Path(scratch, "before"))
                fetched.rename(folder)
                marker.write_text(fingerprint, encoding="ascii")
            log.info("%s was fetched in %.1f s", url, time.monotonic() - began)

    def check(self, key: Key, fingerprint: str) -> None:
        """Raise ModelBroken where another process has fetched other files meanwhile."""
        if _read(self._places(key)[1]) != fingerprint:
            raise ModelBroken(f"{key[0]}/{key[1]}: its files are being changed")

    def close(self) -> None:
        """Remove the cache, if it was not to be kept."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def _prune(self, found: Found) -> None:
        """Remove what is cached of versions that are gone."""
        for marker in self.root.glob("*/.*.fetched"):
            version = int(marker.name.split(".")[1])
            if (marker.parent.name, version) not in found.prints:
                with FileLock(marker.with_name(f".{version}.lock")):
                    marker.unlink(missing_ok=True)
                    shutil.rmtree(marker.with_name(str(version)), ignore_errors=True)

    def _places(self, key: Key) -> tuple[Path, Path]:
        """Folder of a version in the cache, and the file that tells what it was known by."""
        model, version = key
        return self.root / model / str(version), self.root / model / f".{version}.fetched"

    def _list(self, path: str) -> dict[PurePosixPath, Info]:
        """Files below a path, relative to it, hidden ones aside."""
        self._fs.invalidate_cache()
        found = self._fs.find(path, detail=True)
        base = PurePosixPath(path)
        files = {PurePosixPath(name).relative_to(base): info for name, info in found.items()}
        return {name: info for name, info in files.items() if not any(part.startswith(".") for part in name.parts)}

    def _look(self) -> Found:
        files = self._list(self._path)
        if not files:
            raise FileNotFoundError("there are no files: put models at <model>/<version>/model.onnx, or mend the URL")
        models: dict[str, dict[str, dict[PurePosixPath, Info]]] = {}
        for name, info in files.items():
            if len(name.parts) > 1:
                folders = models.setdefault(name.parts[0], {})
                if len(name.parts) > 2:
                    folders.setdefault(name.parts[1], {})[PurePosixPath(*name.parts[2:])] = info
        found = Found()
        for model, folders in sorted(models.items()):
            misnamed = [each for each in folders if not is_version(each) and PurePosixPath(MODEL_FILE) in folders[each]]
            prints = {name: _fingerprint(infos) for name, infos in folders.items()}
            found.add(model, prints, misnamed=misnamed, at=f"{self._url}/{model}")
        return found

    def _fetch(self, key: Key, fingerprint: str, to: Path) -> None:
        """Fetch a version's files into a new folder. Raises ModelBroken where they are others by now, or change."""
        shutil.rmtree(to, ignore_errors=True)  # of an attempt that failed
        to.mkdir()
        path = f"{self._path}/{key[0]}/{key[1]}"
        files = self._list(path)
        for name in files:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
        self._fs.get([f"{path}/{name}" for name in files], [str(to / name) for name in files])
        is_whole = all((to / name).stat().st_size == info["size"] for name, info in files.items())
        if not is_whole or {fingerprint} != {_fingerprint(files), _fingerprint(self._list(path))}:
            raise ModelBroken(f"{key[0]}/{key[1]}: its files are being changed")

    def _attempt(self, url: str, act: Callable[[], T]) -> T:
        """Do something with the repository, more than once if need be. Raises RepositoryUnreachable and ModelBroken."""
        for number in range(ATTEMPTS):
            try:
                return act()
            except ModelBroken:
                raise
            except Exception as error:  # libraries of file systems raise what they like
                if isinstance(error, HOPELESS) or number == ATTEMPTS - 1:
                    text = " ".join(str(error).split()) or type(error).__name__
                    raise RepositoryUnreachable(f"{url}: {text}") from error
                log.debug("%s: attempt %d failed: %s", url, number + 1, error)
                time.sleep(FIRST_DELAY_S * 2**number)
        raise AssertionError("the last attempt returns or raises")


def _fingerprint(files: Mapping[PurePosixPath, Info]) -> str:
    """What a version's files are known by: their sizes, and what else changes with them."""
    return fingerprint_of(
        (str(name), info["size"], next((str(info[field]) for field in CHANGING if info.get(field)), ""))
        for name, info in files.items()
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except FileNotFoundError:
        return ""
