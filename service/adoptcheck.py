"""Runs a model that is to be adopted, to see whether it is what its model.toml says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from models.spec import Layout
from service.adapter import adapt, import_onnx
from service.adopt import Found
from service.backend import Backend, run_once
from service.errors import ModelBroken, RunFailed
from service.layouts import dtype_of, inputs_of, rank_of, size_of, sizes_of
from service.modelfile import Description
from service.probe import ROUNDING, probe, random_values

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]
PROBE_ROWS = 32
"""Sequences in the largest batch that is tried."""
STEPS = 7
"""Steps of the sequence that is given whole and step by step."""


def check(path: Path, graph: onnx.GraphProto, found: Found) -> str:
    """Run the model: learn sizes that the graph leaves open, and whether a batch equals one by one.

    Adds to what was found. Returns the verdict on batching, for people. Raises ModelBroken for a model that can't run
    so, or whose answers depend on steps to come.
    """
    _Check(path, graph, found).learn_sizes()
    adapted = adapt(path, found.description())
    backend = Backend(path, adapted=adapted)
    try:
        exactness = probe(backend, PROBE_ROWS)
    except RunFailed as error:
        raise ModelBroken(f"it loads, but does not run: {error}; is every axis, constant and chunk right?") from error
    if not exactness.is_chunkable:
        found.doubts.append(
            f"lengths: a sequence given in parts is answered otherwise than whole ({exactness.detail}): where an "
            "answer depends on steps to come, it can't be served so"
        )
    elif exactness.verdict == "coupled" and found.max_batch is None:
        found.max_batch = 1
        found.doubts.append(
            "max_batch: neighbours in a batch change each other's numbers, so sequences run one at a time"
        )
    if backend.is_whole:
        found.doubts.append("lengths: a layer reads sequences from their end, so that they are served whole")
    _check_states(backend, found)
    _Check(path, graph, found).compare_whole(backend, last_ones=adapted.suspect is not None)
    return f"{exactness.verdict}, {exactness.detail}"


def check_steps(path: Path, description: Description, backend: Backend) -> None:
    """Run a described model whole and step by step. Raises ModelBroken where an answer depends on steps to come."""
    graph = import_onnx().load(path, load_external_data=False).graph
    found = Found(
        inputs={name: entry.model_dump(exclude_defaults=True) for name, entry in description.inputs.items()},
        outputs={name: entry.model_dump(exclude_defaults=True) for name, entry in description.outputs.items()},
        states={name: entry.model_dump() for name, entry in description.states.items()},
        constants=dict(description.constants),
    )
    try:
        _Check(path, graph, found).compare_whole(backend, last_ones=True)
    except RunFailed as error:
        raise ModelBroken(f"it does not run: {error}") from error


def _check_states(backend: Backend, found: Found) -> None:
    """Note states that a step leaves as they were."""
    graph, rng = backend.graph, np.random.default_rng(0)
    inputs = {
        t.name: random_values(rng, t.dtype, (1, *([1] if t.layout is Layout.PER_STEP else []), *t.row_shape), t.num_ids)
        for t in graph.inputs
    }
    states = [np.zeros((1, *s.row_shape), s.dtype) for s in graph.states]
    _, after = backend.run(inputs, np.ones(1, dtype=np.int32), states)
    for spec, old, new in zip(graph.states, states, after, strict=True):
        if np.array_equal(old, new):
            found.doubts.append(f"states.{spec.name}: a step of random input left it all zeros")
    if not (graph.states or backend.is_whole):
        found.doubts.append("states: there are none, so that every step is answered by itself")


class _Check:
    def __init__(self, path: Path, graph: onnx.GraphProto, found: Found) -> None:
        self._path = path
        self._found = found
        self._takes = inputs_of(graph)
        self._gives = {each.name: each for each in graph.output}

    def learn_sizes(self) -> None:
        """Find out the sizes of outputs that the graph leaves open, by running it once."""
        found = self._found
        opened = [name for name, entry in found.outputs.items() if self._is_open(name, entry)]
        if not opened:
            return
        try:
            results = run_once(self._path, self._feeds(1))
        except RunFailed as error:
            raise ModelBroken(f"it does not run: {error}; is every axis, constant and chunk right?") from error
        for name in opened:
            entry, shape = found.outputs[name], list(results[name].shape)
            axes = [entry.get("batch_axis", 0), entry.get("time_axis", "none")]
            entry["shape"] = [size for axis, size in enumerate(shape) if axis not in axes]

    def _is_open(self, name: str, entry: dict[str, Any]) -> bool:
        value = self._gives[name]
        rank = rank_of(value)
        axes = (entry.get("batch_axis", 0), entry.get("time_axis", "none"))
        return rank is None or any(size_of(value, axis) is None for axis in range(rank) if axis not in axes)

    def compare_whole(self, backend: Backend, *, last_ones: bool) -> None:
        """Give a sequence whole to a graph whose time is dynamic, and step by step.

        last_ones  compare outputs without an axis of time too, with the last step's; those of a graph of frames, whose
                   chunk has not been said yet, are others
        Raises ModelBroken where the answers differ.
        """
        found = self._found
        entries = found.inputs.items()
        is_stepped = {"chunk", "context"}.isdisjoint  # by one entry, and given no other with it
        timed = [name for name, entry in entries if entry.get("time_axis") is not None and is_stepped(entry)]
        if found.lengths or len(timed) < len(found.inputs) or any(self._time_size(name) for name in timed):
            return
        feeds = self._feeds(STEPS)
        whole = run_once(self._path, feeds)
        states = [np.zeros((1, *s.row_shape), s.dtype) for s in backend.graph.states]
        inputs = {name: self._first(found.inputs[name], feeds[name]) for name in found.inputs}
        outputs, _ = backend.run(inputs, np.array([STEPS], dtype=np.int32), states)
        for (name, entry), ours in zip(found.outputs.items(), outputs, strict=True):
            if entry.get("time_axis") is None:
                if not last_ones:
                    continue
                theirs = self._sequence(entry, whole[name])
                ours = ours if entry.get("per") == "sequence" else ours[:, -1]
            else:
                theirs = self._first(entry, whole[name])
            if theirs.shape != ours.shape:
                raise ModelBroken(
                    f"it can't be stepped: {name} of {STEPS} steps is {list(theirs.shape[1:])} at once, and one by one "
                    f"{list(ours.shape[1:])}: a step may be a frame of several entries (--chunk), or need those before "
                    "it again (--context)"
                )
            worst = float(np.abs(theirs - ours).max()) / (float(np.abs(theirs).max()) or 1.0)
            if not worst <= ROUNDING:
                raise ModelBroken(
                    f"it can't be stepped: {STEPS} steps at once are answered otherwise ({name}, by {worst:.1e} of its "
                    "largest value) than one by one, so an answer depends on steps to come (a bidirectional layer?), "
                    "a step is a frame of several entries (--chunk), or a state is missing"
                )

    def _time_size(self, name: str) -> int | None:
        return size_of(self._takes[name], int(self._found.inputs[name]["time_axis"]))

    @staticmethod
    def _first(entry: dict[str, Any], values: Array) -> Array:
        """The first sequence as [1, time, *row]."""
        batch, time = entry.get("batch_axis", 0), entry["time_axis"]
        if batch == "none":
            return np.moveaxis(values, time, 0)[None]
        return np.moveaxis(values, (batch, time), (0, 1))[:1]

    @staticmethod
    def _sequence(entry: dict[str, Any], values: Array) -> Array:
        """The first sequence as [1, *row]."""
        batch = entry.get("batch_axis", 0)
        return values[None] if batch == "none" else np.moveaxis(values, batch, 0)[:1]

    def _feeds(self, steps: int) -> dict[str, Array]:
        """Random inputs of one sequence, as the graph takes them."""
        found, rng = self._found, np.random.default_rng(1)
        feeds: dict[str, Array] = {}
        for name, entry in found.inputs.items():
            value = self._takes[name]
            sizes = {entry.get("batch_axis", 0): 1}
            if entry.get("time_axis") is not None:
                sizes[entry["time_axis"]] = entry.get("chunk", steps) + entry.get("context", 0)
            shape = [size or sizes.get(axis, 1) for axis, size in enumerate(sizes_of(value))]
            feeds[name] = random_values(rng, dtype_of(value, name), shape, entry.get("num_ids"))
        for name in found.states:
            value = self._takes[name]
            shape = [size or 1 for size in sizes_of(value)]
            feeds[name] = np.zeros(shape, dtype_of(value, name))
        for name, given in found.constants.items():
            value = self._takes[name]
            shape = [size or 1 for size in sizes_of(value)]
            feeds[name] = np.array(given, dtype_of(value, name)).reshape(shape)
        if found.lengths:
            feeds[found.lengths] = np.array([steps], dtype_of(self._takes[found.lengths], found.lengths))
        return feeds
