"""Every error that this service raises on purpose, in one tree, with no transport type in it.

    ServiceError
    +-- InvalidInput              the request is wrong whatever the server's state
    |   +-- ShapeMismatch         bytes, dims or row counts that don't fit
    |   +-- TooLong               more steps than an unrolled model takes
    |   +-- BadValue              NaN, infinity, or a token id outside the vocabulary
    +-- NotFound
    |   +-- ModelNotFound         unknown model or version
    |   +-- SessionNotFound       unknown, closed, expired or failed session
    |   |   +-- SessionExpired
    +-- Precondition              the request is right, but not now or not for this model
    |   +-- PositionGap           a step that skips ahead
    |   +-- AnswersNotKept        a resend of steps whose answers are gone
    |   +-- NotSteppable          stepping asked of a model that needs the whole sequence
    |   +-- OnlyGenerates         inputs given to a model that makes its outputs by itself
    |   +-- NotGenerative         outputs asked of a model that takes its inputs step by step
    +-- Exhausted                 a limit of the server
    |   +-- Overloaded            a queue is full for now
    |   +-- SpillFailed           states of idle sessions can't be moved out of memory
    +-- StepAborted               queued behind a step that was rejected
    +-- DeadlineExpired           its time ran out before it was run
    +-- Unimplemented             a call, or a part of one, that this server does not have
    +-- Unavailable               the server is draining
    |   +-- SessionBusy           another worker holds the session and has steps of it to finish
    |   +-- RepositoryUnreachable the repository of models can't be read for now
    +-- ConfigError               a setting that can't work (start-up)
    +-- ModelBroken               a model that can't be loaded (start-up, reload)
    +-- RunFailed                 onnxruntime failed: the server's fault
    |   +-- StatesLost            it failed where states move in place
    |   +-- SpillLost             a session's state that was moved out of memory can't be read back

`code` is the name of a canonical status (google.rpc.Code); `reason` is for programs, the message for people: it says
what to do next. Anything outside this tree is a bug and reaches a caller as INTERNAL without its text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

MAX_MESSAGE = 1_000
"""Longest text of an error, in characters."""


class ServiceError(Exception):
    """Base of the tree."""

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Say what happened.

        field          path of the request's field at fault, such as "tensors[0].data"
        retry_after_s  when the same request may work
        metadata       facts for programs, such as {"expected_position": "7"}
        """
        # It may quote what a stranger sent, and travels in trailers, whose size is limited.
        super().__init__(message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 3] + "...")
        self.field = field
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})


class InvalidInput(ServiceError):
    """The request is wrong whatever the server's state. The caller should mend it."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_INPUT"


class ShapeMismatch(InvalidInput):
    """Bytes, dims or row counts that don't fit each other or the model."""

    reason = "SHAPE_MISMATCH"


class TooLong(InvalidInput):
    """A sequence has more steps than an unrolled model takes; send a shorter one."""

    reason = "TOO_LONG"

    def __init__(self, num_steps: int, *, limit: int) -> None:
        super().__init__(
            f"a sequence of {num_steps} steps, and this model is unrolled for at most {limit}: send no more, or export "
            "it without unroll"
        )


class BadValue(InvalidInput):
    """NaN, infinity, or a token id outside the vocabulary."""

    reason = "BAD_VALUE"


class NotFound(ServiceError):
    """What the request names is not there."""

    code = "NOT_FOUND"
    reason = "NOT_FOUND"


class ModelNotFound(NotFound):
    """Unknown model or version; the message names those there are."""

    reason = "MODEL_NOT_FOUND"


class SessionNotFound(NotFound):
    """Unknown or closed session. The caller should open one and send from position 0."""

    reason = "SESSION_NOT_FOUND"


class SessionExpired(SessionNotFound):
    """Idle past its limit, so its state was freed. The caller should open a new session and resend from position 0."""

    reason = "SESSION_EXPIRED"

    def __init__(self, name: str, *, idle_s: float, limit_s: float) -> None:
        super().__init__(
            f"{name}: idle {idle_s:.1f} s, limit {limit_s:.1f} s; its state is freed: open a new session and send from "
            "position 0"
        )


class Precondition(ServiceError):
    """The request is right, but not now or not for this model."""

    code = "FAILED_PRECONDITION"
    reason = "PRECONDITION"


class PositionGap(Precondition):
    """A step that skips ahead. The caller should send from the expected position."""

    reason = "POSITION_GAP"

    def __init__(self, *, position: int, expected: int) -> None:
        super().__init__(
            f"position {position} skips ahead: expected {expected}; send from position {expected}",
            field="positions",
            metadata={"expected_position": str(expected)},
        )


class AnswersNotKept(Precondition):
    """A resend of applied steps whose answers are gone. The caller should send from the expected position."""

    reason = "ANSWERS_NOT_KEPT"

    def __init__(self, *, position: int, oldest: int, expected: int) -> None:
        kept = f"kept from {oldest}" if oldest < expected else "none are kept (open the session with a replay_window)"
        super().__init__(
            f"position {position} was applied already and its answer is gone ({kept}); send from position {expected}",
            field="positions",
            metadata={"expected_position": str(expected), "oldest_kept_position": str(oldest)},
        )


class NotSteppable(Precondition):
    """Stepping asked of a model that needs the whole sequence."""

    reason = "NOT_STEPPABLE"


class OnlyGenerates(Precondition):
    """Inputs given step by step to a model that makes its outputs by itself. The caller should call Generate."""

    reason = "ONLY_GENERATES"


class NotGenerative(Precondition):
    """Outputs asked of a model that takes its inputs step by step. The caller should call Predict or StreamPredict."""

    reason = "NOT_GENERATIVE"


class Exhausted(ServiceError):
    """A limit of the server. The message names the limit and its setting."""

    code = "RESOURCE_EXHAUSTED"
    reason = "LIMIT"


class Overloaded(Exhausted):
    """A queue is full for now. The caller should retry after a while."""

    reason = "OVERLOADED"


class SpillFailed(Exhausted):
    """States of idle sessions can't be moved out of memory to make room. The caller should retry after a while."""

    reason = "SPILL_FAILED"


class StepAborted(ServiceError):
    """Queued behind a step that was rejected, so it was not applied. The caller should resend from the expected one."""

    code = "ABORTED"
    reason = "STEP_ABORTED"


class DeadlineExpired(ServiceError):
    """Its time ran out before it was run, so it was not applied."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXPIRED"


class Unimplemented(ServiceError):
    """A call, or a part of one, that this server does not have. The message says what to do instead."""

    code = "UNIMPLEMENTED"
    reason = "UNIMPLEMENTED"


class Unavailable(ServiceError):
    """The server is draining. The caller should use another one, or retry after a while."""

    code = "UNAVAILABLE"
    reason = "DRAINING"


class SessionBusy(Unavailable):
    """Another worker holds it and did not give it up in time. The caller should open it again after a while."""

    reason = "SESSION_BUSY"

    def __init__(self, session_id: str) -> None:
        super().__init__(
            f"session {session_id!r} is on another worker of this server, which has steps of it to finish: open it "
            "again after a while",
            retry_after_s=1.0,
        )


class RepositoryUnreachable(Unavailable):
    """The repository of models can't be read for now. What is served goes on; the caller should try again later."""

    reason = "REPOSITORY_UNREACHABLE"


class ConfigError(ServiceError):
    """A setting that can't work; the message names it and what to set."""

    code = "FAILED_PRECONDITION"
    reason = "CONFIG"


class ModelBroken(ServiceError):
    """A model that can't be loaded; the message says what is wrong with the file."""

    code = "FAILED_PRECONDITION"
    reason = "MODEL_BROKEN"


class RunFailed(ServiceError):
    """onnxruntime failed. The server's fault; its log has the text."""

    reason = "RUN_FAILED"


class StatesLost(RunFailed):
    """The run may have moved some of its sequences' states, so none of them can go on.

    The caller should open a new session and send from position 0.
    """

    reason = "STATES_LOST"


class SpillLost(RunFailed):
    """A session's state that was moved out of memory can't be read back.

    The caller should open a new session and send from position 0.
    """

    code = "DATA_LOSS"
    reason = "SPILL_LOST"


def reasons() -> list[str]:
    """List every `reason` that a request may be refused for, in order: a fixed set, for labels of metrics."""
    at_start = {ConfigError.reason, ModelBroken.reason}
    kinds, found = [ServiceError], set[str]()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        found.add(kind.reason)
    return sorted(found - at_start)
