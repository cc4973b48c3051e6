"""Every error that the client raises on purpose, in one tree.

    RnnserveError
    +-- InvalidArgument       the request is wrong; mend it
    +-- NotFound              unknown model, version or session
    +-- FailedPrecondition    right, but not now or not for this model
    +-- ResourceExhausted     a limit of the server; `retry_after_s` says when to try again, if that helps
    +-- DeadlineExceeded      the time given ran out
    +-- PermissionDenied      the server does not know or does not trust this client
    +-- Unavailable           no connection, a lost one, or a server that stops; try again or elsewhere
    +-- ServerError           a fault of the server, or a call it does not know
    |   +-- ProtocolError     its answer breaks the protocol
    +-- StepRejected          in a stream: state and position did not move, the session goes on
    +-- SessionFailed         in a stream: the session is over
        +-- SessionEnded      it was closed, expired, or taken over by another connection

What is wrong is told the same way whether the client saw it before sending, or the server answered it. Of the two
errors in a stream, `code` and `reason` tell what was at fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that is wrong."""

    field: str
    """Path of the field, such as "inputs[0].shape"."""
    description: str
    """What is wrong with it."""


class RnnserveError(Exception):
    """Base of the tree.

    code           name of the canonical status (google.rpc.Code), such as "NOT_FOUND"
    reason         for programs, such as "MODEL_NOT_FOUND"; empty where the server gave none
    message        for people: what is wrong, and what to do
    violations     the fields at fault
    retry_after_s  when the same request may work, or None
    metadata       facts for programs, such as {"expected_position": "7"}
    """

    code = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        reason: str = "",
        violations: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        self.reason = reason
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})


class InvalidArgument(RnnserveError):
    """The request is wrong whatever the server's state."""

    code = "INVALID_ARGUMENT"


class NotFound(RnnserveError):
    """Unknown model, version or session."""

    code = "NOT_FOUND"


class FailedPrecondition(RnnserveError):
    """The request is right, but not now or not for this model."""

    code = "FAILED_PRECONDITION"


class ResourceExhausted(RnnserveError):
    """A limit of the server; the message names it."""

    code = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(RnnserveError):
    """The time given ran out before the answer came."""

    code = "DEADLINE_EXCEEDED"


class PermissionDenied(RnnserveError):
    """The server does not know or does not trust this client."""

    code = "PERMISSION_DENIED"


class Unavailable(RnnserveError):
    """No connection, a lost one, or a server that stops."""

    code = "UNAVAILABLE"


class ServerError(RnnserveError):
    """A fault of the server, or a call that it does not know."""

    code = "INTERNAL"


class ProtocolError(ServerError):
    """The server's answer breaks the protocol: a fault of the server, or versions that don't go together."""


class StepRejected(RnnserveError):
    """Steps that were not applied: the session's state and position did not move.

    The session goes on at `expected_position`; the next step that a stream sends goes there.
    """

    def __init__(
        self, message: str, *, handle: int, position: int, length: int, expected_position: int, cause: RnnserveError
    ) -> None:
        """Keep where it happened.

        handle             number of the session on its stream
        position           of the first step that was not applied
        length             number of them
        expected_position  position of the next step that the server takes
        cause              the same error without its place
        """
        _init_like(self, message, cause)
        self.handle = handle
        self.position = position
        self.length = length
        self.expected_position = expected_position


class SessionFailed(RnnserveError):
    """The session is over and its state is gone. The caller should open a new one and send from position 0."""

    def __init__(
        self, message: str, *, handle: int, position: int, expected_position: int, cause: RnnserveError
    ) -> None:
        """Keep where it happened.

        handle             number of the session on its stream
        position           of the first step that was not applied
        expected_position  steps that were applied
        cause              the same error without its place
        """
        _init_like(self, message, cause)
        self.handle = handle
        self.position = position
        self.expected_position = expected_position


class SessionEnded(SessionFailed):
    """The session ended otherwise than by this client: `reason` is EXPIRED, TAKEN_OVER, FAILED or CLIENT."""


def _init_like(error: RnnserveError, message: str, cause: RnnserveError) -> None:
    RnnserveError.__init__(
        error,
        message,
        code=cause.code,
        reason=cause.reason,
        violations=cause.violations,
        retry_after_s=cause.retry_after_s,
        metadata=cause.metadata,
    )


_CLASSES: Mapping[str, type[RnnserveError]] = {
    "INVALID_ARGUMENT": InvalidArgument,
    "OUT_OF_RANGE": InvalidArgument,
    "NOT_FOUND": NotFound,
    "FAILED_PRECONDITION": FailedPrecondition,
    "ALREADY_EXISTS": FailedPrecondition,
    "ABORTED": FailedPrecondition,
    "RESOURCE_EXHAUSTED": ResourceExhausted,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "PERMISSION_DENIED": PermissionDenied,
    "UNAUTHENTICATED": PermissionDenied,
    "UNAVAILABLE": Unavailable,
    "CANCELLED": Unavailable,
}


def error_for(
    code: str,
    message: str,
    *,
    reason: str = "",
    violations: Sequence[FieldViolation] = (),
    retry_after_s: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> RnnserveError:
    """Make the error of the class that stands for a canonical status; ServerError for those not in the tree."""
    cls = _CLASSES.get(code, ServerError)
    return cls(message, code=code, reason=reason, violations=violations, retry_after_s=retry_after_s, metadata=metadata)
