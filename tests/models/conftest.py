"""Small tasks and runs that more than one test file uses."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

os.environ["KERAS_BACKEND"] = "torch"  # read when keras is imported; tensorflow is not there

from models import tasks
from models.export import export_run
from models.recipe import Recipe
from models.runs import Run
from models.tasks.base import Split, Task, per_step
from models.train import train


@pytest.fixture(autouse=True)
def one_thread():
    """The machine's cores are shared; nets this small gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def one_registry():
    """Every export builds torch's table of translations to ONNX anew, a third of its time; these tests export often."""
    build = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", build)
        yield


def make_task(*, kind: str = "classification", seed: int = 0, recipe: Recipe | None = None) -> Task:
    """A task that a small net learns in seconds: where a wave began, which takes memory, or its next value.

    Inputs lie far from zero: raw units, as a sensor's.
    """
    rng = np.random.default_rng(seed)
    is_classes = kind == "classification"

    def split(count: int) -> Split:
        inputs, targets = [], []
        for number in range(count):
            label = number % 3
            length = int(rng.integers(2, 9))
            wave = np.sin(np.arange(length + 1) * (0.5 + label) + rng.uniform(0, 6)) * 5 + 40
            if is_classes:
                wave[0] = 30 + 10 * label
            noise = rng.normal(scale=2.0, size=length + 1) - 20
            steps = np.stack([wave, noise], axis=1).astype(np.float32)
            inputs.append(steps[:-1])
            targets.append(np.int64(label) if is_classes else steps[1:, :1])
        return Split(tuple(inputs), tuple(np.asarray(target) for target in targets))

    return Task(
        name="sines",
        summary="sines",
        topology="many-to-one" if is_classes else "many-to-many",
        kind="classification" if is_classes else "regression",
        data_set="made up",
        license="",
        input=per_step("x", ("wave", "noise"), unit="mV", description="a wave, and noise"),
        output=per_step("y", ("low", "middle", "high") if is_classes else ("wave",), unit="", description="answer"),
        labels=("low", "middle", "high") if is_classes else (),
        changes_of=() if is_classes else (0,),
        train=split(24),
        validation=split(9),
        test=split(9),
        recipe=recipe
        or Recipe(hidden=5, epochs=4, batch_size=8, output_dropout=0.2, noise=0.1, shift=0.1, step_loss=0.3),
    )


@pytest.fixture(scope="session")
def sines() -> Task:
    return make_task()


@pytest.fixture(scope="session")
def vowels_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Vowels, trained a little."""
    task = tasks.load("vowels")
    out = tmp_path_factory.mktemp("runs") / "vowels"
    return train(task, task.recipe.changed(hidden=16, epochs=6), out, show_progress=False).run


@pytest.fixture(scope="session")
def vowels_file(vowels_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, exported."""
    return export_run(vowels_run, tmp_path_factory.mktemp("repository")).path
