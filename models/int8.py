"""`rnnserve export --int8`: quantize an exported model, and the gate that the smaller one passes.

What is lost is measured twice: by the task's metrics over the whole test split, before and after, through onnxruntime
on the files; and as the largest difference from the float32 model. A file that loses more than is allowed is not made.
The golden answers that travel with a quantized file are its own: those of a reference of the same rounded weights.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from models.checks import ROUNDED_TOLERANCE, differ, without_padding
from models.errors import DropError, ExportError, ParityError
from models.graphs import GraphModule
from models.quantization import Quantization, QuantizedForm
from models.quantize import Quantized, quantize, with_rounded_weights
from models.quantsteps import GATES, Array
from models.reference import Reference, reference
from models.runtime import Runtime
from models.spec import LENGTHS, METADATA_KEY, MODEL_FILE, Golden, GraphSpec, Layout, Parity, Spec
from models.tasks import AnyTask, Split, Task
from models.tasks.base import pad
from models.verify import Case, draw_cases, golden_of

SPEED_BATCHES = (1, 16, 64, 256)

_SCORED_ROWS = 64
_SPEED_S = 0.1


@dataclass(frozen=True, slots=True)
class Speed:
    """Steps a second that onnxruntime makes of one thread, in runs of one step for each of a batch of sequences."""

    batch: int
    before: float
    after: float


def quantize_files(
    files: Mapping[str, bytes],
    spec: Spec,
    parts: Sequence[GraphModule],
    task: AnyTask,
    form: QuantizedForm,
    max_drop: float,
) -> tuple[dict[str, bytes], Spec]:
    """Quantize the files of a model that passed the export gate, and measure what is lost.

    parts  the modules that its graphs were made of
    task   with its test split
    Raises ExportError where the form brings nothing, DropError past max_drop, and ParityError where onnxruntime answers
    otherwise than the quantized graph's reference.
    """
    if spec.generation is not None or not isinstance(task, Task):
        raise ExportError("--int8 is judged by answers to a test split, which a model that generates has not")
    graphs: list[GraphSpec] = []
    golden: list[Golden] = []
    parities: list[Parity] = []
    results: list[Quantized] = []
    worst = 0.0
    for number, (part, graph) in enumerate(zip(parts, spec.graphs, strict=True)):
        model = onnx.load_from_string(files[graph.file])
        del model.metadata_props[:]
        result = quantize(model, form)
        parity, cases, error = _compare(part, model, result, graph, form)
        worst = max(worst, error)
        parities.append(parity)
        golden += [each.model_copy(update={"graph": number}) for each in golden_of(cases)]
        graphs.append(_described(graph, result))
        results.append(result)
    smaller = {graph.file: result.model.SerializeToString() for graph, result in zip(graphs, results, strict=True)}
    is_exact = all(result.is_exact for result in results)
    before = score(files[MODEL_FILE], spec, task, task.test)
    after = score(smaller[MODEL_FILE], spec, task, task.test, alone=not is_exact)
    check_drop(before, after, max_drop, form)
    quantization = Quantization(
        form=form,
        is_exact=is_exact,
        quantized=tuple(each for result in results for each in result.done),
        kept=tuple(each for result in results for each in result.kept),
        before=before,
        after=after,
        max_drop=max_drop,
        max_abs_error=worst,
        size_before=sum(map(len, files.values())),
    )
    parity = Parity(
        max_abs_error=max(each.max_abs_error for each in parities),
        tolerance=max(each.tolerance for each in parities),
        num_cases=sum(each.num_cases for each in parities),
    )
    graphs = [
        graph.model_copy(update={"sha256": hashlib.sha256(smaller[graph.file]).hexdigest()}) if graph.sha256 else graph
        for graph in graphs
    ]
    changed = {"graphs": tuple(graphs), "parity": parity, "golden": tuple(golden), "quantization": quantization}
    spec = Spec.model_validate(spec.model_copy(update=changed).model_dump())
    onnx.helper.set_model_props(results[0].model, {METADATA_KEY: spec.to_json()})
    return smaller | {MODEL_FILE: results[0].model.SerializeToString()}, spec


def score(content: bytes, spec: Spec, task: Task, split: Split, *, alone: bool = False) -> dict[str, float]:
    """Judge a file's answers to a split, through onnxruntime; alone: one sequence at a time, as a server runs it."""
    runtime, graph = Runtime(content), spec.graph
    answers: list[Array] = []
    rows = 1 if alone else _SCORED_ROWS
    for start in range(0, len(split), rows):
        numbers = range(start, min(start + rows, len(split)))
        lengths = np.array([len(split.inputs[number]) for number in numbers], np.int32)
        columns = [pad([split.inputs[number] for number in numbers])] if task.input else []
        if split.ids:
            columns += list(np.moveaxis(pad([split.ids[number] for number in numbers]), -1, 0))
        columns = [_to_fixed(each, graph) for each in columns]
        feeds = dict(zip((tensor.name for tensor in graph.inputs), columns, strict=True)) | {LENGTHS: lengths}
        feeds |= {state.name: np.zeros((len(lengths), *state.row_shape), state.dtype) for state in graph.states}
        y = runtime(feeds)[graph.outputs[0].name]
        if graph.outputs[0].layout is not Layout.PER_STEP:
            answers += list(y)
        else:
            pairs = zip(y, lengths.tolist(), strict=True)
            answers += [row[length - 1] if task.one_answer else row[:length] for row, length in pairs]
    return task.judge(split, answers)


def _to_fixed(steps: Array, graph: GraphSpec) -> Array:
    """Pad [batch, time, ...] to the steps that an unrolled graph takes."""
    missing = (graph.fixed_steps or steps.shape[1]) - steps.shape[1]
    return np.pad(steps, [(0, 0), (0, missing), *[(0, 0)] * (steps.ndim - 2)])


def check_drop(before: Mapping[str, float], after: Mapping[str, float], max_drop: float, form: str) -> None:
    """Compare metrics of the test split. Raises DropError where one lost more than is allowed."""
    for name, old in before.items():
        new = after[name]
        drop = old - new if "accuracy" in name else (new - old) / old if old else new
        if not drop <= max_drop:
            raise DropError(form, name, before=old, after=new, max_drop=max_drop)


def speeds(before: bytes, after: bytes, spec: Spec) -> list[Speed]:
    """Measure both files on this machine, at each of SPEED_BATCHES."""
    runtimes = [Runtime(before), Runtime(after)]
    return [Speed(batch, *(_steps_per_s(each, spec.graph, batch) for each in runtimes)) for batch in SPEED_BATCHES]


def _steps_per_s(runtime: Runtime, graph: GraphSpec, batch: int) -> float:
    steps = graph.fixed_steps or 1
    axes = {Layout.PER_STEP: (batch, steps), Layout.PER_SEQUENCE: (batch,)}
    feeds = {t.name: np.zeros((*axes.get(t.layout, ()), *t.row_shape), t.dtype) for t in graph.inputs}
    feeds[LENGTHS] = np.full(batch, steps, np.int32)
    feeds |= {state.name: np.zeros((batch, *state.row_shape), state.dtype) for state in graph.states}
    runtime(feeds)
    fastest, end = float("inf"), time.perf_counter() + _SPEED_S
    while (began := time.perf_counter()) < end:
        runtime(feeds)
        fastest = min(fastest, time.perf_counter() - began)
    return batch * steps / fastest


def _compare(
    part: GraphModule, model: onnx.ModelProto, result: Quantized, graph: GraphSpec, form: QuantizedForm
) -> tuple[Parity, list[Case], float]:
    """Compare a quantized graph with its reference, and with the float32 module.

    Returns (what the first found, the cases with the reference's answers, the largest difference from float32).
    """
    runtime = Runtime(result.model.SerializeToString())
    answer = _reference(model, result, form)
    cases: list[Case] = []
    worst = furthest = widest = 0.0
    for case in draw_cases(part, np.random.default_rng(0)):
        tolerance = case.tolerance if form == "weights" else ROUNDED_TOLERANCE
        found = without_padding(graph, runtime(case.inputs), case.lengths)
        expected = answer(case.inputs)
        for name, array in without_padding(graph, expected, case.lengths).items():
            gap = differ(found[name], array)
            if not gap.scaled <= tolerance:
                raise ParityError(case.name, name, error=gap.absolute, tolerance=tolerance, where=gap.where)
            worst, widest = max(worst, gap.absolute), max(widest, tolerance)
        for name, array in without_padding(graph, case.outputs, case.lengths).items():
            furthest = max(furthest, differ(found[name], array).absolute)
        cases.append(replace(case, outputs=expected))
    return Parity(max_abs_error=worst, tolerance=widest, num_cases=len(cases)), cases, furthest


def _reference(model: onnx.ModelProto, result: Quantized, form: QuantizedForm) -> Reference:
    """Choose what a quantized graph has to answer as.

    Weights: the float32 graph of the rounded weights. Fixed scales: onnx's evaluator in numpy, unless a recurrent
    operator is left, of which it knows no lengths. Dynamic ones are onnxruntime's own invention: its kernel alone.
    """
    if form == "weights":
        return Runtime(with_rounded_weights(model).SerializeToString())
    has_operator = any(
        node.op_type in GATES or node.op_type == "DynamicQuantizeLSTM" for node in result.model.graph.node
    )
    return Runtime(result.model.SerializeToString(), optimize=False) if has_operator else reference(result.model)


def _described(graph: GraphSpec, result: Quantized) -> GraphSpec:
    """Say what became of a graph's layers and operators."""
    operators = [number for number, layer in enumerate(graph.layers) if layer.form == "operator"]
    turned = {operators[number] for number in result.replaced}
    layers = tuple(
        layer.model_copy(update={"form": "decomposed"}) if number in turned else layer
        for number, layer in enumerate(graph.layers)
    )
    counted = dict(sorted(Counter(node.op_type for node in result.model.graph.node).items()))
    return graph.model_copy(update={"layers": layers, "operators": counted})
