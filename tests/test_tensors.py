"""service.tensors: round trips, and refusal of everything that doesn't fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from service import tensors
from service.errors import BadValue, InvalidInput, ShapeMismatch

dtype_names = st.sampled_from(sorted(tensors.DTYPES))
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
arrays = dtype_names.flatmap(lambda name: hnp.arrays(name, shapes))


def raw(array):
    """Bytes of an array, which compares NaNs too."""
    return np.ascontiguousarray(array).tobytes()


@given(arrays)
def test_round_trip_is_bit_for_bit(array):
    data = tensors.encode(array)
    back = tensors.decode(data, tensors.dtype_name(array), array.shape)
    assert back.shape == array.shape
    assert back.dtype == array.dtype
    assert raw(back) == raw(array)


@given(arrays)
def test_byte_order_and_memory_order_do_not_matter(array):
    data = tensors.encode(array)
    swapped = array.astype(array.dtype.newbyteorder(">"))
    assert tensors.encode(swapped) == data
    assert tensors.encode(np.asfortranarray(array).reshape(array.shape)) == data
    assert tensors.encode(np.repeat(array[..., None], 2, axis=-1)[..., 0]) == data


@given(dtype_names, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), st.integers(0, 400))
def test_every_other_number_of_bytes_is_refused(name, shape, num_bytes):
    expected = int(np.prod(shape)) * np.dtype(name).itemsize
    if num_bytes == expected:
        assert tensors.decode(bytes(num_bytes), name, shape).nbytes == expected
        return
    with pytest.raises(ShapeMismatch, match=f"expected {expected} bytes, got {num_bytes}") as caught:
        tensors.decode(bytes(num_bytes), name, shape, field="tensors[0].data")
    assert caught.value.field == "tensors[0].data"


@pytest.mark.parametrize("cut", range(1, 24))
def test_truncated_and_extended_bytes_are_refused(cut):
    data = tensors.encode(np.arange(6, dtype=np.float32))
    with pytest.raises(ShapeMismatch, match="expected 24 bytes"):
        tensors.decode(data[:-cut], "float32", (2, 3))
    with pytest.raises(ShapeMismatch, match="expected 24 bytes"):
        tensors.decode(data + bytes(cut), "float32", (2, 3))


@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview])
def test_decoding_shares_memory_and_is_read_only(buffer):
    data = buffer(tensors.encode(np.arange(4, dtype=np.int32)))
    array = tensors.decode(data, "int32", (4,))
    assert np.shares_memory(array, np.frombuffer(data, dtype=np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([2, -1], r"shape \[2, -1\]: expected dimensions of at least 0, got -1"),
        ([2**40, 2**40], "expected at most 2147483648 elements, got more"),
        ([0, 2**62, 2**62], "expected at most 2147483648 elements, got more"),
        ([2**62, 2**62, 0], "expected at most 2147483648 elements, got more"),
        ([1] * 33, "expected at most 32 dimensions, got 33"),
    ],
)
def test_shapes_that_cannot_be(shape, message):
    with pytest.raises(ShapeMismatch, match=message):
        tensors.num_elements(shape)
    with pytest.raises(ShapeMismatch, match=message):
        tensors.decode(b"", "float32", shape)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6), st.integers(1, 2**20))
def test_a_shape_is_counted_or_refused(shape, limit):
    try:
        count = tensors.num_elements(shape, limit=limit)
    except ShapeMismatch:
        return
    assert count <= limit
    assert np.empty(shape, dtype=np.bool_).size == count


def test_bools_are_0_or_1():
    assert tensors.decode(b"\x00\x01", "bool", (2,)).tolist() == [False, True]
    with pytest.raises(BadValue, match="bool at element 2: expected a byte 0 or 1, got 7"):
        tensors.decode(b"\x00\x01\x07\x08", "bool", (2, 2), field="x")


@pytest.mark.parametrize("dtype", ["float16", "uint8", "complex64", "U3", "O", "datetime64[s]"])
def test_other_dtypes_are_refused(dtype):
    array = np.zeros(2, dtype=dtype)
    with pytest.raises(InvalidInput, match="expected one of float32, int64, int32, float64, bool"):
        tensors.encode(array)
    with pytest.raises(InvalidInput, match="expected one of float32, int64, int32, float64, bool"):
        tensors.decode(b"", array.dtype.name, (0,))


@given(st.lists(st.integers(0, 6), max_size=8), st.integers(0, 3))
def test_split_rows_and_concatenate_are_inverse(lengths, width):
    packed = np.arange(sum(lengths) * width, dtype=np.float32).reshape(sum(lengths), width)
    rows = tensors.split_rows(packed, lengths)
    assert [r.shape for r in rows] == [(n, width) for n in lengths]
    np.testing.assert_array_equal(np.concatenate([packed[:0], *rows]), packed)


@given(st.lists(st.integers(1, 2**32 - 1), max_size=5), st.integers(0, 2**33))
def test_lengths_sum_to_the_rows(lengths, num_rows):
    if sum(lengths) == num_rows:
        assert tensors.check_lengths(lengths, num_rows).tolist() == lengths
    else:
        with pytest.raises(ShapeMismatch, match=f"sum to {num_rows} rows, got {sum(lengths)}"):
            tensors.check_lengths(lengths, num_rows)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, 0], r"lengths\[1\]: expected at least 1, got 0"),
        ([4, -1], r"lengths\[1\]: expected at least 1, got -1"),
        ([2**62, 2**62, 2**62, 2**62, 3], "sum to 3 rows, got 18446744073709551619"),
        ([2**64], r"got one over 2\*\*63"),
        ([[1, 2]], "one dimension, got 2"),
    ],
)
def test_lengths_that_cannot_be(lengths, message):
    with pytest.raises(ShapeMismatch, match=message) as caught:
        tensors.check_lengths(lengths, 3, field="lengths")
    assert caught.value.field == "lengths"


def test_a_scalar_has_no_rows():
    with pytest.raises(ShapeMismatch, match="without dimensions"):
        tensors.split_rows(np.float32(1).reshape(()), [1])
