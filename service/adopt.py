"""Looks at a graph that was made elsewhere, and writes a first model.toml of what it finds.

What is found is found by names and shapes that pair up. What can't be told apart so is asked for, never chosen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from service.errors import ModelBroken
from service.layouts import DTYPES, inputs_of, rank_of, shape_text, size_of
from service.modelfile import DESCRIPTION_FILE, Description, describe

if TYPE_CHECKING:
    import onnx

_AFFIXES = frozenset(
    (
        *("0", "i", "in", "init", "initial", "input", "prev", "previous", "past", "old"),
        *("o", "n", "out", "output", "next", "new", "present", "cur", "current", "final", "last", "y"),
    )
)
"""Words that tell a state's two names apart: h0 and hn, hidden_in and hidden_out, past_h and present_h."""
_TIMES = frozenset(
    ["t", "time", "times", "seq", "sequence", "sequence_length", "seq_len", "steps", "length", "frames", "samples"]
)
_BATCHES = frozenset(["b", "n", "batch", "batch_size", "num_sequences"])


@dataclass
class Hints:
    """What a caller knows already."""

    constants: Mapping[str, Any] = field(default_factory=dict)
    states: Mapping[str, str] = field(default_factory=dict)
    """The next value's output, by the state's input."""
    chunk: int | None = None
    context: int = 0


@dataclass
class Found:
    """What was found, as model.toml says it."""

    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    lengths: str = ""
    max_batch: int | None = None
    doubts: list[str] = field(default_factory=list)
    """What is to be looked at, each with the key that it is about."""

    def description(self) -> Description:
        """Check it as a model.toml is checked. Raises ModelBroken."""
        values: dict[str, Any] = {
            "inputs": self.inputs,
            "outputs": self.outputs,
            "states": self.states,
            "constants": self.constants,
            "lengths": self.lengths,
        }
        if self.max_batch is not None:
            values["max_batch"] = self.max_batch
        return describe(values, DESCRIPTION_FILE)

    def text(self, source: str, verdict: str) -> str:
        """Write the file."""
        lines = [f"# {source}, as `rnnserve adopt` found it. Keys: docs/adopt.md."]
        lines += [f"# Look at this: {doubt}" for doubt in self.doubts]
        if verdict:
            lines.append(f"# Batching, measured: {verdict}")
        if self.max_batch is not None:
            lines.append(f"max_batch = {self.max_batch}")
        if self.lengths:
            lines.append(f"lengths = {_toml(self.lengths)}")
        for section in ("inputs", "states", "outputs"):
            for name, entry in getattr(self, section).items():
                lines += ["", f"[{section}.{_key(name)}]", *_lines(entry)]
        if self.constants:
            lines += ["", "[constants]", *_lines(self.constants)]
        return "\n".join(lines) + "\n"


def look(graph: onnx.GraphProto, hints: Hints) -> Found:
    """Find out what a graph's inputs and outputs are. Raises ModelBroken where that can't be told, and what to say."""
    return _Look(graph, hints).found


class _Look:
    def __init__(self, graph: onnx.GraphProto, hints: Hints) -> None:
        self._graph = graph
        self._hints = hints
        self._takes = inputs_of(graph)
        self._gives = {each.name: each for each in graph.output}
        self.found = Found()
        for known, what in ((hints.constants, self._takes), (hints.states, self._takes)):
            if unknown := [name for name in known if name not in what]:
                raise ModelBroken(f"the graph has no input {unknown[0]!r}; it has {', '.join(what)}")
        self._find_constants()
        self._find_lengths()
        pairs = self._pair_states()
        rest = [name for name in self._takes if name not in self._taken(pairs)]
        self._batch = self._batch_symbols(rest, pairs)
        for name in rest:
            self.found.inputs[name] = self._input(name, has_states=bool(pairs))
        if not rest:
            raise ModelBroken("every input is a state or a constant: nothing is given with a step")
        for name, following in pairs.items():
            self.found.states[name] = {"next": following, **self._state_axis(name)}
        for name in self._gives:
            if name not in pairs.values():
                self.found.outputs[name] = self._output(name)
        if not self.found.outputs:
            self._answer_states()
        if self._is_alone():
            self.found.max_batch = 1
            self.found.doubts.append("max_batch: the graph's batch is fixed at 1, so sequences run one at a time")

    # ---- constants and lengths ---------------------------------------------------------------------------------------

    def _find_constants(self) -> None:
        self.found.constants.update(self._hints.constants)
        for name, value in self._takes.items():
            if name in self._hints.constants:
                continue
            if rank_of(value) == 0 or (rank_of(value) == size_of(value, 0) == 1 and self._is_batched()):
                raise ModelBroken(
                    f"input {name!r} is a single {_dtype(value)}, which is the same in every call: say which, "
                    f"--constant {name}=VALUE"
                )

    def _is_batched(self) -> bool:
        """Whether some input has an axis of any size, so that one of size 1 is no batch."""
        axes = ((value, axis) for value in self._takes.values() for axis in range(rank_of(value) or 0))
        return any(size_of(value, axis) is None for value, axis in axes)

    def _find_lengths(self) -> None:
        for name, value in self._takes.items():
            is_count = _dtype(value) in ("int32", "int64") and rank_of(value) == 1
            if is_count and name not in self.found.constants and "len" in name.lower():
                self.found.lengths = name

    def _taken(self, pairs: Mapping[str, str]) -> set[str]:
        return {*pairs, *self.found.constants, self.found.lengths}

    # ---- states -----------------------------------------------------------------------------------------------------

    def _pair_states(self) -> dict[str, str]:
        pairs = dict(self._hints.states)
        for name, following in pairs.items():
            if following not in self._gives:
                raise ModelBroken(f"the graph has no output {following!r}; it has {', '.join(self._gives)}")
            state, after = self._takes[name], self._gives[following]
            if (rank_of(state) or 0) > 1 and not _fit(state, after):
                raise ModelBroken(
                    f"--state {name}={following}: {following} is {_dtype(after)} {shape_text(after)}, and the state "
                    f"{_dtype(state)} {shape_text(state)}"
                )
        free = [name for name in self._takes if name not in self._taken(pairs)]
        for name in free:
            mine = self._takes[name]
            fitting = [each for each in self._gives if each not in pairs.values() and _fit(mine, self._gives[each])]
            named = [other for other in fitting if _stem(other) == _stem(name) and _stem(name)]
            if len(named) == 1:
                pairs[name] = named[0]
            elif len(named) > 1:
                rivals = " or ".join(named)
                raise ModelBroken(f"the next value of {name} may be {rivals}: say --state {name}={named[0]}")
        free = [name for name in free if name not in pairs]
        if len(free) > 1:
            self._pair_by_shape(free, pairs)
        return pairs

    def _pair_by_shape(self, free: Sequence[str], pairs: dict[str, str]) -> None:
        """Pair what has the same shape, where there is one way to."""
        left = [each for each in self._gives if each not in pairs.values()]
        candidates = {
            name: [each for each in left if _fit(self._takes[name], self._gives[each], strict=True)] for name in free
        }
        for name, fitting in candidates.items():
            if not fitting:
                continue
            rivals = [other for other, theirs in candidates.items() if other != name and set(theirs) & set(fitting)]
            if len(fitting) > 1 or rivals:
                names = ", ".join(sorted({name, *rivals}))
                raise ModelBroken(
                    f"{names} may be states, with {', '.join(fitting)} as next values, and neither names nor shapes "
                    f"tell which: say --state {name}=OUTPUT for each that is one"
                )
            pairs[name] = fitting[0]
            self.found.doubts.append(f"states.{name}: taken for a state since {fitting[0]} has its shape")

    def _state_axis(self, name: str) -> dict[str, Any]:
        value = self._takes[name]
        rank = rank_of(value) or 0
        named = [axis for axis in range(rank) if _symbol(value, axis) in self._batch]
        dynamic = [axis for axis in range(rank) if size_of(value, axis) is None]
        if len(named) == 1:
            axis = named[0]
        elif len(dynamic) == 1:
            axis = dynamic[0]
        elif not dynamic:
            ones = [axis for axis in range(rank) if size_of(value, axis) == 1]
            if not ones:
                raise ModelBroken(f"state {name} has no axis of sequences: {shape_text(value)}")
            axis = 1 if rank == 3 and 1 in ones else ones[0]  # [layers, batch, hidden], as in ONNX, torch and Keras
            if len(ones) > 1:
                self.found.doubts.append(f"states.{name}.batch_axis: {axis} of {shape_text(value)} is a guess")
        else:
            axis = 1 if rank == 3 and 1 in dynamic else dynamic[0]
            self.found.doubts.append(f"states.{name}.batch_axis: {axis} of {shape_text(value)} is a guess")
        return {} if axis == 0 else {"batch_axis": axis}

    def _answer_states(self) -> None:
        """Answer states where there is nothing else."""
        for entry in self.found.states.values():
            self.found.outputs[entry["next"]] = {key: axis for key, axis in entry.items() if key == "batch_axis"}
        if not self.found.outputs:
            raise ModelBroken("it has no output: nothing is answered")
        self.found.doubts.append("outputs: every one is a state's next value, so that states are what is answered")

    # ---- inputs and outputs -----------------------------------------------------------------------------------------

    def _batch_symbols(self, rest: Sequence[str], pairs: Mapping[str, str]) -> set[str]:
        """Names that the graph gives its axis of sequences."""
        symbols = {
            _symbol(value, axis)
            for value in self._takes.values()
            for axis in range(rank_of(value) or 0)
            if _symbol(value, axis).lower() in _BATCHES
        }
        if symbols:
            return symbols
        in_states, in_inputs = (
            [{_symbol(self._takes[name], axis) for axis in range(rank_of(self._takes[name]) or 0)} for name in names]
            for names in (pairs, rest)
        )
        shared = set.intersection(*in_states, *in_inputs) if in_states and in_inputs else set[str]()
        return {each for each in shared if each and each.lower() not in _TIMES}

    def _input(self, name: str, *, has_states: bool) -> dict[str, Any]:
        value = self._takes[name]
        rank = rank_of(value)
        if rank is None:
            raise ModelBroken(f"input {name}: the graph does not know its shape: write {DESCRIPTION_FILE} by hand")
        batch, time = self._axes(value, rank)
        entry: dict[str, Any] = {}
        if batch != 0:
            entry["batch_axis"] = "none" if batch is None else batch
        if time is None and (self._hints.chunk or self._hints.context):
            time = next((axis for axis in range(rank) if axis != batch), None)
        if time is not None:
            entry["time_axis"] = time
            entry |= self._chunk(name, value, entry, has_states=has_states)
        if (ids := self._num_ids(name)) is not None:
            entry["num_ids"] = ids
        elif _dtype(value) in ("int64", "int32"):
            self.found.doubts.append(f"inputs.{name}.num_ids: ids are not checked until it says how many there are")
        return entry

    def _axes(self, value: onnx.ValueInfoProto, rank: int) -> tuple[int | None, int | None]:
        """Find (batch axis, time axis)."""
        symbols = [_symbol(value, axis) for axis in range(rank)]
        batch = next((axis for axis, each in enumerate(symbols) if each in self._batch), None)
        time = next((axis for axis, each in enumerate(symbols) if each.lower() in _TIMES and axis != batch), None)
        dynamic = [axis for axis in range(rank) if size_of(value, axis) is None and axis not in (batch, time)]
        if batch is None and dynamic:
            batch = dynamic.pop(0)
        if batch is None:
            ones = [axis for axis in range(rank) if size_of(value, axis) == 1 and axis != time]
            batch = ones[0] if ones and rank > 1 else None
        if time is None and dynamic:
            time = dynamic.pop(0)
        if time is None and rank == 3:
            time = next(axis for axis in range(3) if axis != batch)
        return batch, time

    def _chunk(
        self, name: str, value: onnx.ValueInfoProto, entry: Mapping[str, Any], *, has_states: bool
    ) -> dict[str, Any]:
        hints, time = self._hints, entry["time_axis"]
        fixed = size_of(value, time)
        if fixed is not None and fixed > 1 and not has_states and not hints.context:
            raise ModelBroken(
                f"it can't be stepped: the time axis of {name} is fixed at {fixed} steps, and no state goes on from "
                "one call to the next: export it with a dynamic time axis, and its recurrent states as inputs and "
                "outputs"
            )
        chunk = hints.chunk or (None if fixed is None or fixed - hints.context == 1 else fixed - hints.context)
        is_scalar = rank_of(value) == (1 if entry.get("batch_axis") == "none" else 2)
        if chunk is None and _dtype(value).startswith("float") and is_scalar:
            self.found.doubts.append(
                f"inputs.{name}.chunk: every entry of axis {time} is a step; a model that takes frames of samples "
                "needs --chunk, and --context if it is given the last samples of the frame before"
            )
        return {**({"chunk": chunk} if chunk else {}), **({"context": hints.context} if hints.context else {})}

    def _num_ids(self, name: str) -> int | None:
        """Rows of the table that ids are looked up in."""
        weights = {each.name: each for each in self._graph.initializer}
        for node in self._graph.node:
            if node.op_type == "Gather" and node.input[1] == name and node.input[0] in weights:
                return int(weights[node.input[0]].dims[0])
        return None

    def _output(self, name: str) -> dict[str, Any]:
        value = self._gives[name]
        rank = rank_of(value) or 0
        entry: dict[str, Any] = {}
        first, first_entry = next(iter(self.found.inputs.items()))
        symbols = [_symbol(value, axis) for axis in range(rank)]
        batch = next((axis for axis, each in enumerate(symbols) if each in self._batch), 0)
        if first_entry.get("batch_axis") == "none":
            entry["batch_axis"] = "none"
        elif batch:
            entry["batch_axis"] = batch
        time = first_entry.get("time_axis")
        if time is not None and "chunk" not in first_entry:  # else an axis of time is part of what a step is answered
            same = _symbol(self._takes[first], time)
            axis = next((axis for axis, each in enumerate(symbols) if each and each == same), None)
            if axis is None and rank == rank_of(self._takes[first]) and rank > 2:
                axis = time
            if axis is not None:
                entry["time_axis"] = axis
        return entry

    def _is_alone(self) -> bool:
        entries = (*self.found.inputs.items(), *self.found.states.items())
        axes = [(self._takes[name], entry.get("batch_axis", 0)) for name, entry in entries]
        return any(axis == "none" or size_of(value, axis) == 1 for value, axis in axes)


def _stem(name: str) -> tuple[str, ...]:
    """Words of a name, without those that tell a state from its next value."""
    words = re.findall(r"[a-z]+|[0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    words = [word[0] if word in ("hn", "cn", "ho", "co", "hi", "ci") else word for word in words]
    while words and words[-1] in _AFFIXES:
        words.pop()
    while words and words[0] in _AFFIXES:
        words.pop(0)
    return tuple(words)


def _fit(a: onnx.ValueInfoProto, b: onnx.ValueInfoProto, *, strict: bool = False) -> bool:
    """Whether two tensors may be a state and its next value; strict: whether the graph says that sizes are equal."""
    rank = rank_of(a)
    if _dtype(a) != _dtype(b) or rank is None or rank_of(b) not in (rank, None) or rank < 2:
        return False
    sizes = [(size_of(a, axis), size_of(b, axis)) for axis in range(rank)]
    if strict:
        return all(x == y for x, y in sizes) and sum(x is None for x, _ in sizes) < 2
    return all(None in pair or pair[0] == pair[1] for pair in sizes)


def _symbol(value: onnx.ValueInfoProto, axis: int) -> str:
    """Name that a graph gives a dynamic axis, if it does."""
    if rank_of(value) is None:
        return ""
    return str(value.type.tensor_type.shape.dim[axis].dim_param)


def _dtype(value: onnx.ValueInfoProto) -> str:
    return DTYPES.get(value.type.tensor_type.elem_type, "")


def _lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{_key(name)} = {_toml(value)}" for name, value in values.items()]


def _toml(value: Any) -> str:
    """Write a value: JSON's form of texts, finite numbers, lists and truth is TOML's too."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(value).replace("Infinity", "inf")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)
