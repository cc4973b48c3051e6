"""The contract between the side that trains and the side that serves: all that a model file says of itself.

Torch-free. The spec travels as JSON in the ONNX file's metadata_props under METADATA_KEY; `parse_spec` reads and checks
it. Step mode is decided here and nowhere else.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.arrays import DType as DType
from models.arrays import GoldenArray as GoldenArray
from models.quantization import Quantization

METADATA_KEY = "rnnserve.spec"
"""Key in the ONNX metadata_props."""
LENGTHS = "lengths"
"""Graph input [batch] int32: steps of each row; wired to every operator's sequence_lens. Never 0."""
SOURCE_LENGTHS = "source_lengths"
"""Graph input [batch] int32 of a decoder that reads per-source-step inputs: steps of each row's source. Never 0."""
MODEL_FILE = "model.onnx"
"""Name of the file that carries the spec, within a version's directory; every model has it."""
DESCRIPTION_FILE = "model.toml"
"""Name of the file that describes a model file from elsewhere, which carries no spec, in the same directory."""

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
    PER_SOURCE_STEP = "per_source_step"
    """A row for every step of an encoder's input, which a decoder reads as a whole at each of its own steps."""


Topology = Literal["many-to-one", "many-to-many", "one-to-many", "encoder-decoder"]
Cell = Literal["rnn", "lstm", "gru"]
Positive = Annotated[int, Field(gt=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TensorSpec(_Frozen):
    """One input or output of a graph, without states and lengths.

    In the graph a per-step tensor is [batch, time, *row_shape], a per-sequence one [batch, *row_shape], a shared one
    [*row_shape] and a per-source-step one [batch, source time, *row_shape].
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

    Both are [batch, *row_shape]; of a recurrent layer, row_shape is (directions, hidden).
    """

    name: str
    """Graph input, such as "state.0.h" (layer 0)."""
    next_name: str
    """Graph output, such as "state.0.h.next"."""
    dtype: DType = "float32"
    """Type of the elements."""
    row_shape: tuple[Positive, ...]
    """(directions, hidden) of a recurrent layer; (past steps, channels) of a causal convolution."""
    initial: str = ""
    """Per-sequence output of the encoder, [batch, *row_shape], that a sequence begins with; empty: `begins`."""
    begins: GoldenArray | None = None
    """Row that a sequence begins with; absent: zeros."""


class LayerSpec(_Frozen):
    """One recurrent layer. Source of the names: keras.layers."""

    cell: Cell
    """Recurrent cell."""
    hidden: Positive
    """Hidden units, per direction."""
    directions: Literal[1, 2] = 1
    """2 where the layer also reads the sequence from its end."""
    go_backwards: bool = False
    """Whether a layer of one direction reads the sequence from its end."""
    activation: str = "tanh"
    """Activation of the candidate state, and of an LSTM's output."""
    recurrent_activation: str = "sigmoid"
    """Activation of the gates; an rnn has none."""
    reset_after: bool = True
    """Whether a GRU's reset gate is applied after the recurrent product (as torch) or before it."""
    form: Literal["operator", "unrolled", "decomposed"] = "operator"
    """The native ONNX operator; a step's nodes repeated GraphSpec.fixed_steps times; or nodes within an ONNX Scan."""
    window: Positive | None = None
    """Rows of the window that it reads within a single answer, each time from zero states; None: it reads the steps."""

    @property
    def is_causal(self) -> bool:
        """Whether an output depends on the steps up to it alone."""
        return self.window is not None or (self.directions == 1 and not self.go_backwards)


class GraphSpec(_Frozen):
    """One ONNX file of the model."""

    role: Literal["model", "encoder", "decoder"] = "model"
    """Part it plays; most models have the one graph "model"."""
    file: str = MODEL_FILE
    """Its name, beside the others in the version's directory; MODEL_FILE is the first graph's."""
    sha256: str = ""
    """Digest of a file other than MODEL_FILE, so that files of two versions are never mixed."""
    layers: tuple[LayerSpec, ...] = ()
    """Its recurrent layers, first to last."""
    fixed_steps: Positive | None = None
    """Steps that the graph's time axis has, where it is not dynamic: shorter rows are padded to it."""
    chunk: Positive | None = None
    """Entries of the model's own time axis that travel as one step, such as the samples of an audio frame."""
    inputs: tuple[TensorSpec, ...]
    """What it takes, without states and lengths."""
    outputs: tuple[TensorSpec, ...]
    """What it answers, without next states."""
    states: tuple[StateSpec, ...]
    """Its recurrent states in the order of layers."""
    looks_ahead: bool = False
    """Whether something beside its recurrent layers reads steps to come, such as a mean over all steps."""
    operators: dict[str, int] = {}
    """Count of each ONNX operator, such as {"GRU": 2}."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        takes = [t.name for t in self.inputs] + [s.name for s in self.states] + [LENGTHS, SOURCE_LENGTHS]
        gives = [t.name for t in self.outputs] + [s.next_name for s in self.states]
        for names in (takes, gives):
            if twice := sorted({n for n in names if names.count(n) > 1}):
                raise ValueError(f"graph {self.role}: {', '.join(twice)} named twice")
        if not self.inputs:
            raise ValueError(f"graph {self.role}: no input")
        return self

    @property
    def input_names(self) -> tuple[str, ...]:
        """Everything that the graph takes, in its order: inputs, lengths, states."""
        lengths = (LENGTHS, SOURCE_LENGTHS) if self.reads_source else (LENGTHS,)
        return (*(t.name for t in self.inputs), *lengths, *(s.name for s in self.states))

    @property
    def output_names(self) -> tuple[str, ...]:
        """Everything that the graph gives, in its order: outputs, next states."""
        return (*(t.name for t in self.outputs), *(s.next_name for s in self.states))

    @property
    def reads_source(self) -> bool:
        """Whether it takes SOURCE_LENGTHS, with inputs that have a row for every step of the source."""
        return any(t.layout is Layout.PER_SOURCE_STEP for t in self.inputs)

    @property
    def is_causal(self) -> bool:
        """Whether an output depends on the steps up to it alone."""
        return not self.looks_ahead and all(layer.is_causal for layer in self.layers)


class Generation(_Frozen):
    """How a model makes outputs one after another, from one input (one-to-many) or an encoded sequence.

    Where ids are fed back, a step takes the id that was chosen last and answers the log-probabilities of the next.
    Otherwise every step sees the same per-sequence inputs, and the states alone tell steps apart.
    """

    max_steps: Positive
    """Most outputs of a sequence; as many as a sequence has where nothing ends it before."""
    token_input: str = ""
    """Per-step input [batch, time] int64 that takes the id that was chosen last; empty: nothing is fed back."""
    scores_output: str = ""
    """Per-step output [batch, time, ids] float32 of log-probabilities that the next id is chosen by."""
    begin_id: int | None = None
    """Id that is fed first where the caller gives none; None: the caller has to."""
    end_id: int | None = None
    """Id that ends a sequence when it is chosen; it is no part of the answer."""
    separator: str = ""
    """Text between the words of an answer, for people: " " between phonemes, nothing between characters."""

    @model_validator(mode="after")
    def _ids_are_fed_and_chosen(self) -> Self:
        if bool(self.token_input) != bool(self.scores_output):
            raise ValueError("token_input and scores_output belong together")
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


class Golden(_Frozen):
    """Inputs of a graph (lengths and states too) and torch's answers to them, all batch first."""

    graph: int = 0
    """Number of the graph in Spec.graphs."""
    inputs: dict[str, GoldenArray]
    """Every graph input by name."""
    outputs: dict[str, GoldenArray]
    """Every graph output by name; per-step rows past a row's length are not compared."""


class Spec(_Frozen):
    """All that a model file says of itself."""

    schema_version: Literal[2] = 2
    """Version of this format; raised by a change that an older reader would misread."""
    topology: Topology
    """Shape of input and output over time."""
    num_parameters: int
    """Trained parameters."""
    graphs: tuple[GraphSpec, ...]
    """The one with the role "model", or a decoder and its encoder."""
    max_batch: Positive | None = None
    """Most sequences in one run; absent: as many as the server's setting says."""
    generation: Generation | None = None
    """How outputs are made one after another; absent where inputs come step by step."""
    labels: tuple[str, ...] = ()
    """Class labels of a classifier in the order of its scores."""
    vocabulary: tuple[str, ...] = ()
    """Words or characters of a model that generates ids, by id."""
    training: Training
    """Where the weights came from."""
    versions: dict[str, str] = {}
    """Tools that made the file, such as {"torch": "2.13.0"}."""
    parity: Parity
    """What the export gate measured."""
    quantization: Quantization | None = None
    """How its weights became 8-bit integers, if they did; parity and golden are of the file as it is."""
    golden: tuple[Golden, ...] = ()
    """A few inputs with torch's outputs, so that the file can be checked anywhere."""

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        roles = tuple(graph.role for graph in self.graphs)
        if roles not in (("model",), ("decoder", "encoder")):
            raise ValueError(f"graphs play the roles {roles}: expected one model, or a decoder and its encoder")
        if self.graph.file != MODEL_FILE:
            raise ValueError(f"the first graph's file is {self.graph.file}, not {MODEL_FILE}")
        is_fed = any(t.layout is Layout.PER_STEP for t in self.graph.inputs)
        if not is_fed and self.generation is None:
            raise ValueError(f"graph {self.graph.role}: no per-step input")
        if self.encoder is not None and self.generation is None:
            raise ValueError("an encoder and a decoder, but nothing about how the decoder is fed")
        if self.generation is not None and self.generation.token_input:
            takes, gives = {t.name for t in self.graph.inputs}, {t.name for t in self.graph.outputs}
            if self.generation.token_input not in takes or self.generation.scores_output not in gives:
                raise ValueError("generation names an input or output that the graph has not")
        initial = {s.initial for s in self.graph.states if s.initial}
        given = {t.name for t in self.encoder.outputs} if self.encoder is not None else set[str]()
        if missing := sorted(initial - given):
            raise ValueError(f"states begin with {', '.join(missing)}, which no encoder gives")
        return self

    @property
    def graph(self) -> GraphSpec:
        """The graph that answers: the model's only one, or its decoder."""
        return self.graphs[0]

    @property
    def encoder(self) -> GraphSpec | None:
        """The graph that reads the source of an encoder-decoder model."""
        return self.graphs[1] if len(self.graphs) > 1 else None

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Recurrent layers as data passes them: those of an encoder come first."""
        return tuple(layer for graph in reversed(self.graphs) for layer in graph.layers)

    @property
    def cell(self) -> str:
        """Recurrent cells, such as "gru", or "lstm+gru" where layers differ."""
        return "+".join(dict.fromkeys(layer.cell for layer in self.layers)) or "none"

    @property
    def expected_of(self) -> str:
        """Whose answers the golden ones are, and the file's were compared with."""
        return "torch" if self.quantization is None else "the reference of the rounded weights"

    @property
    def step_mode(self) -> tuple[StepMode, str]:
        """How the model can be driven over time, and why."""
        if self.generation is not None:
            what = "the id it chose last" if self.generation.token_input else "the same input at every step"
            return StepMode.GENERATIVE, f"it makes its outputs one after another from {what}: call Generate"
        if self.graph.fixed_steps is not None:
            return (
                StepMode.BUFFERED,
                f"it is unrolled: a run takes {self.graph.fixed_steps} steps, however few of them are real",
            )
        for number, layer in enumerate(self.graph.layers):
            if layer.is_causal:
                continue
            if layer.directions == 2:
                why = f"layer {number} is bidirectional: its output at any step depends on the steps that come after it"
                return StepMode.BUFFERED, why
            return StepMode.BUFFERED, f"layer {number} goes backwards: it begins with the last step"
        if self.graph.looks_ahead:
            return StepMode.BUFFERED, "an answer depends on steps to come, beside what its recurrent layers read"
        if self.graph.chunk is not None:
            return StepMode.CHUNKED, f"a step is a chunk of {self.graph.chunk} entries of the model's time axis"
        return StepMode.STEPPING, "every layer is causal: an output depends on the steps up to it alone"

    def to_json(self) -> str:
        """The text for metadata_props."""
        return self.model_dump_json()


def parse_spec(text: str | None) -> Spec:
    """Read and check a spec. Raises SpecError."""
    if text is None:
        raise SpecError(
            f"no {METADATA_KEY!r} in the file's metadata: export it with `rnnserve export`, or describe it by a "
            "model.toml beside it, which `rnnserve adopt` writes"
        )
    try:
        return Spec.model_validate_json(text)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'spec'}: {e['msg']}" for e in error.errors()[:5])
        raise SpecError(f"the spec in the file's metadata is not valid: {faults}") from error
