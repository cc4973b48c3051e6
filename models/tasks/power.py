"""Power: how a day's electrical load goes, hour by hour, from the season alone (one-to-many, one shared input).

Source: see data/README.md. The official split is kept: 67 days train and validate, 1,029 test. Of each season, every
fifth training day validates.

The season is all that a model is told, so the best that any can do is the mean curve of the season: the rest is what
days differ by.
"""

from __future__ import annotations

import numpy as np

from models.recipe import Recipe
from models.spec import Generation, Layout, TensorSpec
from models.tasks.base import Array, per_step, read
from models.tasks.examples import Examples
from models.tasks.generating import CurveTask

HOURS = 24
SEASONS = ("october_to_march", "april_to_september")
_EVERY = 5


def task() -> CurveTask:
    """Load the task."""
    arrays = read("power")
    train, test = _days(arrays, "train"), _days(arrays, "test")
    validates = np.zeros(len(train), dtype=bool)
    for season in range(len(SEASONS)):
        validates[np.flatnonzero(arrays["train_season"] == season)[::_EVERY]] = True
    return CurveTask(
        name="power",
        summary="the electrical load of Italy in every hour of a day, from the season",
        topology="one-to-many",
        data_set="ItalyPowerDemand (Keogh et al.), from the aeon package",
        license="BSD-3-Clause",
        context=TensorSpec(
            name="season",
            dtype="float32",
            row_shape=(len(SEASONS),),
            layout=Layout.PER_SEQUENCE,
            description="1 for the season of the day, 0 for the other",
            element_names=SEASONS,
        ),
        output=per_step(
            "y", ("load",), unit="", description="load in the hour, in standard deviations from the day's mean"
        ),
        generation=Generation(max_steps=HOURS),
        train=train.take(np.flatnonzero(~validates).tolist()),
        validation=train.take(np.flatnonzero(validates).tolist()),
        test=test,
        recipe=Recipe(hidden=32, epochs=400, patience=150, batch_size=16, lr=1e-2),
    )


def _days(arrays: dict[str, Array], split: str) -> Examples:
    seasons = np.eye(len(SEASONS), dtype=np.float32)[arrays[f"{split}_season"]]
    return Examples(targets=tuple(arrays[f"{split}_load"][:, :, None]), contexts=tuple(seasons))
