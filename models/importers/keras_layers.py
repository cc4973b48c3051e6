"""Keras' layers as stages: for each class, what it becomes, which of its options are read, and which are refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from models.importers.activations import from_keras as activation_from_keras
from models.importers.keras_chain import KerasLayer
from models.importers.keras_file import Array, KerasFile
from models.importers.recurrent import KerasWeights, recurrent_from_keras
from models.importers.stages import (
    Affine,
    CausalConv,
    Pointwise,
    PReLU,
    RecurrentStage,
    Repeat,
    Reshape,
    Unroll,
    Window,
)

MAX_WINDOW = 10_000
"""Most rows of a RepeatVector."""

Modules = list[nn.Module]

_CELLS: dict[str, Literal["rnn", "lstm", "gru"]] = {"SimpleRNN": "rnn", "LSTM": "lstm", "GRU": "gru"}


@dataclass(frozen=True, slots=True)
class Form:
    """What a batch looks like between two layers."""

    axis: Literal["steps", "running", "sequence"]
    """[batch, time, *row]; the same where Keras has [batch, *row], the answer to the steps so far; [batch, *row]."""
    row: tuple[int, ...]
    """Shape of a row; two axes are a window and its features."""
    unrolls: int | None = None
    """Steps that the model makes of its one input, once it has made them."""

    @property
    def rank(self) -> int:
        """Axes of Keras' tensor."""
        return 1 + (self.axis == "steps") + len(self.row)


class Builder:
    """Turns one layer after another into stages."""

    def __init__(self, file: KerasFile, form: Form) -> None:
        self.file = file
        self.form = form
        self.stages: Modules = []
        self.is_causal = True

    def add(self, layer: KerasLayer) -> None:
        """Add what a layer becomes. Raises ConversionError for a layer or option that nothing here is equal to."""
        build = _BUILDERS.get(layer.class_name)
        if build is None:
            known = ", ".join(sorted(_BUILDERS))
            raise layer.refuse(f"layers of this class are not converted; take it out, or use one of {known}")
        self.stages += build(self, layer)

    def variables(self, layer: KerasLayer, *shapes: tuple[int, ...], below: str = "") -> list[Tensor]:
        """Read a layer's variables, which have to be of these shapes."""
        arrays = self.file.variables(layer.place + below, layer=layer.name)
        found = [array.shape for array in arrays]
        if found != list(shapes):
            wanted = ", ".join(map(str, shapes)) or "none"
            raise layer.refuse(f"its weights have the shapes {found}, where its options ask for {wanted}")
        return [torch.from_numpy(array.astype(np.float32)) for array in arrays]

    def features(self, layer: KerasLayer) -> int:
        """Size of the last axis."""
        if not self.form.row:
            raise layer.refuse("it takes numbers, not ids: put an Embedding before it")
        return self.form.row[-1]

    def check_last_axis(self, layer: KerasLayer, axis: object) -> None:
        """Refuse an axis other than the last."""
        axes = axis if isinstance(axis, list) else [axis]
        if any(each not in (-1, self.form.rank - 1) for each in axes) or len(axes) != 1:
            raise layer.refuse(f"axis={axis!r}: it is converted along the last axis, -1, alone")

    # Recurrent layers

    def recurrent(self, layer: KerasLayer) -> Modules:
        """SimpleRNN, LSTM, GRU."""
        made = [recurrent_from_keras(layer, _CELLS[layer.class_name], self._recurrent_weights(layer))]
        return self._over_time(layer, RecurrentStage(made, merge="concat", is_final=_is_final(layer)))

    def bidirectional(self, layer: KerasLayer) -> Modules:
        """Two layers, the second from the end; one operator where they are alike."""
        merge = layer.config.get("merge_mode")
        if merge not in ("concat", "sum", "mul", "ave"):
            raise layer.refuse(f"merge_mode={merge!r} gives two outputs: use concat, sum, mul or ave")
        ways = [layer.inner("layer", "forward_layer"), layer.inner("backward_layer", "backward_layer")]
        for way in ways:
            if way.class_name not in _CELLS:
                raise layer.refuse(f"it wraps {way.class_name}; SimpleRNN, LSTM and GRU are converted")
        if [way.is_set("go_backwards") for way in ways] != [False, True]:
            raise layer.refuse("its first layer goes backwards: swap the two")
        forward, backward = ways
        if _is_final(forward) != _is_final(backward):
            raise layer.refuse("return_sequences of its two layers differ")
        weights = [self._recurrent_weights(way) for way in ways]
        sizes = [way.count("units") for way in ways]
        if merge != "concat" and sizes[0] != sizes[1]:
            raise layer.refuse(f"merge_mode={merge!r} of {sizes[0]} and {sizes[1]} units")
        if _is_alike(forward, backward):
            made = [recurrent_from_keras(forward, _CELLS[forward.class_name], *weights)]
        else:
            made = [
                recurrent_from_keras(way, _CELLS[way.class_name], each) for way, each in zip(ways, weights, strict=True)
            ]
        return self._over_time(layer, RecurrentStage(made, merge=merge, is_final=_is_final(forward)))

    def _recurrent_weights(self, layer: KerasLayer) -> KerasWeights:
        units, inputs = layer.count("units"), self.features(layer)
        gates = {"SimpleRNN": 1, "LSTM": 4, "GRU": 3}[layer.class_name] * units
        shapes: list[tuple[int, ...]] = [(inputs, gates), (units, gates)]
        if layer.is_set("use_bias", default=True):
            splits = layer.class_name == "GRU" and layer.is_set("reset_after", default=True)
            shapes.append((2, gates) if splits else (gates,))
        return KerasWeights(*(each.numpy() for each in self.variables(layer, *shapes, below="/cell")))

    def _over_time(self, layer: KerasLayer, stage: RecurrentStage) -> Modules:
        form, width = self.form, stage.width
        if len(form.row) == 2 and form.axis != "steps":
            window = form.row[0]
            self.form = replace(form, row=(width,) if stage.is_final else (window, width))
            return [Window(stage, window)]
        if form.axis != "steps" or len(form.row) != 1:
            raise layer.refuse(f"it takes [batch, time, features], and gets {form.rank} axes: {_shape_hint(form)}")
        self.is_causal &= all(each.spec.is_causal for each in stage.recurrent)
        if form.unrolls and not (self.is_causal and not stage.is_final):
            raise layer.refuse("after the input is repeated, a layer has to be causal, with return_sequences=True")
        axis: Literal["steps", "running", "sequence"] = "steps"
        if stage.is_final:
            # Where nothing looks ahead, each step's output is the answer to the steps so far; the last is Keras'.
            axis = "running" if self.is_causal else "sequence"
            stage.is_final = not self.is_causal
        self.form = replace(form, axis=axis, row=(width,))
        return [stage]

    def conv1d(self, layer: KerasLayer) -> Modules:
        """Conv1D with padding="causal"."""
        if layer.config.get("padding") != "causal":
            raise layer.refuse(f"padding={layer.config.get('padding')!r}: train it with padding='causal'")
        (kernel,), (stride,), (dilation,) = (
            _sizes(layer, option) for option in ("kernel_size", "strides", "dilation_rate")
        )
        groups, filters, channels = layer.count("groups"), layer.count("filters"), self.features(layer)
        if stride != 1:
            raise layer.refuse(f"strides={stride}: an answer to every step is converted, strides=1")
        if self.form.axis != "steps" or len(self.form.row) != 1 or self.form.unrolls:
            raise layer.refuse("it is converted over the steps of the input alone")
        if channels % groups or filters % groups or dilation * (kernel - 1) > MAX_WINDOW:
            raise layer.refuse(f"groups={groups}, kernel_size={kernel}, dilation_rate={dilation} are out of range")
        has_bias = layer.is_set("use_bias", default=True)
        weight, *bias = self.variables(layer, (kernel, channels // groups, filters), *[(filters,)] * has_bias)
        conv = nn.Conv1d(channels, filters, kernel, dilation=dilation, groups=groups, bias=has_bias)
        _copy(conv.weight, weight.permute(2, 1, 0))
        if conv.bias is not None:
            _copy(conv.bias, bias[0])
        self.form = replace(self.form, row=(filters,))
        over: nn.Module = CausalConv(conv) if kernel > 1 else Pointwise(conv)
        return [over, *activation_from_keras(layer)]

    # Layers that look at one row

    def dense(self, layer: KerasLayer) -> Modules:
        """Dense, over the last axis."""
        units, inputs, has_bias = layer.count("units"), self.features(layer), layer.is_set("use_bias", default=True)
        kernel, *bias = self.variables(layer, (inputs, units), *[(units,)] * has_bias)
        linear = nn.Linear(inputs, units, bias=has_bias)
        _copy(linear.weight, kernel.T)
        if has_bias:
            _copy(linear.bias, bias[0])
        self.form = replace(self.form, row=(*self.form.row[:-1], units))
        return [linear, *activation_from_keras(layer)]

    def embedding(self, layer: KerasLayer) -> Modules:
        """Embedding, of the model's input; how many ids there are is read by whoever describes the input."""
        ids, width = layer.count("input_dim"), layer.count("output_dim")
        if self.stages or self.form.row:
            raise layer.refuse("it is converted as the first layer, over ids [batch, time] or [batch]")
        (table,) = self.variables(layer, (ids, width))
        made = nn.Embedding(ids, width)
        _copy(made.weight, table)
        self.form = replace(self.form, row=(width,))
        return [made]

    def time_distributed(self, layer: KerasLayer) -> Modules:
        """TimeDistributed of a layer that looks at the last axis alone."""
        inner = layer.inner("layer", "layer")
        if inner.class_name not in _ROW_LAYERS:
            raise layer.refuse(f"it wraps {inner.class_name}; converted are {', '.join(_ROW_LAYERS)}")
        return _BUILDERS[inner.class_name](self, inner)

    def activation(self, layer: KerasLayer) -> Modules:
        """Activation and the layers that are one."""
        if layer.class_name == "Softmax":
            self.check_last_axis(layer, layer.config.get("axis", -1))
        if layer.class_name == "PReLU":
            return [PReLU(self._prelu(layer))]
        return activation_from_keras(layer)

    def _prelu(self, layer: KerasLayer) -> Tensor:
        arrays = self.file.variables(layer.place, layer=layer.name)
        if len(arrays) != 1 or (self.form.axis == "steps" and (arrays[0].ndim < 2 or arrays[0].shape[0] != 1)):
            raise layer.refuse("it has a slope for every step: share them along time, shared_axes=[1]")
        slope = arrays[0][0] if self.form.axis == "steps" else arrays[0]
        row = self.form.row
        if slope.ndim != len(row) or any(a not in (1, b) for a, b in zip(slope.shape, row, strict=True)):
            raise layer.refuse(f"its slopes have the shape {slope.shape}, where rows are {row}")
        return torch.from_numpy(slope.astype(np.float32))

    def batch_normalization(self, layer: KerasLayer) -> Modules:
        """BatchNormalization with the statistics of training: a factor and a shift for each feature."""
        self.check_last_axis(layer, layer.config.get("axis", -1))
        width = self.features(layer)
        scales, centers = layer.is_set("scale", default=True), layer.is_set("center", default=True)
        found = [each.double() for each in self.variables(layer, *[(width,)] * (2 + scales + centers))]
        variance, mean = found.pop(), found.pop()
        factor = torch.rsqrt(variance + layer.number("epsilon", default=1e-3))
        if scales:
            factor = factor * found.pop(0)
        return [Affine(mean, factor, found[0] if centers else torch.zeros(width))]

    def layer_normalization(self, layer: KerasLayer) -> Modules:
        """LayerNormalization over the last axis."""
        self.check_last_axis(layer, layer.config.get("axis", -1))
        if layer.is_set("rms_scaling"):
            raise layer.refuse("rms_scaling=True is not converted")
        width = self.features(layer)
        scales, centers = layer.is_set("scale", default=True), layer.is_set("center", default=True)
        found = self.variables(layer, *[(width,)] * (scales + centers))
        norm = nn.LayerNorm(width, eps=layer.number("epsilon", default=1e-3))
        if scales:
            _copy(norm.weight, found.pop(0))
        if centers:
            _copy(norm.bias, found.pop(0))
        return [norm]

    def normalization(self, layer: KerasLayer) -> Modules:
        """Normalization by a mean and variance that were given or adapted."""
        if layer.is_set("invert"):
            raise layer.refuse("invert=True is not converted")
        axis, width = layer.config.get("axis", -1), self.features(layer)
        if axis not in (None, []):
            self.check_last_axis(layer, axis)
        shape = (width,) if axis not in (None, []) else ()
        if layer.config.get("mean") is None:
            mean, variance, _ = self.variables(layer, shape, shape, ())
        else:
            mean, variance = (_numbers(layer, layer.config.get(option)) for option in ("mean", "variance"))
        mean, variance = (each.double().flatten().broadcast_to(width) for each in (mean, variance))
        # Keras divides by the larger of the deviation and its epsilon, 1e-7.
        return [Affine(mean, 1.0 / torch.clamp(variance.sqrt(), min=1e-7), torch.zeros(width))]

    def rescaling(self, layer: KerasLayer) -> Modules:
        """Rescaling by a factor and an offset, numbers or one for each feature."""
        width = self.features(layer)
        scale, offset = (_numbers(layer, layer.config.get(option)) for option in ("scale", "offset"))
        if any(each.numel() not in (1, width) for each in (scale, offset)):
            raise layer.refuse(f"scale and offset do not fit rows of {width}")
        scale, offset = (each.double().flatten().broadcast_to(width) for each in (scale, offset))
        return [Affine(torch.zeros(width), scale, offset)]

    def nothing(self, _: KerasLayer) -> Modules:
        """What does nothing when a model answers, or what a row's own length does here."""
        return []

    # Layers that change the shape

    def repeat_vector(self, layer: KerasLayer) -> Modules:
        """RepeatVector: the steps of a model whose input is one vector, or a window of the answer so far."""
        window = layer.count("n", most=MAX_WINDOW)
        form = self.form
        if form.axis == "steps" or len(form.row) != 1:
            raise layer.refuse("it takes one vector: give the layer before it return_sequences=False")
        if form.axis == "sequence" and not any(isinstance(each, RecurrentStage) for each in self.stages):
            self.form = Form("steps", form.row, unrolls=window)
            return [Unroll()]
        self.form = replace(form, row=(window, *form.row))
        return [Repeat(window)]

    def reshape(self, layer: KerasLayer) -> Modules:
        """Reshape and Flatten of an answer; over steps they would tie a model to one length."""
        form = self.form
        if form.axis == "steps":
            raise layer.refuse("it mixes steps, which ties the model to one length: use return_sequences=False instead")
        size = math.prod(form.row)
        shape = [-1] if layer.class_name == "Flatten" else layer.config.get("target_shape")
        if not isinstance(shape, list) or not 1 <= len(shape) <= 2 or not all(isinstance(each, int) for each in shape):
            raise layer.refuse(f"target_shape={shape!r}: one or two axes are converted")
        known = math.prod(each for each in shape if each != -1)
        row = tuple(size // known if each == -1 and known > 0 else each for each in shape)
        if math.prod(row) != size or min(row) < 1:
            raise layer.refuse(f"{form.row} cannot take the shape {shape}")
        self.form = replace(form, row=row)
        return [Reshape(len(form.row), row)]


def _is_final(layer: KerasLayer) -> bool:
    return not layer.is_set("return_sequences")


def _is_alike(forward: KerasLayer, backward: KerasLayer) -> bool:
    """Whether one operator can run two layers as its two directions."""
    names = ("units", "activation", "recurrent_activation", "use_bias", "reset_after")
    options: Sequence[tuple[Any, ...]] = [tuple(way.config.get(name) for name in names) for way in (forward, backward)]
    return forward.class_name == backward.class_name and options[0] == options[1]


def _sizes(layer: KerasLayer, option: str) -> tuple[int]:
    value = layer.config.get(option)
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise layer.refuse(f"{option}={value!r} is not a whole number from 1")
    return (value,)


def _numbers(layer: KerasLayer, value: object) -> Tensor:
    """Read numbers that the configuration gives, plain, in lists or as a serialized array."""
    if isinstance(value, dict) and isinstance(value.get("config"), dict):
        value = value["config"].get("value")
    try:
        found: Array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise layer.refuse(f"{value!r:.60} are not numbers") from error
    return torch.from_numpy(np.array(found))


def _shape_hint(form: Form) -> str:
    return "an Embedding turns ids to features" if not form.row else "give the layer before it return_sequences=True"


def _copy(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


_ACTIVATIONS = ("Activation", "ELU", "LeakyReLU", "PReLU", "ReLU", "Softmax")
_NOTHING = ("ActivityRegularization", "AlphaDropout", "Dropout", "GaussianDropout", "GaussianNoise", "Identity")
_ROW_LAYERS = ("Activation", "Dense", "Dropout", "ELU", "LayerNormalization", "LeakyReLU", "ReLU")

_BUILDERS: dict[str, Callable[[Builder, KerasLayer], Modules]] = {
    **dict.fromkeys(_CELLS, Builder.recurrent),
    **dict.fromkeys(_ACTIVATIONS, Builder.activation),
    **dict.fromkeys((*_NOTHING, "Masking", "SpatialDropout1D"), Builder.nothing),
    "BatchNormalization": Builder.batch_normalization,
    "Bidirectional": Builder.bidirectional,
    "Conv1D": Builder.conv1d,
    "Dense": Builder.dense,
    "Embedding": Builder.embedding,
    "Flatten": Builder.reshape,
    "LayerNormalization": Builder.layer_normalization,
    "Normalization": Builder.normalization,
    "RepeatVector": Builder.repeat_vector,
    "Rescaling": Builder.rescaling,
    "Reshape": Builder.reshape,
    "TimeDistributed": Builder.time_distributed,
}
