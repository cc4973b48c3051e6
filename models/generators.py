"""Nets of one graph that make their outputs one after another (one-to-many)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from models.graphs import GraphModule
from models.recipe import Recipe
from models.spec import GraphSpec
from models.stack import Stack, frozen
from models.tasks.base import AnyTask
from models.tasks.generating import CurveTask, TextTask


class CurveNet(nn.Module):
    """A curve from one input that every step shares, in raw units; the states alone tell steps apart.

    Source: keras.layers.RepeatVector before a recurrent layer and a TimeDistributed(Dense).
    """

    context_mean: Tensor
    context_scale: Tensor
    output_mean: Tensor
    output_scale: Tensor

    def __init__(self, task: CurveTask, recipe: Recipe) -> None:
        """Make an untrained net, its scaling measured on the training split."""
        super().__init__()
        self.stack = Stack(recipe, task.context.row_shape[0])
        self.dropout = nn.Dropout(recipe.output_dropout)
        self.head = nn.Linear(self.stack.width, task.output.row_shape[0])
        for name, values in task.scaling().items():
            self.register_buffer(name, torch.from_numpy(values))

    @property
    def num_parameters(self) -> int:
        """Trained parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def forward(self, context: Tensor, lengths: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Unroll the next steps of every curve.

        context  [batch, features] float32, raw units
        lengths  [batch] int32, steps to unroll
        states   each [batch, 1, hidden]; those returned go on with the curve
        Returns (y [batch, max(lengths), outputs], *next states).
        """
        # No int() around it: while tracing, it is a symbol.
        num_steps = cast("int", lengths.max().item())
        steps, following = self.stack(self._steps(context, num_steps), lengths, states)
        return (self._answer(steps), *following)

    def scores(self, context: Tensor, lengths: Tensor) -> Tensor:
        """What training compares with targets: the curve from its beginning, [batch, max(lengths), outputs]."""
        steps = self._steps(context, int(lengths.max()))
        return self._answer(self.dropout(self.stack.outputs(steps, lengths)))

    def graphs(self, task: AnyTask) -> list[GraphModule]:
        """Describe the graph that this net becomes."""
        spec = GraphSpec(
            layers=self.stack.layer_specs(),
            inputs=task.inputs,
            outputs=(task.output,),
            states=self.stack.state_specs(),
        )
        draw = self.stack.draw(self.context_mean.numpy(), self.context_scale.numpy())
        return [GraphModule(module=self, ready=frozen(self), spec=spec, draw=draw)]

    def _steps(self, context: Tensor, num_steps: int) -> Tensor:
        scaled = (context - self.context_mean) / self.context_scale
        return scaled.unsqueeze(0).expand(num_steps, -1, -1)

    def _answer(self, steps: Tensor) -> Tensor:
        answer: Tensor = self.head(steps).transpose(0, 1)
        return answer * self.output_scale + self.output_mean


class TextNet(nn.Module):
    """The next id from those before it: a table of vectors, recurrent layers, a head."""

    def __init__(self, task: TextTask, recipe: Recipe) -> None:
        """Make an untrained net."""
        super().__init__()
        num_ids = len(task.vocabulary)
        self.table = nn.Embedding(num_ids, recipe.embedding)
        self.dropout = nn.Dropout(recipe.output_dropout)
        self.stack = Stack(recipe, recipe.embedding)
        self.head = nn.Linear(self.stack.width, num_ids)

    @property
    def num_parameters(self) -> int:
        """Trained parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def forward(self, token: Tensor, lengths: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Foretell the id after each.

        token    [batch, time] int64, the ids that were chosen last: one, or all of a prompt
        lengths  [batch] int32, from 1 to time
        states   each [batch, 1, hidden]
        Returns (log_probs [batch, time, ids], *next states).
        """
        steps, following = self.stack(self.table(token).transpose(0, 1), lengths, states)
        return (self.head(steps).transpose(0, 1).log_softmax(-1), *following)

    def scores(self, token: Tensor, lengths: Tensor) -> Tensor:
        """What training compares with targets: `forward` from zero states before the softmax, [batch, time, ids]."""
        steps = self.stack.outputs(self.dropout(self.table(token)).transpose(0, 1), lengths)
        scores: Tensor = self.head(self.dropout(steps)).transpose(0, 1)
        return scores

    @torch.no_grad()
    def sample(self, prompt: Tensor, task: TextTask, generator: torch.Generator) -> Tensor:
        """Go on from a prompt [length] int64 with ids drawn by their probabilities, [length] int64, to the end."""
        token, states = prompt[None], self.stack.zero_states(prompt[None])
        made: list[Tensor] = []
        while len(made) < task.generation.max_steps:
            log_probs, *following = self(token, torch.tensor([token.shape[1]], dtype=torch.int32), *states)
            states = tuple(following)
            token = torch.multinomial(log_probs[:, -1].exp(), 1, generator=generator)
            if int(token) == task.end_id:
                break
            made.append(token[0])
        return torch.cat(made) if made else token.new_zeros(0)

    def graphs(self, task: AnyTask) -> list[GraphModule]:
        """Describe the graph that this net becomes."""
        spec = GraphSpec(
            layers=self.stack.layer_specs(),
            inputs=task.inputs,
            outputs=(task.output,),
            states=self.stack.state_specs(),
        )
        return [GraphModule(module=self, ready=frozen(self), spec=spec, draw=self.stack.draw())]
