"""Parts of stream requests, checked by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from models.spec import StepMode
from service.config import Settings
from service.errors import InvalidInput, NotSteppable, OnlyGenerates, ShapeMismatch
from service.lane import Lane
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.policies import Priority
from service.rpc.codec import MAX_NAME_BYTES, STEP_MODES, LanePlan
from service.sessions import Terms

_PRIORITIES: Mapping[int, Priority] = {
    pb.PRIORITY_UNSPECIFIED: Priority.NORMAL,
    pb.PRIORITY_HIGH: Priority.HIGH,
    pb.PRIORITY_NORMAL: Priority.NORMAL,
    pb.PRIORITY_LOW: Priority.LOW,
}


@dataclass(frozen=True, slots=True)
class Opening:
    """What the first message of a stream asks for, checked."""

    outputs: list[int]
    """Which of the model's outputs to answer, by index."""
    emit_last: bool
    terms: list[Terms]
    """Of the sessions to open at once."""


def read_open(plan: LanePlan, request: pb.StreamOpen) -> Opening:
    """Check the first message of a stream. Raises InvalidInput and NotSteppable."""
    check_step_mode(plan.lane, request)
    if request.emit not in pb.Emit.values():
        raise InvalidInput(f"emit {request.emit} is unknown", field="emit")
    outputs = plan.pick_outputs(request.outputs)
    terms = [terms_of(session, plan.lane.settings) for session in request.sessions]
    return Opening(outputs, request.emit == pb.EMIT_LAST, terms)


def read_request(raw: bytes) -> pb.StreamPredictRequest:
    """Parse a message of a stream. Raises InvalidInput."""
    try:
        return pb.StreamPredictRequest.FromString(raw)
    except DecodeError as error:
        raise InvalidInput(f"a message of the stream is no StreamPredictRequest: {error}") from error


def check_step_mode(lane: Lane, request: pb.StreamOpen) -> None:
    """Raise NotSteppable, with the reason, where a stream wants a mode that the model does not support."""
    check_driven(lane)
    wanted = request.step_mode
    if lane.step_mode is StepMode.GENERATIVE and wanted == pb.STEP_MODE_STEPPING:
        return  # the caller chooses the ids
    if wanted == pb.STEP_MODE_UNSPECIFIED or wanted == STEP_MODES[lane.step_mode]:
        return
    if wanted not in pb.StepMode.values():
        raise InvalidInput(f"step mode {wanted} is unknown", field="step_mode")
    name = pb.StepMode.Name(wanted).removeprefix("STEP_MODE_").lower()
    advice = (
        "leave step_mode out to have the server keep the steps and answer when the session closes, or call Predict"
        if lane.step_mode is StepMode.BUFFERED
        else "leave step_mode out"
    )
    raise NotSteppable(
        f"{lane.name} can't be driven by {name}, only by {lane.step_mode.value}: {lane.step_mode_reason}; {advice}",
        field="step_mode",
    )


def check_driven(lane: Lane) -> None:
    """Raise OnlyGenerates for a model whose steps a caller can't give: it takes none, or goes on from an encoder."""
    if lane.encoder is not None or not lane.step_inputs:
        raise OnlyGenerates(f"{lane.name} can't be given steps: {lane.step_mode_reason}", field="model")


def priority_of(value: int) -> Priority:
    """Read a class of priority. Raises InvalidInput."""
    if value not in _PRIORITIES:
        raise InvalidInput(f"priority {value} is unknown: it is high (1), normal (2) or low (3)", field="priority")
    return _PRIORITIES[value]


def terms_of(session: pb.SessionOpen, settings: Settings) -> Terms:
    """Read what a client asks of a session. Raises InvalidInput."""
    linger_s = session.linger.ToNanoseconds() / 1e9
    if len(session.session_id.encode()) > MAX_NAME_BYTES:
        raise InvalidInput(f"a session id has at most {MAX_NAME_BYTES} bytes", field="session_id")
    if session.replay_window > settings.max_replay_window:
        raise InvalidInput(
            f"replay_window {session.replay_window}: the limit (max_replay_window) is {settings.max_replay_window}",
            field="replay_window",
        )
    if not 0 <= linger_s <= settings.max_linger_s:
        raise InvalidInput(f"linger {linger_s} s: expected 0 to {settings.max_linger_s} (max_linger_s)", field="linger")
    if linger_s and not session.session_id:
        raise InvalidInput("linger needs a session_id to resume the session by", field="session_id")
    return Terms(
        session_id=session.session_id,
        linger_s=linger_s,
        replay_window=session.replay_window,
        resume_only=session.resume_only,
        priority=priority_of(session.priority),
    )


def check_columns(frame: pb.StreamFrame, handles: list[int]) -> None:
    """Raise InvalidInput and ShapeMismatch where the columns of a frame don't fit its handles."""
    num = len(handles)
    if len(set(handles)) < num:
        raise InvalidInput("a handle stands in a frame at most once", field="handles")
    for name in ("positions", "lengths", "acked_positions"):
        column = getattr(frame, name)
        if column and len(column) != num:
            raise ShapeMismatch(f"{name} has {len(column)} entries for {num} handles", field=name)
    if frame.positions and max(frame.positions) >= 2**62:
        raise InvalidInput("a position is over 2**62", field="positions")


def lengths_of_frame(frame: pb.StreamFrame, num: int, num_rows: int) -> list[int] | None:
    """Steps of each entry; None stands for one each."""
    if frame.lengths:
        lengths = list(frame.lengths)
        if not all(lengths):
            raise InvalidInput("an entry has no steps: leave it out", field="lengths")
        if sum(lengths) != num_rows:
            raise ShapeMismatch(f"lengths sum to {sum(lengths)}, but there are {num_rows} rows", field="lengths")
        return None if lengths.count(1) == num else lengths
    if not num_rows:
        raise InvalidInput("steps without rows: leave the tensors out, or send at least one row", field="tensors")
    each, rest = divmod(num_rows, num)
    if rest:
        raise ShapeMismatch(f"{num_rows} rows don't divide evenly among {num} handles: give lengths", field="lengths")
    return None if each == 1 else [each] * num
