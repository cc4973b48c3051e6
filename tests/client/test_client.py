"""Client over a real channel to the real server."""

import asyncio
import itertools
import math
import socket
import threading
import time

import numpy as np
import pytest

from service.client import (
    Client,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SessionEnded,
    StepRejected,
    Unavailable,
)
from tests.serving import serving


@pytest.fixture(scope="module")
def narrow(repository):
    """A server that takes few unanswered steps."""
    with serving(repository, max_inflight_steps=8, max_chunk_steps=3) as running:
        yield running


def assert_rows(rows, expected):
    np.testing.assert_array_equal(np.array(list(rows)), expected)


# ---- models and health -----------------------------------------------------------------------------------------------


def test_models_are_described(client):
    models = client.models()
    names = [(model.name, model.version) for model in models]
    assert names == sorted(names)
    assert ("gru", 1) in names
    assert models.broken == ()
    lstm = client.model("lstm")
    assert lstm in list(models)
    assert (lstm.cell, lstm.step_mode, lstm.exactness, lstm.version) == ("lstm", "stepping", "exact", 1)
    assert [(t.name, t.dtype, t.row_shape, t.layout) for t in lstm.inputs] == [("x", "float32", (3,), "per_step")]
    assert [state.name for state in lstm.states] == ["state.0.h", "state.0.c"]
    assert client.model("gru").version == 2
    assert client.model("bilstm").step_mode == "buffered"


def test_health_of_server_and_models(client):
    client.wait_ready(timeout=5, service="lstm")
    assert client.health()
    assert client.health("gru/1")
    assert not client.health("nope")


def test_waiting_for_what_never_comes_ends():
    with (
        Client("localhost:1") as client,
        pytest.raises(Unavailable, match=r"not ready within 0\.2 s.*connect") as caught,
    ):
        client.wait_ready(timeout=0.2)
    assert caught.value.reason == "NOT_READY"


def test_what_is_wrong_has_a_class_and_a_reason(client):
    with pytest.raises(NotFound, match="no model 'nope' is served") as caught:
        client.predict("nope", [np.zeros((1, 3))])
    assert (caught.value.code, caught.value.reason) == ("NOT_FOUND", "MODEL_NOT_FOUND")
    with pytest.raises(NotFound), client.stream("lstm", version=9):
        pass
    with pytest.raises(InvalidArgument, match="no output 'z'"):
        client.predict("lstm", [np.zeros((1, 3))], outputs=["z"])
    with pytest.raises(InvalidArgument) as caught:
        client.predict("lstm", [[[1.0, math.nan, 0.0]]])
    assert caught.value.reason == "BAD_VALUE"
    assert caught.value.violations
    with pytest.raises(InvalidArgument, match="timeout: expected more than 0"):
        client.models(timeout=0)


def test_no_server_is_unavailable():
    with Client("localhost:1") as client:
        with pytest.raises(Unavailable, match="connect"):
            client.health()
        with pytest.raises(Unavailable), client.stream("lstm"):
            pass


def test_a_server_that_does_not_answer_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent, Client(f"127.0.0.1:{silent.getsockname()[1]}") as client:
        with pytest.raises(DeadlineExceeded):
            client.models(timeout=0.2)
        with pytest.raises(DeadlineExceeded), client.stream("lstm", timeout=0.2):
            pass


# ---- whole sequences -------------------------------------------------------------------------------------------------


def test_predict_answers_each_sequence_as_alone(client, sequences):
    together = client.predict("lstm", sequences)
    assert [y.shape for y in together] == [(5, 2), (1, 2), (70, 2)]
    for x, y in zip(sequences, together, strict=True):
        np.testing.assert_array_equal(client.predict("lstm", [x])[0], y)
    last = client.predict("lstm", sequences, emit="last")
    assert_rows(last, [y[-1] for y in together])
    assert (together.version, together.digest) == (1, client.model("lstm").digest)


def test_final_states_carry_a_sequence_on(client, sequences):
    whole = client.predict("lstm", sequences)
    halves = [(x[: len(x) // 2 + 1], x[len(x) // 2 + 1 :]) for x in (sequences[0], sequences[2])]
    first = client.predict("lstm", [a for a, _ in halves], return_state=True)
    assert {name: state.shape for name, state in first.states.items()} == dict.fromkeys(
        ("state.0.h", "state.0.c"), (2, 1, 8)
    )
    second = client.predict("lstm", [b for _, b in halves], states=first.states)
    np.testing.assert_array_equal(np.concatenate([first[0], second[0]]), whole[0])
    np.testing.assert_array_equal(np.concatenate([first[1], second[1]]), whole[2])


def test_float64_and_lists_are_converted_and_tokens_stay_integers(client, sequences):
    x = sequences[0]
    np.testing.assert_array_equal(
        client.predict("lstm", [x.astype(np.float64).tolist()])[0], client.predict("lstm", [x])[0]
    )
    assert client.predict("tokens", [[1, 2, 3], [4]])[0].shape == (3, 2)
    with pytest.raises(InvalidArgument, match="expected int64, got float64"):
        client.predict("tokens", [[1.5]])


def test_a_client_serves_many_threads(client, sequences):
    expected = client.predict("lstm", sequences)
    results = {}

    def work(number):
        x = sequences[number % 3]
        with client.stream("lstm") as stream:
            results[number] = np.array(list(stream.run(iter(x)))), client.predict("lstm", [x])[0]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, (streamed, whole) in results.items():
        np.testing.assert_array_equal(streamed, expected[number % 3])
        np.testing.assert_array_equal(whole, expected[number % 3])
    assert len(results) == 6


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [np.asarray, list, iter, lambda x: (row for row in x)])
def test_run_gives_every_output_in_order(client, sequences, form):
    x = sequences[2]
    expected = client.predict("lstm", [x])[0]
    with client.stream("lstm") as stream:
        assert_rows(stream.run(form(x[:40])), expected[:40])
        assert stream.position == 40
        assert_rows(stream.run(form(x[40:])), expected[40:])


def test_steps_and_chunks_continue_one_another(client, sequences):
    x = sequences[2]
    expected = client.predict("lstm", [x])[0]
    with client.stream("lstm") as stream:
        assert_rows([stream.step(row) for row in x[:3]], expected[:3])
        stream.send(x[3:10])
        stream.send(x[10:11])
        np.testing.assert_array_equal(stream.receive(), expected[3:10])
        np.testing.assert_array_equal(stream.receive_outputs()["y"], expected[10:11])
        assert_rows([stream.step(x[11])], expected[11:12])
        with pytest.raises(FailedPrecondition, match="no answer is due"):
            stream.receive()


def test_run_answers_a_step_before_the_next_is_there(client, sequences):
    x = sequences[0]
    answered = threading.Semaphore(0)

    def live():
        for row in x:
            yield row
            assert answered.acquire(timeout=20)

    with client.stream("lstm") as stream:
        rows = []
        for y in stream.run(live()):
            rows.append(y)
            answered.release()
    assert_rows(rows, client.predict("lstm", [x])[0])


def test_more_steps_than_a_session_may_have_unanswered_wait(narrow, sequences):
    x = sequences[2]
    with Client(narrow.address) as client:
        expected = client.predict("lstm", [x])[0]
        for act in (lambda s: s.run(x), lambda s: s.run(iter(x))):
            with client.stream("lstm") as stream:
                assert stream.max_inflight_steps == 8
                assert_rows(act(stream), expected)
        with client.stream("lstm") as stream:
            for start in range(0, 70, 7):
                stream.send(x[start : start + 7])
            np.testing.assert_array_equal(np.concatenate([stream.receive() for _ in range(10)]), expected)
        with client.stream("lstm") as stream:
            stream.send(x)
            np.testing.assert_array_equal(stream.receive(), expected)


def test_one_thread_sends_while_another_receives(narrow, sequences):
    x = sequences[2]
    with Client(narrow.address) as client, client.stream("lstm") as stream:
        sent = threading.Semaphore(0)

        def feed():
            for row in x:
                stream.send(row[None])
                sent.release()

        thread = threading.Thread(target=feed)
        thread.start()
        rows = []
        for _ in x:
            assert sent.acquire(timeout=20)
            rows.append(stream.receive()[0])
        thread.join()
        assert_rows(rows, client.predict("lstm", [x])[0])


def test_leaving_a_run_drops_what_was_under_way(client, sequences):
    x = sequences[2]
    expected = client.predict("lstm", [x])[0]
    for form in (np.asarray, iter):
        with client.stream("lstm") as stream:
            for y in stream.run(form(x[:20])):
                np.testing.assert_array_equal(y, expected[0])
                break
            at = stream.position
            np.testing.assert_array_equal(stream.step(x[at]), expected[at])


def test_what_the_steps_raise_comes_after_the_outputs(client, sequences):
    def faulty():
        yield from sequences[0]
        raise ZeroDivisionError("in the sensor")

    rows = []
    with client.stream("lstm") as stream:
        with pytest.raises(ZeroDivisionError, match="sensor"):
            rows.extend(stream.run(faulty()))
        assert_rows(rows, client.predict("lstm", [sequences[0]])[0])
        assert stream.position == 5


@pytest.mark.parametrize("form", [np.asarray, iter])
def test_a_rejected_step_leaves_the_session_where_it_was(client, sequences, form):
    x = sequences[2].copy()
    expected = client.predict("lstm", [x])[0]
    broken = x.copy()
    broken[33] = math.nan
    rows = []
    with client.stream("lstm") as stream:
        with pytest.raises(StepRejected) as caught:
            rows.extend(stream.run(form(broken)))
        assert (caught.value.code, caught.value.reason) == ("INVALID_ARGUMENT", "BAD_VALUE")
        assert caught.value.expected_position == stream.position == len(rows)
        assert_rows(rows, expected[: len(rows)])
        assert_rows(stream.run(form(x[len(rows) :])), expected[len(rows) :])
    assert len(rows) >= (32 if form is np.asarray else 33)


def test_a_rejected_step_by_hand(client, sequences):
    x = sequences[0]
    with client.stream("lstm") as stream:
        with pytest.raises(StepRejected, match="is nan"):
            stream.step([math.nan, 0, 0])
        assert_rows([stream.step(row) for row in x], client.predict("lstm", [x])[0])


def test_emit_last_answers_each_send_by_its_last_step(client, sequences):
    x = sequences[2]
    expected = client.predict("lstm", [x])[0]
    with client.stream("lstm", emit="last") as stream:
        stream.send(x[:30])
        np.testing.assert_array_equal(stream.receive(), expected[29])
        assert_rows(stream.run(x[30:]), expected[30:])


def test_a_stream_begins_at_given_states(client, sequences):
    x = sequences[2]
    first = client.predict("lstm", [x[:30]], return_state=True)
    states = {name: state[0] for name, state in first.states.items()}
    with client.stream("lstm", states=states) as stream:
        assert_rows(stream.run(x[30:]), client.predict("lstm", [x])[0][30:])


@pytest.mark.parametrize("form", [np.asarray, iter])
def test_a_buffered_model_answers_at_the_end(client, sequences, form):
    x = sequences[2]
    with client.stream("bilstm") as stream:
        assert stream.step_mode == "buffered"
        assert_rows(stream.run(form(x)), client.predict("bilstm", [x])[0])
        with pytest.raises(FailedPrecondition, match="closed"):
            stream.send(x)
    with client.stream("bigru") as stream:
        assert_rows(stream.run(form(x)), [client.predict("bigru", [x])[0]])


def test_a_buffered_model_by_hand(client, sequences):
    x = sequences[0]
    with client.stream("bilstm") as stream:
        with pytest.raises(FailedPrecondition, match="bidirectional"):
            stream.step(x[0])
        stream.send(x[:2])
        stream.send(x[2:])
        with pytest.raises(FailedPrecondition, match="when the sequence has ended"):
            stream.receive()
        stream.close()
        rows = [*stream.receive(), *stream.receive()]
    assert_rows(rows, client.predict("bilstm", [x])[0])
    with client.stream("bigru") as stream:
        stream.send(x[:2])
        stream.send(x[2:])
        stream.close()
        np.testing.assert_array_equal(stream.receive(), client.predict("bigru", [x])[0])
        with pytest.raises(FailedPrecondition, match="no answer is due"):
            stream.receive()
    with pytest.raises(FailedPrecondition) as caught, client.stream("bilstm", step_mode="stepping"):
        pass
    assert caught.value.reason == "NOT_STEPPABLE"


def test_a_buffered_sequence_is_finished_by_another_stream(client, sequences):
    x = sequences[2]
    with client.stream("bilstm", session_id="halves", linger=30) as stream:
        stream.send(x[:30])
    with client.stream("bilstm", session_id="halves", resume_only=True) as stream:
        assert stream.position == 30
        assert_rows(stream.run(x[30:]), client.predict("bilstm", [x])[0])


def test_a_buffered_model_keeps_only_so_much(narrow, sequences):
    with Client(narrow.address) as client, client.stream("bilstm") as stream:
        with pytest.raises(ResourceExhausted, match="at most 8 steps; 0 were sent"):
            stream.send(sequences[2])
        with pytest.raises(ResourceExhausted, match="8 were sent"):
            list(stream.run(iter(sequences[2])))


def test_a_stream_is_opened_and_closed_once(client, sequences):
    stream = client.stream("lstm")
    with pytest.raises(FailedPrecondition, match="not open"):
        stream.step(sequences[0][0])
    with stream:
        with pytest.raises(FailedPrecondition, match="opened once"):
            stream.open()
        stream.close()
        stream.close()
        with pytest.raises(FailedPrecondition, match="closed"):
            stream.step(sequences[0][0])


def test_an_exception_in_the_block_frees_the_session(served, client, sequences):
    lane = served.lane("lstm")
    before = lane.num_sessions
    with pytest.raises(KeyError), client.stream("lstm") as stream:
        {}[len(stream.step(sequences[0][0]))]
    served.wait_until(lambda: lane.num_sessions == before)


def test_a_session_that_lingers_is_taken_up_by_name(client, sequences):
    x = sequences[2]
    expected = client.predict("lstm", [x])[0]
    with client.stream("lstm", session_id="by-name", linger=30) as stream:
        assert not stream.resumed
        assert_rows(stream.run(x[:10]), expected[:10])
    with client.stream("lstm", session_id="by-name", linger=30, resume_only=True) as stream:
        assert stream.resumed
        assert stream.position == 10
        assert_rows(stream.run(x[10:20]), expected[10:20])
        with client.stream("lstm", session_id="by-name") as other:
            assert_rows(other.run(x[20:]), expected[20:])
            with pytest.raises(SessionEnded) as caught:
                stream.step(x[20])
            assert caught.value.reason == "TAKEN_OVER"
    with pytest.raises(NotFound, match="not live"), client.stream("lstm", session_id="by-name", resume_only=True):
        pass


def test_a_server_that_stops_says_so(repository, sequences):
    x = sequences[0]
    with serving(repository, drain_s=20) as stopping, Client(stopping.address) as client:
        with client.stream("lstm") as stream, client.gateway("lstm") as gateway:
            assert stream.drain_s is None
            stopping_done = asyncio.run_coroutine_threadsafe(stopping.server.stop(), stopping.loop)
            [drain] = itertools.islice((e.drain_s for e in gateway.receive() if e.drain_s is not None), 1)
            assert drain == 20
            for row in x:
                stream.step(row)
            assert stream.drain_s == 20
            with pytest.raises(Unavailable), client.stream("lstm"):
                pass
        stopping_done.result(timeout=20)


# ---- gateways --------------------------------------------------------------------------------------------------------


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
