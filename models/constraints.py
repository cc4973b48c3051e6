"""Penalties on weights and outputs, and what weights keep to, in Keras' layout.

Source: keras.regularizers.L1L2 and keras.constraints 3.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from models.options import Term

_EPSILON = 1e-7
"""keras.backend.epsilon()."""


def penalty_of(factors: Mapping[str, float], values: Tensor) -> Tensor:
    """l1 * sum |values| + l2 * sum values**2, []."""
    total = values.new_zeros(())
    if factors["l1"]:
        total = total + factors["l1"] * values.abs().sum()
    if factors["l2"]:
        total = total + factors["l2"] * values.square().sum()
    return total


def constrained(term: Term, weights: Tensor) -> Tensor:
    """The nearest weights that keep to a constraint, as Keras finds them.

    weights  a kernel [inputs, units of all gates], or a bias, whose norm is over all of it
    """
    if term.name == "non_neg":
        return weights.clamp(min=0.0)
    axis = int(term.number("axis")) if weights.dim() > 1 else 0
    norms = weights.square().sum(dim=axis, keepdim=True).sqrt()
    if term.name == "unit_norm":
        return weights / (_EPSILON + norms)
    if term.name == "max_norm":
        wanted = norms.clamp(0.0, term.number("max_value"))
    else:
        rate = term.number("rate")
        wanted = rate * norms.clamp(term.number("min_value"), term.number("max_value")) + (1.0 - rate) * norms
    return weights * (wanted / (_EPSILON + norms))
