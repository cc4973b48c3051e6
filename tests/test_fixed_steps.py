"""Models whose graphs have a fixed number of steps, over a real channel: padded to it, and refused past it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from tests.onnx_models import build
from tests.rpc import Received, array, code_of, frame, info_of, open_stream, predict, run_alone, sequences
from tests.serving import Served, serving

STEPS = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of fixed steps, and beside it the same without."""
    root = tmp_path_factory.mktemp("fixed")
    build("lstm", fixed_steps=STEPS).save(root, "fixed")
    build("lstm").save(root, "free")
    build("gru", fixed_steps=1).save(root, "single")
    return root


@pytest.fixture(scope="module")
def fixed(models: Path) -> Iterator[Served]:
    with serving(models) as served:
        yield served


def test_ragged_sequences_are_padded_and_answered_as_they_are(fixed: Served, models: Path) -> None:
    xs = sequences(3, 9, 1, STEPS)
    with fixed.stub() as stub:
        answer = predict(stub, "fixed", xs)
    rows = array(answer.outputs[0])
    assert list(answer.outputs[0].lengths) == [len(x) for x in xs]
    for x, y in zip(xs, np.split(rows, np.cumsum([len(x) for x in xs])[:-1]), strict=True):
        np.testing.assert_array_equal(y, run_alone(models, "free", x))


def test_a_single_step_is_padded_too(fixed: Served, models: Path) -> None:
    x = sequences(4, 1, 1, 1)[0]
    with fixed.stub() as stub:
        np.testing.assert_array_equal(array(predict(stub, "fixed", [x]).outputs[0]), run_alone(models, "free", x))
        assert array(predict(stub, "single", [x]).outputs[0]).shape == (1, 2)


def test_a_longer_sequence_is_told_the_most_steps(fixed: Served) -> None:
    xs = sequences(5, 1, STEPS, STEPS) + sequences(5, 1, STEPS + 1, STEPS + 1)
    with fixed.stub() as stub, pytest.raises(grpc.RpcError) as caught:
        predict(stub, "fixed", xs)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"a sequence of {STEPS + 1} steps" in caught.value.details()
    assert f"at most {STEPS}" in caught.value.details()


def test_a_stream_is_answered_at_its_end_without_the_steps_that_were_refused(fixed: Served, models: Path) -> None:
    x = sequences(6, 1, STEPS, STEPS)[0]
    requests = [open_stream("fixed"), frame(x[:4]), frame(x[:3]), frame(x[4:], positions=[4]), frame(closes=[0])]
    with fixed.stub() as stub:
        received = Received.all(stub.StreamPredict(iter(requests)))
    [error] = received.errors
    assert (error.kind, code_of(error.status)) == (pb.STEP_ERROR_KIND_STEP_REJECTED, "INVALID_ARGUMENT")
    assert info_of(error.status).reason == "TOO_LONG"
    assert f"a sequence of 7 steps, and this model is unrolled for at most {STEPS}" in error.status.message
    np.testing.assert_array_equal(received.rows(0), run_alone(models, "free", x))


def test_the_probe_asks_for_no_more_steps_than_there_are(fixed: Served) -> None:
    for name in ("fixed", "single"):
        assert fixed.lane(name).exactness.verdict == "exact"
    assert "it is unrolled: a run takes 6 steps" in fixed.lane("fixed").step_mode_reason
