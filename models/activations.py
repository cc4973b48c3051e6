"""Activations by Keras' names: in torch, and as the attributes of ONNX's recurrent operators that have them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as nnf

from models.options import Activation

_SLOPE = 0.2
"""Keras' leaky_relu has this, torch's 0.01."""


def _sparse_plus(x: Tensor) -> Tensor:
    return torch.where(x <= -1, torch.zeros_like(x), torch.where(x < 1, 0.25 * (x + 1) ** 2, x))


ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "linear": lambda x: x,
    "hard_sigmoid": lambda x: torch.clamp(x * (1.0 / 6.0) + 0.5, 0.0, 1.0),
    "hard_sigmoid_v2": lambda x: torch.clamp(x * 0.2 + 0.5, 0.0, 1.0),
    "elu": nnf.elu,
    "leaky_relu": lambda x: nnf.leaky_relu(x, _SLOPE),
    "softplus": nnf.softplus,
    "softsign": nnf.softsign,
    "relu6": lambda x: torch.clamp(x, 0.0, 6.0),
    "selu": nnf.selu,
    "celu": nnf.celu,
    "gelu": nnf.gelu,
    "silu": nnf.silu,
    "swish": nnf.silu,
    "mish": lambda x: x * torch.tanh(nnf.softplus(x)),
    "exponential": torch.exp,
    "hard_tanh": lambda x: torch.clamp(x, -1.0, 1.0),
    "hard_silu": lambda x: x * torch.clamp(x * (1.0 / 6.0) + 0.5, 0.0, 1.0),
    "hard_swish": lambda x: x * torch.clamp(x * (1.0 / 6.0) + 0.5, 0.0, 1.0),
    "hard_shrink": lambda x: torch.where(x.abs() > 0.5, x, torch.zeros_like(x)),
    "soft_shrink": lambda x: torch.sign(x) * torch.relu(x.abs() - 0.5),
    "tanh_shrink": lambda x: x - torch.tanh(x),
    "log_sigmoid": lambda x: -nnf.softplus(-x),
    "sparse_plus": _sparse_plus,
    "sparse_sigmoid": lambda x: torch.clamp(0.5 * x + 0.5, 0.0, 1.0),
    "squareplus": lambda x: 0.5 * (x + torch.sqrt(x * x + 4.0)),
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
}
"""Each is applied to [batch, hidden]."""


@dataclass(frozen=True, slots=True)
class Native:
    """An activation of ONNX's RNN, LSTM and GRU."""

    name: str
    alpha: float = math.nan
    """NaN where the activation takes none."""
    beta: float = math.nan


NATIVE: Mapping[Activation, Native] = {
    "tanh": Native("Tanh"),
    "relu": Native("Relu"),
    "sigmoid": Native("Sigmoid"),
    "linear": Native("Affine", 1.0, 0.0),
    "hard_sigmoid": Native("HardSigmoid", 1.0 / 6.0, 0.5),
    "hard_sigmoid_v2": Native("HardSigmoid", 0.2, 0.5),
    "sparse_sigmoid": Native("HardSigmoid", 0.5, 0.5),
    "elu": Native("Elu", 1.0),
    "leaky_relu": Native("LeakyRelu", _SLOPE),
    "softplus": Native("Softplus"),
    "softsign": Native("Softsign"),
}
"""Those that an operator has; any other takes a graph of its own."""

NON_NEGATIVE: frozenset[Activation] = frozenset(
    ("relu", "relu6", "sigmoid", "hard_sigmoid", "hard_sigmoid_v2", "sparse_sigmoid", "softplus", "exponential")
)
"""Those whose values, and so an rnn's states, are never below 0."""
