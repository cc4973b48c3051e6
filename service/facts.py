"""What is known of the call that is being served: for its log lines, its line in the access log, and its trace.

A call's facts are found from wherever its task, or one that it has started, is at work. Runs are no call's own: the
engine makes them in a context without one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Protocol

REQUEST_ID_KEY = "x-request-id"
"""Metadata, and header, by which a caller names its request, and by which the name comes back."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class Trace(Protocol):
    """Is told of what happens in a call that is traced."""

    def note(self, event: str, **attributes: str | int | float) -> None:
        """Take down that something happened just now."""


class CallFacts:
    """One call."""

    __slots__ = (
        "_request_id",
        "bytes_in",
        "bytes_out",
        "messages_in",
        "messages_out",
        "method",
        "model",
        "num_sequences",
        "peer",
        "reason",
        "seconds",
        "session_id",
        "status",
        "steps_in",
        "steps_out",
        "trace",
        "trace_ids",
        "version",
    )

    def __init__(self, method: str, metadata: Iterable[tuple[str, str | bytes]] = ()) -> None:
        """Begin with the full name of its method, and the metadata that came with it."""
        self.method = method
        self._request_id = _request_id_in(metadata)
        self.model = ""
        self.version = 0
        self.session_id = ""
        """Of the one session that it is about, if it is about one."""
        self.num_sequences = 0
        """Sessions opened, or sequences given."""
        self.steps_in = self.steps_out = 0
        """Steps taken, and answered."""
        self.trace: Trace | None = None
        """Of a call whose trace is recorded."""
        self.trace_ids: tuple[int, int] | None = None
        """Of the trace and the span, recorded or not."""
        # Known at its end.
        self.messages_in = self.messages_out = self.bytes_in = self.bytes_out = 0
        self.peer = self.status = self.reason = ""
        self.seconds = 0.0

    @property
    def is_named(self) -> bool:
        """Whether anybody knows it by a request id: the caller, or whoever reads the log."""
        return bool(self._request_id)

    @property
    def request_id(self) -> str:
        """The caller's name for it, or one that is made when it is first asked for."""
        if not self._request_id:
            self._request_id = f"{random.getrandbits(64):016x}"
        return self._request_id

    def note(self, event: str, **attributes: str | int | float) -> None:
        """Take down in its trace, if that is recorded, that something happened just now."""
        if self.trace is not None:
            self.trace.note(event, **attributes)

    def serve(self, model: str, version: int) -> None:
        """Learn which model version it is for."""
        self.model = model
        self.version = version

    def ids(self) -> dict[str, str | int]:
        """What each of its log lines carries."""
        ids: dict[str, str | int] = {"request_id": self.request_id}
        if self.model:
            ids |= {"model": self.model, "version": self.version}
        if self.session_id:
            ids["session_id"] = self.session_id
        if self.trace_ids is not None:
            ids |= {"trace_id": f"{self.trace_ids[0]:032x}", "span_id": f"{self.trace_ids[1]:016x}"}
        return ids


CALL: ContextVar[CallFacts | None] = ContextVar("call", default=None)
"""The call that is being served."""


def current() -> CallFacts:
    """The facts of the call that is being served; outside of one, facts that nobody will read."""
    return CALL.get() or CallFacts("")


def checked_request_id(given: str | bytes) -> str:
    """Take a caller's request id if it is fit for logs, else none."""
    return given if isinstance(given, str) and _REQUEST_ID.fullmatch(given) else ""


def _request_id_in(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    for key, value in metadata:
        if key == REQUEST_ID_KEY:
            return checked_request_id(value)
    return ""
