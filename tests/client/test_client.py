"""Client over a real channel to the real server."""

import math
import socket
import threading

import numpy as np
import pytest

from service.client import (
    Client,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    Unavailable,
)


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
