"""Record what tasks' recipes reach, cell by cell, over several seeds.

    python -m models.record                          trains all that is recorded of every task
    python -m models.record vowels                   of one
    python -m models.record vowels --variant BiGRU   that row of its record again; the others stay

writes models/tasks/records/TASK.json; `python -m models.results` makes docs/results.md of those.
"""

from __future__ import annotations

import csv
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click

from models import tasks
from models.cli import reports_errors
from models.records import RECORDS, Record, Row, RunRecord
from models.runs import versions, write_whole
from models.train import Outcome, train

CURVE_DIGITS = 5
"""Significant digits of a curve's values."""
Settings = Mapping[str, Any]
"""Settings of a recipe that differ from the task's own."""
FORWARD: Mapping[str, Settings] = MappingProxyType({name: {"cell": name.lower()} for name in ("RNN", "LSTM", "GRU")})
BOTH_WAYS: Mapping[str, Settings] = MappingProxyType(
    {**FORWARD, **{f"Bi{name}": {**cell, "bidirectional": True} for name, cell in FORWARD.items()}}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is recorded of a task."""

    variants: Mapping[str, Settings]
    """Recipes by name: how each differs from the task's own."""
    seeds: int = 5
    """Seeds to train with, from 0."""


PLANS: Mapping[str, Plan] = MappingProxyType(
    {
        "vowels": Plan(variants=BOTH_WAYS, seeds=3),
        "names": Plan(variants=FORWARD, seeds=3),
        "prices": Plan(variants=BOTH_WAYS),
        "returns": Plan(variants=FORWARD, seeds=3),
        # What is asked for is the next step's input, which a backward layer would read.
        "waterflow": Plan(variants=FORWARD),
        "power": Plan(variants=FORWARD),
        "namegen": Plan(variants=FORWARD, seeds=3),
        # Each takes long to train.
        "g2p": Plan(variants={"GRU with attention": {}}, seeds=1),
    }
)


@click.command()
@click.argument("name", metavar="[TASK]", type=click.Choice([*PLANS]), required=False)
@click.option("--variant", "chosen", multiple=True, help="Train this variant alone; can be given again.")
@click.option("--seeds", type=click.IntRange(min=1), help="Seeds to train with, from 0.  [default: the task's plan]")
@click.option("--out", type=click.Path(path_type=Path), default=RECORDS, help="Directory of the records.")
@click.option("--runs", type=click.Path(path_type=Path), help="Keep the runs below this directory, to export from.")
@reports_errors
def main(name: str | None, chosen: tuple[str, ...], seeds: int | None, out: Path, runs: Path | None) -> None:
    """Train what is recorded of TASK, or of every task, and write down every result."""
    out.mkdir(parents=True, exist_ok=True)
    for each in [name] if name else PLANS:
        plan = PLANS[each]
        if unknown := sorted({*chosen} - {*plan.variants}):
            raise click.UsageError(f"{each} has no variant {unknown[0]!r}: it has {', '.join(plan.variants)}")
        for variant in chosen or plan.variants:
            with tempfile.TemporaryDirectory() as temporary:
                folder = (runs or Path(temporary)) / each / variant.lower().replace(" ", "-")
                row = measure(each, variant, plan.variants[variant], seeds or plan.seeds, folder)
            write_whole(out / f"{each}.json", _with(each, plan, row, out).to_json().encode())


def measure(name: str, variant: str, settings: Settings, seeds: int, folder: Path) -> Row:
    """Train a variant, whose settings differ from the task's recipe, with every seed, in runs within a folder."""
    task = tasks.load(name)
    recipe = task.recipe.changed(**settings)
    runs = []
    for seed in range(seeds):
        began = time.process_time()
        outcome = train(task, recipe.changed(seed=seed), folder / str(seed), show_progress=False)
        run = _told(outcome, task.metric, seed, time.process_time() - began)
        click.echo(f"{name} {variant}, seed {seed}: {run.test}, {run.epochs} epochs, {run.cpu_seconds:.1f} s")
        runs.append(run)
    return Row(
        name=variant,
        recipe={name: value for name, value in recipe.to_dict().items() if name != "seed"},
        num_parameters=outcome.metrics["num_parameters"],
        versions=versions("torch", "numpy"),
        runs=runs,
    )


def _told(outcome: Outcome, metric: str, seed: int, cpu_seconds: float) -> RunRecord:
    metrics = outcome.metrics
    with (outcome.run.path / "curves.csv").open(encoding="utf-8", newline="") as file:
        epochs = list(csv.DictReader(file))
    column = f"validation_{metric}"
    column = column if column in epochs[0] else "validation_loss"
    return RunRecord(
        seed=seed,
        epochs=metrics["epochs"],
        best_epoch=metrics["best_epoch"],
        cpu_seconds=round(cpu_seconds, 2),
        validation=metrics["validation"],
        test=metrics["test"],
        curve=[float(f"{float(row[column]):.{CURVE_DIGITS}g}") for row in epochs],
    )


def _with(name: str, plan: Plan, row: Row, folder: Path) -> Record:
    """Put a row into the task's record, in the place of an older one."""
    task = tasks.load(name)
    rows = {each.name: each for each in Record.read(name, folder).rows} if (folder / f"{name}.json").exists() else {}
    rows |= {row.name: row}
    return Record(
        task=name,
        summary=task.summary,
        topology=task.topology,
        metric=task.metric,
        is_more_better=task.is_more_better,
        unit=task.score_unit,
        num_test=len(task.test),
        baselines=task.baselines(task.test),
        rows=[rows[variant] for variant in plan.variants if variant in rows],
    )


if __name__ == "__main__":
    main()
