"""`rnnserve models`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from service.client._cli_options import client_of, complete_models, server_options

if TYPE_CHECKING:
    from service.client.info import BrokenModelInfo, ModelInfo, ModelList, TensorInfo

_SHOWN = 40
"""Words of a vocabulary that are shown."""


@click.command(short_help="List models, or tell all about one.")
@click.argument("name", required=False, shell_complete=complete_models)
@click.option("--model-version", default=0, metavar="N", help="Version of NAME; the newest by default.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--timeout", default=10.0, show_default=True, metavar="SECONDS", help="Longest time for the answer.")
@server_options
def models(name: str | None, model_version: int, timeout: float, *, as_json: bool, **options: Any) -> None:
    """List the models of a server, or tell all about one."""
    with client_of(options) as client:
        if name is None:
            found = client.models(timeout=timeout)
            click.echo(_list_json(found) if as_json else _table(found))
        else:
            model = client.model(name, model_version, timeout=timeout)
            click.echo(json.dumps(_facts(model), indent=2) if as_json else _sheet(model))


def _list_json(models: ModelList) -> str:
    broken = [asdict(model) for model in models.broken]
    return json.dumps({"models": [_facts(model) for model in models], "broken": broken}, indent=2)


def _facts(model: ModelInfo) -> dict[str, Any]:
    return asdict(model) | {"spec_json": json.loads(model.spec_json) if model.spec_json else None}


def _table(models: ModelList) -> str:
    head = ("MODEL", "VERSION", "CELL", "TOPOLOGY", "STEPS", "INPUT", "OUTPUT", "BATCHING")
    rows = [
        (
            model.name,
            str(model.version),
            model.cell,
            model.topology,
            model.step_mode,
            ", ".join(map(_shape, model.inputs)),
            ", ".join(map(_shape, model.outputs)),
            model.exactness,
        )
        for model in models
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    lines += [f"broken: {_name(model)}: {model.error}" for model in models.broken]
    return "\n".join(line.rstrip() for line in lines)


def _name(broken: BrokenModelInfo) -> str:
    return f"{broken.name} {broken.version}" if broken.version else broken.name


def _sheet(model: ModelInfo) -> str:
    facts = {
        "model": f"{model.name}, version {model.version}",
        "network": f"{model.cell}, {model.topology}, {model.num_parameters:,} parameters",
        "steps": f"{model.step_mode}: {model.step_mode_reason}",
        "batching": f"{model.exactness}: {model.exactness_detail}",
        "task": model.task,
        "metrics": ", ".join(f"{name} {value:.4g}" for name, value in sorted(model.metrics.items())),
        "labels": ", ".join(model.labels),
        "vocabulary": _some(model.vocabulary),
        "generates": _generation(model),
        "provider": model.provider,
        "limit": f"{model.max_inflight_steps} unanswered steps of a session",
        "digest": model.digest,
    }
    lines = [f"{name:<10}  {value}" for name, value in facts.items() if value]
    tensors = [("input", tensor) for tensor in model.inputs] + [("output", tensor) for tensor in model.outputs]
    lines += [f"{kind:<10}  {_shape(tensor)}{_words(tensor)}" for kind, tensor in tensors]
    lines += [f"{'state':<10}  {state.name} {state.dtype} {list(state.row_shape)}" for state in model.states]
    return "\n".join(lines)


def _some(words: tuple[str, ...]) -> str:
    shown = [word or "(other)" for word in words[:_SHOWN]]
    return " ".join([*shown, f"... {len(words)} in all"] if len(words) > _SHOWN else shown)


def _generation(model: ModelInfo) -> str:
    generation = model.generation
    if generation is None:
        return ""
    given = [t.name for t in model.inputs if t.name in generation.source_inputs or t.layout == "per_sequence"]
    begins = "" if not generation.token_input or generation.begin_id is not None else ", after a prompt"
    return f"up to {generation.max_steps} outputs{' from ' + ', '.join(given) if given else ''}{begins}"


def _shape(tensor: TensorInfo) -> str:
    axes = {"per_step": ["time"], "per_sequence": [], "shared": []}[tensor.layout]
    return f"{tensor.name} {tensor.dtype} [{', '.join([*axes, *map(str, tensor.row_shape)])}]"


def _words(tensor: TensorInfo) -> str:
    words = [tensor.unit, tensor.description, ", ".join(tensor.element_names), ", ".join(tensor.categories[1:])]
    return "".join(f"; {word}" for word in words if word)
