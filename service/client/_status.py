"""Statuses of gRPC and of in-band errors -> the client's error tree. No I/O, and no grpc: only messages and names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.rpc import code_pb2, error_details_pb2, status_pb2

from service.client.errors import FieldViolation, RnnserveError, SessionFailed, StepRejected, error_for
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb

DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata that carries a google.rpc.Status."""


def from_status(status: Any) -> RnnserveError:
    """Turn a google.rpc.Status into an error, with its ErrorInfo, BadRequest and RetryInfo."""
    reason = ""
    metadata: dict[str, str] = {}
    violations: list[FieldViolation] = []
    retry_after_s: float | None = None
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            violations += [FieldViolation(v.field, v.description) for v in bad.field_violations]
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    return error_for(
        _code_name(status.code),
        status.message,
        reason=reason,
        violations=violations,
        retry_after_s=retry_after_s,
        metadata=metadata,
    )


def from_rpc(code: str, details: str, trailers: Iterable[tuple[str, str | bytes]] | None) -> RnnserveError:
    """Turn the outcome of a failed call into an error.

    code      name of the status
    details   its text
    trailers  trailing metadata, which may carry a google.rpc.Status of the same code
    """
    for key, value in trailers or ():
        if key == DETAILS_KEY:
            status = status_pb2.Status()
            try:
                status.ParseFromString(value)
            except Exception:  # noqa: BLE001 - upb and pure Python raise different ones; a proxy's junk is no reason to fail
                break
            if _code_name(status.code) == code:
                return from_status(status)
    return error_for(code, details or code)


def step_error(error: pb.StepError) -> StepRejected | SessionFailed:
    """Turn an in-band error into an exception object."""
    cause = from_status(error.status)
    if error.kind == pb.STEP_ERROR_KIND_SESSION_FAILED:
        return SessionFailed(
            cause.message,
            handle=error.handle,
            position=error.position,
            expected_position=error.expected_position,
            cause=cause,
        )
    return StepRejected(
        cause.message,
        handle=error.handle,
        position=error.position,
        length=error.length,
        expected_position=error.expected_position,
        cause=cause,
    )


def close_reason(closed: pb.SessionClosed) -> str:
    """Name why a session ended: CLIENT, EXPIRED, TAKEN_OVER, FAILED, or UNSPECIFIED for what is new to this client."""
    known = closed.reason in pb.CloseReason.values()
    return pb.CloseReason.Name(closed.reason).removeprefix("CLOSE_REASON_") if known else "UNSPECIFIED"


def _code_name(code: int) -> str:
    names = code_pb2.Code.DESCRIPTOR.values_by_number
    return str(names[code].name) if code in names else "UNKNOWN"


def is_connection_loss(error: RnnserveError) -> bool:
    """Tell whether a call ended for want of a connection, so that a session that lingers can be resumed."""
    if error.code in ("UNAVAILABLE", "CANCELLED"):
        return True
    return error.code in ("INTERNAL", "UNKNOWN") and (
        "RST_STREAM" in error.message or "Stream removed" in error.message
    )
