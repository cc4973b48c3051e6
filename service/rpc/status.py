"""Errors of the service as google.rpc.Status, with details where they help."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2

from service.errors import ServiceError

DOMAIN = "rnnserve"
"""Of every ErrorInfo."""


def status_of(error: ServiceError) -> status_pb2.Status:
    """Describe an error: ErrorInfo always, BadRequest where a field is at fault, RetryInfo where waiting helps."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=str(error))
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))
    if error.field is not None and error.code == "INVALID_ARGUMENT":
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status
