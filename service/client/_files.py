"""Input files of the command line -> arrays. What can't be read is told with file, line and column."""

from __future__ import annotations

import csv
import json
import os
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from service.client import _codec
from service.client.errors import InvalidArgument
from service.client.info import ModelInfo, TensorInfo
from service.tensors import Array

STDIN = "-"
Step = Array | dict[str, Array]
"""One timestep: [*row_shape] of the only per-step input, or by name."""


class InputError(click.ClickException):
    """Input that can't be read; the message names the place."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        """Print one line on standard error."""
        click.echo(f"rnnserve: {self.format_message()}", file=file, err=True)


def read_sequences(path: str, info: ModelInfo) -> list[tuple[str, Step]]:
    """Read the whole sequences of a file: (name, [time, *row_shape] or that by name of input).

    .npy holds one sequence, or several of one length in its first axis; .npz one a name, or one of several inputs by
    their names; anything else is text with a step a line. Raises InputError.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".npy":
        return _split(path, _load(path), info)
    if suffix == ".npz":
        arrays = _load(path)
        if len(info.step_inputs) > 1:
            return [(path, arrays)]
        return [found for name in arrays for found in _split(f"{path}:{name}", arrays[name], info)]
    steps: list[Any] = list(read_steps(path, info))
    if not steps:
        raise InputError(f"{path}: no timesteps")
    if len(info.step_inputs) > 1:
        return [(path, {spec.name: np.stack([step[spec.name] for step in steps]) for spec in info.step_inputs})]
    return [(path, np.stack(steps))]


def read_text(text: str, info: ModelInfo) -> Array:
    """Read a text as one sequence, a character a step: ids [time]. Raises InputError where the model takes none."""
    spec = _sole_input(info)
    if not spec.is_text:
        raise InputError(f"model {info.name} takes no text: {spec.name} is not of characters; leave --text out")
    if not text:
        raise InputError("an empty text has no timesteps")
    return _codec.rows_of(text, spec, spec.name, "time")


def read_steps(path: str, info: ModelInfo) -> Iterator[Step]:
    """Read timesteps as they come: from standard input ("-") each line when it is there. Raises InputError."""
    suffix = Path(path).suffix.lower()
    if suffix in (".npy", ".npz"):
        sequences = read_sequences(path, info)
        if len(sequences) != 1:
            raise InputError(f"{path}: expected one sequence, got {len(sequences)}")
        sequence = sequences[0][1]
        if not isinstance(sequence, dict):
            yield from sequence
            return
        chunk = _codec.chunk_of(info, sequence)
        for i in range(len(next(iter(chunk.values())))):
            yield {name: array[i] for name, array in chunk.items()}
        return
    lines = _stdin_lines() if path == STDIN else _file_lines(path)
    yield from _parse("standard input" if path == STDIN else path, lines, info)


def _load(path: str) -> Any:
    """Read a .npy file's array, or a .npz file's arrays by name."""
    try:
        with Path(path).open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return loaded if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a NumPy file that can be read: {error}") from error


def _split(name: str, array: Array, info: ModelInfo) -> list[tuple[str, Step]]:
    """Tell one sequence from several by the number of axes."""
    spec = _sole_input(info)
    num_axes = len(spec.row_shape)
    if array.ndim == num_axes and spec.row_shape == (1,):
        array = array[:, None]
    if array.ndim == num_axes + 1:
        return [(name, array)]
    if array.ndim == num_axes + 2:
        return [(f"{name}[{i}]", each) for i, each in enumerate(array)]
    expected = ", ".join(["time", *map(str, spec.row_shape)])
    raise InputError(f"{name}: expected shape [{expected}], got {list(array.shape)}")


def _sole_input(info: ModelInfo) -> TensorInfo:
    if len(info.step_inputs) != 1:
        names = ", ".join(spec.name for spec in info.step_inputs)
        raise InputError(f"model {info.name} takes several inputs ({names}): give them by name, in .npz or JSON lines")
    return info.step_inputs[0]


# ---- text ------------------------------------------------------------------------------------------------------------


def _parse(name: str, lines: Iterable[str], info: ModelInfo) -> Iterator[Step]:
    """Read lines of JSON or CSV, told apart by the first."""
    is_json: bool | None = None
    table: _Table | _Columns | None = None
    for number, line in enumerate(lines, 1):
        text = line.strip().removeprefix("\ufeff")
        if not text:
            continue
        if is_json is None:
            is_json = text[0] in "[{"
        if is_json:
            yield _json_step(f"{name}, line {number}", text, info)
        elif table is None:
            table = _Columns(info, text) if _has_columns(info) else _Table(_sole_input(info), text)
            yield from table.first(f"{name}, line {number}", text)
        else:
            yield from table.steps(f"{name}, line {number}", text)


class _Table:
    """CSV, with commas, semicolons, tabs or blanks; a first row of names may choose and order the columns."""

    def __init__(self, spec: TensorInfo, first: str) -> None:
        self._spec = spec
        self._convert = int if spec.dtype.startswith("int") else float
        self._delimiter = _delimiter(first)
        self._columns: list[int] | None = None

    def first(self, where: str, line: str) -> list[Array]:
        """Read the first row: names, or a step."""
        cells = _cells(line, self._delimiter)
        if any(_is_number(cell) for cell in cells):
            return self.steps(where, line)
        names = self._spec.element_names
        if names and all(name in cells for name in names):
            self._columns = [cells.index(name) for name in names]
        return []

    def steps(self, where: str, line: str) -> list[Array]:
        """Read a row: one step, or as many as it has token ids. Raises InputError."""
        cells = _cells(line, self._delimiter)
        columns = range(len(cells)) if self._columns is None else self._columns
        values = []
        for column in columns:
            try:
                values.append(self._convert(cells[column]))
            except (ValueError, IndexError):
                got = repr(cells[column]) if column < len(cells) else "nothing"
                kind = "an integer" if self._convert is int else "a number"
                raise InputError(f"{where}, column {column + 1}: expected {kind}, got {got}") from None
        shape = self._spec.row_shape
        if not shape:
            return [np.asarray(value) for value in values]
        expected = int(np.prod(shape))
        if len(values) != expected:
            column = min(len(values), expected) + 1
            raise InputError(f"{where}, column {column}: expected {expected} values, got {len(values)}")
        return [np.asarray(values).reshape(shape)]


class _Columns:
    """CSV for a model of several inputs, or of categories: the first row names the columns, whichever else it has."""

    def __init__(self, info: ModelInfo, first: str) -> None:
        self._info = info
        self._delimiter = _delimiter(first)
        self._places: dict[str, int] = {}

    def first(self, where: str, line: str) -> list[Step]:
        """Read the row of names. Raises InputError that names those that are missing."""
        cells = _cells(line, self._delimiter)
        self._places = {name: cells.index(name) for name in _element_names(self._info) if name in cells}
        if missing := [name for name in _element_names(self._info) if name not in cells]:
            raise InputError(f"{where}: the first row names the columns, and {', '.join(missing)} is not among them")
        return []

    def steps(self, where: str, line: str) -> list[Step]:
        """Read a row. Raises InputError."""
        cells = _cells(line, self._delimiter)
        values: dict[str, Any] = {}
        for spec in self._info.step_inputs:
            convert: Any = str if spec.categories else int if spec.dtype.startswith("int") else float
            for name in spec.element_names or (spec.name,):
                column = self._places[name]
                try:
                    values[name] = convert(cells[column])
                except (ValueError, IndexError):
                    got = repr(cells[column]) if column < len(cells) else "nothing"
                    kind = {str: "a category", int: "an integer", float: "a number"}[convert]
                    raise InputError(f"{where}, column {column + 1} ({name}): expected {kind}, got {got}") from None
        return [_assembled(where, values, self._info)]


def _has_columns(info: ModelInfo) -> bool:
    """Whether a model's inputs can be told apart, and need be, by the names of columns."""
    needs = len(info.step_inputs) > 1 or any(spec.categories for spec in info.step_inputs)
    return needs and all(spec.element_names or not spec.row_shape for spec in info.step_inputs)


def _delimiter(line: str) -> str | None:
    return next((mark for mark in ",;\t" if mark in line), None)


def _cells(line: str, delimiter: str | None) -> list[str]:
    if delimiter is None:
        return line.split()
    return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))]


def _element_names(info: ModelInfo) -> list[str]:
    return [name for spec in info.step_inputs for name in spec.element_names or (spec.name,)]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _json_step(where: str, line: str, info: ModelInfo) -> Step:
    """Read an array, or an object by names of inputs or of the only input's elements."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}, column {error.colno}: not JSON: {error.msg}") from error
    if isinstance(value, dict) and set(value) != {spec.name for spec in info.step_inputs}:
        return _assembled(where, value, info)
    return _checked(where, value, info)


def _assembled(where: str, values: dict[str, Any], info: ModelInfo) -> Step:
    """Put a step together from values by the names of elements, or of inputs without such. Raises InputError."""
    if missing := [name for name in _element_names(info) if name not in values]:
        raise InputError(f"{where}, column 1: {', '.join(missing)} is missing")
    step = {
        spec.name: [values[name] for name in spec.element_names] if spec.element_names else values[spec.name]
        for spec in info.step_inputs
    }
    return _checked(where, step, info)


def _checked(where: str, value: Any, info: ModelInfo) -> Step:
    try:
        step = {name: array[0] for name, array in _codec.step_of(info, value).items()}
    except InvalidArgument as error:
        raise InputError(f"{where}, column 1: {error.message}") from error
    return step if len(step) > 1 else next(iter(step.values()))


def _file_lines(path: str) -> Iterator[str]:
    try:
        with Path(path).open(encoding="utf-8", newline=None) as file:
            yield from file
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not text: byte {error.start} is not UTF-8") from error


def _stdin_lines() -> Iterator[str]:
    """Yield lines as soon as they are there.

    From the file descriptor: a thread that waits in Python's own buffered reader keeps the interpreter from ending.
    """
    try:
        number = sys.stdin.fileno()
    except (OSError, ValueError):
        yield from sys.stdin
        return
    rest = b""
    try:
        while piece := os.read(number, 1 << 16):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                yield line.decode()
        yield rest.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: not text: {error.reason}") from error
