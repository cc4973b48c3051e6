"""Keras' activations as torch modules. Source: keras/src/activations/activations.py."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from models.activations import ACTIVATIONS
from models.importers.keras_chain import KerasLayer, read_layer
from models.options import Activation


class Function(nn.Module):
    """A function of one tensor, by the name that Keras has for it."""

    def __init__(self, name: Activation) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return ACTIVATIONS[self.name](x)


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
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return [Function(cast("Activation", activation))]
    if isinstance(activation, dict) and activation.get("class_name") in ("ReLU", "LeakyReLU", "ELU", "Softmax"):
        return from_keras(read_layer(activation, ""))
    if isinstance(activation, dict):
        activation = activation.get("config", activation)
    raise layer.refuse(f"activation {activation!r:.80} is not converted; use one of {', '.join(ACTIVATIONS)}")
