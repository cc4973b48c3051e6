"""A server of one session in a few lines, without I/O: its "model" answers the running sum of what it was sent.

It follows the protocol's words, not the server's code: positions, gaps, overlaps answered from kept answers, rejections
in-band, answers in pieces of its own choosing. NaN is what it rejects.
"""

from __future__ import annotations

import math

import numpy as np

from service.client.info import ModelInfo, StateInfo, TensorInfo
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb

SUM = ModelInfo(
    name="sum",
    version=1,
    digest="d1",
    cell="rnn",
    topology="many-to-many",
    step_mode="stepping",
    step_mode_reason="",
    inputs=(TensorInfo("x", "float32", (1,), "per_step"),),
    outputs=(TensorInfo("y", "float32", (1,), "per_step"),),
    states=(StateInfo("state.0.h", "float32", (1, 1)),),
    labels=(),
    vocabulary=(),
    task="",
    metrics={},
    num_parameters=0,
    exactness="exact",
    exactness_detail="",
    provider="",
    max_inflight_steps=8,
    spec_json="",
)


class ToySession:
    """The session as the server holds it; `connect` begins a stream that resumes it."""

    def __init__(self, *, emit: str = "all", max_inflight_steps: int = 8) -> None:
        self.emit = emit
        self.max_inflight_steps = max_inflight_steps
        self.applied: list[float] = []
        self.is_live = False
        self.rejected_at: int | None = None
        self.window = 0
        self.kept_from = 0

    def connect(self, opening: pb.StreamOpen) -> pb.StreamPredictResponse:
        [terms] = opening.sessions
        session = pb.SessionOpened(handle=0, session_id=terms.session_id)
        if terms.resume_only and not self.is_live:
            session.status.code = 5
            session.status.message = "the session is not live"
        else:
            session.resumed = self.is_live
            session.position = len(self.applied)
            self.is_live = True
            self.window = terms.replay_window
        opened = pb.StreamOpened(
            model="sum",
            version=1,
            digest="d1",
            step_mode=pb.STEP_MODE_STEPPING,
            max_inflight_steps=self.max_inflight_steps,
            sessions=[session],
        )
        return pb.StreamPredictResponse(opened=opened)

    def take(self, frame: pb.StreamFrame, piece: int) -> list[pb.StreamAnswer]:
        """Apply a frame at once; answers come in pieces of at most `piece` steps."""
        [position] = frame.positions
        xs = np.frombuffer(frame.tensors[0].data, dtype="<f4").tolist()
        expected = len(self.applied)
        for acknowledged in frame.acked_positions:
            self.kept_from = max(self.kept_from, acknowledged)
        if position < min(expected, self.kept_from):
            return [self._error(position, len(xs), 9, f"answers are kept from {self.kept_from}")]
        if position > expected:
            code, text = (10, "aborted") if self.rejected_at == expected else (9, f"a gap: send from {expected}")
            return [self._error(position, len(xs), code, text)]
        fresh = xs[expected - position :]
        if any(math.isnan(x) for x in fresh):
            self.rejected_at = expected
            return [self._error(position, len(xs), 3, "NaN")]
        self.applied += fresh
        self.kept_from = max(self.kept_from, len(self.applied) - self.window)
        end = position + len(xs)
        if self.emit == "last":
            return [self._answer(end - 1, end)]
        return [self._answer(start, min(start + piece, end)) for start in range(position, end, piece)]

    def _answer(self, start: int, stop: int) -> pb.StreamAnswer:
        sums = np.cumsum(self.applied)[start:stop].astype("<f4")
        tensor = pb.Tensor(name="y", data=sums.tobytes())
        return pb.StreamAnswer(handles=[0], positions=[start], lengths=[stop - start], tensors=[tensor])

    def _error(self, position: int, length: int, code: int, text: str) -> pb.StreamAnswer:
        error = pb.StepError(
            position=position,
            length=length,
            kind=pb.STEP_ERROR_KIND_STEP_REJECTED,
            expected_position=len(self.applied),
        )
        error.status.code = code
        error.status.message = text
        return pb.StreamAnswer(errors=[error])


def merge(answers: list[pb.StreamAnswer]) -> list[pb.StreamPredictResponse]:
    """Put answers that are ready together into one message, as a server may."""
    if not answers:
        return []
    together = pb.StreamAnswer()
    for answer in answers:
        together.handles.extend(answer.handles)
        together.positions.extend(answer.positions)
        together.lengths.extend(answer.lengths)
        together.errors.extend(answer.errors)
    data = b"".join(tensor.data for answer in answers for tensor in answer.tensors)
    if data:
        together.tensors.add(name="y", data=data)
    return [pb.StreamPredictResponse(answer=together)]
