"""Recurrent layers from their formulas, in numpy and float64: what torch, onnxruntime and the server are held to.

Batch-first throughout. A row is run step by step up to its own length, so ragged batches need no trick. Weights are
laid out as torch's: gates stacked along the rows of w_ih [gates * hidden, inputs], w_hh [gates * hidden, hidden], b_ih
and b_hh [gates * hidden]; RNN has one, GRU r z n, LSTM i f g o.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Weights:
    """One direction of one layer."""

    w_ih: Array
    w_hh: Array
    b_ih: Array
    b_hh: Array

    @classmethod
    def random(cls, rng: np.random.Generator, cell: str, inputs: int, hidden: int) -> Weights:
        rows = {"rnn": 1, "gru": 3, "lstm": 4}[cell] * hidden
        shapes = ((rows, inputs), (rows, hidden), (rows,), (rows,))
        return cls(*(rng.uniform(-0.5, 0.5, shape).astype(np.float32) for shape in shapes))


def sigmoid(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def rnn_step(x: Array, states: Sequence[Array], w: Weights, activation: str = "tanh") -> tuple[Array, ...]:
    """h' = f(W x + b + R h + d)."""
    a = w.w_ih @ x + w.b_ih + w.w_hh @ states[0] + w.b_hh
    return (np.tanh(a) if activation == "tanh" else np.maximum(a, 0.0),)


def gru_step(x: Array, states: Sequence[Array], w: Weights, activation: str = "tanh") -> tuple[Array, ...]:
    """n = tanh(W x + b + r * (R h + d)), h' = (1 - z) * n + z * h: the reset gate after the product."""
    [h] = states
    from_x = np.split(w.w_ih @ x + w.b_ih, 3)
    from_h = np.split(w.w_hh @ h + w.b_hh, 3)
    r, z = (sigmoid(from_x[gate] + from_h[gate]) for gate in (0, 1))
    n = np.tanh(from_x[2] + r * from_h[2])
    return ((1.0 - z) * n + z * h,)


def lstm_step(x: Array, states: Sequence[Array], w: Weights, activation: str = "tanh") -> tuple[Array, ...]:
    """c' = f * c + i * g, h' = o * tanh(c')."""
    h, c = states
    i, f, g, o = np.split(w.w_ih @ x + w.b_ih + w.w_hh @ h + w.b_hh, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


STEPS: dict[str, Callable[..., tuple[Array, ...]]] = {"rnn": rnn_step, "gru": gru_step, "lstm": lstm_step}
NUM_STATES = {"rnn": 1, "gru": 1, "lstm": 2}


def run_layer(
    cell: str,
    x: Array,
    lengths: Array,
    directions: Sequence[Weights],
    states: Sequence[Array],
    activation: str = "tanh",
) -> tuple[Array, tuple[Array, ...]]:
    """Run one layer; the second of two directions reads each row from its own last step to its first.

    x        [batch, time, inputs]
    lengths  [batch], from 1 to time
    states   h, and c of an lstm, each [batch, directions, hidden]
    Returns (y [batch, time, directions * hidden], zeros past a row's length; states after the last step read).
    """
    hidden = directions[0].w_hh.shape[1]
    y = np.zeros((*x.shape[:2], len(directions) * hidden))
    last = tuple(np.array(state, dtype=np.float64) for state in states)
    for row, length in enumerate(np.asarray(lengths).tolist()):
        for number, weights in enumerate(directions):
            now = tuple(state[row, number] for state in last)
            for step in range(length) if number == 0 else reversed(range(length)):
                now = STEPS[cell](x[row, step].astype(np.float64), now, weights, activation)
                y[row, step, number * hidden : (number + 1) * hidden] = now[0]
            for state, value in zip(last, now, strict=True):
                state[row, number] = value
    return y, last


def run_layers(
    cell: str,
    x: Array,
    lengths: Array,
    layers: Sequence[Sequence[Weights]],
    states: Sequence[Array],
    activation: str = "tanh",
) -> tuple[Array, tuple[Array, ...]]:
    """Run layers one on the other; states are those of the first layer, then of the second, and so on."""
    num = NUM_STATES[cell]
    last: tuple[Array, ...] = ()
    for number, directions in enumerate(layers):
        x, after = run_layer(cell, x, lengths, directions, states[number * num : (number + 1) * num], activation)
        last += after
    return x, last
