"""What a training run leaves on disk, and how it gets there whole.

    run.toml       what is trained, by which recipe (models/config.py); written first
    last.pt        all that the next epoch needs, after every epoch
    best.pt        the weights with the best validation loss so far, and what made them
    metrics.json   written at the end, or when the run is interrupted
    curves.csv     a row per epoch
    curves.png     the same as a picture

Checkpoints hold tensors and plain values only, so they are loaded with weights_only. Every file is written beside its
place and then renamed: a killed run leaves the last whole one.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from models.config import RunConfig
from models.errors import RunError

CONFIG = "run.toml"
"""Name of the file that a run can be made again from."""
FORMAT = 1
"""Raised by a change that an older reader would misread."""

Checkpoint = dict[str, Any]
Row = dict[str, float]


class Run:
    """A run's directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def best(self) -> Path:
        """The best checkpoint so far."""
        return self.path / "best.pt"

    @property
    def last(self) -> Path:
        """The checkpoint to go on from."""
        return self.path / "last.pt"

    def create(self, config: RunConfig) -> None:
        """Begin a run. Raises RunError when the directory holds something."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunError(f"{self.path} is taken: go on with it with --resume, or choose another --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make {self.path}: {error.strerror}") from error
        write_whole(self.path / CONFIG, config.to_toml().encode())

    def config(self) -> RunConfig:
        """Read run.toml. Raises RunError where there is none, RecipeError where it makes no sense."""
        if not (self.path / CONFIG).is_file():
            raise RunError(f"{self.path} is not a run: it has no {CONFIG}; make one with `rnnserve train`")
        return RunConfig.read(self.path / CONFIG)

    def read_json(self, name: str) -> dict[str, Any]:
        """Read metrics.json. Raises RunError."""
        try:
            content: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RunError(f"{self.path} is not a run: it has no {name}; make one with `rnnserve train`") from error
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / name} cannot be read: {error}") from error
        return content

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write metrics.json."""
        write_whole(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    def write_curves(self, rows: list[Row]) -> None:
        """Write curves.csv, a row per epoch."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.path / "curves.csv", text.getvalue().encode())

    def save(self, path: Path, checkpoint: Checkpoint) -> None:
        """Write a checkpoint."""
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, **checkpoint}, buffer)
        write_whole(path, buffer.getvalue())

    def load(self, path: Path) -> Checkpoint:
        """Read a checkpoint. Raises RunError."""
        try:
            checkpoint: Checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise RunError(
                f"{self.path} has no {path.name}: it is no run, or ended before its first epoch did"
            ) from error
        except Exception as error:
            # What torch.load raises on damaged bytes has no common base: KeyError, EOFError, RuntimeError, ...
            raise RunError(f"{path} is damaged and cannot be read") from error
        if checkpoint.get("format") != FORMAT:
            raise RunError(f"{path} has format {checkpoint.get('format')}; this version reads {FORMAT}")
        return checkpoint


def write_whole(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a file so that no reader, and no kill, ever sees half of it.

    With durable it also outlives a power cut, which costs a few milliseconds.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, of rnnserve and of packages, for the record."""
    found = {"python": platform.python_version()}
    for package in ("rnnserve", *packages):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
