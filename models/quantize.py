"""8-bit integers in the graph of an exported model, in one of three forms.

weights  stored in int8, and widened when the file is loaded: answers are exact in a batch, memory and speed float32's
static   products with recurrent states are of int8, with scales fixed here: exact in a batch too, and faster than
         float32 where layers are wide or batches large (models/quantsteps.py)
dynamic  onnxruntime's DynamicQuantizeLSTM, which measures one scale over a whole batch at every run: neighbours
         change each other
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from models.errors import ExportError
from models.quantization import QuantizedForm
from models.quantsteps import (
    GATES,
    MICROSOFT,
    PRODUCT_BITS,
    Array,
    Builder,
    as_initializers,
    attributes,
    in_steps,
    quantized,
    why_unbounded,
)

_STORED_BITS = 8
_PASSES_VALUES = ("Transpose", "Squeeze", "Unsqueeze", "Reshape", "Identity", "Gather", "Slice", "Concat")
"""Operators whose outputs hold elements of their inputs, and nothing else."""


@dataclass(slots=True)
class Quantized:
    """A graph after quantization."""

    model: onnx.ModelProto
    done: list[str] = field(default_factory=list)
    """What was quantized, and how."""
    kept: list[str] = field(default_factory=list)
    """What was not, and why."""
    replaced: list[int] = field(default_factory=list)
    """Numbers of the recurrent operators that became a Scan."""
    is_exact: bool = True
    """Whether neighbours in a batch leave a sequence's answers as they are, as far as the graph decides it."""


def quantize(model: onnx.ModelProto, form: QuantizedForm) -> Quantized:
    """Quantize a copy of a model. Raises ExportError, with the reason, where the form brings nothing."""
    result = Quantized(onnx.ModelProto())
    result.model.CopyFrom(model)
    if form == "static":
        _to_static(result)
    elif form == "dynamic":
        _to_dynamic(result)
    if form != "weights" and not result.done:
        whys = "; ".join(result.kept) or "it has no recurrent operator"
        raise ExportError(f"--int8 {form} would change nothing here: {whys}. Use --int8 weights")
    if readers := _store(result.model.graph):
        result.done.append(f"stored in int8, widened when loaded: weights of {', '.join(readers)}")
    if not result.done:
        raise ExportError("--int8 weights would change nothing here: every weight is too small to be stored smaller")
    if any(node.domain == MICROSOFT for node in _nodes(result.model.graph)):
        result.model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return result


def with_rounded_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make the float32 model whose weights are what `weights` stores: the reference for that form."""
    rounded = onnx.ModelProto()
    rounded.CopyFrom(model)
    graph = rounded.graph
    axes = _weight_axes(graph)
    for tensor in graph.initializer:
        if (stored := _stored(tensor, axes)) is not None:
            integers, scales = stored
            tensor.CopyFrom(numpy_helper.from_array(integers.astype(np.float32) * scales, tensor.name))
    return rounded


def _store(graph: GraphProto) -> list[str]:
    """Store weights in int8, each widened by a Cast and a Mul, which onnxruntime folds when it loads the file.

    It does not fold DequantizeLinear, the operator made for this: weights would be widened anew in every run, and no
    kernel could arrange them beforehand. Returns the nodes that read them.
    """
    axes = _weight_axes(graph)
    stored_names, before, added = [], [], dict[str, Array]()
    for tensor in list(graph.initializer):
        if (stored := _stored(tensor, axes)) is None:
            continue
        name = tensor.name
        added[f"{name}.int8"], added[f"{name}.scale"] = stored
        graph.initializer.remove(tensor)
        before.append(helper.make_node("Cast", [f"{name}.int8"], [f"{name}.wide"], to=TensorProto.FLOAT))
        before.append(helper.make_node("Mul", [f"{name}.wide", f"{name}.scale"], [name]))
        stored_names.append(name)
    readers = [node.name or node.op_type for node in _nodes(graph) if set(node.input) & set(stored_names)]
    nodes = [*before, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(as_initializers(added))
    return readers


def _stored(tensor: TensorProto, axes: dict[str, tuple[int, ...]]) -> tuple[Array, Array] | None:
    """Round a tensor's weights; None for what is no weight, and where that would save less than half."""
    if tensor.name not in axes or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
        return None
    weights = numpy_helper.to_array(tensor)
    integers, scales = quantized(weights, axes[tensor.name], _STORED_BITS)
    return (integers, scales) if integers.nbytes + scales.nbytes < weights.nbytes / 2 else None


def _weight_axes(graph: GraphProto) -> dict[str, tuple[int, ...]]:
    """Find the weights by what reads them, and what a channel's lie along in each."""
    axes: dict[str, tuple[int, ...]] = {}
    for node in _nodes(graph):
        if node.op_type in GATES and not node.domain:
            axes |= {node.input[1]: (-1,), node.input[2]: (-1,)}
        elif node.op_type == "MatMul":
            axes[node.input[1]] = (-2,)
        elif node.op_type == "Gemm":
            axes[node.input[1]] = (-1,) if attributes(node).get("transB") else (-2,)
        elif node.op_type == "Gather":
            axes[node.input[0]] = (-1,)
        elif node.op_type == "Conv":
            axes[node.input[1]] = (-2, -1)
    return axes


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Every node, those of bodies within it too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _to_static(result: Quantized) -> None:
    """Replace recurrent operators with bounded states, and products of what they give."""
    graph = result.model.graph
    bounded: set[str] = set()
    masks: dict[str, str] = {}
    recurrent = 0

    def replace(node: NodeProto, weights: dict[str, Array]) -> list[NodeProto] | None:
        nonlocal recurrent
        if node.op_type in GATES and not node.domain:
            recurrent += 1
            if why := why_unbounded(node):
                result.kept.append(f"{node.name}: {node.op_type} in float32, for {why}")
                return None
            before: list[NodeProto] = []
            x, lengths = node.input[0], node.input[4]
            if lengths not in masks:
                mask = Builder(f"live.{len(masks)}", before, {})
                masks[lengths] = _mask(mask, x, lengths)
                weights |= mask.constants
            is_bounded = x in bounded
            w, r = (weights[name] for name in node.input[1:3])
            b = weights[node.input[3]] if node.input[3] else np.zeros((len(w), 2 * w.shape[1]), np.float32)
            built = in_steps(node, (w, r, b), masks[lengths], bounded_input=is_bounded)
            weights |= built.constants
            bounded.update(filter(None, node.output[:2]))
            what = "both products" if is_bounded else "the product with the state"
            result.done.append(f"{node.name}: {node.op_type}, {what} in int8 with fixed scales")
            result.replaced.append(recurrent - 1)
            return [*before, *built.nodes]
        if node.op_type in _PASSES_VALUES:
            values = node.input if node.op_type == "Concat" else node.input[:1]
            if all(value in bounded for value in values):
                bounded.update(node.output)
            return None
        if (matrix := _matrix(node, weights)) is None or node.input[0] not in bounded:
            return None
        builder = Builder(node.name, [], {})
        builder.product_outside(node.input[0], matrix[0], matrix[1], "w", node.output[0])
        weights |= builder.constants
        result.done.append(f"{node.name}: its product in int8 with a fixed scale")
        return builder.nodes

    _rewrite(graph, replace)


def _mask(builder: Builder, x: str, lengths: str) -> str:
    """Say which steps of x [time, batch, ...] are not padding; returns [time, batch, 1] bool."""
    zero, one = builder.constant("zero", np.int64(0)), builder.constant("one", np.int64(1))
    time = builder.add("Squeeze", [builder.add("Shape", [x], start=0, end=1)])
    steps = builder.add("Range", [zero, time, one])
    steps = builder.add("Unsqueeze", [steps, builder.constant("batch", np.array([1, 2], np.int64))])
    counts = builder.add("Cast", [lengths], to=TensorProto.INT64)
    counts = builder.add("Unsqueeze", [counts, builder.constant("time", np.array([0, 2], np.int64))])
    return builder.add("Less", [steps, counts])


def _matrix(node: NodeProto, weights: dict[str, Array]) -> tuple[Array, Array | None] | None:
    """Find the constant matrix that a node multiplies by, and its bias; None for any other node."""
    if node.op_type not in ("MatMul", "Gemm") or (matrix := weights.get(node.input[1])) is None or matrix.ndim != 2:
        return None
    given = attributes(node)
    if given.get("transA") or given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0:
        return None
    bias = weights.get(node.input[2]) if len(node.input) > 2 else None
    if len(node.input) > 2 and (bias is None or bias.ndim != 1):
        return None
    return (matrix.T if given.get("transB") else matrix), bias


def _to_dynamic(result: Quantized) -> None:
    """Replace LSTMs and products by onnxruntime's dynamic ones, where there is an LSTM."""
    graph = result.model.graph
    has_lstm = any(node.op_type == "LSTM" for node in graph.node)

    def replace(node: NodeProto, weights: dict[str, Array]) -> list[NodeProto] | None:
        if node.op_type in ("GRU", "RNN"):
            result.kept.append(f"{node.name}: onnxruntime has no dynamic int8 {node.op_type}; --int8 static has")
        elif node.op_type == "LSTM":
            return [_dynamic_lstm(node, weights, result)]
        elif has_lstm and (matrix := _matrix(node, weights)) is not None:
            integers, scales = quantized(matrix[0], 0, PRODUCT_BITS)
            added = {"w": integers, "w.scale": scales[0]} | ({} if matrix[1] is None else {"w.bias": matrix[1]})
            weights |= {f"{node.name}.{key}": array for key, array in added.items()}
            inputs = [node.input[0], f"{node.name}.w", f"{node.name}.w.scale", ""]
            inputs += [f"{node.name}.w.bias"] if "w.bias" in added else []
            result.done.append(f"{node.name}: DynamicQuantizeMatMul")
            return [helper.make_node("DynamicQuantizeMatMul", inputs, node.output, node.name, domain=MICROSOFT)]
        return None

    _rewrite(graph, replace)
    result.is_exact = not result.done


def _dynamic_lstm(node: NodeProto, weights: dict[str, Array], result: Quantized) -> NodeProto:
    inputs = [*node.input, *[""] * (8 - len(node.input))]
    for number, key in ((1, "w"), (2, "r")):
        integers, scales = quantized(weights[node.input[number]], -1, PRODUCT_BITS)
        name = f"{node.name}.{key}"
        weights[name] = np.ascontiguousarray(integers.transpose(0, 2, 1))
        weights[f"{name}.scale"] = scales[..., 0]
        weights[f"{name}.zero"] = np.zeros(scales.shape[:2], np.int8)
        inputs[number] = name
        inputs += [f"{name}.scale", f"{name}.zero"]
    made = helper.make_node("DynamicQuantizeLSTM", inputs, node.output, node.name, domain=MICROSOFT)
    made.attribute.extend(node.attribute)
    result.done.append(f"{node.name}: DynamicQuantizeLSTM")
    return made


Replace = Callable[[NodeProto, dict[str, Array]], list[NodeProto] | None]


def _rewrite(graph: GraphProto, replace: Replace) -> None:
    """Put others in the place of nodes: `replace` takes a node and the constants, and adds those of its own."""
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    known = set(weights)
    nodes: list[NodeProto] = []
    for number, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}.{number}"
        made = replace(node, weights)
        nodes += [node] if made is None else made
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(as_initializers({name: weights[name] for name in weights if name not in known}))
    used = {name for node in _nodes(graph) for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
