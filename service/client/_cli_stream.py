"""`rnnserve stream`: one line for each timestep, as it arrives."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

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
    from service.client.info import Priority

T = TypeVar("T")
REPLAY_WINDOW = 256
"""Steps whose answers a session that lingers keeps, so that none is lost when the connection breaks."""


@click.command(short_help="Stream timesteps through a model.")
@click.argument("model", shell_complete=complete_models)
@click.argument("file", default="-", shell_complete=complete_files)
@click.option("--model-version", default=0, metavar="N", help="Version of the model; the newest by default.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a timestep.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), metavar="HZ", help="Send so many steps a second.")
@click.option("--session", default="", metavar="ID", help="Name the session, so that it can be resumed.")
@click.option(
    "--linger",
    default=0.0,
    metavar="SECONDS",
    help="Leave the session to be resumed for that long; also resumes by itself when the connection breaks.",
)
@click.option("--resume", is_flag=True, help="Go on with the session, which must be live.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Longest time to open, or for a step to wait.")
@text_option
@priority_option
@server_options
def stream(
    model: str,
    file: str,
    model_version: int,
    rate: float | None,
    session: str,
    linger: float,
    timeout: float | None,
    priority: Priority,
    *,
    as_json: bool,
    is_text: bool,
    resume: bool,
    **options: Any,
) -> None:
    """Send timesteps to MODEL and print an output for each, as it arrives.

    FILE is .npy, .npz, or text with a timestep a line: CSV (a row of names at its top is skipped, or picks the columns
    if the model names its inputs) or JSON lines; under --text it is a text. Without FILE, or with -, it is standard
    input. Prints position, label and probability for a classifier, else position and values, with tabs between. A model
    that needs the whole sequence answers when the input has ended.
    """
    if (linger or resume) and not session:
        raise click.UsageError("--linger and --resume need --session ID")
    if is_text and file == "-":
        raise click.UsageError("--text needs the text")
    from service.client._files import InputError, read_steps, read_text
    from service.client._render import Renderer, dump

    with client_of(options) as client:
        live = client.stream(
            model,
            version=model_version,
            session_id=session,
            linger=linger,
            replay_window=REPLAY_WINDOW if linger else 0,
            resume_only=resume,
            priority=priority,
            timeout=timeout,
        )
        with live as sequence:
            info = sequence.model
            first = info.outputs[0].name
            renderer = Renderer(info, first)
            begin = sequence.position
            position = 0 if sequence.step_mode == "buffered" else begin
            outputs = sequence.run_outputs(_paced(read_text(file, info) if is_text else read_steps(file, info), rate))
            for each in outputs:
                if info.outputs[0].layout != "per_step" and sequence.step_mode == "buffered":
                    position = sequence.position - 1
                if as_json:
                    line = dump({"position": position, **renderer.facts(each, is_row=True)})
                else:
                    line = f"{position}\t{renderer.text(each[first])}"
                click.echo(line)  # flushes
                position += 1
            if sequence.position == begin:
                raise InputError(f"{'standard input' if file == '-' else file}: no timesteps")


def _paced(steps: Iterable[T], rate_hz: float | None) -> Iterator[T]:
    """Hold steps back so that no more than `rate_hz` come in a second."""
    due = time.monotonic()
    for step in steps:
        if rate_hz is not None:
            time.sleep(max(0.0, due - time.monotonic()))
            due = max(due, time.monotonic()) + 1 / rate_hz
        yield step
