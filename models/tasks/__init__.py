"""Real data sets and data of one's own, and what each asks of a model.

Torch-free: `load("vowels").test.inputs` is numpy.
"""

from __future__ import annotations

import functools
import importlib

from models.errors import UnknownTask
from models.tasks.base import AnyTask, Scaling, Split, Task
from models.tasks.examples import Examples
from models.tasks.generating import CurveTask, GenerationTask, TextTask, TransductionTask
from models.tasks.own import load as load_own
from models.tasks.settings import DataSettings

NAMES = ("vowels", "waterflow", "names", "prices", "returns", "power", "namegen", "g2p")
"""Tasks that ship, each a module of this package with a function `task`."""

__all__ = [
    "NAMES",
    "AnyTask",
    "CurveTask",
    "DataSettings",
    "Examples",
    "GenerationTask",
    "Scaling",
    "Split",
    "Task",
    "TextTask",
    "TransductionTask",
    "load",
    "load_own",
]


@functools.cache
def load(name: str) -> AnyTask:
    """Load a task with its data. Raises UnknownTask."""
    if name not in NAMES:
        raise UnknownTask(name, known=NAMES)
    task: AnyTask = importlib.import_module(f"models.tasks.{name}").task()
    return task
