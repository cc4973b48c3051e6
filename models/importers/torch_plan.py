"""A plain torch module as it is, and as it is traced: what both are called with, and what comes back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from models.errors import ConversionError
from models.importers.packing import light_packing, names_within
from models.importers.torch_layers import Carried, Recorded, Replaced, as_our_states, as_torch_states, num_states
from models.layers import Recurrent
from models.spec import Layout

Kind = Literal["steps", "steps of time first", "sequence", "state"]


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
