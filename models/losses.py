"""Batches of sequences, what a net loses on them, and how it is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.compute import Compute
from models.mixed import MixedNet, Net
from models.recipe import Recipe
from models.tasks import Split, Task
from models.tasks.base import Array, pad

EVALUATION_BATCH = 256
"""Sequences evaluated at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Sequences of a split, padded, on a device."""

    x: Tensor
    """[batch, time, features]."""
    ids: Tensor
    """[batch, time, categories] int64."""
    lengths: Tensor
    """[batch] int32."""
    targets: Tensor
    """Of one answer: classes [batch] int64 or values [batch, outputs]; else of every step, [sum(lengths), ...]."""


def training_loss(net: Net, task: Task, recipe: Recipe, compute: Compute, numbers: Sequence[int]) -> Tensor:
    """Compute what a step of the optimiser descends, [], of some training sequences."""
    batch = gather(task, task.train, numbers, compute.device)
    x = _disturb(net, recipe, batch.x)
    with compute.autocast():
        scores = score(net, batch, x)
    # Losses and what they are made of are sums of many small numbers: always in float32.
    scores = scores.float()
    loss = final_losses(net, task, scores, batch).mean()
    running = running_losses(net, task, scores, batch)
    return loss if running is None else loss + recipe.step_loss * running.mean()


def gather(task: Task, split: Split, numbers: Sequence[int], device: torch.device) -> Batch:
    """Take sequences of a split."""
    asked = [split.targets[n] for n in numbers]
    targets = np.stack(asked) if task.one_answer else np.concatenate(asked)
    lengths = torch.tensor([len(split.inputs[n]) for n in numbers], dtype=torch.int32)
    x = torch.from_numpy(pad([split.inputs[n] for n in numbers]))
    no_ids = torch.zeros(*x.shape[:2], 0, dtype=torch.int64)
    ids = torch.from_numpy(pad([split.ids[n] for n in numbers])) if split.ids else no_ids
    return Batch(x.to(device), ids.to(device), lengths.to(device), torch.from_numpy(targets).to(device))


def score(net: Net, batch: Batch, x: Tensor) -> Tensor:
    """What a net answers to a batch whose numbers are x, before the softmax: see RecurrentNet.scores."""
    if isinstance(net, MixedNet):
        return net.scores(x, batch.ids, batch.lengths)
    return net.scores(x, batch.lengths)


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """Losses one by one, and what each weighs."""

    values: Tensor
    """[n] cross-entropies, or Huber losses in units of output_scale."""
    weights: Tensor | None
    """[n]; None where all weigh the same."""

    def mean(self) -> Tensor:
        """The weighted mean, []."""
        return self.values.mean() if self.weights is None else self.total() / self.weight()

    def total(self) -> Tensor:
        """The weighted sum, []."""
        return self.values.sum() if self.weights is None else (self.values * self.weights).sum()

    def weight(self) -> Tensor | int:
        """The sum of the weights."""
        return len(self.values) if self.weights is None else self.weights.sum()


def final_losses(net: Net, task: Task, scores: Tensor, batch: Batch) -> Losses:
    """Compute the losses of final answers: one per sequence, or one per step."""
    answers = _final(net, scores, batch.lengths) if net.config.one_answer else scores[_within(scores, batch.lengths)]
    return _losses(net, task, answers, batch.targets)


def running_losses(net: Net, task: Task, scores: Tensor, batch: Batch) -> Losses | None:
    """Compute the losses of the running answers of a net with one answer; None where it has none."""
    if not net.config.one_answer or net.config.is_per_sequence:
        return None
    answers = scores[_within(scores, batch.lengths)]
    return _losses(net, task, answers, batch.targets.repeat_interleave(batch.lengths.long(), dim=0))


def evaluate(net: Net, task: Task, split: Split) -> dict[str, float]:
    """Compute the loss and the task's metrics of final answers over a split, in float32, where the net is."""
    net.eval()
    device = net.input_mean.device
    answers: list[Array] = []
    total = weight = 0.0
    with torch.no_grad():
        for start in range(0, len(split), EVALUATION_BATCH):
            numbers = range(start, min(start + EVALUATION_BATCH, len(split)))
            batch = gather(task, split, numbers, device)
            scores = score(net, batch, batch.x)
            losses = final_losses(net, task, scores, batch)
            total += float(losses.total())
            weight += float(losses.weight())
            answers += _final_answers(net, scores, batch.lengths)
    return {"loss": total / weight, **task.judge(split, answers)}


def _disturb(net: Net, recipe: Recipe, x: Tensor) -> Tensor:
    """Add the recipe's noise and shift to a batch, [batch, time, features]."""
    if recipe.noise:
        x = x + recipe.noise * net.input_scale * torch.randn_like(x)
    if recipe.shift:
        x = x + recipe.shift * net.input_scale * torch.randn_like(x[:, :1])
    return x


def _losses(net: Net, task: Task, answers: Tensor, targets: Tensor) -> Losses:
    """Compare answers [n, outputs] with classes [n] or values [n, outputs]."""
    if not net.config.is_classifier:
        errors = (answers - targets) / net.output_scale
        values = nn.functional.huber_loss(errors, torch.zeros_like(errors), reduction="none").mean(dim=1)
        return Losses(values, None)
    values = nn.functional.cross_entropy(answers, targets, reduction="none")
    weights = torch.tensor(task.class_weights, device=targets.device)[targets] if task.class_weights else None
    return Losses(values, weights)


def _final_answers(net: Net, scores: Tensor, lengths: Tensor) -> list[Array]:
    """Cut out each sequence's final answer: [outputs] of one answer, else [length, outputs]."""
    if net.config.one_answer:
        final = _final(net, scores, lengths)
        return list((final.softmax(-1) if net.config.is_classifier else final).cpu().numpy())
    return [row[:length].numpy() for row, length in zip(scores.cpu(), lengths.tolist(), strict=True)]


def _final(net: Net, scores: Tensor, lengths: Tensor) -> Tensor:
    """Scores of the final answers of a net with one, [batch, outputs]."""
    if net.config.is_per_sequence:
        return scores
    return scores[torch.arange(len(lengths), device=scores.device), lengths.long() - 1]


def _within(scores: Tensor, lengths: Tensor) -> Tensor:
    """Which steps are not padding, [batch, time]."""
    return torch.arange(scores.shape[1], device=scores.device) < lengths[:, None]
