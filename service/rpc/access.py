"""The access log: a line for each call that has ended, of gRPC and of HTTP, in the form of all other lines."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger

from service.facts import REQUEST_ID_KEY, CallFacts, checked_request_id

if TYPE_CHECKING:  # a supervisor does without
    import grpc

log = logging.getLogger("rnnserve.access")
PROBES = ("grpc.health.v1.Health/Check", "/livez", "/readyz", "/metrics", "/api/stats")
"""What asks every few seconds: where all is well, it is told of at DEBUG."""


class AccessLog:
    """Writes the line of each gRPC call, as a CallObserver: what it costs is once a call, however much it carries."""

    def begin(self, facts: CallFacts, details: grpc.HandlerCallDetails) -> None:
        """Nothing is written yet."""

    def end(self, facts: CallFacts) -> None:
        """Write it."""
        level = logging.DEBUG if facts.method in PROBES and facts.status == "OK" else logging.INFO
        if not log.isEnabledFor(level):
            return
        told: dict[str, Any] = {
            "method": facts.method,
            "code": facts.status,
            "duration_ms": round(facts.seconds * 1000, 3),
            "peer": facts.peer,
            "messages_in": facts.messages_in,
            "messages_out": facts.messages_out,
            "bytes_in": facts.bytes_in,
            "bytes_out": facts.bytes_out,
        }
        if facts.reason:
            told["reason"] = facts.reason
        if facts.model:
            told |= {"sequences": facts.num_sequences, "steps_in": facts.steps_in, "steps_out": facts.steps_out}
        log.log(level, "call", extra={"facts": facts.ids() | told})


class HttpAccessLog(AbstractAccessLogger):
    """Writes the line of each HTTP request."""

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """Write it; time: seconds that it took."""
        level = logging.DEBUG if request.path in PROBES and response.status == 200 else logging.INFO
        if not log.isEnabledFor(level):
            return
        told: dict[str, Any] = {
            "method": f"{request.method} {request.path}",
            "code": response.status,
            "duration_ms": round(time * 1000, 3),
            "peer": request.remote or "",
            "bytes_out": response.body_length,
        }
        if request_id := checked_request_id(request.headers.get(REQUEST_ID_KEY, "")):
            told["request_id"] = request_id
        log.log(level, "request", extra={"facts": told})
