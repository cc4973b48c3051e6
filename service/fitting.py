"""Whether a model.toml fits the graph beside it, and how each of its tensors lies then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from models.spec import LENGTHS, SOURCE_LENGTHS
from service.errors import ModelBroken
from service.layouts import Lie, dtype_of, inputs_of, rank_of, shape_text, size_of
from service.modelfile import DESCRIPTION_FILE, Axis, Description, InputEntry, OutputEntry

if TYPE_CHECKING:
    import onnx

_MIN_OPSET = 11
"""The first with Range."""
_LENGTHS_INPUT = 4
"""Number of the input sequence_lens of the operators RNN, LSTM and GRU."""
_RESERVED = (LENGTHS, SOURCE_LENGTHS)
"""Inputs that graphs of the contract have beside those that their spec names."""


class Fit:
    """A graph and what is said of it."""

    def __init__(self, model: onnx.ModelProto, description: Description) -> None:
        """Look at it; the other methods check it."""
        self._model = model
        self._graph = model.graph
        self._says = description
        self._has_lengths = bool(description.lengths)
        self.takes = inputs_of(self._graph)
        """The graph's inputs by name, without its weights."""
        self.gives = {each.name: each for each in self._graph.output}
        """Its outputs by name."""
        self.looks_ahead = self._has_lengths and _reads_back(self._graph, over_lengths=True)
        """Whether sequences are to be given whole."""

    def tensors(self) -> tuple[dict[str, Lie], dict[str, Lie], dict[str, Lie]]:
        """Find out how (inputs, outputs, states) lie. Raises ModelBroken where it does not fit, with what to change."""
        self._check()
        found = self._tensors()
        self._check_elements(*found[:2])
        if not self._has_lengths and not self._says.states:
            self._check_stateless()
        return found

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
                if name not in self.takes:
                    raise ModelBroken(_unknown(f"{section}.{name}", "input", self.takes))
                if name in roles:
                    raise ModelBroken(
                        f"{DESCRIPTION_FILE}: {name} is in {roles[name]} and in {section}: leave it in one"
                    )
                roles[name] = section
        if missing := sorted(self.takes.keys() - roles.keys()):
            raise ModelBroken(
                f"{DESCRIPTION_FILE}: the graph's input {missing[0]!r} is in none of inputs, states and constants: put "
                "it into one"
            )
        nexts = [state.next for state in says.states.values()]
        for name in (*says.outputs, *nexts):
            if name not in self.gives:
                raise ModelBroken(_unknown(name, "output", self.gives))
        if len(set(nexts)) < len(nexts):
            raise ModelBroken(f"{DESCRIPTION_FILE}: two states have the same next value")
        self._check_names()

    def _check_names(self) -> None:
        """Check that clients can tell by names what they give, and what they are answered."""
        says = self._says
        for section, names in (("inputs", says.inputs), ("states", says.states)):
            for name in names:
                if name in _RESERVED:
                    raise ModelBroken(
                        f"{DESCRIPTION_FILE}: {section}.{name}: the server has an input of that name itself: if it "
                        f"counts steps, say lengths = {name!r} instead, otherwise rename it in the graph"
                    )
        taken = {*says.inputs, *says.states, *_RESERVED}
        for name in says.outputs:
            if (answered := says.answered(name)) in taken:
                raise ModelBroken(
                    f"{DESCRIPTION_FILE}: outputs.{name}: {answered} is the name of an input, or of another output: "
                    f"give it one of its own by outputs.{name}.name"
                )
            taken.add(answered)

    def _check_elements(self, inputs: Mapping[str, Lie], outputs: Mapping[str, Lie]) -> None:
        """Check what is said of the elements of rows."""
        says = self._says
        entries = {f"inputs.{name}": (entry.element_names, inputs[name].row) for name, entry in says.inputs.items()}
        entries |= {f"outputs.{name}": (entry.element_names, outputs[name].row) for name, entry in says.outputs.items()}
        checks = [(f"{key}.element_names", *entry) for key, entry in entries.items()]
        checks.append(("labels", says.labels, next(iter(outputs.values())).row))
        for key, names, row in checks:
            num = row[-1] if row else 1
            if names and len(names) != num:
                raise ModelBroken(f"{DESCRIPTION_FILE}: {key}: {len(names)} names for {num} elements")
        for name, entry in says.inputs.items():
            dtype = dtype_of(self.takes[name], f"inputs.{name}")
            if entry.num_ids is not None and dtype not in ("int64", "int32"):
                raise ModelBroken(f"{DESCRIPTION_FILE}: inputs.{name}.num_ids: it is {dtype}, and ids are integers")

    @property
    def may_look_ahead(self) -> bool:
        """Whether a layer reads from the end of an axis that may be that of time, though steps are given one by one."""
        entries = self._says.inputs.items()
        timed = [(name, entry.time_axis) for name, entry in entries if entry.time_axis != "none" and not entry.chunk]
        is_open = any(size_of(self.takes[name], int(axis)) is None for name, axis in timed)
        return is_open and not self._has_lengths and _reads_back(self._graph)

    def _check_stateless(self) -> None:
        says = self._says
        fixed = [name for name, entry in says.inputs.items() if entry.time_axis != "none" and not entry.chunk]
        sizes = [size_of(self.takes[name], int(says.inputs[name].time_axis)) for name in fixed]
        if any(size is not None and size > 1 for size in sizes):
            name, size = next((n, s) for n, s in zip(fixed, sizes, strict=True) if s is not None)
            raise ModelBroken(
                f"it can't be stepped: the time axis of {name} is fixed at {size} steps, and no state goes on from one "
                "call to the next: export it with a dynamic time axis, and its recurrent states as inputs and outputs"
            )

    def _tensors(self) -> tuple[dict[str, Lie], dict[str, Lie], dict[str, Lie]]:
        says = self._says
        if self._has_lengths:
            self._check_timed()
        for name, entry in says.states.items():
            self._check_pair(name, entry.next)
        inputs = {
            name: self._lie(f"inputs.{name}", self.takes[name], entry, entry.chunk, entry.context)
            for name, entry in says.inputs.items()
        }
        outputs = {
            name: self._lie(f"outputs.{name}", self.gives[name], entry, None, 0) for name, entry in says.outputs.items()
        }
        states = {name: self._state_lie(name, entry.batch_axis, entry.shape) for name, entry in says.states.items()}
        is_alone = any(each.batch == "none" for each in (*inputs.values(), *outputs.values(), *states.values()))
        if (is_alone or self._is_fixed_at_one()) and says.max_batch != 1:
            raise ModelBroken(f"{DESCRIPTION_FILE}: the graph takes one sequence at a time: set max_batch = 1")
        return inputs, outputs, states

    def _check_pair(self, name: str, following: str) -> None:
        """Check that a state and its next value may be the same."""
        state, after = self.takes[name], self.gives[following]
        types = [each.type.tensor_type.elem_type for each in (state, after)]
        ranks = {rank_of(state), rank_of(after)} - {None}
        if types[0] != types[1] or len(ranks) > 1:
            raise ModelBroken(
                f"states.{name}.next: {following} is {dtype_of(after, following)} {shape_text(after)}, and the state "
                f"{dtype_of(state, name)} {shape_text(state)}"
            )

    def _check_timed(self) -> None:
        """Check what is said of a graph that is given all steps in one call."""
        says = self._says
        if any(entry.context or entry.chunk for entry in says.inputs.values()):
            raise ModelBroken(f"{DESCRIPTION_FILE}: chunk and context are for a graph that takes no lengths")
        if rank_of(self.takes[says.lengths]) not in (1, None):
            raise ModelBroken(f"lengths: {says.lengths} is {shape_text(self.takes[says.lengths])}, not [batch]")
        for section, entries in (("inputs", says.inputs), ("outputs", says.outputs)):
            for name, entry in entries.items():
                if (entry.per == "step") != (entry.time_axis != "none"):
                    raise ModelBroken(
                        f"{DESCRIPTION_FILE}: {section}.{name}: the graph takes lengths, so that what is per step has "
                        'a time_axis, and what has none is per = "sequence"'
                    )

    def _is_fixed_at_one(self) -> bool:
        says, is_one = self._says, False
        axes = {f"inputs.{name}": (name, entry.batch_axis) for name, entry in says.inputs.items()}
        axes |= {f"states.{name}": (name, entry.batch_axis) for name, entry in says.states.items()}
        for key, (name, axis) in axes.items():
            size = None if axis == "none" else size_of(self.takes[name], axis)
            if size is not None and size > 1:
                raise ModelBroken(
                    f"{key}: its axis of sequences, {axis}, is fixed at {size}: export it with a dynamic one, or with "
                    "1; or is it another axis, by batch_axis?"
                )
            is_one |= size == 1
        return is_one

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
        elif fixed is None and time != "none" and isinstance(entry, OutputEntry) and self._is_chunked:
            raise ModelBroken(
                f"{key}: a step has several entries of axis {time}, and the graph does not say how many: leave "
                "time_axis out, and give shape, with the size of that axis too"
            )
        return Lie(batch, time, sizes, entries, self._has_lengths)

    @property
    def _is_chunked(self) -> bool:
        """Whether a step is several entries of the model's own time axis."""
        timed = [(name, entry) for name, entry in self._says.inputs.items() if entry.time_axis != "none"]
        return any(entry.chunk or size_of(self.takes[name], int(entry.time_axis)) for name, entry in timed)

    def _state_lie(self, name: str, batch: Axis, shape: tuple[int, ...] | None) -> Lie:
        rest = self._sizes(f"states.{name}", self.takes[name], [] if batch == "none" else [batch], shape)
        return Lie(batch, "none", rest, None)

    def _sizes(
        self, key: str, value: onnx.ValueInfoProto, axes: Sequence[int], shape: tuple[int, ...] | None
    ) -> tuple[int, ...]:
        """Sizes of all other axes."""
        rank = rank_of(value)
        is_known = rank is not None
        if rank is None:
            if shape is None:
                raise ModelBroken(f"{key}: the graph does not know its shape: give shape, without batch and time")
            rank = len(axes) + len(shape)
        if axes and max(axes) >= rank:
            raise ModelBroken(f"{key}: axis {max(axes)} of a tensor of {rank} axes")
        if shape is not None and not is_known:
            return shape
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


def _reads_back(graph: onnx.GraphProto, *, over_lengths: bool = False) -> bool:
    """Whether a recurrent node reads a sequence from its end.

    over_lengths  one that knows how long each is, alone: another's axis is not that of time, but of frequency, say
    """
    for node in graph.node:
        knows_lengths = len(node.input) > _LENGTHS_INPUT and bool(node.input[_LENGTHS_INPUT])
        for each in node.attribute:
            reads_back = each.name == "direction" and each.s in (b"bidirectional", b"reverse")
            if reads_back and (knows_lengths or not over_lengths):
                return True
            inner = (*each.graphs, *([each.g] if each.HasField("g") else []))
            if any(_reads_back(part, over_lengths=over_lengths) for part in inner):
                return True
    return False


def _unknown(key: str, what: str, known: Mapping[str, Any]) -> str:
    return f"{DESCRIPTION_FILE}: {key}: the graph has no such {what}; it has {', '.join(known) or 'none'}"
