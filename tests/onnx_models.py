"""Small recurrent models, put together node by node with onnx: what the server's tests serve. No torch, no exporter.

The weights are seeded, so a model is the same wherever it is built; `Weights` hands them to oracles.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.spec import METADATA_KEY, GraphSpec, LayerSpec, Layout, Parity, Spec, StateSpec, TensorSpec, Training

GATES = {"rnn": 1, "gru": 3, "lstm": 4}


@dataclass(frozen=True)
class Model:
    """A built model: file content, spec, and the weights by name."""

    content: bytes
    spec: Spec
    weights: dict[str, np.ndarray]

    def save(self, repository: Path, name: str, version: int = 1) -> Path:
        path = repository / name / str(version) / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.content)
        return path


def build(
    cell: str = "lstm",
    *,
    features: int = 3,
    hidden: int = 8,
    outputs: int = 2,
    layers: int = 1,
    bidirectional: bool = False,
    many_to_one: bool = False,
    num_ids: int | None = None,
    seed: int = 0,
    coupled: bool = False,
    labels: tuple[str, ...] = (),
    fixed_steps: int | None = None,
) -> Model:
    """Build a model with a linear head.

    many_to_one  one output a sequence, from the final states of a bidirectional model
    num_ids      token ids in, through an embedding of `features`
    coupled      subtract the mean over the batch: neighbours change each other
    fixed_steps  the time axis of a graph that takes no other
    """
    rng = np.random.default_rng(seed)
    directions = 2 if bidirectional else 1
    weights: dict[str, np.ndarray] = {}
    nodes = []

    def weight(name: str, *shape: int) -> str:
        weights[name] = (rng.uniform(-1.0, 1.0, shape) / np.sqrt(hidden)).astype(np.float32)
        return name

    def node(op: str, inputs: list[str], outputs: list[str], **attributes: object) -> None:
        nodes.append(helper.make_node(op, inputs, outputs, **attributes))

    x = "x"
    if num_ids is not None:
        node("Gather", [weight("embedding", num_ids, features), "x"], ["embedded"])
        x = "embedded"
    if coupled:
        weights["batch_axis"] = np.array([0], dtype=np.int64)
        node("ReduceMean", [x, "batch_axis"], ["mean"], keepdims=1)
        node("Sub", [x, "mean"], ["centred"])
        x = "centred"
    node("Transpose", [x], ["time_first.0"], perm=[1, 0, 2])
    states, finals = [], []
    for layer in range(layers):
        width = features if layer == 0 else hidden * directions
        gates = GATES[cell] * hidden
        inputs = [
            f"time_first.{layer}",
            weight(f"w.{layer}", directions, gates, width),
            weight(f"r.{layer}", directions, gates, hidden),
            weight(f"b.{layer}", directions, 2 * gates),
            "lengths",
        ]
        kinds = ("h", "c") if cell == "lstm" else ("h",)
        for kind in kinds:
            name = f"state.{layer}.{kind}"
            states.append(StateSpec(name=name, next_name=f"{name}.next", row_shape=(directions, hidden)))
            node("Transpose", [name], [f"{name}.in"], perm=[1, 0, 2])
            inputs.append(f"{name}.in")
        attributes = {"hidden_size": hidden, "direction": "bidirectional" if bidirectional else "forward"}
        if cell == "gru":
            attributes["linear_before_reset"] = 1
        finals = [f"state.{layer}.{kind}.out" for kind in kinds]
        node(cell.upper(), inputs, [f"steps.{layer}", *finals], **attributes)
        for kind in kinds:
            node("Transpose", [f"state.{layer}.{kind}.out"], [f"state.{layer}.{kind}.next"], perm=[1, 0, 2])
        node("Transpose", [f"steps.{layer}"], [f"split.{layer}"], perm=[0, 2, 1, 3])  # time, batch, directions, hidden
        weights["merged"] = np.array([0, 0, -1], dtype=np.int64)
        node("Reshape", [f"split.{layer}", "merged"], [f"time_first.{layer + 1}"])
    if many_to_one:
        weights["joined"] = np.array([0, -1], dtype=np.int64)
        node("Reshape", [f"state.{layers - 1}.h.next", "joined"], ["head.in"])
    else:
        node("Transpose", [f"time_first.{layers}"], ["head.in"], perm=[1, 0, 2])
    node("MatMul", ["head.in", weight("head.w", hidden * directions, outputs)], ["head.product"])
    node("Add", ["head.product", weight("head.b", outputs)], ["y"])

    per_step = Layout.PER_SEQUENCE if many_to_one else Layout.PER_STEP
    spec = Spec(
        topology="many-to-one" if many_to_one else "many-to-many",
        num_parameters=sum(w.size for w in weights.values() if w.dtype == np.float32),
        graphs=(
            GraphSpec(
                layers=(LayerSpec(cell=cell, hidden=hidden, directions=directions),) * layers,
                fixed_steps=fixed_steps,
                inputs=(
                    TensorSpec(
                        name="x",
                        dtype="float32" if num_ids is None else "int64",
                        row_shape=(features,) if num_ids is None else (),
                        layout=Layout.PER_STEP,
                        num_ids=num_ids,
                    ),
                ),
                outputs=(TensorSpec(name="y", dtype="float32", row_shape=(outputs,), layout=per_step),),
                states=tuple(states),
            ),
        ),
        labels=labels,
        training=Training(task="test", data_set="seeded random weights"),
        parity=Parity(max_abs_error=0.0, tolerance=1e-5, num_cases=0),
    )

    def value(name: str, dtype: int, *shape: str | int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, dtype, shape)

    time = fixed_steps or "time"
    graph_inputs = [
        value("x", TensorProto.FLOAT, "batch", time, features)
        if num_ids is None
        else value("x", TensorProto.INT64, "batch", time),
        value("lengths", TensorProto.INT32, "batch"),
        *(value(s.name, TensorProto.FLOAT, "batch", *s.row_shape) for s in states),
    ]
    graph_outputs = [
        value("y", TensorProto.FLOAT, "batch", *([] if many_to_one else [time]), outputs),
        *(value(s.next_name, TensorProto.FLOAT, "batch", *s.row_shape) for s in states),
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        graph_inputs,
        graph_outputs,
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    onnx.checker.check_model(model)
    return Model(model.SerializeToString(), spec, weights)
