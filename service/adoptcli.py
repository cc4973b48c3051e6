"""`rnnserve adopt`: a first model.toml for a model that was made elsewhere."""

from __future__ import annotations

import ast
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    import onnx

FAILED, USAGE = 1, 2


@click.command(short_help="Describe an ONNX file from elsewhere, so that it can be served.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--repository", type=click.Path(path_type=Path), help="Put the model into this repository too.")
@click.option("--name", help="Name of the model there.  [default: the file's, without .onnx]")
@click.option("--version", type=click.IntRange(min=1), default=1, show_default=True, help="Version of the model there.")
@click.option("--constant", "constants", multiple=True, metavar="INPUT=VALUE", help="An input that is always the same.")
@click.option("--state", "states", multiple=True, metavar="INPUT=OUTPUT", help="A state, and its next value.")
@click.option(
    "--chunk", type=click.IntRange(min=1), help="Entries of the time axis that are one step, such as samples."
)
@click.option("--context", type=click.IntRange(min=0), default=0, help="Entries before a chunk that are given again.")
@click.option("--force", is_flag=True, help="Write over a model.toml, and a model of that version, that is there.")
def adopt(
    file: Path,
    repository: Path | None,
    name: str | None,
    version: int,
    constants: tuple[str, ...],
    states: tuple[str, ...],
    chunk: int | None,
    context: int,
    force: bool,
) -> None:
    """Look at an ONNX file that was made elsewhere, and write a first model.toml beside it.

    It names states, axes and constants by what pairs up, runs the model to see whether a batch equals one by one, and
    says what to look at again. With --repository, both files are put where `rnnserve serve` finds them.
    """
    for package, extra in (("onnx", "cpu"), ("onnxruntime", "cpu")):
        if find_spec(package) is None:
            _end(f"adopt needs {package}: pip install 'rnnserve[{extra}]'", USAGE)
    from service.adapter import import_onnx
    from service.adopt import Hints, look
    from service.adoptcheck import check
    from service.errors import ServiceError
    from service.modelfile import DESCRIPTION_FILE

    hints = Hints(
        constants={key: _value(text) for key, text in _pairs(constants, "--constant")},
        states=dict(_pairs(states, "--state")),
        chunk=chunk,
        context=context,
    )
    if name is not None and (name.startswith(".") or {"/", "\\"} & set(name)):
        _end(f"--name {name}: expected the name of a folder of the repository", USAGE)
    folder = file.parent if repository is None else repository / (name or file.stem) / str(version)
    target = folder / DESCRIPTION_FILE
    if target.exists() and not force:
        _end(f"{target} is there already: --force writes over it", USAGE)
    try:
        graph = _graph(import_onnx(), file)
        found = look(graph, hints)
        verdict = check(file, graph, found)
        text = found.text(file.name, verdict)
    except ServiceError as error:
        _end(str(error) if str(error).startswith(str(file.parent)) else f"{file}: {error}", FAILED)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if repository is not None:
            _copy(file, folder)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        _end(f"{error.filename or folder}: {error.strerror}", FAILED)
    click.echo(text, nl=False)
    click.echo(f"\nwritten: {target}", err=True)
    for doubt in found.doubts:
        click.echo(f"look at {doubt}", err=True)
    where = repository or "REPOSITORY"
    if repository is None:
        click.echo(f"next: put both files into {where}/NAME/1/, the model as model.onnx", err=True)
    click.echo(f"next: rnnserve serve --repository {where}", err=True)


def _graph(onnx_package: Any, file: Path) -> onnx.GraphProto:
    from models.spec import METADATA_KEY
    from service.errors import ModelBroken

    try:
        model = onnx_package.load(file, load_external_data=False)
    except Exception as error:
        raise ModelBroken(f"onnx can't read it: {error}") from error
    if any(each.key == METADATA_KEY for each in model.metadata_props):
        raise ModelBroken("it says itself what it is (rnnserve describe shows it): it is served without a model.toml")
    graph: onnx.GraphProto = model.graph
    return graph


def _copy(file: Path, folder: Path) -> None:
    """Put a model, and the files of its weights if it has some, into a version's folder."""
    import onnx

    from models.spec import MODEL_FILE
    from service.adapter import weight_files

    files = {file: folder / MODEL_FILE}
    for each in weight_files(onnx.load(file, load_external_data=False), file.parent):
        files[each] = folder / each.relative_to(file.parent)
    for source, target in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)


def _pairs(given: tuple[str, ...], option: str) -> list[tuple[str, str]]:
    found = []
    for each in given:
        name, separator, value = each.partition("=")
        if not (name and separator and value):
            _end(f"{option} {each}: expected NAME=VALUE", USAGE)
        found.append((name, value))
    return found


def _value(text: str) -> Any:
    """Read a number, a list of numbers, true or false."""
    try:
        return {"true": True, "false": False}[text] if text in ("true", "false") else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        _end(f"--constant: {text!r} is no number, list of numbers, true or false", USAGE)


def _end(message: str, code: int) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    raise SystemExit(code)
