"""A recurrent operator as an ONNX Scan whose recurrent products are of 8-bit integers, with a scale that is fixed.

A cell whose state is bounded by 1, as an LSTM's, a GRU's and a tanh RNN's is, needs no calibration: its state is stored
in steps of 1/127 whatever the data are. Integer sums are exact, so no row of a batch can change another. What is
done to a state elementwise stays float32. Source of the formulas: ONNX operators LSTM, GRU and RNN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]

MICROSOFT = "com.microsoft"
"""Domain of onnxruntime's own operators."""
PRODUCT_BITS = 7
"""Of a weight that is multiplied as an integer. With 8, CPUs without VNNI would saturate the sum of two products
(255 * 127 * 2 is past int16), so that the same file would answer otherwise elsewhere."""
STATE_SCALE = np.float32(1 / 127)
STATE_ZERO = np.uint8(128)
Activation = tuple[str, dict[str, float]]
"""An operator and its attributes."""
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}

_BOUNDED = ("Tanh", "Sigmoid", "HardSigmoid", "Softsign")
_SHARES = ("Sigmoid", "HardSigmoid")
"""Activations from 0 to 1: a GRU's new state lies between its candidate and its old one."""
_DEFAULTS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}


def attributes(node: NodeProto) -> dict[str, Any]:
    """Read a node's attributes; text comes as str."""

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return value.decode()
        return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value

    return {each.name: plain(helper.get_attribute_value(each)) for each in node.attribute}


def why_unbounded(node: NodeProto) -> str:
    """Say why a recurrent operator's state may leave [-1, 1]; empty where it cannot."""
    given = attributes(node)
    if strange := sorted({"clip", "input_forget", "layout"} & {name for name, value in given.items() if value}):
        return f"its operator has {', '.join(strange)}"
    if len(node.input) > 7 and node.input[7]:
        return "it has peepholes"
    if len(node.input) < 6 or not all(node.input[5 : 6 + (node.op_type == "LSTM")]):
        return "it takes no initial state"
    if not node.input[4]:
        return "it takes no lengths"
    size = len(_DEFAULTS[node.op_type])
    names = given.get("activations") or _DEFAULTS[node.op_type]
    for start in range(0, len(names), size):
        gate, *others = names[start : start + size]
        bounded = (*others, gate) if node.op_type != "GRU" else tuple(others)
        if wrong := [name for name in bounded if name not in _BOUNDED]:
            return f"its states have no bound: activation {wrong[0]}"
        if node.op_type == "GRU" and gate not in _SHARES:
            return f"its states have no bound: recurrent activation {gate}"
    return ""


def quantized(weights: Array, axis: int | tuple[int, ...], bits: int) -> tuple[Array, Array]:
    """Round weights to signed integers of so many bits, with a scale for each channel.

    axis  what a channel's weights lie along
    Returns (integers int8, scales float32 with that axis kept as 1): weights are about integers * scales.
    """
    most = 2 ** (bits - 1) - 1
    scale = (np.abs(weights).max(axis=axis, keepdims=True) / most).astype(np.float32)
    scale[scale == 0] = 1.0
    return np.clip(np.rint(weights / scale), -most, most).astype(np.int8), scale


@dataclass(slots=True)
class Builder:
    """Nodes and constants that are added to a graph, each under a name of its own."""

    prefix: str
    nodes: list[NodeProto]
    constants: dict[str, Array]

    def add(self, operator: str, inputs: Sequence[str], output: str = "", domain: str = "", **given: Any) -> str:
        """Add a node of one output; returns the output's name."""
        name = output or f"{self.prefix}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name, domain=domain, **given))
        return name

    def activate(self, activation: Activation, value: str) -> str:
        """Add an activation."""
        operator, given = activation
        return self.add(operator, [value], "", "", **given)

    def split(self, value: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Add a Split; returns the names of the parts."""
        names = [f"{self.prefix}.{len(self.nodes)}.{number}" for number in range(len(sizes))]
        at = self.constant("x".join(map(str, sizes)), np.array(sizes, np.int64))
        self.nodes.append(helper.make_node("Split", [value, at], names, names[0], axis=axis))
        return names

    def constant(self, name: str, value: Array | np.generic) -> str:
        """Add a constant; returns its name in the graph."""
        full = f"{self.prefix}.{name}"
        self.constants[full] = np.asarray(value)
        return full

    def product(self, values: str, weights: Array, bias: Array | None, name: str, output: str = "") -> str:
        """Multiply values from -1 to 1, [..., n], with weights [n, m] as integers; returns [..., m] float32."""
        integers, scales = quantized(weights, 0, PRODUCT_BITS)
        scale, zero = self.constant("scale", STATE_SCALE), self.constant("zero", STATE_ZERO)
        rounded = self.add("QuantizeLinear", [values, scale, zero])
        inputs = [rounded, self.constant(name, integers), scale, self.constant(f"{name}.scale", scales[0]), zero]
        if bias is not None:
            inputs += ["", self.constant(f"{name}.bias", bias)]
        return self.add("MatMulIntegerToFloat", inputs, output, domain=MICROSOFT)

    def product_outside(self, values: str, weights: Array, bias: Array | None, name: str, output: str = "") -> str:
        """`product`, of states whose step or input was not a number: so is the result, which no integer tells.

        A NaN in an input is in every unit of the states after it, so one unit tells of it.
        """
        first = self.add("Gather", [values, self.constant("first", np.array([0], np.int64))], axis=-1)
        nan = self.add("Mul", [first, self.constant("nothing", np.float32(0))])
        return self.add("Add", [self.product(values, weights, bias, name), nan], output)


def in_steps(node: NodeProto, weights: Sequence[Array], live: str, *, bounded_input: bool) -> Builder:
    """Build what takes the place of a recurrent operator.

    weights        W [directions, gates * hidden, inputs], R [directions, gates * hidden, hidden] and
                   B [directions, 2 * gates * hidden]
    live           value [time, batch, 1] bool: which steps are not padding
    bounded_input  whether the operator's X lies in [-1, 1], so that its product can be of integers too
    Returns nodes that give the operator's outputs under their names. Rows of Y past a row's length repeat its last.
    """
    builder = Builder(node.name, [], {})
    outputs = dict(zip(("y", "h", "c"), node.output, strict=False))
    kinds = [kind for kind in ("h", "c") if kind == "h" or node.op_type == "LSTM"]
    parts: dict[str, list[str]] = {kind: [] for kind in ("y", *kinds)}
    for direction in range(len(weights[0])):
        is_reverse = direction == 1 or attributes(node).get("direction") == "reverse"
        own = [each[direction] for each in weights]
        ends = _scan(builder, node, own, direction, live, is_reverse=is_reverse, bounded_input=bounded_input)
        for kind, value in zip(parts, ends, strict=True):
            parts[kind].append(value)
    for kind, axis in (("y", 1), *((kind, 0) for kind in kinds)):
        if outputs.get(kind):
            at = builder.constant(f"axis{axis}", np.array([axis], np.int64))
            whole = [builder.add("Unsqueeze", [value, at]) for value in parts[kind][:-1]]
            last = parts[kind][-1]
            if whole:
                builder.add("Concat", [*whole, builder.add("Unsqueeze", [last, at])], outputs[kind], axis=axis)
            else:
                builder.add("Unsqueeze", [last, at], outputs[kind])
    return builder


def _scan(
    outer: Builder,
    node: NodeProto,
    weights: Sequence[Array],
    direction: int,
    live: str,
    *,
    is_reverse: bool,
    bounded_input: bool,
) -> list[str]:
    """Build one direction; returns the names of Y [time, batch, hidden] and of the last states [batch, hidden]."""
    w, r, b = weights
    hidden, cell = r.shape[1], node.op_type
    bias_w, bias_r = np.split(b, 2)
    name = f"w{direction}"
    # Only a GRU's reset gate comes between the two biases, and only its candidate's.
    bias, inner_bias = (bias_w, bias_r) if cell == "GRU" else (bias_w + bias_r, None)
    if bounded_input:
        projected = outer.product_outside(node.input[0], w.T, bias, name)
    else:
        matrix = outer.constant(name, np.ascontiguousarray(w.T))
        product = outer.add("MatMul", [node.input[0], matrix], f"{outer.prefix}.input{direction}")
        projected = outer.add("Add", [product, outer.constant(f"{name}.bias", bias)])
    number = outer.constant(f"direction{direction}", np.int64(direction))
    kinds = ["h", "c"] if cell == "LSTM" else ["h"]
    first = [outer.add("Gather", [state, number], axis=0) for state in node.input[5 : 5 + len(kinds)]]

    inner = Builder(f"{outer.prefix}.step{direction}", [], outer.constants)
    x, is_live, *states = (f"{inner.prefix}.{each}" for each in ("x", "live", *kinds))
    build = _gru_reset_before if cell == "GRU" and not attributes(node).get("linear_before_reset") else _CELLS[cell]
    following = build(inner, _activations(node, direction), x, states, r, inner_bias)
    nexts = [inner.add("Where", [is_live, new, old]) for new, old in zip(following, states, strict=True)]
    shown = inner.add("Identity", [nexts[0]])

    def value(name: str, width: int, kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, ["batch", width])

    body: GraphProto = helper.make_graph(
        inner.nodes,
        inner.prefix,
        [*(value(state, hidden) for state in states), value(x, len(w)), value(is_live, 1, TensorProto.BOOL)],
        [*(value(each, hidden) for each in nexts), value(shown, hidden)],
    )
    ends = [f"{outer.prefix}.{each}{direction}" for each in (*kinds, "y")]
    outer.nodes.append(
        helper.make_node(
            "Scan",
            [*first, projected, live],
            ends,
            f"{outer.prefix}.scan{direction}",
            body=body,
            num_scan_inputs=2,
            scan_input_directions=[int(is_reverse)] * 2,
            scan_output_directions=[int(is_reverse)],
        )
    )
    return [ends[-1], *ends[:-1]]


def _activations(node: NodeProto, direction: int) -> list[Activation]:
    """Name the operators of one direction's activations, with their attributes."""
    given = attributes(node)
    size = len(_DEFAULTS[node.op_type])
    names = given.get("activations") or _DEFAULTS[node.op_type]
    # Parameters are listed for those activations alone that take them.
    alphas, betas = (iter(given.get(f"activation_{each}") or ()) for each in ("alpha", "beta"))
    found: list[Activation] = []
    for name in names:
        takes = name == "HardSigmoid"
        found.append((name, {"alpha": next(alphas, 0.2), "beta": next(betas, 0.5)} if takes else {}))
    start = direction * size if len(names) > size else 0
    return found[start : start + size]


def _lstm(
    step: Builder, activations: list[Activation], x: str, states: list[str], r: Array, bias: Array | None
) -> tuple[str, ...]:
    """i, o, f = gates(x + h R); c' = f c + i g(x + h R); h' = o h(c')."""
    gate, candidate, answer = activations
    h, c = states
    hidden = r.shape[1]
    sums = step.add("Add", [step.product(h, r.T, bias, "r"), x])
    of_gates, of_cell = step.split(sums, [3 * hidden, hidden], 1)
    i, o, f = step.split(step.activate(gate, of_gates), [hidden] * 3, 1)
    new = step.add("Mul", [i, step.activate(candidate, of_cell)])
    cell = step.add("Add", [step.add("Mul", [f, c]), new])
    return step.add("Mul", [o, step.activate(answer, cell)]), cell


def _gru(
    step: Builder, activations: list[Activation], x: str, states: list[str], r: Array, bias: Array | None
) -> tuple[str, ...]:
    """z, r = gates(x + h R); n = g(x + r (h R)); h' = n + z (h - n): the reset gate after the product."""
    gate, candidate = activations
    [h] = states
    hidden = r.shape[1]
    product = step.product(h, r.T, bias, "r")
    of_gates, of_new = step.split(product, [2 * hidden, hidden], 1)
    x_gates, x_new = step.split(x, [2 * hidden, hidden], 1)
    z, reset = step.split(step.activate(gate, step.add("Add", [of_gates, x_gates])), [hidden] * 2, 1)
    sums = step.add("Add", [step.add("Mul", [reset, of_new]), x_new])
    new = step.activate(candidate, sums)
    return (step.add("Add", [new, step.add("Mul", [z, step.add("Sub", [h, new])])]),)


def _gru_reset_before(
    step: Builder, activations: list[Activation], x: str, states: list[str], r: Array, bias: Array | None
) -> tuple[str, ...]:
    """z, r = gates(x + h R); n = g(x + (r h) R); h' = n + z (h - n): the reset gate before the product."""
    gate, candidate = activations
    [h] = states
    hidden = r.shape[1]
    of_gates, of_new = r[: 2 * hidden], r[2 * hidden :]
    x_gates, x_new = step.split(x, [2 * hidden, hidden], 1)
    bias_gates, bias_new = (None, None) if bias is None else (bias[: 2 * hidden], bias[2 * hidden :])
    sums = step.add("Add", [step.product(h, of_gates.T, bias_gates, "r"), x_gates])
    z, reset = step.split(step.activate(gate, sums), [hidden] * 2, 1)
    product = step.product(step.add("Mul", [reset, h]), of_new.T, bias_new, "r.new")
    new = step.activate(candidate, step.add("Add", [product, x_new]))
    return (step.add("Add", [new, step.add("Mul", [z, step.add("Sub", [h, new])])]),)


def _rnn(
    step: Builder, activations: list[Activation], x: str, states: list[str], r: Array, bias: Array | None
) -> tuple[str, ...]:
    """Of h: f(x + h R); a NaN in it is carried on, which an integer cannot."""
    [activation] = activations
    [h] = states
    sums = step.add("Add", [step.product(h, r.T, bias, "r"), x])
    nan = step.add("Mul", [h, step.constant("nothing", np.float32(0))])
    return (step.activate(activation, step.add("Add", [sums, nan])),)


_CELLS = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}


def as_initializers(constants: dict[str, Array]) -> list[TensorProto]:
    """Make the tensors of a graph."""
    return [numpy_helper.from_array(array, name) for name, array in constants.items()]
