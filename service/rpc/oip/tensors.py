"""Requests of the Open Inference Protocol as packed rows of a model, and its responses as bytes.

Answers go out in the form that the request had, padded or packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from models.spec import LENGTHS
from service.errors import BadValue, Exhausted, InvalidInput, ShapeMismatch
from service.inputs import bad_rows, bad_value
from service.lane import Lane
from service.pb.inference import inference_pb2 as pb
from service.predict import Prediction
from service.rpc.codec import contexts_of, row_bytes_of
from service.rpc.oip.contents import Form, Row, Tensor, check_raw, content_of, lengths_of, wanted_outputs
from service.rpc.repeat import varint
from service.tensors import decode

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

_MAX_KNOWN = 1024
"""Most forms and heads that are remembered."""


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
    contexts: dict[str, Array] = field(default_factory=dict)
    """What each sequence is given once, [sequences, *row shape]."""

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


class InferPlan:
    """Reads requests and writes responses of one model version."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.inputs = {t.name: Row(t) for t in lane.step_inputs}
        self.states = {s.name: Row(s) for s in lane.graph.states}
        self._contexts = {t.name: t for t in contexts_of(lane)}
        self.contexts = {name: Row(t) for name, t in self._contexts.items()}
        self._given_once = self.contexts | self.states
        self.outputs = [Row(t) for t in lane.graph.outputs]
        self.next_states = [Row(s, s.next_name) for s in lane.graph.states]
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
        return [names.index(each) for each in wanted_outputs(request, names, self.lane.name)]

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
        once: dict[str, Array] = {}
        check_raw(request)
        seen: set[str] = set()
        for number, tensor in enumerate(request.inputs):
            at = f"inputs[{number}]"
            if tensor.name in seen:
                raise InvalidInput(f"{tensor.name} is given twice", field=f"{at}.name")
            seen.add(tensor.name)
            content = content_of(request, number, at)
            if (row := self.inputs.get(tensor.name)) is not None:
                here = row.form(tensor, at)
                if form is not None and here != form:
                    raise ShapeMismatch(f"{tensor.name} has other sequences or steps than {next(iter(data))}", field=at)
                row.view(tensor, content, at)
                form = here
                data[tensor.name] = content
            elif tensor.name == LENGTHS:
                lengths = lengths_of(tensor, content, at)
            elif (row := self._given_once.get(tensor.name)) is not None:
                once[tensor.name] = self._once(row, tensor, content, at)
            else:
                takes = ", ".join([*self.inputs, LENGTHS, *self._given_once])
                raise InvalidInput(f"no input {tensor.name!r}; {self.lane.name} takes {takes}", field=f"{at}.name")
        if missing := [name for name in (*self.inputs, *self.contexts) if name not in data and name not in once]:
            raise InvalidInput(f"input {missing[0]} is missing", field="inputs")
        assert form is not None  # noqa: S101  every model has a per-step input
        given = Given([data[name] for name in self.inputs], form)
        self._check_size(form)
        if lengths is not None:
            given.lengths = form.check(lengths)
            rows = self.inputs.values()
            given.data = [row.pack(each, form, lengths) for row, each in zip(rows, given.data, strict=True)]
        for name, values in once.items():
            if len(values) != given.num_sequences:
                raise ShapeMismatch(f"{name} has {len(values)} rows for {given.num_sequences} sequences", field=name)
            (given.contexts if name in self.contexts else given.states)[name] = values
        if len(request.inputs) == 1 and len(self._known) < _MAX_KNOWN:
            tensor = request.inputs[0]
            self._known[tensor.name, tensor.datatype, tuple(tensor.shape)] = form, len(given.data[0])
        return given

    def _once(self, row: Row, tensor: Tensor, content: bytes, at: str) -> Array:
        """Read initial states or contexts [sequences, *row shape]. Raises InvalidInput and its kin."""
        values = row.view_once(tensor, content, at)
        passes = self.lane.settings.non_finite == "pass"
        if not passes and not np.isfinite(values).all():
            raise BadValue(f"{row.name} has values that are not finite", field=at)
        spec = self._contexts.get(row.name)
        if spec is not None and (is_bad := bad_rows(spec, values, passes_non_finite=passes)) is not None:
            number = int(np.argmax(is_bad))
            raise BadValue(f"row {number}: {bad_value(spec, values[number], 0)}", field=at)
        return values

    def _check_size(self, form: Form) -> None:
        limit = self.lane.settings.max_steps_per_message
        if form.num_rows > limit:
            raise Exhausted(
                f"{form.num_rows} steps in one request, the limit (max_steps_per_message) is {limit}; send them in "
                "several",
                field="inputs",
            )

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
