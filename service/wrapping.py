"""The graph around a graph: batch first, any lengths, states that go on from call to call.

The graph becomes the body of an ONNX Scan over time: an iteration gives it one step of every sequence in the layout
that it wants, and a state moves on only while its sequence has steps left, so that sequences of any lengths share a
run. One that has an input of lengths itself needs no Scan, and is given all steps at once. Constants become
initializers, and what it is to see of earlier input (the context of a chunk) one more state.
Source: the ONNX operators Scan, Where, Transpose, Reshape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from models.spec import LENGTHS
from service.errors import ModelBroken
from service.layouts import DTYPES, Lie, dtype_of, rank_of, shape_text, sizes_of
from service.modelfile import Description

if TYPE_CHECKING:
    import onnx

CONTEXT = "context."
"""Begins the name of the state that keeps an input's context."""
_INSIDE = "model/"
"""Begins the name of everything that was in the graph: around it, inputs and outputs have those names.

So that nothing is named twice, whatever names those are, a made-up name begins with what it is.
"""
_AROUND, _STEP = "around/", "a step/"
"""Begin names of what the graphs around it and of a step have of their own."""
_BATCH, _TIME = "batch", "time"
_BODY = "body"
"""Attribute of a Scan."""


class Wrapper:
    """Makes the graph around one graph."""

    def __init__(
        self,
        onnx: Any,
        graph: onnx.GraphProto,
        description: Description,
        takes: Mapping[str, onnx.ValueInfoProto],
        gives: Mapping[str, onnx.ValueInfoProto],
    ) -> None:
        """Prepare; takes and gives are the graph's inputs, without its weights, and outputs by name."""
        self._onnx = onnx
        self._graph = graph
        self._says = description
        self._takes = takes
        self._gives = gives

    def wrap(
        self,
        inputs: Mapping[str, Lie],
        outputs: Mapping[str, Lie],
        states: Mapping[str, Lie],
        into: onnx.GraphProto,
    ) -> None:
        """Make it in `into`, and change names in the graph itself. Raises ModelBroken for a constant that does not fit.

        Weights are put in last, to where they stay: protobuf copies a message that is put into another.
        """
        self._put_constants()
        _prefix(self._graph)
        if self._says.lengths:
            into.CopyFrom(self._native(inputs, outputs, states))
            inner = into
        else:
            into.CopyFrom(self._scan(inputs, outputs, states))
            [inner] = [each.g for each in into.node[-1].attribute if each.name == _BODY]
        inner.initializer.extend(self._graph.initializer)
        inner.sparse_initializer.extend(self._graph.sparse_initializer)

    def _native(
        self, inputs: Mapping[str, Lie], outputs: Mapping[str, Lie], states: Mapping[str, Lie]
    ) -> onnx.GraphProto:
        """Put a graph that takes lengths into batch-first layout."""
        says, part = self._says, Part(self._onnx, _AROUND)
        for name, layout in (*inputs.items(), *states.items()):
            part.to_model(name, _INSIDE + name, layout)
        lengths = self._takes[says.lengths]
        part.node("Cast", [LENGTHS], _INSIDE + says.lengths, to=lengths.type.tensor_type.elem_type)
        part.nodes.extend(self._graph.node)
        for name, layout in outputs.items():
            part.from_model(_INSIDE + name, says.answered(name), layout)
        for name, layout in states.items():
            part.from_model(_INSIDE + says.states[name].next, says.next_of(name), layout)
        return part.graph("adopted", self._values(inputs, outputs, states))

    def _scan(
        self, inputs: Mapping[str, Lie], outputs: Mapping[str, Lie], states: Mapping[str, Lie]
    ) -> onnx.GraphProto:
        """Run a graph once a step, over an axis of time that any batch can have."""
        onnx, says = self._onnx, self._says
        stepped = [name for name in inputs if says.inputs[name].per == "step"]
        finals = [name for name in outputs if says.outputs[name].per == "sequence"]
        contexts = [name for name in stepped if says.inputs[name].context]
        dtypes = {name: value.type.tensor_type.elem_type for name, value in {**self._takes, **self._gives}.items()}

        # ---- the body: one step of every sequence
        body = Part(onnx, _STEP)
        time, goes_on = f"{_STEP}time", f"{_STEP}goes on"
        body.node("Less", [time, LENGTHS], goes_on)
        kept: list[tuple[str, str, int, tuple[int, ...]]] = []  # (before, after, type, row) of what is carried along
        for name in (*inputs, *states):
            layout = inputs.get(name) or states[name]
            given = f"step/{name}" if name in stepped or name in states else name
            if name in contexts:
                given = self._in_context(body, name, layout, kept, dtypes[name])
            body.to_model(given, _INSIDE + name, layout, context=says.inputs[name].context if name in inputs else 0)
        body.nodes.extend(self._graph.node)
        results = []
        for name, layout in states.items():
            following = f"next/{name}"
            body.from_model(_INSIDE + says.states[name].next, following, layout)
            kept.append((f"step/{name}", following, dtypes[name], layout.row))
        for name, layout in outputs.items():
            made = f"made/{name}"
            body.from_model(_INSIDE + name, made, layout)
            if name in finals:
                kept.append((f"before/{name}", made, dtypes[name], layout.row))
            else:
                results.append((made, dtypes[name], layout.row))
        after = [(body.where(goes_on, new, old, row, kind), kind, row) for old, new, kind, row in kept]
        value = onnx.helper.make_tensor_value_info
        inner = body.graph(
            "step",
            (
                [value(old, kind, (_BATCH, *row)) for old, _, kind, row in kept]
                + [value(f"step/{name}", dtypes[name], (_BATCH, *inputs[name].row)) for name in stepped]
                + [value(time, onnx.TensorProto.INT32, ())],
                [value(name, kind, (_BATCH, *row)) for name, kind, row in (*after, *results)],
            ),
        )

        # ---- around it
        outer = Part(onnx, _AROUND)
        shape = outer.node("Shape", [stepped[0]], f"{_AROUND}shape")
        steps = outer.node("Gather", [shape, outer.weight("time axis", np.array(1))], f"{_AROUND}steps")
        steps = outer.node("Cast", [steps], f"{_AROUND}int32 steps", to=onnx.TensorProto.INT32)
        ends = [outer.weight(f"ends/{n}", np.array(n, dtype=np.int32)) for n in (0, 1)]
        times = outer.node("Range", [ends[0], steps, ends[1]], f"{_AROUND}times")
        finals_before = {f"before/{name}": self._blank(outer, shape, name, outputs[name]) for name in finals}
        before = [finals_before.get(old) or old.removeprefix("step/") for old, *_ in kept]
        names = {f"step/{name}": says.next_of(name) for name in states}
        names |= {f"step/{CONTEXT}{name}": f"{CONTEXT}{name}.next" for name in contexts}
        names |= {f"before/{name}": says.answered(name) for name in finals}
        answered = [says.answered(name) for name in outputs if name not in finals]
        outer.nodes.append(
            onnx.helper.make_node(
                "Scan",
                [*before, *stepped, times],
                [*(names[old] for old, *_ in kept), *answered],
                **{_BODY: inner},
                num_scan_inputs=len(stepped) + 1,
                scan_input_axes=[1] * len(stepped) + [0],
                **({"scan_output_axes": [1] * len(answered)} if answered else {}),
            )
        )
        return outer.graph("adopted", self._values(inputs, outputs, states))

    def _in_context(
        self, body: Part, name: str, layout: Lie, kept: list[tuple[str, str, int, tuple[int, ...]]], kind: int
    ) -> str:
        """Put what an input has had last in front of it. Returns the name of both."""
        context = self._says.inputs[name].context
        new = f"step/{name}"
        if layout.entries is None:
            new = body.reshape(new, (-1, 1, *layout.rest))
        both = body.node("Concat", [f"step/{CONTEXT}{name}", new], f"both/{name}", axis=1)
        bounds = [body.weight(f"{name}/{n}", np.array([n])) for n in (-context, 2**31 - 1, 1)]
        last = body.node("Slice", [both, *bounds], f"last/{name}")
        kept.append((f"step/{CONTEXT}{name}", last, kind, (context, *layout.rest)))
        return both

    def _blank(self, part: Part, shape: str, name: str, layout: Lie) -> str:
        """Zeros [batch, *row], which an output of whole sequences begins with."""
        dtype = DTYPES[self._gives[name].type.tensor_type.elem_type]
        batch = part.node(
            "Slice", [shape, *(part.weight(f"{name}/{n}", np.array([n])) for n in (0, 1))], f"batch/{name}"
        )
        row = part.weight(f"{name}/row", np.array(layout.row, dtype=np.int64))
        whole = part.node("Concat", [batch, row], f"shape/{name}", axis=0)
        return part.node("Expand", [part.weight(f"{name}/zero", np.zeros((), dtype)), whole], f"blank/{name}")

    def _put_constants(self) -> None:
        """Put constants among the graph's weights."""
        for name, given in self._says.constants.items():
            value = self._takes[name]
            sizes = sizes_of(value)
            array = _constant(name, given, dtype_of(value, f"constants.{name}"))
            if rank_of(value) is not None and (
                array.ndim != len(sizes) or any(a not in (None, b) for a, b in zip(sizes, array.shape, strict=True))
            ):
                if array.size != 1 or any(size not in (None, 1) for size in sizes):
                    raise ModelBroken(
                        f"constants.{name}: shape {list(array.shape)} does not fit the graph's {shape_text(value)}"
                    )
                array = array.reshape([1] * len(sizes))
            self._graph.initializer.append(self._onnx.numpy_helper.from_array(array, name))

    def _values(
        self, inputs: Mapping[str, Lie], outputs: Mapping[str, Lie], states: Mapping[str, Lie]
    ) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
        """Inputs and outputs of the finished graph."""
        says, value = self._says, self._onnx.helper.make_tensor_value_info
        int32 = self._onnx.TensorProto.INT32

        def kind(found: Any) -> int:
            return int(found.type.tensor_type.elem_type)

        def dims(per: str, layout: Lie) -> tuple[str | int, ...]:
            return (_BATCH, *([_TIME] if per == "step" else []), *layout.row)

        takes = [value(n, kind(self._takes[n]), dims(says.inputs[n].per, each)) for n, each in inputs.items()]
        takes.append(value(LENGTHS, int32, (_BATCH,)))
        gives = [
            value(says.answered(n), kind(self._gives[n]), dims(says.outputs[n].per, each))
            for n, each in outputs.items()
        ]
        for name, layout in states.items():
            takes.append(value(name, kind(self._takes[name]), (_BATCH, *layout.row)))
            gives.append(value(says.next_of(name), kind(self._takes[name]), (_BATCH, *layout.row)))
        for name, entry in says.inputs.items():
            if entry.context:
                row = (_BATCH, entry.context, *inputs[name].rest)
                takes.append(value(f"{CONTEXT}{name}", kind(self._takes[name]), row))
                gives.append(value(f"{CONTEXT}{name}.next", kind(self._takes[name]), row))
        return takes, gives


class Part:
    """A graph under construction."""

    def __init__(self, onnx: Any, prefix: str) -> None:
        """Prepare; names of its constants begin with the prefix."""
        self._onnx = onnx
        self._prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, onnx.TensorProto] = {}

    def node(self, operator: str, takes: Sequence[str], gives: str, **attributes: Any) -> str:
        """Add a node; returns the name of what it gives."""
        self.nodes.append(self._onnx.helper.make_node(operator, list(takes), [gives], **attributes))
        return gives

    def weight(self, name: str, values: np.ndarray[Any, Any]) -> str:
        """Add a constant; returns its name."""
        name = f"{self._prefix}weight/{name}"
        self._weights[name] = self._onnx.numpy_helper.from_array(values, name)
        return name

    def reshape(self, name: str, shape: Sequence[int], gives: str = "") -> str:
        """Reshape; returns the name of the result."""
        gives = gives or f"{'x'.join(map(str, shape))}/{name}"
        return self.node("Reshape", [name, self.weight(f"shape/{gives}", np.array(shape, dtype=np.int64))], gives)

    def where(self, holds: str, new: str, old: str, row: Sequence[int], kind: int) -> str:
        """Take rows of `new` where `holds` [batch] is true, and of `old` elsewhere."""
        wide, kept = self.reshape(holds, (-1, *[1] * len(row)), f"wide/{new}"), f"kept/{new}"
        types = self._onnx.TensorProto
        if kind != types.BOOL:
            return self.node("Where", [wide, new, old], kept)
        # onnxruntime has no Where of truth values.
        new, old = (self.node("Cast", [each], f"int32/{each}", to=types.INT32) for each in (new, old))
        return self.node("Cast", [self.node("Where", [wide, new, old], f"int32/{kept}")], kept, to=types.BOOL)

    def to_model(self, name: str, gives: str, layout: Lie, *, context: int = 0) -> None:
        """From [batch, *row], or [batch, time, *row] where a call has all steps, to what the graph takes."""
        has_batch, has_time = layout.batch != "none", layout.time != "none"
        entries = (layout.entries or 1) + context
        if has_time and not layout.in_one_call and not has_batch:
            name = self.reshape(name, (entries, *layout.rest), f"alone/{gives}")
        elif has_time and not layout.in_one_call and layout.entries is None and not context:
            name = self.reshape(name, (-1, 1, *layout.rest), f"one/{gives}")
        elif not has_batch:
            name = self.reshape(
                name, ((-1,) if layout.in_one_call and has_time else ()) + layout.rest, f"alone/{gives}"
            )
        self.node("Transpose", [name], gives, perm=layout.permutation)

    def from_model(self, name: str, gives: str, layout: Lie) -> None:
        """The inverse of to_model."""
        perm = layout.permutation
        inverse = [perm.index(axis) for axis in range(len(perm))]
        canonical = self.node("Transpose", [name], f"canonical/{gives}", perm=inverse)
        has_time = layout.time != "none" and layout.in_one_call
        batch = 1 if layout.batch == "none" else 0  # 0: as many as there are, so that another size of a row is a fault
        self.reshape(canonical, (batch, *([-1] if has_time else []), *layout.row), gives)

    def graph(self, name: str, values: tuple[Sequence[Any], Sequence[Any]]) -> onnx.GraphProto:
        """Finish it."""
        made: onnx.GraphProto = self._onnx.helper.make_graph(self.nodes, name, *values, list(self._weights.values()))
        return made


def _constant(name: str, given: Any, dtype: str) -> np.ndarray[Any, Any]:
    """Make an input's constant value. Raises ModelBroken where its type can't hold it."""
    array = np.array(given)
    with np.errstate(invalid="ignore"):
        fitting = array.astype(dtype)
    if not dtype.startswith("float") and not np.array_equal(fitting, array):
        raise ModelBroken(f"constants.{name}: {given} is not of the input's type, {dtype}")
    return fitting


def _prefix(graph: onnx.GraphProto) -> None:
    """Put _INSIDE before every name of a graph, and of those within it: inner ones may use the outer's values."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = _INSIDE + value.name
    for weight in graph.initializer:
        weight.name = _INSIDE + weight.name
    for sparse in graph.sparse_initializer:
        sparse.values.name = _INSIDE + sparse.values.name
    for node in graph.node:
        node.name = _INSIDE + node.name if node.name else ""  # which may be empty, but not twice the same
        for names in (node.input, node.output):
            names[:] = [_INSIDE + name if name else "" for name in names]  # empty: one that is left out
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                _prefix(inner)
