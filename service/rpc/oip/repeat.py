"""Recognises steps that differ from an earlier one of their sequence in id and rows alone: they need not be parsed.

Protobuf writes fields in the order of their numbers. So such a request is the model's names, the request's id, then all
else that it says, and last the rows. What the names and all else mean is known from the first request that had them;
they end with the number of bytes that the rows have.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.pb.inference import inference_pb2 as pb
from service.rpc.oip.contents import Form
from service.rpc.oip.options import Options
from service.rpc.oip.sequences import Sequence
from service.rpc.repeat import varint

MAX_MISSES = 1024
"""Requests in a row that were no repeat, past which few are still learned from."""
MAX_LEARNED = 4
"""Most patterns of one sequence,"""
MAX_PATTERN_BYTES = 1024
"""and longest of them."""


@dataclass(slots=True)
class Meaning:
    """What a step of a sequence says, beside its id and rows."""

    sequence: Sequence
    form: Form
    outputs: list[int]
    options: Options
    names: bytes = b""
    """The fields that name the model, as they stand in the request."""
    num_bytes: int = 0
    """Of the rows."""


class Patterns:
    """What is known of every live sequence."""

    def __init__(self) -> None:
        self._meanings: dict[bytes, Meaning] = {}
        self.find = self._meanings.get

    @property
    def num(self) -> int:
        """How many are known."""
        return len(self._meanings)

    def learn(self, pattern: bytes, meaning: Meaning) -> None:
        """Remember what a pattern means, for as long as its sequence takes requests."""
        patterns = meaning.sequence.patterns
        if meaning.sequence.is_open and (pattern in patterns or len(patterns) < MAX_LEARNED):
            self._meanings[pattern] = meaning
            if pattern not in patterns:
                patterns.append(pattern)

    def forget(self, sequence: Sequence) -> None:
        """Forget a sequence that takes no more requests."""
        for pattern in sequence.patterns:
            meaning = self._meanings.get(pattern)
            if meaning is not None and meaning.sequence is sequence:  # sequences of two models may look the same
                del self._meanings[pattern]
        sequence.patterns.clear()


class StepReader:
    """Reads repeats among the requests of one stream."""

    def __init__(self, patterns: Patterns) -> None:
        self._patterns = patterns
        self._names = b"\0"  # no request begins so
        self._num_bytes = 0  # of the rows
        self._num_missed = 0

    def read(self, raw: bytes) -> tuple[Meaning, bytes, bytes] | None:
        """Read a repeat: (what it means, id, rows); None for any other request."""
        if not raw.startswith(self._names):
            return None
        request_id, at = _read_id(raw, len(self._names))
        meaning = self._patterns.find(raw[at : -self._num_bytes])
        if meaning is None or meaning.num_bytes != self._num_bytes or meaning.names != self._names:
            return None
        if not request_id.isascii():  # protobuf is to say whether it is a text
            return None
        self._num_missed = 0
        return meaning, request_id, raw[-self._num_bytes :]

    def learn(self, raw: bytes, request: pb.ModelInferRequest, meaning: Meaning) -> None:
        """Learn from a request that was read the long way."""
        self._num_missed += 1
        if self._num_missed > MAX_MISSES and self._num_missed.bit_count() != 1:
            return
        rows = request.raw_input_contents[0]
        names = pb.ModelInferRequest(
            model_name=request.model_name, model_version=request.model_version
        ).SerializeToString()
        request_id, at = _read_id(raw, len(names))
        pattern = raw[at : -len(rows)]
        if (
            raw.startswith(names)
            and request_id == request.id.encode()
            and pattern.endswith(_RAW_TAG + varint(len(rows)))
            and raw.endswith(rows)
            and len(pattern) <= MAX_PATTERN_BYTES
        ):
            meaning.names, meaning.num_bytes = self._names, self._num_bytes = names, len(rows)
            self._patterns.learn(pattern, meaning)


def _read_id(raw: bytes, at: int) -> tuple[bytes, int]:
    """Read the field of the id, if it is there. Returns (id, where the next field begins)."""
    tag = raw[at : at + 2]
    if len(tag) < 2 or tag[0] != _ID_TAG or tag[1] > 127:  # longer ones have a length of two bytes
        return b"", at
    stop = at + 2 + tag[1]
    return raw[at + 2 : stop], stop


_LENGTH_DELIMITED = 2
_ID_TAG = pb.ModelInferRequest.ID_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_RAW_TAG = bytes([pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | _LENGTH_DELIMITED])
