"""From a torch module to one ONNX graph that a server can step: what a graph needs, its tracing, and its checks.

A module's forward takes the graph's inputs in their order (`GraphSpec.input_names`) and returns its outputs in theirs
(`GraphSpec.output_names`), all batch first.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from models.errors import ExportError
from models.runs import versions
from models.scans import expand
from models.spec import LENGTHS, GraphSpec, Layout, StateSpec, TensorSpec
from models.tracing import strip, trace

AXES = {
    Layout.PER_STEP: ("batch", "time"),
    Layout.PER_SEQUENCE: ("batch",),
    Layout.SHARED: (),
    Layout.PER_SOURCE_STEP: ("batch", "source"),
}
"""Names of a tensor's dynamic axes, which come first."""

Array = np.ndarray[Any, Any]
Draw = Callable[[np.random.Generator, TensorSpec | StateSpec, tuple[int, ...]], Array]
"""Random values of a tensor or state in a shape, spread as those that the module was trained on."""

_OPERATORS = {"rnn": "RNN", "lstm": "LSTM", "gru": "GRU"}
_TRACED_ROWS, _TRACED_STEPS, _TRACED_SOURCE = 3, 5, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphModule:
    """A torch module that becomes one ONNX graph."""

    module: nn.Module
    """What answers must be equal to, in evaluation mode; it can be copied and made double."""
    ready: nn.Module
    """The same on the CPU, ready to be traced: its weights as the operators take them."""
    spec: GraphSpec
    """The graph, without its count of operators."""
    draw: Draw
    """Draws inputs and states for the gate."""


def draw_like(mean: Array, scale: Array, *, non_negative_states: bool = False) -> Draw:
    """Make a Draw: ids that the model takes, numbers of that mean and spread [*row_shape], states from -1 to 1."""

    def draw(rng: np.random.Generator, tensor: TensorSpec | StateSpec, shape: tuple[int, ...]) -> Array:
        if isinstance(tensor, StateSpec):
            state = rng.uniform(-1.0, 1.0, shape)
            return (np.abs(state) if non_negative_states else state).astype(tensor.dtype)
        if tensor.num_ids:
            return rng.integers(tensor.num_ids, size=shape).astype(tensor.dtype)
        return np.asarray(mean + scale * rng.standard_normal(shape)).astype(tensor.dtype)

    return draw


def to_onnx(part: GraphModule) -> tuple[onnx.ModelProto, GraphSpec]:
    """Trace a module: one operator per recurrent layer that has one, dynamic batch and time.

    Returns (the model, its spec with the operators counted).
    Raises ExportError when the exporter fails, or its graph is not what a server needs.
    """
    spec = part.spec
    arguments, axes = _example(spec)
    model = trace(
        part.ready,
        arguments,
        axes=_as_parameters(part.ready, axes),
        input_names=spec.input_names,
        output_names=spec.output_names,
    )
    expand(model)
    _tidy(model)
    _check(model, spec)
    operators = dict(sorted(Counter(node.op_type for node in model.graph.node).items()))
    return model, spec.model_copy(update={"operators": operators})


def _example(spec: GraphSpec) -> tuple[list[Tensor], list[dict[int, Any]]]:
    """Zeros for every input in order, and each one's dynamic axes."""
    dims = {name: torch.export.Dim(name) for name in ("batch", "time", "source")}
    steps = spec.fixed_steps or _TRACED_STEPS
    sizes = {"batch": _TRACED_ROWS, "time": steps, "source": _TRACED_SOURCE}
    arguments: list[Tensor] = []
    axes: list[dict[int, Any]] = []
    tensors: tuple[TensorSpec | StateSpec, ...] = (*spec.inputs, *spec.states)
    for tensor in tensors:
        names = AXES[tensor.layout] if isinstance(tensor, TensorSpec) else AXES[Layout.PER_SEQUENCE]
        shape = (*(sizes[name] for name in names), *tensor.row_shape)
        arguments.append(torch.zeros(shape, dtype=getattr(torch, tensor.dtype)))
        axes.append({i: dims[name] for i, name in enumerate(names) if name != "time" or spec.fixed_steps is None})
    lengths = [torch.tensor([steps, 2, 1], dtype=torch.int32).clamp(max=steps)]
    if spec.reads_source:
        lengths.append(torch.tensor([2, _TRACED_SOURCE, 1], dtype=torch.int32))
    at = len(spec.inputs)
    arguments[at:at] = lengths
    axes[at:at] = [{0: dims["batch"]}] * len(lengths)
    return arguments, axes


def _as_parameters(module: nn.Module, axes: list[dict[int, Any]]) -> tuple[Any, ...]:
    """Arrange what belongs to arguments as torch.export wants it: those after a star are one tuple."""
    parameters = inspect.signature(module.forward).parameters.values()
    starred = [p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters]
    if True not in starred:
        return tuple(axes)
    at = starred.index(True)
    return (*axes[:at], tuple(axes[at:]))


def _tidy(model: onnx.ModelProto) -> None:
    """Leave out what only its maker needs, stack traces with paths among it, and name the rest by its layer."""
    graph = model.graph
    model.producer_name, model.producer_version = "rnnserve", versions().get("rnnserve", "")
    model.doc_string = ""
    graph.name = "model"
    model.ClearField("metadata_props")
    strip(graph)
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    renamed: dict[str, str] = {}
    recurrent = 0
    for number, node in enumerate(graph.node):
        node.name = f"{node.op_type}.{number}"
        if node.op_type in _OPERATORS.values():
            node.name = f"layer.{recurrent}"
            weights = zip(node.input[1:4], "WRB", strict=True)
            renamed |= {old: f"layer.{recurrent}.{new}" for old, new in weights if old}
            recurrent += 1
            # An output without a name is not computed.
            node.output[:] = [name if name in used else "" for name in node.output]
    for initializer in graph.initializer:
        initializer.name = renamed.get(initializer.name, initializer.name)
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]


def _check(model: onnx.ModelProto, spec: GraphSpec) -> None:
    """Check what a server relies on and no comparison of numbers shows. Raises ExportError."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the graph is not valid ONNX: {str(error).splitlines()[0]}") from error
    constants = {initializer.name for initializer in model.graph.initializer}
    for cell, operator in _OPERATORS.items():
        wanted = sum(layer.cell == cell and layer.form == "operator" for layer in spec.layers)
        nodes = [node for node in model.graph.node if node.op_type == operator]
        if len(nodes) != wanted:
            raise ExportError(f"{wanted} layers came out as {len(nodes)} {operator} operators")
        # Those within windows have lengths of their own.
        over_steps = sum(layer.cell == cell and layer.form == "operator" and not layer.window for layer in spec.layers)
        if sum(node.input[4] == LENGTHS for node in nodes) != over_steps:
            raise ExportError(
                f"{operator}: sequence_lens is not wired to {LENGTHS!r} in each of {over_steps} operators"
            )
        for node in nodes:
            if unfolded := [name for name in node.input[1:4] if name and name not in constants]:
                raise ExportError(f"{node.name}: weights {', '.join(unfolded)} are computed at run time")
    wanted = sum(layer.directions for layer in spec.layers if layer.form == "decomposed")
    if (found := sum(node.op_type == "Scan" for node in model.graph.node)) != wanted:
        raise ExportError(f"layers without an operator came out as {found} Scans, not {wanted}")
    layouts = {t.name: t.layout for t in (*spec.inputs, *spec.outputs)}
    # A graph without a per-step input works its number of steps out from the lengths.
    has_time = any(t.layout is Layout.PER_STEP for t in spec.inputs)
    for value in (*model.graph.input, *model.graph.output):
        names = AXES[layouts.get(value.name, Layout.PER_SEQUENCE)]
        dims = value.type.tensor_type.shape.dim
        for dim, name in zip(dims, names, strict=False):
            if name == "time" and (spec.fixed_steps or not has_time):
                if spec.fixed_steps is None and dim.dim_value:
                    raise ExportError(f"{value.name}: its time is fixed at {dim.dim_value} steps")
                if dim.dim_param:
                    dim.dim_param = name
            elif dim.dim_param != name:
                raise ExportError(f"{value.name}: axis {name} came out as {dim.dim_param or dim.dim_value}")
        if fixed := [dim.dim_param for dim in dims[len(names) :] if dim.dim_param]:
            raise ExportError(f"{value.name}: {', '.join(fixed)} varies, besides {', '.join(names)}")
