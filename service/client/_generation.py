"""Generate: what is asked for -> a request, and its responses -> what was made. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from service import tensors
from service.client import _codec
from service.client._base import check_timeout
from service.client.errors import FailedPrecondition, InvalidArgument, ProtocolError
from service.client.generated import NO_IDS, NO_LOG_PROBS, FinishReason, Generated, Piece, text_of
from service.client.info import GenerationInfo, ModelInfo, Priority, TensorInfo
from service.errors import ServiceError
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.tensors import Array

Prompt = str | Sequence[str] | Sequence[int] | Array
_NUM_SEEDS = 2**64
_SHOWN = 12
"""Words of a vocabulary that an error shows."""


class GenerateArguments(TypedDict, total=False):
    """What Client.generate takes by name; it says what each is."""

    version: int
    num_sequences: int | None
    seed: int | Sequence[int] | None
    max_steps: int
    temperature: float
    top_k: int
    top_p: float
    beams: int
    num_hypotheses: int
    length_normalization: float
    priority: Priority
    timeout: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateTerms:
    """The same with defaults."""

    version: int = 0
    num_sequences: int | None = None
    seed: int | Sequence[int] | None = None
    max_steps: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    beams: int = 0
    num_hypotheses: int = 0
    length_normalization: float = 0.0
    priority: Priority = "normal"
    timeout: float | None = None

    def __post_init__(self) -> None:
        check_timeout(self.timeout)


def generate_request(
    info: ModelInfo, inputs: Any, prompts: Sequence[Prompt] | None, terms: GenerateTerms
) -> pb.GenerateRequest:
    """Pack what a model generates from. Raises InvalidArgument."""
    generation = info.generation
    if generation is None:
        raise FailedPrecondition(
            f"model {info.name} does not generate: it is {info.step_mode}; call predict, or open a stream"
        )
    given = _given(info, generation)
    if not given and prompts is None:
        inputs, prompts = None, inputs
    packed = list(_packed(info, generation, given, inputs))
    counts = {message.name: count for message, count in packed if count is not None}
    if prompts is None and not counts and generation.token_input:
        if generation.begin_id is None:
            raise InvalidArgument(
                f"model {info.name} begins with a prompt: give a text of its vocabulary, {_shown(info)}"
            )
        prompts = [()]
    if prompts is not None:
        if isinstance(prompts, str):
            raise InvalidArgument(f"prompts: expected a list, got one text; for one give [{prompts!r}]")
        rows = [_prompt(info, generation, each) for each in prompts]
        if len(rows) == 1 and not counts:
            rows *= terms.num_sequences or 1
        ids = np.array([each for row in rows for each in row], dtype=np.int64)
        message = _codec.tensor(generation.token_input, ids, "per_step", [len(row) for row in rows])
        packed.append((message, len(rows)))
        counts[message.name] = len(rows)
    num = next(iter(counts.values()), 0)
    if not num:
        raise InvalidArgument("expected at least one sequence, got none")
    if len(set(counts.values())) > 1:
        raise InvalidArgument(f"inputs are of different numbers of sequences: {counts}")
    if terms.num_sequences is not None and terms.num_sequences != num:
        raise InvalidArgument(f"num_sequences is {terms.num_sequences}, but the inputs are of {num}")
    request = pb.GenerateRequest(
        model=info.name,
        version=terms.version,
        inputs=[message for message, _ in packed],
        seeds=_seeds(terms.seed, num),
        priority=_codec.priority_enum(terms.priority),
    )
    for name in ("max_steps", "top_k", "beams", "num_hypotheses"):
        value = getattr(terms, name)
        if not 0 <= value < 2**32:
            raise InvalidArgument(f"{name}: expected 0 or more, got {value}")
        setattr(request, name, value)
    for name in ("temperature", "top_p", "length_normalization"):
        setattr(request, name, getattr(terms, name))
    if terms.timeout is not None:
        request.timeout.FromNanoseconds(int(terms.timeout * 1e9))
    return request


def _given(info: ModelInfo, generation: GenerationInfo) -> tuple[TensorInfo, ...]:
    """Inputs that a caller gives: sources and what belongs to a sequence as a whole, not the ids that are fed back."""
    return tuple(
        spec
        for spec in info.inputs
        if spec.name != generation.token_input and (spec.layout != "per_step" or spec.name in generation.source_inputs)
    )


def _packed(
    info: ModelInfo, generation: GenerationInfo, given: tuple[TensorInfo, ...], inputs: Any
) -> Iterator[tuple[pb.Tensor, int | None]]:
    """Pack inputs: (tensor, number of sequences, None for one that they share)."""
    if not given:
        if inputs is not None:
            raise InvalidArgument(f"model {info.name} takes no inputs, only prompts")
        return
    if inputs is None:
        raise InvalidArgument(f"model {info.name} generates from {', '.join(spec.name for spec in given)}: give them")
    if isinstance(inputs, str):
        raise InvalidArgument(f"expected a list of sequences, got one text; for one give [{inputs!r}]")
    for spec, value in _codec.by_input(info, given, inputs):
        if spec.layout == "shared":
            yield _codec.tensor(spec.name, _codec.cast(value, spec, spec.name), "shared"), None
        elif spec.name in generation.source_inputs:
            rows, lengths = _codec.pack([_source(each, spec) for each in value], spec)
            yield _codec.tensor(spec.name, rows, "per_step", lengths), len(lengths)
        else:
            rows = _codec.rows_of(value, spec, spec.name, "sequences")
            yield _codec.tensor(spec.name, rows, "per_sequence"), len(rows)


def _source(value: Any, spec: TensorInfo) -> Any:
    """Split a text whose words are longer than a character."""
    return value.split() if isinstance(value, str) and spec.categories and not spec.is_text else value


def _prompt(info: ModelInfo, generation: GenerationInfo, prompt: Prompt) -> list[int]:
    """Read a prompt: ids, words of the vocabulary, or a text of such words."""
    if not generation.token_input:
        raise InvalidArgument(f"model {info.name} takes no prompt: it feeds no ids back")
    if not isinstance(prompt, str):
        words = list(prompt)
        if all(isinstance(each, int | np.integer) for each in words):
            return [int(each) for each in words]
        return [_id_of(info, str(word)) for word in words]
    if prompt in info.vocabulary:
        return [info.vocabulary.index(prompt)]
    if generation.separator.isspace():
        return [_id_of(info, word) for word in prompt.split()]
    # The longest word first, so that "<girl>" is one and not six.
    known = sorted((word for word in info.vocabulary if word), key=len, reverse=True)
    ids, rest = [], prompt
    while rest:
        word = next((each for each in known if rest.startswith(each)), rest[0])
        ids.append(_id_of(info, word))
        rest = rest[len(word) :]
    return ids


def _id_of(info: ModelInfo, word: str) -> int:
    for each in (word, word.lower(), word.upper()):
        if each in info.vocabulary:
            return info.vocabulary.index(each)
    raise InvalidArgument(f"prompt: {word!r} is not in the vocabulary of {info.name}: {_shown(info)}")


def _shown(info: ModelInfo) -> str:
    """The beginning of a model's vocabulary."""
    return " ".join(info.vocabulary[:_SHOWN]) + (" ..." if len(info.vocabulary) > _SHOWN else "")


def _seeds(seed: int | Sequence[int] | None, num: int) -> list[int]:
    """A seed for each sequence: one number counts on from sequence to sequence."""
    if seed is None:
        return []
    seeds = [(seed + number) % _NUM_SEEDS for number in range(num)] if isinstance(seed, int) else list(seed)
    if len(seeds) != num or not all(0 <= each < _NUM_SEEDS for each in seeds):
        raise InvalidArgument(f"seed: expected one number, or {num} of 0 to 2**64 - 1")
    return seeds


@dataclass(slots=True)
class _Making:
    """What has come of one hypothesis."""

    ids: list[Array] = field(default_factory=list)
    log_probs: list[Array] = field(default_factory=list)
    outputs: dict[str, list[Array]] = field(default_factory=dict)


class Collector:
    """Puts the responses of one call together."""

    def __init__(self, info: ModelInfo) -> None:
        self.info = info
        self._making: dict[tuple[int, int], _Making] = {}
        self._ended: dict[tuple[int, int], Generated] = {}
        self._seeds: Sequence[int] = ()
        self.num_sequences = 0
        self.version = 0
        self.digest = ""

    def take(self, response: pb.GenerateResponse) -> list[Piece]:
        """Take a response; returns the pieces of best hypotheses in it. Raises ProtocolError."""
        if response.WhichOneof("message") == "started":
            started = response.started
            self.num_sequences, self._seeds = started.num_sequences, list(started.seeds)
            self.version, self.digest = started.version, started.digest
            return []
        output = response.output
        count = len(output.sequences)
        if len(output.lengths) != count or len(output.positions) != count:
            raise ProtocolError("the answer's columns of generated outputs are of different lengths")
        ranks = output.hypotheses or [0] * count
        ids = _rows(np.array(output.ids, dtype=np.int64), output.lengths)
        log_probs = _rows(np.array(output.log_probs, dtype=np.float32), output.lengths)
        arrays = {
            message.name: _rows(_codec.array_of(message, self.info.output(message.name)), output.lengths)
            for message in output.tensors
        }
        pieces: dict[int, Piece] = {}
        for entry, (sequence, rank) in enumerate(zip(output.sequences, ranks, strict=True)):
            making = self._making.setdefault((sequence, rank), _Making())
            values = {name: rows[entry] for name, rows in arrays.items()}
            making.ids.append(ids[entry])
            making.log_probs.append(log_probs[entry])
            for name, rows in values.items():
                making.outputs.setdefault(name, []).append(rows)
            if not rank:
                position, text = output.positions[entry], text_of(self.info, ids[entry])
                pieces[sequence] = Piece(sequence, position, ids[entry], text, log_probs[entry], values)
        return list(self._end(output.ends, pieces).values())

    def _end(self, ends: pb.GenerateEnds, pieces: dict[int, Piece]) -> dict[int, Piece]:
        ranks = ends.hypotheses or [0] * len(ends.sequences)
        for entry, (sequence, rank) in enumerate(zip(ends.sequences, ranks, strict=True)):
            making = self._making.pop((sequence, rank), _Making())
            ids = np.concatenate(making.ids) if making.ids else NO_IDS
            reason: FinishReason = "end" if ends.reasons[entry] == pb.FINISH_REASON_END else "max_steps"
            made = Generated(
                ids=ids,
                text=text_of(self.info, ids),
                log_probs=np.concatenate(making.log_probs) if making.log_probs else NO_LOG_PROBS,
                log_prob=ends.log_probs[entry] if ends.log_probs else 0.0,
                finish_reason=reason,
                outputs={name: np.concatenate(rows) for name, rows in making.outputs.items()},
                score=ends.scores[entry] if ends.scores else None,
                seed=self._seeds[sequence] if self._seeds else None,
            )
            if made.num_outputs != ends.num_outputs[entry]:
                raise ProtocolError(
                    f"sequence {sequence} ended with {ends.num_outputs[entry]} outputs, but {made.num_outputs} came"
                )
            self._ended[sequence, rank] = made
            if not rank:
                last = pieces.get(sequence) or Piece(sequence, made.num_outputs, NO_IDS, "", NO_LOG_PROBS, {})
                pieces[sequence] = replace(last, finished=made)
        return pieces

    def results(self) -> list[Generated]:
        """Everything that was made, in the order of the request. Raises ProtocolError where a sequence did not end."""
        ranked: list[list[Generated]] = [[] for _ in range(self.num_sequences)]
        for (sequence, _), made in sorted(self._ended.items(), key=lambda item: item[0]):
            ranked[sequence].append(made)
        if missing := [number for number, made in enumerate(ranked) if not made]:
            raise ProtocolError(f"the answer ended before sequences {missing[:5]} did")
        return [replace(best, others=tuple(others)) for best, *others in ranked]


def _rows(array: Array, lengths: Sequence[int]) -> list[Array]:
    """Cut columns into entries; an empty column is empty for each."""
    if not len(array):
        return [array] * len(lengths)
    try:
        return tensors.split_rows(array, lengths)
    except ServiceError as error:
        raise ProtocolError(f"the answer's generated outputs: {error}") from error


def values_of(text: str, spec: TensorInfo) -> npt.NDArray[np.float32]:
    """Read numbers of an input's row from a text: "1,0", names as in "winter=1,summer=0", or a name alone for 1.

    Raises InvalidArgument.
    """
    size = int(np.prod(spec.row_shape, dtype=np.int64))
    row = np.zeros(size, dtype=np.float32)
    parts = [part.strip() for part in text.split(",")]
    try:
        if all(part.partition("=")[0] in spec.element_names for part in parts):
            for part in parts:
                name, is_set, value = part.partition("=")
                row[spec.element_names.index(name)] = float(value) if is_set else 1.0
            return row.reshape(spec.row_shape)
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) != size:
        names = f", or names of {', '.join(spec.element_names)}" if spec.element_names else ""
        raise InvalidArgument(f"{spec.name}: expected {size} numbers with commas between{names}, got {text!r}")
    return np.array(numbers, dtype=np.float32).reshape(spec.row_shape)
