"""Nets for tasks with categories: each id becomes a vector beside the numbers, within the exported graph."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from models import nets
from models.graphs import GraphModule
from models.layers import Recurrent
from models.nets import NetConfig, RecurrentNet
from models.recipe import Recipe
from models.tasks.base import AnyTask, Categorical, Task


class MixedNet(nn.Module):
    """A recurrent net behind tables of categories.

    Its contract is that of RecurrentNet with more inputs: (x [batch, time, features] unless every feature is a
    category, ids [batch, time] int64 of each category, lengths [batch] int32, *states) -> (y, *next states).
    """

    def __init__(self, core: RecurrentNet, num_features: int, categorical: Sequence[Categorical]) -> None:
        """Put tables before a core that is as wide as the numbers and the vectors together."""
        super().__init__()
        self.core = core
        self.num_features = num_features
        self.num_ids = {each.spec.name: each.spec.num_ids or 0 for each in categorical}
        self.tables = nn.ModuleList(map(_table, categorical))

    @property
    def config(self) -> NetConfig:
        """Shape of the recurrent net."""
        return self.core.config

    @property
    def recurrent(self) -> list[Recurrent]:
        """The recurrent layers, first to last."""
        return self.core.recurrent

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the states, in the order that `forward` takes and returns them."""
        return self.core.state_names

    @property
    def state_shape(self) -> tuple[int, int]:
        """(directions, hidden) of every state."""
        return self.core.state_shape

    @property
    def num_parameters(self) -> int:
        """Trained parameters; a one-hot table is none."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def input_mean(self) -> Tensor:
        """Mean of the numbers, [features]."""
        return self.core.input_mean[: self.num_features]

    @property
    def input_scale(self) -> Tensor:
        """Spread of the numbers, [features]."""
        return self.core.input_scale[: self.num_features]

    @property
    def output_scale(self) -> Tensor:
        """Spread of the answers, [outputs]."""
        return self.core.output_scale

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Answer, and carry the states on; see the class for the inputs."""
        num_x = min(self.num_features, 1)
        lengths_at = num_x + len(self.tables)
        joined = self.join(inputs[:num_x], inputs[num_x:lengths_at])
        answers: tuple[Tensor, ...] = self.core(joined, *inputs[lengths_at:])
        return answers

    def scores(self, x: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """What training compares with targets; x [batch, time, features], ids [batch, time, categories]."""
        return self.core.scores(self.join([x], ids.unbind(-1)), lengths)

    def join(self, numbers: Sequence[Tensor], ids: Sequence[Tensor]) -> Tensor:
        """Put numbers and the vectors of ids side by side, [batch, time, width]."""
        tables = cast("list[nn.Embedding]", list(self.tables))
        vectors = [table(each) for table, each in zip(tables, ids, strict=True)]
        return torch.cat([*numbers, *vectors], dim=-1)

    def for_export(self) -> MixedNet:
        """Copy the net, its core's scaling folded, ready for torch.onnx.export."""
        net = copy.deepcopy(self).cpu().eval()
        net.core = self.core.for_export()
        return net

    def graphs(self, task: AnyTask) -> list[GraphModule]:
        """Describe the graph that this net becomes."""
        ready, spec = self.for_export(), self.core.graph_spec(task)
        return [GraphModule(module=self, ready=ready, spec=spec, draw=self.core.draw(self.num_features))]


Net = RecurrentNet | MixedNet


def _table(categorical: Categorical) -> nn.Embedding:
    """Make the table of one category; the vector of id 0, any other value, is zeros unless it is trained on."""
    rows = categorical.spec.num_ids or 0
    table = nn.Embedding(rows, categorical.width)
    with torch.no_grad():
        table.weight[0] = 0.0
        if categorical.encoding == "one-hot":
            table.weight[1:] = torch.eye(rows - 1)
            table.weight.requires_grad = False
    return table


def build(task: Task, recipe: Recipe) -> Net:
    """Make an untrained net for a task, its scaling measured on the training split.

    Raises RecipeError when the recipe does not fit the task.
    """
    core = nets.build(task, recipe)
    return MixedNet(core, task.num_features, task.categorical) if task.categorical else core
