"""Gateways of Client over a real channel to the real server."""

import math
import time

import numpy as np

from service.client import (
    StepRejected,
)


def assert_rows(rows, expected):
    np.testing.assert_array_equal(np.array(list(rows)), expected)


def test_a_gateway_interleaves_many_sessions(client, sequences):
    expected = client.predict("lstm", sequences)
    rows = {}
    with client.gateway("lstm") as gateway:
        handles = [gateway.open() for _ in sequences]
        rows = {handle: [] for handle in handles}
        for t in range(70):
            gateway.send({h: x[t] for h, x in zip(handles, sequences, strict=True) if t < len(x)})
        gateway.end()
        closed = []
        for events in gateway.receive():
            assert not events.errors
            closed += events.closed
            for handle, y in events:
                rows[handle].extend(y)
    for handle, y in zip(handles, expected, strict=True):
        assert_rows(rows[handle], y)
    assert sorted((c.handle, c.position, c.reason) for c in closed) == [
        (0, 5, "CLIENT"),
        (1, 1, "CLIENT"),
        (2, 70, "CLIENT"),
    ]


def test_a_gateway_tells_faults_of_sessions_apart(client, sequences):
    x = sequences[0]
    expected = client.predict("lstm", [x])[0]
    with client.gateway("lstm") as gateway:
        good, bad, gone = gateway.open(), gateway.open(), gateway.open("never-seen", resume_only=True)
        seen = Reader(gateway)
        gateway.send({good: x[0], bad: [math.nan, 0, 0], gone: x[0]})
        seen.until(lambda: len(seen.errors) == 2 and good in seen.rows)
        assert [(o.handle, o.error.code) for o in seen.opened if o.error] == [(gone, "NOT_FOUND")]
        by_handle = {error.handle: error for error in seen.errors}
        assert isinstance(by_handle[bad], StepRejected)
        assert by_handle[bad].expected_position == 0 == gateway.position(bad)
        assert by_handle[gone].reason == "SESSION_NOT_FOUND"
        gateway.send_columns([bad, good], np.concatenate([x[:2], x[1:3]]), [2, 2], close=[bad])
        seen.until(lambda: seen.closed)
        assert_rows(seen.rows[good], expected[:3])
        assert_rows(seen.rows[bad], expected[:2])
        assert (seen.closed[0].handle, seen.closed[0].position) == (bad, 2)


def test_a_gateway_takes_named_sessions_up_and_has_answers_again(client, sequences):
    x = sequences[0]
    expected = client.predict("lstm", [x])[0]
    with client.gateway("lstm") as gateway:
        handle = gateway.open("gw", linger=30, replay_window=5)
        seen = Reader(gateway)
        gateway.send({handle: x[:3]})
        seen.until(lambda: len(seen.rows.get(handle, ())) == 3)
    with client.gateway("lstm") as gateway:
        gateway.open()
        handle = gateway.open("gw", linger=30, replay_window=5)
        seen = Reader(gateway)
        gateway.flush()
        seen.until(lambda: len(seen.opened) == 2)
        assert (seen.opened[1].position, seen.opened[1].resumed) == (3, True)
        gateway.seek(handle, 1)
        gateway.send({handle: x[1:]})
        seen.until(lambda: len(seen.rows.get(handle, ())) == 4)
        assert_rows(seen.rows[handle], expected[1:])
        gateway.close(handle)


class Reader:
    """Collects a gateway's events until something holds."""

    def __init__(self, gateway):
        self.events = gateway.receive()
        self.rows, self.errors, self.opened, self.closed = {}, [], [], []

    def until(self, holds):
        give_up_at = time.monotonic() + 20
        while not holds():
            assert time.monotonic() < give_up_at
            events = next(self.events)
            self.errors += events.errors
            self.opened += events.opened
            self.closed += events.closed
            for handle, y in events:
                self.rows.setdefault(handle, []).extend(y)
