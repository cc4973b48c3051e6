"""The short way gives what the long way gives, and is taken only where nothing stands before it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service import express
from service.crews import Crew
from service.events import Answer, Steps
from service.lane import Lane
from service.policies import Priority
from service.sessions import Terms
from tests.lanes import Client, drive, finish, lane_maker, run_alone, steps


@pytest.fixture(params=["host", "device"])
def lane_of(repository, request):
    """The states are where the parameter says: nothing else may differ."""
    return lane_maker(repository, keeps_states=request.param == "device")


def send(client: Client, rows: dict[int, np.ndarray], positions: list[int] | None = None, **fields: object) -> None:
    """Send one step for each handle, as plain frames do: without lengths."""
    sessions = [client.link.sessions[handle] for handle in rows]
    data = b"".join(row.tobytes() for row in rows.values())
    client.lane.submit(Steps(client.link, sessions, positions, None, [data], **fields), 0.0)


def ride(lane: Lane) -> express.Express | None:
    """Go by the short way if there is one."""
    num_messages, num_rows = express.num_rows(lane)
    boarded = express.board(lane, num_messages) if num_rows else None
    if boarded is not None:
        express.arrive(boarded, boarded.execute(), 0.0, 0.0)
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
        assert len(ride(lane).slots) == 6
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


def test_more_than_fits_waits_in_line_where_sessions_have_priorities(lane_of):
    lane = lane_of("lstm", max_batch_rows=4)
    clients = [Client(lane) for _ in range(3)]
    for client in clients:
        for _ in range(3):
            client.open()
    for client in clients:
        send(client, {handle: steps(handle, 1)[0] for handle in range(3)})
    assert express.num_rows(lane) == (1, 3)
    high = Client(lane)
    high.open(Terms(priority=Priority.HIGH))
    send(high, {0: steps(9, 1)[0]})
    assert ride(lane) is None
    lane.flush()
    finish(lane, lane.next_run(0.0))
    assert [len(client.told(Answer)) for client in (*clients, high)] == [1, 0, 0, 1]
    drive(lane)
    send(high, {0: steps(9, 1)[0]})
    assert ride(lane)


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


def crew_of(client: Client, handles: list[int]) -> Crew:
    return Crew([client.link.sessions[handle] for handle in handles])


def send_crew(client: Client, crew: Crew, rows: list[np.ndarray], positions: list[int] | None = None) -> None:
    """Send one step for each session of a crew, as frames do that repeat another."""
    data = b"".join(row.tobytes() for row in rows)
    client.lane.submit(Steps(client.link, crew.sessions, positions, None, [data], crew=crew), 0.0)


def test_crews_and_single_sessions_share_a_batch(lane_of):
    lane = lane_of("gru")
    first, second, single = Client(lane), Client(lane), Client(lane)
    crews = [crew_of(client, [client.open() for _ in range(4)]) for client in (first, second)]
    single.open()
    xs = {client: [steps(10 * i + h, 5) for h in range(4)] for i, client in enumerate((first, second, single))}
    for step in range(5):
        send_crew(first, crews[0], [x[step] for x in xs[first]])
        send(single, {0: xs[single][0][step]})
        send_crew(second, crews[1], [x[step] for x in xs[second]], [step] * 4)
        assert len(ride(lane).slots) == 9
    for client, num in ((first, 4), (second, 4), (single, 1)):
        for handle in range(num):
            np.testing.assert_array_equal(client.rows(handle), run_alone(lane, xs[client][handle]).y)
    assert lane.tally.runs == 5


def test_messages_beyond_one_batch_wait_for_the_next(lane_of):
    lane = lane_of("lstm", max_batch_rows=4)
    clients = [Client(lane) for _ in range(3)]
    for client in clients:
        for _ in range(2):
            client.open()
        send(client, {0: steps(1, 1)[0], 1: steps(2, 1)[0]})
    assert len(ride(lane).slots) == 4
    assert len(lane.inbox) == 1
    assert len(ride(lane).slots) == 2
    assert [len(client.told(Answer)) for client in clients] == [1, 1, 1]


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mix_of_ways_gives_each_sequence_its_numbers(lane_of, data):
    """Frames of crews, of parts of them, resent and wrong ones, closes and new sessions, by whichever way they go."""
    lane = lane_of("gru")
    client, sent = Client(lane), {}
    xs = {handle: steps(handle, 40) for handle in range(12)}
    for _ in range(6):
        sent[client.open()] = 0
    crews = [crew_of(client, [0, 1, 2, 3, 4, 5]), crew_of(client, [4, 2])]
    version = client.link.version
    for _ in range(data.draw(st.integers(1, 25))):
        act = data.draw(st.sampled_from(["crew", "crew", "crew", "some", "gap", "close", "open", "part"]))
        live = list(client.link.sessions)
        if act == "crew" and client.link.version == version:
            crew = data.draw(st.sampled_from(crews))
            with_positions = data.draw(st.booleans())
            positions = [sent[h] for h in crew.handles] if with_positions else None
            send_crew(client, crew, [xs[h][sent[h]] for h in crew.handles], positions)
            for handle in crew.handles:
                sent[handle] += 1
        elif act == "some" and live:
            handles = data.draw(st.lists(st.sampled_from(live), min_size=1, unique=True))
            send(client, {h: xs[h][sent[h]] for h in handles}, [sent[h] for h in handles])
            for handle in handles:
                sent[handle] += 1
        elif act == "gap" and live:
            send(client, {live[0]: xs[live[0]][0]}, [sent[live[0]] + 3])
            lane.flush()
            client.link.sessions[live[0]].sent = sent[live[0]]
        elif act == "close" and len(live) > 1:
            lane.close(client.link, live[-1])
        elif act == "open" and len(sent) < len(xs):
            sent[client.open()] = 0
            version = None  # as a stream's pattern, a crew ends with it
        elif act == "part":
            lane.flush()
        if data.draw(st.booleans()) or ride(lane) is None:
            drive(lane)
    drive(lane)
    for handle, num in sent.items():
        if num:
            np.testing.assert_array_equal(client.rows(handle), run_alone(lane, xs[handle][:num]).y)
        session = client.link.sessions.get(handle)
        if session is not None:
            assert (session.sent, session.expected, session.applied) == (num, num, num)
    assert lane.together == []
