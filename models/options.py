"""Options of recurrent layers under the names of Keras 3, with its defaults. Torch-free.

An initializer, a regularizer or a constraint is written as one short text, which is the same on the command line, in a
TOML file and in Python:

    glorot_uniform                       a name
    constant=0.1                         a name and what it takes, in Keras' order
    random_normal=stddev=0.1             by its name
    min_max_norm=0.5:1.5:rate=0.9        several, with colons between them
    l1=1e-4,l2=1e-4                      both regularizers

Source: keras.layers, keras.initializers, keras.regularizers and keras.constraints 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Activation = Literal[
    "tanh",
    "relu",
    "sigmoid",
    "linear",
    "hard_sigmoid",
    "hard_sigmoid_v2",
    "elu",
    "leaky_relu",
    "softplus",
    "softsign",
    "relu6",
    "selu",
    "celu",
    "gelu",
    "silu",
    "swish",
    "mish",
    "exponential",
    "hard_tanh",
    "hard_silu",
    "hard_swish",
    "hard_shrink",
    "soft_shrink",
    "tanh_shrink",
    "log_sigmoid",
    "sparse_plus",
    "sparse_sigmoid",
    "squareplus",
    "softmax",
    "log_softmax",
]
"""Keras 3's; hard_sigmoid is min(max(x / 6 + 0.5, 0), 1), and hard_sigmoid_v2, with 0.2 x + 0.5, is Keras 2's."""

MergeMode = Literal["concat", "sum", "mul", "ave"]

Value = float | str
Signature = Mapping[str, Value]

_SCALED: Signature = {"scale": 1.0, "mode": "fan_in", "distribution": "truncated_normal"}
INITIALIZERS: Mapping[str, Signature] = {
    "zeros": {},
    "ones": {},
    "constant": {"value": 0.0},
    "identity": {"gain": 1.0},
    "orthogonal": {"gain": 1.0},
    "random_uniform": {"minval": -0.05, "maxval": 0.05},
    "random_normal": {"mean": 0.0, "stddev": 0.05},
    "truncated_normal": {"mean": 0.0, "stddev": 0.05},
    "variance_scaling": _SCALED,
    "glorot_uniform": {},
    "glorot_normal": {},
    "he_uniform": {},
    "he_normal": {},
    "lecun_uniform": {},
    "lecun_normal": {},
    "torch": {},
}
"""What each takes, with its default. "torch" is uniform within 1 / sqrt(hidden), as torch.nn.RNN begins."""
REGULARIZERS: Mapping[str, Signature] = {"l1": {"l1": 0.01}, "l2": {"l2": 0.01}, "l1_l2": {"l1": 0.01, "l2": 0.01}}
"""l1 is a factor of the sum of magnitudes, l2 of the sum of squares."""
CONSTRAINTS: Mapping[str, Signature] = {
    "max_norm": {"max_value": 2.0, "axis": 0.0},
    "non_neg": {},
    "unit_norm": {"axis": 0.0},
    "min_max_norm": {"min_value": 0.0, "max_value": 1.0, "rate": 1.0, "axis": 0.0},
}
"""Norms are along an axis of Keras' weights: 0 gives every unit of every gate a norm of its own."""
PRESETS: Mapping[str, Mapping[str, str | bool]] = {
    "torch": {f"{name}_initializer": "torch" for name in ("kernel", "recurrent", "bias")},
    "keras2": {"recurrent_activation": "hard_sigmoid_v2", "reset_after": False},
}
"""Options that differ from the defaults, by name: torch begins as torch.nn does, keras2 is as Keras 2 was."""

_CHOICES = {
    "mode": ("fan_in", "fan_out", "fan_avg"),
    "distribution": ("truncated_normal", "untruncated_normal", "uniform"),
}
_SQUARE = ("identity", "orthogonal")


@dataclass(frozen=True, slots=True)
class Term:
    """A name with all that it takes, such as max_norm with {"max_value": 2.0, "axis": 0.0}."""

    name: str
    values: dict[str, Value] = field(default_factory=dict)

    def number(self, name: str) -> float:
        """A value that is a number."""
        return float(self.values[name])


def parse_initializer(text: str) -> Term:
    """Read an initializer. Raises ValueError that says what there is."""
    term = _term(text, INITIALIZERS, "initializer")
    for name, sign in (("stddev", "negative"), ("scale", "0 or less")):
        value = term.values.get(name)
        if isinstance(value, float) and (value < 0 or (name == "scale" and value == 0)):
            raise ValueError(f"{text!r}: {name} cannot be {sign}")
    if term.name == "random_uniform" and term.number("minval") > term.number("maxval"):
        raise ValueError(f"{text!r}: minval is above maxval")
    return term


def parse_bias_initializer(text: str) -> Term:
    """Read the initializer of a bias, which has no rows and columns. Raises ValueError."""
    term = parse_initializer(text)
    if term.name in _SQUARE:
        raise ValueError(f"{term.name} is for matrices; a bias can begin with zeros, ones, constant=0.1, ...")
    return term


def parse_regularizer(text: str) -> dict[str, float]:
    """Read a regularizer; returns the factors {"l1": ..., "l2": ...}. Raises ValueError that says what there is."""
    factors = {"l1": 0.0, "l2": 0.0}
    for part in text.split(","):
        for name, factor in _term(part.strip(), REGULARIZERS, "regularizer").values.items():
            if float(factor) < 0:
                raise ValueError(f"{text!r}: {name} cannot be negative")
            factors[name] += float(factor)
    return factors


def parse_constraint(text: str) -> Term:
    """Read a constraint. Raises ValueError that says what there is."""
    term = _term(text, CONSTRAINTS, "constraint")
    if term.values.get("axis", 0.0) not in (0.0, 1.0, -1.0):
        raise ValueError(f"{text!r}: axis is 0 (over a unit's inputs) or 1 (over all units)")
    if any(float(term.values.get(name, 0.0)) < 0 for name in ("max_value", "min_value")):
        raise ValueError(f"{text!r}: a norm cannot be negative")
    if term.name == "min_max_norm" and term.number("min_value") > term.number("max_value"):
        raise ValueError(f"{text!r}: min_value is above max_value")
    if not 0 <= float(term.values.get("rate", 1.0)) <= 1:
        raise ValueError(f"{text!r}: rate is from 0 to 1")
    return term


def _term(text: str, known: Mapping[str, Signature], kind: str) -> Term:
    name, has_values, rest = text.partition("=")
    if name not in known:
        raise ValueError(f"no {kind} {name!r}: there are {', '.join(known)}")
    values = dict(known[name])
    names = list(values)
    shown = (f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items())
    example = f"{name}={':'.join(shown)}"
    takes = f"write it as in {example}" if names else "it takes nothing"
    for place, part in enumerate(rest.split(":") if has_values else ()):
        key, is_named, value = part.partition("=")
        if not is_named:
            if place >= len(names):
                raise ValueError(f"{text!r} says too much: {takes}")
            key, value = names[place], part
        if key not in values:
            raise ValueError(f"{text!r}: {name} has no {key!r}; {takes}")
        values[key] = _value(text, key, value, takes)
    return Term(name, values)


def _value(text: str, key: str, value: str, takes: str) -> Value:
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            raise ValueError(f"{text!r}: {key} is one of {', '.join(_CHOICES[key])}")
        return value
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{text!r}: {key} cannot be {value!r}; {takes}")
    return number


def _is_steps(value: object) -> object:
    if value is True:
        raise ValueError("say how many steps the graph is to have, such as 24: it takes no longer sequence")
    return value


def _checked_initializer(text: str) -> str:
    parse_initializer(text)
    return text


def _checked_bias_initializer(text: str) -> str:
    parse_bias_initializer(text)
    return text


def _checked_regularizer(text: str) -> str:
    parse_regularizer(text)
    return text


def _checked_constraint(text: str) -> str:
    parse_constraint(text)
    return text


Initializer = Annotated[str, AfterValidator(_checked_initializer)]
BiasInitializer = Annotated[str, AfterValidator(_checked_bias_initializer)]
Regularizer = Annotated[str, AfterValidator(_checked_regularizer)] | None
Constraint = Annotated[str, AfterValidator(_checked_constraint)] | None
Steps = Annotated[int, BeforeValidator(_is_steps), Field(ge=0)]


class LayerOptions(BaseModel):
    """What a recurrent layer is asked beside its cell, its size and its directions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    activation: Activation = "tanh"
    """Activation of the candidate state, and of an lstm's output."""
    recurrent_activation: Activation = "sigmoid"
    """Activation of the gates; an rnn has none."""
    use_bias: bool = True
    """Whether gates have biases."""
    kernel_initializer: Initializer = "glorot_uniform"
    """What the inputs' weights begin with, such as he_normal or random_normal=stddev=0.1; torch: as torch.nn begins."""
    recurrent_initializer: Initializer = "orthogonal"
    """What the recurrent weights begin with."""
    bias_initializer: BiasInitializer = "zeros"
    """What the biases begin with."""
    unit_forget_bias: bool = True
    """Whether the bias of an lstm's forget gate begins with 1 instead."""
    kernel_regularizer: Regularizer = None
    """Penalty on the inputs' weights, such as l2=0.01 or l1=1e-4,l2=1e-4."""
    recurrent_regularizer: Regularizer = None
    """Penalty on the recurrent weights."""
    bias_regularizer: Regularizer = None
    """Penalty on the biases."""
    activity_regularizer: Regularizer = None
    """Penalty on a layer's outputs: the sum over the steps of a batch, divided by its sequences."""
    kernel_constraint: Constraint = None
    """What the inputs' weights keep to, such as max_norm=2, non_neg, unit_norm, min_max_norm=0.5:1.5:rate=0.9."""
    recurrent_constraint: Constraint = None
    """What the recurrent weights keep to."""
    bias_constraint: Constraint = None
    """What the biases keep to."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of a recurrent layer's inputs to drop in training, the same ones at every step of a sequence."""
    recurrent_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the previous hidden state to drop in training, the same units at every step of a sequence."""
    go_backwards: bool = False
    """Whether a layer reads a sequence from its end; row t of its output belongs to step t all the same."""
    unroll: Steps = 0
    """Steps of a graph that is exported without a recurrent operator, for sequences up to that; 0: not unrolled."""
    reset_after: bool = True
    """Whether a gru's reset gate is applied after the recurrent product, as torch does, or before it."""
    merge_mode: MergeMode = "concat"
    """How the outputs of the two directions of a bidirectional layer are put together."""
