"""What weights begin with, in Keras' layout: kernels [inputs, gates * hidden], biases [gates * hidden].

Source: keras.initializers 3 (random_initializers.py, constant_initializers.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.options import Term

_OF_TRUNCATED = 0.87962566103423978
"""Standard deviation of a standard normal cut off at two of them."""
_SCALINGS: dict[str, tuple[float, str, str]] = {
    "glorot_uniform": (1.0, "fan_avg", "uniform"),
    "glorot_normal": (1.0, "fan_avg", "truncated_normal"),
    "he_uniform": (2.0, "fan_in", "uniform"),
    "he_normal": (2.0, "fan_in", "truncated_normal"),
    "lecun_uniform": (1.0, "fan_in", "uniform"),
    "lecun_normal": (1.0, "fan_in", "truncated_normal"),
}


def initial(term: Term, shape: Sequence[int], *, hidden: int) -> Tensor:
    """Draw weights of a shape in Keras' layout, float32, by torch's global generator.

    hidden  units of the layer, which "torch" goes by
    """
    weights = torch.empty(*shape)
    match term.name:
        case "zeros":
            return weights.zero_()
        case "ones":
            return weights.fill_(1.0)
        case "constant":
            return weights.fill_(term.number("value"))
        case "identity":
            return torch.eye(*shape) * term.number("gain")
        case "orthogonal":
            return nn.init.orthogonal_(weights, gain=term.number("gain"))
        case "random_uniform":
            return weights.uniform_(term.number("minval"), term.number("maxval"))
        case "random_normal":
            return weights.normal_(term.number("mean"), term.number("stddev"))
        case "truncated_normal":
            return _truncated(weights, term.number("mean"), term.number("stddev"))
        case "torch":
            bound = 1.0 / math.sqrt(hidden)
            return weights.uniform_(-bound, bound)
        case "variance_scaling":
            scaling = (term.number("scale"), str(term.values["mode"]), str(term.values["distribution"]))
        case _:
            scaling = _SCALINGS[term.name]
    return _scaled(weights, *scaling)


def _scaled(weights: Tensor, scale: float, mode: str, distribution: str) -> Tensor:
    fan_in, fan_out = weights.shape[0], weights.shape[-1]
    fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2.0}[mode]
    variance = scale / max(1.0, fan)
    if distribution == "uniform":
        bound = math.sqrt(3.0 * variance)
        return weights.uniform_(-bound, bound)
    if distribution == "untruncated_normal":
        return weights.normal_(0.0, math.sqrt(variance))
    return _truncated(weights, 0.0, math.sqrt(variance) / _OF_TRUNCATED)


def _truncated(weights: Tensor, mean: float, stddev: float) -> Tensor:
    if stddev == 0.0:
        return weights.fill_(mean)
    return nn.init.trunc_normal_(weights, mean, stddev, mean - 2.0 * stddev, mean + 2.0 * stddev)
