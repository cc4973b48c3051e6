"""Bad input over a real channel: a clear error that says what to do, the right code, and nobody else is harmed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from tests.rpc import (
    Received,
    Requests,
    array,
    code_of,
    details,
    field_of,
    frame,
    info_of,
    open_stream,
    predict,
    retry_of,
    run_alone,
    sequences,
)
from tests.serving import Served, serving

REJECTED = pb.STEP_ERROR_KIND_STEP_REJECTED
OVER = pb.STEP_ERROR_KIND_SESSION_FAILED
X = sequences(21, 1, 12, 12)[0]


@pytest.fixture
def stub(served: Served) -> Iterator[object]:
    with served.stub() as stub:
        yield stub


def refused(act: object, code: grpc.StatusCode, *words: str) -> grpc.RpcError:
    """Check that a call is refused with a code and with words that help."""
    with pytest.raises(grpc.RpcError) as caught:
        act()
    error = caught.value
    assert error.code() is code, error.details()
    for word in words:
        assert word in error.details()
    assert code_of(details(error)) == code.name
    assert info_of(details(error)).domain == "rnnserve"
    return error


def stream(stub: object, *requests: pb.StreamPredictRequest) -> Received:
    return Received.all(stub.StreamPredict(iter(requests), timeout=30))


class TestPredict:
    def test_unknown_model_names_those_there_are(self, stub: object) -> None:
        error = refused(lambda: predict(stub, "lstn", [X]), grpc.StatusCode.NOT_FOUND, "'lstn'", "lstm", "gru")
        assert info_of(details(error)).reason == "MODEL_NOT_FOUND"

    def test_unknown_version_names_those_there_are(self, stub: object) -> None:
        refused(lambda: predict(stub, "gru", [X], version=7), grpc.StatusCode.NOT_FOUND, "version 7", "1, 2")
        refused(lambda: stub.GetModel(pb.GetModelRequest(model="gru", version=7)), grpc.StatusCode.NOT_FOUND, "1, 2")

    def test_wrong_feature_count(self, stub: object) -> None:
        tensor = pb.Tensor(data=X.tobytes(), shape=[9, 4])
        request = pb.PredictRequest(model="lstm", inputs=[tensor])
        error = refused(lambda: stub.Predict(request), grpc.StatusCode.INVALID_ARGUMENT, "[3]", "[9, 4]")
        assert field_of(details(error)) == "inputs[0].shape"

    @pytest.mark.parametrize("dtype", [pb.DATA_TYPE_FLOAT64, pb.DATA_TYPE_INT64, 77])
    def test_wrong_dtype(self, stub: object, dtype: int) -> None:
        request = pb.PredictRequest(model="lstm", inputs=[pb.Tensor(data=X.tobytes(), dtype=dtype)])
        error = refused(lambda: stub.Predict(request), grpc.StatusCode.INVALID_ARGUMENT, "x is float32")
        assert field_of(details(error)) == "inputs[0].dtype"

    @pytest.mark.parametrize(
        "shape", [[13, 3], [11, 3], [], [-12, 3], [2**40, 3], [2**62, 3], [12], [12, 3, 1], [1, 12, 3]]
    )
    def test_bytes_that_do_not_fit_the_shape(self, stub: object, shape: list[int]) -> None:
        data = X.tobytes() if shape else X.tobytes()[:-1]
        request = pb.PredictRequest(model="lstm", inputs=[pb.Tensor(data=data, shape=shape)])
        refused(lambda: stub.Predict(request), grpc.StatusCode.INVALID_ARGUMENT)

    @pytest.mark.parametrize("lengths", [[5, 8], [12, 0], [0, 12], [11], [2**32 - 1, 13]])
    def test_lengths_that_do_not_fit_the_rows(self, stub: object, lengths: list[int]) -> None:
        request = pb.PredictRequest(model="lstm", inputs=[pb.Tensor(data=X.tobytes(), lengths=lengths)])
        error = refused(lambda: stub.Predict(request), grpc.StatusCode.INVALID_ARGUMENT)
        assert field_of(details(error)) == "lengths"

    def test_no_sequences(self, stub: object) -> None:
        for inputs in ([], [pb.Tensor()]):
            request = pb.PredictRequest(model="lstm", inputs=inputs)
            refused(lambda request=request: stub.Predict(request), grpc.StatusCode.INVALID_ARGUMENT)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_values_that_are_not_finite(self, stub: object, value: float) -> None:
        bad = X.copy()
        bad[7, 1] = value
        words = ("sequence 1", "element 1 of step 2", str(value), "--non-finite pass")
        refused(lambda: predict(stub, "lstm", [X[:5], bad[5:]]), grpc.StatusCode.INVALID_ARGUMENT, *words)

    def test_nan_passes_where_the_operator_allows_it(self, repository: Path) -> None:
        bad = X.copy()
        bad[7, 1] = np.nan
        with serving(repository, non_finite="pass") as served, served.stub() as stub:
            y = array(predict(stub, "lstm", [X, bad]).outputs[0])
        np.testing.assert_array_equal(y[:12], run_alone(repository, "lstm", X))
        np.testing.assert_array_equal(y[12:], run_alone(repository, "lstm", bad))
        assert (y[:12] != y[12:]).any(axis=1).tolist() == [False] * 7 + [True] * 5

    @pytest.mark.parametrize("token", [-1, 11, 2**40])
    def test_token_outside_the_vocabulary(self, stub: object, token: int) -> None:
        tokens = np.array([1, 2, token], dtype=np.int64)
        refused(lambda: predict(stub, "tokens", [tokens]), grpc.StatusCode.INVALID_ARGUMENT, "step 2", "0..10")

    def test_unknown_and_repeated_names(self, stub: object) -> None:
        tensor = pb.Tensor(name="x", data=X.tobytes())
        for inputs, outputs, field in (
            ([pb.Tensor(name="z", data=X.tobytes())], [], "inputs[0].name"),
            ([tensor, tensor], [], "inputs[1].name"),
            ([tensor], ["q"], "outputs"),
            ([tensor], ["y", "y"], "outputs"),
        ):
            request = pb.PredictRequest(model="lstm", inputs=inputs, outputs=outputs)
            error = refused(lambda request=request: stub.Predict(request), grpc.StatusCode.INVALID_ARGUMENT)
            assert field_of(details(error)) == field

    def test_unknown_priority_names_those_there_are(self, stub: object) -> None:
        error = refused(lambda: predict(stub, "lstm", [X], priority=4), grpc.StatusCode.INVALID_ARGUMENT, "low (3)")
        assert field_of(details(error)) == "priority"

    def test_states_for_another_number_of_sequences(self, stub: object) -> None:
        states = pb.Tensor(name="state.0.h", data=np.zeros((2, 1, 8), np.float32).tobytes())
        request = pb.PredictRequest(model="lstm", inputs=[pb.Tensor(data=X.tobytes()), states])
        refused(lambda: stub.Predict(request), grpc.StatusCode.INVALID_ARGUMENT, "state.0.h", "2 rows for 1")

    def test_limits_say_which_and_what(self, repository: Path) -> None:
        with serving(repository, max_steps_per_message=10, max_message_bytes=4096) as served, served.stub() as stub:
            refused(lambda: predict(stub, "lstm", [X]), grpc.StatusCode.RESOURCE_EXHAUSTED, "max_steps_per_message")
            with pytest.raises(grpc.RpcError) as caught:
                predict(stub, "lstm", [np.zeros((1000, 3), np.float32)])
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    def test_overload_says_when_to_retry(self, repository: Path) -> None:
        with serving(repository, max_queued_steps=10) as served, served.stub() as stub:
            words = ("max_queued_steps", "send fewer at once")
            error = refused(lambda: predict(stub, "lstm", [X]), grpc.StatusCode.RESOURCE_EXHAUSTED, *words)
            assert info_of(details(error)).reason == "LIMIT"  # to wait would not help
            received = stream(stub, open_stream("bilstm"), frame(X[:6]), frame(X[6:]))
            (error,) = received.errors
            assert (error.position, info_of(error.status).reason) == (6, "OVERLOADED")
            assert retry_of(error.status) > 0
            np.testing.assert_array_equal(received.rows(0), run_alone(repository, "bilstm", X[:6]))


class TestStreamAsAWhole:
    def test_empty_stream(self, stub: object) -> None:
        refused(lambda: stream(stub), grpc.StatusCode.INVALID_ARGUMENT, "first message", "open")

    def test_frame_before_open(self, stub: object) -> None:
        refused(lambda: stream(stub, frame(X)), grpc.StatusCode.INVALID_ARGUMENT, "first message")

    def test_second_open(self, stub: object) -> None:
        act = lambda: stream(stub, open_stream("lstm"), open_stream("lstm"))  # noqa: E731
        refused(act, grpc.StatusCode.INVALID_ARGUMENT, "opened once")

    def test_unknown_model(self, stub: object) -> None:
        refused(lambda: stream(stub, open_stream("lstn")), grpc.StatusCode.NOT_FOUND, "'lstn'", "lstm")

    def test_stepping_on_a_bidirectional_model_gets_the_reason(self, stub: object) -> None:
        act = lambda: stream(stub, open_stream("bilstm", step_mode=pb.STEP_MODE_STEPPING))  # noqa: E731
        refused(act, grpc.StatusCode.FAILED_PRECONDITION, "layer 0 is bidirectional", "depends on the steps", "Predict")

    def test_open_without_steps_is_fine(self, stub: object) -> None:
        assert stream(stub, open_stream("lstm")).opened.model == "lstm"


class TestFrame:
    """What is wrong with steps is told in-band, and the session goes on."""

    def goes_on(self, stub: object, bad: pb.StreamPredictRequest, repository: Path) -> pb.StepError:
        """Send steps 0..4, a bad frame for 5.., and the right steps: the error changed nothing."""
        again = frame(X[5:], positions=[5])
        received = stream(stub, open_stream("lstm"), frame(X[:5]), bad, again)
        np.testing.assert_array_equal(received.rows(0), run_alone(repository, "lstm", X))
        assert received.num_answers == len(X)
        (error,) = received.errors
        assert (error.handle, error.position, error.kind, error.expected_position) == (0, 5, REJECTED, 5)
        return error

    def test_wrong_feature_count(self, stub: object, repository: Path) -> None:
        bad = pb.StreamFrame(tensors=[pb.Tensor(data=bytes(16), shape=[1, 4])])
        error = self.goes_on(stub, pb.StreamPredictRequest(frame=bad), repository)
        assert (code_of(error.status), field_of(error.status)) == ("INVALID_ARGUMENT", "tensors[0].shape")

    def test_bytes_that_are_no_whole_row(self, stub: object, repository: Path) -> None:
        bad = pb.StreamFrame(tensors=[pb.Tensor(data=bytes(13))])
        error = self.goes_on(stub, pb.StreamPredictRequest(frame=bad), repository)
        assert (code_of(error.status), field_of(error.status)) == ("INVALID_ARGUMENT", "tensors[0].data")

    def test_wrong_dtype(self, stub: object, repository: Path) -> None:
        bad = pb.StreamFrame(tensors=[pb.Tensor(data=bytes(24), dtype=pb.DATA_TYPE_FLOAT64)])
        error = self.goes_on(stub, pb.StreamPredictRequest(frame=bad), repository)
        assert (code_of(error.status), field_of(error.status)) == ("INVALID_ARGUMENT", "tensors[0].dtype")

    @pytest.mark.parametrize(
        "fields",
        [
            {"lengths": [0]},
            {"lengths": [3]},
            {"positions": [5, 6]},
            {"acked_positions": [1, 2]},
            {"handles": [0, 0]},
            {"positions": [2**63]},
        ],
    )
    def test_columns_that_do_not_fit(self, stub: object, repository: Path, fields: dict[str, list[int]]) -> None:
        bad = pb.StreamFrame(tensors=[pb.Tensor(data=bytes(24))], **fields)
        error = self.goes_on(stub, pb.StreamPredictRequest(frame=bad), repository)
        assert code_of(error.status) == "INVALID_ARGUMENT"
        assert field_of(error.status) in fields

    def test_nan_is_rejected_with_its_place(self, stub: object, repository: Path) -> None:
        bad = X[5:].copy()
        bad[3, 2] = np.nan
        error = self.goes_on(stub, frame(bad), repository)
        assert code_of(error.status) == "INVALID_ARGUMENT"
        assert "element 2 of step 3 is nan" in error.status.message

    def test_neighbours_in_the_frame_go_on(self, stub: object, repository: Path) -> None:
        bad = X.copy()
        bad[0, 0] = np.inf
        opens = [pb.SessionOpen()] * 3
        received = stream(stub, open_stream("lstm"), frame(X, bad, X[:7], handles=[0, 1, 2], opens=opens))
        assert [(e.handle, e.position, e.length) for e in received.errors] == [(1, 0, 12)]
        np.testing.assert_array_equal(received.rows(0), run_alone(repository, "lstm", X))
        np.testing.assert_array_equal(received.rows(2), run_alone(repository, "lstm", X[:7]))
        assert 1 not in received.steps

    def test_steps_behind_a_rejected_one_are_aborted(self, stub: object, repository: Path) -> None:
        bad = X[5:6].copy()
        bad[0, 0] = np.nan
        again = frame(X[5:], positions=[5])
        received = stream(stub, open_stream("lstm"), frame(X[:5]), frame(bad), frame(X[6:7]), frame(X[7:8]), again)
        found = [(e.position, code_of(e.status), e.expected_position) for e in received.errors]
        assert found == [(5, "INVALID_ARGUMENT", 5), (6, "ABORTED", 5), (7, "ABORTED", 5)]
        np.testing.assert_array_equal(received.rows(0), run_alone(repository, "lstm", X))

    def test_position_that_skips_ahead_gets_the_expected_one(self, stub: object, repository: Path) -> None:
        ahead = frame(X[8:], positions=[8])
        received = stream(stub, open_stream("lstm"), frame(X[:5]), ahead, frame(X[5:], positions=[5]))
        (error,) = received.errors
        assert (code_of(error.status), info_of(error.status).reason) == ("FAILED_PRECONDITION", "POSITION_GAP")
        assert (error.position, error.expected_position, error.kind) == (8, 5, REJECTED)
        assert info_of(error.status).metadata["expected_position"] == "5"
        assert "expected 5" in error.status.message
        np.testing.assert_array_equal(received.rows(0), run_alone(repository, "lstm", X))

    def test_resent_step_is_applied_once_and_answered_again(self, stub: object, repository: Path) -> None:
        opens = [pb.SessionOpen(replay_window=16)]
        call_steps = [
            open_stream("lstm", sessions=opens),
            frame(X[:6], positions=[0]),
            frame(X[2:6], positions=[2]),  # maybe still queued: then its answer is on its way
            frame(X[4:], positions=[4]),  # overlaps and goes on
        ]
        received = stream(stub, *call_steps)
        assert not received.errors
        np.testing.assert_array_equal(received.rows(0), run_alone(repository, "lstm", X))
        assert received.closed[0].position == len(X)

    def test_resend_after_the_answer_is_answered_from_the_kept_one(self, served: Served, repository: Path) -> None:
        with served.stub() as stub:
            requests = Requests()
            responses = stub.StreamPredict(iter(requests), timeout=30)
            requests.put(open_stream("lstm", sessions=[pb.SessionOpen(replay_window=4)]))
            requests.put(frame(X[:6], positions=[0]))
            received = Received()
            while sum(map(len, received.steps.values())) < 6:
                received.take(next(responses))
            tally = served.lane("lstm").tally
            steps = tally.steps
            for positions, number in ((3, 9), (5, 10)):
                requests.put(frame(X[positions:6], positions=[positions]))
                while received.num_answers < number:
                    received.take(next(responses))
            requests.put(frame(X[1:6], positions=[1]))
            requests.put(frame(X[:1], positions=[2], acked_positions=[5]))
            requests.put(frame(X[4:5], positions=[4]))
            requests.put(frame(X[6:], positions=[6]))
            requests.close()
            for response in responses:
                received.take(response)
            assert tally.steps - steps == 6
        assert received.num_answers == 10 + 6
        assert [(e.position, info_of(e.status).reason) for e in received.errors] == [
            (1, "ANSWERS_NOT_KEPT"),
            (2, "ANSWERS_NOT_KEPT"),
            (4, "ANSWERS_NOT_KEPT"),
        ]
        np.testing.assert_array_equal(received.rows(0), run_alone(repository, "lstm", X))

    def test_resend_without_a_window_says_how_to_ask_for_one(self, served: Served) -> None:
        with served.stub() as stub:
            requests = Requests()
            responses = stub.StreamPredict(iter(requests), timeout=30)
            requests.put(open_stream("lstm"))
            requests.put(frame(X[:6]))
            received = Received()
            while not received.steps:
                received.take(next(responses))
            requests.put(frame(X[:2], positions=[0]))
            requests.close()
            for response in responses:
                received.take(response)
        (error,) = received.errors
        assert (code_of(error.status), error.expected_position) == ("FAILED_PRECONDITION", 6)
        assert "replay_window" in error.status.message

    def test_steps_for_a_closed_or_unknown_session(self, stub: object, repository: Path) -> None:
        opens = [pb.SessionOpen()] * 2
        requests = [
            open_stream("lstm", sessions=opens),
            frame(X[:5], handles=[0], closes=[0]),
            frame(X[5:], X, X, handles=[0, 1, 9]),
            frame(closes=[0]),
        ]
        received = stream(stub, *requests)
        found = [(e.handle, code_of(e.status), e.kind) for e in received.errors]
        assert found == [(0, "NOT_FOUND", OVER), (9, "NOT_FOUND", OVER), (0, "NOT_FOUND", OVER)]
        assert "open a session" in received.errors[0].status.message
        assert received.closed[0].position == 5
        np.testing.assert_array_equal(received.rows(1), run_alone(repository, "lstm", X))

    def test_more_unanswered_steps_than_allowed(self, repository: Path) -> None:
        with serving(repository, max_inflight_steps=8) as served, served.stub() as stub:
            received = stream(stub, open_stream("lstm"), frame(X), frame(X[:8], positions=[0]))
            assert (code_of(received.errors[0].status), received.errors[0].kind) == ("RESOURCE_EXHAUSTED", REJECTED)
            assert "max_inflight_steps" in received.errors[0].status.message
            assert len(received.steps[0]) == 8
            buffered = stream(stub, open_stream("bilstm"), frame(X[:6]), frame(X[6:]))
            assert [(e.position, code_of(e.status)) for e in buffered.errors] == [(6, "RESOURCE_EXHAUSTED")]
            np.testing.assert_array_equal(buffered.rows(0), run_alone(repository, "bilstm", X[:6]))

    def test_timeout_that_has_passed_rejects_before_the_run(self, stub: object, repository: Path) -> None:
        requests = Requests()
        responses, received = stub.StreamPredict(iter(requests), timeout=30), Received()
        for request in (open_stream("lstm"), frame(X[:5]), frame(X[5:], timeout=Duration())):
            requests.put(request)
        while not received.errors:  # sent before, the same steps would be taken for those that are queued
            received.take(next(responses))
        requests.put(frame(X[5:], positions=[5]))
        requests.close()
        for response in responses:
            received.take(response)
        assert (received.errors[0].position, code_of(received.errors[0].status)) == (5, "DEADLINE_EXCEEDED")
        np.testing.assert_array_equal(received.rows(0), run_alone(repository, "lstm", X))


class TestOpen:
    @pytest.mark.parametrize(
        "session",
        [
            pb.SessionOpen(session_id="x" * 257),
            pb.SessionOpen(session_id="a", replay_window=10**6),
            pb.SessionOpen(session_id="a", linger=Duration(seconds=10**6)),
            pb.SessionOpen(session_id="a", linger=Duration(seconds=-1)),
            pb.SessionOpen(linger=Duration(seconds=1)),
            pb.SessionOpen(priority=4),
        ],
    )
    def test_terms_that_can_not_be_had(self, stub: object, session: pb.SessionOpen) -> None:
        act = lambda: stream(stub, open_stream("lstm", sessions=[session]))  # noqa: E731
        refused(act, grpc.StatusCode.INVALID_ARGUMENT)

    def test_resume_only_of_a_session_that_is_not_live(self, stub: object, repository: Path) -> None:
        opens = [pb.SessionOpen(session_id="gone", resume_only=True), pb.SessionOpen(session_id="new")]
        received = stream(stub, open_stream("lstm"), frame(X, handles=[1], opens=opens))
        assert [(s.handle, code_of(s.status)) for s in received.sessions] == [(0, "NOT_FOUND"), (1, "OK")]
        np.testing.assert_array_equal(received.rows(1), run_alone(repository, "lstm", X))

    def test_limit_of_sessions(self, repository: Path) -> None:
        with serving(repository, max_sessions=2) as served, served.stub() as stub:
            opens = [pb.SessionOpen()] * 3
            received = stream(stub, open_stream("lstm"), frame(X, X, X, handles=[0, 1, 2], opens=opens))
            assert [code_of(s.status) for s in received.sessions] == ["OK", "OK", "RESOURCE_EXHAUSTED"]
            assert "max_sessions" in received.sessions[2].status.message
            assert retry_of(received.sessions[2].status) > 0
            assert [(e.handle, code_of(e.status)) for e in received.errors] == [(2, "NOT_FOUND")]
            np.testing.assert_array_equal(received.rows(1), run_alone(repository, "lstm", X))
