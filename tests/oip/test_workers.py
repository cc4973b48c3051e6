"""Sequences over connections of different workers: they go where their requests come in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from service.pb.inference import inference_pb2 as pb
from service.pb.inference import inference_pb2_grpc as pb_grpc
from tests.lanes import equal
from tests.oip.calls import array, refused, step
from tests.onnx_models import build
from tests.rpc import Requests, code_of, details, run_alone, sequences
from tests.workers import Fleet, fleet_of, wait_until

Stubs = list[pb_grpc.GRPCInferenceServiceStub]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    build("lstm").save(root, "lstm")
    return root


@pytest.fixture(scope="module")
def fleet(root: Path) -> Iterator[Fleet]:
    with fleet_of(root) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def stubs(fleet: Fleet) -> Iterator[Stubs]:
    """Of a connection to each worker."""
    channels = [fleet.connect_to(index) for index in range(2)]
    yield [pb_grpc.GRPCInferenceServiceStub(channel) for channel in channels]
    for channel in channels:
        channel.close()


def infer(stub: pb_grpc.GRPCInferenceServiceStub, message: pb.ModelInferRequest) -> np.ndarray:
    return array(stub.ModelInfer(message))[0]


def no_sequence_lives(fleet: Fleet) -> bool:
    return fleet.per_worker("rnnserve_sessions") == [0, 0]


def test_sequence_goes_from_worker_to_worker(fleet: Fleet, stubs: Stubs, root: Path) -> None:
    [x] = sequences(1, 1, 12, 12)
    rows = []
    for t in range(12):
        flags = {"sequence_start": t == 0, "sequence_end": t == 11}
        rows.append(infer(stubs[t % 3 % 2], step("lstm", "moving", x[t : t + 1], **flags)))
        assert sum(fleet.per_worker("rnnserve_sessions")) == (t < 11)
    equal(np.concatenate(rows), run_alone(root, "lstm", x))


def test_start_replaces_what_lives_elsewhere(fleet: Fleet, stubs: Stubs, root: Path) -> None:
    first, second = sequences(2, 2, 6, 6)
    infer(stubs[0], step("lstm", 5, first, sequence_start=True))
    rows = [infer(stubs[1], step("lstm", 5, second[:2], sequence_start=True))]
    rows.append(infer(stubs[0], step("lstm", 5, second[2:4])))
    rows.append(infer(stubs[1], step("lstm", 5, second[4:], sequence_end=True)))
    equal(np.concatenate(rows), run_alone(root, "lstm", second))
    assert no_sequence_lives(fleet)


def test_start_replaces_what_lives_here(fleet: Fleet, stubs: Stubs, root: Path) -> None:
    first, second = sequences(3, 2, 60, 60)
    sent = [
        step("lstm", 6, first, sequence_start=True),
        step("lstm", 6, second[:7], sequence_start=True),
        *(step("lstm", 6, second[t : t + 1]) for t in range(7, 59)),
        step("lstm", 6, second[59:], sequence_end=True),
    ]
    answers = list(stubs[0].ModelStreamInfer(iter(sent)))
    assert [each.error_message for each in answers] == [""] * len(sent)
    rows = [array(each.infer_response)[0] for each in answers]
    equal(rows[0], run_alone(root, "lstm", first))
    equal(np.concatenate(rows[1:]), run_alone(root, "lstm", second))
    wait_until(lambda: no_sequence_lives(fleet))


def test_requests_that_wait_for_their_sequence_keep_their_order(fleet: Fleet, stubs: Stubs, root: Path) -> None:
    xs = sequences(4, 5, 50, 50)
    for number, x in enumerate(xs, 1):
        infer(stubs[0], step("lstm", number, x[:1], sequence_start=True))
    sent = [
        step("lstm", number, x[t : t + 1], sequence_end=t == 49) for t in range(1, 50) for number, x in enumerate(xs, 1)
    ]
    answers = [array(each.infer_response)[0, 0] for each in stubs[1].ModelStreamInfer(iter(sent))]
    for number, x in enumerate(xs):
        equal(np.stack(answers[number::5]), run_alone(root, "lstm", x)[1:])
    wait_until(lambda: no_sequence_lives(fleet))


def test_repeats_behind_a_new_start_are_for_the_new_one(fleet: Fleet, stubs: Stubs, root: Path) -> None:
    first, second = sequences(5, 2, 20, 20)
    requests = Requests()
    answers = stubs[0].ModelStreamInfer(iter(requests))
    for t in range(5):  # one by one, so that what they look like is learned
        requests.put(step("lstm", 8, first[t : t + 1], sequence_start=t == 0, sequence_end=False))
        assert not next(answers).error_message
    for t in range(20):
        requests.put(step("lstm", 8, second[t : t + 1], sequence_start=t == 0, sequence_end=t == 19))
    requests.close()
    equal(np.stack([array(each.infer_response)[0, 0] for each in answers]), run_alone(root, "lstm", second))
    wait_until(lambda: no_sequence_lives(fleet))


def test_sequence_that_lives_nowhere(fleet: Fleet, stubs: Stubs) -> None:
    error = refused(stubs[0].ModelInfer, step("lstm", 404, np.zeros((1, 3), np.float32)))
    assert code_of(details(error)) == "NOT_FOUND"
    assert "send its first request with sequence_start=true" in error.details()
