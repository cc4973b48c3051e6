"""Make the data files that ship with the tasks, again, from the PyPI packages they came from.

    python -m models.tasks.make --check       download the packages, compare what they hold with what ships
    python -m models.tasks.make               the same, and write models/tasks/data/*.npz

A wheel is a zip archive, so nothing of it is installed or run; `--wheel FILE` reads one that is there already.
"""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import click
import numpy as np

from models.errors import DataError, ModelsError
from models.tasks.base import DATA, Array, digest, read

Arrays = dict[str, Array]


def vowels(wheel: zipfile.ZipFile) -> Arrays:
    """Read JapaneseVowels as aeon ships it, in sktime's .ts format.

    Returns, for train and test: frames [sum(lengths), 12] float32, utterances end to end; lengths [utterances] int32;
    speakers [utterances] int64, 0 to 8.
    """
    arrays: Arrays = {}
    for split in ("train", "test"):
        text = wheel.read(f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{split.upper()}.ts").decode("utf-8")
        lines = text.split("@data", 1)[1].split()
        utterances, speakers = [], []
        for line in lines:
            *channels, speaker = line.split(":")
            utterances.append(np.array([channel.split(",") for channel in channels], dtype=np.float32).T)
            speakers.append(int(speaker) - 1)
        arrays[f"{split}_frames"] = np.concatenate(utterances)
        arrays[f"{split}_lengths"] = np.array([len(u) for u in utterances], dtype=np.int32)
        arrays[f"{split}_speakers"] = np.array(speakers, dtype=np.int64)
    return arrays


def waterflow(wheel: zipfile.ZipFile) -> Arrays:
    """Read the water flow as river ships it, a CSV with local times.

    Returns utc_s [hours] int64, seconds since 1970; utc_offset_s [hours] int32, the local clock ahead of UTC;
    flow [hours] float32, litres per second.
    """
    rows = csv.DictReader(io.StringIO(wheel.read("river/datasets/water-flow.csv").decode("utf-8")))
    times, flows = [], []
    for row in rows:
        times.append(datetime.fromisoformat(row["Time"]))
        flows.append(float(row["Water flow [l/s]"]))
    offsets = [offset.total_seconds() for time in times if (offset := time.utcoffset()) is not None]
    return {
        "utc_s": np.array([time.timestamp() for time in times], dtype=np.int64),
        "utc_offset_s": np.array(offsets, dtype=np.int32),
        "flow": np.array(flows, dtype=np.float32),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a data file comes from, and what must come out."""

    package: str
    """PyPI package, with its version."""
    extract: Callable[[zipfile.ZipFile], Arrays]
    """Reads its wheel."""
    sha256: str
    """Digest of the arrays, see `digest`; that of the .npz would change with zlib."""


SOURCES = {
    "vowels": Source(
        package="aeon==1.6.0", extract=vowels, sha256="3866588665e9329154c71e2a6a6b7781e8f7906e02845e3708301a690fb9e318"
    ),
    "waterflow": Source(
        package="river==0.26.1",
        extract=waterflow,
        sha256="0c5e36913efbee48e0b991e4df66515ba2d6ed543aa8013e01a3213715da75a5",
    ),
}


def make(name: str, wheel: Path | None = None) -> Arrays:
    """Extract a task's arrays from its package, downloading it unless a wheel is given.

    Raises DataError when it cannot be had, or holds something else than what the digest says.
    """
    source = SOURCES[name]
    with tempfile.TemporaryDirectory() as folder:
        path = wheel or _download(source.package, Path(folder))
        try:
            with zipfile.ZipFile(path) as archive:
                arrays = source.extract(archive)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"{name}: cannot read it from {path.name}: {error}") from error
    if (found := digest(arrays)) != source.sha256:
        raise DataError(f"{name}: {path.name} holds other data than {source.package}: {found}, not {source.sha256}")
    return arrays


def _download(package: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", package]
    done = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True, check=False)  # noqa: S603
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise DataError(f"pip download {package} failed: {reason}")
    return wheels[0]


@click.command()
@click.argument("name", type=click.Choice([*SOURCES, "all"]), default="all")
@click.option("--check", is_flag=True, help="Only compare with the files that ship.")
@click.option("--wheel", type=click.Path(path_type=Path), help="Read this wheel instead of downloading one.")
def main(name: str, check: bool, wheel: Path | None) -> None:
    """Make the tasks' data files again, or check them."""
    if wheel and name == "all":
        raise click.UsageError("--wheel is the package of one task: name the task")
    try:
        for each in SOURCES if name == "all" else (name,):
            arrays = make(each, wheel)
            if not check:
                np.savez_compressed(DATA / f"{each}.npz", allow_pickle=False, **arrays)
            if digest(read(each)) != SOURCES[each].sha256:
                raise DataError(f"{each}: the file that ships is not what {SOURCES[each].package} holds")
            click.echo(f"{each}: {SOURCES[each].package}, arrays sha256 {SOURCES[each].sha256}: same")
    except ModelsError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
