"""A model that answers what it is given, in every dtype but the usual one, and counts its steps in a state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.spec import METADATA_KEY, GraphSpec, Layout, Parity, Spec, StateSpec, TensorSpec, Training

INPUTS = {"double": ("float64", (2,)), "whole": ("int32", ()), "flags": ("bool", (2,)), "long": ("int64", ())}
"""Name, dtype and row shape of each; the output is called `<name>.same`."""


def save_mixed(repository: Path, name: str) -> None:
    def tensors(suffix: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name=f"{each}{suffix}", dtype=dtype, row_shape=row, layout=Layout.PER_STEP)
            for each, (dtype, row) in INPUTS.items()
        )

    spec = Spec(
        topology="many-to-many",
        num_parameters=0,
        graphs=(
            GraphSpec(
                inputs=tensors(""),
                outputs=tensors(".same"),
                states=(StateSpec(name="state.0.h", next_name="state.0.h.next", row_shape=(1, 1)),),
            ),
        ),
        training=Training(task="test", data_set="none"),
        parity=Parity(max_abs_error=0.0, tolerance=1e-5, num_cases=0),
    )

    def values(suffix: str) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(
                f"{each}{suffix}", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), ("batch", "time", *row)
            )
            for each, (dtype, row) in INPUTS.items()
        ]

    def state(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ("batch", 1, 1))

    graph = helper.make_graph(
        [
            *(helper.make_node("Identity", [each], [f"{each}.same"]) for each in INPUTS),
            helper.make_node("Cast", ["lengths"], ["steps"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["steps", "shape"], ["added"]),
            helper.make_node("Add", ["state.0.h", "added"], ["state.0.h.next"]),
        ],
        "mixed",
        [*values(""), helper.make_tensor_value_info("lengths", TensorProto.INT32, ("batch",)), state("state.0.h")],
        [*values(".same"), state("state.0.h.next")],
        [numpy_helper.from_array(np.array([-1, 1, 1]), "shape")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    onnx.checker.check_model(model)
    path = repository / name / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(model.SerializeToString())
