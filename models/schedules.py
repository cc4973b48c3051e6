"""Learning rates, a function of where a run is, so that one that is resumed goes on as if it had never stopped."""

from __future__ import annotations

import math
from collections.abc import Sequence

from models.recipe import Recipe

ONECYCLE_RISE = 0.3
"""Share of the steps in which a one-cycle schedule rises, unless the recipe has a warm-up."""
ONECYCLE_START, ONECYCLE_END = 1 / 25, 1 / 25e4
"""Its first and last learning rate, as shares of the highest (those of torch.optim.lr_scheduler.OneCycleLR)."""
PLATEAU_FACTOR = 0.5
"""What the learning rate is multiplied by on a plateau."""


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int, losses: Sequence[float]) -> float:
    """Compute the learning rate of a step of the optimiser.

    step    steps done before it, since the run began
    losses  validation losses of the epochs done
    """
    last = recipe.epochs * steps_per_epoch - 1
    warm = recipe.warmup * steps_per_epoch
    if recipe.schedule == "onecycle":
        # As torch's: the peak is at the last step of the rise.
        peak = max((warm or ONECYCLE_RISE * (last + 1)) - 1, 0.0)
        if step <= peak:
            return recipe.lr * _between(ONECYCLE_START, 1.0, step / peak if peak else 1.0)
        return recipe.lr * _between(1.0, ONECYCLE_END, (step - peak) / (last - peak))
    share = min((step + 1) / warm, 1.0) if warm else 1.0
    if recipe.schedule == "cosine":
        share *= _between(1.0, 0.0, max(step - warm, 0) / max(last + 1 - warm, 1))
    if recipe.schedule == "plateau":
        share *= PLATEAU_FACTOR ** _plateaus(losses, recipe.plateau_patience)
    return recipe.lr * share


def _between(start: float, end: float, progress: float) -> float:
    """Go from start to end on half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _plateaus(losses: Sequence[float], patience: int) -> int:
    """Count how often more than `patience` epochs in a row brought nothing."""
    best, waited, count = math.inf, 0, 0
    for loss in losses:
        if loss < best:
            best, waited = loss, 0
        else:
            waited += 1
        if waited > patience:
            waited, count = 0, count + 1
    return count
