"""What callers ask of streams and sessions, and the messages that open them. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from google.protobuf.duration_pb2 import Duration

from service.client import _codec
from service.client.errors import InvalidArgument
from service.client.info import Emit, ModelInfo, Priority, StateInfo, TensorInfo
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTerms:
    """What a caller asks of a stream."""

    version: int = 0
    """Version of the model; 0 is the newest."""
    outputs: Sequence[str] = ()
    """Outputs to answer; none named means all."""
    emit: Emit = "all"
    """Which steps of a send are answered."""
    step_mode: str | None = None
    """Mode that the caller needs; None takes what the model supports."""
    session_id: str = ""
    """Name of the session; empty for an anonymous one."""
    linger_s: float = 0.0
    """How long the session outlives its connection."""
    replay_window: int = 0
    """Steps whose answers the server keeps for a resend."""
    resume_only: bool = False
    """Take a live session or none."""
    priority: Priority = "normal"
    """Which work of the model goes first."""
    timeout_s: float | None = None
    """Time after which steps that have not begun to run are rejected."""
    states: Mapping[str, npt.ArrayLike] = field(default_factory=dict)
    """Initial states [directions, hidden] by name; zeros where none are given."""
    contexts: Mapping[str, npt.ArrayLike] = field(default_factory=dict)
    """What the model takes once a sequence, [*row_shape] by name."""

    def __post_init__(self) -> None:
        if self.step_mode is not None and self.step_mode not in _codec.ENUM_BY_STEP_MODE:
            words = ", ".join(_codec.ENUM_BY_STEP_MODE)
            raise InvalidArgument(f"step_mode: expected one of {words}, got {self.step_mode!r}")
        _codec.priority_enum(self.priority)
        if self.resume_only and not self.session_id:
            raise InvalidArgument("resume_only needs a session_id: an anonymous session can't be resumed")
        for name in ("linger_s", "replay_window", "timeout_s"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InvalidArgument(f"{name}: expected at least 0, got {value}")

    @property
    def is_resumable(self) -> bool:
        """Whether the session can be taken up by another connection."""
        return bool(self.session_id) and self.linger_s > 0

    def open_requests(self, info: ModelInfo, *, resume_version: int = 0) -> list[pb.StreamPredictRequest]:
        """Open a stream and its session; with a version, none but the session that was live on it before."""
        resume = resume_version > 0
        opening = stream_open(info, resume_version or self.version, self.outputs, self.emit, self.step_mode)
        session = session_open(
            session_id=self.session_id,
            linger_s=self.linger_s,
            replay_window=self.replay_window,
            resume_only=self.resume_only or resume,
            priority=self.priority,
        )
        given = {**self.states, **self.contexts}
        if not given or resume:
            opening.open.sessions.append(session)
            return [opening]
        frame = pb.StreamFrame(opens=[session], tensors=once_tensors(info, [given]))
        return [opening, pb.StreamPredictRequest(frame=frame)]


def stream_open(
    info: ModelInfo, version: int, outputs: Sequence[str], emit: Emit, step_mode: str | None
) -> pb.StreamPredictRequest:
    """Make a stream's first request."""
    mode = _codec.ENUM_BY_STEP_MODE[step_mode] if step_mode else pb.STEP_MODE_UNSPECIFIED
    opening = pb.StreamOpen(
        model=info.name, version=version, outputs=outputs, emit=_codec.emit_enum(emit), step_mode=mode
    )
    return pb.StreamPredictRequest(open=opening)


def session_open(
    *, session_id: str, linger_s: float, replay_window: int, resume_only: bool, priority: Priority
) -> pb.SessionOpen:
    """Make what opens one session. Raises InvalidArgument."""
    session = pb.SessionOpen(
        session_id=session_id,
        replay_window=replay_window,
        resume_only=resume_only,
        priority=_codec.priority_enum(priority),
    )
    if linger_s:
        session.linger.CopyFrom(duration(linger_s))
    return session


def once_tensors(info: ModelInfo, rows: Sequence[Mapping[str, npt.ArrayLike]]) -> list[pb.Tensor]:
    """Pack initial states and what is given once a sequence, [*row_shape] by name, a mapping for each that opens."""
    specs: dict[str, StateInfo | TensorInfo] = {state.name: state for state in info.states}
    specs |= {each.name: each for each in info.inputs if each.layout == "per_sequence"}
    names = sorted(rows[0])
    packed = []
    for name in names:
        if name not in specs:
            raise InvalidArgument(
                f"model {info.name} has no state or context {name!r}: it has {', '.join(specs) or 'none'}"
            )
        if any(sorted(given) != names for given in rows):
            raise InvalidArgument("sessions that open in one frame must give the same states and contexts")
        spec = specs[name]
        each = [_codec.cast(given[name], spec, name) for given in rows]
        for value in each:
            if value.shape != spec.row_shape:
                raise InvalidArgument(f"{name}: expected shape {list(spec.row_shape)}, got {list(value.shape)}")
        packed.append(_codec.tensor(name, np.stack(each), "per_sequence"))
    return packed


def drain_s_of(drain: pb.StreamDrain) -> float:
    """Read how much time is left; infinity where none is set."""
    return drain.grace.ToMilliseconds() / 1000 if drain.HasField("grace") else math.inf


def duration(seconds: float) -> Duration:
    """Make a Duration."""
    message = Duration()
    message.FromNanoseconds(int(seconds * 1e9))
    return message
