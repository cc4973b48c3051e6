"""The columns of a StreamAnswer -> arrays. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from service.client._codec import LAYOUT_BY_ENUM, array_of
from service.client.errors import ProtocolError
from service.client.info import ModelInfo
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.tensors import Array


@dataclass(frozen=True, slots=True)
class Columns:
    """The outputs of an answer as they travel."""

    per_step: dict[str, Array]
    """[sum(lengths), ...] by name."""
    per_sequence: dict[str, Array]
    """[entries, ...] by name."""
    shared: dict[str, Array]
    """Without a batch axis, by name."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What an answer holds for one session."""

    handle: int
    position: int
    """Of the first answered step; of the last one of the request under "last"."""
    length: int
    """Rows of each per-step output."""
    per_step: dict[str, Array]
    """[length, ...] by name."""
    rest: dict[str, Array]
    """Per-sequence outputs as one row [...], and shared ones, by name."""


def read_columns(info: ModelInfo, answer: pb.StreamAnswer) -> Columns:
    """Read every tensor of an answer. Raises ProtocolError when one does not fit the entries."""
    columns = Columns({}, {}, {})
    num_entries = len(answer.handles)
    if len(answer.positions) != num_entries or len(answer.lengths) != num_entries:
        raise ProtocolError(
            f"an answer has {num_entries} handles, {len(answer.positions)} positions and {len(answer.lengths)} lengths"
        )
    num_rows = sum(answer.lengths)
    for message in answer.tensors:
        spec = info.output(message.name)
        array = array_of(message, spec)
        layout = LAYOUT_BY_ENUM.get(message.layout) or (spec.layout if spec else "per_step")
        if layout == "shared":
            columns.shared[message.name] = array
            continue
        expected = num_rows if layout == "per_step" else num_entries
        if array.ndim == 0 or len(array) != expected:
            raise ProtocolError(
                f"the answer's output {message.name!r} has shape {list(array.shape)}, not {expected} rows"
            )
        (columns.per_step if layout == "per_step" else columns.per_sequence)[message.name] = array
    return columns


def read_entries(info: ModelInfo, answer: pb.StreamAnswer) -> Iterator[Entry]:
    """Read an answer session by session. Raises ProtocolError."""
    columns = read_columns(info, answer)
    start = 0
    for i, (handle, position, length) in enumerate(zip(answer.handles, answer.positions, answer.lengths, strict=True)):
        yield Entry(
            handle=handle,
            position=position,
            length=length,
            per_step={name: array[start : start + length] for name, array in columns.per_step.items()},
            rest={name: array[i] for name, array in columns.per_sequence.items()} | columns.shared,
        )
        start += length
