"""Serves models that were made elsewhere: what a model.toml says, checked against the graph, becomes a spec.

The graph itself is put into one that meets the contract of models/spec.py, in memory (service/wrapping.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.spec import GoldenArray, GraphSpec, Layout, Parity, Spec, StateSpec, TensorSpec, Training
from service.errors import ModelBroken
from service.layouts import Lie, dtype_of, rank_of, shape_text, size_of
from service.modelfile import DESCRIPTION_FILE, Axis, Description, InputEntry, OutputEntry, read_description
from service.wrapping import CONTEXT, Wrapper

if TYPE_CHECKING:
    import onnx

_MIN_OPSET = 11
"""The first with Range."""


@dataclass(frozen=True)
class Adapted:
    """A model that was made elsewhere, as it is served."""

    content: bytes
    """The ONNX file that is run."""
    spec: Spec
    """What it is, as the file of an exported model would say."""
    digest: str
    """SHA-256 over the files that it was made of."""


def is_described(path: Path) -> bool:
    """Whether a model.toml lies beside a model file."""
    return path.with_name(DESCRIPTION_FILE).is_file()


def adapt(path: Path, description: Description | None = None) -> Adapted:
    """Make what is run of a model file and what its model.toml says, or `description` instead of it.

    Raises ModelBroken, with what to change.
    """
    onnx = import_onnx()
    source = path.with_name(DESCRIPTION_FILE)
    digest = hashlib.sha256()
    if description is None:
        description = read_description(source)
        digest.update(source.read_bytes())
    try:
        digest.update(path.read_bytes())
        model = onnx.load(path)  # with external data
    except Exception as error:  # of the file system, of protobuf, of the checker
        raise ModelBroken(f"{path}: onnx can't read it: {error}") from error
    try:
        builder = _Builder(model, description, path.parent)
        content, spec = builder.build()
    except ModelBroken as error:
        raise ModelBroken(f"{path.parent}: {error}") from error
    for each in sorted(builder.files):
        digest.update(each.read_bytes())
    return Adapted(content, spec, digest.hexdigest())


def import_onnx() -> Any:
    """Import onnx. Raises ModelBroken that says what to install where it is absent."""
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ModelBroken(
            f"a model with a {DESCRIPTION_FILE} needs the package onnx: pip install onnx, or 'rnnserve[cpu]'"
        ) from error
    return onnx


class _Builder:
    def __init__(self, model: onnx.ModelProto, description: Description, folder: Path) -> None:
        import onnx

        self._onnx = onnx
        self._model = model
        self._graph = model.graph
        self._says = description
        self._folder = folder
        self.files: set[Path] = set()
        """Files that it was made of beside the model's."""
        self._has_lengths = bool(description.lengths)
        weights = {each.name for each in self._graph.initializer}
        self._takes = {each.name: each for each in self._graph.input if each.name not in weights}
        self._gives = {each.name: each for each in self._graph.output}

    def build(self) -> tuple[bytes, Spec]:
        """Make (the file, its spec). Raises ModelBroken."""
        self._check()
        inputs, outputs, states = self._tensors()
        if not states and not self._has_lengths:
            self._check_stateless()
        try:
            spec = self._spec(inputs, outputs, states)
        except ValueError as error:
            raise ModelBroken(f"{DESCRIPTION_FILE}: {error}") from error
        wrapper = Wrapper(self._onnx, self._graph, self._says, self._takes, self._gives)
        model = self._onnx.ModelProto()
        model.CopyFrom(self._model)
        model.graph.CopyFrom(wrapper.wrap(inputs, outputs, states))
        try:
            return model.SerializeToString(), spec
        except Exception as error:  # protobuf's, past 2 GiB
            raise ModelBroken(f"with its weights in one file it is too large: {error}") from error

    # ---- what there is ----------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Check that the names are the graph's, each in one role."""
        says = self._says
        opset = next((each.version for each in self._model.opset_import if each.domain in ("", "ai.onnx")), 0)
        if opset < _MIN_OPSET:
            raise ModelBroken(
                f"its opset is {opset}, and {_MIN_OPSET} is needed at least: convert it with "
                "onnx.version_converter.convert_version(model, 17)"
            )
        roles: dict[str, str] = {}
        for section, names in (
            ("inputs", says.inputs),
            ("states", says.states),
            ("constants", says.constants),
            ("lengths", [says.lengths] if says.lengths else []),
        ):
            for name in names:
                if name not in self._takes:
                    raise ModelBroken(_unknown(f"{section}.{name}", "input", self._takes))
                if name in roles:
                    raise ModelBroken(
                        f"{DESCRIPTION_FILE}: {name} is in {roles[name]} and in {section}: leave it in one"
                    )
                roles[name] = section
        if missing := sorted(self._takes.keys() - roles.keys()):
            raise ModelBroken(
                f"{DESCRIPTION_FILE}: the graph's input {missing[0]!r} is in none of inputs, states and constants: put "
                "it into one"
            )
        nexts = [state.next for state in says.states.values()]
        for name in (*says.outputs, *nexts):
            if name not in self._gives:
                raise ModelBroken(_unknown(name, "output", self._gives))
        if len(set(nexts)) < len(nexts):
            raise ModelBroken(f"{DESCRIPTION_FILE}: two states have the same next value")

    def _check_stateless(self) -> None:
        says = self._says
        fixed = [name for name, entry in says.inputs.items() if entry.time_axis != "none" and not entry.chunk]
        sizes = [size_of(self._takes[name], int(says.inputs[name].time_axis)) for name in fixed]
        if any(size is not None and size > 1 for size in sizes):
            name, size = next((n, s) for n, s in zip(fixed, sizes, strict=True) if s is not None)
            raise ModelBroken(
                f"it can't be stepped: the time axis of {name} is fixed at {size} steps, and no state goes on from one "
                "call to the next: export it with a dynamic time axis, and its recurrent states as inputs and outputs"
            )

    def _tensors(self) -> tuple[dict[str, Lie], dict[str, Lie], dict[str, Lie]]:
        says = self._says
        inputs = {
            name: self._lie(f"inputs.{name}", self._takes[name], entry, entry.chunk, entry.context)
            for name, entry in says.inputs.items()
        }
        outputs = {
            name: self._lie(f"outputs.{name}", self._gives[name], entry, None, 0)
            for name, entry in says.outputs.items()
        }
        states = {name: self._state_lie(name, entry.batch_axis, entry.shape) for name, entry in says.states.items()}
        if self._has_lengths and any(entry.context or entry.chunk for entry in says.inputs.values()):
            raise ModelBroken(f"{DESCRIPTION_FILE}: chunk and context are for a graph that takes no lengths")
        is_alone = any(each.batch == "none" for each in (*inputs.values(), *states.values()))
        if (is_alone or self._is_fixed_at_one()) and says.max_batch != 1:
            raise ModelBroken(f"{DESCRIPTION_FILE}: the graph takes one sequence at a time: set max_batch = 1")
        return inputs, outputs, states

    def _is_fixed_at_one(self) -> bool:
        says = self._says
        axes = {name: entry.batch_axis for name, entry in says.inputs.items()}
        axes |= {name: entry.batch_axis for name, entry in says.states.items()}
        return any(axis != "none" and size_of(self._takes[name], axis) == 1 for name, axis in axes.items())

    def _lie(
        self, key: str, value: onnx.ValueInfoProto, entry: InputEntry | OutputEntry, chunk: int | None, context: int
    ) -> Lie:
        """Find out how a tensor lies. Raises ModelBroken where the graph does not tell and model.toml neither."""
        batch, time = entry.batch_axis, entry.time_axis
        sizes = self._sizes(key, value, [each for each in (batch, time) if each != "none"], entry.shape)
        fixed = None if time == "none" else size_of(value, time)
        entries: int | None = None
        if self._has_lengths:
            if time != "none" and fixed is not None:
                raise ModelBroken(f"{key}: its time axis is fixed at {fixed}, though the graph takes lengths")
        elif chunk is not None:
            if fixed is not None and fixed != chunk + context:
                raise ModelBroken(
                    f"{key}: chunk {chunk} and context {context} are not the {fixed} that the graph takes"
                )
            entries = chunk
        elif fixed is not None and fixed - context != 1:
            if fixed <= context:
                raise ModelBroken(f"{key}: context {context} leaves nothing of the {fixed} that the graph takes")
            entries = fixed - context
        return Lie(batch, time, sizes, entries, self._has_lengths)

    def _state_lie(self, name: str, batch: Axis, shape: tuple[int, ...] | None) -> Lie:
        rest = self._sizes(f"states.{name}", self._takes[name], [] if batch == "none" else [batch], shape)
        return Lie(batch, "none", rest, None)

    def _sizes(
        self, key: str, value: onnx.ValueInfoProto, axes: Sequence[int], shape: tuple[int, ...] | None
    ) -> tuple[int, ...]:
        """Sizes of all other axes."""
        rank = rank_of(value)
        if rank is None:
            if shape is None:
                raise ModelBroken(f"{key}: the graph does not know its shape: give shape, without batch and time")
            return shape
        if axes and max(axes) >= rank:
            raise ModelBroken(f"{key}: axis {max(axes)} of a tensor of {rank} axes")
        found = [size_of(value, axis) for axis in range(rank) if axis not in axes]
        if shape is not None:
            if len(shape) != len(found) or any(a not in (None, b) for a, b in zip(found, shape, strict=True)):
                raise ModelBroken(f"{key}: shape {list(shape)} does not fit the graph's {shape_text(value)}")
            return shape
        if None in found:
            raise ModelBroken(
                f"{key}: the graph has {shape_text(value)}, which leaves sizes open: give shape, without batch and time"
            )
        return tuple(size for size in found if size is not None)

    # ---- the spec ---------------------------------------------------------------------------------------------------

    def _spec(self, inputs: Mapping[str, Lie], outputs: Mapping[str, Lie], states: Mapping[str, Lie]) -> Spec:
        says = self._says
        chunks = {says.inputs[name].chunk or each.entries for name, each in inputs.items()} - {None}
        kept = tuple(
            StateSpec(
                name=f"{CONTEXT}{name}",
                next_name=f"{CONTEXT}{name}.next",
                dtype=dtype_of(self._takes[name], f"inputs.{name}"),
                row_shape=(entry.context, *inputs[name].rest),
            )
            for name, entry in says.inputs.items()
            if entry.context
        )
        graph = GraphSpec(
            chunk=min((each for each in chunks if each is not None), default=None),
            inputs=tuple(
                TensorSpec(
                    name=name,
                    dtype=dtype_of(self._takes[name], f"inputs.{name}"),
                    row_shape=each.row,
                    layout=_layout_of(says.inputs[name].per),
                    **_facts(says.inputs[name]),
                )
                for name, each in inputs.items()
            ),
            outputs=tuple(
                TensorSpec(
                    name=says.outputs[name].name or name,
                    dtype=dtype_of(self._gives[name], f"outputs.{name}"),
                    row_shape=each.row,
                    layout=_layout_of(says.outputs[name].per),
                    **_facts(says.outputs[name]),
                )
                for name, each in outputs.items()
            ),
            states=tuple(self._state_spec(name, each) for name, each in states.items()) + kept,
            operators=_operators(self._graph),
        )
        is_last = all(each.layout is Layout.PER_SEQUENCE for each in graph.outputs)
        return Spec(
            topology="many-to-one" if is_last or says.labels else "many-to-many",
            num_parameters=sum(int(np.prod(each.dims)) for each in self._graph.initializer),
            graphs=(graph,),
            max_batch=says.max_batch,
            labels=says.labels,
            training=Training(task="adopted", data_set="unknown: the model was made elsewhere"),
            versions={"producer": " ".join((self._model.producer_name, self._model.producer_version)).strip()},
            parity=Parity(max_abs_error=0.0, tolerance=0.0, num_cases=0),
        )

    def _state_spec(self, name: str, layout: Lie) -> StateSpec:
        entry = self._says.states[name]
        dtype = dtype_of(self._takes[name], f"states.{name}")
        begins = None
        if entry.initial != "zeros":
            path = self._folder / entry.initial
            if path.name != entry.initial or path.suffix != ".npy":
                raise ModelBroken(
                    f'states.{name}.initial: expected "zeros" or the name of a .npy file beside {DESCRIPTION_FILE}'
                )
            try:
                row = np.load(path, allow_pickle=False)
            except (OSError, ValueError) as error:
                raise ModelBroken(f"states.{name}.initial: {path.name} can't be read: {error}") from error
            if row.shape != layout.rest or row.dtype != dtype:
                raise ModelBroken(
                    f"states.{name}.initial: {path.name} is {row.dtype} {list(row.shape)}, the state {dtype} "
                    f"{list(layout.rest)}"
                )
            self.files.add(path)
            begins = GoldenArray.of(row)
        return StateSpec(name=name, next_name=entry.next, dtype=dtype, row_shape=layout.rest, begins=begins)


def _operators(graph: onnx.GraphProto) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def _layout_of(per: str) -> Layout:
    return Layout.PER_STEP if per == "step" else Layout.PER_SEQUENCE


def _facts(entry: Any) -> dict[str, Any]:
    facts = {"unit": entry.unit, "description": entry.description, "element_names": entry.element_names}
    return facts | ({"num_ids": entry.num_ids} if isinstance(entry, InputEntry) else {})


def _unknown(key: str, what: str, known: Mapping[str, Any]) -> str:
    return f"{DESCRIPTION_FILE}: {key}: the graph has no such {what}; it has {', '.join(known) or 'none'}"
