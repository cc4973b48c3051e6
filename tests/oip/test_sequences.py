"""Live sequences of the protocol: state from call to call, start and end, refusals that move nothing, idle limits."""

from __future__ import annotations

from pathlib import Path

import grpc
import numpy as np
import pytest

from service.pb.inference import inference_pb2 as pb
from tests.lanes import equal
from tests.oip.calls import array, refused, request, step, stub_of
from tests.rpc import Requests, code_of, details, run_alone, sequences
from tests.serving import Served, serving


@pytest.fixture
def own(repository: Path) -> Served:
    """A server of its own, with no sequence on it."""
    with serving(repository) as served:
        yield served


def num_sessions(served: Served, model: str = "lstm") -> int:
    return served.on_loop(lambda: served.lane(model).num_sessions)


@pytest.mark.parametrize("sequence_id", [7, "caller-7"])
def test_state_lives_from_call_to_call(stub, served: Served, repository: Path, sequence_id: int | str) -> None:
    [x] = sequences(1, 1, 12, 12)
    before = num_sessions(served)
    parts = [x[:1], x[1:2], x[2:9], x[9:]]
    answers = []
    for number, part in enumerate(parts):
        flags = {"sequence_start": number == 0, "sequence_end": number == len(parts) - 1}
        answers.append(array(stub.ModelInfer(step("lstm", sequence_id, part, **flags))))
        assert answers[-1].shape == (1, len(part), 2)
        assert num_sessions(served) == before + (number < len(parts) - 1)
    equal(np.concatenate(answers, axis=1)[0], run_alone(repository, "lstm", x))


def test_one_request_may_be_a_whole_sequence(stub, served: Served, repository: Path) -> None:
    [x] = sequences(2, 1, 30, 30)
    response = stub.ModelInfer(step("gru", 5, x, sequence_start=True, sequence_end=True))
    equal(array(response)[0], run_alone(repository, "gru", x, version=2))
    assert num_sessions(served, "gru") == 0


def test_packed_and_padded_steps(stub, repository: Path) -> None:
    [x] = sequences(3, 1, 9, 9)
    packed = stub.ModelInfer(request("lstm", x[:4], sequence_id=11, sequence_start=True))
    rows = np.full((1, 8, 3), np.nan, dtype=np.float32)
    rows[0, :5] = x[4:]
    given = {"x": rows, "lengths": np.array([5], dtype=np.int32)}
    padded = array(stub.ModelInfer(request("lstm", given, sequence_id=11, sequence_end=True)))
    assert padded.shape == (1, 8, 2)
    assert not padded[0, 5:].any()
    equal(np.concatenate([array(packed), padded[0, :5]]), run_alone(repository, "lstm", x))


def test_numbers_and_texts_are_different_ids_and_versions_are_one(stub, repository: Path) -> None:
    xs = sequences(4, 3, 2, 2)
    keys = [(21, ""), ("21", ""), (21, "1")]
    for x, (sequence_id, version) in zip(xs, keys, strict=True):
        message = request("gru", x[None, :1], sequence_id=sequence_id, version=version, sequence_start=True)
        stub.ModelInfer(message)
    for x, (sequence_id, version) in zip(xs, [(21, "2"), ("21", ""), (21, "1")], strict=True):  # 2 is the newest
        response = stub.ModelInfer(request("gru", x[None, 1:], sequence_id=sequence_id, version=version))
        expected = run_alone(repository, "gru", x, version=int(response.model_version))
        equal(array(response)[0], expected[1:])


def test_start_begins_anew(own: Served, repository: Path) -> None:
    [first, second] = sequences(5, 2, 4, 4)
    with stub_of(own) as stub:
        stub.ModelInfer(step("lstm", 3, first, sequence_start=True))
        response = stub.ModelInfer(step("lstm", 3, second, sequence_start=True))
        equal(array(response)[0], run_alone(repository, "lstm", second))
        assert num_sessions(own) == 1


def test_start_by_the_version_replaces_what_was_begun_without(stub, repository: Path) -> None:
    [first, second] = sequences(17, 2, 3, 3)
    stub.ModelInfer(request("gru", first[None], sequence_id=22, sequence_start=True))
    stub.ModelInfer(request("gru", second[None, :2], sequence_id=22, version="2", sequence_start=True))
    response = stub.ModelInfer(request("gru", second[None, 2:], sequence_id=22))
    equal(array(response)[0], run_alone(repository, "gru", second, version=2)[2:])


def test_sequence_that_was_not_begun_is_told_how(stub) -> None:
    for model, version in (("lstm", ""), ("gru", "1")):
        error = refused(
            stub.ModelInfer, request(model, np.zeros((1, 1, 3), np.float32), version=version, sequence_id=404)
        )
        assert code_of(details(error)) == "NOT_FOUND"
        assert "sequence 404 of model" in error.details()
        assert "send its first request with sequence_start=true" in error.details()
    error = refused(stub.ModelInfer, step("nope", 404, np.zeros((1, 3), np.float32)))
    assert "no model 'nope' is served" in error.details()


def test_ended_sequence_is_over(stub) -> None:
    x = np.zeros((1, 3), dtype=np.float32)
    stub.ModelInfer(step("lstm", 9, x, sequence_start=True))
    stub.ModelInfer(step("lstm", 9, x, sequence_end=True))
    assert "is not live" in refused(stub.ModelInfer, step("lstm", 9, x)).details()


@pytest.mark.parametrize("model", ["bilstm", "bigru"])
def test_model_that_needs_the_whole_sequence(stub, repository: Path, model: str) -> None:
    [x] = sequences(6, 1, 5, 5)
    error = refused(stub.ModelInfer, step(model, 1, x, sequence_start=True))
    assert code_of(details(error)) == "FAILED_PRECONDITION"
    assert "layer 0 is bidirectional" in error.details()
    assert "in one request without sequence_id" in error.details()
    response = stub.ModelInfer(step(model, 1, x, sequence_start=True, sequence_end=True))
    equal(array(response)[0], run_alone(repository, model, x))


def test_requests_of_many_sequences_are_refused(stub) -> None:
    error = refused(
        stub.ModelInfer, request("lstm", np.zeros((2, 1, 3), np.float32), sequence_id=1, sequence_start=True)
    )
    assert code_of(details(error)) == "INVALID_ARGUMENT"
    assert "has 2 sequences: expected 1" in error.details()
    state = {"x": np.zeros((1, 1, 3), np.float32), "state.0.h": np.zeros((1, 1, 8), np.float32)}
    error = refused(stub.ModelInfer, request("lstm", state, sequence_id=1, sequence_start=True))
    assert "the server keeps the states" in error.details()


def test_refused_step_moves_nothing(own: Served, repository: Path) -> None:
    [x] = sequences(7, 1, 6, 6)
    bad = np.full((1, 3), np.nan, dtype=np.float32)
    with stub_of(own) as stub:
        answers = [stub.ModelInfer(step("lstm", 1, x[:2], sequence_start=True))]
        for flags in ({}, {"sequence_end": True}):
            error = refused(stub.ModelInfer, step("lstm", 1, bad, **flags))
            assert code_of(details(error)) == "INVALID_ARGUMENT"
            assert "x: element 0 of step 0 is nan" in error.details()
            assert num_sessions(own) == 1
        wrong = request("lstm", np.zeros((1, 1, 2), np.float32), sequence_id=1, sequence_end=True)
        assert "got shape [1, 1, 2]" in refused(stub.ModelInfer, wrong).details()
        answers.append(stub.ModelInfer(step("lstm", 1, x[2:4])))
        answers.append(stub.ModelInfer(step("lstm", 1, x[4:], sequence_end=True)))
        equal(np.concatenate([array(each)[0] for each in answers]), run_alone(repository, "lstm", x))
        assert num_sessions(own) == 0


def test_refused_start_leaves_no_sequence_and_none_is_replaced(own: Served, repository: Path) -> None:
    [x] = sequences(8, 1, 3, 3)
    with stub_of(own) as stub:
        stub.ModelInfer(step("lstm", 1, x[:2], sequence_start=True))
        wrong = request("lstm", np.zeros((1, 1, 2), np.float32), sequence_id=1, sequence_start=True)
        refused(stub.ModelInfer, wrong)
        response = stub.ModelInfer(step("lstm", 1, x[2:]))
        equal(array(response)[0], run_alone(repository, "lstm", x)[2:])
        assert num_sessions(own) == 1


def test_idle_sequence_is_ended(repository: Path) -> None:
    x = np.zeros((1, 3), dtype=np.float32)
    with serving(repository, sequence_idle_s=0.2) as served, stub_of(served) as stub:
        stub.ModelInfer(step("lstm", 1, x, sequence_start=True))
        served.wait_until(lambda: served.lane("lstm").num_sessions == 0)
        error = refused(stub.ModelInfer, step("lstm", 1, x))
        assert "was without requests for 0.2 s (sequence_idle_s)" in error.details()
        stub.ModelInfer(step("lstm", 2, x, sequence_start=True))  # the sweep began again
        served.wait_until(lambda: served.lane("lstm").num_sessions == 0)


def test_session_idle_limit_ends_sequences_too(repository: Path) -> None:
    x = np.zeros((1, 3), dtype=np.float32)
    with serving(repository, session_idle_s=0.1, sequence_idle_s=0) as served, stub_of(served) as stub:
        stub.ModelInfer(step("lstm", 1, x, sequence_start=True))
        served.wait_until(lambda: served.lane("lstm").num_sessions == 0)
        assert "is not live" in refused(stub.ModelInfer, step("lstm", 1, x)).details()


def test_limit_of_sessions_holds(repository: Path) -> None:
    x = np.zeros((1, 3), dtype=np.float32)
    with serving(repository, max_sessions=2) as served, stub_of(served) as stub:
        for sequence_id in (1, 2):
            stub.ModelInfer(step("lstm", sequence_id, x, sequence_start=True))
        error = refused(stub.ModelInfer, step("lstm", 3, x, sequence_start=True))
        assert code_of(details(error)) == "RESOURCE_EXHAUSTED"
        stub.ModelInfer(step("lstm", 1, x, sequence_end=True))
        stub.ModelInfer(step("lstm", 3, x, sequence_start=True))


def test_expired_step_moves_nothing(own: Served, repository: Path) -> None:
    [x] = sequences(9, 1, 4, 4)
    with stub_of(own) as stub:
        stub.ModelInfer(step("lstm", 1, x[:1], sequence_start=True))
        error = refused(stub.ModelInfer, step("lstm", 1, x[1:], timeout=1, sequence_end=True))
        assert code_of(details(error)) == "DEADLINE_EXCEEDED"
        assert "3 steps waited past their timeout" in error.details()
        last = stub.ModelInfer(step("lstm", 1, x[1:], timeout=60_000_000, sequence_end=True))
        equal(array(last)[0], run_alone(repository, "lstm", x)[1:])


def test_high_priority_is_taken(own: Served) -> None:
    x = np.zeros((1, 3), dtype=np.float32)
    with stub_of(own) as stub:
        assert not own.on_loop(lambda: own.lane("lstm").scheduler.has_classes)
        stub.ModelInfer(step("lstm", 1, x, sequence_start=True, priority=1))
        assert own.on_loop(lambda: own.lane("lstm").scheduler.has_classes)
        stub.ModelInfer(step("lstm", 1, x, sequence_end=True))
        assert not own.on_loop(lambda: own.lane("lstm").scheduler.has_classes)


def test_coupled_model_steps_one_by_one(stub, repository: Path) -> None:
    xs = sequences(10, 3, 6, 6)
    sent = [
        step("coupled", sequence_id, x[t : t + 1], sequence_start=t == 0, sequence_end=t == 5)
        for t in range(6)
        for sequence_id, x in enumerate(xs, 1)
    ]
    answers = [array(each.infer_response)[0, 0] for each in stub.ModelStreamInfer(iter(sent))]
    for number, x in enumerate(xs):
        equal(np.stack(answers[number::3]), run_alone(repository, "coupled", x))


# ---- streams --------------------------------------------------------------------------------------------------------


def test_interleaved_sequences_of_one_stream_equal_each_alone(stub, repository: Path) -> None:
    xs = sequences(11, 20, 3, 40)
    parts = []
    rng = np.random.default_rng(0)
    left = dict(enumerate(xs))
    while left:
        number = int(rng.choice(list(left)))
        x, count = left[number], int(rng.integers(1, 6))
        flags = {"sequence_start": len(x) == len(xs[number]), "sequence_end": len(x) <= count}
        parts.append(step("lstm", f"s{number}", x[:count], **flags))
        parts[-1].id = f"{number}"
        left[number] = x[count:]
        if not len(left[number]):
            del left[number]
    answers = list(stub.ModelStreamInfer(iter(parts)))
    assert [each.error_message for each in answers] == [""] * len(parts)
    assert [each.infer_response.id for each in answers] == [each.id for each in parts]  # in order
    for number, x in enumerate(xs):
        rows = [array(each.infer_response)[0] for each in answers if each.infer_response.id == str(number)]
        equal(np.concatenate(rows), run_alone(repository, "lstm", x))


def test_stream_tells_errors_in_order_and_goes_on(stub, repository: Path) -> None:
    [x] = sequences(12, 1, 4, 4)
    whole = request("bilstm", x[None], request_id="whole")
    sent = [step("lstm", 31, x[:2], sequence_start=True), step("lstm", 32, x), whole, step("lstm", 31, x[2:])]
    for number, message in enumerate(sent):
        message.id = f"{number}"
    answers = list(stub.ModelStreamInfer(iter(sent)))
    assert [each.infer_response.id for each in answers] == ["0", "1", "2", "3"]
    assert "sequence 32 of model 'lstm' is not live" in answers[1].error_message
    assert not answers[1].infer_response.outputs
    equal(array(answers[2].infer_response)[0], run_alone(repository, "bilstm", x))
    steps = np.concatenate([array(answers[i].infer_response)[0] for i in (0, 3)])
    equal(steps, run_alone(repository, "lstm", x))


def test_sequences_outlive_their_stream(stub, repository: Path) -> None:
    [x] = sequences(13, 1, 6, 6)
    [first] = stub.ModelStreamInfer(iter([step("lstm", 41, x[:2], sequence_start=True)]))
    second = stub.ModelInfer(step("lstm", 41, x[2:4]))
    [third] = stub.ModelStreamInfer(iter([step("lstm", 41, x[4:], sequence_end=True)]))
    rows = [array(each)[0] for each in (first.infer_response, second, third.infer_response)]
    equal(np.concatenate(rows), run_alone(repository, "lstm", x))


def test_client_that_goes_away_leaves_its_sequences(own: Served, repository: Path) -> None:
    [x] = sequences(15, 1, 4, 4)
    with stub_of(own) as stub:
        requests = Requests()
        call = stub.ModelStreamInfer(iter(requests))
        requests.put(step("lstm", 1, x[:2], sequence_start=True))
        assert not next(call).error_message
        call.cancel()
        requests.close()
        own.wait_until(lambda: not own.server.engine._links)
        equal(array(stub.ModelInfer(step("lstm", 1, x[2:])))[0], run_alone(repository, "lstm", x)[2:])


def test_client_that_does_not_read_is_read_from_no_more(repository: Path) -> None:
    with serving(repository, max_unsent_bytes=20_000) as served, stub_of(served) as stub:
        x = np.zeros((100, 3), dtype=np.float32)
        requests = Requests()
        num = 2_000
        call = stub.ModelStreamInfer(iter(requests))
        for number in range(num):
            requests.put(step("lstm", 1, x, sequence_start=number == 0))
        requests.close()
        assert sum(not each.error_message for each in call) == num


def test_message_that_is_none_ends_the_stream(served: Served) -> None:
    with grpc.insecure_channel(served.address) as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(iter([b"\xff\xff"]))
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
    assert code_of(details(caught.value)) == "INVALID_ARGUMENT"
    assert "is no ModelInferRequest" in caught.value.details()


def test_draining_server_begins_no_sequence(repository: Path) -> None:
    [x] = sequences(16, 1, 2, 2)
    with serving(repository) as served, stub_of(served) as stub:
        stub.ModelInfer(step("lstm", 1, x[:1], sequence_start=True))
        served.on_loop(lambda: setattr(served.server.engine, "is_draining", True))
        assert not stub.ServerReady(pb.ServerReadyRequest()).ready
        assert not stub.ModelReady(pb.ModelReadyRequest(name="lstm")).ready
        for message in (step("lstm", 2, x, sequence_start=True), request("lstm", x[None])):
            error = refused(stub.ModelInfer, message)
            assert code_of(details(error)) == "UNAVAILABLE"
        equal(array(stub.ModelInfer(step("lstm", 1, x[1:])))[0], run_alone(repository, "lstm", x)[1:])
