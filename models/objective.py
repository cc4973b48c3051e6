"""What training does with a task: the net it builds, the batches and losses it descends, how it judges."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from models import losses, mixed, teaching
from models.compute import Compute
from models.errors import RecipeError
from models.generators import CurveNet, TextNet
from models.recipe import Recipe
from models.seq2seq import EncoderDecoder
from models.tasks import AnyTask, CurveTask, GenerationTask, Task, TextTask, TransductionTask
from models.tasks.generating import TokenTask
from models.teaching import GeneratorNet

Net = mixed.Net | GeneratorNet
"""Of the kind that `build` makes for a task."""


def build(task: AnyTask, recipe: Recipe) -> Net:
    """Make an untrained net for a task, what it scales by measured on the training split.

    Raises RecipeError when the recipe does not fit the task.
    """
    _check(task, recipe)
    if isinstance(task, CurveTask):
        return CurveNet(task, recipe)
    if isinstance(task, TextTask):
        return TextNet(task, recipe)
    if isinstance(task, TransductionTask):
        return EncoderDecoder(task, recipe)
    return mixed.build(cast("Task", task), recipe)


def epoch_batches(task: AnyTask, size: int) -> list[list[int]]:
    """Put the training sequences, by number, into the batches of an epoch, by torch's random state."""
    if isinstance(task, GenerationTask):
        return teaching.epoch_batches(task.train, size)
    order = torch.randperm(len(task.train)).tolist()
    return [order[start : start + size] for start in range(0, len(order), size)]


def training_loss(net: Net, task: AnyTask, recipe: Recipe, compute: Compute, numbers: list[int]) -> Tensor:
    """Compute what a step of the optimiser descends, [], of some training sequences."""
    if isinstance(task, GenerationTask):
        return teaching.training_loss(cast("GeneratorNet", net), task, compute, numbers)
    return losses.training_loss(cast("mixed.Net", net), cast("Task", task), recipe, compute, numbers)


def evaluate(net: Net, task: AnyTask, split: Any) -> dict[str, float]:
    """Compute the loss and the task's metrics over one of its splits, in float32, where the net is."""
    if isinstance(task, GenerationTask):
        return teaching.evaluate(cast("GeneratorNet", net), task, split)
    return losses.evaluate(cast("mixed.Net", net), cast("Task", task), split)


def answers_for_people(net: Net, task: AnyTask) -> list[str]:
    """Write down a few answers of a net that generates text; none of any other."""
    if isinstance(task, GenerationTask):
        return teaching.answers_for_people(cast("GeneratorNet", net), task)
    return []


def _check(task: AnyTask, recipe: Recipe) -> None:
    """Refuse settings that the task has no use for. Raises RecipeError."""
    is_of_ids, reads_source = isinstance(task, TokenTask), isinstance(task, TransductionTask)
    if is_of_ids and not recipe.embedding:
        raise RecipeError(f"embedding 0: {task.name} is made of ids, which need vectors, of 32 elements for example")
    if recipe.embedding and not is_of_ids:
        raise RecipeError(f"embedding {recipe.embedding} is for tasks that generate ids, and {task.name} does not")
    if recipe.attention and not reads_source:
        raise RecipeError(f"attention is for decoders that look back at a source, and {task.name} has none")
    if not isinstance(task, GenerationTask):
        return
    if recipe.bidirectional and not reads_source:
        raise RecipeError(f"{task.name} cannot be bidirectional: its steps are made one after another")
    if unused := [name for name in ("conv_filters", "go_backwards", "unroll") if getattr(recipe, name)]:
        raise RecipeError(f"{unused[0]} does not go with {task.name}: its steps are made one after another")
    if unused := [name for name in ("noise", "shift", "step_loss") if getattr(recipe, name)]:
        raise RecipeError(f"{unused[0]} is for tasks whose every step is given, and {task.name} generates its own")
