"""Frames and calls that go wrong as a whole, over a real channel: handles stay in step, memory and messages bounded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.runs import RunMaker
from tests.rpc import Received, code_of, details, frame, info_of, open_stream, predict, retry_of, run_alone, sequences
from tests.serving import Served, serving

X = sequences(51, 1, 12, 12)[0]
ENDLESS = pb.SessionOpen(session_id="endless", linger=Duration(seconds=10**6))


@pytest.fixture
def stub(served: Served) -> Iterator[object]:
    with served.stub() as stub:
        yield stub


def stream(stub: object, *requests: pb.StreamPredictRequest) -> Received:
    return Received.all(stub.StreamPredict(iter(requests), timeout=60))


def test_refused_opens_use_up_their_handles(stub: object, repository: Path) -> None:
    opens = [frame(opens=[pb.SessionOpen()]), frame(opens=[ENDLESS]), frame(opens=[pb.SessionOpen()])]
    received = stream(stub, open_stream("lstm"), *opens, frame(X, handles=[2]), frame(X, handles=[1]))
    assert [(s.handle, code_of(s.status)) for s in received.sessions] == [(0, "OK"), (1, "INVALID_ARGUMENT"), (2, "OK")]
    assert [(e.handle, code_of(e.status)) for e in received.errors] == [(1, "NOT_FOUND")]
    np.testing.assert_array_equal(received.rows(2), run_alone(repository, "lstm", X))


def test_malformed_frame_without_steps_leaves_the_first_session_alone(stub: object, repository: Path) -> None:
    bad = [frame(opens=[ENDLESS]), frame(lengths=[3]), frame(handles=[0], acked_positions=[1, 2])]
    received = stream(stub, open_stream("lstm"), frame(X[:5]), *bad, frame(X[5:]))
    assert [(e.handle, e.length, code_of(e.status)) for e in received.errors] == [(0, 0, "INVALID_ARGUMENT")] * 2
    np.testing.assert_array_equal(received.rows(0), run_alone(repository, "lstm", X))


def test_refused_session_of_a_plain_stream_says_why(repository: Path) -> None:
    with serving(repository, max_sessions=1) as served, served.stub() as stub:
        first = stub.StreamPredict(iter([open_stream("lstm", sessions=[pb.SessionOpen()])]), timeout=60)
        held = pb.SessionOpen(session_id="held", linger=Duration(seconds=60))
        list(first)
        stream(stub, open_stream("lstm", sessions=[held]))
        received = stream(stub, open_stream("lstm"), frame(X))
    assert [code_of(s.status) for s in received.sessions] == ["RESOURCE_EXHAUSTED"]
    assert retry_of(received.sessions[0].status) > 0


def test_many_errors_come_in_messages_that_any_client_can_read(stub: object) -> None:
    with stub_responses(stub, open_stream("lstm"), frame(closes=range(1, 30_001))) as responses:
        sizes, errors = [], 0
        for response in responses:
            sizes.append(response.ByteSize())
            errors += len(response.answer.errors)
    assert errors == 30_000
    assert max(sizes) < 1024 * 1024


def test_more_closes_than_a_message_may_hold(repository: Path) -> None:
    with serving(repository, max_steps_per_message=100) as served, served.stub() as stub:
        received = stream(stub, open_stream("lstm"), frame(closes=range(101)))
    assert [(code_of(e.status), e.handle) for e in received.errors] == [("RESOURCE_EXHAUSTED", 0)]


class stub_responses:  # noqa: N801  a context manager that ends the call
    def __init__(self, stub: object, *requests: pb.StreamPredictRequest) -> None:
        self._call = stub.StreamPredict(iter(requests), timeout=60)

    def __enter__(self) -> Iterator[pb.StreamPredictResponse]:
        return iter(self._call)

    def __exit__(self, *_: object) -> None:
        self._call.cancel()


def test_calls_that_wait_for_a_slot_count_as_queued(repository: Path) -> None:
    x = np.ones((400, 3), np.float32)
    with serving(repository, max_predict_sequences=1, max_queued_steps=1000, inline_run_ms=0) as served:
        with served.stub() as stub:
            tensor = pb.Tensor(data=x.tobytes())
            calls = [stub.Predict.future(pb.PredictRequest(model="lstm", inputs=[tensor])) for _ in range(12)]
            codes = [call.code() for call in calls]
        lane = served.lane("lstm")
        assert served.on_loop(lambda: (lane.num_queued_steps, lane.num_waiting_steps, lane.num_predicting)) == (0, 0, 0)
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}


def test_long_names_do_not_change_the_status(stub: object) -> None:
    for act, code in (
        (lambda: predict(stub, "m" * 20_000, [X]), grpc.StatusCode.NOT_FOUND),
        (
            lambda: stub.Predict(
                pb.PredictRequest(model="lstm", inputs=[pb.Tensor(data=X.tobytes(), shape=[1] * 5000)])
            ),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            act()
        assert caught.value.code() is code
        assert len(caught.value.details()) <= 1000


def test_states_that_are_not_finite(stub: object) -> None:
    state = pb.Tensor(name="state.0.h", data=np.full((1, 1, 8), np.nan, np.float32).tobytes())
    request = pb.PredictRequest(model="lstm", inputs=[pb.Tensor(data=X.tobytes()), state])
    with pytest.raises(grpc.RpcError) as caught:
        stub.Predict(request)
    assert info_of(details(caught.value)).reason == "BAD_VALUE"


def test_run_that_can_not_be_made_frees_what_it_held(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = RunMaker.make
    failing = [True]

    def scarce(self: RunMaker, batch: object) -> object:
        if failing and batch.steps > 1:
            failing.clear()
            raise MemoryError
        return make(self, batch)

    monkeypatch.setattr(RunMaker, "make", scarce)
    with serving(repository) as served, served.stub() as stub:
        received = stream(stub, open_stream("lstm"), frame(X))
        (error,) = received.errors
        assert (error.kind, code_of(error.status)) == (pb.STEP_ERROR_KIND_SESSION_FAILED, "INTERNAL")
        assert received.closed[0].reason == pb.CLOSE_REASON_FAILED
        assert served.on_loop(lambda: served.lane("lstm").slab.num_allocated) == 0
        again = stream(stub, open_stream("lstm"), frame(X))
        np.testing.assert_array_equal(again.rows(0), run_alone(repository, "lstm", X))
