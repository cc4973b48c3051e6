"""Tensors of the Open Inference Protocol's requests, one by one: elements, shapes, and how rows lie in them.

A per-step tensor comes in one of two forms: padded, [sequences, time, *row], where `lengths` [sequences] says how many
steps are real; or packed, [sum(lengths), *row]. Without `lengths` every step is real, and packed rows are one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.spec import LENGTHS, Layout, StateSpec, TensorSpec
from service.errors import InvalidInput, ShapeMismatch, Unimplemented
from service.pb.inference import inference_pb2 as pb
from service.tensors import check_lengths, decode, num_elements

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Tensor = pb.ModelInferRequest.InferInputTensor

DATATYPES = {"float32": "FP32", "float64": "FP64", "int32": "INT32", "int64": "INT64", "bool": "BOOL"}
"""The protocol's names of dtypes."""
DTYPES = {name: dtype for dtype, name in DATATYPES.items()}
_CONTENTS = {
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "BOOL": "bool_contents",
}
_REFUSED = ("shared_memory_region", "classification")
"""Parameters of tensors that would change the answer."""


@dataclass(frozen=True, slots=True)
class Form:
    """How the per-step tensors of a request lie."""

    num_sequences: int
    """Of a padded request; 0 for a packed one."""
    num_steps: int
    """On the axis of time; of a packed request its rows."""

    @property
    def num_rows(self) -> int:
        """Rows of a tensor, padding included."""
        return (self.num_sequences or 1) * self.num_steps

    def shape(self, num_sequences: int, row_shape: Sequence[int], *, is_per_step: bool) -> tuple[int, ...]:
        """Shape of an output."""
        if not is_per_step:
            return (num_sequences, *row_shape)
        return (self.num_sequences, self.num_steps, *row_shape) if self.num_sequences else (self.num_steps, *row_shape)

    def check(self, lengths: Ints) -> Ints:
        """Check the lengths of a request against its other tensors; gives them back. Raises ShapeMismatch."""
        if not self.num_sequences:
            return check_lengths(lengths, self.num_steps, field=LENGTHS)
        if len(lengths) != self.num_sequences:
            raise ShapeMismatch(f"{len(lengths)} lengths for {self.num_sequences} sequences", field=LENGTHS)
        if not ((lengths >= 1) & (lengths <= self.num_steps)).all():
            raise ShapeMismatch(
                f"lengths lie in 1..{self.num_steps}, the axis of time; got {lengths.min()} to {lengths.max()}",
                field=LENGTHS,
            )
        return lengths

    def is_padded(self, lengths: Ints) -> bool:
        """Whether some of the rows are not real."""
        return bool(self.num_sequences) and not (lengths == self.num_steps).all()


class Row:
    """What is known of a tensor before one arrives."""

    __slots__ = ("datatype", "dtype", "is_per_step", "itemsize", "name", "shape")

    def __init__(self, spec: TensorSpec | StateSpec, name: str = "") -> None:
        self.name = name or spec.name
        self.dtype = spec.dtype
        self.datatype = DATATYPES[spec.dtype]
        self.shape = tuple(spec.row_shape)
        self.itemsize = np.dtype(spec.dtype).itemsize
        self.is_per_step = isinstance(spec, TensorSpec) and spec.layout is Layout.PER_STEP

    def form(self, tensor: Tensor, at: str) -> Form:
        """Tell how a per-step tensor lies. Raises ShapeMismatch."""
        shape = tuple(tensor.shape)
        lead = len(shape) - len(self.shape)
        if lead not in (1, 2) or shape[lead:] != self.shape:
            padded, packed = (str(["sequences", "time", *self.shape]), str(["steps", *self.shape]))
            raise ShapeMismatch(
                f"{self.name}: expected {padded} or {packed}, got shape {list(shape)}".replace("'", ""),
                field=f"{at}.shape",
            )
        if min(shape[:lead]) < 1:
            raise ShapeMismatch(f"{self.name}: shape {list(shape)} has no steps", field=f"{at}.shape")
        return Form(shape[0], shape[1]) if lead == 2 else Form(0, shape[0])

    def view(self, tensor: Tensor, content: bytes, at: str) -> Array:
        """View a tensor's bytes as an array. Raises InvalidInput and its kin."""
        if tensor.datatype != self.datatype:
            raise InvalidInput(
                f"{self.name} is {self.datatype}, got {tensor.datatype or 'no datatype'}; convert it before sending",
                field=f"{at}.datatype",
            )
        return decode(content, self.dtype, tensor.shape, field=f"{at}.shape")

    def view_once(self, tensor: Tensor, content: bytes, at: str) -> Array:
        """View what has a row for each sequence, [sequences, *row]. Raises InvalidInput and its kin."""
        if tuple(tensor.shape[1:]) != self.shape or len(tensor.shape) < 1:
            raise ShapeMismatch(
                f"{self.name}: each row is {list(self.shape)}, got shape {list(tensor.shape)}", field=f"{at}.shape"
            )
        return self.view(tensor, content, at)

    def pack(self, content: bytes, form: Form, lengths: Ints) -> bytes:
        """Leave out what is padding."""
        if not form.is_padded(lengths):
            return content
        is_real = np.arange(form.num_steps) < lengths[:, None]
        return decode(content, self.dtype, (*is_real.shape, *self.shape))[is_real].tobytes()


def content_of(request: pb.ModelInferRequest, number: int, at: str) -> bytes:
    """Elements of an input as bytes, from wherever they are. Raises InvalidInput, ShapeMismatch and Unimplemented."""
    tensor, raw = request.inputs[number], request.raw_input_contents
    check_parameters(tensor.parameters)
    if raw:
        if tensor.HasField("contents"):
            raise InvalidInput(
                f"{tensor.name} has contents beside raw_input_contents: send either", field=f"{at}.contents"
            )
        return raw[number]
    name = _CONTENTS.get(tensor.datatype)
    if name is None:
        known = ", ".join(_CONTENTS)
        raise InvalidInput(f"{tensor.name}: datatype {tensor.datatype!r}: expected {known}", field=f"{at}.datatype")
    values = getattr(tensor.contents, name)
    num = num_elements(tensor.shape, field=f"{at}.shape")
    if len(values) != num:
        raise ShapeMismatch(
            f"{tensor.name} of shape {list(tensor.shape)}: expected {num} elements in {name}, got {len(values)}",
            field=f"{at}.contents",
        )
    return np.array(values, dtype=np.dtype(DTYPES[tensor.datatype]).newbyteorder("<")).tobytes()


def check_raw(request: pb.ModelInferRequest) -> None:
    """Raise ShapeMismatch where there are not as many raw contents as inputs, if there are any."""
    if request.raw_input_contents and len(request.raw_input_contents) != len(request.inputs):
        raise ShapeMismatch(
            f"raw_input_contents has {len(request.raw_input_contents)} entries for {len(request.inputs)} inputs",
            field="raw_input_contents",
        )


def lengths_of(tensor: Tensor, content: bytes, at: str) -> Ints:
    """Read `lengths`, [sequences] or [sequences, 1]. Raises InvalidInput and ShapeMismatch."""
    if tensor.datatype not in ("INT32", "INT64"):
        raise InvalidInput(f"lengths are INT32 or INT64, got {tensor.datatype}", field=f"{at}.datatype")
    shape = tuple(tensor.shape)
    if not 1 <= len(shape) <= 2 or shape[1:] not in ((), (1,)) or shape[0] < 1:
        raise ShapeMismatch(f"lengths: expected [sequences] or [sequences, 1], got {list(shape)}", field=f"{at}.shape")
    return decode(content, DTYPES[tensor.datatype], (shape[0],), field=f"{at}.shape").astype(np.int64)


def check_parameters(parameters: Any) -> None:
    """Raise Unimplemented for parameters of a tensor that can't be ignored."""
    if parameters:
        for name in _REFUSED:
            if name in parameters:
                raise Unimplemented(f"{name} is not supported: send and receive tensors as raw contents")


def wanted_outputs(request: pb.ModelInferRequest, names: Sequence[str], model: str) -> list[str]:
    """Names of the outputs that a request asks for, of those that there are; none where it leaves that open.

    Raises InvalidInput and Unimplemented.
    """
    wanted = []
    for number, each in enumerate(request.outputs):
        check_parameters(each.parameters)
        if each.name not in names:
            raise InvalidInput(
                f"no output {each.name!r}; {model} has {', '.join(names)}", field=f"outputs[{number}].name"
            )
        wanted.append(each.name)
    if len(set(wanted)) < len(wanted):
        raise InvalidInput("an output is named twice", field="outputs")
    return wanted
