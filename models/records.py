"""What was measured and ships: models/tasks/records/*.json, that docs/results.md is made of. Torch-free."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

RECORDS = Path(__file__).parent / "tasks" / "records"
"""Where records ship."""
CLAIMS = "claims.json"
"""Name of the record of what cells learn of growing lengths."""

LEARNED_MSE = 0.01
"""A net has learned the adding problem when its mean square error is less; answering 1 always has 1/6."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def to_json(self) -> str:
        """The text of its file."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


class RunRecord(_Part):
    """One training run."""

    seed: int
    """Seed of the recipe."""
    epochs: int
    """Epochs that were trained."""
    best_epoch: int
    """The epoch that was kept."""
    cpu_seconds: float
    """Seconds of one thread for the run as a whole, evaluation too; a busy machine takes more."""
    validation: dict[str, float]
    """Metrics on the validation split."""
    test: dict[str, float]
    """Metrics on the test split."""
    curve: list[float]
    """What the record's metric is on the validation split after each epoch; its loss, where the metric is not had."""


class Row(_Part):
    """What a recipe reaches."""

    name: str
    """Name of the variant, such as its cell."""
    recipe: dict[str, Any]
    """Every setting, but the seed."""
    num_parameters: int
    """Trained parameters."""
    versions: dict[str, str]
    """Versions of what trained it."""
    runs: list[RunRecord]
    """One run a seed."""

    def values(self, metric: str) -> list[float]:
        """A metric on the test split, one value a seed."""
        return [run.test[metric] for run in self.runs]

    def of_validation(self, metric: str) -> float:
        """The median of a metric on the validation split."""
        return statistics.median(run.validation[metric] for run in self.runs)

    def over_seeds(self, metric: str) -> tuple[float, float, float]:
        """Find the median of a metric on the test split, its least and its greatest."""
        values = self.values(metric)
        return statistics.median(values), min(values), max(values)

    def median_run(self, metric: str) -> RunRecord:
        """Find the run nearest to the median, the first of those."""
        median = self.over_seeds(metric)[0]
        return min(self.runs, key=lambda run: abs(run.test[metric] - median))

    @property
    def ms_per_epoch(self) -> float:
        """Milliseconds of one thread for an epoch, the median over the runs."""
        return statistics.median(1e3 * run.cpu_seconds / run.epochs for run in self.runs)

    @property
    def cpu_seconds(self) -> float:
        """Seconds of one thread for a run, the median."""
        return statistics.median(run.cpu_seconds for run in self.runs)


class Record(_Part):
    """What the recipes of one task reach."""

    task: str
    """Name of the task."""
    summary: str
    """What it asks for."""
    topology: str
    """Its shape over time."""
    metric: str
    """The metric that counts most."""
    is_more_better: bool
    """Whether the metric is a score, or an error."""
    unit: str
    """Its unit; empty where it has none."""
    num_test: int
    """Sequences of the test split."""
    baselines: dict[str, dict[str, float]]
    """Metrics on the test split of what needs no recurrent net, by name."""
    rows: list[Row]
    """Variants, in the order of the plan."""

    @property
    def best(self) -> Callable[..., Any]:
        """The function that picks the better of values of the metric."""
        return max if self.is_more_better else min

    @property
    def best_baseline(self) -> tuple[str, float]:
        """The baseline that does best on the test split, and its metric."""
        name = self.best(self.baselines, key=lambda each: self.baselines[each][self.metric])
        return name, self.baselines[name][self.metric]

    def is_better(self, value: float, than: float) -> bool:
        """Whether a value of the metric beats another."""
        return value > than if self.is_more_better else value < than

    @classmethod
    def read(cls, task: str, folder: Path = RECORDS) -> Self:
        """Read a task's record."""
        return cls.model_validate_json((folder / f"{task}.json").read_text(encoding="utf-8"))


class Trial(_Part):
    """One net that was trained on the adding problem."""

    cell: Literal["rnn", "lstm", "gru"]
    """Its cell."""
    length: int
    """Steps of its sequences."""
    seed: int
    """Seed of its weights and sequences."""
    lr: float
    """The learning rate that did best on the validation sequences."""
    mse: float
    """Mean square error on the test sequences."""


class Claims(_Part):
    """What cells learn of sequences that grow longer."""

    hidden: int
    """Units of each net."""
    steps: int
    """Steps of the optimiser."""
    batch_size: int
    """Sequences of each."""
    learning_rates: list[float]
    """Learning rates that were tried."""
    num_parameters: dict[str, int]
    """Trained parameters by cell."""
    cpu_seconds: float
    """Seconds of one thread for all of it."""
    versions: dict[str, str]
    """Versions of what trained them."""
    trials: list[Trial]
    """Every net."""

    def errors(self, cell: str, length: int) -> list[float]:
        """Mean square errors of a cell at a length, one a seed, in rising order."""
        return sorted(each.mse for each in self.trials if (each.cell, each.length) == (cell, length))

    def share(self, cell: str, length: int, below: float) -> float:
        """Share of a cell's nets at a length whose error is below a value."""
        errors = self.errors(cell, length)
        return sum(error < below for error in errors) / len(errors)

    @property
    def cells(self) -> list[str]:
        """Cells, in the order of the trials."""
        return list(dict.fromkeys(each.cell for each in self.trials))

    @property
    def lengths(self) -> list[int]:
        """Lengths, rising."""
        return sorted({each.length for each in self.trials})

    @classmethod
    def read(cls, folder: Path = RECORDS) -> Self:
        """Read the record."""
        return cls.model_validate_json((folder / CLAIMS).read_text(encoding="utf-8"))


def recorded(folder: Path = RECORDS) -> list[str]:
    """Tasks that have a record, in the order of the alphabet."""
    return sorted(path.stem for path in folder.glob("*.json") if path.name != CLAIMS)
