"""Recurrent layers with Keras' options from their formulas, in numpy and float64.

As tests/oracles.py, whose weights these are: batch first, and every row is run step by step over its own length.
Source: documentation of keras.activations, keras.layers.SimpleRNN, GRU, LSTM and Bidirectional 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from models.options import LayerOptions
from tests.oracles import Array, Weights, sigmoid, softmax


def _hard_sigmoid(x: Array) -> Array:
    return np.clip(x / 6 + 0.5, 0, 1)


def _softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


def _gelu(x: Array) -> Array:
    """x times the normal distribution's function; its series converges fast for the small x here."""
    term = total = x / np.sqrt(2 * np.pi)
    for n in range(1, 80):
        term = -term * x**2 / (2 * n)
        total = total + term / (2 * n + 1)
    return x * (0.5 + total)


def _elu(x: Array) -> Array:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": sigmoid,
    "linear": lambda x: x,
    "hard_sigmoid": _hard_sigmoid,
    "hard_sigmoid_v2": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "elu": _elu,
    "leaky_relu": lambda x: np.where(x > 0, x, 0.2 * x),
    "softplus": _softplus,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "relu6": lambda x: np.clip(x, 0, 6),
    "selu": lambda x: _SELU_SCALE * np.where(x > 0, x, _SELU_ALPHA * _elu(x)),
    "celu": _elu,
    "gelu": _gelu,
    "silu": lambda x: x * sigmoid(x),
    "swish": lambda x: x * sigmoid(x),
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "exponential": np.exp,
    "hard_tanh": lambda x: np.clip(x, -1, 1),
    "hard_silu": lambda x: x * _hard_sigmoid(x),
    "hard_swish": lambda x: x * _hard_sigmoid(x),
    "hard_shrink": lambda x: np.where(np.abs(x) > 0.5, x, 0),
    "soft_shrink": lambda x: np.sign(x) * np.maximum(np.abs(x) - 0.5, 0),
    "tanh_shrink": lambda x: x - np.tanh(x),
    "log_sigmoid": lambda x: -_softplus(-x),
    "sparse_plus": lambda x: np.where(x <= -1, 0, np.where(x < 1, (x + 1) ** 2 / 4, x)),
    "sparse_sigmoid": lambda x: np.clip((x + 1) / 2, 0, 1),
    "squareplus": lambda x: (x + np.sqrt(x**2 + 4)) / 2,
    "softmax": softmax,
    "log_softmax": lambda x: x - np.logaddexp.reduce(x, axis=-1, keepdims=True),
}


def step(cell: str, x: Array, states: Sequence[Array], w: Weights, options: LayerOptions) -> tuple[Array, ...]:
    """Advance one row by one step: x [inputs], states each [hidden]."""
    g, f = ACTIVATIONS[options.activation], ACTIVATIONS[options.recurrent_activation]
    h = states[0]
    b_ih, b_hh = (w.b_ih, w.b_hh) if options.use_bias else (np.zeros(len(w.w_ih)),) * 2
    of_x = w.w_ih @ x + b_ih
    if cell == "rnn":
        return (g(of_x + w.w_hh @ h + b_hh),)
    if cell == "lstm":
        i, forget, candidate, o = np.split(of_x + w.w_hh @ h + b_hh, 4)
        c = f(forget) * states[1] + f(i) * g(candidate)
        return f(o) * g(c), c
    x_r, x_z, x_n = np.split(of_x, 3)
    (w_r, w_z, w_n), (b_r, b_z, b_n) = np.split(w.w_hh, 3), np.split(b_hh, 3)
    r, z = f(x_r + w_r @ h + b_r), f(x_z + w_z @ h + b_z)
    n = g(x_n + r * (w_n @ h + b_n)) if options.reset_after else g(x_n + w_n @ (r * h) + b_n)
    return ((1 - z) * n + z * h,)


_MERGES: dict[str, Callable[[Array, Array], Array]] = {
    "concat": lambda forth, back: np.concatenate([forth, back], axis=-1),
    "sum": np.add,
    "mul": np.multiply,
    "ave": lambda forth, back: (forth + back) / 2,
}


def run_layer(
    cell: str, row: Array, directions: Sequence[Weights], states: Sequence[Array], options: LayerOptions
) -> tuple[Array, list[Array]]:
    """Run one row alone: row [time, inputs], states each [directions, hidden].

    Returns (y [time, width], states after the last step that each direction reads).
    """
    ys, last = [], [np.array(state, dtype=np.float64) for state in states]
    for number, weights in enumerate(directions):
        now = tuple(state[number] for state in last)
        y = np.zeros((len(row), weights.w_hh.shape[1]))
        backwards = number == 1 or options.go_backwards
        for t in reversed(range(len(row))) if backwards else range(len(row)):
            now = step(cell, row[t].astype(np.float64), now, weights, options)
            y[t] = now[0]
        ys.append(y)
        for state, value in zip(last, now, strict=True):
            state[number] = value
    return ys[0] if len(ys) == 1 else _MERGES[options.merge_mode](*ys), last
