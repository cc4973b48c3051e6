"""From a run to the files of a model version: its graphs, its spec, and the gate before anything is written."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
from torch import nn

from models.errors import ConversionError, DataError, ExportError, ParityError, RunError
from models.graphs import GraphModule, to_onnx
from models.importers.torch_module import as_graph
from models.importers.torch_probe import Example
from models.int8 import Speed, quantize_files, speeds
from models.objective import Net
from models.quantization import MAX_DROP, QuantizedForm, quantization_lines
from models.runs import Run, versions, write_whole
from models.spec import (
    METADATA_KEY,
    MODEL_FILE,
    Generation,
    Golden,
    GraphSpec,
    Layout,
    Parity,
    Spec,
    Topology,
    Training,
)
from models.tasks import AnyTask
from models.train import load_net
from models.verify import gate

Files = dict[str, bytes]
"""Files of a model version by name; MODEL_FILE is among them."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A model version that was written."""

    path: Path
    """Its MODEL_FILE."""
    spec: Spec
    size: int
    """Bytes of all its files."""
    speeds: tuple[Speed, ...] = ()
    """Of a quantized file, beside the float32 one."""

    def notes(self) -> Iterator[str]:
        """Say in lines for people what quantization did; nothing of a float32 file."""
        if self.spec.quantization is not None:
            yield from quantization_lines(self.spec.quantization, self.size)
        for speed in self.speeds:
            rates = f"{speed.after:,.0f} steps/s, {speed.before:,.0f} before"
            yield f"batch {speed.batch}: {rates}, in onnxruntime on one thread here"


def export_run(
    run: Run,
    repository: Path,
    *,
    name: str | None = None,
    version: int | None = None,
    int8: QuantizedForm | None = None,
    max_drop: float = MAX_DROP,
) -> Exported:
    """Export a run's best net as `<repository>/<name>/<version>/model.onnx`, beside it the encoder if it has one.

    name is the task's, and version the next free one, unless given. int8 quantizes it, unless a metric of the test
    split would lose more than max_drop.
    Raises RunError for a directory that holds no run, ExportError for a name or version that cannot be had, or a form
    of int8 that brings nothing, ParityError where a file would answer differently, DropError, and DataError where int8
    cannot be judged because the data are gone; nothing is written then.
    """
    task, recipe, net, validation = load_net(run)
    training = Training(
        task=task.name,
        data_set=task.data_set,
        license=task.license,
        metrics=_metrics(run, validation),
        recipe=recipe.to_dict(),
    )
    files, spec = export_net(net, task, training)
    measured: list[Speed] = []
    if int8:
        before = files[MODEL_FILE]
        files, spec = quantize_files(files, spec, net.graphs(task), _with_data(task, run), int8, max_drop)
        measured = speeds(before, files[MODEL_FILE], spec)
    path = write_version(files, repository, name or task.name, version)
    return Exported(path=path, spec=spec, size=sum(map(len, files.values())), speeds=tuple(measured))


def export(
    module: nn.Module,
    example: Example,
    *,
    name: str | None = None,
    lengths: str = "lengths",
    output_names: Sequence[str] = (),
    units: Mapping[str, str] | None = None,
    labels: Sequence[str] = (),
    training: Training | None = None,
) -> tuple[Files, Spec]:
    """Make the files of a torch module that holds nn.RNN, nn.LSTM or nn.GRU, also within other modules.

    Its recurrent layers are replaced by ours: native operators, batch and time dynamic, states in and out by name,
    whether its forward takes and returns them or not. Before anything is returned, the file's answers are compared
    with the untouched module's, asked for each sequence alone.

    module        in any mode and on any device; it is copied, and left as it is
    example       what forward takes: one tensor, several in order, or by name. Per-step ones are [batch, time, ...],
                  or all [time, batch, ...], with batch and time of different sizes; ids, int64, go to an nn.Embedding
    name          of the model, as its task; the module's class unless given
    lengths       forward's parameter that takes each row's length, [batch] int64, if it has one
    output_names  of what forward returns, states left out
    units         physical units by name of an input or output
    labels        of a classifier's scores
    training      where the weights came from
    Raises ConversionError, which says what to change, and ExportError and ParityError as every export does.
    """
    part = as_graph(module, example, lengths=lengths, output_names=output_names, units=units, labels=labels)
    is_per_step = any(output.layout is Layout.PER_STEP and not output.description for output in part.spec.outputs)
    described = type(module).__name__
    training = training or Training(task=name or described, data_set=f"not recorded: the torch module {described}")
    try:
        return export_model(
            [part],
            topology="many-to-many" if is_per_step else "many-to-one",
            training=training
            or Training(task=name or described, data_set=f"not recorded: the torch module {described}"),
            num_parameters=sum(each.numel() for each in module.parameters()),
            labels=tuple(labels),
        )
    except ParityError:
        raise
    except ExportError as error:
        hint = "a graph cannot follow tensors that become numbers, by if, .item(), .tolist() or x[:, :lengths.max()]"
        raise ConversionError(f"{error}; {hint}: index and mask with tensors, over the whole time axis") from error


def export_net(net: Net, task: AnyTask, training: Training) -> tuple[Files, Spec]:
    """Make the files of a net that was built for a task. Raises ExportError and ParityError."""
    return export_model(
        net.graphs(task),
        topology=task.topology,
        training=training,
        num_parameters=net.num_parameters,
        labels=task.labels,
        vocabulary=task.vocabulary,
        generation=task.generation,
    )


def export_model(
    parts: Sequence[GraphModule],
    *,
    topology: Topology,
    training: Training,
    num_parameters: int,
    labels: tuple[str, ...] = (),
    vocabulary: tuple[str, ...] = (),
    generation: Generation | None = None,
) -> tuple[Files, Spec]:
    """Make the files of a model, the spec within MODEL_FILE, once every graph has passed the gate.

    parts  the graph that answers, and after it the encoder of an encoder-decoder
    The other arguments are what Spec says of them. Raises ExportError and ParityError.
    """
    graphs: list[GraphSpec] = []
    golden: list[Golden] = []
    parities: list[Parity] = []
    files: Files = {}
    traced: list[onnx.ModelProto] = []
    for number, part in enumerate(parts):
        model, graph = to_onnx(part)
        content = model.SerializeToString()
        parity, cases = gate(part, content, graph)
        parities.append(parity)
        golden += [case.model_copy(update={"graph": number}) for case in cases]
        if number:
            files[graph.file] = content
            graph = graph.model_copy(update={"sha256": hashlib.sha256(content).hexdigest()})
        graphs.append(graph)
        traced.append(model)
    spec = Spec(
        topology=topology,
        num_parameters=num_parameters,
        graphs=tuple(graphs),
        generation=generation,
        labels=labels,
        vocabulary=vocabulary,
        training=training,
        versions=versions("torch", "onnx", "onnxscript") | {"onnxruntime": onnxruntime.__version__},
        parity=Parity(
            max_abs_error=max(parity.max_abs_error for parity in parities),
            tolerance=max(parity.tolerance for parity in parities),
            num_cases=sum(parity.num_cases for parity in parities),
        ),
        golden=tuple(golden),
    )
    onnx.helper.set_model_props(traced[0], {METADATA_KEY: spec.to_json()})
    return {MODEL_FILE: traced[0].SerializeToString(), **files}, spec


def write_version(files: Mapping[str, bytes], repository: Path, name: str, version: int | None = None) -> Path:
    """Put files into a repository as a new version, the next one unless given; returns the path of its MODEL_FILE.

    The version's directory appears with the files in it: a server that looks meanwhile sees all of it or nothing.
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
            for file, content in files.items():
                write_whole(staging / file, content, durable=True)
            staging.chmod(0o755)
            staging.rename(folder / str(chosen))
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as error:
        raise ExportError(f"cannot write to {folder}: {error.strerror}") from error
    return folder / str(chosen) / MODEL_FILE


def next_version(folder: Path) -> int:
    """Find the number after the highest version in a model's directory."""
    if not folder.is_dir():
        return 1
    return 1 + max((int(each.name) for each in folder.iterdir() if re.fullmatch(r"[1-9]\d*", each.name)), default=0)


def _with_data(task: AnyTask, run: Run) -> AnyTask:
    """Read a run's data again, where its task came without. Raises DataError where they are gone, or others."""
    if len(task.test):
        return task
    try:
        return run.config().load({})[0]
    except DataError as error:
        raise DataError(f"--int8 is judged by the test split, so it reads the run's data again: {error}") from error


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
