"""The commands `rnnserve train`, `export`, `verify` and `describe`.

Torch-free when imported: each command imports what it needs when it runs, and says which extra is missing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn, ParamSpec, TypeVar, get_args, get_origin

import click

from models.dataflags import data_options
from models.errors import (
    DataError,
    ForeignFileError,
    MissingExtra,
    ModelFileError,
    ModelsError,
    RecipeError,
    UnknownTask,
)
from models.options import PRESETS
from models.quantization import MAX_DROP, QuantizedForm
from models.recipe import Recipe
from models.spec import Spec
from models.tasks import NAMES

FAILED, USAGE, INTERRUPTED = 1, 2, 130
_NOT_THERE = (FileNotFoundError, IsADirectoryError, PermissionError)

P = ParamSpec("P")
R = TypeVar("R")

_TRAIN_MODULES = ("torch", "onnx", "onnxscript", "matplotlib", "tomli_w", "tqdm")


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what goes wrong on purpose into one line on standard error and an exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (DataError, MissingExtra, RecipeError, UnknownTask) as error:
            _end(str(error), USAGE)
        except (ModelFileError, ForeignFileError) as error:
            _end(str(error), USAGE if isinstance(error.__cause__, _NOT_THERE) else FAILED)
        except ModelsError as error:
            _end(str(error), FAILED)

    return run


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for every setting of a recipe; its help is the text under the field."""
    for name, field in reversed(Recipe.model_fields.items()):
        flag = f"--{name.replace('_', '-')}"
        kind: Any = _kind(field.annotation)
        switch = f"{flag}/--no-{name.replace('_', '-')}" if kind is bool else flag
        command = click.option(
            switch, name, type=kind, default=None, help=f"{field.description}  [default: the task's]"
        )(command)
    return command


def _kind(annotation: Any) -> Any:
    """What click makes of a field's type: a choice of words, a plain type, or text that the recipe reads itself."""
    if get_origin(annotation) is Literal:
        return click.Choice(get_args(annotation))
    return annotation if isinstance(annotation, type) else str


@click.command(short_help="Train a net on a task, or on data of your own.")
@click.argument("task", type=click.Choice(NAMES), required=False)
@click.option(
    "--config", type=click.Path(path_type=Path), help="Train what a TOML file says, such as a run's run.toml."
)
@data_options
@recipe_options
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    help="Options to begin with, where no flag says otherwise: as Keras 2 had them, or weights as torch draws them.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the run.  [default: runs/TASK-CELL]")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, as if it had never been interrupted.")
@click.option("--tensorboard", metavar="DIR", type=click.Path(path_type=Path), help="Log for TensorBoard too.")
@reports_errors
def train(
    task: str | None,
    config: Path | None,
    data: dict[str, Any],
    out: Path | None,
    resume: bool,
    tensorboard: Path | None,
    preset: str | None,
    **settings: Any,
) -> None:
    """Train a net on TASK, or on a data file of your own, and write a run's directory.

    It holds run.toml (which --config runs again), metrics.json, curves.csv, curves.png, best.pt (the epoch with the
    best validation loss) and last.pt (to resume from). Ctrl-C keeps the best so far. Flags go before a config file.
    """
    with needs("train", *_TRAIN_MODULES):
        from models.config import RunConfig
        from models.runs import Run
        from models.train import train as run_training

    given = {name: value for name, value in settings.items() if value is not None}
    given = dict(PRESETS.get(preset or "", {})) | given
    if resume and (out is None or config is not None):
        raise RecipeError("--resume goes on with the run in --out, by its own run.toml: give --out, and no --config")
    made_from = Run(out).config() if resume and out else RunConfig.read(config) if config else None
    chosen, recipe = RunConfig.choose(made_from, task, data).load(given)
    out = out or Path("runs") / f"{chosen.name}-{recipe.cell}"
    if chosen.source:
        click.echo(f"{chosen.name}: {chosen.described}")
    outcome = run_training(chosen, recipe, out, resume=resume, tensorboard=tensorboard)
    metrics = outcome.metrics
    if not outcome.is_finished:
        click.echo(
            f"interrupted after epoch {metrics['epochs']}; the best so far, epoch {metrics['best_epoch']} with a "
            f"validation loss of {metrics['validation']['loss']:.4g}, is kept in {out}: export it as it is, or go on "
            f"with `rnnserve train --out {out} --resume`",
            err=True,
        )
        raise SystemExit(INTERRUPTED)
    click.echo(
        f"{chosen.name}: {recipe.cell}, {recipe.layers} x {recipe.hidden} units, {metrics['num_parameters']:,} "
        f"parameters; {metrics['epochs']} epochs in {metrics['train_seconds']:.1f} s, the best was epoch "
        f"{metrics['best_epoch']}"
    )
    for split in ("validation", "test"):
        for name, baseline in metrics["baseline"][split].items():
            score = f"{name} {metrics[split][name]:.4f} {chosen.score_unit}".rstrip()
            click.echo(f"  {split:<10}  {score}  ({metrics['baseline']['name']}: {baseline:.4f})")
    for answer in metrics.get("answers", ()):
        click.echo(f"  {answer}")
    click.echo(f"next: rnnserve export {out} --repository repository")


@click.command(short_help="Export a run to ONNX.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--repository", type=click.Path(path_type=Path), required=True, help="Directory that a server reads models from."
)
@click.option("--name", help="Name of the model.  [default: the task's]")
@click.option("--version", type=int, help="Version of the model.  [default: the next]")
@click.option(
    "--int8",
    type=click.Choice(get_args(QuantizedForm)),
    is_flag=False,
    flag_value="weights",
    help="Store weights in 8 bits (weights, which the flag alone means); compute with them too, scales fixed (static), "
    "or measured over each batch, which neighbours change (dynamic).",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0),
    help="With --int8: most that a metric of the test split may lose, absolute of an accuracy and relative of an "
    f"error.  [default: {MAX_DROP}]",
)
@reports_errors
def export(
    run: Path,
    repository: Path,
    name: str | None,
    version: int | None,
    int8: QuantizedForm | None,
    max_drop: float | None,
) -> None:
    """Export a run's best net as REPOSITORY/NAME/VERSION/model.onnx.

    Before it is written, onnxruntime's answers are compared with torch's; a file that differs is not written. With
    --int8, one that loses more of a metric than --max-drop is not written either.
    """
    if max_drop is not None and int8 is None:
        raise click.UsageError("--max-drop is for --int8")
    with needs("export", *_TRAIN_MODULES, "onnxruntime"):
        from models.export import export_run
        from models.runs import Run

    allowed = MAX_DROP if max_drop is None else max_drop
    exported = export_run(Run(run), repository, name=name, version=version, int8=int8, max_drop=allowed)
    tell_written(exported.path, exported.spec, exported.size, repository, notes=exported.notes())


@click.command(short_help="Check a model file.")
@click.argument("file", type=click.Path(path_type=Path))
@reports_errors
def verify(file: Path) -> None:
    """Check that a model file answers here as it did where it was made.

    Its golden inputs are run, and a causal model also whole against in chunks with the state carried on; onnxruntime
    is all that is needed. Exits with 0 when every answer is right, else with 1.
    """
    with needs("verify", "onnxruntime"):
        from models.modelfile import ModelFile

    checks = ModelFile(file).verify()
    for check in checks:
        verdict = "ok" if check.is_passed else "FAILED"
        click.echo(f"{verdict:<6}  {check.name}: off by {check.error:.2g} at most, in {check.worst}")
    if failed := [check.name for check in checks if not check.is_passed]:
        _end(f"{file}: {', '.join(failed)} off by more than {checks[0].tolerance:.0e}; do not serve it", FAILED)
    click.echo(f"{file} answers as it should, within {checks[0].tolerance:.0e}")


@click.command(short_help="Describe a model file.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reports_errors
def describe(file: Path, as_json: bool) -> None:
    """Describe a model file: what it takes and answers, how it can be stepped, where it came from."""
    with needs("describe", "onnxruntime"):
        from models import describe as describing
        from models.modelfile import ModelFile

    model = ModelFile(file, optimize=False)
    click.echo(json.dumps(describing.as_json(model), indent=2) if as_json else describing.as_text(model))


def tell_written(path: Path, spec: Spec, size: int, repository: Path, *, notes: Iterable[str] = ()) -> None:
    """Print what is worth knowing of a model version that was written; size is the bytes of all its files."""
    operators = [", ".join(f"{count} {each}" for each, count in graph.operators.items()) for graph in spec.graphs]
    click.echo(f"{path}: {size:,} bytes, {'; its encoder: '.join(operators)}")
    click.echo(
        f"  {spec.expected_of} and onnxruntime differ by {spec.parity.max_abs_error:.2g} at most, in "
        f"{spec.parity.num_cases} cases ({spec.parity.tolerance:.0e} is allowed)"
    )
    for note in notes:
        click.echo(f"  {note}")
    click.echo(f"  {spec.step_mode[0].value}: {spec.step_mode[1]}")
    click.echo(f"next: rnnserve serve --repository {repository}")


@contextmanager
def needs(command: str, *modules: str) -> Iterator[None]:
    """Import what a command needs; say which extra brings a module that is missing."""
    import importlib

    try:
        for module in modules:
            importlib.import_module(module)
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in modules:
            raise
        extra, purpose = ("cpu", "runtime") if package == "onnxruntime" else ("train", "training")
        raise MissingExtra(f"rnnserve {command}", package=package, extra=extra, purpose=purpose) from error


def _end(message: str, code: int) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    raise SystemExit(code)
