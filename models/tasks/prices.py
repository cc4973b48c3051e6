"""Prices: the price of Brent crude on the next trading day, from the last 20 (many-to-one forecast).

Source: see data/README.md. Splits are by time of the day that is asked for: the first 70% of the days train (until
2010), the next 15% validate, the last 15% test. Windows overlap: one for every day that validates or tests, for every
fifth to train. A window holds what was known before the day that is asked for, and nothing of it, so a backward layer
may read it too.

The recipe is a form that is often taught: two layers of 100 units, dropout of 0.2 between them and after them, one
value out, in the price's own units. Such a net has to learn first that tomorrow's price is today's; the task `returns`
asks for what comes on top of that.
"""

from __future__ import annotations

import numpy as np

from models.recipe import Recipe
from models.tasks.base import Array, Split, Task, per_step, read

WINDOW = 20
"""Trading days that a forecast is made from."""
STRIDE = 5
"""Days from one window to train on to the next one."""
DATA_SET = "Europe Brent spot price FOB, daily, May 1987 to August 2019 (U.S. Energy Information Administration)"


def task() -> Task:
    """Load the task."""
    train, validation, test = windows(read("prices")["price"])

    def split(found: tuple[Array, Array]) -> Split:
        inputs, targets = found
        return Split(tuple(inputs), tuple(targets), rivals={"persistence: today's price": tuple(inputs[:, -1])})

    return Task(
        name="prices",
        summary=f"the price of Brent crude on the next trading day, from the last {WINDOW}",
        topology="many-to-one",
        kind="regression",
        data_set=DATA_SET,
        license="public domain",
        input=per_step("x", ("price",), unit="USD/bbl", description="price in US dollars per barrel on a trading day"),
        output=per_step("y", ("price",), unit="USD/bbl", description="price on the next trading day"),
        train=split(train),
        validation=split(validation),
        test=split(test),
        recipe=Recipe(
            cell="lstm",
            hidden=100,
            layers=2,
            output_dropout=0.2,
            batch_size=32,
            lr=3e-3,
            schedule="cosine",
            epochs=16,
            patience=16,
        ),
    )


def windows(series: Array) -> list[tuple[Array, Array]]:
    """Cut a series [days] into what forecasts are made from, and what is asked for, split by split.

    Returns (inputs [windows, WINDOW, 1], targets [windows, 1]) to train, validate and test on.
    """
    borders = [WINDOW, (len(series) * 70) // 100, (len(series) * 85) // 100, len(series)]
    column = series.astype(np.float32)[:, None]
    found = []
    for start, end, stride in zip(borders, borders[1:], (STRIDE, 1, 1), strict=False):
        asked = np.arange(start, end, stride)
        found.append((column[asked[:, None] + np.arange(-WINDOW, 0)], column[asked]))
    return found
