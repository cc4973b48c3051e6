"""Log lines as text or as JSON, one event a line, with the ids of the call that they are about.

What strangers write (names of models, ids of sessions, methods) can't begin a line of its own nor hide a part of one:
control characters are escaped, and the lines of a traceback are indented. A record brings facts of its own as
`extra={"facts": {...}}`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from datetime import UTC, datetime
from typing import Any, TextIO

from service.facts import CALL

SELDOM = "opentelemetry"
"""Root of the loggers that say the same again and again while a collector is gone, each batch anew."""
SELDOM_S = 60.0
"""They say each thing once in so long."""
_HIDDEN = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Control characters, separators of lines, and marks that turn the direction of writing."""
_ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _HIDDEN}
_ESCAPES |= {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"}
_WORD = re.compile(r"[!#-<>-\[\]-~]+")
"""What needs no quotes: of ASCII, without spaces, quotes, = and backslashes."""
_JSON = json.JSONEncoder(default=str)
"""Escapes what is not ASCII, and so all that could end a line."""
_NEWLINE = {code: escape for code, escape in _ESCAPES.items() if code != ord("\n")}


def log_to_stderr(level: str, form: str = "text", *, who: str = "", stream: TextIO | None = None) -> None:
    """Begin to log.

    level   least severity
    form    "text" or "json"
    who     which of several processes writes; empty where there is one
    stream  what is written to, in place of standard error
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(who) if form == "json" else TextFormatter(who))
    handler.addFilter(_Seldom())
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # they cost, and are not written
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    sys.excepthook = lambda *caught: root.critical("a bug ended the process", exc_info=caught)


class TextFormatter(logging.Formatter):
    """Time, severity, who, logger and message; then facts as name=value."""

    def __init__(self, who: str = "") -> None:
        super().__init__(f"%(asctime)s %(levelname)s {f'{who} ' if who else ''}%(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        """Write the line itself."""
        facts = "".join(f" {name}={_shown(value)}" for name, value in _facts_of(record).items())
        return super().formatMessage(record).translate(_ESCAPES) + facts

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Write a traceback, indented: none of its lines looks like a line of the log."""
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        """Write a stack in the same way."""
        return _indented(stack_info)


class JsonFormatter(logging.Formatter):
    """One object a line."""

    def __init__(self, who: str = "") -> None:
        super().__init__()
        self._who: dict[str, str | int] = {"process": who} if who else {}
        self._who["pid"] = os.getpid()

    def format(self, record: logging.LogRecord) -> str:
        """Write the line."""
        content: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")[:-6] + "Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._who,
            **_facts_of(record),
        }
        if record.exc_info and record.exc_info[0] is not None:
            content["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            content["stack"] = record.stack_info
        return _JSON.encode(content)


class _Seldom(logging.Filter):
    """Lets through one record in a while of what a library says again and again, with how many were left out."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[str, int], list[float]] = {}  # by logger and place: (when, left out since)

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(SELDOM):
            return True
        now = time.monotonic()
        said = self._said.setdefault((record.name, record.lineno), [-SELDOM_S, 0])
        if now - said[0] < SELDOM_S:
            said[1] += 1
            return False
        if said[1]:
            record.facts = {"repeated": int(said[1])}
        said[:] = now, 0
        return True


def _facts_of(record: logging.LogRecord) -> dict[str, Any]:
    """Facts of the call, and of the record."""
    call = CALL.get()
    own: dict[str, Any] = getattr(record, "facts", {})
    return own if call is None else call.ids() | own


def _shown(value: object) -> str:
    """Write a value as a word, in quotes where it would be more than one."""
    if type(value) is int:
        return str(value)
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if _WORD.fullmatch(text) else json.dumps(text, ensure_ascii=False).translate(_ESCAPES)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.translate(_NEWLINE).split("\n"))
