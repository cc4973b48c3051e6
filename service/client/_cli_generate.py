"""`rnnserve generate`: sequences that a model makes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from service.client._cli_options import client_of, complete_models, priority_option, server_options

if TYPE_CHECKING:
    from service.client import Client, Generated
    from service.client.info import ModelInfo

CALL_SEQUENCES = 256
"""Most sequences of one call; more inputs make more calls."""


@click.command(short_help="Have a model make sequences.")
@click.argument("model", shell_complete=complete_models)
@click.argument("inputs", nargs=-1, metavar="[INPUT]...")
@click.option("-n", "--num", default=1, show_default=True, metavar="N", help="Sequences, or hypotheses, of each INPUT.")
@click.option("--prompt", metavar="TEXT", help="What is fed first, for every INPUT of an encoder-decoder.")
@click.option("--temperature", default=0.0, show_default=True, help="0 chooses the likeliest; else outputs are drawn.")
@click.option("--seed", type=int, metavar="N", help="Of the draws; each sequence counts one on.  [default: made up]")
@click.option("--top-k", default=0, metavar="K", help="Draw among the K likeliest only.")
@click.option("--top-p", default=0.0, metavar="P", help="Draw among the likeliest only that reach this probability.")
@click.option("--beams", default=0, metavar="N", help="Search for the likeliest sequences, so many at a time.")
@click.option(
    "--length-normalization",
    default=0.0,
    metavar="POWER",
    help="Of the length, which log-probabilities are divided by.",
)
@click.option("--max-steps", default=0, metavar="N", help="Most outputs of a sequence; the model's limit by default.")
@click.option("--model-version", default=0, metavar="N", help="Version of the model; the newest by default.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a sequence.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Longest time for each call.")
@priority_option
@server_options
def generate(
    model: str,
    inputs: tuple[str, ...],
    num: int,
    prompt: str | None,
    model_version: int,
    timeout: float | None,
    *,
    as_json: bool,
    **options: Any,
) -> None:
    """Have MODEL make a sequence of each INPUT, one output after another.

    INPUT is the text that an encoder-decoder reads (hello), what a model on tokens begins with ("<girl>", or nothing),
    or a row of numbers, by place or by name (1,0 or winter=1); - stands for the lines of standard input. Prints INPUT
    and what was made, with a tab between; under --json also ids, log-probabilities and why it ended.
    """
    if num < 1:
        raise click.BadParameter("expected 1 or more", param_hint="-n")
    texts = [text for given in inputs for text in (sys.stdin.read().splitlines() if given == "-" else [given])]
    with client_of(options) as client:
        info = client.model(model, model_version, timeout=timeout)
        terms = {**options, "version": info.version, "timeout": timeout}
        for text, made in _made(client, info, texts, num, prompt, terms):
            for line in _lines(info, text, made, as_json=as_json):
                click.echo(line)


def _made(
    client: Client, info: ModelInfo, texts: list[str], num: int, prompt: str | None, terms: dict[str, Any]
) -> Iterator[tuple[str, Generated]]:
    """Generate in calls of a bounded size: (input, what was made of it), best first."""
    if terms["beams"]:
        terms["num_hypotheses"] = num
        repeats = 1
    else:
        repeats = num
    rows = [text for text in texts or [""] for _ in range(repeats)]
    for start in range(0, len(rows), CALL_SEQUENCES):
        part = rows[start : start + CALL_SEQUENCES]
        seed = terms.pop("seed", None)
        given = _arguments(info, part, prompt, has_inputs=bool(texts))
        made = client.generate(info.name, **given, **terms, seed=None if seed is None else seed + start)
        terms["seed"] = seed
        for text, best in zip(part, made, strict=True):
            yield text, best
            yield from ((text, other) for other in best.others)


def _arguments(info: ModelInfo, texts: list[str], prompt: str | None, *, has_inputs: bool) -> dict[str, Any]:
    """Read inputs as the model takes them: inputs and prompts of Client.generate."""
    import numpy as np

    from service.client._generation import values_of

    prompts = None if prompt is None else [prompt] * len(texts)
    generation = info.generation
    if generation is None:  # the client says so
        return {"inputs": texts}
    if generation.source_inputs:
        return {"inputs": texts if has_inputs else None, "prompts": prompts}
    rows = [spec for spec in info.inputs if spec.layout == "per_sequence"]
    if rows:
        values = [values_of(text, rows[0]) for text in texts] if has_inputs else None
        return {"inputs": None if values is None else np.stack(values), "prompts": prompts}
    return {"prompts": [text or () for text in texts] if prompt is None else prompts}


def _lines(info: ModelInfo, text: str, made: Generated, *, as_json: bool) -> Iterator[str]:
    from service.client._render import Renderer, dump, plain

    if as_json:
        facts: dict[str, Any] = {"input": text, "finish_reason": made.finish_reason}
        if made.outputs:
            facts["outputs"] = {name: plain(array) for name, array in made.outputs.items()}
        else:
            facts |= {"text": made.text, "ids": made.ids.tolist(), "log_prob": made.log_prob}
            facts["log_probs"] = plain(made.log_probs)
        optional = {"score": made.score, "seed": made.seed}
        yield dump(facts | {name: value for name, value in optional.items() if value is not None})
    elif made.outputs:
        first = next(iter(made.outputs))
        renderer = Renderer(info, first)
        yield from (f"{text}\t{step}\t{renderer.text(row)}" for step, row in enumerate(made.outputs[first]))
    else:
        yield f"{text}\t{made.text}"
