"""Rows of a data file in order, dealt out to splits, and cut into sequences. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.errors import DataError
from models.tasks.settings import DataSettings
from models.tasks.table import Table

Array = np.ndarray[Any, Any]
SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of a file, sequence by sequence, each in the order of time."""

    order: Array
    """[rows] rows of the file; sequences are in the order of their names, so that the file's order is of no account."""
    sequence: Array
    """[rows] number of each row's sequence, from 0 up."""
    names: list[str]
    """Name of each sequence."""
    time: Array
    """[rows] moments; rows of the file, where it has none."""

    @property
    def starts(self) -> Array:
        """[sequences] where each sequence begins."""
        return np.flatnonzero(np.diff(self.sequence, prepend=-1))

    @property
    def ends(self) -> Array:
        """[sequences] where each has its last row."""
        return np.append(self.starts[1:], len(self.order)) - 1


@dataclass(frozen=True, slots=True)
class Piece:
    """Steps of one sequence in one split."""

    part: int
    """Its split: TRAIN, VALIDATION or TEST."""
    inputs: slice
    """Rows that the model reads."""
    targets: slice
    """Rows that hold what is asked at each of them."""


def arrange(table: Table, settings: DataSettings) -> Rows:
    """Put rows in order. Raises DataError for a row without sequence or time, and for a time that comes twice."""
    names, sequence = [""], np.zeros(table.num_rows, dtype=np.int64)
    if settings.sequence_column:
        column = table.complete(settings.sequence_column, "every row needs its sequence")
        unique, sequence = np.unique(column.values, return_inverse=True)
        names = [str(name) for name in unique.tolist()]
    if not settings.time_column:
        order = np.argsort(sequence, kind="stable")
        return Rows(order, sequence[order], names, order)
    times = table.times(settings.time_column)
    order = np.lexsort((times, sequence))
    rows = Rows(order, sequence[order], names, times[order])
    again = (np.diff(rows.sequence) == 0) & (np.diff(times[order]) == 0)
    if again.any():
        first, second = sorted(order[np.argmax(again) :][:2].tolist())
        of = f"sequence {names[sequence[second]]!r}" if settings.sequence_column else "the file"
        raise table.fault(
            f"{of} has this time already in row {first + 1}; a sequence has one row per time",
            column=settings.time_column,
            row=second,
        )
    return rows


def deal(table: Table, settings: DataSettings, rows: Rows, *, one_answer: bool, classes: Array | None) -> Array:
    """Give every row its split: [rows] of TRAIN, VALIDATION or TEST, in the order of `rows`.

    one_answer  whether a sequence has one answer, and so cannot be cut
    classes     [sequences] class of each, so that every split has its share of each; None where they have none
    Raises DataError when a sequence is in two splits, or there are too few to split.
    """
    if settings.split_column:
        return _given(table, settings.split_column, rows)
    if settings.split == "sequence":
        return _shuffled(table, settings, len(rows.names), classes)[rows.sequence]
    moments = rows.time[rows.ends] if one_answer else rows.time
    parts = np.searchsorted(_borders(table, settings, moments), moments, side="right")
    return parts[rows.sequence] if one_answer else parts


def cut(table: Table, settings: DataSettings, rows: Rows, parts: Array) -> list[Piece]:
    """Cut rows into sequences, and those to train on into windows. Raises DataError for a split without any."""
    horizon = settings.horizon or 0
    begins = np.flatnonzero(np.diff(rows.sequence, prepend=-1) | np.diff(parts, prepend=-1))
    pieces = []
    for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(parts)], strict=True):
        length = end - begin - horizon
        part = int(parts[begin])
        if length < 1:
            continue
        size = min(settings.window or length, length) if part == TRAIN else length
        # The last window is flush with the sequence's end.
        for start in sorted({*range(0, length - size, settings.stride or size), length - size}):
            first = begin + start
            asked = slice(first + horizon, first + horizon + size)
            pieces.append(Piece(part, slice(first, first + size), asked))
    for part, name in enumerate(SPLITS):
        if not any(piece.part == part for piece in pieces):
            long_enough = f" longer than the horizon of {horizon}" if horizon else ""
            raise table.fault(f"no sequence{long_enough} is left for {name}: give more data or another split")
    return pieces


def _given(table: Table, name: str, rows: Rows) -> Array:
    """Read splits from a column."""
    table.complete(name, f"every row needs its split: {', '.join(SPLITS)}")
    texts = table.texts(name)
    parts = np.full(len(texts), -1)
    for part, split in enumerate(SPLITS):
        parts[texts == split] = part
    if (parts < 0).any():
        row = int(np.argmin(parts))
        raise table.fault(f"{texts[row]!r} is no split: {', '.join(SPLITS)}", column=name, row=row)
    ordered: Array = parts[rows.order]
    strays = ordered != ordered[rows.starts][rows.sequence]
    if strays.any():
        at = int(np.argmax(strays))
        start = int(rows.starts[rows.sequence[at]])
        raise table.fault(
            f"sequence {rows.names[rows.sequence[at]]!r} is in {SPLITS[ordered[at]]} here, and in "
            f"{SPLITS[ordered[start]]} in row {rows.order[start] + 1}; a sequence belongs to one split",
            column=name,
            row=int(rows.order[at]),
        )
    return ordered


def _borders(table: Table, settings: DataSettings, moments: Array) -> Array:
    """Find the first moments of validation and of test: those that come nearest to the shares that are asked for."""
    different, counts = np.unique(moments, return_counts=True)
    if len(different) < len(SPLITS):
        raise table.fault(
            f"{len(different)} different times are too few to train, validate and test on",
            column=settings.time_column or "",
        )
    before = np.cumsum(counts) - counts
    held_out = settings.validation_fraction + settings.test_fraction
    # Rounded first: 1 - 0.2 - 0.2 is a little more than 0.6.
    first, second = (math.floor(round(len(moments) * (1 - share), 6)) for share in (held_out, settings.test_fraction))
    one = 1 + int(np.argmin(np.abs(before[1:-1] - first)))
    two = one + 1 + int(np.argmin(np.abs(before[one + 1 :] - second)))
    return different[[one, two]]


def _shuffled(table: Table, settings: DataSettings, count: int, classes: Array | None) -> Array:
    """Draw the split of each sequence, [sequences]; of every class, one sequence at least trains."""
    shares = {VALIDATION: settings.validation_fraction, TEST: settings.test_fraction}
    sizes = {part: max(1, round(count * share)) for part, share in shares.items()}
    if count - sum(sizes.values()) < 1:
        raise _too_few(table, count)
    drawn = np.random.default_rng(settings.split_seed).permutation(count)
    parts = np.full(count, TRAIN)
    if classes is not None:
        drawn = drawn[np.argsort(classes[drawn], kind="stable")]
        is_first = np.diff(classes[drawn], prepend=-1) != 0
        drawn = drawn[~is_first]
    for part, size in sizes.items():
        if size > len(drawn):
            raise _too_few(table, count)
        # Evenly spaced among sequences in the order of their classes: every class gives its share.
        picked = ((np.arange(size) + 0.5) * len(drawn) / size).astype(np.int64)
        parts[drawn[picked]] = part
        drawn = np.delete(drawn, picked)
    return parts


def _too_few(table: Table, count: int) -> DataError:
    return table.fault(
        f"{count} sequences are too few to train, validate and test on; give more, or split by time, or lower "
        "validation_fraction and test_fraction"
    )
