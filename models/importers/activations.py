"""Keras' activations as torch modules. Source: keras/src/activations/activations.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from models.importers.keras_chain import KerasLayer, read_layer

_BY_NAME: dict[str, Callable[[Tensor], Tensor]] = {
    "celu": functional.celu,
    "elu": functional.elu,
    "exponential": lambda x: x.exp(),
    "gelu": functional.gelu,
    "hard_sigmoid": functional.hardsigmoid,
    "hard_silu": functional.hardswish,
    "hard_swish": functional.hardswish,
    "hard_tanh": functional.hardtanh,
    # Keras' function has another slope than torch's, and than its own layer.
    "leaky_relu": lambda x: functional.leaky_relu(x, 0.2),
    "log_sigmoid": functional.logsigmoid,
    "log_softmax": lambda x: functional.log_softmax(x, -1),
    "mish": functional.mish,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "selu": functional.selu,
    "sigmoid": lambda x: x.sigmoid(),
    "silu": functional.silu,
    "softmax": lambda x: functional.softmax(x, -1),
    "softplus": functional.softplus,
    "softsign": functional.softsign,
    "swish": functional.silu,
    "tanh": lambda x: x.tanh(),
}


class Function(nn.Module):
    """A function of one tensor, by the name that Keras has for it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return _BY_NAME[self.name](x)


class CappedReLU(nn.Module):
    """Source: keras.layers.ReLU: x between threshold and max_value, negative_slope * (x - threshold) below."""

    def __init__(self, *, max_value: float | None, negative_slope: float, threshold: float) -> None:
        super().__init__()
        self.max_value = max_value
        self.negative_slope = negative_slope
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        is_above = x > self.threshold if self.threshold else x >= 0
        y = x.where(is_above, self.negative_slope * (x - self.threshold))
        return y if self.max_value is None else y.clamp(max=self.max_value)


def from_keras(layer: KerasLayer) -> list[nn.Module]:
    """Make what a layer's activation is, or what a layer is that does nothing else; nothing for "linear".

    Raises ConversionError for one that is not Keras' own.
    """
    config = layer.config
    if layer.class_name == "ReLU":
        most = None if config.get("max_value") is None else layer.number("max_value", default=0.0)
        slope, threshold = (layer.number(option, default=0.0) for option in ("negative_slope", "threshold"))
        return [CappedReLU(max_value=most, negative_slope=slope, threshold=threshold)]
    if layer.class_name == "LeakyReLU":
        return [nn.LeakyReLU(layer.number("negative_slope", default=0.3))]
    if layer.class_name == "ELU":
        return [nn.ELU(layer.number("alpha", default=1.0))]
    if layer.class_name == "Softmax":
        return [Function("softmax")]
    return _named(layer, config.get("activation"))


def _named(layer: KerasLayer, activation: Any) -> list[nn.Module]:
    if activation in (None, "linear"):
        return []
    if isinstance(activation, str) and activation in _BY_NAME:
        return [Function(activation)]
    if isinstance(activation, dict) and activation.get("class_name") in ("ReLU", "LeakyReLU", "ELU", "Softmax"):
        return from_keras(read_layer(activation, ""))
    if isinstance(activation, dict):
        activation = activation.get("config", activation)
    raise layer.refuse(f"activation {activation!r:.80} is not converted; use one of {', '.join(_BY_NAME)}")
