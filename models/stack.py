"""Recurrent layers on one another, between whatever a net has before and after them."""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import numpy as np
from torch import Tensor, nn

from models.activations import NON_NEGATIVE
from models.graphs import Draw, draw_like
from models.layers import STATES, Array, Recurrent
from models.recipe import Recipe
from models.spec import LayerSpec, StateSpec

Module = TypeVar("Module", bound=nn.Module)


class Stack(nn.Module):
    """Recurrent layers of one cell and size, with dropout between them. Time-major; states are batch-first."""

    def __init__(self, recipe: Recipe, inputs: int, *, bidirectional: bool = False) -> None:
        """Make the layers of a recipe; inputs is the width of what the first one reads."""
        super().__init__()
        self.cell, self.hidden, self.activation = recipe.cell, recipe.hidden, recipe.activation
        self.directions = 2 if bidirectional else 1
        self.layers = nn.ModuleList()
        for _ in range(recipe.layers):
            layer = Recurrent(recipe.cell, inputs, recipe.hidden, bidirectional=bidirectional, options=recipe.options)
            self.layers.append(layer)
            inputs = layer.width
        self.width = inputs
        """Width of a step's output."""
        self.dropout = nn.Dropout(recipe.output_dropout)

    @property
    def recurrent(self) -> list[Recurrent]:
        """The layers, first to last."""
        return cast("list[Recurrent]", list(self.layers))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of all states, in order, such as "0.h": layer and state."""
        return tuple(f"{number}.{kind}" for number in range(len(self.layers)) for kind in STATES[self.cell])

    def forward(self, steps: Tensor, lengths: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run every row over its own length.

        steps    [time, batch, inputs]
        lengths  [batch] int, from 1 to time
        states   in the order of kinds, each [batch, directions, hidden]
        Returns (steps [time, batch, width], next states). Rows past a row's length are padding.
        """
        each = len(STATES[self.cell])
        following: tuple[Tensor, ...] = ()
        for number, layer in enumerate(self.recurrent):
            steps, last = layer(self._between(steps, number), lengths, states[number * each : (number + 1) * each])
            following += last
        return steps, following

    def outputs(self, steps: Tensor, lengths: Tensor, states: tuple[Tensor, ...] = ()) -> Tensor:
        """Run for the outputs alone, as training does: see Recurrent.outputs."""
        each = len(STATES[self.cell])
        for number, layer in enumerate(self.recurrent):
            first = states[number * each : (number + 1) * each]
            steps = layer.outputs(self._between(steps, number), lengths, first)
        return steps

    def zero_states(self, like: Tensor) -> tuple[Tensor, ...]:
        """States that a sequence begins with, for as many rows as a tensor [batch, ...] has."""
        weight = next(self.parameters())
        return (weight.new_zeros(len(like), self.directions, self.hidden),) * len(self.kinds)

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """Describe the layers."""
        return tuple(layer.spec for layer in self.recurrent)

    def state_specs(self, initial: str = "") -> tuple[StateSpec, ...]:
        """Describe the states; with a prefix, they begin with an encoder's outputs of that prefix."""
        shape = (self.directions, self.hidden)
        return tuple(
            StateSpec(
                name=f"state.{kind}",
                next_name=f"state.{kind}.next",
                row_shape=shape,
                initial=f"{initial}.{kind}" if initial else "",
            )
            for kind in self.kinds
        )

    def draw(self, mean: float | Array = 0.0, scale: float | Array = 1.0) -> Draw:
        """Draw inputs of a mean and spread, and states that the cell can have."""
        return draw_like(np.asarray(mean), np.asarray(scale), non_negative_states=self.activation in NON_NEGATIVE)

    def _between(self, steps: Tensor, number: int) -> Tensor:
        return self.dropout(steps) if number else steps


def frozen(net: Module) -> Module:
    """Copy a net to the CPU, ready to be traced: its operators' weights are fixed as they are now."""
    net = copy.deepcopy(net).cpu().eval()
    for layer in net.modules():
        if isinstance(layer, Recurrent):
            layer.freeze()
    return net
