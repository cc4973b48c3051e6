"""How a plain torch module takes an example, which axes move, what padding does: found out by running it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import ConversionError
from models.importers.torch_layers import Recorded, num_states
from models.importers.torch_plan import Alone, Kind, Plan, Traced, flattened
from models.spec import Layout

Example = Tensor | Sequence[Any] | Mapping[str, Any]

_CLOSE = 1e-4
"""How far answers may be apart while it is found out how a module reads padding; the gate is stricter."""


def read_example(module: nn.Module, example: Example, lengths: str) -> tuple[Plan, list[Tensor]]:
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
        given[name] = value.detach().cpu()
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


def watch(
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


def choose(module: nn.Module, plan: Plan, inputs: list[Tensor]) -> tuple[Alone, Traced, bool]:
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


def count_ids(module: nn.Module, plan: Plan, inputs: list[Tensor]) -> list[int | None]:
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


def _resized(plan: Plan, inputs: Sequence[Tensor], rows: int, steps: int) -> list[Tensor]:
    """Make an example of another size, of its own rows and steps."""
    found = []
    for x, layout in zip(inputs, plan.layouts, strict=True):
        x = x[torch.arange(rows) % x.shape[0]]
        found.append(x[:, torch.arange(steps) % x.shape[1]] if layout is Layout.PER_STEP else x)
    return found
