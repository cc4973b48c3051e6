"""Graphs whose recurrent states are rows of slabs: what `service.device` runs.

A slab is one tensor [capacity, *row shape] a state, given to a graph as an input and taken from it as an output. When
both are bound to the same memory, ScatterND writes rows in place and nothing else is copied:

    step    slots [batch] -> Gather(slab, slots) -> the model -> ScatterND(slab, slots, next state)
    write   for each state, slots [n] and rows [n, *row shape] -> ScatterND(slab, slots, rows)
    read    slots [n] -> Gather(slab, slots)

Gather has to be done before ScatterND begins, though onnxruntime does not know that they share memory. It is, because
a next state is computed from what was gathered; `step_graph` refuses a model where that is not so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from models.spec import GraphSpec, StateSpec
from service.errors import ConfigError, ModelBroken

PREFIX = "rnnserve."
"""Of every name that is put into a graph."""
SLOTS = f"{PREFIX}slots"
"""Graph input [batch] int64: the slab's row for each row of the batch, each at most once."""
MIN_OPSET = 11
"""First with ScatterND."""
_COLUMN = f"{PREFIX}column"
_COLUMN_SHAPE = f"{PREFIX}column_shape"


def slab_name(state: StateSpec) -> str:
    """Graph input that is a state's slab [capacity, *row shape]."""
    return f"{PREFIX}slab.{state.name}"


def written_name(state: StateSpec) -> str:
    """Graph output that is the slab with its rows written."""
    return f"{PREFIX}written.{state.name}"


def slots_name(state: StateSpec) -> str:
    """Input of the write graph [n] int64: rows of the slab to write."""
    return f"{PREFIX}slots.{state.name}"


def rows_name(state: StateSpec) -> str:
    """Input of the write graph, output of the read graph [n, *row shape]."""
    return f"{PREFIX}rows.{state.name}"


def step_graph(content: bytes, graph: GraphSpec) -> bytes:
    """Put slabs in the place of a model's states.

    content  an ONNX file with the inputs and outputs that its spec says
    Returns a file with the inputs SLOTS and slab_name(state) in place of each state, and the outputs
    written_name(state) in place of each next state; opset, metadata and everything else stay.
    Raises ModelBroken for a file where that can't be done, and ConfigError where the package onnx is absent.
    """
    onnx = _onnx()
    if not graph.states:
        raise ModelBroken("a model without states has none to keep on a device: serve with --provider cpu")
    try:
        model = onnx.load_from_string(content)
    except Exception as error:  # protobuf's own
        raise ModelBroken(f"states on a device need a file in ONNX's own format: {error}") from error
    opset = max((each.version for each in model.opset_import if not each.domain), default=0)
    if opset < MIN_OPSET:
        raise ModelBroken(f"opset {opset} has no ScatterND, which states on a device need: export with {MIN_OPSET} on")
    body = model.graph
    if taken := sorted({name for name in _names(body) if name.startswith(PREFIX)}):
        raise ModelBroken(f"names that begin with {PREFIX!r} are the server's own: {', '.join(taken[:5])}")
    for state in graph.states:
        if state.name not in _ancestors(body, state.next_name):
            raise ModelBroken(
                f"{state.next_name} is not computed from {state.name}, which a state on a device must be; "
                "serve with --provider cpu"
            )
    replaced = {name for state in graph.states for name in (state.name, state.next_name)}
    inputs = [value for value in body.input if value.name not in replaced]
    outputs = [value for value in body.output if value.name not in replaced]
    gathers, scatters = [_column(SLOTS, _COLUMN)], []
    inputs.append(_value(SLOTS, "int64", ("batch",)))
    for state in graph.states:
        inputs.append(_slab(slab_name(state), state))
        outputs.append(_slab(written_name(state), state))
        gathers.append(_gather(state, state.name))
        scatters.append(_scatter(state, _COLUMN, state.next_name))
    nodes = [*gathers, *body.node, *scatters]
    for field, values in ((body.input, inputs), (body.output, outputs), (body.node, nodes)):
        del field[:]
        field.extend(values)
    body.initializer.append(_column_shape())
    return bytes(model.SerializeToString())


def write_graph(states: Sequence[StateSpec]) -> bytes:
    """Make a graph that writes rows into slabs, each state's rows to slots of their own."""
    nodes, inputs, outputs = [], [], []
    for state in states:
        column = f"{_COLUMN}.{state.name}"
        nodes += [_column(slots_name(state), column), _scatter(state, column, rows_name(state))]
        inputs += [_slab(slab_name(state), state), _value(slots_name(state), "int64", (f"n.{state.name}",))]
        inputs.append(_value(rows_name(state), state.dtype, (f"n.{state.name}", *state.row_shape)))
        outputs.append(_slab(written_name(state), state))
    return _file(nodes, inputs, outputs, [_column_shape()])


def read_graph(states: Sequence[StateSpec]) -> bytes:
    """Make a graph that reads the same rows of every slab."""
    inputs = [_value(SLOTS, "int64", ("n",)), *(_slab(slab_name(state), state) for state in states)]
    outputs = [_value(rows_name(state), state.dtype, ("n", *state.row_shape)) for state in states]
    return _file([_gather(state, rows_name(state)) for state in states], inputs, outputs, [])


def is_of_slab(node_name: str) -> bool:
    """Whether a node moves rows of a slab."""
    return node_name.startswith(PREFIX)


def _onnx() -> Any:
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ConfigError(
            "serving on a GPU needs the package onnx: pip install 'rnnserve[gpu]', or serve with --provider cpu",
            field="provider",
        ) from error
    return onnx


def _value(name: str, dtype: str, shape: Sequence[str | int]) -> Any:
    helper = _onnx().helper
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def _slab(name: str, state: StateSpec) -> Any:
    return _value(name, state.dtype, (f"{PREFIX}capacity", *state.row_shape))


def _gather(state: StateSpec, rows: str) -> Any:
    inputs = [slab_name(state), SLOTS]
    return _onnx().helper.make_node("Gather", inputs, [rows], name=f"{PREFIX}gather.{state.name}", axis=0)


def _scatter(state: StateSpec, column: str, rows: str) -> Any:
    inputs = [slab_name(state), column, rows]
    return _onnx().helper.make_node("ScatterND", inputs, [written_name(state)], name=f"{PREFIX}scatter.{state.name}")


def _column(slots: str, column: str) -> Any:
    """Give each slot a row of its own, [n, 1], as ScatterND wants them.

    Were the graph's input the column itself, a ScatterND of rows from the CPU would have no input but such ones and
    graph inputs, and onnxruntime would place it on the CPU, with the slab (GetCpuPreferredNodes).
    """
    return _onnx().helper.make_node("Reshape", [slots, _COLUMN_SHAPE], [column], name=column)


def _column_shape() -> Any:
    return _onnx().numpy_helper.from_array(np.array([-1, 1], dtype=np.int64), _COLUMN_SHAPE)


def _file(nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], initializers: Sequence[Any]) -> bytes:
    helper = _onnx().helper
    graph = helper.make_graph(nodes, "slabs", inputs, outputs, initializers)
    # Not the newest: an onnxruntime that is older than this onnx must know them.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return bytes(model.SerializeToString())


def _names(body: Any) -> Iterator[str]:
    """Every name of a value or a node."""
    for value in (*body.input, *body.output, *body.initializer):
        yield value.name
    for node in body.node:
        yield from (node.name, *node.input, *node.output)


def _ancestors(body: Any, name: str) -> set[str]:
    """Values that one is computed from, itself included."""
    producers = {output: node for node in body.node for output in node.output}
    found: set[str] = set()
    waiting = [name]
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            if each in producers:
                waiting.extend(_taken(producers[each]))
    return found


def _taken(node: Any) -> Iterator[str]:
    """Values that a node takes, those that its subgraphs capture included."""
    yield from node.input
    for attribute in node.attribute:
        for subgraph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            for inner in subgraph.node:
                yield from _taken(inner)
