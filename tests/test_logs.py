"""Log lines: what each says, as text and as JSON, and that no stranger can write one."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import NoReturn

import grpc
import pytest

from service.errors import RunFailed
from service.facts import CALL, CallFacts
from service.logs import SELDOM_S, log_to_stderr
from tests.rpc import predict, sequences
from tests.serving import serving

HOSTILE = '\n2026-11-28 07:36:50,123 CRITICAL root: {"level": "critical"}\r\x1b[31m\u2028\u202e\x9b end'


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Begin to log in a form, into what is given back; all is as before after the test."""
    root = logging.getLogger()
    before = root.handlers[:], root.level, sys.excepthook

    def begin(form: str, **options: object) -> io.StringIO:
        stream = io.StringIO()
        log_to_stderr("info", form, stream=stream, **options)
        return stream

    yield begin
    logging.captureWarnings(False)
    root.handlers[:], root.level, sys.excepthook = before


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_strangers_write_begins_no_line_and_hides_nothing(logged, form):
    stream = logged(form)
    log = logging.getLogger("of.a.stranger")
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.exception("it was %s", HOSTILE, extra={"facts": {"session_id": HOSTILE}})
    lines = stream.getvalue().split("\n")
    assert lines.pop() == ""
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e]", stream.getvalue())
    if form == "json":
        [line] = map(json.loads, lines)
        assert line["message"] == f"it was {HOSTILE}"
        assert line["session_id"] == HOSTILE
        assert line["exception"].endswith(f"ValueError: {HOSTILE}")
    else:
        assert [line for line in lines if not line.startswith("    ")] == lines[:1]
        assert lines[0].endswith('\\u2028\\u202e\\x9b end"')
        assert "it was \\n2026" in lines[0]


def test_a_line_of_json_has_the_time_in_utc_and_who_wrote_it(logged):
    stream = logged("json", who="worker 3")
    logging.getLogger("some.where").warning("%d of %s", 2, "them")
    line = json.loads(stream.getvalue())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["time"])
    assert abs(datetime.fromisoformat(line.pop("time")) - datetime.now(UTC)) < timedelta(seconds=10)
    assert line.pop("pid") > 0
    assert line == {"level": "warning", "logger": "some.where", "message": "2 of them", "process": "worker 3"}


def test_every_line_of_a_call_has_its_ids(logged):
    stream = logged("json")
    facts = CallFacts("a.B/C", [("x-request-id", "one-1")])
    facts.serve("gru", 2)
    facts.session_id = "s"
    facts.trace_ids = 10, 11
    token = CALL.set(facts)
    try:
        logging.getLogger("any").info("hello")
    finally:
        CALL.reset(token)
    line = json.loads(stream.getvalue())
    assert {name: line[name] for name in ("request_id", "model", "version", "session_id", "trace_id", "span_id")} == {
        "request_id": "one-1",
        "model": "gru",
        "version": 2,
        "session_id": "s",
        "trace_id": f"{10:032x}",
        "span_id": f"{11:016x}",
    }


@pytest.mark.parametrize("given", ["", "a b", "a" * 129, "a\n", "ü", b"bytes"])
def test_a_request_id_that_is_not_fit_for_logs_is_not_taken(given):
    facts = CallFacts("a.B/C", [("x-request-id", given)])
    assert not facts.is_named
    assert re.fullmatch("[0-9a-f]{16}", facts.request_id)
    assert facts.request_id == facts.request_id


def test_what_a_library_says_again_and_again_is_said_once_in_a_while(logged, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("service.logs.time.monotonic", lambda: now[0])
    stream = logged("text")
    loud, own = logging.getLogger("opentelemetry.exporter"), logging.getLogger("service.any")

    def say() -> None:
        loud.error("no collector")
        own.error("ours")

    for _ in range(3):
        say()
    now[0] += SELDOM_S
    say()
    said = [line.split("ERROR ")[1] for line in stream.getvalue().splitlines()]
    assert said.count("service.any: ours") == 4
    assert [line for line in said if "collector" in line] == [
        "opentelemetry.exporter: no collector",
        "opentelemetry.exporter: no collector repeated=2",
    ]


def test_a_run_is_logged_as_no_calls_own(logged, repository):
    stream = logged("json")
    with serving(repository) as served:

        def fail(*_: object) -> NoReturn:
            raise RunFailed("out of memory")

        served.lane("lstm").runner.run = fail
        with served.stub() as stub, pytest.raises(grpc.RpcError) as caught:
            predict(stub, "lstm", sequences(1, 1, 2, 2))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    [line] = map(json.loads, stream.getvalue().splitlines())
    assert (line["message"], line["model"], line["version"]) == (
        "a run of lstm with 1 rows failed: out of memory",
        "lstm",
        1,
    )
    assert "request_id" not in line
