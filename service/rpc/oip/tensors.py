"""Tensors of the Open Inference Protocol <-> packed rows, and its responses as bytes.

A per-step tensor comes in one of two forms: padded, [sequences, time, *row], where `lengths` [sequences] says how many
steps are real; or packed, [sum(lengths), *row]. Answers go out in the form that the request had. Without `lengths`
every step is real, and packed rows are one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from models.spec import LENGTHS, Layout, StateSpec, TensorSpec
from service.errors import BadValue, Exhausted, InvalidInput, ShapeMismatch, Unimplemented
from service.lane import Lane
from service.pb.inference import inference_pb2 as pb
from service.predict import Prediction
from service.rpc.codec import row_bytes_of
from service.rpc.repeat import varint
from service.tensors import check_lengths, decode, num_elements

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

DATATYPES = {"float32": "FP32", "float64": "FP64", "int32": "INT32", "int64": "INT64", "bool": "BOOL"}
"""The protocol's names of dtypes."""
_DTYPES = {name: dtype for dtype, name in DATATYPES.items()}
_CONTENTS = {
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "BOOL": "bool_contents",
}
Written = tuple[int, tuple[int, ...], bytes]
"""Index, shape and elements of an output."""
_MAX_KNOWN = 1024
"""Most forms and heads that are remembered."""
_REFUSED = ("shared_memory_region", "classification")
"""Parameters of tensors that would change the answer."""


@dataclass(frozen=True, slots=True)
class Form:
    """How the per-step tensors of a request lie."""

    num_sequences: int
    """Of a padded request; 0 for a packed one."""
    num_steps: int
    """On the axis of time; of a packed request its rows."""

    def shape(self, num_sequences: int, row_shape: Sequence[int], *, is_per_step: bool) -> tuple[int, ...]:
        """Shape of an output."""
        if not is_per_step:
            return (num_sequences, *row_shape)
        return (self.num_sequences, self.num_steps, *row_shape) if self.num_sequences else (self.num_steps, *row_shape)


@dataclass(slots=True)
class Given:
    """What a request gives, checked against the model's shapes."""

    data: list[bytes]
    """Per-step inputs in the model's order, packed."""
    form: Form
    lengths: Ints | None = None
    """[sequences]; None where every step is real, and packed rows are one sequence."""
    states: dict[str, Array] = field(default_factory=dict)
    """Initial ones, [sequences, *row shape]."""

    @property
    def num_sequences(self) -> int:
        """Sequences in the request."""
        return len(self.lengths) if self.lengths is not None else self.form.num_sequences or 1

    @property
    def all_lengths(self) -> Ints:
        """[sequences] steps of each."""
        if self.lengths is not None:
            return self.lengths
        return np.full(self.num_sequences, self.form.num_steps, dtype=np.int64)


class _Row:
    """What is known of a tensor before one arrives."""

    __slots__ = ("datatype", "dtype", "is_per_step", "itemsize", "name", "shape")

    def __init__(self, spec: TensorSpec | StateSpec, name: str = "") -> None:
        self.name = name or spec.name
        self.dtype = spec.dtype
        self.datatype = DATATYPES[spec.dtype]
        self.shape = tuple(spec.row_shape)
        self.itemsize = np.dtype(spec.dtype).itemsize
        self.is_per_step = isinstance(spec, TensorSpec) and spec.layout is Layout.PER_STEP


class InferPlan:
    """Reads requests and writes responses of one model version."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.inputs = {t.name: _Row(t) for t in lane.step_inputs}
        self.states = {s.name: _Row(s) for s in lane.graph.states}
        self.outputs = [_Row(t) for t in lane.graph.outputs]
        self.next_states = [_Row(s, s.next_name) for s in lane.graph.states]
        self.all_outputs = list(range(len(self.outputs)))
        rows = [*self.inputs.values(), *self.outputs]
        self.step_bytes = sum(row.itemsize * int(np.prod(row.shape, dtype=np.int64)) for row in rows)
        """What a step and its answer take."""
        self._names = [row.name for row in (*self.outputs, *self.next_states)]
        self._head = pb.ModelInferResponse(model_name=lane.name, model_version=str(lane.version)).SerializeToString()
        self._known: dict[tuple[str, str, tuple[int, ...]], tuple[Form, int]] = {}
        self._heads: dict[tuple[int, tuple[int, ...]], bytes] = {}
        self._sole = next(iter(self.inputs)) if len(self.inputs) == 1 else None
        self.takes_any_bytes = all(row.dtype != "bool" for row in self.inputs.values())
        """Whether rows of the right size can't be malformed."""

    def pick_outputs(self, request: pb.ModelInferRequest, *, with_states: bool = False) -> list[int]:
        """Indexes of the outputs that a request names; all by default. Past them come the states' next values.

        Raises InvalidInput and Unimplemented.
        """
        if not request.outputs:
            return self.all_outputs
        names = self._names if with_states else self._names[: len(self.outputs)]
        picked = []
        for number, wanted in enumerate(request.outputs):
            _check_parameters(wanted.parameters)
            if wanted.name not in names:
                raise InvalidInput(
                    f"no output {wanted.name!r}; {self.lane.name} has {', '.join(names)}",
                    field=f"outputs[{number}].name",
                )
            picked.append(names.index(wanted.name))
        if len(set(picked)) < len(picked):
            raise InvalidInput("an output is named twice", field="outputs")
        return picked

    # ---- requests ---------------------------------------------------------------------------------------------------

    def read(self, request: pb.ModelInferRequest) -> Given:
        """Read the inputs. Raises InvalidInput and its kin, Exhausted, and Unimplemented for shared memory."""
        tensors, raw = request.inputs, request.raw_input_contents
        if len(raw) == 1 and len(tensors) == 1 and self._sole is not None and self.takes_any_bytes:
            tensor = tensors[0]
            known = self._known.get((tensor.name, tensor.datatype, tuple(tensor.shape)))
            if known is not None and len(raw[0]) == known[1] and not tensor.HasField("contents"):
                return Given([raw[0]], known[0])
        return self._read(request)

    def _read(self, request: pb.ModelInferRequest) -> Given:
        data: dict[str, bytes] = {}
        form: Form | None = None
        lengths: Ints | None = None
        states: dict[str, Array] = {}
        if request.raw_input_contents and len(request.raw_input_contents) != len(request.inputs):
            raise ShapeMismatch(
                f"raw_input_contents has {len(request.raw_input_contents)} entries for {len(request.inputs)} inputs",
                field="raw_input_contents",
            )
        seen: set[str] = set()
        for number, tensor in enumerate(request.inputs):
            at = f"inputs[{number}]"
            if tensor.name in seen:
                raise InvalidInput(f"{tensor.name} is given twice", field=f"{at}.name")
            seen.add(tensor.name)
            _check_parameters(tensor.parameters)
            content = _content(request, number, at)
            if (row := self.inputs.get(tensor.name)) is not None:
                here = self._form(row, tensor, at)
                if form is not None and here != form:
                    raise ShapeMismatch(f"{tensor.name} has other sequences or steps than {next(iter(data))}", field=at)
                self._view(row, tensor, content, at)
                form = here
                data[tensor.name] = content
            elif tensor.name == LENGTHS:
                lengths = _lengths(tensor, content, at)
            elif (row := self.states.get(tensor.name)) is not None:
                states[tensor.name] = self._state(row, tensor, content, at)
            else:
                takes = ", ".join([*self.inputs, LENGTHS, *self.states])
                raise InvalidInput(f"no input {tensor.name!r}; {self.lane.name} takes {takes}", field=f"{at}.name")
        if missing := [name for name in self.inputs if name not in data]:
            raise InvalidInput(f"input {missing[0]} is missing", field="inputs")
        assert form is not None  # noqa: S101  every model has a per-step input
        given = Given([data[name] for name in self.inputs], form, states=states)
        self._check_size(form)
        if lengths is not None:
            self._apply_lengths(given, lengths)
        for name, values in states.items():
            if len(values) != given.num_sequences:
                raise ShapeMismatch(f"{name} has {len(values)} rows for {given.num_sequences} sequences", field=name)
        if len(request.inputs) == 1 and len(self._known) < _MAX_KNOWN:
            tensor = request.inputs[0]
            self._known[tensor.name, tensor.datatype, tuple(tensor.shape)] = form, len(given.data[0])
        return given

    def _form(self, row: _Row, tensor: pb.ModelInferRequest.InferInputTensor, at: str) -> Form:
        """Tell how a per-step tensor lies. Raises ShapeMismatch."""
        shape = tuple(tensor.shape)
        lead = len(shape) - len(row.shape)
        if lead not in (1, 2) or shape[lead:] != row.shape:
            padded, packed = (str(["sequences", "time", *row.shape]), str(["steps", *row.shape]))
            raise ShapeMismatch(
                f"{row.name}: expected {padded} or {packed}, got shape {list(shape)}".replace("'", ""),
                field=f"{at}.shape",
            )
        if min(shape[:lead]) < 1:
            raise ShapeMismatch(f"{row.name}: shape {list(shape)} has no steps", field=f"{at}.shape")
        return Form(shape[0], shape[1]) if lead == 2 else Form(0, shape[0])

    def _view(self, row: _Row, tensor: pb.ModelInferRequest.InferInputTensor, content: bytes, at: str) -> Array:
        """View a tensor's bytes as an array. Raises InvalidInput and its kin."""
        if tensor.datatype != row.datatype:
            raise InvalidInput(
                f"{row.name} is {row.datatype}, got {tensor.datatype or 'no datatype'}; convert it before sending",
                field=f"{at}.datatype",
            )
        return decode(content, row.dtype, tensor.shape, field=f"{at}.shape")

    def _state(self, row: _Row, tensor: pb.ModelInferRequest.InferInputTensor, content: bytes, at: str) -> Array:
        """Read initial states [sequences, *row shape]. Raises InvalidInput and its kin."""
        if tuple(tensor.shape[1:]) != row.shape or len(tensor.shape) < 1:
            raise ShapeMismatch(
                f"{row.name}: each row is {list(row.shape)}, got shape {list(tensor.shape)}", field=f"{at}.shape"
            )
        values = self._view(row, tensor, content, at)
        if self.lane.settings.non_finite == "reject" and not np.isfinite(values).all():
            raise BadValue(f"{row.name} has values that are not finite", field=at)
        return values

    def _check_size(self, form: Form) -> None:
        num_rows, limit = (form.num_sequences or 1) * form.num_steps, self.lane.settings.max_steps_per_message
        if num_rows > limit:
            raise Exhausted(
                f"{num_rows} steps in one request, the limit (max_steps_per_message) is {limit}; send them in several",
                field="inputs",
            )

    def _apply_lengths(self, given: Given, lengths: Ints) -> None:
        """Leave out what is padding. Raises ShapeMismatch."""
        form = given.form
        if not form.num_sequences:
            given.lengths = check_lengths(lengths, form.num_steps, field=LENGTHS)
            return
        if len(lengths) != form.num_sequences:
            raise ShapeMismatch(f"{len(lengths)} lengths for {form.num_sequences} sequences", field=LENGTHS)
        if not ((lengths >= 1) & (lengths <= form.num_steps)).all():
            raise ShapeMismatch(
                f"lengths lie in 1..{form.num_steps}, the axis of time; got {lengths.min()} to {lengths.max()}",
                field=LENGTHS,
            )
        given.lengths = lengths
        if (lengths == form.num_steps).all():
            return
        is_real = np.arange(form.num_steps) < lengths[:, None]
        for index, (row, content) in enumerate(zip(self.inputs.values(), given.data, strict=True)):
            x = decode(content, row.dtype, (form.num_sequences, form.num_steps, *row.shape))
            given.data[index] = x[is_real].tobytes()

    def rows(self, given: Given) -> list[Array]:
        """View the inputs as arrays, each [sum(lengths), *row shape]."""
        return [
            decode(data, row.dtype, (len(data) // (row.itemsize * int(np.prod(row.shape, dtype=np.int64))), *row.shape))
            for row, data in zip(self.inputs.values(), given.data, strict=True)
        ]

    # ---- responses --------------------------------------------------------------------------------------------------

    def write(
        self, request_id: bytes, outputs: Sequence[tuple[int, tuple[int, ...], bytes]], *, is_final: bool
    ) -> bytes:
        """Write a ModelInferResponse.

        is_final  say that it is the last of its request
        """
        parts = [self._head]
        if request_id:
            parts += (_ID_TAG, varint(len(request_id)), request_id)
        if is_final:
            parts.append(_FINAL)
        heads = self._heads
        parts += [heads.get((index, shape)) or self._output_head(index, shape) for index, shape, _ in outputs]
        for _, _, content in outputs:
            parts += (_RAW_TAG, varint(len(content)), content)
        return b"".join(parts)

    def _output_head(self, index: int, shape: tuple[int, ...]) -> bytes:
        """All of an output but its elements."""
        row = self.outputs[index] if index < len(self.outputs) else self.next_states[index - len(self.outputs)]
        head = pb.ModelInferResponse(
            outputs=[pb.ModelInferResponse.InferOutputTensor(name=row.name, datatype=row.datatype, shape=shape)]
        ).SerializeToString()
        if len(self._heads) < _MAX_KNOWN:
            self._heads[index, shape] = head
        return head

    def write_prediction(
        self, request_id: bytes, given: Given, outputs: list[int], prediction: Prediction, *, is_final: bool
    ) -> bytes:
        """Write the answer to whole sequences; prediction has the picked outputs alone, in their order."""
        answered = [index for index in outputs if index < len(self.outputs)]
        parts = []
        for index in outputs:
            if index >= len(self.outputs):
                values = prediction.states[index - len(self.outputs)]
                parts.append((index, values.shape, row_bytes_of(values)))
                continue
            row, values = self.outputs[index], prediction.outputs[answered.index(index)]
            shape = given.form.shape(given.num_sequences, row.shape, is_per_step=row.is_per_step)
            if row.is_per_step and given.form.num_sequences and len(values) < shape[0] * shape[1]:
                padded = np.zeros(shape, dtype=values.dtype)
                padded[np.arange(shape[1]) < given.all_lengths[:, None]] = values
                values = padded
            parts.append((index, shape, row_bytes_of(values)))
        return self.write(request_id, parts, is_final=is_final)


def on_stream(response: bytes) -> bytes:
    """Put a written response into a ModelStreamInferResponse."""
    return _RESPONSE_TAG + varint(len(response)) + response


def failed_on_stream(request_id: bytes, message: str) -> bytes:
    """Say on a stream that a request failed."""
    return pb.ModelStreamInferResponse(
        error_message=message, infer_response=pb.ModelInferResponse(id=request_id.decode())
    ).SerializeToString()


def _content(request: pb.ModelInferRequest, number: int, at: str) -> bytes:
    """Elements of an input as bytes, from wherever they are."""
    tensor, raw = request.inputs[number], request.raw_input_contents
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
    return np.array(values, dtype=np.dtype(_DTYPES[tensor.datatype]).newbyteorder("<")).tobytes()


def _lengths(tensor: pb.ModelInferRequest.InferInputTensor, content: bytes, at: str) -> Ints:
    """Read `lengths`, [sequences] or [sequences, 1]."""
    if tensor.datatype not in ("INT32", "INT64"):
        raise InvalidInput(f"lengths are INT32 or INT64, got {tensor.datatype}", field=f"{at}.datatype")
    shape = tuple(tensor.shape)
    if not 1 <= len(shape) <= 2 or shape[1:] not in ((), (1,)) or shape[0] < 1:
        raise ShapeMismatch(f"lengths: expected [sequences] or [sequences, 1], got {list(shape)}", field=f"{at}.shape")
    return decode(content, _DTYPES[tensor.datatype], (shape[0],), field=f"{at}.shape").astype(np.int64)


def _check_parameters(parameters: Any) -> None:
    """Raise Unimplemented for parameters of a tensor that can't be ignored."""
    if parameters:
        for name in _REFUSED:
            if name in parameters:
                raise Unimplemented(f"{name} is not supported: send and receive tensors as raw contents")


_LENGTH_DELIMITED = 2
_ID_TAG, _RAW_TAG = (
    bytes([number << 3 | _LENGTH_DELIMITED])
    for number in (
        pb.ModelInferResponse.ID_FIELD_NUMBER,
        pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER,
    )
)
_RESPONSE_TAG = bytes([pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER << 3 | _LENGTH_DELIMITED])
_FINAL = pb.ModelInferResponse(
    parameters={"triton_final_response": pb.InferParameter(bool_param=True)}
).SerializeToString()
