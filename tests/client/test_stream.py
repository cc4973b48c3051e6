"""Streams of Client over a real channel to the real server."""

import asyncio
import itertools
import math
import threading

import numpy as np
import pytest

from service.client import (
    Client,
    FailedPrecondition,
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
            assert list(stream.run(iter([]))) == []
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
