"""Train a net on a task; `python -m models.train` is `rnnserve train`.

A run is a chain of epochs. Each starts from last.pt alone (weights, optimiser, random state, history), so a run that
was interrupted and resumed has the same weights, bit for bit, as one that never was. The epoch with the least
validation loss is kept; the test split is looked at once, when the run is over.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models import tasks
from models.board import Board
from models.compute import Compute
from models.config import RunConfig
from models.curves import draw
from models.errors import RunError
from models.layers import constrain, penalty
from models.objective import Net, answers_for_people, build, epoch_batches, evaluate, training_loss
from models.recipe import Recipe
from models.runs import Row, Run, versions, write_whole
from models.schedules import learning_rate
from models.tasks import AnyTask, Task

EPOCH_BAR_DELAY_S = 2.0
"""Seconds after which an epoch has a progress bar of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended."""

    run: Run
    is_finished: bool
    """False when it was interrupted; it can be resumed then."""
    metrics: dict[str, Any]
    """What metrics.json holds."""


@dataclass(slots=True)
class Progress:
    """Where a run is: all that the next epoch depends on, besides weights, optimiser and random state."""

    history: list[Row] = field(default_factory=list)
    """A row per epoch that is done."""
    best_epoch: int = 0
    best_loss: float = float("inf")
    best_net: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)


def train(
    task: AnyTask,
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    show_progress: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
    tensorboard: Path | None = None,
) -> Outcome:
    """Train, or go on with a run that was interrupted, and write the run's directory.

    tensorboard  directory to log to for TensorBoard too
    should_stop is asked after every batch; once it says yes, or on Ctrl-C, the epoch under way is given up and the best
    so far kept. The caller's random state and threads are left as they were.
    Raises RunError when the directory is taken, or cannot be resumed or written; RecipeError when recipe and task
    don't fit, or the device is not there; MissingExtra without TensorBoard where it is asked for.
    """
    run, compute = Run(out), Compute(recipe)
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        with (
            torch.random.fork_rng(devices=compute.devices),
            _interrupts() as interrupted,
            Board(tensorboard and tensorboard / out.name) as board,
        ):
            torch.manual_seed(recipe.seed)
            net = build(task, recipe).to(compute.device)
            trainer = _Trainer(task, recipe, net, run, compute, board)
            config = RunConfig.of(task, recipe, versions("torch", "numpy"))
            if resume:
                trainer.resume(config)
            else:
                run.create(config)
            is_finished = trainer.fit(show_progress, lambda: interrupted() or should_stop())
            return trainer.conclude(is_finished)
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error.strerror}") from error
    finally:
        torch.set_num_threads(threads)


def load_net(run: Run) -> tuple[AnyTask, Recipe, Net, dict[str, Any]]:
    """Load a run's best net: its task, recipe, the net in evaluation mode, and its validation metrics.

    The task of a data file of one's own comes without the data, which may be gone.
    Raises RunError, UnknownTask, RecipeError.
    """
    checkpoint = run.load(run.best)
    outline, recipe = checkpoint.get("outline"), Recipe.of(checkpoint["recipe"])
    task = Task.of_outline(outline) if outline else tasks.load(checkpoint["task"])
    net = build(task, recipe)
    try:
        net.load_state_dict(checkpoint["net"])
    except RuntimeError as error:
        raise RunError(f"{run.best} does not hold the weights of its own recipe") from error
    return task, recipe, net.eval(), checkpoint["validation"]


class _Trainer:
    """One run: net, optimiser and progress."""

    def __init__(self, task: AnyTask, recipe: Recipe, net: Net, run: Run, compute: Compute, board: Board) -> None:
        self.task, self.recipe, self.net, self.run, self.compute, self.board = task, recipe, net, run, compute, board
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.progress = Progress()

    def resume(self, config: RunConfig) -> None:
        """Go on from last.pt, or from the start where no epoch was done yet."""
        stored = self.run.config()
        if (stored.task, stored.data) != (config.task, config.data):
            raise RunError(
                f"{self.run.path} was made from another task or data; resume it with what is in its run.toml"
            )
        if Recipe.of(stored.recipe) != self.recipe:
            raise RunError(f"{self.run.path} was made with another recipe; resume it with the one in its run.toml")
        if (self.run.path / "metrics.json").exists() and self.run.read_json("metrics.json").get("status") == "finished":
            raise RunError(f"{self.run.path} is finished, and was tested; train another with another --out")
        if not self.run.last.exists():
            return
        last = self.run.load(self.run.last)
        self.net.load_state_dict(last["net"])
        self.optimizer.load_state_dict(last["optimizer"])
        self.progress = Progress(**last["progress"])
        self.compute.restore(last["compute"])

    def fit(self, show_progress: bool, should_stop: Callable[[], bool]) -> bool:
        """Train until the recipe says enough; returns whether it did, rather than should_stop."""
        bar = tqdm(
            total=self.recipe.epochs,
            initial=self.progress.epoch,
            desc=self.task.name,
            unit="epoch",
            disable=None if show_progress else True,
        )
        with bar:
            while not self.is_over:
                started = time.monotonic()
                loss = self.train_epoch(should_stop, show_progress)
                if loss is None:
                    return False
                self.note(loss, time.monotonic() - started)
                bar.update()
                shown = {name: value for name, value in self.progress.history[-1].items() if "validation" in name}
                bar.set_postfix({name.removeprefix("validation_"): f"{value:.3g}" for name, value in shown.items()})
        return True

    @property
    def is_over(self) -> bool:
        """Whether all epochs are done, or the last ones brought nothing."""
        progress = self.progress
        is_stuck = progress.epoch - progress.best_epoch >= self.recipe.patience
        return is_stuck or progress.epoch >= self.recipe.epochs

    def train_epoch(self, should_stop: Callable[[], bool], show_progress: bool) -> float | None:
        """Pass over the training split once; returns the mean loss, or None when stopped on the way."""
        self.net.train()
        batches = epoch_batches(self.task, self.recipe.batch_size)
        past = [row["validation_loss"] for row in self.progress.history]
        losses = []
        bar = tqdm(
            batches,
            desc=f"epoch {self.progress.epoch + 1}",
            unit="batch",
            leave=False,
            delay=EPOCH_BAR_DELAY_S,
            disable=None if show_progress else True,
        )
        for number, numbers in enumerate(bar):
            step = self.progress.epoch * len(batches) + number
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.recipe, step, len(batches), past)
            losses.append(self.train_batch(numbers))
            if should_stop():
                bar.close()
                return None
        return float(np.mean(losses))

    def train_batch(self, numbers: list[int]) -> float:
        """Take a step of the optimiser by some training sequences; returns their loss."""
        loss = training_loss(self.net, self.task, self.recipe, self.compute, numbers)
        self.compute.descend(loss + penalty(self.net), self.net.parameters(), self.optimizer, self.recipe.clip_norm)
        constrain(self.net)
        return float(loss.detach())

    def note(self, train_loss: float, seconds: float) -> None:
        """Judge an epoch by the validation split, and write the checkpoints."""
        progress = self.progress
        validation = evaluate(self.net, self.task, self.task.validation)
        progress.seconds += seconds
        row: Row = {
            "epoch": progress.epoch + 1,
            "train_loss": train_loss,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 4),
        }
        row |= {f"validation_{name}": value for name, value in validation.items()}
        progress.history.append(row)
        self.board.epoch(row)
        if validation["loss"] < progress.best_loss:
            progress.best_epoch, progress.best_loss = progress.epoch, validation["loss"]
            progress.best_net = {name: weights.cpu().clone() for name, weights in self.net.state_dict().items()}
            made_from = {"task": self.task.name, "recipe": self.recipe.to_dict(), "epoch": progress.epoch}
            if isinstance(self.task, Task) and self.task.source:
                made_from["outline"] = self.task.outline()
            self.run.save(self.run.best, {**made_from, "validation": validation, "net": progress.best_net})
        self.run.save(
            self.run.last,
            {
                "net": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "progress": asdict(progress),
                "compute": self.compute.state(),
            },
        )

    def conclude(self, is_finished: bool) -> Outcome:
        """Test the best net, if training is over, and write metrics and curves.

        Raises RunError when there is no best net: no epoch was done, or none had a finite loss.
        """
        progress = self.progress
        if not progress.best_net:
            reason = (
                "no epoch had a finite validation loss: lower --lr" if is_finished else "stopped in the first epoch"
            )
            raise RunError(f"{self.run.path}: nothing to keep, {reason}")
        self.net.load_state_dict(progress.best_net)
        name, of_validation = self.task.baseline(self.task.validation)
        baseline: dict[str, Any] = {"name": name, "validation": of_validation}
        metrics: dict[str, Any] = {
            "status": "finished" if is_finished else "interrupted",
            "task": self.task.name,
            "epochs": progress.epoch,
            "best_epoch": progress.best_epoch,
            "train_seconds": round(progress.seconds, 3),
            "num_parameters": self.net.num_parameters,
            "sequences": {split: len(getattr(self.task, split)) for split in ("train", "validation", "test")},
            "validation": evaluate(self.net, self.task, self.task.validation),
            "baseline": baseline,
            "recipe": self.recipe.to_dict(),
            "versions": versions("torch", "numpy"),
        }
        if answers := answers_for_people(self.net, self.task):
            metrics["answers"] = answers
        if is_finished:
            metrics["test"] = evaluate(self.net, self.task, self.task.test)
            baseline["test"] = self.task.baseline(self.task.test)[1]
        title = f"{self.task.name}: {self.recipe.cell}, {self.recipe.layers} x {self.recipe.hidden} units"
        picture = draw(progress.history, title=title, best_epoch=progress.best_epoch, baseline=(name, of_validation))
        self.run.write_curves(progress.history)
        write_whole(self.run.path / "curves.png", picture)
        self.board.end(metrics)
        # Last: a run whose metrics say "finished" has all its files.
        self.run.write_json("metrics.json", metrics)
        return Outcome(run=self.run, is_finished=is_finished, metrics=metrics)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Take the first Ctrl-C as a wish to stop, which the yielded function tells; the second one kills as ever.

    Outside the main thread, where Python delivers no signals, it is never told.
    """
    asked = threading.Event()

    def on_interrupt(*_: int | FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    from models.cli import train as command

    command()
