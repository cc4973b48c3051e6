"""Weights of Keras' and of torch's recurrent layers, put into ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from models.importers.keras_chain import KerasLayer
from models.importers.keras_file import Array
from models.layers import Recurrent
from models.options import LayerOptions
from models.spec import Cell

# Gates of Keras' columns in the order of torch's rows. Keras: LSTM i f c o, GRU z r h. torch: i f g o, r z n.
_FROM_KERAS: dict[Cell, tuple[int, ...]] = {"rnn": (0,), "lstm": (0, 1, 2, 3), "gru": (1, 0, 2)}


@dataclass(frozen=True, slots=True)
class KerasWeights:
    """A cell's variables."""

    kernel: Array
    """[inputs, gates * units]"""
    recurrent: Array
    """[units, gates * units]"""
    bias: Array | None = None
    """[gates * units]; [2, gates * units], the input's and the recurrent ones, of a GRU that resets after."""


def recurrent_from_keras(layer: KerasLayer, cell: Cell, *weights: KerasWeights) -> Recurrent:
    """Make a recurrent layer of one cell's weights, or of two as its directions.

    Raises ConversionError for options that ours does not have.
    """
    inputs, hidden = len(weights[0].kernel), len(weights[0].recurrent)
    activation: Any = layer.config.get("activation")
    taken = ("tanh", "relu") if cell == "rnn" else ("tanh",)
    if activation not in taken:
        raise layer.refuse(f"activation={activation!r}: {', '.join(taken)} are converted")
    if cell != "rnn" and layer.config.get("recurrent_activation") != "sigmoid":
        raise layer.refuse(f"recurrent_activation={layer.config.get('recurrent_activation')!r}: sigmoid is converted")
    if cell == "gru" and not layer.is_set("reset_after", default=True):
        raise layer.refuse("reset_after=False is not converted")
    options = LayerOptions(activation=activation)
    made = Recurrent(cell, inputs, hidden, bidirectional=len(weights) == 2, options=options)
    for each, suffix in zip(weights, ("", "_reverse"), strict=False):
        bias = np.zeros((2, each.kernel.shape[1]), np.float32)
        if each.bias is not None:
            bias[: each.bias.ndim] = each.bias
        _set(made.rnn, "weight_ih_l0" + suffix, _rows(cell, each.kernel.T))
        _set(made.rnn, "weight_hh_l0" + suffix, _rows(cell, each.recurrent.T))
        _set(made.rnn, "bias_ih_l0" + suffix, _rows(cell, bias[0]))
        _set(made.rnn, "bias_hh_l0" + suffix, _rows(cell, bias[1]))
    return made


def _rows(cell: Cell, array: Array) -> Array:
    gates = np.stack(np.split(array, len(_FROM_KERAS[cell])))
    return gates[list(_FROM_KERAS[cell])].reshape(array.shape)


def _set(module: nn.Module, name: str, value: Array) -> None:
    with torch.no_grad():
        module.get_parameter(name).copy_(torch.from_numpy(np.ascontiguousarray(value)))
