"""Weights of Keras' and of torch's recurrent layers, put into ours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from models.activations import ACTIVATIONS
from models.importers.keras_chain import KerasLayer
from models.importers.keras_file import Array
from models.layers import Recurrent
from models.options import LayerOptions
from models.spec import Cell

_FLAGS = ("use_bias", "reset_after", "go_backwards")
_ACTIVATIONS = {"activation": "tanh", "recurrent_activation": "sigmoid"}
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
    asked: dict[str, object] = {name: layer.is_set(name) for name in _FLAGS if name in layer.config}
    for name in _ACTIVATIONS:
        # None is linear; whatever is no name is a function or a layer of its own.
        value = layer.config.get(name, _ACTIVATIONS[name])
        asked[name] = "linear" if value is None else value
        if not isinstance(asked[name], str) or asked[name] not in ACTIVATIONS:
            raise layer.refuse(f"{name}={value!r:.80} is not converted; use one of {', '.join(ACTIVATIONS)}")
    inputs, hidden = len(weights[0].kernel), len(weights[0].recurrent)
    options = LayerOptions.model_validate({"kernel_initializer": "zeros", "recurrent_initializer": "zeros"} | asked)
    made = Recurrent(cell, inputs, hidden, bidirectional=len(weights) == 2, options=options)
    parameters = {name.rpartition(".")[2]: parameter for name, parameter in made.named_parameters()}
    for each, suffix in zip(weights, ("", "_reverse"), strict=False):
        found = {"weight_ih": each.kernel.T, "weight_hh": each.recurrent.T}
        if each.bias is not None:
            bias = np.zeros((2, each.kernel.shape[1]), np.float32)
            bias[: each.bias.ndim] = each.bias
            found |= {"bias_ih": bias[0], "bias_hh": bias[1]}
        for name, value in found.items():
            with torch.no_grad():
                parameters[f"{name}_l0{suffix}"].copy_(torch.from_numpy(_rows(cell, value)))
    return made


def _rows(cell: Cell, array: Array) -> Array:
    gates = np.stack(np.split(array, len(_FROM_KERAS[cell])))
    return gates[list(_FROM_KERAS[cell])].reshape(array.shape)
