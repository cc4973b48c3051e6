"""Small models that generate, put together node by node, and the oracle: onnxruntime, one id at a time, alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from models.spec import (
    METADATA_KEY,
    Generation,
    GraphSpec,
    LayerSpec,
    Layout,
    Parity,
    Spec,
    StateSpec,
    TensorSpec,
    Training,
)

HIDDEN, IDS, LETTERS, SEASONS = 8, 7, 6, 3
END, BEGIN = 0, 1
WORDS = ("<end>", "<begin>", "a", "b", "c", "d", "e")
MAX_STEPS = 20
STATE = StateSpec(name="state.0.h", next_name="state.0.h.next", row_shape=(1, HIDDEN))


class Graph:
    """A graph in the making."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self._rng = np.random.default_rng(seed)

    def node(self, op: str, inputs: list[str], *outputs: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, list(outputs), **attributes))
        return outputs[0]

    def weight(self, name: str, *shape: int, scale: float = 1.0) -> str:
        self.weights[name] = (self._rng.uniform(-1, 1, shape) * scale).astype(np.float32)
        return name

    def constant(self, name: str, *values: int) -> str:
        self.weights[name] = np.array(values, dtype=np.int64)
        return name

    def gru(self, x: str, width: int, y: str) -> None:
        """x [time, batch, width] -> y [batch, time, HIDDEN] and the next state."""
        w, r = self.weight("w", 1, 3 * HIDDEN, width), self.weight("r", 1, 3 * HIDDEN, HIDDEN)
        b = self.weight("b", 1, 6 * HIDDEN)
        self.node("Transpose", ["state.0.h"], "h.in", perm=[1, 0, 2])
        inputs = [x, w, r, b, "lengths", "h.in"]
        self.node("GRU", inputs, "steps", "h.out", hidden_size=HIDDEN, linear_before_reset=1)
        self.node("Transpose", ["h.out"], "state.0.h.next", perm=[1, 0, 2])
        self.node("Squeeze", ["steps", self.constant("one", 1)], "squeezed")
        self.node("Transpose", ["squeezed"], y, perm=[1, 0, 2])

    def content(self, spec: GraphSpec, whole: Spec | None) -> bytes:
        types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
        axes = {
            Layout.PER_STEP: ["batch", "time"],
            Layout.PER_SEQUENCE: ["batch"],
            Layout.PER_SOURCE_STEP: ["batch", "source"],
        }

        def value(t: TensorSpec) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(t.name, types[t.dtype], [*axes[t.layout], *t.row_shape])

        def state(name: str) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1, HIDDEN])

        lengths = ["lengths", "source_lengths"] if spec.reads_source else ["lengths"]
        graph = helper.make_graph(
            self.nodes,
            "test",
            [
                *map(value, spec.inputs),
                *(helper.make_tensor_value_info(n, TensorProto.INT32, ["batch"]) for n in lengths),
                *(state(s.name) for s in spec.states),
            ],
            [*map(value, spec.outputs), *(state(s.next_name) for s in spec.states)],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        if whole is not None:
            helper.set_model_props(model, {METADATA_KEY: whole.to_json()})
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString())


def _spec(topology: str, graphs: tuple[GraphSpec, ...], generation: Generation | None) -> Spec:
    return Spec(
        topology=topology,
        num_parameters=1,
        graphs=graphs,
        generation=generation,
        vocabulary=WORDS if generation and generation.token_input else (),
        training=Training(task="test", data_set="seeded random weights"),
        parity=Parity(max_abs_error=0.0, tolerance=1e-5, num_cases=0),
    )


def _tensor(name: str, dtype: str, layout: Layout, *shape: int, **more: object) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, row_shape=shape, layout=layout, **more)


LAYER = (LayerSpec(cell="gru", hidden=HIDDEN),)


def save(files: dict[str, bytes], repository: Path, name: str) -> None:
    folder = repository / name / "1"
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)


def tokens(seed: int = 3, *, begin: bool = False, encoder: bool = False, attention: bool = False) -> dict[str, bytes]:
    """Ids after ids, alone or from the letters of a source. Returns the files."""
    graph = Graph(seed)
    graph.node("Gather", [graph.weight("embedding", IDS, HIDDEN, scale=3.0), "token"], "embedded")
    graph.node("Transpose", ["embedded"], "x.in", perm=[1, 0, 2])
    graph.gru("x.in", HIDDEN, "y")
    read = "y"
    inputs = [_tensor("token", "int64", Layout.PER_STEP, num_ids=IDS)]
    if attention:
        inputs.append(_tensor("memory", "float32", Layout.PER_SOURCE_STEP, HIDDEN))
        graph.node("Transpose", ["memory"], "keys", perm=[0, 2, 1])
        graph.node("MatMul", ["y", "keys"], "similar")
        graph.node("Shape", ["memory"], "source", start=1, end=2)
        graph.weights |= {"zero": np.array(0, np.int64), "step": np.array(1, np.int64)}
        graph.weights |= {"none": np.array(0, np.float32), "never": np.array(-1e9, np.float32)}
        graph.node("Squeeze", ["source"], "source.scalar")
        graph.node("Range", ["zero", "source.scalar", "step"], "places")
        graph.node("Cast", ["source_lengths"], "ends", to=TensorProto.INT64)
        graph.node("Unsqueeze", ["ends", graph.constant("axes", 1, 2)], "ends.wide")
        graph.node("Less", ["places", "ends.wide"], "is_real")
        graph.node("Where", ["is_real", "none", "never"], "mask")
        graph.node("Add", ["similar", "mask"], "masked")
        graph.node("Softmax", ["masked"], "attention", axis=-1)
        graph.node("MatMul", ["attention", "memory"], "context")
        read = graph.node("Add", ["y", "context"], "read")
    graph.node("MatMul", [read, graph.weight("head", HIDDEN, IDS, scale=2.0)], "scores")
    graph.node("LogSoftmax", ["scores"], "log_probs", axis=-1)
    outputs = (_tensor("log_probs", "float32", Layout.PER_STEP, IDS),)
    generation = Generation(
        max_steps=MAX_STEPS,
        token_input="token",
        scores_output="log_probs",
        begin_id=BEGIN if begin or encoder else None,
        end_id=END,
        separator=" ",
    )
    if not encoder:
        spec = GraphSpec(layers=LAYER, inputs=tuple(inputs), outputs=outputs, states=(STATE,))
        return {"model.onnx": graph.content(spec, _spec("one-to-many", (spec,), generation))}
    reader = Graph(seed + 1)
    reader.node("Gather", [reader.weight("embedding", LETTERS, HIDDEN, scale=3.0), "x"], "embedded")
    reader.node("Transpose", ["embedded"], "x.in", perm=[1, 0, 2])
    reader.gru("x.in", HIDDEN, "memory")
    reader.node("Identity", ["state.0.h.next"], "start")
    letters = _tensor("x", "int64", Layout.PER_STEP, num_ids=LETTERS, categories=("", *"abcde"))
    source = GraphSpec(
        role="encoder",
        file="encoder.onnx",
        layers=LAYER,
        inputs=(letters,),
        outputs=(
            _tensor("start", "float32", Layout.PER_SEQUENCE, 1, HIDDEN),
            _tensor("memory", "float32", Layout.PER_STEP, HIDDEN),
        ),
        states=(STATE,),
    )
    content = reader.content(source, None)
    source = source.model_copy(update={"sha256": hashlib.sha256(content).hexdigest()})
    state = STATE.model_copy(update={"initial": "start"})
    spec = GraphSpec(role="decoder", layers=LAYER, inputs=tuple(inputs), outputs=outputs, states=(state,))
    whole = _spec("encoder-decoder", (spec, source), generation)
    return {"model.onnx": graph.content(spec, whole), "encoder.onnx": content}


def curve(seed: int = 5) -> dict[str, bytes]:
    """A curve from one input that every step sees. Returns the files."""
    graph = Graph(seed)
    _repeat_context(graph, graph.node("ReduceMax", ["lengths"], "steps.int", keepdims=1))
    graph.gru("x.in", SEASONS, "hidden")
    graph.node("MatMul", ["hidden", graph.weight("head", HIDDEN, 2)], "y")
    spec = GraphSpec(
        layers=LAYER,
        inputs=(_tensor("season", "float32", Layout.PER_SEQUENCE, SEASONS),),
        outputs=(_tensor("y", "float32", Layout.PER_STEP, 2),),
        states=(STATE,),
    )
    return {"model.onnx": graph.content(spec, _spec("one-to-many", (spec,), Generation(max_steps=24)))}


def contextual(seed: int = 7) -> dict[str, bytes]:
    """Aligned outputs from steps and a context of each sequence. Returns the files."""
    graph = Graph(seed)
    graph.node("Unsqueeze", ["season", graph.constant("zero", 0)], "wide")
    graph.node("Transpose", ["x"], "x.first", perm=[1, 0, 2])
    graph.node("Add", ["x.first", "wide"], "x.in")
    graph.gru("x.in", SEASONS, "hidden")
    graph.node("MatMul", ["hidden", graph.weight("head", HIDDEN, 2)], "y")
    spec = GraphSpec(
        layers=LAYER,
        inputs=(
            _tensor("x", "float32", Layout.PER_STEP, SEASONS),
            _tensor("season", "float32", Layout.PER_SEQUENCE, SEASONS),
        ),
        outputs=(_tensor("y", "float32", Layout.PER_STEP, 2),),
        states=(STATE,),
    )
    return {"model.onnx": graph.content(spec, _spec("many-to-many", (spec,), None))}


def _repeat_context(graph: Graph, steps: str) -> None:
    graph.node("Cast", [steps], "steps.long", to=TensorProto.INT64)
    graph.node("Concat", ["steps.long", graph.constant("ones", 1, 1)], "shape", axis=0)
    graph.node("Unsqueeze", ["season", graph.constant("zero", 0)], "wide")
    graph.node("Expand", ["wide", "shape"], "x.in")


@dataclass
class Alone:
    """What one sequence gets, alone."""

    ids: list[int]
    log_probs: list[float]
    total: float
    is_ended: bool


class Oracle:
    """A token model of a repository, stepped by onnxruntime itself."""

    def __init__(self, repository: Path, name: str) -> None:
        folder = repository / name / "1"
        self._session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        encoder = folder / "encoder.onnx"
        self._encoder = ort.InferenceSession(encoder, providers=["CPUExecutionProvider"]) if encoder.exists() else None
        self._takes = {value.name for value in self._session.get_inputs()}

    def begin(self, source: list[int] | None) -> dict[str, np.ndarray]:
        """What a sequence has before its first step: its state, and what it reads."""
        state = {"state.0.h": np.zeros((1, 1, HIDDEN), np.float32)}
        if self._encoder is None or source is None:
            return state
        feeds = {"x": np.array([source]), "lengths": np.array([len(source)], np.int32), **state}
        start, memory = self._encoder.run(["start", "memory"], feeds)
        read = (
            {"memory": memory, "source_lengths": np.array([len(source)], np.int32)} if "memory" in self._takes else {}
        )
        return {"state.0.h": start, **read}

    def step(self, held: dict[str, np.ndarray], ids: list[int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Log-probabilities after some ids, and what the sequence has then."""
        feeds = {"token": np.array([ids]), "lengths": np.array([len(ids)], np.int32), **held}
        log_probs, state = self._session.run(["log_probs", "state.0.h.next"], feeds)
        return log_probs[0, -1], {**held, "state.0.h": state}

    def decode(self, prompt: list[int], source: list[int] | None = None, choose=np.argmax) -> Alone:
        """Choose one id after another; choose(log_probs, position) where it is not the likeliest."""
        held, fed = self.begin(source), prompt
        alone = Alone([], [], 0.0, is_ended=False)
        while len(alone.ids) < MAX_STEPS:
            row, held = self.step(held, fed)
            chosen = int(choose(row) if choose is np.argmax else choose(row, len(alone.ids)))
            alone.total += float(row[chosen])
            if chosen == END:
                alone.is_ended = True
                break
            alone.ids.append(chosen)
            alone.log_probs.append(float(row[chosen]))
            fed = [chosen]
        return alone
