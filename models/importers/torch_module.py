"""From a plain torch module that holds nn.RNN, nn.LSTM or nn.GRU to a graph that a server can step.

The module's recurrent layers are replaced by ours, and everything else of its forward is traced as it is. What the
graph must be equal to is the module itself, untouched, asked for each sequence alone and without padding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from models.errors import ConversionError
from models.graphs import Array, Draw, GraphModule, draw_like
from models.importers.torch_layers import specs_of
from models.importers.torch_plan import Plan
from models.importers.torch_probe import Example, choose, count_ids, read_example, watch
from models.layers import Recurrent
from models.spec import DType, GraphSpec, Layout, StateSpec, TensorSpec


def as_graph(
    module: nn.Module,
    example: Example,
    *,
    lengths: str = "lengths",
    output_names: Sequence[str] = (),
    units: Mapping[str, str] | None = None,
    labels: Sequence[str] = (),
) -> GraphModule:
    """Describe a module as one graph, and make it ready to be traced.

    The arguments are those of models.export.export. Raises ConversionError for what a graph cannot be equal to.
    """
    original = copy.deepcopy(module).cpu().eval()
    if any(each.dtype == torch.float64 for each in original.parameters()):
        raise ConversionError("the module's weights are float64, and graphs are float32: call module.float() before")
    with torch.no_grad():
        plan, inputs = read_example(original, example, lengths)
        plan, answers = watch(original, plan, inputs, tuple(output_names))
        alone, traced, looks_ahead = choose(original, plan, inputs)
        num_ids = count_ids(original, plan, inputs)
    plan = traced.plan
    for layer in traced.recurrent:
        layer.freeze()
    layers, states = specs_of(traced.recurrent)
    described = [
        _tensor(name, layout, x, unit=(units or {}).get(name, ""), num_ids=ids)
        for name, layout, x, ids in zip(plan.inputs, plan.layouts, inputs, num_ids, strict=True)
    ]
    outputs = []
    for name, kind, y in zip(plan.outputs, plan.answer_kinds, answers, strict=True):
        layout = Layout.PER_SEQUENCE if kind == "sequence" else Layout.PER_STEP
        tensor = _tensor(name, layout, y, unit=(units or {}).get(name, ""))
        if kind == "sequence" and plan.is_folded:
            about = "answer to the steps so far; the last is final"
            tensor = tensor.model_copy(update={"layout": Layout.PER_STEP, "description": about})
        outputs.append(tensor)
    if labels:
        if len(outputs) != 1 or outputs[0].row_shape[-1:] != (len(labels),):
            raise ConversionError(f"{len(labels)} labels, where the answers are {[list(y.row_shape) for y in outputs]}")
        outputs = [outputs[0].model_copy(update={"element_names": tuple(labels)})]
    spec = GraphSpec(
        layers=layers, inputs=tuple(described), outputs=tuple(outputs), states=states, looks_ahead=looks_ahead
    )
    return GraphModule(module=alone, ready=traced, spec=spec, draw=_draw(plan, inputs, traced.recurrent))


def _tensor(name: str, layout: Layout, x: Tensor, *, unit: str, num_ids: int | None = None) -> TensorSpec:
    row = x.shape[2:] if layout is Layout.PER_STEP else x.shape[1:]
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in get_args(DType):
        raise ConversionError(f"{name!r} is {dtype}: use one of {', '.join(get_args(DType))}")
    return TensorSpec.model_validate(
        {"name": name, "dtype": dtype, "row_shape": tuple(row), "layout": layout, "unit": unit, "num_ids": num_ids}
    )


def _draw(plan: Plan, inputs: list[Tensor], layers: list[Recurrent]) -> Draw:
    """Draw as the example is spread, each element of a row by itself."""
    is_rectified = any(layer.options.activation == "relu" for layer in layers)
    by_name = {}
    for name, layout, x in zip(plan.inputs, plan.layouts, inputs, strict=True):
        lead = (0, 1) if layout is Layout.PER_STEP else (0,)
        values = x.numpy().astype(np.float64)
        spread = values.mean(axis=lead), values.std(axis=lead)
        by_name[name] = draw_like(*spread, non_negative_states=is_rectified)
    of_states = draw_like(np.zeros(()), np.ones(()), non_negative_states=is_rectified)

    def draw(rng: np.random.Generator, tensor: TensorSpec | StateSpec, shape: tuple[int, ...]) -> Array:
        return by_name.get(tensor.name, of_states)(rng, tensor, shape)

    return draw
