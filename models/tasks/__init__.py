"""Real data sets, and what each asks of a model. Torch-free: `load("vowels").test.inputs` is numpy."""

from __future__ import annotations

import functools
import importlib

from models.errors import UnknownTask
from models.tasks.base import Scaling, Split, Task

NAMES = ("vowels", "waterflow")
"""Tasks that ship, each a module of this package with a function `task`."""

__all__ = ["NAMES", "Scaling", "Split", "Task", "load"]


@functools.cache
def load(name: str) -> Task:
    """Load a task with its data. Raises UnknownTask."""
    if name not in NAMES:
        raise UnknownTask(name, known=NAMES)
    task: Task = importlib.import_module(f"models.tasks.{name}").task()
    return task
