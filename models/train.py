"""Train a net on a task; `python -m models.train` is `rnnserve train`.

A run is a chain of epochs. Each starts from last.pt alone (weights, optimiser, random state, history), so a run that
was interrupted and resumed has the same weights, bit for bit, as one that never was. The epoch with the least
validation loss is kept; the test split is looked at once, when the run is over.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models import tasks
from models.curves import draw
from models.errors import RunError
from models.nets import RecurrentNet, build
from models.recipe import Recipe
from models.runs import Row, Run, versions, write_whole
from models.tasks import Split, Task
from models.tasks.base import Array, pad

EVALUATION_BATCH = 256
"""Sequences evaluated at once."""


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
    task: Task,
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    show_progress: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train, or go on with a run that was interrupted, and write the run's directory.

    should_stop is asked after every batch; once it says yes, or on Ctrl-C, the epoch under way is given up and the best
    so far kept. The caller's random state and threads are left as they were.
    Raises RunError when the directory is taken, or cannot be resumed or written; RecipeError when recipe and task
    don't fit.
    """
    run = Run(out)
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        with torch.random.fork_rng(devices=[]), _interrupts() as interrupted:
            torch.manual_seed(recipe.seed)
            net = build(task, recipe)
            trainer = _Trainer(task, recipe, net, run)
            if resume:
                trainer.resume()
            else:
                run.create({"task": task.name, "recipe": recipe.to_dict(), "versions": versions("torch", "numpy")})
            is_finished = trainer.fit(show_progress, lambda: interrupted() or should_stop())
            return trainer.conclude(is_finished)
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error.strerror}") from error
    finally:
        torch.set_num_threads(threads)


def load_net(run: Run) -> tuple[Task, Recipe, RecurrentNet, dict[str, Any]]:
    """Load a run's best net: its task, recipe, the net in evaluation mode, and its validation metrics.

    Raises RunError, UnknownTask, RecipeError.
    """
    checkpoint = run.load(run.best)
    task, recipe = tasks.load(checkpoint["task"]), Recipe.of(checkpoint["recipe"])
    net = build(task, recipe)
    try:
        net.load_state_dict(checkpoint["net"])
    except RuntimeError as error:
        raise RunError(f"{run.best} does not hold the weights of its own recipe") from error
    return task, recipe, net.eval(), checkpoint["validation"]


def evaluate(net: RecurrentNet, task: Task, split: Split) -> dict[str, float]:
    """Compute the loss and the task's metrics of final answers over a split."""
    net.eval()
    answers: list[Array] = []
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(split), EVALUATION_BATCH):
            numbers = range(start, min(start + EVALUATION_BATCH, len(split)))
            x, lengths, targets = _batch(split, numbers)
            scores = net.scores(x, lengths)
            final, _ = _losses(net, scores, lengths, targets)
            total += float(final.sum())
            answers += _final_answers(net, scores, lengths)
    count = len(split) if net.config.one_answer else int(split.lengths.sum())
    return {"loss": total / count, **task.judge(split, answers)}


class _Trainer:
    """One run: net, optimiser and progress."""

    def __init__(self, task: Task, recipe: Recipe, net: RecurrentNet, run: Run) -> None:
        self.task, self.recipe, self.net, self.run = task, recipe, net, run
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.progress = Progress()

    def resume(self) -> None:
        """Go on from last.pt, or from the start where no epoch was done yet."""
        stored = self.run.read_json("config.json")
        if stored.get("task") != self.task.name or stored.get("recipe") != self.recipe.to_dict():
            raise RunError(f"{self.run.path} was made with another recipe; resume it with the one in its config.json")
        if (self.run.path / "metrics.json").exists() and self.run.read_json("metrics.json").get("status") == "finished":
            raise RunError(f"{self.run.path} is finished, and was tested; train another with another --out")
        if not self.run.last.exists():
            return
        last = self.run.load(self.run.last)
        self.net.load_state_dict(last["net"])
        self.optimizer.load_state_dict(last["optimizer"])
        self.progress = Progress(**last["progress"])
        torch.set_rng_state(last["torch_rng"])

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
                loss = self.train_epoch(should_stop)
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

    def train_epoch(self, should_stop: Callable[[], bool]) -> float | None:
        """Pass over the training split once; returns the mean loss, or None when stopped on the way."""
        self.net.train()
        size = self.recipe.batch_size
        order = torch.randperm(len(self.task.train)).tolist()
        losses = []
        for start in range(0, len(order), size):
            x, lengths, targets = _batch(self.task.train, order[start : start + size])
            scores = self.net.scores(self.disturb(x), lengths)
            final, running = _losses(self.net, scores, lengths, targets)
            loss = final.mean()
            if running is not None:
                loss = loss + self.recipe.step_loss * running.mean()
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip_norm)
            self.optimizer.step()
            losses.append(float(loss.detach()))
            if should_stop():
                return None
        return float(np.mean(losses))

    def disturb(self, x: Tensor) -> Tensor:
        """Add the recipe's noise and shift to a batch, [batch, time, features]."""
        if self.recipe.noise:
            x = x + self.recipe.noise * self.net.input_scale * torch.randn_like(x)
        if self.recipe.shift:
            x = x + self.recipe.shift * self.net.input_scale * torch.randn_like(x[:, :1])
        return x

    def note(self, train_loss: float, seconds: float) -> None:
        """Judge an epoch by the validation split, and write the checkpoints."""
        progress = self.progress
        validation = evaluate(self.net, self.task, self.task.validation)
        progress.seconds += seconds
        row: Row = {"epoch": progress.epoch + 1, "train_loss": train_loss, "seconds": round(seconds, 4)}
        progress.history.append(row | {f"validation_{name}": value for name, value in validation.items()})
        if validation["loss"] < progress.best_loss:
            progress.best_epoch, progress.best_loss = progress.epoch, validation["loss"]
            progress.best_net = {name: weights.clone() for name, weights in self.net.state_dict().items()}
            made_from = {"task": self.task.name, "recipe": self.recipe.to_dict(), "epoch": progress.epoch}
            self.run.save(self.run.best, {**made_from, "validation": validation, "net": progress.best_net})
        self.run.save(
            self.run.last,
            {
                "net": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "progress": asdict(progress),
                "torch_rng": torch.get_rng_state(),
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
        if is_finished:
            metrics["test"] = evaluate(self.net, self.task, self.task.test)
            baseline["test"] = self.task.baseline(self.task.test)[1]
        title = f"{self.task.name}: {self.recipe.cell}, {self.recipe.layers} x {self.recipe.hidden} units"
        picture = draw(progress.history, title=title, best_epoch=progress.best_epoch, baseline=(name, of_validation))
        self.run.write_curves(progress.history)
        write_whole(self.run.path / "curves.png", picture)
        # Last: a run whose metrics say "finished" has all its files.
        self.run.write_json("metrics.json", metrics)
        return Outcome(run=self.run, is_finished=is_finished, metrics=metrics)


def _batch(split: Split, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Gather sequences of a split.

    Returns (x [batch, time, features], lengths [batch] int32, targets: classes [batch] int64, or rows of every step,
    [sum(lengths), outputs]).
    """
    x = torch.from_numpy(pad([split.inputs[n] for n in numbers]))
    lengths = torch.tensor([len(split.inputs[n]) for n in numbers], dtype=torch.int32)
    asked = [split.targets[n] for n in numbers]
    targets = np.stack(asked) if asked[0].ndim == 0 else np.concatenate(asked)
    return x, lengths, torch.from_numpy(targets)


def _losses(net: RecurrentNet, scores: Tensor, lengths: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
    """Compute losses one by one, of what `RecurrentNet.scores` returned.

    Returns (those of final answers: [batch] cross-entropies, or [sum(lengths)] Huber losses in units of output_scale;
    those of a classifier's running answers, [sum(lengths)], or None where it has none).
    """
    if not net.config.is_classifier:
        errors = (scores[_within(scores, lengths)] - targets) / net.output_scale
        return nn.functional.huber_loss(errors, torch.zeros_like(errors), reduction="none").mean(dim=1), None
    final = nn.functional.cross_entropy(_final(net, scores, lengths), targets, reduction="none")
    if net.config.is_per_sequence:
        return final, None
    within = _within(scores, lengths)
    repeated = targets[:, None].expand(within.shape)
    return final, nn.functional.cross_entropy(scores[within], repeated[within], reduction="none")


def _final_answers(net: RecurrentNet, scores: Tensor, lengths: Tensor) -> list[Array]:
    """Cut out each sequence's final answer: [outputs] of one answer, else [length, outputs]."""
    if net.config.one_answer:
        return list(_final(net, scores, lengths).softmax(-1).numpy())
    return [row[:length].numpy() for row, length in zip(scores, lengths.tolist(), strict=True)]


def _final(net: RecurrentNet, scores: Tensor, lengths: Tensor) -> Tensor:
    """Scores of a many-to-one net's final answers, [batch, outputs]."""
    return scores if net.config.is_per_sequence else scores[torch.arange(len(lengths)), lengths.long() - 1]


def _within(scores: Tensor, lengths: Tensor) -> Tensor:
    """Which steps are not padding, [batch, time]."""
    return torch.arange(scores.shape[1]) < lengths[:, None]


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
