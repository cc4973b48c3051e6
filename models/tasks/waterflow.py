"""Water flow: the flow through a pipe an hour from now, at every hour (many-to-many).

Source: see data/README.md. Splits are by time: the first 60% of the hours train, the next 20% validate, the last 20%
test. Hours are missing in ten places; what the flow was after one is unknown, so the series is cut there and each
unbroken run is a sequence of its own, as a client would begin a new one. In training it is cut further, into
overlapping two-day windows.

The flow follows the time of day, so the hour is an input too. The answer is the present flow plus a change that the
head predicts: the flow barely moves from hour to hour, and "no change" is hard to beat.
"""

from __future__ import annotations

import numpy as np

from models.recipe import Recipe
from models.tasks.base import Array, Split, Task, per_step, read

HOUR_S = 3600
WINDOW_H = 48
"""Hours that a training sequence answers for."""
STRIDE_H = 12
"""Hours from the start of a training sequence to the next one's."""


def task() -> Task:
    """Load the task."""
    arrays = read("waterflow")
    hour = (arrays["utc_s"] + arrays["utc_offset_s"]) / HOUR_S % 24
    steps = np.stack([arrays["flow"], hour], axis=1).astype(np.float32)
    first, second = (len(steps) * 6) // 10, (len(steps) * 8) // 10
    parts = [slice(0, first), slice(first, second), slice(second, None)]
    train, validation, test = (_unbroken(arrays["utc_s"][part], steps[part]) for part in parts)
    return Task(
        name="waterflow",
        summary="the flow through a water pipe an hour from now, at every hour",
        topology="many-to-many",
        kind="regression",
        data_set="Water flow through a pipeline branch, March to May 2022 (Tecnojest s.r.l.), from the river package",
        license="BSD-3-Clause",
        input=per_step(
            "x",
            ("flow", "hour"),
            unit="l/s, h",
            description="flow in litres per second, and the local hour of the day, 0 to 23",
        ),
        output=per_step("y", ("flow",), unit="l/s", description="flow in the next hour"),
        changes_of=(0,),
        looks_ahead="the flow it is asked for is the next step's input",
        train=_asked(_windows(train)),
        validation=_asked(validation),
        test=_asked(test),
        recipe=Recipe(hidden=32, batch_size=16, lr=5e-3, epochs=150, patience=30),
    )


def _unbroken(utc_s: Array, steps: Array) -> list[Array]:
    """Cut where an hour is missing; a run of one hour asks nothing and is dropped."""
    gaps = np.flatnonzero(np.diff(utc_s) != HOUR_S) + 1
    return [run for run in np.split(steps, gaps) if len(run) > 1]


def _windows(runs: list[Array]) -> list[Array]:
    """Cut into windows of WINDOW_H hours and the one after, the last of a run flush with its end."""
    windows = []
    for run in runs:
        last = max(0, len(run) - WINDOW_H - 1)
        starts = sorted({*range(0, last, STRIDE_H), last})
        windows += [run[start : start + WINDOW_H + 1] for start in starts]
    return windows


def _asked(runs: list[Array]) -> Split:
    """Ask at every hour for the flow of the next."""
    return Split(tuple(run[:-1] for run in runs), tuple(run[1:, :1] for run in runs))
