"""The layers of a Keras model in the order that data pass them. Torch-free.

A Sequential is a chain by itself. A functional model is one where each layer takes the output of one other; nodes that
only work masks out are left aside, since a row's own length says which of its steps are real. Models within models are
laid out flat.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from models.errors import ConversionError

_MODELS = ("Sequential", "Functional", "Model")
_MASK_NODES = ("NotEqual", "Any")
_TENSOR = "__keras_tensor__"

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class KerasLayer:
    """One layer: its name, class, options, and where its variables are."""

    name: str
    class_name: str
    config: Json
    place: str
    """Group in the file of weights, such as "layers/lstm_1"."""

    def refuse(self, why: str) -> ConversionError:
        """Make the error that names this layer; why says what to do too."""
        return ConversionError(f"layer {self.name!r} ({self.class_name}): {why}")

    def is_set(self, option: str, *, default: bool = False) -> bool:
        """Read an option that is true or false."""
        value = self.config.get(option, default)
        if not isinstance(value, bool):
            raise self.refuse(f"{option}={value!r} is neither true nor false")
        return value

    def count(self, option: str, *, most: int = 2**31 - 1) -> int:
        """Read an option that is a number of things, from 1."""
        value = self.config.get(option)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.refuse(f"{option}={value!r} is not a whole number from 1 to {most:,}")
        return value

    def number(self, option: str, *, default: float) -> float:
        """Read an option that is a number."""
        value = self.config.get(option, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refuse(f"{option}={value!r} is not a number")
        return float(value)

    def inner(self, option: str, place: str) -> KerasLayer:
        """Read an option that is a layer itself, such as what a wrapper wraps.

        place  its group, below this layer's
        """
        found = self.config.get(option)
        if not isinstance(found, dict):
            raise self.refuse(f"{option}={found!r} is not a layer")
        return read_layer(found, f"{self.place}/{place}")


def read_layer(node: object, place: str) -> KerasLayer:
    """Read a serialized layer. Raises ConversionError for one that would need code of the file's or its author's."""
    if not isinstance(node, dict):
        raise ConversionError(f"config.json: {node!r:.60} is not a layer")
    class_name, config = node.get("class_name"), node.get("config")
    if not isinstance(class_name, str) or not isinstance(config, dict):
        raise ConversionError(f"config.json: {node!r:.60} has no class_name and config")
    name = config.get("name", node.get("name"))
    layer = KerasLayer(str(name), class_name, config, place)
    module, registered = str(node.get("module")), node.get("registered_name")
    if class_name == "Lambda":
        raise layer.refuse("its Python code is never run: write it with layers that have no code of their own")
    if module.partition(".")[0] != "keras" or ">" in str(registered):
        raise layer.refuse(f"a custom object of {registered or module}: only Keras' own layers are converted")
    policy = config.get("dtype", "float32")
    kind = (
        policy["config"].get("name") if isinstance(policy, dict) and isinstance(policy.get("config"), dict) else policy
    )
    if class_name != "InputLayer" and class_name not in _MODELS and kind not in ("float32", None):
        raise layer.refuse(f"dtype policy {kind!r}: set it to float32 and save the model again")
    if config.get("quantization_config") is not None or config.get("lora_rank"):
        raise layer.refuse("quantized weights or LoRA: merge them into float32 weights and save the model again")
    return layer


def read_chain(config: Json) -> tuple[KerasLayer, ...]:
    """Lay the layers of config.json out, the InputLayer first.

    Raises ConversionError for a model that is no chain, naming the layer at which it forks.
    """
    layers = tuple(_layers_of(config, ""))
    if not layers or layers[0].class_name != "InputLayer":
        raise ConversionError("the model was never built: give it an Input layer, or call it once, and save it again")
    return (layers[0], *(layer for layer in layers[1:] if layer.class_name != "InputLayer"))


def _layers_of(node: Json, place: str) -> Iterable[KerasLayer]:
    model = read_layer(node, place.rstrip("/"))
    if model.class_name not in _MODELS:
        what = "only a Sequential or a functional chain of Keras' layers is converted, no class of one's own"
        raise model.refuse(what)
    nodes = model.config.get("layers")
    if not isinstance(nodes, list):
        raise model.refuse("it has no list of layers")
    used = Counter[str]()
    placed: list[tuple[Any, str]] = []
    for each in nodes:
        key = _snake_case(each.get("class_name")) if isinstance(each, dict) else ""
        suffix = f"_{used[key]}" if used[key] else ""
        used[key] += 1
        placed.append((each, f"{place}layers/{key}{suffix}"))
    ordered = placed if model.class_name == "Sequential" else _chain(model, placed)
    for number, (each, where) in enumerate(ordered):
        if isinstance(each, dict) and each.get("class_name") in _MODELS:
            yield from _layers_of(each, f"{where}/")
            continue
        layer = read_layer(each, where)
        if number == 0 and layer.class_name != "InputLayer" and model.config.get("build_input_shape"):
            shape = {"batch_shape": model.config["build_input_shape"], "dtype": "float32"}
            yield KerasLayer("input", "InputLayer", shape, "")
        yield layer


def _chain(model: KerasLayer, placed: list[tuple[Any, str]]) -> list[tuple[Any, str]]:
    """Order the layers of a functional model from its input to its output."""
    by_name = {str(each.get("name")): (each, where) for each, where in placed if isinstance(each, dict)}
    name: Any = _only(model, "output_layers")
    first = _only(model, "input_layers")
    backwards: list[tuple[Any, str]] = []
    while True:
        if name not in by_name:
            raise model.refuse(f"it has no layer {name!r}")
        if len(backwards) > len(by_name):
            raise model.refuse("its layers go round in a circle")
        each, where = by_name[name]
        backwards.append((each, where))
        if name == first:
            break
        name = _source(model, each, name)
    in_chain = {str(each["name"]) for each, _ in backwards}
    for name, (each, _) in by_name.items():
        if name not in in_chain and each.get("class_name") not in _MASK_NODES:
            raise model.refuse(f"layer {name!r} ({each.get('class_name')}) is not on the one path from input to output")
    return backwards[::-1]


def _only(model: KerasLayer, which: str) -> str:
    """Name the one layer that a model begins or ends with."""
    found: Any = model.config.get(which)
    while isinstance(found, list) and len(found) == 1:
        found = found[0]
    if isinstance(found, dict) and len(found) == 1:
        (found,) = found.values()
    if isinstance(found, list) and len(found) == 3 and isinstance(found[0], str) and found[2] == 0:
        return found[0]
    raise model.refuse(f"{which} are {found!r:.80}: a model with one input and one output is converted")


def _source(model: KerasLayer, node: Json, name: str) -> str:
    """Name the layer whose output a layer takes."""
    about = f"layer {name!r} ({node.get('class_name')})"
    calls = node.get("inbound_nodes")
    if not isinstance(calls, list) or len(calls) != 1 or not isinstance(calls[0], dict):
        number = len(calls) if isinstance(calls, list) else 0
        raise model.refuse(f"{about} is called {number} times: give each call a layer of its own")
    arguments, options = calls[0].get("args"), calls[0].get("kwargs")
    if not isinstance(options, dict):
        raise model.refuse(f"{about} is called with {options!r:.60} as its options")
    if options.get("training"):
        raise model.refuse(f"{about} is called with training=True, which makes answers random: leave it out")
    tensors = list(_tensors([arguments, {key: value for key, value in options.items() if key != "mask"}]))
    if len(tensors) != 1:
        raise model.refuse(f"{about} takes {len(tensors)} tensors: a chain, where each takes one, is converted")
    history = tensors[0].get("keras_history")
    if not isinstance(history, list) or len(history) != 3:
        raise model.refuse(f"{about}: keras_history={history!r:.80}")
    if history[2] != 0:
        raise model.refuse(f"{about} takes output {history[2]} of {history[0]!r}; states are carried without it")
    return str(history[0])


def _tensors(value: object) -> Iterable[Json]:
    if isinstance(value, dict):
        if value.get("class_name") == _TENSOR and isinstance(value.get("config"), dict):
            yield value["config"]
        else:
            for each in value.values():
                yield from _tensors(each)
    elif isinstance(value, list):
        for each in value:
            yield from _tensors(each)


def _snake_case(name: object) -> str:
    """Name a group as Keras does (keras.src.utils.naming.to_snake_case)."""
    plain = re.sub(r"\W+", "", str(name))
    plain = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", plain)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", plain).lower()
