"""Water flow: the flow through a pipe an hour from now, at every hour (many-to-many).

Source: see data/README.md. Splits are by time: the first 60% of the hours train, the next 20% validate, the last 20%
test. Hours are missing in ten places; what the flow was after one is unknown, so the series is cut there and each
unbroken run is a sequence of its own, as a client would begin a new one. In training it is cut further, into
overlapping two-day windows.

The flow follows the time of day, so the hour is an input too. The answer is the present flow plus a change that the
head predicts: the flow barely moves from hour to hour, and "no change" is hard to beat. Two more rivals know yesterday:
the flow at the same hour, and the present flow with yesterday's change. Where an hour that they need is missing, they
answer "no change", so that all are judged by the same hours.
"""

from __future__ import annotations

import numpy as np

from models.recipe import Recipe
from models.tasks.base import Array, Split, Task, per_step, read

HOUR_S = 3600
DAY_H = 24
WINDOW_H = 48
"""Hours that a training sequence answers for."""
STRIDE_H = 12
"""Hours from the start of a training sequence to the next one's."""


def task() -> Task:
    """Load the task."""
    arrays = read("waterflow")
    hour = (arrays["utc_s"] + arrays["utc_offset_s"]) / HOUR_S % DAY_H
    steps = np.stack([arrays["flow"], hour], axis=1).astype(np.float32)
    first, second = (len(steps) * 6) // 10, (len(steps) * 8) // 10
    rivals = _rivals(arrays["utc_s"], arrays["flow"])

    def whole(part: slice) -> Split:
        runs = _unbroken(arrays["utc_s"][part], steps[part])
        answers = {name: _unbroken(arrays["utc_s"][part], rival[part]) for name, rival in rivals.items()}
        return _asked(runs, {name: tuple(run[:-1] for run in each) for name, each in answers.items()})

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
        train=_asked(_windows(_unbroken(arrays["utc_s"][:first], steps[:first])), {}),
        validation=whole(slice(first, second)),
        test=whole(slice(second, None)),
        recipe=Recipe(hidden=32, output_dropout=0.3, batch_size=16, lr=5e-3, epochs=150, patience=30),
    )


def _rivals(utc_s: Array, flow: Array) -> dict[str, Array]:
    """What forecasts that know yesterday say at every hour of the next one, [hours, 1] each."""
    known = dict(zip(utc_s.tolist(), flow.tolist(), strict=True))
    hours = [(now, known.get(now - (DAY_H - 1) * HOUR_S), known.get(now - DAY_H * HOUR_S)) for now in utc_s.tolist()]
    forecasts = {
        "the same hour yesterday": [known[now] if after is None else after for now, after, _ in hours],
        "the present flow and yesterday's change": [
            known[now] + (0.0 if after is None or before is None else after - before) for now, after, before in hours
        ],
    }
    return {name: np.array(each, dtype=np.float32)[:, None] for name, each in forecasts.items()}


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


def _asked(runs: list[Array], rivals: dict[str, tuple[Array, ...]]) -> Split:
    """Ask at every hour for the flow of the next."""
    return Split(tuple(run[:-1] for run in runs), tuple(run[1:, :1] for run in runs), rivals=rivals)
