"""Inputs that a sequence is given once, of models that are stepped, over a real channel."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import onnxruntime as ort
import pytest

from service.client import AsyncClient, Client
from service.client.errors import InvalidArgument
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from tests.generating import contextual, save
from tests.rpc import Received, array, open_stream, sequences
from tests.serving import serving


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("contextual")
    save(contextual(), root, "contextual")
    return root


@pytest.fixture(scope="module")
def served(repository):
    with serving(repository) as running:
        yield running


def oracle(repository, x, season):
    path = repository / "contextual" / "1" / "model.onnx"
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {"x": x[None], "season": season[None], "lengths": np.array([len(x)], np.int32)}
    return session.run(["y"], {**feeds, "state.0.h": np.zeros((1, 1, 8), np.float32)})[0][0]


def test_each_sequence_is_predicted_with_its_own(served, repository):
    xs = sequences(0, 30, 1, 40)
    seasons = np.random.default_rng(1).standard_normal((30, 3)).astype(np.float32)
    inputs = [
        pb.Tensor(name="x", data=np.concatenate(xs).tobytes(), lengths=[len(x) for x in xs]),
        pb.Tensor(name="season", data=seasons.tobytes()),
    ]
    with served.stub() as stub:
        answer = stub.Predict(pb.PredictRequest(model="contextual", inputs=inputs))
        with pytest.raises(grpc.RpcError, match="input season is missing: one row a sequence"):
            stub.Predict(pb.PredictRequest(model="contextual", inputs=inputs[:1]))
    rows = np.split(array(answer.outputs[0]), np.cumsum([len(x) for x in xs])[:-1])
    for x, season, y in zip(xs, seasons, rows, strict=True):
        np.testing.assert_array_equal(y, oracle(repository, x, season))


def test_live_ones_are_given_it_with_the_frame_that_opens_them(served, repository):
    xs = sequences(2, 3, 4, 4)
    seasons = np.random.default_rng(3).standard_normal((3, 3)).astype(np.float32)
    first = pb.StreamFrame(
        opens=[pb.SessionOpen()] * 3,
        handles=range(3),
        lengths=[2] * 3,
        tensors=[
            pb.Tensor(name="x", data=b"".join(x[:2].tobytes() for x in xs)),
            pb.Tensor(name="season", data=seasons.tobytes()),
        ],
    )
    second = pb.StreamFrame(
        handles=range(3), lengths=[2] * 3, tensors=[pb.Tensor(name="x", data=b"".join(x[2:].tobytes() for x in xs))]
    )
    requests = [open_stream("contextual"), *(pb.StreamPredictRequest(frame=each) for each in (first, second))]
    with served.stub() as stub:
        received = Received.all(stub.StreamPredict(iter(requests)))
        bare = Received.all(stub.StreamPredict(iter([open_stream("contextual", sessions=[pb.SessionOpen()])])))
    for handle, (x, season) in enumerate(zip(xs, seasons, strict=True)):
        rows = [received.steps[handle][n] for n in range(4)]
        np.testing.assert_array_equal(rows, oracle(repository, x, season))
    assert "open it in a frame that carries them" in bare.sessions[0].status.message


def test_clients_give_it_when_they_open(served, repository):
    xs = sequences(7, 3, 6, 6)
    seasons = np.random.default_rng(8).standard_normal((3, 3)).astype(np.float32)
    wanted = [oracle(repository, x, season) for x, season in zip(xs, seasons, strict=True)]
    with Client(served.address) as client:
        with client.stream("contextual", contexts={"season": seasons[0]}) as stream:
            np.testing.assert_array_equal(list(stream.run(xs[0])), wanted[0])
        with client.gateway("contextual") as gateway:
            handles = [gateway.open(contexts={"season": season}) for season in seasons]
            gateway.send(dict(zip(handles, xs, strict=True)))
            gateway.end()
            rows = dict.fromkeys(handles, np.empty((0, 2), np.float32))
            for events in gateway.receive():
                for handle, y in events:
                    rows[handle] = np.concatenate([rows[handle], y])
        for handle, y in zip(handles, wanted, strict=True):
            np.testing.assert_array_equal(rows[handle], y)
        with (
            pytest.raises(InvalidArgument, match=r"no state or context 'sun': it has state\.0\.h, season"),
            client.stream("contextual", contexts={"sun": seasons[0]}),
        ):
            pass
        with (
            pytest.raises(InvalidArgument, match=r"season: expected shape \[3\], got \[2\]"),
            client.stream("contextual", contexts={"season": seasons[0, :2]}),
        ):
            pass

    async def streamed():
        async with (
            AsyncClient(served.address) as client,
            client.stream("contextual", contexts={"season": seasons[1]}) as stream,
        ):
            return [y async for y in stream.run(xs[1])]

    np.testing.assert_array_equal(asyncio.run(streamed()), wanted[1])
