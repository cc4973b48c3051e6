"""A recurrent layer as an ONNX Scan over its steps: for activations that ONNX's RNN, LSTM and GRU do not have.

A Scan has a graph within it, which torch.onnx cannot be told to put down. So a layer puts down one node of a domain of
its own that says what it is, and `expand` replaces each by a Scan whose body is models.cells.step, traced: eager torch
and the file run the same formula. Weights stay outside of the body, as constants of the graph.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from models.cells import CellKind, Recurrence, step
from models.options import Activation
from models.spec import Cell
from models.tracing import strip, trace

_DOMAIN, _NAME = "rnnserve", "Steps"
_TRACED_ROWS = 3


def scanned(
    kind: CellKind,
    from_x: Tensor,
    is_within: Tensor,
    states: tuple[Tensor, ...],
    recurrence: Recurrence,
    *,
    backwards: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Put down the node that `expand` replaces, for one direction of a layer.

    from_x     [time, batch, gates * hidden], what the inputs bring to the gates
    is_within  [time, batch, 1] bool, which steps are not padding
    states     each [batch, hidden]
    Returns (y [time, batch, hidden], next states).
    """
    time, batch, _ = from_x.shape
    hidden = states[0].shape[1]
    attrs = {
        "cell": kind.cell,
        "activation": kind.activation,
        "recurrent_activation": kind.recurrent_activation,
        "reset_after": int(kind.reset_after),
        "backwards": int(backwards),
        "has_bias": int(recurrence.bias is not None),
        "hidden": hidden,
    }
    weights = (recurrence.kernel,) if recurrence.bias is None else (recurrence.kernel, recurrence.bias)
    y, *last = torch.onnx.ops.symbolic_multi_out(
        f"{_DOMAIN}::{_NAME}",
        (*states, from_x, is_within, *weights),
        attrs=cast("dict[str, Any]", attrs),
        dtypes=(from_x.dtype,) * (1 + len(states)),
        shapes=((time, batch, hidden), *((batch, hidden),) * len(states)),
        version=1,
    )
    return y, tuple(last)


def expand(model: onnx.ModelProto) -> None:
    """Replace every node that `scanned` put down by a Scan, in place."""
    kept = [opset for opset in model.opset_import if opset.domain != _DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    nodes = list(model.graph.node)
    number = 0
    for at, node in enumerate(nodes):
        if node.domain == _DOMAIN:
            nodes[at] = _scan(node, f"scan.{number}")
            number += 1
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _scan(node: onnx.NodeProto, name: str) -> onnx.NodeProto:
    attrs = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    kind = CellKind(
        cast("Cell", attrs["cell"].decode()),
        cast("Activation", attrs["activation"].decode()),
        cast("Activation", attrs["recurrent_activation"].decode()),
        bool(attrs["reset_after"]),
    )
    num_states = 2 if kind.cell == "lstm" else 1
    num_inputs = num_states + 2
    outside = dict(zip(("kernel", "bias"), node.input[num_inputs:], strict=False))
    body = _body(kind, attrs["hidden"], bool(attrs["has_bias"]))
    graph = onnx.GraphProto()
    graph.CopyFrom(body)
    graph.name = f"{name}.body"
    _rename(graph, outside, prefix=f"{name}.")
    way = attrs["backwards"]
    return helper.make_node(
        "Scan",
        node.input[:num_inputs],
        [*node.output[1:], node.output[0]],
        name=name,
        body=graph,
        num_scan_inputs=2,
        scan_input_directions=[way, way],
        scan_output_directions=[way],
    )


class _Step(nn.Module):
    """A step of a cell that lets rows stand still."""

    def __init__(self, kind: CellKind, has_bias: bool) -> None:
        super().__init__()
        self.kind, self.has_bias = kind, has_bias

    def forward(self, from_x: Tensor, is_within: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Advance; rest is the states, the recurrent kernel and, if there is one, the bias."""
        num_weights = 1 + self.has_bias
        states, (kernel, *bias) = rest[:-num_weights], rest[-num_weights:]
        following = step(self.kind, from_x, states, Recurrence(kernel, bias[0] if bias else None))
        return tuple(torch.where(is_within, new, old) for new, old in zip(following, states, strict=True))


@functools.cache
def _body(kind: CellKind, hidden: int, has_bias: bool) -> onnx.GraphProto:
    """Trace a step: a Scan's body, with "kernel" and "bias" from outside of it."""
    gates = {"rnn": 1, "gru": 3, "lstm": 4}[kind.cell] * hidden
    states = ["h", "c"] if kind.cell == "lstm" else ["h"]
    shapes = {
        "from_x": (_TRACED_ROWS, gates),
        "is_within": (_TRACED_ROWS, 1),
        **dict.fromkeys(states, (_TRACED_ROWS, hidden)),
        "kernel": (hidden, gates),
        **({"bias": (gates,)} if has_bias else {}),
    }
    arguments = [torch.zeros(shape) for shape in shapes.values()]
    arguments[1] = arguments[1].bool()
    batch = torch.export.Dim("batch")
    axes: list[dict[int, Any]] = [{} if name in ("kernel", "bias") else {0: batch} for name in shapes]
    graph = trace(
        _Step(kind, has_bias).eval(),
        arguments,
        axes=(axes[0], axes[1], tuple(axes[2:])),
        input_names=list(shapes),
        output_names=[f"{name}.next" for name in states],
    ).graph
    strip(graph)
    inputs = {each.name: each for each in graph.input}
    del graph.input[:]
    graph.input.extend(inputs[name] for name in (*states, "from_x", "is_within"))
    # A Scan stacks what it gives for every step beside what it carries on: under another name.
    graph.node.append(helper.make_node("Identity", ["h.next"], ["y"]))
    y = onnx.ValueInfoProto()
    y.CopyFrom(graph.output[0])
    y.name = "y"
    graph.output.append(y)
    return graph


def _rename(graph: onnx.GraphProto, outside: dict[str, str], *, prefix: str) -> None:
    """Give every value in a body a name of its own in the model, and those from outside the names they have there."""

    def renamed(name: str) -> str:
        return outside.get(name) or (prefix + name if name else "")

    for value in (*graph.input, *graph.output):
        value.name = renamed(value.name)
    for constant in graph.initializer:
        constant.name = renamed(constant.name)
    for number, node in enumerate(graph.node):
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
        node.name = f"{prefix}{node.op_type}.{number}"
