"""The short way gives what the long way gives, and is taken only where nothing stands before it."""

from __future__ import annotations

import numpy as np
import pytest

from service import express
from service.events import Answer, Steps
from service.lane import Lane
from service.sessions import Terms
from tests.lanes import Client, drive, lane_maker, run_alone, steps


@pytest.fixture
def lane_of(repository):
    return lane_maker(repository)


def send(client: Client, rows: dict[int, np.ndarray], positions: list[int] | None = None, **fields: object) -> None:
    """Send one step for each handle, as plain frames do: without lengths."""
    sessions = [client.link.sessions[handle] for handle in rows]
    data = b"".join(row.tobytes() for row in rows.values())
    client.lane.submit(Steps(client.link, sessions, positions, None, [data], **fields), 0.0)


def ride(lane: Lane) -> express.Express | None:
    """Go by the short way if there is one."""
    if not express.num_rows(lane):
        return None
    boarded = express.board(lane)
    if boarded is not None:
        express.arrive(boarded, boarded.run.execute(), 0.0, 0.0)
    return boarded


def test_answers_equal_each_sequence_alone(lane_of):
    lane = lane_of("gru")
    clients = [Client(lane) for _ in range(3)]
    for client, sessions in zip(clients, (1, 4, 1), strict=True):
        for _ in range(sessions):
            client.open()
    xs = {(c, h): steps(10 * c + h, 7) for c, client in enumerate(clients) for h in client.link.sessions}
    for step in range(7):
        for c, client in enumerate(clients):
            handles = list(client.link.sessions)
            positions = [step] * len(handles) if step % 2 else None
            send(client, {h: xs[c, h][step] for h in handles}, positions)
        assert len(ride(lane).sessions) == 6
        assert lane.inbox == []
    for (c, h), x in xs.items():
        np.testing.assert_array_equal(clients[c].rows(h), run_alone(lane, x).y)
        session = clients[c].link.sessions[h]
        assert (session.sent, session.expected, session.applied) == (7, 7, 7)
    assert [len(client.told(Answer)) for client in clients] == [7, 7, 7]
    assert (lane.tally.runs, lane.tally.steps, lane.tally.run_rows_sum) == (7, 42, 42)
    assert lane.scheduler.num_queued_steps == 0


def test_both_ways_can_alternate(lane_of):
    lane = lane_of("lstm")
    client = Client(lane)
    client.open()
    x = steps(3, 12)
    for at in (0, 4, 8):
        send(client, {0: x[at]})
        assert ride(lane)
        client.send({0: x[at + 1 : at + 4]})
        assert ride(lane) is None
        drive(lane)
    np.testing.assert_array_equal(client.rows(), run_alone(lane, x).y)


def nan(client: Client) -> None:
    send(client, {0: np.full(3, np.nan, np.float32)})


def gap(client: Client) -> None:
    send(client, {0: steps(1, 1)[0]}, [5])


def twice(client: Client) -> None:
    send(client, {0: steps(1, 1)[0]})
    send(client, {0: steps(2, 1)[0]})


def late(client: Client) -> None:
    send(client, {0: steps(1, 1)[0]}, deadline=9.0)


def long(client: Client) -> None:
    client.send({0: steps(1, 2)})


def behind(client: Client) -> None:
    client.send({0: steps(1, 2)})
    client.lane.flush()
    send(client, {0: steps(2, 1)[0]})


def rejected(client: Client) -> None:
    nan(client)
    client.lane.flush()
    send(client, {0: steps(2, 1)[0]})


@pytest.mark.parametrize("act", [nan, gap, twice, late, long, behind, rejected])
def test_what_needs_a_closer_look_takes_the_long_way(lane_of, act):
    lane = lane_of("lstm")
    client = Client(lane)
    client.open()
    act(client)
    inbox = list(lane.inbox)
    assert ride(lane) is None
    assert lane.inbox == inbox
    assert not client.told(Answer)


@pytest.mark.parametrize(
    ("model", "terms", "link", "settings"),
    [
        ("bilstm", Terms(), {}, {}),
        ("lstm", Terms(replay_window=4), {}, {}),
        ("lstm", Terms(), {"emit_last": True}, {}),
        ("coupled", Terms(), {}, {}),
        ("lstm", Terms(), {}, {"max_batch_rows": 1}),
    ],
)
def test_some_lanes_and_links_take_the_long_way(lane_of, model, terms, link, settings):
    lane = lane_of(model, **settings)
    client = Client(lane, **link)
    for _ in range(2):
        client.open(terms)
    send(client, {0: steps(1, 1)[0], 1: steps(2, 1)[0]})
    assert ride(lane) is None
