"""What a server says of its models, and what it predicts, as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, overload

from service.tensors import Array

Layout = Literal["per_step", "per_sequence", "shared"]
StepMode = Literal["stepping", "chunked", "buffered", "generative"]
Emit = Literal["all", "last"]
Priority = Literal["high", "normal", "low"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One input or output of a model."""

    name: str
    """Name to use for it."""
    dtype: str
    """Type of the elements, such as "float32"."""
    row_shape: tuple[int, ...]
    """Shape of one step (per step), of one sequence (per sequence), or of all (shared)."""
    layout: Layout
    """What the first axis counts: "per_step", "per_sequence" or "shared"."""
    unit: str = ""
    """Physical unit of the values; empty where there is none."""
    description: str = ""
    """What the values are."""
    element_names: tuple[str, ...] = ()
    """Names of the elements of a row; empty where they have none."""
    categories: tuple[str, ...] = ()
    """Names of categories by id, where the elements are such ids; the first, empty, stands for any other."""

    @property
    def is_text(self) -> bool:
        """Whether a sequence is a text, a character a step: every category is a character."""
        return bool(self.categories) and not self.row_shape and all(len(name) <= 1 for name in self.categories)


@dataclass(frozen=True, slots=True)
class StateInfo:
    """One recurrent state of a model."""

    name: str
    """Name to use for it, such as "state.0.h"."""
    dtype: str
    """Type of the elements."""
    row_shape: tuple[int, ...]
    """Shape of one sequence's state: (directions, hidden)."""


@dataclass(frozen=True, slots=True)
class GenerationInfo:
    """How a model makes outputs one after another: what `generate` goes by."""

    max_steps: int
    """Most outputs of a sequence, and the default."""
    token_input: str = ""
    """Input that takes the id that was chosen last, and before it the prompt; empty: nothing is fed back."""
    source_inputs: tuple[str, ...] = ()
    """Inputs that are the source of an encoder-decoder model."""
    begin_id: int | None = None
    """Id that is fed first where no prompt is given; None: a prompt has to be given."""
    end_id: int | None = None
    """Id that ends a sequence; it is no part of the answer."""
    separator: str = ""
    """Text between the words of an answer."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One served model version."""

    name: str
    """Name of the model."""
    version: int
    """Its version."""
    digest: str
    """SHA-256 of the file, in hexadecimal."""
    cell: str
    """Recurrent cell: "rnn", "lstm", "gru"."""
    topology: str
    """Shape of input and output over time, such as "many-to-one"."""
    step_mode: str
    """How it can be driven over time: "stepping", "chunked", "buffered" or "generative"."""
    step_mode_reason: str
    """Why it is so, in words."""
    inputs: tuple[TensorInfo, ...]
    """What it takes."""
    outputs: tuple[TensorInfo, ...]
    """What it answers."""
    states: tuple[StateInfo, ...]
    """Its recurrent states."""
    labels: tuple[str, ...]
    """Class labels of a classifier, in the order of its scores."""
    vocabulary: tuple[str, ...]
    """Words or characters of a model on tokens, by id."""
    task: str
    """Task it was trained on."""
    metrics: Mapping[str, float]
    """Metrics of the training run by name."""
    num_parameters: int
    """Trained parameters."""
    exactness: str
    """What batching does to its numbers: "exact", "rounding", "coupled", or empty where it was not measured."""
    exactness_detail: str
    """The measurement behind it, in words."""
    provider: str
    """onnxruntime's execution provider."""
    max_inflight_steps: int
    """Most steps that one session may have unanswered."""
    spec_json: str
    """The whole spec, as the file carries it."""
    generation: GenerationInfo | None = None
    """How it makes outputs by `generate`; None where it does not."""

    def output(self, name: str) -> TensorInfo | None:
        """Find an output by name."""
        return next((t for t in self.outputs if t.name == name), None)

    @property
    def step_inputs(self) -> tuple[TensorInfo, ...]:
        """The per-step inputs: what a stream sends at every timestep."""
        return tuple(t for t in self.inputs if t.layout == "per_step")


@dataclass(frozen=True, slots=True)
class BrokenModelInfo:
    """A model version that is on disk but not served."""

    name: str
    """Name of the model."""
    version: int
    """Its version; 0 where the model as a whole is at fault."""
    error: str
    """What is wrong, and what to do."""


@dataclass(frozen=True, slots=True)
class ModelList(Sequence[ModelInfo]):
    """Every served model version, in the order of name and version; `broken` are those that could not be loaded."""

    models: tuple[ModelInfo, ...]
    broken: tuple[BrokenModelInfo, ...]

    @overload
    def __getitem__(self, index: int) -> ModelInfo: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ModelInfo, ...]: ...
    def __getitem__(self, index: int | slice) -> ModelInfo | tuple[ModelInfo, ...]:
        return self.models[index]

    def __len__(self) -> int:
        return len(self.models)

    def __iter__(self) -> Iterator[ModelInfo]:
        return iter(self.models)


@dataclass(frozen=True, slots=True, eq=False)
class Prediction(Sequence[Array]):
    """Outputs of whole sequences. As a sequence it is the first output, one array for each sequence that was sent."""

    outputs: Mapping[str, list[Array]]
    """Every output by name, one array a sequence: [time, ...] per step, one row [...] otherwise or under "last"."""
    states: Mapping[str, Array]
    """Final states [sequences, directions, hidden] by name, if asked for; `predict(states=...)` takes them."""
    version: int
    """Version of the model that answered."""
    digest: str
    """SHA-256 of its file, in hexadecimal."""

    @property
    def first(self) -> list[Array]:
        """The first output, one array a sequence."""
        return next(iter(self.outputs.values()), [])

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> list[Array]: ...
    def __getitem__(self, index: int | slice) -> Array | list[Array]:
        return self.first[index]

    def __len__(self) -> int:
        return len(self.first)

    def __iter__(self) -> Iterator[Array]:
        return iter(self.first)
