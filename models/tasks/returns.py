"""Returns: how much the price of Brent crude changes by the next trading day, from the last 20 changes (many-to-one).

The days, windows, splits and recipe are those of `prices`; a return is the change of the price's logarithm, in percent,
which has the same spread whatever the price is. "No change" is the answer to beat.
"""

from __future__ import annotations

import numpy as np

from models.tasks import prices
from models.tasks.base import Array, Split, Task, per_step, read


def task() -> Task:
    """Load the task."""
    returns = 100 * np.diff(np.log(read("prices")["price"].astype(np.float64)))
    train, validation, test = prices.windows(returns)

    def split(found: tuple[Array, Array]) -> Split:
        inputs, targets = found
        return Split(tuple(inputs), tuple(targets), rivals={"persistence: no change": tuple(np.zeros_like(targets))})

    return Task(
        name="returns",
        summary=f"the change of Brent crude's price by the next trading day, from the last {prices.WINDOW}",
        topology="many-to-one",
        kind="regression",
        data_set=prices.DATA_SET,
        license="public domain",
        input=per_step("x", ("return",), unit="%", description="100 x the change of the price's logarithm in a day"),
        output=per_step("y", ("return",), unit="%", description="the same on the next trading day"),
        train=split(train),
        validation=split(validation),
        test=split(test),
        recipe=prices.task().recipe.changed(epochs=8, patience=8),
    )
