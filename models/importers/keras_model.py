"""From a `.keras` file to a model version: the chain of its layers as stages, exported as any module is."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.errors import ConversionError
from models.export import Files, export_model
from models.graphs import GraphModule, draw_like
from models.importers.keras_chain import KerasLayer, read_chain
from models.importers.keras_file import KerasFile
from models.importers.keras_layers import Builder, Form
from models.importers.stages import ImportedNet
from models.spec import Generation, GraphSpec, Layout, Spec, TensorSpec, Topology, Training


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What a Keras file does not say of its model, for the people who use it."""

    labels: tuple[str, ...] = ()
    """Classes in the order of the scores."""
    input_names: tuple[str, ...] = ()
    """Features of a step."""
    output_names: tuple[str, ...] = ()
    """Values of an answer."""
    input_unit: str = ""
    """Physical unit of the input."""
    output_unit: str = ""
    """Physical unit of the answer."""
    categories: tuple[str, ...] = ()
    """What the ids of an Embedding stand for, by id; the first is empty."""


def import_keras(path: Path, names: Names = Names()) -> tuple[Files, Spec]:
    """Convert a model that Keras 3 has saved; its answers are compared with those of the file that is made.

    Raises ForeignFileError for a file that cannot be read, ConversionError for a layer or option that cannot be
    converted, and ExportError and ParityError as every export does.
    """
    file = KerasFile(path)
    part, topology, generation = convert(file, names)
    training = Training(
        task=str(file.config.get("config", {}).get("name", path.stem)),
        data_set=f"not recorded: imported from {path.name}, which Keras {file.keras_version} saved on {file.saved}",
        recipe={"file": path.name, "sha256": file.sha256, "keras": file.keras_version},
    )
    num_parameters = sum(each.numel() for each in part.module.parameters())
    return export_model(
        [part],
        topology=topology,
        training=training,
        num_parameters=num_parameters,
        labels=names.labels,
        generation=generation,
    )


def convert(file: KerasFile, names: Names) -> tuple[GraphModule, Topology, Generation | None]:
    """Build the module that answers as the Keras model does, and describe its graph."""
    first, *layers = read_chain(file.config)
    ids = next((layer for layer in layers[:1] if layer.class_name == "Embedding"), None)
    row, has_steps = _input_row(first, ids)
    builder = Builder(file, Form("steps" if has_steps else "sequence", row))
    for layer in layers:
        builder.add(layer)
    form = builder.form
    net = ImportedNet(builder.stages, has_steps=has_steps, answers_by_step=form.axis != "sequence").eval()
    if not net.layers:
        raise ConversionError("the model has no SimpleRNN, LSTM or GRU: there is nothing to step through")
    if not has_steps and form.unrolls is None:
        raise ConversionError(
            "the model's input has no time axis, and no RepeatVector makes one: give it a shape (None, features)"
        )
    num_ids = ids.count("input_dim") if ids is not None else None
    _check_names(names, row, form, num_ids)
    spec = GraphSpec(
        layers=net.layers,
        inputs=(
            TensorSpec(
                name="x",
                dtype="float32" if num_ids is None else "int64",
                row_shape=row,
                layout=Layout.PER_STEP if has_steps else Layout.PER_SEQUENCE,
                unit=names.input_unit,
                description=f"input {first.name!r} of the Keras model",
                element_names=names.input_names,
                num_ids=num_ids,
                categories=names.categories,
            ),
        ),
        outputs=(
            TensorSpec(
                name="y",
                dtype="float32",
                row_shape=form.row,
                layout=Layout.PER_SEQUENCE if form.axis == "sequence" else Layout.PER_STEP,
                unit=names.output_unit,
                description=_describe(form, layers[-1]),
                element_names=names.output_names or names.labels,
            ),
        ),
        states=net.states,
    )
    ready = copy.deepcopy(net)
    ready.freeze()
    part = GraphModule(module=net, ready=ready, spec=spec, draw=draw_like(np.zeros(()), np.ones(())))
    topology: Topology = "one-to-many" if form.unrolls else "many-to-many" if form.axis == "steps" else "many-to-one"
    return part, topology, Generation(max_steps=form.unrolls) if form.unrolls else None


def _input_row(first: KerasLayer, ids: KerasLayer | None) -> tuple[tuple[int, ...], bool]:
    """Read the shape of the input; returns (the shape of a row, whether it has steps)."""
    shape = first.config.get("batch_shape")
    if not isinstance(shape, list) or not all(each is None or isinstance(each, int) for each in shape):
        raise first.refuse(f"batch_shape={shape!r} is no shape")
    rest = shape[1:]
    if ids is not None:
        if len(rest) > 1:
            raise first.refuse(f"shape={rest}: ids [batch, time] or [batch] are converted")
        return (), len(rest) == 1
    has_steps = len(rest) == 2
    if not 1 <= len(rest) <= 2 or rest[-1] is None or rest[-1] < 1:
        raise first.refuse(f"shape={rest}: (None, features), or (features,) before a RepeatVector, are converted")
    return (rest[-1],), has_steps


def _check_names(names: Names, row: tuple[int, ...], form: Form, num_ids: int | None) -> None:
    """Check that there is a name for each thing that is named."""
    for what, given, wanted in (
        ("labels", names.labels, form.row[-1]),
        ("output names", names.output_names, form.row[-1]),
        ("input names", names.input_names, row[-1] if row else 0),
        ("categories", names.categories, num_ids or 0),
    ):
        if given and len(given) != wanted:
            raise ConversionError(f"{len(given)} {what} for {wanted}: give one for each")
    if names.categories and names.categories[0]:
        raise ConversionError("the first category has to be empty: id 0 stands for padding and whatever is unknown")


def _describe(form: Form, last: KerasLayer) -> str:
    what = f"what layer {last.name!r} answers"
    if form.axis == "running":
        return f"{what} to the steps so far; the last is final"
    return f"{what} to the whole sequence" if form.axis == "sequence" else f"{what} at each step"
