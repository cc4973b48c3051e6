"""The command `rnnserve import`. Torch-free when imported, as models.cli is."""

from __future__ import annotations

from pathlib import Path

import click

from models.cli import needs, reports_errors, tell_written
from models.errors import ConversionError

_MODULES = ("torch", "onnx", "onnxscript", "h5py", "onnxruntime")


@click.command(name="import", short_help="Convert a saved Keras 3 model.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--repository", type=click.Path(path_type=Path), required=True, help="Directory that a server reads models from."
)
@click.option("--name", help="Name of the model.  [default: the file's]")
@click.option("--version", type=int, help="Version of the model.  [default: the next]")
@click.option("--labels", metavar="A,B,...", help="Classes in the order of the scores.")
@click.option("--input-names", metavar="A,B,...", help="Features of a step.")
@click.option("--output-names", metavar="A,B,...", help="Values of an answer.")
@click.option("--input-unit", default="", help="Physical unit of the input.")
@click.option("--output-unit", default="", help="Physical unit of the answer.")
@click.option(
    "--categories",
    type=click.Path(path_type=Path),
    help="Text file of what an Embedding's ids stand for, from id 1 on.",
)
@reports_errors
def import_(
    file: Path,
    repository: Path,
    name: str | None,
    version: int | None,
    labels: str | None,
    input_names: str | None,
    output_names: str | None,
    input_unit: str,
    output_unit: str,
    categories: Path | None,
) -> None:
    """Convert FILE, a .keras archive that Keras 3 has saved, to REPOSITORY/NAME/VERSION/model.onnx.

    Neither keras nor tensorflow is needed, and no code of the file's is run. A layer or option that cannot be
    converted is named. A line of --categories names an id, the first line id 1; id 0 is padding or unknown.
    """
    with needs("import", *_MODULES):
        from models.export import write_version
        from models.importers.keras_model import Names, import_keras

    names = Names(
        labels=_split(labels),
        input_names=_split(input_names),
        output_names=_split(output_names),
        input_unit=input_unit,
        output_unit=output_unit,
        categories=_lines(categories),
    )
    files, spec = import_keras(file, names)
    path = write_version(files, repository, name or file.stem, version)
    tell_written(path, spec, sum(map(len, files.values())), repository)


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(each.strip() for each in text.split(",")) if text else ()


def _lines(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        return ("", *path.read_text(encoding="utf-8").splitlines())
    except OSError as error:
        raise ConversionError(f"--categories {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConversionError(f"--categories {path} is not UTF-8 text") from error
