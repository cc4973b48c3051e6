"""Served models as JSON: what the page shows of them, and inputs to try them with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from models.spec import LENGTHS, Golden, GoldenArray, Layout, TensorSpec
from service.engine import Engine
from service.holdings import Broken
from service.lane import Lane

EXAMPLES = Path(__file__).parent / "examples"
"""A file for each task that ships, of real data: see README.md there."""
Json = dict[str, Any]


def describe_server(engine: Engine, broken: Sequence[Broken]) -> Json:
    """List what is served and what is broken."""
    return {
        "server": {"version": version("rnnserve"), "is_draining": engine.is_draining},
        "models": [describe_version(lane) for lane in engine.lanes],
        "broken": [{"name": each.name, "version": each.version, "error": str(each.error)} for each in broken],
    }


def describe_version(lane: Lane) -> Json:
    """Describe one model version in short."""
    spec = lane.backend.spec
    return {
        "name": lane.name,
        "version": lane.version,
        "digest": lane.backend.digest,
        "num_bytes": lane.backend.num_bytes,
        "task": spec.training.task,
        "cell": spec.cell,
        "layers": [layer.model_dump(mode="json") for layer in spec.layers],
        "topology": spec.topology,
        "step_mode": lane.step_mode.value,
        "step_mode_reason": lane.step_mode_reason,
        "exactness": {"verdict": lane.exactness.verdict, "detail": lane.exactness.detail},
        "provider": lane.backend.provider,
        "placement": str(lane.backend.placement),
        "num_parameters": spec.num_parameters,
        "max_inflight_steps": lane.settings.max_inflight_steps,
    }


def describe_whole(lane: Lane) -> Json:
    """Describe one model version with its spec, but for the golden arrays, and examples of its inputs."""
    spec = lane.backend.spec
    return {
        **describe_version(lane),
        "spec": spec.model_dump(mode="json", exclude={"golden"}),
        "examples": examples_of(lane),
    }


# ---- examples --------------------------------------------------------------------------------------------------------


def examples_of(lane: Lane) -> list[Json]:
    """Find sequences to try a model with: real ones of its task, if it ships; else those that its file carries.

    Each has a name, where it is from, and the inputs of one sequence by name, as GoldenArray: per-step ones
    [time, ...], per-sequence ones [...].
    """
    return _real(lane) or _golden(lane)


def _tensors(lane: Lane) -> dict[str, TensorSpec]:
    """What a sequence is made from: inputs of the graph, and of the encoder that gives some of them."""
    if lane.encoder is None:
        return {t.name: t for t in lane.graph.inputs}
    given = {t.name for t in lane.encoder.graph.outputs}
    return {t.name: t for t in (*lane.encoder.graph.inputs, *lane.graph.inputs) if t.name not in given}


def _real(lane: Lane) -> list[Json]:
    path = EXAMPLES / f"{lane.backend.spec.training.task}.json"
    if path.parent != EXAMPLES or not path.is_file():
        return []
    content: Json = json.loads(path.read_text(encoding="utf-8"))
    return [
        {**each, "source": content["source"], "license": content["license"]}
        for each in content["examples"]
        if _fits(each["inputs"], lane)
    ]


def _fits(inputs: dict[str, Json], lane: Lane) -> bool:
    """Whether a model takes the inputs of an example: another model of that task may have others."""
    tensors, generation = _tensors(lane), lane.backend.spec.generation
    fed_back = generation.token_input if generation is not None else ""
    if not tensors.keys() - {fed_back} <= inputs.keys() <= tensors.keys():
        return False
    for name, array in inputs.items():
        tensor = tensors[name]
        num_axes = 1 if tensor.layout is Layout.PER_STEP else 0
        if array["dtype"] != tensor.dtype or tuple(array["shape"][num_axes:]) != tensor.row_shape:
            return False
    return True


def _golden(lane: Lane) -> list[Json]:
    """Take the longest sequence of each golden batch; none of ids that a model would choose by itself."""
    spec = lane.backend.spec
    tensors = _tensors(lane)
    if spec.generation is not None:
        tensors.pop(spec.generation.token_input, None)
    found: list[Json] = []
    for golden in spec.golden:
        if golden.graph == len(spec.graphs) - 1 and (inputs := _longest(golden, tensors)):
            source = "drawn by the exporter as the training data were spread"
            found.append(
                {"name": f"Drawn sequence {len(found) + 1}", "source": source, "license": "", "inputs": inputs}
            )
    return found


def _longest(golden: Golden, tensors: dict[str, TensorSpec]) -> dict[str, Json]:
    """The longest sequence of a golden batch."""
    lengths = golden.inputs[LENGTHS].array()
    row = int(np.argmax(lengths))
    inputs = {}
    for name in tensors.keys() & golden.inputs.keys():
        values = golden.inputs[name].array()
        if tensors[name].layout is Layout.PER_STEP:
            inputs[name] = GoldenArray.of(values[row, : int(lengths[row])]).model_dump(mode="json")
        elif tensors[name].layout is Layout.PER_SEQUENCE:
            inputs[name] = GoldenArray.of(values[row]).model_dump(mode="json")
    return inputs
