"""From a net to one ONNX file that a server can step: the graph, its spec, and the gate before anything is written."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
import torch

from models.errors import ExportError, RunError
from models.mixed import MixedNet, Net, example_inputs
from models.runs import Run, versions, write_whole
from models.spec import LENGTHS, METADATA_KEY, GraphSpec, LayerSpec, Layout, Spec, StateSpec, Training
from models.tasks import Task
from models.train import load_net
from models.verify import gate

OPSET = 18
"""All that the graph needs; above 21, recurrent operators have no CUDA kernels."""
FILE = "model.onnx"
"""Name of the file within a version's directory."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A file that was written."""

    path: Path
    spec: Spec
    size: int
    """Bytes."""


def export_run(run: Run, repository: Path, *, name: str | None = None, version: int | None = None) -> Exported:
    """Export a run's best net as `<repository>/<name>/<version>/model.onnx`.

    name is the task's, and version the next free one, unless given.
    Raises RunError for a directory that holds no run, ExportError for a name or version that cannot be had, and
    ParityError where the file would answer differently; nothing is written then.
    """
    task, recipe, net, validation = load_net(run)
    training = Training(
        task=task.name,
        data_set=task.data_set,
        license=task.license,
        metrics=_metrics(run, validation),
        recipe=recipe.to_dict(),
    )
    model, spec = export_net(net, task, training)
    content = model.SerializeToString()
    path = write_version(content, repository, name or task.name, version)
    return Exported(path=path, spec=spec, size=len(content))


def export_net(net: Net, task: Task, training: Training) -> tuple[onnx.ModelProto, Spec]:
    """Make the ONNX model of a net, its spec within, once it has passed the gate.

    Raises ExportError and ParityError.
    """
    model = to_onnx(net)
    graph = _graph_spec(net, task, model)
    parity, golden = gate(net, model.SerializeToString(), graph)
    spec = Spec(
        topology=task.topology,
        num_parameters=net.num_parameters,
        graphs=(graph,),
        labels=task.labels,
        training=training,
        versions=versions("torch", "onnx", "onnxscript") | {"onnxruntime": onnxruntime.__version__},
        parity=parity,
        golden=golden,
    )
    onnx.helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    return model, spec


def to_onnx(net: Net) -> onnx.ModelProto:
    """Trace a net into an ONNX graph: one operator per recurrent layer, dynamic batch and time.

    Raises ExportError when the exporter fails, or its graph is not what a server needs.
    """
    ready = net.for_export()
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    rows, steps = 3, 5
    inputs = example_inputs(net, rows, steps)
    states = tuple(torch.zeros(rows, *net.state_shape) for _ in net.state_names)
    lengths = torch.tensor([steps, 2, 1], dtype=torch.int32)
    axes = [{0: batch, 1: time}] * len(inputs) + [{0: batch}] * (1 + len(states))
    try:
        with _quiet():
            program = torch.onnx.export(
                ready,
                (*inputs.values(), lengths, *states),
                dynamo=True,
                # As the arguments of forward are: those after a star are one tuple.
                dynamic_shapes=(tuple(axes),) if isinstance(net, MixedNet) else (*axes[:2], tuple(axes[2:])),
                input_names=[*inputs, LENGTHS, *net.state_names],
                output_names=["y", *(f"{name}.next" for name in net.state_names)],
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"torch.onnx.export failed: {str(error).splitlines()[0]}") from error
    if program is None:
        raise ExportError("torch.onnx.export made nothing")
    model = program.model_proto
    _tidy(model)
    _check(model, net)
    return model


def write_version(content: bytes, repository: Path, name: str, version: int | None = None) -> Path:
    """Put a model file into a repository as a new version, the next one unless given; returns its path.

    The version's directory appears with the file in it: a server that looks meanwhile sees all of it or nothing.
    Raises ExportError for a name or version that cannot be had.
    """
    if not _NAME.fullmatch(name):
        raise ExportError(
            f"{name!r} cannot be a model's name: letters, digits, '.', '_' and '-', not beginning with '.'"
        )
    if version is not None and version < 1:
        raise ExportError(f"versions begin at 1, so {version} cannot be one")
    folder = repository / name
    chosen = version or next_version(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / str(chosen)).exists():
            raise ExportError(f"{folder / str(chosen)} exists; versions are never changed: leave --version out")
        staging = Path(tempfile.mkdtemp(dir=folder, prefix=".export-"))
        try:
            write_whole(staging / FILE, content, durable=True)
            staging.chmod(0o755)
            staging.rename(folder / str(chosen))
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as error:
        raise ExportError(f"cannot write to {folder}: {error.strerror}") from error
    return folder / str(chosen) / FILE


def next_version(folder: Path) -> int:
    """Find the number after the highest version in a model's directory."""
    if not folder.is_dir():
        return 1
    return 1 + max((int(each.name) for each in folder.iterdir() if re.fullmatch(r"[1-9]\d*", each.name)), default=0)


def _metrics(run: Run, validation: Mapping[str, float]) -> dict[str, float]:
    """Flatten a run's metrics; a run that was killed has those of its best epoch only."""
    try:
        stored = run.read_json("metrics.json")
    except RunError:
        return {f"validation_{name}": value for name, value in validation.items()}
    flat: dict[str, float] = {name: stored[name] for name in ("epochs", "best_epoch", "train_seconds")}
    for split in ("validation", "test"):
        for prefix, scores in (("", stored), ("baseline_", stored["baseline"])):
            flat |= {f"{prefix}{split}_{name}": value for name, value in scores.get(split, {}).items()}
    return flat


def _graph_spec(net: Net, task: Task, model: onnx.ModelProto) -> GraphSpec:
    layout = Layout.PER_SEQUENCE if net.config.is_per_sequence else Layout.PER_STEP
    config = net.config
    layer = LayerSpec(
        cell=config.cell, hidden=config.hidden, directions=net.state_shape[0], activation=config.activation
    )
    return GraphSpec(
        layers=(layer,) * config.layers,
        inputs=task.inputs,
        outputs=(task.output.model_copy(update={"layout": layout}),),
        states=tuple(
            StateSpec(name=name, next_name=f"{name}.next", row_shape=net.state_shape) for name in net.state_names
        ),
        operators=dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
    )


def _tidy(model: onnx.ModelProto) -> None:
    """Leave out what only its maker needs, stack traces with paths among it, and name the rest by its layer."""
    graph = model.graph
    model.producer_name, model.producer_version = "rnnserve", versions().get("rnnserve", "")
    model.doc_string = graph.doc_string = ""
    graph.name = "model"
    graph.ClearField("value_info")
    for message in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        message.ClearField("metadata_props")
        message.ClearField("doc_string")
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    renamed: dict[str, str] = {}
    recurrent = 0
    for number, node in enumerate(graph.node):
        node.name = f"{node.op_type}.{number}"
        if node.op_type in {"RNN", "GRU", "LSTM"}:
            node.name = f"layer.{recurrent}"
            renamed |= {old: f"layer.{recurrent}.{new}" for old, new in zip(node.input[1:4], "WRB", strict=True)}
            recurrent += 1
            # An output without a name is not computed.
            node.output[:] = [name if name in used else "" for name in node.output]
    for initializer in graph.initializer:
        initializer.name = renamed.get(initializer.name, initializer.name)
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]


def _check(model: onnx.ModelProto, net: Net) -> None:
    """Check what a server relies on and no comparison of numbers shows. Raises ExportError."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the graph is not valid ONNX: {str(error).splitlines()[0]}") from error
    constants = {initializer.name for initializer in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type == net.config.cell.upper()]
    if len(layers) != net.config.layers:
        raise ExportError(f"{net.config.layers} layers came out as {len(layers)} {net.config.cell.upper()} operators")
    for node in layers:
        if node.input[4] != LENGTHS:
            raise ExportError(f"{node.name}: sequence_lens is not wired to {LENGTHS!r}")
        if unfolded := [name for name in node.input[1:4] if name not in constants]:
            raise ExportError(f"{node.name}: weights {', '.join(unfolded)} are computed at run time")
    for value in (*model.graph.input, *model.graph.output):
        axes = [axis.dim_param for axis in value.type.tensor_type.shape.dim if axis.dim_param]
        if axes not in (["batch"], ["batch", "time"]):
            raise ExportError(f"{value.name}: its dynamic axes are {axes}, not batch and time")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter says of its own insides, for as long as it runs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
