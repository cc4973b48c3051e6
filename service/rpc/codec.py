"""Messages of the native API <-> columns and arrays. Field mapping and checks against the model's shapes, no more."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from models.spec import Layout, StateSpec, StepMode, TensorSpec
from service.errors import BadValue, Exhausted, InvalidInput, ShapeMismatch
from service.inputs import bad_rows, bad_value
from service.lane import Lane
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.placement import Node
from service.tensors import check_lengths, decode, encode

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

DTYPES = {
    "float32": pb.DATA_TYPE_FLOAT32,
    "int64": pb.DATA_TYPE_INT64,
    "int32": pb.DATA_TYPE_INT32,
    "float64": pb.DATA_TYPE_FLOAT64,
    "bool": pb.DATA_TYPE_BOOL,
}
LAYOUTS = {
    Layout.PER_STEP: pb.LAYOUT_PER_STEP,
    Layout.PER_SEQUENCE: pb.LAYOUT_PER_SEQUENCE,
    Layout.SHARED: pb.LAYOUT_SHARED,
}
STEP_MODES = {
    StepMode.STEPPING: pb.STEP_MODE_STEPPING,
    StepMode.CHUNKED: pb.STEP_MODE_CHUNKED,
    StepMode.BUFFERED: pb.STEP_MODE_BUFFERED,
    StepMode.GENERATIVE: pb.STEP_MODE_GENERATIVE,
}
EXACTNESS = {
    "exact": pb.EXACTNESS_EXACT,
    "rounding": pb.EXACTNESS_ROUNDING,
    "coupled": pb.EXACTNESS_COUPLED,
}
MAX_NAME_BYTES = 256
_IS_LITTLE = sys.byteorder == "little"


class TensorPlan:
    """What is known of a tensor before one arrives: enough to turn its bytes into rows without a copy."""

    __slots__ = ("dtype", "layout", "name", "row_bytes", "row_shape", "wire_dtype", "wire_layout")

    def __init__(self, spec: TensorSpec | StateSpec) -> None:
        self.name = spec.name
        self.dtype = spec.dtype
        self.row_shape = spec.row_shape
        self.layout = spec.layout if isinstance(spec, TensorSpec) else Layout.PER_SEQUENCE
        self.wire_dtype = DTYPES[spec.dtype]
        self.wire_layout = LAYOUTS[self.layout]
        self.row_bytes = int(np.prod(spec.row_shape, dtype=np.int64)) * np.dtype(spec.dtype).itemsize

    def num_rows(self, tensor: pb.Tensor, field: str) -> int:
        """Check a tensor and count its rows. Raises InvalidInput and ShapeMismatch."""
        if tensor.dtype not in (pb.DATA_TYPE_UNSPECIFIED, self.wire_dtype):
            got = pb.DataType.Name(tensor.dtype) if tensor.dtype in pb.DataType.values() else tensor.dtype
            raise InvalidInput(
                f"{self.name} is {self.dtype}, got {got}; convert it before sending", field=f"{field}.dtype"
            )
        if tensor.layout not in (pb.LAYOUT_UNSPECIFIED, self.wire_layout):
            raise InvalidInput(f"{self.name} is {self.layout.value}, got another layout", field=f"{field}.layout")
        num, rest = divmod(len(tensor.data), self.row_bytes)
        shape = tensor.shape
        if shape and tuple(shape[1:]) != self.row_shape:
            raise ShapeMismatch(
                f"{self.name}: each row is {list(self.row_shape)}, got shape {list(shape)}", field=f"{field}.shape"
            )
        if rest or (shape and shape[0] != num):
            expected = f"shape {list(shape)}" if shape else "a whole number of rows"
            raise ShapeMismatch(
                f"{self.name}: {len(tensor.data)} bytes are not {expected}, where a row has {self.row_bytes} bytes "
                f"({self.dtype} {list(self.row_shape)})",
                field=f"{field}.data",
            )
        if self.dtype == "bool":
            self.rows(tensor.data, field)
        return num

    def rows(self, data: bytes, field: str = "data") -> Array:
        """View checked bytes as rows [n, *row shape]."""
        return decode(data, self.dtype, (len(data) // self.row_bytes, *self.row_shape), field=f"{field}.data")


class LanePlan:
    """Plans of every tensor of one model version."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.inputs = {t.name: TensorPlan(t) for t in lane.step_inputs}
        self.states = {s.name: TensorPlan(s) for s in lane.graph.states}
        self._contexts = {t.name: t for t in contexts_of(lane)}
        self.constants = {t.name: TensorPlan(t) for t in self._contexts.values()}
        """Inputs that a sequence is given once."""
        self.takes_any_bytes = all(t.dtype != "bool" for t in lane.step_inputs)
        """Whether rows of the right size can't be malformed."""
        self.sole_input = next(iter(self.inputs)) if len(self.inputs) == 1 else None
        self.output_names = [t.name for t in lane.graph.outputs]
        self.output_plans = [TensorPlan(t) for t in lane.graph.outputs]

    def pick_outputs(self, names: Sequence[str]) -> list[int]:
        """Indexes of the outputs that a request names; all of them by default. Raises InvalidInput."""
        if unknown := [name for name in names if name not in self.output_names]:
            raise InvalidInput(
                f"no output {unknown[0]!r}; {self.lane.name} has {', '.join(self.output_names)}", field="outputs"
            )
        if len(set(names)) < len(names):
            raise InvalidInput("an output is named twice", field="outputs")
        return [self.output_names.index(name) for name in names or self.output_names]

    def given(self, once: Mapping[str, Array], row: int) -> list[Array] | None:
        """What one sequence is given once, of rows by name; None where some are missing."""
        if any(name not in once for name in self.constants):
            return None
        return [once[name][row] for name in self.constants]

    def read(self, tensors: Sequence[pb.Tensor], field: str) -> tuple[list[bytes], int, dict[str, Array]]:
        """Read a request's tensors, each named at most once.

        Returns (bytes of the per-step inputs in the model's order, their number of rows, states and what is given once
        a sequence by name); no bytes and 0 where no per-step input is given. Raises InvalidInput, ShapeMismatch and
        Exhausted.
        """
        if len(tensors) == 1 and self.sole_input is not None and tensors[0].name in ("", self.sole_input):
            num_rows = self.inputs[self.sole_input].num_rows(tensors[0], f"{field}[0]")
            self._check_limit(num_rows, field)
            return [tensors[0].data], num_rows, {}
        inputs: dict[str, bytes] = {}
        states: dict[str, Array] = {}
        num_rows = 0
        for index, tensor in enumerate(tensors):
            name = tensor.name or self.sole_input or ""
            at = f"{field}[{index}]"
            if name in inputs or name in states:
                raise InvalidInput(f"{name} is given twice", field=f"{at}.name")
            if name in self.inputs:
                num = self.inputs[name].num_rows(tensor, at)
                if inputs and num != num_rows:
                    raise ShapeMismatch(f"{name} has {num} rows, {next(iter(inputs))} has {num_rows}", field=at)
                num_rows = num
                inputs[name] = tensor.data
            elif (plan := self.states.get(name) or self.constants.get(name)) is not None:
                plan.num_rows(tensor, at)
                states[name] = plan.rows(tensor.data, at)
                passes = self.lane.settings.non_finite == "pass"
                if not passes and not np.isfinite(states[name]).all():
                    raise BadValue(f"{name} has values that are not finite", field=at)
                spec = self._contexts.get(name)
                if spec is not None and (bad := bad_rows(spec, states[name], passes_non_finite=passes)) is not None:
                    row = int(np.argmax(bad))
                    raise BadValue(f"row {row}: {bad_value(spec, states[name][row], 0)}", field=at)
            else:
                takes = ", ".join([*self.inputs, *self.constants, *self.states])
                raise InvalidInput(f"no input {tensor.name!r}; {self.lane.name} takes {takes}", field=f"{at}.name")
        if not inputs:
            return [], 0, states
        if len(inputs) < len(self.inputs):
            missing = next(name for name in self.inputs if name not in inputs)
            raise InvalidInput(f"input {missing} is missing", field=field)
        self._check_limit(num_rows, field)
        return [inputs[name] for name in self.inputs], num_rows, states

    def _check_limit(self, num_rows: int, field: str) -> None:
        limit = self.lane.settings.max_steps_per_message
        if num_rows > limit:
            raise Exhausted(
                f"{num_rows} steps in one message, the limit (max_steps_per_message) is {limit}; send them in several",
                field=field,
            )


def lengths_of(tensors: Sequence[pb.Tensor], plan: LanePlan, num_rows: int) -> Ints:
    """Lengths of the sequences of a Predict request: the same on every per-step tensor that gives some."""
    found: Ints | None = None
    for index, tensor in enumerate(tensors):
        if (tensor.name or plan.sole_input) in plan.inputs and tensor.lengths:
            lengths = np.array(tensor.lengths, dtype=np.int64)
            if found is not None and not np.array_equal(found, lengths):
                raise ShapeMismatch("per-step inputs have different lengths", field=f"inputs[{index}].lengths")
            found = lengths
    if found is None:
        found = np.array([num_rows], dtype=np.int64)
    if not len(found) or not found.all():
        raise InvalidInput("a sequence has no steps: leave it out; every sequence needs at least one", field="lengths")
    return check_lengths(found, num_rows, field="lengths")


def empty_tensor(plan: TensorPlan, rows: Array, lengths: Ints | None = None) -> pb.Tensor:
    """Say what a tensor is, without its data."""
    return pb.Tensor(
        name=plan.name,
        dtype=plan.wire_dtype,
        shape=rows.shape,
        layout=plan.wire_layout,
        lengths=None if lengths is None else lengths.tolist(),
    )


def row_bytes_of(rows: Array) -> bytes:
    """Write an array's elements as they travel."""
    return rows.tobytes() if _IS_LITTLE else encode(rows)


def contexts_of(lane: Lane) -> list[TensorSpec]:
    """Inputs that a client gives once a sequence: what an encoder gives is none of them."""
    given = {t.name for t in lane.encoder.graph.outputs} if lane.encoder is not None else set[str]()
    return [t for t in (lane.constants.tensors if lane.constants else ()) if t.name not in given]


def inputs_of(lane: Lane) -> list[TensorSpec]:
    """Inputs that a client gives: those of the encoder first, if there is one."""
    sources = [] if lane.encoder is None else lane.encoder.step_inputs
    return [*sources, *(t for t in lane.graph.inputs if t in lane.step_inputs or t in contexts_of(lane))]


def _generation(lane: Lane) -> pb.Generation | None:
    found = lane.backend.spec.generation
    if found is None:
        return None
    return pb.Generation(
        max_steps=found.max_steps,
        token_input=found.token_input,
        source_inputs=[] if lane.encoder is None else [t.name for t in lane.encoder.step_inputs],
        begin_id=found.begin_id,
        end_id=found.end_id,
        separator=found.separator,
    )


def model_message(lane: Lane) -> pb.Model:
    """Describe a served model version."""
    spec = lane.backend.spec
    return pb.Model(
        name=lane.name,
        version=lane.version,
        digest=lane.backend.digest,
        cell=spec.cell,
        topology=spec.topology,
        step_mode=STEP_MODES[lane.step_mode],
        step_mode_reason=lane.step_mode_reason,
        inputs=[_tensor_spec(t) for t in inputs_of(lane)],
        outputs=[_tensor_spec(t) for t in lane.graph.outputs],
        states=[pb.StateSpec(name=s.name, dtype=DTYPES[s.dtype], row_shape=s.row_shape) for s in lane.graph.states],
        labels=spec.labels,
        vocabulary=spec.vocabulary,
        task=spec.training.task,
        metrics=spec.training.metrics,
        num_parameters=spec.num_parameters,
        exactness=EXACTNESS[lane.exactness.verdict],
        exactness_detail=lane.exactness.detail,
        provider=lane.backend.provider,
        max_inflight_steps=lane.settings.max_inflight_steps,
        spec_json=spec.to_json(),
        generation=_generation(lane),
        placement=[_placed(*group, lane.backend.provider) for group in lane.backend.placement.groups()],
    )


def _placed(op_type: str, provider: str, nodes: list[Node], wanted: str) -> pb.PlacedNodes:
    fallback_names = [node.name for node in nodes] if provider != wanted else []
    return pb.PlacedNodes(op_type=op_type, provider=provider, count=len(nodes), fallback_names=fallback_names)


def _tensor_spec(tensor: TensorSpec) -> pb.TensorSpec:
    return pb.TensorSpec(
        name=tensor.name,
        dtype=DTYPES[tensor.dtype],
        row_shape=tensor.row_shape,
        layout=LAYOUTS[tensor.layout],
        unit=tensor.unit,
        description=tensor.description,
        element_names=tensor.element_names,
        categories=tensor.categories,
    )
