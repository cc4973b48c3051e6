"""numpy arrays <-> (dtype name, shape, raw little-endian row-major bytes), every product and sum checked before use.

Knows no transport: the mapping of a protocol's enums to dtype names is the business of whoever speaks the protocol.
Laws, for every array `a` of a known dtype:

    decode(encode(a), dtype_name(a), a.shape) equals a, bit for bit
    decode refuses any other number of bytes, and never copies them
    concatenate(split_rows(a, lengths)) equals a
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from service.errors import BadValue, InvalidInput, ShapeMismatch

Array = np.ndarray[Any, Any]

DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "float32": np.dtype("<f4"),
        "int64": np.dtype("<i8"),
        "int32": np.dtype("<i4"),
        "float64": np.dtype("<f8"),
        "bool": np.dtype("?"),
    }
)
"""Every dtype that travels, as it lies on the wire."""
MAX_ELEMENTS = 2**31
"""Default limit of num_elements: a message of gRPC can't hold more than 2 GiB."""
MAX_DIMS = 32
"""Most dimensions that every supported numpy can hold."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_IS_LITTLE = sys.byteorder == "little"


def num_elements(shape: Sequence[int], *, limit: int = MAX_ELEMENTS, field: str | None = None) -> int:
    """Multiply the dimensions of a shape that a stranger sent.

    Dimensions of 0 count as 1 against the limit, since numpy can't hold (0, 2**62, 2**62) either.
    Raises ShapeMismatch for too many dimensions, a negative one, or a product over `limit`.
    """
    if len(shape) > MAX_DIMS:
        raise ShapeMismatch(f"expected at most {MAX_DIMS} dimensions, got {len(shape)}", field=field)
    total = nonzero = 1
    for dim in shape:
        if dim < 0:
            raise ShapeMismatch(f"shape {list(shape)}: expected dimensions of at least 0, got {dim}", field=field)
        total *= dim
        nonzero *= dim or 1
        if nonzero > limit:
            raise ShapeMismatch(f"shape {list(shape)}: expected at most {limit} elements, got more", field=field)
    return total


def wire_dtype(name: str, *, field: str | None = None) -> np.dtype[Any]:
    """Find a dtype by its name. Raises InvalidInput, naming those there are."""
    try:
        return DTYPES[name]
    except KeyError:
        raise InvalidInput(f"dtype {name!r}: expected one of {', '.join(DTYPES)}", field=field) from None


def dtype_name(array: Array, *, field: str | None = None) -> str:
    """Name an array's dtype, whatever its byte order. Raises InvalidInput for one that can't travel."""
    name = _NAMES.get(array.dtype)  # numpy's own `name` is slow, and this is asked for every step
    if name is not None:
        return name
    if array.dtype.name not in DTYPES:
        raise InvalidInput(f"dtype {array.dtype.name}: expected one of {', '.join(DTYPES)}", field=field)
    return str(array.dtype.name)


def decode(
    data: bytes | bytearray | memoryview,
    name: str,
    shape: Sequence[int],
    *,
    limit: int = MAX_ELEMENTS,
    field: str | None = None,
) -> Array:
    """View bytes as an array, without a copy.

    data   raw little-endian elements in row-major order
    name   of the dtype, a key of DTYPES
    shape  any number of dimensions, none negative
    Returns a read-only array of `shape` that shares memory with `data`.
    Raises ShapeMismatch when the bytes don't fit, BadValue for a bool that is neither 0 nor 1, InvalidInput for an
    unknown dtype.
    """
    dtype = wire_dtype(name, field=field)
    expected = num_elements(shape, limit=limit, field=field) * dtype.itemsize
    got = memoryview(data).nbytes
    if got != expected:
        raise ShapeMismatch(
            f"{name} of shape {list(shape)}: expected {expected} bytes, got {got}",
            field=field,
            metadata={"expected_bytes": str(expected), "got_bytes": str(got)},
        )
    if name == "bool":
        _check_bools(data, field)
    array = np.frombuffer(data, dtype=dtype).reshape(tuple(shape))
    array.flags.writeable = False
    return array


def encode(array: Array, *, field: str | None = None) -> bytes:
    """Copy an array's elements out as little-endian row-major bytes. Raises InvalidInput for a dtype not in DTYPES."""
    dtype = DTYPES[dtype_name(array, field=field)]
    if not (_IS_LITTLE and array.dtype.isnative):
        array = array.astype(dtype, copy=False)
    return array.tobytes()


def check_lengths(
    lengths: Sequence[int] | Array,
    num_rows: int,
    *,
    minimum: int = 1,
    field: str | None = None,
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Check that lengths divide the rows of a packed tensor.

    lengths   [sequences], each at least `minimum`
    num_rows  rows of the packed tensor, their sum
    Returns the lengths as int64. Raises ShapeMismatch.
    """
    try:
        counts = np.asarray(lengths, dtype=np.int64)
    except OverflowError:
        raise ShapeMismatch(f"expected lengths that sum to {num_rows} rows, got one over 2**63", field=field) from None
    if counts.ndim != 1:
        raise ShapeMismatch(f"expected lengths in one dimension, got {counts.ndim}", field=field)
    if counts.size and (least := int(counts.min())) < minimum:
        entry = int(counts.argmin())
        raise ShapeMismatch(f"lengths[{entry}]: expected at least {minimum}, got {least}", field=field)
    # One entry over num_rows is enough to refuse; only then may the sum overflow int64, so Python adds.
    is_over = counts.size > 0 and int(counts.max()) > num_rows
    total = sum(counts.tolist()) if is_over else int(counts.sum())
    if total != num_rows:
        raise ShapeMismatch(f"expected lengths that sum to {num_rows} rows, got {total}", field=field)
    return counts


def split_rows(array: Array, lengths: Sequence[int] | Array, *, field: str | None = None) -> list[Array]:
    """Cut a packed tensor into its sequences.

    array    [sum(lengths), ...]
    lengths  [sequences], zeros allowed
    Returns one view [lengths[i], ...] a sequence. Raises ShapeMismatch when the lengths don't sum to the rows.
    """
    if array.ndim == 0:
        raise ShapeMismatch("expected rows, got a tensor without dimensions", field=field)
    ends = np.cumsum(check_lengths(lengths, array.shape[0], minimum=0, field=field)).tolist()
    starts = [0, *ends[:-1]]
    return [array[start:end] for start, end in zip(starts, ends, strict=False)]


def _check_bools(data: bytes | bytearray | memoryview, field: str | None) -> None:
    elements = np.frombuffer(data, dtype=np.uint8)
    wrong = np.flatnonzero(elements > 1)
    if wrong.size:
        at = int(wrong[0])
        raise BadValue(f"bool at element {at}: expected a byte 0 or 1, got {int(elements[at])}", field=field)
