"""Every option of a recurrent layer, computed four ways with the same weights: Keras, numpy, eager torch, ONNX.

Rows are ragged and begin with states of their own. Keras and numpy are asked row by row, ours all rows at once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import keras
import numpy as np
import torch
from torch import nn

from models.activations import NATIVE
from models.graphs import GraphModule, draw_like, to_onnx
from models.layers import STATES, Recurrent
from models.options import PRESETS, Activation, LayerOptions
from models.runtime import Runtime
from models.spec import LENGTHS, Cell, GraphSpec, Layout, StateSpec, TensorSpec
from tests import formulas
from tests.oracles import Array, Weights

CELLS: tuple[Cell, ...] = get_args(Cell)
TOLERANCE = 1e-5
INPUTS, HIDDEN, STEPS = 3, 5, 6
LENGTHS_OF_ROWS = (STEPS, 1, 4)
_GATES = {"rnn": (0,), "gru": (1, 0, 2), "lstm": (0, 1, 2, 3)}
"""Torch's gates in Keras' order: GRU r z n to z r h; the LSTM's is the same."""


@dataclass(frozen=True)
class Case:
    """One cell with some options."""

    cell: Cell
    settings: dict[str, Any] = field(default_factory=dict)
    bidirectional: bool = False
    layers: int = 1
    has_state: bool = True

    @property
    def options(self) -> LayerOptions:
        return LayerOptions(**self.settings)

    def __str__(self) -> str:
        said = [f"{name}={value}" for name, value in self.settings.items()]
        shape = ["bidirectional"] * self.bidirectional + [f"{self.layers} layers"] * (self.layers > 1)
        return "-".join([self.cell, *said, *shape, *["zero states"] * (not self.has_state)])


@dataclass(frozen=True)
class Measured:
    """Largest differences, absolute where values are below 1 and relative above."""

    form: str
    eager_keras: float
    eager_numpy: float
    onnx_keras: float
    onnx_numpy: float

    @property
    def worst(self) -> float:
        return max(self.eager_keras, self.eager_numpy, self.onnx_keras, self.onnx_numpy)


class Layers(nn.Module):
    """Recurrent layers and nothing else, as a graph: batch first."""

    def __init__(self, layers: list[Recurrent]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, lengths, *states):
        y, following, each = x.transpose(0, 1), (), len(states) // len(self.layers)
        for number, layer in enumerate(self.layers):
            y, last = layer(y, lengths, states[number * each : (number + 1) * each])
            following += last
        return y.transpose(0, 1), *following


def measure(case: Case) -> Measured:
    """Compute a case all ways and compare."""
    rng = np.random.default_rng(11)
    weights = _draw_weights(case, rng)
    num_states = case.layers * len(STATES[case.cell])
    x = rng.normal(size=(len(LENGTHS_OF_ROWS), STEPS, INPUTS)).astype(np.float32)
    shape = (len(LENGTHS_OF_ROWS), len(weights[0]), HIDDEN)
    states = [rng.uniform(-1, 1, shape).astype(np.float32) * case.has_state for _ in range(num_states)]
    eager, exported, form = _ours(case, weights, x, states)
    ours = {"eager": eager, "onnx": exported}
    oracles = {
        "keras": _rows(_keras_layers(case, weights), x, states),
        "numpy": _rows(_formulas(case, weights), x, states),
    }
    gaps = {f"{a}_{b}": _gap(ours[a], oracles[b]) for a in ours for b in oracles}
    return Measured(form, **gaps)


def _draw_weights(case: Case, rng: np.random.Generator) -> list[list[Weights]]:
    layers, inputs = [], INPUTS
    for _ in range(case.layers):
        directions = [Weights.random(rng, case.cell, inputs, HIDDEN) for _ in range(1 + case.bidirectional)]
        if not (case.cell == "gru" and case.options.reset_after):  # elsewhere Keras has one bias
            directions = [Weights(w.w_ih, w.w_hh, w.b_ih, np.zeros_like(w.b_hh)) for w in directions]
        # Exponentials of exponentials soon leave float32, and gates without a lower bound soon use up its digits.
        if {"exponential", "log_softmax"} & set(case.settings.values()):
            directions = [Weights(*(0.1 * each for each in (w.w_ih, w.w_hh, w.b_ih, w.b_hh))) for w in directions]
        layers.append(directions)
        inputs = HIDDEN * (2 if case.bidirectional and case.options.merge_mode == "concat" else 1)
    return layers


def _ours(
    case: Case, weights: list[list[Weights]], x: Array, states: list[Array]
) -> tuple[list[Array], list[Array], str]:
    made = []
    for directions in weights:
        layer = Recurrent(
            case.cell, directions[0].w_ih.shape[1], HIDDEN, bidirectional=case.bidirectional, options=case.options
        )
        for suffix, w in zip(("", "_reverse"), directions, strict=False):
            given = {"weight_ih": w.w_ih, "weight_hh": w.w_hh}
            if case.options.use_bias:
                given |= {"bias_ih": w.b_ih, "bias_hh": w.b_hh}
            for name, value in given.items():
                getattr(layer.rnn, f"{name}_l0{suffix}").data.copy_(torch.from_numpy(value))
        made.append(layer)
    module = Layers(made).eval()
    kinds = [f"{number}.{kind}" for number in range(case.layers) for kind in STATES[case.cell]]
    spec = GraphSpec(
        layers=tuple(layer.spec for layer in made),
        inputs=(TensorSpec(name="x", dtype="float32", row_shape=(INPUTS,), layout=Layout.PER_STEP),),
        outputs=(TensorSpec(name="y", dtype="float32", row_shape=(made[-1].width,), layout=Layout.PER_STEP),),
        states=tuple(
            StateSpec(name=f"state.{k}", next_name=f"state.{k}.next", row_shape=(made[0].directions, HIDDEN))
            for k in kinds
        ),
        fixed_steps=case.options.unroll or None,
    )
    ready = copy.deepcopy(module)
    for layer in ready.layers:
        layer.freeze()
    draw = draw_like(np.float64(0), np.float64(1))
    model, _ = to_onnx(GraphModule(module=module, ready=ready, spec=spec, draw=draw))
    lengths = np.array(LENGTHS_OF_ROWS, np.int32)
    feeds = dict(zip(spec.input_names, (x, lengths, *states), strict=True))
    assert feeds[LENGTHS] is lengths
    with torch.no_grad():
        eager = [each.numpy() for each in module(*map(torch.from_numpy, feeds.values()))]
    answers = Runtime(model.SerializeToString())(feeds)
    return eager, [answers[name] for name in spec.output_names], made[0].spec.form


def _rows(run: Any, x: Array, states: list[Array]) -> list[tuple[Array, list[Array]]]:
    """Ask an oracle row by row: run(row [time, inputs], states [directions, hidden]) -> (y, states)."""
    return [run(x[row, :length], [state[row] for state in states]) for row, length in enumerate(LENGTHS_OF_ROWS)]


def _formulas(case: Case, weights: list[list[Weights]]) -> Any:
    def run(row: Array, states: list[Array]) -> tuple[Array, list[Array]]:
        each, last = len(STATES[case.cell]), []
        for number, directions in enumerate(weights):
            given = states[number * each : (number + 1) * each]
            row, after = formulas.run_layer(case.cell, row, directions, given, case.options)
            last += after
        return row, last

    return run


def keras_layer(case: Case) -> Any:
    """Make Keras' layer of a case."""
    kind = {"rnn": keras.layers.SimpleRNN, "gru": keras.layers.GRU, "lstm": keras.layers.LSTM}[case.cell]
    options = {name: _keras_value(value) for name, value in case.settings.items() if name != "merge_mode"}
    if case.cell != "gru":
        options.pop("reset_after", None)
    if case.cell == "rnn":
        options.pop("recurrent_activation", None)
    options["unroll"] = bool(options.pop("unroll", 0))
    layer = kind(HIDDEN, return_sequences=True, return_state=True, **options)
    return keras.layers.Bidirectional(layer, merge_mode=case.options.merge_mode) if case.bidirectional else layer


def _keras_value(value: Any) -> Any:
    return (lambda x: keras.ops.clip(0.2 * x + 0.5, 0, 1)) if value == "hard_sigmoid_v2" else value


def _keras_layers(case: Case, weights: list[list[Weights]]) -> Any:
    made = []
    for directions in weights:
        layer = keras_layer(case)
        layer.build((None, None, directions[0].w_ih.shape[1]))
        arrays = []
        for w in directions:
            order = list(_GATES[case.cell])

            def columns(rows: Array, order: list[int] = order) -> Array:
                return rows.reshape(len(order), HIDDEN, *rows.shape[1:])[order].reshape(rows.shape).T

            arrays += [columns(w.w_ih), columns(w.w_hh)]
            if case.options.use_bias:
                both = case.cell == "gru" and case.options.reset_after
                arrays.append(np.stack([columns(w.b_ih), columns(w.b_hh)]) if both else columns(w.b_ih))
        layer.set_weights(arrays)
        made.append(layer)

    def run(row: Array, states: list[Array]) -> tuple[Array, list[Array]]:
        each, last, y = len(STATES[case.cell]), [], keras.ops.convert_to_tensor(row[None])
        for number, layer in enumerate(made):
            given = states[number * each : (number + 1) * each]
            first = [keras.ops.convert_to_tensor(s[d][None]) for d in range(1 + case.bidirectional) for s in given]
            y, *after = layer(y, initial_state=first)
            if case.options.go_backwards:  # Keras has the rows in the order in which they were read
                y = keras.ops.flip(y, axis=1)
            arrays = [keras.ops.convert_to_numpy(a)[0] for a in after]
            last += [np.stack(arrays[kind::each]) for kind in range(each)]
        return keras.ops.convert_to_numpy(y)[0], last

    return run


def _gap(ours: list[Array], oracle: list[tuple[Array, list[Array]]]) -> float:
    gaps = []
    for row, (y, states) in enumerate(oracle):
        pairs = [(ours[0][row, : len(y)], y), *zip((s[row] for s in ours[1:]), states, strict=True)]
        gaps += [float(np.max(np.abs(a - b) / np.maximum(1, np.abs(b)))) for a, b in pairs]
    return max(gaps) if np.isfinite(gaps).all() else np.inf


# The grid


def option_rows() -> Iterator[tuple[str, str, dict[str, Any], bool]]:
    """Every value of every option that changes answers: (option, value, settings, whether bidirectional)."""
    for name in ("activation", "recurrent_activation"):
        for value in get_args(Activation):
            yield name, value, {name: value}, False
    yield "use_bias", "False", {"use_bias": False}, False
    yield "reset_after", "True", {"reset_after": True}, False
    yield "reset_after", "False", {"reset_after": False}, False
    yield "go_backwards", "True", {"go_backwards": True}, False
    yield "unroll", "True", {"unroll": STEPS}, False
    for mode in ("concat", "sum", "mul", "ave"):
        yield "merge_mode", mode, {"merge_mode": mode}, True
    yield "preset", "keras2", dict(PRESETS["keras2"]), False


def cells_of(option: str) -> tuple[Cell, ...]:
    """Cells that have an option."""
    return {"recurrent_activation": ("lstm", "gru"), "preset": ("lstm", "gru"), "reset_after": ("gru",)}.get(
        option, CELLS
    )


def option_cases() -> list[Case]:
    """One case for every value of an option and every cell that has it."""
    return [
        Case(cell, settings, bidirectional=both)
        for option, _, settings, both in option_rows()
        for cell in cells_of(option)
    ]


def crossed_cases() -> list[Case]:
    """Options, directions, layers and states combined, over a few activations of each form."""
    cases: list[Case] = []
    for cell in CELLS:
        for activation in ("tanh", "softsign", "gelu"):
            for more in ({}, {"use_bias": False}, {"reset_after": False}, {"go_backwards": True}, {"unroll": STEPS}):
                if "reset_after" in more and cell != "gru":
                    continue
                is_backwards = "go_backwards" in more
                cases += [
                    Case(cell, {"activation": activation, **more}, both, layers, has_state=layers == 2)
                    for layers in (1, 2)
                    for both in (False, True)
                    if not (both and is_backwards)
                ]
    return cases


IS_NATIVE = frozenset(NATIVE)
