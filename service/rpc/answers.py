"""Answers and events of a stream -> messages, as bytes.

A tensor's bytes are copied once, into the message: of an answer protobuf writes all but them. The order of fields is
protobuf's own; a reader can't tell the difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from models.spec import Layout
from service.events import Answer
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.rpc.codec import TensorPlan, empty_tensor, row_bytes_of
from service.rpc.repeat import varint
from service.sessions import SessionState

Array = npt.NDArray[Any]

MAX_ANSWER_BYTES = 1024 * 1024
"""Answers are cut above it, so that a client with gRPC's default limit of 4 MiB can read them."""
MAX_EVENTS = 1024
"""Most events in a message that is cut."""
ENTRY_BYTES = 16
"""What an entry's columns take in a message, roughly."""
CLOSE_REASONS = {
    SessionState.CLOSED: pb.CLOSE_REASON_CLIENT,
    SessionState.EXPIRED: pb.CLOSE_REASON_EXPIRED,
    SessionState.FAILED: pb.CLOSE_REASON_FAILED,
}
EVENT_BYTES = 256
"""What an event takes in a message, roughly."""


class AnswerWriter:
    """Writes what a stream has to say."""

    def __init__(self, plans: Sequence[TensorPlan]) -> None:
        """plans: of the outputs that the stream answers, in its order."""
        self.step_bytes = ENTRY_BYTES + sum(plan.row_bytes for plan in plans)
        """What a step's answer takes in a message, roughly."""
        self._plans = plans
        self._heads: dict[tuple[int, int], bytes] = {}
        self._columns: tuple[list[int], bytes, bytes] = ([], b"", b"")  # of the last answer of one step each

    def write(self, answers: list[Answer], events: pb.StreamAnswer | None) -> list[bytes]:
        """Write answers that are ready together, and events, into as few messages as may hold them.

        The order is: sessions opened, answers, steps that failed, sessions closed.
        """
        num_bytes = self.step_bytes * sum([len(answer.outputs[0]) for answer in answers])
        if events is None and num_bytes <= MAX_ANSWER_BYTES:  # mostly
            return [self._message(answers)]
        events = events or pb.StreamAnswer()
        if num_bytes + events.ByteSize() <= MAX_ANSWER_BYTES:
            return [self._message(answers, events.SerializeToString())]
        opened = pb.StreamAnswer(opened=events.opened)
        over = pb.StreamAnswer(errors=events.errors, closed=events.closed)
        return [
            *(self._message([], piece.SerializeToString()) for piece in cut_events(opened, MAX_EVENTS)),
            *(self._message(group) for group in self._group(answers)),
            *(self._message([], piece.SerializeToString()) for piece in cut_events(over, MAX_EVENTS)),
        ]

    def _message(self, answers: Sequence[Answer], events: bytes = b"") -> bytes:
        parts: list[bytes] = []
        if len(answers) == 1:
            answer = answers[0]
            parts = self._answer(answer.handles, answer.positions, answer.lengths, answer.outputs)
        elif answers:
            handles, positions, lengths = (
                [value for answer in answers for value in getattr(answer, name)]
                for name in ("handles", "positions", "lengths")
            )
            outputs = [np.concatenate(column) for column in zip(*(a.outputs for a in answers), strict=True)]
            parts = self._answer(handles, positions, lengths, outputs)
        body = b"".join([*parts, events])
        return _ANSWER_TAG + varint(len(body)) + body

    def _answer(
        self, handles: list[int], positions: list[int], lengths: list[int], outputs: Sequence[Array]
    ) -> list[bytes]:
        """Fields of a StreamAnswer."""
        position, num = positions[0], len(handles)
        if lengths.count(1) == num and positions.count(position) == num:  # known without protobuf
            known, before, after = self._columns
            if known != handles:
                before = pb.StreamAnswer(handles=handles).SerializeToString()
                after = pb.StreamAnswer(lengths=lengths).SerializeToString()
                self._columns = handles, before, after
            each = varint(position)
            parts = [before, _POSITIONS_TAG + varint(num * len(each)) + each * num, after]
        else:
            parts = [pb.StreamAnswer(handles=handles, positions=positions, lengths=lengths).SerializeToString()]
        for index, rows in enumerate(outputs):
            head = self._heads.get((index, len(rows)))
            parts += [self._head(index, rows) if head is None else head, row_bytes_of(rows)]
        return parts

    def _head(self, index: int, rows: Array) -> bytes:
        """All of a tensor before its bytes; remembered for the numbers of rows that batches mostly have."""
        head = _tensor_head(_TENSORS_TAG, empty_tensor(self._plans[index], rows), rows)
        if len(self._heads) < _MAX_HEADS:
            self._heads[index, len(rows)] = head
        return head

    def _group(self, answers: list[Answer]) -> list[list[Answer]]:
        """Cut and group answers so that no group is larger than a message should be."""
        groups: list[list[Answer]] = []
        size = 0
        for answer in answers:
            for piece in split_answer(answer, self._plans, MAX_ANSWER_BYTES):
                if not groups or size + answer_size(piece) > MAX_ANSWER_BYTES:
                    groups.append([])
                    size = 0
                groups[-1].append(piece)
                size += answer_size(piece)
        return groups


def drain_message(grace_s: float) -> bytes:
    """Write that what a stream has open will end, after so long if that is finite."""
    drain = pb.StreamDrain()
    if math.isfinite(grace_s):
        drain.grace.FromNanoseconds(int(grace_s * 1e9))
    return pb.StreamPredictResponse(drain=drain).SerializeToString()


def write_prediction(header: pb.PredictResponse, outputs: Sequence[tuple[pb.Tensor, Array]]) -> bytes:
    """Write a response of Predict: its fields but the outputs, and those as tensors without data and their rows."""
    parts = [header.SerializeToString()]
    for empty, rows in outputs:
        parts += [_tensor_head(_OUTPUTS_TAG, empty, rows), row_bytes_of(rows)]
    return b"".join(parts)


def _tensor_head(tag: bytes, empty: pb.Tensor, rows: Array) -> bytes:
    """All of a tensor before its bytes."""
    body = empty.SerializeToString()
    if rows.nbytes:
        body += _DATA_TAG + varint(rows.nbytes)
    return tag + varint(len(body) + rows.nbytes) + body


_MAX_HEADS = 1024
_LENGTH_DELIMITED = 2
_ANSWER_TAG, _POSITIONS_TAG, _TENSORS_TAG, _DATA_TAG, _OUTPUTS_TAG = (
    bytes([number << 3 | _LENGTH_DELIMITED])
    for number in (
        pb.StreamPredictResponse.ANSWER_FIELD_NUMBER,
        pb.StreamAnswer.POSITIONS_FIELD_NUMBER,
        pb.StreamAnswer.TENSORS_FIELD_NUMBER,
        pb.Tensor.DATA_FIELD_NUMBER,
        pb.PredictResponse.OUTPUTS_FIELD_NUMBER,
    )
)


def answer_size(answer: Answer) -> int:
    """Bytes that an answer takes, roughly."""
    return ENTRY_BYTES * len(answer.handles) + sum(rows.nbytes for rows in answer.outputs)


def split_answer(answer: Answer, plans: Sequence[TensorPlan], max_bytes: int) -> list[Answer]:
    """Cut an answer into pieces of at most max_bytes: between entries, else between the steps of one."""
    if answer_size(answer) <= max_bytes:
        return [answer]
    num_entries = len(answer.handles)
    if num_entries > 1:
        at = num_entries // 2
        rows_at = sum(answer.lengths[:at])
        lengths = (answer.lengths[:at], answer.lengths[at:])
        handles, positions = answer.handles, answer.positions
        columns = [(handles[:at], positions[:at]), (handles[at:], positions[at:])]
    elif answer.lengths[0] > 1 and all(plan.layout is Layout.PER_STEP for plan in plans):
        rows_at = answer.lengths[0] // 2
        lengths = ([rows_at], [answer.lengths[0] - rows_at])
        columns = [(answer.handles, answer.positions), (answer.handles, [answer.positions[0] + rows_at])]
        at = 0
    else:
        return [answer]
    cuts = [rows_at if plan.layout is Layout.PER_STEP else at for plan in plans]
    parts = []
    for index, (handles, positions) in enumerate(columns):
        side = [slice(0, cut) if index == 0 else slice(cut, None) for cut in cuts]
        outputs = [rows[s] for rows, s in zip(answer.outputs, side, strict=True)]
        parts += split_answer(Answer(handles, positions, lengths[index], outputs), plans, max_bytes)
    return parts


def cut_events(events: pb.StreamAnswer, most: int) -> list[pb.StreamAnswer]:
    """Cut what happened into messages of at most that many events, in the order opened, errors, closed."""
    pieces = []
    for name in ("opened", "errors", "closed"):
        column = getattr(events, name)
        pieces += [pb.StreamAnswer(**{name: column[at : at + most]}) for at in range(0, len(column), most)]
    return pieces
