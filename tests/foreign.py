"""Models as other exporters leave them, put together with onnx, and the oracle: onnxruntime on the file as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

Rows = np.ndarray
FEATURES, HIDDEN, OUTPUTS = 3, 5, 2
FLOAT = TensorProto.FLOAT


@dataclass
class Foreign:
    """A graph under construction; weights are seeded."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, Rows] = field(default_factory=dict)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    def weight(self, name: str, *shape: int) -> str:
        self.weights[name] = self.rng.uniform(-0.8, 0.8, shape).astype(np.float32)
        return name

    def constant(self, name: str, *values: int) -> str:
        self.weights[name] = np.array(values, dtype=np.int64)
        return name

    def node(self, operator: str, takes: Sequence[str], gives: str | Sequence[str], **attributes: object) -> str:
        outputs = [gives] if isinstance(gives, str) else list(gives)
        self.nodes.append(helper.make_node(operator, list(takes), outputs, **attributes))
        return outputs[0]

    def save(self, path: Path, takes: Sequence[object], gives: Sequence[object], *, opset: int = 17) -> Path:
        """Write the file. takes, gives: (name, dims) of floats, or (name, type, dims)."""
        values = [
            [helper.make_tensor_value_info(v[0], v[1] if len(v) == 3 else FLOAT, v[-1]) for v in part]
            for part in (takes, gives)
        ]
        weights = [numpy_helper.from_array(array, name) for name, array in self.weights.items()]
        graph = helper.make_graph(self.nodes, "foreign", *values, weights)
        opsets = [helper.make_opsetid("", opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="elsewhere")
        onnx.checker.check_model(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, path)
        return path


def lstm(
    path: Path, *, batch_first: bool = True, batch: object = "batch", time: object = "seq", lengths: bool = False
) -> Path:
    """An LSTM as torch.onnx leaves it: h0 and c0 [layers, batch, hidden], and a linear head."""
    it = Foreign()
    x = it.node("Transpose", ["input"], "x", perm=[1, 0, 2]) if batch_first else "input"
    takes = [
        x,
        it.weight("W", 1, 4 * HIDDEN, FEATURES),
        it.weight("R", 1, 4 * HIDDEN, HIDDEN),
        it.weight("B", 1, 8 * HIDDEN),
    ]
    it.node("LSTM", [*takes, "lens" if lengths else "", "h0", "c0"], ["Y", "hn", "cn"], hidden_size=HIDDEN)
    y = it.node("Squeeze", ["Y", it.constant("one", 1)], "squeezed")
    if batch_first:
        y = it.node("Transpose", [y], "back", perm=[1, 0, 2])
    it.node("MatMul", [y, it.weight("head", HIDDEN, OUTPUTS)], "logits")
    lead = [batch, time] if batch_first else [time, batch]
    state = [1, batch, HIDDEN]
    inputs: list[object] = [("input", [*lead, FEATURES]), ("h0", state), ("c0", state)]
    if lengths:
        inputs.append(("lens", TensorProto.INT32, [batch]))
    return it.save(path, inputs, [("logits", [*lead, OUTPUTS]), ("hn", state), ("cn", state)])


def cell(path: Path, *, batch: object = "N", state_axis: int = 0, rate: bool = False, mean: bool = False) -> Path:
    """One step of a plain RNN in a call, without an axis of time.

    state_axis  where the state [batch, 1, hidden] has its batch
    rate        an input that scales the step, a scalar
    mean        take the mean over the batch away: neighbours change each other
    """
    it = Foreign()
    axes = [1, 2]
    axes.insert(state_axis, 0)  # where each axis of [batch, 1, hidden] lies
    flat = it.node("Transpose", ["memory"], "first", perm=[axes.index(n) for n in range(3)])
    flat = it.node("Squeeze", [flat, it.constant("one", 1)], "flat")
    x = it.node("Mul", ["frame", "rate"], "scaled") if rate else "frame"
    fed = it.node("MatMul", [x, it.weight("U", FEATURES, HIDDEN)], "fed")
    kept = it.node("MatMul", [flat, it.weight("V", HIDDEN, HIDDEN)], "kept")
    total = it.node("Add", [fed, kept], "total")
    if mean:
        total = it.node("Sub", [total, it.node("ReduceMean", [total], "mean", axes=[0])], "centred")
    new = it.node("Tanh", [total], "new")
    wide = it.node("Unsqueeze", [new, "one"], "wide")
    it.node("Transpose", [wide], "memory_out", perm=axes)
    it.node("MatMul", [new, it.weight("head", HIDDEN, OUTPUTS)], "score")
    state = [1, HIDDEN]
    state.insert(state_axis, batch)
    inputs: list[object] = [("frame", [batch, FEATURES]), ("memory", state)]
    if rate:
        inputs.append(("rate", []))
    return it.save(path, inputs, [("score", [batch, OUTPUTS]), ("memory_out", state)])


def framed(path: Path, *, size: object = "samples", batch: object = "batch", frame: int = 4, overlap: int = 2) -> Path:
    """Frames of samples with some of the frame before in front: their mean and energy go into a leaky sum."""
    it = Foreign()
    mean = it.node("ReduceMean", ["audio"], "mean", axes=[1])
    first = it.node("Slice", ["audio", it.constant("zero", 0), it.constant("one", 1), it.constant("axis", 1)], "first")
    both = it.node("Concat", [mean, first], "both", axis=1)
    fed = it.node("MatMul", [both, it.weight("U", 2, HIDDEN)], "fed")
    leaked = it.node("MatMul", ["state", it.weight("V", HIDDEN, HIDDEN)], "leaked")
    it.node("Tanh", [it.node("Add", [fed, leaked], "total")], "stateN")
    it.node("MatMul", ["stateN", it.weight("head", HIDDEN, 1)], "speech")
    size = frame + overlap if size == "fixed" else size
    return it.save(
        path,
        [("audio", [batch, size]), ("state", [batch, HIDDEN])],
        [("speech", [batch, 1]), ("stateN", [batch, HIDDEN])],
    )


def run(path: Path, feeds: Mapping[str, Rows]) -> dict[str, Rows]:
    """Run a file as it is."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def zeros(*shape: int) -> Rows:
    return np.zeros(shape, dtype=np.float32)


def lstm_alone(path: Path, x: Rows, *, batch_first: bool = True, lengths: bool = False) -> Rows:
    """What an LSTM answers to one sequence [time, features], whole: [time, outputs]."""
    feeds = {"input": x[None] if batch_first else x[:, None], "h0": zeros(1, 1, HIDDEN), "c0": zeros(1, 1, HIDDEN)}
    if lengths:
        feeds["lens"] = np.array([len(x)], dtype=np.int32)
    logits = run(path, feeds)["logits"]
    return logits[0] if batch_first else logits[:, 0]


def cell_alone(path: Path, x: Rows, *, state: Rows, rate: float | None = None) -> Rows:
    """What a cell answers to one sequence, step by step: [time, outputs]."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    rows = []
    for step in x:
        feeds = {"frame": step[None], "memory": state}
        if rate is not None:
            feeds["rate"] = np.array(rate, dtype=np.float32)
        score, state = session.run(["score", "memory_out"], feeds)
        rows.append(score[0])
    return np.array(rows)


def framed_alone(path: Path, samples: Rows, *, frame: int = 4, overlap: int = 2) -> Rows:
    """What frames [n, frame] are answered, each with the end of the one before in front: [n, 1]."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    state, before, rows = zeros(1, HIDDEN), zeros(overlap), []
    for each in samples:
        audio = np.concatenate([before, each])
        speech, state = session.run(["speech", "stateN"], {"audio": audio[None], "state": state})
        before = audio[-overlap:]
        rows.append(speech[0])
    return np.array(rows)
