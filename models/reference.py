"""Numpy in the place of onnxruntime: answers of a graph whose products are of integers, by onnx's reference evaluator.

Slow, and nobody's kernel: what a quantized file answers is compared with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from models.quantsteps import MICROSOFT, Array, attributes
from models.runtime import Named

Reference = Callable[[Named], dict[str, Array]]


class MatMulIntegerToFloat(OpRun):
    """Integers times integers, then scaled: onnxruntime's operator of this name."""

    op_domain = MICROSOFT

    def _run(
        self,
        a: Array,
        b: Array,
        a_scale: Array,
        b_scale: Array,
        a_zero: Array,
        _: Array | None = None,
        bias: Any = None,
    ) -> tuple[Array]:
        sums = (a.astype(np.int64) - int(a_zero)) @ b.astype(np.int64)
        scaled = sums.astype(np.float32) * (a_scale * b_scale).astype(np.float32)
        return (scaled if bias is None else scaled + bias,)


def reference(model: onnx.ModelProto) -> Reference:
    """Make what answers as a model's file should."""
    evaluator = ReferenceEvaluator(_forward_only(model), new_ops=[MatMulIntegerToFloat])

    def run(inputs: Named) -> dict[str, Array]:
        with np.errstate(over="ignore"):  # a sigmoid of what is far from 0
            return dict(zip(evaluator.output_names, evaluator.run(None, dict(inputs)), strict=True))

    return run


def _forward_only(model: onnx.ModelProto) -> onnx.ModelProto:
    """Reverse in time, by nodes, what backward Scans read and give: the evaluator knows forward ones alone."""
    turned = onnx.ModelProto()
    turned.CopyFrom(model)
    graph = turned.graph
    bounds = {"reverse.first": [-1], "reverse.past": [np.iinfo(np.int64).min], "reverse.time": [0], "reverse.by": [-1]}
    graph.initializer.extend(numpy_helper.from_array(np.array(value, np.int64), name) for name, value in bounds.items())
    nodes: list[NodeProto] = []
    for node in graph.node:
        given = attributes(node)
        if node.op_type != "Scan" or not any(given.get("scan_input_directions", ())):
            nodes.append(node)
            continue
        backward = onnx.NodeProto()
        backward.CopyFrom(node)
        for name in ("scan_input_directions", "scan_output_directions"):
            [attribute] = [each for each in backward.attribute if each.name == name]
            backward.attribute.remove(attribute)
        num_inputs, num_states = given["num_scan_inputs"], len(node.input) - given["num_scan_inputs"]
        for values in (backward.input, backward.output):
            values[num_states:] = [f"{value}.turned.{node.name}" for value in values[num_states:]]
        before = zip(node.input[-num_inputs:], backward.input[-num_inputs:], strict=True)
        after = zip(backward.output[num_states:], node.output[num_states:], strict=True)
        nodes += [helper.make_node("Slice", [old, *bounds], [new]) for old, new in before]
        nodes.append(backward)
        nodes += [helper.make_node("Slice", [old, *bounds], [new]) for old, new in after]
    del graph.node[:]
    graph.node.extend(nodes)
    return turned
