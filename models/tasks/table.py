"""A data file as columns: CSV, Parquet or NPZ, in long format, a row per step. Faults name column and row.

Rows are counted from 1; the header of a CSV file is none of them, and neither are its blank lines.
"""

from __future__ import annotations

import hashlib
import math
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from models.errors import DataError, MissingExtra

if TYPE_CHECKING:
    import pyarrow

Array = np.ndarray[Any, Any]
Kind = Literal["number", "whole", "truth", "time", "text", "other"]
_LOOKS_LIKE_A_NUMBER = re.compile(r"[-+]?[\d.,' ]*\d[\d.,' ]*(e[-+]?\d+)?\s*%?", re.IGNORECASE).fullmatch
"""Also as some write them: 1,5 or 1 000 or 20%."""
FORMATS = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet", ".npz")


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """One column of a file."""

    name: str
    kind: Kind
    """What its cells are."""
    values: Array
    """[rows]: float64 number, int64 whole, bool truth, int64 nanoseconds since 1970 for time, str for text."""
    is_missing: Array
    """[rows] bool: cells that hold nothing, or NaN; their values mean nothing."""
    fault: str = ""
    """Why a column of the kind "other" cannot be used."""


class Table:
    """A file's columns; every method names file, column and row where something is wrong."""

    def __init__(self, path: Path, columns: list[Column], digest: str) -> None:
        self.path = path
        self.columns = {column.name: column for column in columns}
        self.num_rows = len(columns[0].values)
        self.digest = digest
        """SHA-256 of the file, in hexadecimal."""

    def fault(self, message: str, *, column: str = "", row: int | None = None) -> DataError:
        """Say what is wrong, and where; row counts from 0 here, from 1 for people."""
        at = [f"column {column!r}"] * bool(column) + ([] if row is None else [f"row {row + 1}"])
        return DataError(": ".join([self.path.name, *([", ".join(at)] if at else []), message]))

    def __getitem__(self, name: str) -> Column:
        """Find a column. Raises DataError where there is none, or one that cannot be used."""
        if name not in self.columns:
            raise self.fault(f"no column {name!r}; there are {', '.join(self.columns)}")
        column = self.columns[name]
        if column.fault:
            raise self.fault(column.fault, column=name)
        return column

    def complete(self, name: str, advice: str) -> Column:
        """Find a column without empty cells. Raises DataError at the first one."""
        column = self[name]
        if column.is_missing.any():
            raise self.fault(f"the cell is empty or NaN; {advice}", column=name, row=int(np.argmax(column.is_missing)))
        return column

    def numbers(self, name: str, advice: str) -> Array:
        """Read a column as numbers, [rows] float64, NaN where a cell is empty.

        advice  what else the caller could do about a cell that is no number
        Raises DataError at the first cell that is no number, or infinite.
        """
        column = self[name]
        if column.kind == "time":
            raise self.fault(f"holds times, not numbers; {advice}", column=name)
        if column.kind == "text":
            values = self._parsed(column, float, f"is not a number; {advice}")
        else:
            values = column.values.astype(np.float64)
        values = np.where(column.is_missing, np.nan, values)
        # Models take float32, where numbers above 3.4e38 are infinite.
        with np.errstate(over="ignore"):
            is_infinite = np.isinf(values.astype(np.float32))
        if is_infinite.any():
            row = int(np.argmax(is_infinite))
            raise self.fault(f"{values[row]:g} is too large; mend the cell", column=name, row=row)
        return values

    def times(self, name: str) -> Array:
        """Read a column as moments that can be compared, [rows] int64 or float64. Raises DataError."""
        column = self.complete(name, "every row needs its time")
        if column.kind == "text":
            # The first cell says which of both the column is.
            parse, dtype = (float, np.float64) if _is_number(column.values[0]) else (_nanoseconds, np.int64)
            wanted = "is not a number" if parse is float else "is no time such as 2024-05-31 or 2024-05-31T10:00:00Z"
            return self._parsed(column, parse, wanted).astype(dtype)
        if not np.isfinite(column.values.astype(np.float64)).all():
            row = int(np.argmin(np.isfinite(column.values)))
            raise self.fault(f"{column.values[row]} is no time", column=name, row=row)
        return column.values

    def texts(self, name: str) -> Array:
        """Read a column as names, [rows] of str, empty where a cell is."""
        column = self[name]
        if column.kind == "number":
            named = np.array([_plain(value) for value in column.values.tolist()], dtype=object)
        else:
            named = np.array([str(value) for value in column.values.tolist()], dtype=object)
        return np.where(column.is_missing, "", named)

    def holds_numbers_as_text(self, name: str) -> bool:
        """Whether a column of text has cells that look like numbers: then it is one with a slip, not of words."""
        column = self.columns[name]
        return column.kind == "text" and any(map(_LOOKS_LIKE_A_NUMBER, {*column.values[~column.is_missing].tolist()}))

    def _parsed(self, column: Column, parse: Callable[[str], float | int], fault: str) -> Array:
        values: list[float | int] = []
        for row, (text, is_missing) in enumerate(zip(column.values.tolist(), column.is_missing.tolist(), strict=True)):
            try:
                values.append(0 if is_missing else parse(text))
            except ValueError as error:
                raise self.fault(f"{text!r} {fault}", column=column.name, row=row) from error
        return np.array(values)


def read(path: Path) -> Table:
    """Read a data file. Raises DataError, and MissingExtra without pyarrow."""
    name = path.name.lower()
    if not name.endswith(FORMATS):
        raise DataError(f"{path.name}: expected a file that ends in {', '.join(FORMATS)}")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if not file.tell():
                raise DataError(f"{path.name}: the file is empty")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    columns = _npz(path) if name.endswith(".npz") else _arrow(path)
    if not columns or not len(columns[0].values):
        raise DataError(f"{path.name}: it has no rows")
    names = [column.name for column in columns]
    if twice := sorted({each for each in names if names.count(each) > 1}):
        raise DataError(f"{path.name}: two columns are called {twice[0]!r}; rename one")
    return Table(path, columns, digest)


def _npz(path: Path) -> list[Column]:
    """Read arrays [rows], or [rows, n], which are n columns called name_0, name_1, ..."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path.name}: not an .npz file that can be read: {error}") from error
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name!r} has {length}" for name, length in lengths.items())
        raise DataError(f"{path.name}: every array needs as many rows, one per step of every sequence: {said}")
    columns = []
    for name, array in arrays.items():
        if array.ndim > 2 or array.ndim == 0:
            raise DataError(
                f"{path.name}: column {name!r}: expected shape [rows] or [rows, n], got {list(array.shape)}"
            )
        if array.ndim == 1:
            columns.append(_column(name, array))
        else:
            columns += [_column(f"{name}_{number}", array[:, number]) for number in range(array.shape[1])]
    return columns


def _column(name: str, array: Array, is_missing: Array | None = None) -> Column:
    """Make a column of an array by its type."""
    missing = np.zeros(len(array), dtype=bool) if is_missing is None else is_missing
    match array.dtype.kind:
        case "b":
            return Column(name, "truth", array, missing)
        case "u" if len(array) and array.max() > np.iinfo(np.int64).max:
            return Column(name, "text", array.astype(str).astype(object), missing)
        case "i" | "u":
            return Column(name, "whole", array.astype(np.int64), missing)
        case "f":
            return Column(name, "number", array.astype(np.float64), missing | np.isnan(array))
        case "M":
            return Column(name, "time", array.astype("datetime64[ns]").astype(np.int64), missing | np.isnat(array))
        case "U" | "O":
            texts = np.array([str(text).strip() for text in array.tolist()], dtype=object)
            return Column(name, "text", texts, missing | (texts == ""))
        case _:
            return _unusable(name, len(array), f"holds {array.dtype}; numbers, text and times can be read")


def _unusable(name: str, num_rows: int, fault: str) -> Column:
    return Column(name, "other", np.zeros(num_rows), np.zeros(num_rows, dtype=bool), fault)


def _arrow(path: Path) -> list[Column]:
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(f"reading {path.name}", package="pyarrow", extra="train", purpose="training") from error
    table = _parquet(path) if path.name.lower().endswith(".parquet") else _csv(path)
    return [_of_arrow(name, array) for name, array in zip(table.column_names, table.columns, strict=True)]


def _csv(path: Path) -> pyarrow.Table:
    """Read text whose cells are set apart by commas, semicolons or tabs, whichever its header has first."""
    import pyarrow
    from pyarrow import csv

    wrong: list[Any] = []

    def refuse(row: Any) -> str:
        wrong.append(row)
        return "error"

    try:
        with pyarrow.input_stream(str(path)) as file:
            header = file.read(1 << 16).decode("utf-8", errors="replace").partition("\n")[0]
        delimiter = next((mark for mark in header if mark in ",;\t"), ",")
        # One thread: only then do errors know their rows.
        return csv.read_csv(
            path,
            read_options=csv.ReadOptions(use_threads=False),
            parse_options=csv.ParseOptions(delimiter=delimiter, invalid_row_handler=refuse),
        )
    except pyarrow.ArrowInvalid as error:
        if wrong:
            [row] = wrong[:1]
            raise DataError(
                f"{path.name}: row {row.number - 1}: {row.actual_columns} cells, but the header names "
                f"{row.expected_columns} columns"
            ) from error
        raise DataError(f"{path.name}: not a CSV file that can be read: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read: {str(error).splitlines()[0]}") from error


def _parquet(path: Path) -> pyarrow.Table:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path, use_threads=False)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path.name}: not a Parquet file that can be read: {str(error).splitlines()[0]}") from error


def _of_arrow(name: str, array: Any) -> Column:
    """Make a column of one of Arrow's chunked arrays."""
    import pyarrow
    import pyarrow.types as of

    if of.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if of.is_decimal(array.type):
        array = array.cast(pyarrow.float64())
    kind, missing = array.type, array.is_null().to_numpy()
    if of.is_null(kind):
        return Column(name, "number", np.zeros(len(array)), missing)
    if of.is_date(kind) or of.is_timestamp(kind):
        return _column(name, array.cast(pyarrow.timestamp("ns")).to_numpy())
    if of.is_boolean(kind):
        return _column(name, array.fill_null(False).to_numpy(), missing)
    if of.is_integer(kind) or of.is_floating(kind):
        return _column(name, array.fill_null(0).to_numpy(), missing)
    if of.is_string(kind) or of.is_large_string(kind) or of.is_string_view(kind):
        return _column(name, np.array(array.fill_null("").to_pylist(), dtype=object), missing)
    if of.is_binary(kind):
        return _unusable(name, len(array), "holds bytes that are not UTF-8; save the file as UTF-8")
    return _unusable(name, len(array), f"holds {kind}; numbers, text, dates with times, true and false can be read")


def _plain(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _nanoseconds(text: str) -> int:
    """Read a time in ISO 8601, UTC unless it says otherwise."""
    moment = datetime.fromisoformat(text)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return round((moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1e6) * 1000
