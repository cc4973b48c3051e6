"""What a model file says of itself, for people and for programs. Torch-free."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

from models.modelfile import ModelFile
from models.quantization import quantization_lines
from models.spec import LENGTHS, SOURCE_LENGTHS, Layout, Spec, StateSpec, TensorSpec

_WIDTH = 110
_INDENT = 14
_MOST_NAMED = 20
"""Categories, and entries of a vocabulary, that are named."""


def as_json(model: ModelFile) -> dict[str, Any]:
    """Everything but the golden arrays, which are numbers for programs that check the file."""
    mode, why = model.spec.step_mode
    return {
        "path": str(model.path),
        "size": model.size,
        "sha256": model.digest,
        "step_mode": mode.value,
        "step_mode_reason": why,
        "num_golden": len(model.spec.golden),
        "spec": model.spec.model_dump(mode="json", exclude={"golden"}),
    }


def as_text(model: ModelFile) -> str:
    """Describe a file in lines for people."""
    spec = model.spec
    mode, why = spec.step_mode
    training = spec.training
    parity = spec.parity
    lines = [str(model.path)]
    lines += _entry("task", f"{training.task}, {spec.topology}")
    lines += _entry("data", training.data_set + (f"; licence {training.license}" if training.license else ""))
    lines += _entry("layers", *_layers(spec))
    lines += _entry("parameters", f"{spec.num_parameters:,}")
    lines += _entry("step mode", f"{mode.value}: {why}")
    for graph in spec.graphs:
        if graph.role != "model":
            lines += _entry(graph.role, f"the graph in {graph.file}")
        lines += _entry("inputs", *(line for tensor in graph.inputs for line in _tensor(tensor)))
        lines += _entry("", f"{LENGTHS}  [batch] int32, steps of each row, never 0")
        if graph.reads_source:
            lines += _entry("", f"{SOURCE_LENGTHS}  [batch] int32, steps of each row's source, never 0")
        lines += _entry("outputs", *(line for tensor in graph.outputs for line in _tensor(tensor)))
        lines += _entry("states", *map(_state, graph.states))
        lines += _entry("operators", ", ".join(f"{count} {name}" for name, count in graph.operators.items()))
    if spec.generation is not None:
        lines += _entry("generation", *_generation(spec))
    if spec.labels:
        lines += _entry("labels", ", ".join(f"{number} = {label}" for number, label in enumerate(spec.labels)))
    if spec.vocabulary:
        lines += _entry("vocabulary", _named(spec.vocabulary))
    lines += _entry("metrics", *_metrics(training.metrics))
    lines += _entry("recipe", ", ".join(f"{name} {value}" for name, value in training.recipe.items()))
    lines += _entry("made with", ", ".join(f"{name} {version}" for name, version in spec.versions.items()))
    if spec.quantization is not None:
        lines += _entry("int8", *quantization_lines(spec.quantization, model.size))
    whose = spec.expected_of
    lines += _entry(
        "parity",
        f"{whose} and onnxruntime differ by {parity.max_abs_error:.2g} at most, in {parity.num_cases} cases; "
        f"{parity.tolerance:.0e} is allowed, absolute and relative to the value",
    )
    lines += _entry("golden", f"{len(spec.golden)} inputs with the answers of {whose}: rnnserve verify {model.path}")
    lines += _entry("size", f"{model.size:,} bytes")
    lines += _entry("sha256", model.digest)
    return "\n".join(lines)


def _entry(name: str, *paragraphs: str) -> list[str]:
    """Lay out one entry; nothing where it has no text."""
    lines: list[str] = []
    for number, text in enumerate(paragraph for paragraph in paragraphs if paragraph):
        head = f"  {name if number == 0 else '':<{_INDENT - 2}}"
        body = _WIDTH - _INDENT
        lines += [
            (head if first == 0 else " " * _INDENT) + line
            for first, line in enumerate(textwrap.wrap(text, body, break_long_words=False, break_on_hyphens=False))
        ]
    return lines


def _layers(spec: Spec) -> Iterable[str]:
    for number, layer in enumerate(spec.layers):
        way = "bidirectional" if layer.directions == 2 else "backward" if layer.go_backwards else "forward"
        gates = "" if layer.cell == "rnn" else f", gates {layer.recurrent_activation}"
        read = f" over windows of {layer.window} rows" if layer.window else ""
        form = "" if layer.form == "operator" else f", {layer.form}: no {layer.cell.upper()} operator"
        yield (
            f"{number}: {layer.cell.upper()}, {layer.hidden} units, {way}{read}, "
            f"activation {layer.activation}{gates}{form}"
        )


def _generation(spec: Spec) -> Iterable[str]:
    """Say how outputs are made, one setting a line."""
    settings = spec.generation
    if settings is None:
        return
    if not settings.token_input:
        yield f"{settings.max_steps} steps, every one from the same input"
        return

    def named(number: int | None) -> str:
        word = spec.vocabulary[number] if number is not None and number < len(spec.vocabulary) else ""
        return f"{number} = {word}" if word else str(number)

    begins = "the ids that the caller gives" if settings.begin_id is None else f"the id {named(settings.begin_id)}"
    yield f"{settings.max_steps} steps at most; {settings.token_input} takes the id chosen by {settings.scores_output}"
    yield f"begins with {begins}"
    if settings.end_id is not None:
        yield f"ends with the id {named(settings.end_id)}, which is no part of the answer"


def _named(entries: tuple[str, ...]) -> str:
    more = ", ..." * (len(entries) > _MOST_NAMED)
    return f"{len(entries)} entries: {', '.join(entries[:_MOST_NAMED])}{more}"


def _tensor(tensor: TensorSpec) -> Iterable[str]:
    axes = {
        Layout.PER_STEP: ["batch", "time"],
        Layout.PER_SEQUENCE: ["batch"],
        Layout.SHARED: [],
        Layout.PER_SOURCE_STEP: ["batch", "source"],
    }[tensor.layout]
    shape = ", ".join([*axes, *map(str, tensor.row_shape)])
    unit = f", in {tensor.unit}" if tensor.unit else ""
    yield f"{tensor.name}  [{shape}] {tensor.dtype}{unit}: {tensor.description or tensor.layout.value}"
    if tensor.element_names:
        yield f"   elements: {', '.join(tensor.element_names)}"
    if tensor.categories:
        named = [f"{number} = {name}" for number, name in enumerate(tensor.categories)][1:]
        more = [f"... {len(named)} in all"] * (len(named) > _MOST_NAMED)
        yield f"   ids: {', '.join(['0 = any other', *named[:_MOST_NAMED], *more])}"


def _state(state: StateSpec) -> str:
    shape = ", ".join(["batch", *map(str, state.row_shape)])
    return f"{state.name} -> {state.next_name}  [{shape}] {state.dtype}, {state.initial or 'zeros'} to begin with"


def _metrics(metrics: dict[str, float]) -> Iterable[str]:
    for name, value in metrics.items():
        yield f"{name} {value:,.4f}" if value != int(value) else f"{name} {int(value):,}"
