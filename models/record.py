"""Record what a task's default recipe reaches, over several seeds.

    python -m models.record vowels

trains with every seed and writes models/tasks/records/vowels.json.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from pathlib import Path

import click

from models import tasks
from models.cli import reports_errors
from models.runs import versions, write_whole
from models.train import train

RECORDS = Path(tasks.__file__).parent / "records"


@click.command()
@click.argument("name", metavar="TASK", type=click.Choice(tasks.NAMES))
@click.option("--seeds", default=3, show_default=True, help="Seeds to train with, from 0.")
@click.option("--out", type=click.Path(path_type=Path), default=RECORDS, help="Directory of the record.")
@reports_errors
def main(name: str, seeds: int, out: Path) -> None:
    """Train TASK with its default recipe and several seeds, and write down every result and the median."""
    task = tasks.load(name)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            metrics = train(task, task.recipe.changed(seed=seed), Path(folder) / str(seed)).metrics
            kept = ("epochs", "best_epoch", "train_seconds", "validation", "test")
            runs.append({"seed": seed, **{key: metrics[key] for key in kept}})
            click.echo(f"seed {seed}: test {metrics['test']}, {metrics['train_seconds']:.1f} s")
    median = {key: statistics.median(run["test"][key] for run in runs) for key in runs[0]["test"]}
    record = {
        "command": f"python -m models.record {name} --seeds {seeds}",
        "task": name,
        "median_test": median,
        "median_train_seconds": statistics.median(run["train_seconds"] for run in runs),
        "cores": os.cpu_count(),
        "baseline": metrics["baseline"],
        "recipe": task.recipe.to_dict() | {"seed": None},
        "runs": runs,
        "versions": versions("torch", "numpy"),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / f"{name}.json", (json.dumps(record, indent=2) + "\n").encode())
    click.echo(f"median of {seeds} seeds: {median}, written to {out.name}/{name}.json")


if __name__ == "__main__":
    main()
