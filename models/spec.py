"""The contract between the side that trains and the side that serves: all that a model file says of itself.

Torch-free. The spec travels as JSON in the ONNX file's metadata_props under METADATA_KEY; `parse_spec` reads and checks
it. Step mode is decided here and nowhere else.
"""

from __future__ import annotations

import base64
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

METADATA_KEY = "rnnserve.spec"
"""Key in the ONNX metadata_props."""
LENGTHS = "lengths"
"""Graph input [batch] int32: steps of each row; wired to every operator's sequence_lens. Never 0."""

Array = np.ndarray[Any, Any]


class SpecError(ValueError):
    """A file carries no spec, or one that does not hold together; the message says what is wrong."""


class StepMode(StrEnum):
    """How a model can be driven over time."""

    STEPPING = "stepping"
    CHUNKED = "chunked"
    BUFFERED = "buffered"
    GENERATIVE = "generative"


class Layout(StrEnum):
    """What the first axis of a tensor counts on the wire."""

    PER_STEP = "per_step"
    PER_SEQUENCE = "per_sequence"
    SHARED = "shared"


DType = Literal["float32", "int64", "int32", "float64", "bool"]
Topology = Literal["many-to-one", "many-to-many", "one-to-many", "encoder-decoder"]
Cell = Literal["rnn", "lstm", "gru"]
Positive = Annotated[int, Field(gt=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TensorSpec(_Frozen):
    """One input or output of a graph, without states and lengths.

    In the graph a per-step tensor is [batch, time, *row_shape], a per-sequence one [batch, *row_shape] and a shared one
    [*row_shape].
    """

    name: str
    """Name of the graph's value."""
    dtype: DType
    """Type of the elements."""
    row_shape: tuple[Positive, ...] = ()
    """Shape of one step, of one sequence, or of the whole shared tensor."""
    layout: Layout
    """What the first axis counts on the wire."""
    unit: str = ""
    """Physical unit of the values; empty where there is none."""
    description: str = ""
    """What the values are."""
    element_names: tuple[str, ...] = ()
    """Names of the elements of a row (sensor channels, class labels)."""
    num_ids: int | None = None
    """For token ids: they lie in [0, num_ids)."""
    categories: tuple[str, ...] = ()
    """Names by id of a column of categories; the first, empty, stands for every value that was not trained on."""

    @model_validator(mode="after")
    def _categories_are_ids(self) -> Self:
        if self.categories and (len(self.categories) != self.num_ids or self.categories[0]):
            raise ValueError(f"{self.name}: categories need a name for each of num_ids, the first one empty")
        return self


class StateSpec(_Frozen):
    """A recurrent state: a graph input and the output that is its next value, paired by name.

    Both are [batch, *row_shape] with row_shape (directions, hidden). Sessions begin with zeros.
    """

    name: str
    """Graph input, such as "state.0.h" (layer 0)."""
    next_name: str
    """Graph output, such as "state.0.h.next"."""
    dtype: DType = "float32"
    """Type of the elements."""
    row_shape: tuple[Positive, ...]
    """(directions, hidden)."""


class GraphSpec(_Frozen):
    """One ONNX file of the model."""

    role: Literal["model", "encoder", "decoder"] = "model"
    """Part it plays; most models have the one graph "model"."""
    file: str = "model.onnx"
    """Its name, beside the others in the version's directory."""
    inputs: tuple[TensorSpec, ...]
    """What it takes, without states and lengths."""
    outputs: tuple[TensorSpec, ...]
    """What it answers, without next states."""
    states: tuple[StateSpec, ...]
    """Its recurrent states in the order of layers."""
    operators: dict[str, int] = {}
    """Count of each ONNX operator, such as {"GRU": 2}."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        takes = [t.name for t in self.inputs] + [s.name for s in self.states] + [LENGTHS]
        gives = [t.name for t in self.outputs] + [s.next_name for s in self.states]
        for names in (takes, gives):
            if twice := sorted({n for n in names if names.count(n) > 1}):
                raise ValueError(f"graph {self.role}: {', '.join(twice)} named twice")
        if not any(t.layout is Layout.PER_STEP for t in self.inputs):
            raise ValueError(f"graph {self.role}: no per-step input")
        return self


class Training(_Frozen):
    """Where the weights came from."""

    task: str
    """Name of the task, such as "vowels"."""
    data_set: str
    """Name and source of the data."""
    license: str = ""
    """Licence of the data."""
    metrics: dict[str, float] = {}
    """Such as {"test_accuracy": 0.97}; test metrics were computed once."""
    recipe: dict[str, str | int | float | bool | None] = {}
    """Settings of the run: cell, hidden, layers, seed, epochs, ..."""


class Parity(_Frozen):
    """What the export gate measured between torch and onnxruntime."""

    max_abs_error: float
    """Largest difference over every output and state of every case."""
    tolerance: float
    """Largest that was allowed, absolute and relative to the value."""
    num_cases: int
    """Cases compared."""


class GoldenArray(_Frozen):
    """An array in JSON."""

    dtype: DType
    """Type of the elements."""
    shape: tuple[int, ...]
    """Dimensions."""
    data: str
    """base64 of the little-endian row-major bytes."""

    @classmethod
    def of(cls, array: Array) -> Self:
        """Encode an array."""
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        data = base64.b64encode(little.tobytes()).decode("ascii")
        return cls.model_validate({"dtype": array.dtype.name, "shape": array.shape, "data": data})

    def array(self) -> Array:
        """Decode it; the result is read-only."""
        dtype = np.dtype(self.dtype).newbyteorder("<")
        return np.frombuffer(base64.b64decode(self.data), dtype=dtype).reshape(self.shape)


class Golden(_Frozen):
    """Inputs of a graph (lengths and states too) and torch's answers to them, all batch first."""

    inputs: dict[str, GoldenArray]
    """Every graph input by name."""
    outputs: dict[str, GoldenArray]
    """Every graph output by name; per-step rows past a row's length are not compared."""


class Spec(_Frozen):
    """All that a model file says of itself."""

    schema_version: Literal[1] = 1
    """Version of this format; raised by a change that an older reader would misread."""
    cell: Cell
    """Recurrent cell."""
    activation: str = "tanh"
    """Activation of the cell."""
    topology: Topology
    """Shape of input and output over time."""
    directions: tuple[Literal[1, 2], ...]
    """Directions of each recurrent layer."""
    hidden: tuple[Positive, ...]
    """Hidden units of each recurrent layer, per direction."""
    num_parameters: int
    """Trained parameters."""
    graphs: tuple[GraphSpec, ...]
    """One for most models."""
    labels: tuple[str, ...] = ()
    """Class labels of a classifier in the order of its scores."""
    vocabulary: tuple[str, ...] = ()
    """Words or characters of a model on tokens, by id."""
    training: Training
    """Where the weights came from."""
    versions: dict[str, str] = {}
    """Tools that made the file, such as {"torch": "2.13.0"}."""
    parity: Parity
    """What the export gate measured."""
    golden: tuple[Golden, ...] = ()
    """A few inputs with torch's outputs, so that the file can be checked anywhere."""

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        if not self.graphs:
            raise ValueError("no graphs")
        if len(self.directions) != len(self.hidden):
            raise ValueError("directions and hidden name different numbers of layers")
        return self

    @property
    def graph(self) -> GraphSpec:
        """The graph of a model that has one."""
        return self.graphs[0]

    @property
    def step_mode(self) -> tuple[StepMode, str]:
        """How the model can be driven over time, and why."""
        if 2 in self.directions:
            layer = self.directions.index(2)
            return (
                StepMode.BUFFERED,
                f"layer {layer} is bidirectional: its output at any step depends on the steps that come after it",
            )
        return StepMode.STEPPING, "every layer is causal: an output depends on the steps up to it alone"

    def to_json(self) -> str:
        """The text for metadata_props."""
        return self.model_dump_json()


def parse_spec(text: str | None) -> Spec:
    """Read and check a spec. Raises SpecError."""
    if text is None:
        raise SpecError(f"no {METADATA_KEY!r} in the file's metadata: export it with `rnnserve export`")
    try:
        return Spec.model_validate_json(text)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'spec'}: {e['msg']}" for e in error.errors()[:5])
        raise SpecError(f"the spec in the file's metadata is not valid: {faults}") from error
