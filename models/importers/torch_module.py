"""From a plain torch module that holds nn.RNN, nn.LSTM or nn.GRU to a graph that a server can step.

The module's recurrent layers are replaced by ours, and everything else of its forward is traced as it is. What the
graph must be equal to is the module itself, untouched, asked for each sequence alone and without padding.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from models.errors import ConversionError
from models.graphs import Array, Draw, GraphModule, draw_like
from models.importers.packing import light_packing, names_within
from models.importers.torch_layers import (
    Carried,
    Recorded,
    Replaced,
    as_our_states,
    as_torch_states,
    num_states,
    specs_of,
)
from models.layers import Recurrent
from models.spec import DType, GraphSpec, Layout, StateSpec, TensorSpec

Example = Tensor | Sequence[Any] | Mapping[str, Any]
Kind = Literal["steps", "steps of time first", "sequence", "state"]

_CLOSE = 1e-4
"""How far answers may be apart while it is found out how a module reads padding; the gate is stricter."""
_PROBE = ((5, 3), (8, 2))
"""(rows, steps) more than the example's, at which it is seen which axes of outputs move."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a module is called, and what comes back."""

    inputs: tuple[str, ...]
    """Names of its arguments that are the graph's inputs."""
    layouts: tuple[Layout, ...]
    """Of each input."""
    lengths: str | None
    """Name of the argument that takes each row's length."""
    is_batch_first: bool
    """Whether per-step inputs are [batch, time, ...], or [time, batch, ...]."""
    order: tuple[str, ...]
    """Names of recurrent layers in the order of their calls."""
    outputs: tuple[str, ...] = ()
    """Names of what it answers, states left out."""
    kinds: tuple[Kind, ...] = ()
    """Of each thing that it returns, states too."""
    is_folded: bool = False
    """Whether an answer to a sequence is given at every step, to the steps so far."""

    def arguments(self, inputs: Sequence[Tensor], lengths: Tensor) -> dict[str, Tensor]:
        """Arrange batch-first inputs as the module takes them."""
        found = {
            name: x if self.is_batch_first or layout is not Layout.PER_STEP else x.transpose(0, 1)
            for name, layout, x in zip(self.inputs, self.layouts, inputs, strict=True)
        }
        return found | ({self.lengths: lengths.long()} if self.lengths else {})

    @property
    def answer_kinds(self) -> tuple[Kind, ...]:
        """Of each thing that it answers."""
        return tuple(kind for kind in self.kinds if kind != "state")

    def split(self, given: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor, Sequence[Tensor]]:
        """Tell the graph's inputs, lengths and states apart."""
        count = len(self.inputs)
        return given[:count], given[count], given[count + 1 :]

    def num_steps(self, inputs: Sequence[Tensor]) -> int:
        """Steps of batch-first inputs."""
        return next(x.shape[1] for x, each in zip(inputs, self.layouts, strict=True) if each is Layout.PER_STEP)

    def cut(self, inputs: Sequence[Tensor], start: int, end: int) -> list[Tensor]:
        """Take steps of batch-first inputs."""
        return [x[:, start:end] if each is Layout.PER_STEP else x for x, each in zip(inputs, self.layouts, strict=True)]

    def answers(self, returned: object, rows: int) -> list[Tensor]:
        """Take what a module returns apart, batch first and without its states."""
        found = []
        for kind, y in zip(self.kinds, (y for _, y in flattened(returned)), strict=True):
            if kind == "state":
                continue
            if kind == "sequence" and self.is_folded:
                y = y.reshape(-1, rows, *y.shape[1:]).transpose(0, 1)
            found.append(y.transpose(0, 1) if kind == "steps of time first" else y)
        return found


class Alone(nn.Module):
    """The module as it is, asked for each row alone, without padding: what every answer has to be equal to.

    forward takes the graph's inputs, lengths and states, and returns its outputs and next states. Where the plan has
    running answers, each row is given step by step, its states carried on.
    """

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.module = module
        self.plan = plan

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Answer row by row; padding of per-step answers is zero."""
        inputs, lengths, states = self.plan.split(given)
        steps = self.plan.num_steps(inputs)
        recorded = Recorded(self.module)
        rows = []
        for row, length in enumerate(lengths.tolist()):
            own = [x[row : row + 1] for x in inputs]
            first = [state[row : row + 1] for state in states]
            rows.append(self._row(recorded, own, length, steps, first))
        return tuple(torch.cat(column) for column in zip(*rows, strict=True))

    def _row(
        self, recorded: Recorded, inputs: list[Tensor], length: int, steps: int, states: list[Tensor]
    ) -> list[Tensor]:
        plan = self.plan
        if not plan.is_folded:
            answers, states = self._run(recorded, plan.cut(inputs, 0, length), length, states)
        else:
            by_step = []
            for step in range(length):
                found, states = self._run(recorded, plan.cut(inputs, step, step + 1), 1, states)
                by_step.append(found)
            answers = [torch.stack(each, dim=1) for each in zip(*by_step, strict=True)]
        per_step = [plan.is_folded or kind != "sequence" for kind in plan.answer_kinds]
        padded = [_padded(y, steps) if each else y for y, each in zip(answers, per_step, strict=True)]
        return padded + states

    def _run(
        self, recorded: Recorded, inputs: list[Tensor], length: int, states: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        plan = replace(self.plan, is_folded=False)
        first, at = {}, 0
        for name in plan.order:
            layer = recorded.layers[name]
            first[name] = as_torch_states(layer, states[at : at + num_states(layer)])
            at += num_states(layer)
        with recorded.given(first):
            returned = self.module(**plan.arguments(inputs, torch.tensor([length])))
        following = [state for call in recorded.calls for state in as_our_states(recorded.layers[call.name], call.last)]
        return plan.answers(returned, 1), following


class Traced(nn.Module):
    """The module with its recurrent layers replaced, ready for torch.onnx.export.

    forward takes the graph's inputs, lengths and states, and returns its outputs and next states.
    """

    def __init__(self, module: nn.Module, plan: Plan, *, repeats: bool) -> None:
        super().__init__()
        self.plan = plan
        self.code = names_within(module)
        self.module = copy.deepcopy(module)
        for name in plan.order:
            layer = self.module.get_submodule(name)
            replaced = Replaced(
                cast("nn.RNNBase", layer), folds=plan.is_folded and name == plan.order[-1], repeats=repeats
            )
            if name:
                self.module.set_submodule(name, replaced)
            else:
                self.module = replaced

    @property
    def recurrent(self) -> list[Recurrent]:
        """Its recurrent layers, in the order of their calls."""
        return [layer for each in self._replaced for layer in each.recurrent]

    @property
    def _replaced(self) -> list[Replaced]:
        found = [self.module.get_submodule(name) for name in self.plan.order]
        return [each for each in found if isinstance(each, Replaced)]

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Answer; see the class."""
        plan = self.plan
        inputs, lengths, states = plan.split(given)
        carried = Carried(lengths, list(states))
        for each in self._replaced:
            each.carried = carried
        with light_packing(self.code, lambda: 1 if plan.is_folded else plan.num_steps(inputs)):
            returned = self.module(**plan.arguments(inputs, lengths))
        return (*plan.answers(returned, lengths.shape[0]), *carried.following)


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
        plan, inputs = _read(original, example, lengths)
        plan, answers = _watch(original, plan, inputs, tuple(output_names))
        alone, traced, looks_ahead = _choose(original, plan, inputs)
        num_ids = _num_ids(original, plan, inputs)
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


def _read(module: nn.Module, example: Example, lengths: str) -> tuple[Plan, list[Tensor]]:
    """See how a module takes an example; returns that, and the graph's inputs, batch first."""
    signature = inspect.signature(module.forward)
    try:
        if isinstance(example, Mapping):
            bound = signature.bind(**example)
        else:
            bound = signature.bind(*((example,) if isinstance(example, Tensor) else example))
    except TypeError as error:
        raise ConversionError(f"the example does not fit forward{signature}: {error}") from error
    given = {name: value for name, value in bound.arguments.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ConversionError(f"argument {name!r} is {type(value).__name__}: give tensors, and fix all else before")
    recorded = Recorded(module)
    with recorded.given({}):
        module(**given)
    if not recorded.calls:
        raise ConversionError("the module calls no nn.RNN, nn.LSTM or nn.GRU with this example")
    steps, rows = recorded.calls[0].axes
    if steps == rows:
        raise ConversionError(f"the example has {rows} rows of {steps} steps: make these two numbers differ")
    for call in recorded.calls:
        if call.axes != (steps, rows):
            found = f"{call.name} reads {call.axes[1]} rows of {call.axes[0]} steps, another layer {rows} of {steps}"
            raise ConversionError(f"{found}: every recurrent layer has to read the sequence step by step")
    names, layouts, inputs, first = [], [], [], set[bool]()
    for name, x in given.items():
        if name == lengths:
            continue
        if tuple(x.shape[:2]) in ((rows, steps), (steps, rows)):
            first.add(x.shape[0] == rows)
            inputs.append(x if x.shape[0] == rows else x.transpose(0, 1))
            layouts.append(Layout.PER_STEP)
        elif x.shape[:1] == (rows,) and (x.ndim > 1 or x.is_floating_point() or lengths in given):
            inputs.append(x)
            layouts.append(Layout.PER_SEQUENCE)
        elif x.shape == (rows,):
            raise ConversionError(f"argument {name!r} looks like each row's length: say lengths={name!r}")
        else:
            raise ConversionError(
                f"argument {name!r} is {list(x.shape)}, for {rows} rows of {steps} steps: give it a batch axis"
            )
        names.append(name)
    if not first:
        raise ConversionError(
            f"recurrent layers read {rows} rows of {steps} steps, and no argument is [{rows}, {steps}, ...]: they have "
            "to read every step, and the longest row of an example has to be as long as its time axis"
        )
    if len(first) > 1:
        raise ConversionError("some arguments are [batch, time, ...], others [time, batch, ...]: take all in one order")
    plan = Plan(
        inputs=tuple(names),
        layouts=tuple(layouts),
        lengths=lengths if lengths in signature.parameters else None,
        is_batch_first=first == {True},
        order=tuple(call.name for call in recorded.calls),
    )
    return plan, inputs


def _watch(
    module: nn.Module, plan: Plan, inputs: list[Tensor], output_names: tuple[str, ...]
) -> tuple[Plan, list[Tensor]]:
    """See which axes of what a module returns move with rows and steps; returns that, and answers, batch first."""
    rows, steps = inputs[0].shape[0], plan.num_steps(inputs)
    sizes = [(rows, steps), (rows + 2, steps + 5)]
    recorded = Recorded(module)
    seen = []
    for size in sizes:
        with recorded.given({}):
            returned = module(**plan.arguments(_resized(plan, inputs, *size), torch.full(size[:1], size[1])))
        seen.append((size, flattened(returned)))
    last = [state for call in recorded.calls for state in call.last]
    kinds: list[Kind] = []
    keys: list[str] = []
    for (key, y), (_, z) in zip(*(found for _, found in seen), strict=True):
        kinds.append(_kind(key, y, z, sizes, last))
        if kinds[-1] != "state":
            keys.append(key)
    if not keys:
        raise ConversionError("the module returns nothing but states")
    names = output_names or (("y",) if len(keys) == 1 else tuple(keys))
    if len(names) != len(keys):
        raise ConversionError(f"{len(names)} output names for {len(keys)} outputs")
    plan = replace(plan, kinds=tuple(kinds), outputs=names)
    return plan, plan.answers(returned, sizes[1][0])


def _kind(key: str, y: Tensor, z: Tensor, sizes: list[tuple[int, int]], last: list[Tensor]) -> Kind:
    """Tell what an output is by its shapes at two sizes, (rows, steps) each; z is the one at the second."""
    (rows, steps), (more_rows, more_steps) = sizes
    at = [
        "batch" if (a, b) == (rows, more_rows) else "time" if (a, b) == (steps, more_steps) else "" if a == b else "?"
        for a, b in zip(y.shape, z.shape, strict=True)
    ]
    if not any(at[2:]):
        if at[:2] == ["batch", "time"]:
            return "steps"
        if at[:2] == ["time", "batch"]:
            return "steps of time first"
        if at[:1] == ["batch"] and not any(at[1:]):
            return "sequence"
        if at[:2] == ["", "batch"] and any(torch.equal(z, state) for state in last if state.shape == z.shape):
            return "state"
    raise ConversionError(
        f"output {key!r} is {list(z.shape)} for {more_rows} rows of {more_steps} steps: [batch, time, ...], "
        "[time, batch, ...], [batch, ...] and the layers' own states are understood"
    )


def _choose(module: nn.Module, plan: Plan, inputs: list[Tensor]) -> tuple[Alone, Traced, bool]:
    """Find out how the module has to be traced so that padding changes no answer.

    Returns (what is right, what is traced, whether it reads steps to come beside its recurrent layers).
    """
    case = _ragged(module, plan, inputs)
    alone = Alone(module, plan)
    expected = alone(*case)
    is_causal = not any(layer.bidirectional for layer in Recorded(module).layers.values())
    looks_ahead = is_causal and not _carries_on(alone, case, expected)
    ways = [(False, False), (False, True)]
    if is_causal and not looks_ahead and set(plan.answer_kinds) == {"sequence"}:
        ways.insert(0, (True, False))
    faults = []
    for is_folded, repeats in ways:
        way = replace(plan, is_folded=is_folded)
        traced = Traced(module, way, repeats=repeats)
        right = Alone(module, way) if is_folded else alone
        try:
            found = traced(*case)
        except ConversionError:
            raise
        except Exception as error:  # noqa: BLE001  whatever a module raises that was made for other shapes
            faults.append(f"it fails with {type(error).__name__}: {error}")
            continue
        name, gap = _worst(way, found, right(*case) if is_folded else expected, case)
        if gap <= _CLOSE:
            return right, traced, looks_ahead
        faults.append(f"{name} is off by {gap:.2g}")
    hint = (
        "rows of a batch are padded: let forward take lengths and pack by them, pack_padded_sequence(..., lengths, "
        "enforce_sorted=False), or mask by them, and sort no rows"
    )
    raise ConversionError(f"the module answers a row beside longer ones not as alone ({faults[-1]}): {hint}")


def _ragged(module: nn.Module, plan: Plan, inputs: list[Tensor]) -> list[Tensor]:
    """Make a ragged batch of an example, with states: what a graph is given."""
    rows, steps = 4, 7
    lengths = torch.tensor([steps, 3, 5, 1], dtype=torch.int32)
    layers = Recorded(module).layers
    shapes = [
        (rows, 2 if layers[name].bidirectional else 1, layers[name].hidden_size)
        for name in plan.order
        for _ in range(num_states(layers[name]))
    ]
    generator = torch.Generator().manual_seed(0)
    states = [torch.rand(shape, generator=generator) for shape in shapes]
    return [*_resized(plan, inputs, rows, steps), lengths, *states]


def _carries_on(alone: Alone, case: list[Tensor], expected: tuple[Tensor, ...]) -> bool:
    """Whether a row that is cut in two is answered as it is whole, its states carried on."""
    plan = alone.plan
    inputs, _, states = plan.split(case)
    cut, steps = 3, plan.num_steps(inputs)
    rows = [0]  # the only one that is as long as the batch
    inputs = [x[rows] for x in inputs]
    count = len(plan.outputs)
    first = alone(*plan.cut(inputs, 0, cut), torch.tensor([cut]), *(state[rows] for state in states))
    second = alone(*plan.cut(inputs, cut, steps), torch.tensor([steps - cut]), *first[count:])
    for number, kind in enumerate(plan.answer_kinds):
        whole, parts = expected[number][rows], second[number]
        if kind != "sequence":
            parts = torch.cat([first[number], parts], dim=1)
        if not torch.allclose(whole.double(), parts.double(), atol=_CLOSE, rtol=_CLOSE):
            return False
    return True


def _worst(
    plan: Plan, found: tuple[Tensor, ...], expected: tuple[Tensor, ...], case: list[Tensor]
) -> tuple[str, float]:
    """Name the output that is furthest from what is right, and how far; padding is not compared."""
    _, lengths, _ = plan.split(case)
    gaps: dict[str, float] = {}
    for number, (y, z) in enumerate(zip(found, expected, strict=True)):
        name = repr(plan.outputs[number]) if number < len(plan.outputs) else "a state"
        if y.shape != z.shape:
            return name, float("inf")
        is_per_step = number < len(plan.outputs) and (plan.is_folded or plan.answer_kinds[number] != "sequence")
        ends = lengths.tolist() if is_per_step else [None] * len(lengths)
        gap = max(float((a[:n].double() - b[:n].double()).abs().max()) for a, b, n in zip(y, z, ends, strict=True))
        gaps[name] = max(gaps.get(name, 0.0), gap if math.isfinite(gap) else float("inf"))
    return max(gaps.items(), key=lambda each: each[1])


def _num_ids(module: nn.Module, plan: Plan, inputs: list[Tensor]) -> list[int | None]:
    """Read from the embeddings that ids go to how many of them there are."""
    looked_up: list[tuple[Tensor, int]] = []
    hooks = [
        each.register_forward_pre_hook(lambda layer, args: looked_up.append((args[0], layer.num_embeddings)))
        for each in module.modules()
        if isinstance(each, nn.Embedding)
    ]
    module(**plan.arguments(inputs, torch.full((inputs[0].shape[0],), plan.num_steps(inputs))))
    for hook in hooks:
        hook.remove()
    found: list[int | None] = []
    for name, x in zip(plan.inputs, inputs, strict=True):
        sizes = [n for ids, n in looked_up if ids.numel() == x.numel() and _same_values(ids, x)]
        if not x.is_floating_point() and not sizes:
            raise ConversionError(f"input {name!r} is {x.dtype}, and no nn.Embedding looks it up: make it float32")
        found.append(None if x.is_floating_point() else min(sizes))
    return found


def _same_values(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.flatten().sort().values, b.flatten().sort().values)


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


def _resized(plan: Plan, inputs: Sequence[Tensor], rows: int, steps: int) -> list[Tensor]:
    """Make an example of another size, of its own rows and steps."""
    found = []
    for x, layout in zip(inputs, plan.layouts, strict=True):
        x = x[torch.arange(rows) % x.shape[0]]
        found.append(x[:, torch.arange(steps) % x.shape[1]] if layout is Layout.PER_STEP else x)
    return found


def _padded(y: Tensor, steps: int) -> Tensor:
    """Fill [1, length, ...] up with zeros to [1, steps, ...]."""
    return torch.cat([y, y.new_zeros(1, steps - y.shape[1], *y.shape[2:])], dim=1)


def flattened(returned: object, key: str = "") -> list[tuple[str, Tensor]]:
    """Take what a module returns apart; returns its tensors with the place of each, such as "y1" or a dict's key."""
    if isinstance(returned, Tensor):
        return [(key or "y", returned)]
    if isinstance(returned, Mapping):
        return [each for name, value in returned.items() for each in flattened(value, f"{key}.{name}".lstrip("."))]
    if isinstance(returned, tuple | list):
        return [each for place, value in enumerate(returned) for each in flattened(value, f"{key or 'y'}{place}")]
    raise ConversionError(f"the module returns {type(returned).__name__}: return tensors, in a tuple or dict if many")
