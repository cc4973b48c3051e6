"""`rnnserve predict`: whole sequences from files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.client._cli_options import (
    client_of,
    complete_files,
    complete_models,
    priority_option,
    server_options,
    text_option,
)

if TYPE_CHECKING:
    from service.client import Client
    from service.client._files import Step
    from service.client.info import Emit, ModelInfo, Prediction, Priority

CALL_SEQUENCES = 256
CALL_BYTES = 8 * 1024 * 1024
"""Most that one call carries; more files make more calls."""


@click.command(short_help="Run whole sequences through a model.")
@click.argument("model", shell_complete=complete_models)
@click.argument("files", nargs=-1, required=True, metavar="FILE...", shell_complete=complete_files)
@click.option("--model-version", default=0, metavar="N", help="Version of the model; the newest by default.")
@click.option("--last", is_flag=True, help="Ask for the last step's output only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a sequence.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the outputs to an .npz file.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Longest time for each call.")
@text_option
@priority_option
@server_options
def predict(
    model: str,
    files: tuple[str, ...],
    model_version: int,
    output: Path | None,
    timeout: float | None,
    priority: Priority,
    *,
    last: bool,
    as_json: bool,
    is_text: bool,
    **options: Any,
) -> None:
    """Run whole sequences through MODEL and print what it says of each.

    A .npy file holds one sequence [time, features] or several of one length; .npz one for each name in it; any other
    FILE is CSV or JSON lines with a timestep a line, and - is standard input; under --text it is a text, such as Mary.
    Prints the label and its probability for a classifier, else the values of every step: name, step, values, with tabs
    between.
    """
    from service.client._codec import check_predicts
    from service.client._files import read_sequences, read_text

    with client_of(options) as client:
        info = client.model(model, model_version, timeout=timeout)
        check_predicts(info)
        sequences: list[tuple[str, Step]]
        if is_text:
            sequences = [(text, read_text(text, info)) for text in files]
        else:
            sequences = [found for path in files for found in read_sequences(path, info)]
        saved: dict[str, Any] = {}
        for names, prediction in _calls(client, info, sequences, last=last, timeout=timeout, priority=priority):
            if output is not None:
                _collect(saved, names, prediction)
            for line in _lines(info, names, prediction, last=last, as_json=as_json):
                click.echo(line)
        if output is not None:
            _save(output, saved)


def _calls(
    client: Client, info: ModelInfo, sequences: list[tuple[str, Step]], *, last: bool, **terms: Any
) -> Iterator[tuple[list[str], Prediction]]:
    """Predict in calls of a bounded size: (names, prediction).

    terms  arguments of Client.predict
    """
    names: list[str] = []
    batch: list[Any] = []
    emit: Emit = "last" if last else "all"
    num_bytes = 0
    for i, (name, sequence) in enumerate(sequences):
        names.append(name)
        batch.append(sequence)
        num_bytes += sum(x.nbytes for x in (sequence.values() if isinstance(sequence, dict) else [sequence]))
        if i + 1 == len(sequences) or len(batch) == CALL_SEQUENCES or num_bytes > CALL_BYTES:
            xs = {key: [x[key] for x in batch] for key in sequence} if isinstance(sequence, dict) else batch
            yield names, client.predict(info.name, xs, version=info.version, emit=emit, **terms)
            names, batch, num_bytes = [], [], 0


def _lines(info: ModelInfo, names: list[str], prediction: Prediction, *, last: bool, as_json: bool) -> Iterator[str]:
    from service.client._render import Renderer, dump

    first = next(iter(prediction.outputs))
    renderer = Renderer(info, first)
    spec = info.output(first)
    is_row = last or (spec is not None and spec.layout != "per_step")
    for i, (name, y) in enumerate(zip(names, prediction, strict=True)):
        if as_json:
            outputs = {key: arrays[i] for key, arrays in prediction.outputs.items()}
            yield dump({"sequence": name, **renderer.facts(outputs, is_row=is_row)})
        elif is_row:
            yield f"{name}\t{renderer.text(y)}"
        elif renderer.has_labels and info.topology == "many-to-one":
            yield f"{name}\t{renderer.text(y[-1])}"
        else:
            yield from (f"{name}\t{step}\t{renderer.text(row)}" for step, row in enumerate(y))


def _collect(saved: dict[str, Any], names: list[str], prediction: Prediction) -> None:
    """Name arrays for the file: by sequence, and by output too where there are several."""
    for output, arrays in prediction.outputs.items():
        for name, array in zip(names, arrays, strict=True):
            key = name if len(prediction.outputs) == 1 else f"{name}/{output}"
            saved[key if key not in saved else f"{key}#{len(saved)}"] = array


def _save(path: Path, arrays: dict[str, Any]) -> None:
    import numpy as np

    from service.client._files import InputError

    try:
        with path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
