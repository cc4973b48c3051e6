"""The service config: what gRPC tries again by itself, and what it must not, on servers and connections that fail."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from service.client import AsyncClient, Client, InvalidArgument, ResourceExhausted, Unavailable
from service.client._channel import RETRY_BYTES, SERVICE_CONFIG
from service.pb.inference import inference_pb2
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from tests.client.front import fault, fronted
from tests.client.proxy import proxied
from tests.generating import save, tokens
from tests.onnx_models import build
from tests.serving import serving

UNAVAILABLE, EXHAUSTED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED
PROTOS = Path(__file__).resolve().parent.parent.parent / "protos"


@pytest.fixture
def front(served):
    with fronted(served.address) as running:
        yield running


@pytest.fixture
def expected(client, sequences):
    return client.predict("lstm", sequences)


def same(ys, expected):
    for y, z in zip(ys, expected, strict=True):
        np.testing.assert_array_equal(y, z)


# The file


def test_what_is_retried_exists_and_is_idempotent():
    config = json.loads(SERVICE_CONFIG.read_text())
    assert SERVICE_CONFIG.read_text() == (PROTOS / "rnnserve/v1/service_config.json").read_text()
    services = {
        **pb.DESCRIPTOR.services_by_name,
        **inference_pb2.DESCRIPTOR.services_by_name,
    }
    known = {f"{s.full_name}/{m.name}" for s in services.values() for m in s.methods}
    retried = {f"{each['service']}/{each['method']}" for part in config["methodConfig"] for each in part["name"]}
    # Of these a second attempt could step a sequence twice, or load a model twice.
    unsafe = ("StreamPredict", "ModelInfer", "ModelStreamInfer", "RepositoryModelLoad", "RepositoryModelUnload")
    assert retried == {name for name in known if name.rpartition("/")[2] not in unsafe}


# Attempts


def test_calls_are_tried_again_by_the_blocking_client(front, expected, sequences):
    front.faults["GetModel"] = [fault(UNAVAILABLE)]
    front.faults["Predict"] = [fault(UNAVAILABLE)] * 3
    with Client(front.address) as client:
        same(client.predict("lstm", sequences), expected)
        assert front.attempts == {"GetModel": [0, 1], "Predict": [0, 1, 2, 3]}
        front.faults["Predict"] = [fault(UNAVAILABLE)] * 4
        with pytest.raises(Unavailable):
            client.predict("lstm", sequences)
        assert front.attempts["Predict"] == [0, 1, 2, 3] * 2


async def test_calls_are_tried_again_by_the_asyncio_client(front, expected, sequences):
    front.faults["Predict"] = [fault(UNAVAILABLE)] * 2
    async with AsyncClient(front.address) as client:
        same(await client.predict("lstm", sequences), expected)
    assert front.attempts["Predict"] == [0, 1, 2]


def test_a_request_of_megabytes_is_kept_for_the_next_attempt(front, client):
    x = np.random.default_rng(0).normal(size=(60_000, 3)).astype(np.float32)
    assert 256 * 1024 < x.nbytes < RETRY_BYTES  # gRPC's own limit
    front.faults["Predict"] = [fault(UNAVAILABLE)]
    with Client(front.address) as flaky:
        same(flaky.predict("lstm", [x]), client.predict("lstm", [x]))
    assert front.attempts["Predict"] == [0, 1]


def test_an_overloaded_server_says_when_to_try_again_and_others_that_it_is_in_vain(front, expected, sequences):
    with Client(front.address) as client:
        client.model("lstm")
        front.faults["Predict"] = [fault(EXHAUSTED, 300)]
        began = time.monotonic()
        same(client.predict("lstm", sequences), expected)
        assert time.monotonic() - began >= 0.3
        assert front.attempts["Predict"] == [0, 1]
        front.faults["Predict"] = [fault(EXHAUSTED, -1)]
        with pytest.raises(ResourceExhausted):
            client.predict("lstm", sequences)
        assert front.attempts["Predict"] == [0, 1, 0]


def test_what_can_never_fit_is_sent_once(repository):
    with serving(repository, max_queued_steps=500) as small, fronted(small.address) as front:
        with Client(front.address) as flaky, pytest.raises(ResourceExhausted, match="max_queued_steps"):
            flaky.predict("lstm", [np.zeros((600, 3), np.float32)])
        assert front.attempts["Predict"] == [0]


def test_generation_is_tried_again_until_it_has_begun(tmp_path):
    save(tokens(begin=True), tmp_path, "begun")

    def ids(client):
        return [made.ids.tolist() for made in client.generate("begun", seed=7, temperature=1.0)]

    with serving(tmp_path) as running, fronted(running.address) as front, Client(running.address) as direct:
        expected = ids(direct)
        with Client(front.address) as flaky:
            front.faults["Generate"] = [fault(UNAVAILABLE)]
            assert ids(flaky) == expected
            assert front.attempts["Generate"] == [0, 1]
            front.breaks_after = [2]  # what it begins with, and an output
            with pytest.raises(Unavailable):
                ids(flaky)
            assert front.attempts["Generate"] == [0, 1, 0]


# Streams


@pytest.mark.parametrize("kind", ["sync", "aio"])
async def test_a_stream_is_resumed_and_never_tried_again(front, client, kind):
    x = np.random.default_rng(2).normal(size=(60, 3)).astype(np.float32)
    front.breaks_after = [3, 4]
    terms = {"session_id": f"retried-{kind}", "linger": 30.0, "replay_window": 64}
    if kind == "sync":
        with Client(front.address) as flaky, flaky.stream("lstm", **terms) as stream:
            rows = [stream.step(row) for row in x]
            stream.close()
    else:
        async with AsyncClient(front.address) as flaky, flaky.stream("lstm", **terms) as stream:
            rows = [await stream.step(row) for row in x]
            await stream.close()
    np.testing.assert_array_equal(rows, client.predict("lstm", [x])[0])
    assert front.attempts["StreamPredict"] == [0, 0, 0]


def test_a_stream_that_is_refused_is_not_opened_again(front):
    front.faults["StreamPredict"] = [fault(UNAVAILABLE, 10)]
    with Client(front.address) as flaky, pytest.raises(Unavailable), flaky.stream("lstm"):
        pass
    assert front.attempts["StreamPredict"] == [0]


# Connections


def test_a_call_survives_a_connection_that_breaks(served, expected, sequences):
    with proxied(served.address) as proxy, Client(proxy.address) as client:
        client.model("lstm")
        for _ in range(5):
            proxy.cut_at(1)  # before a byte of the answer
            same(client.predict("lstm", sequences), expected)
    assert proxy.num_cuts == 5


def test_round_robin_leaves_out_a_server_that_is_not_serving(repository, sequences):
    """gRPC watches each server's health, as the service config says, and needs no failed call to find out."""
    with serving(repository) as one, serving(repository) as two:
        target = f"ipv4:{one.address},{two.address}"

        def counts():
            return [each.on_loop(lambda e=each: e.server.engine.lane("lstm").tally.sequences) for each in (one, two)]

        with Client(target, options=[("grpc.lb_policy_name", "round_robin")]) as client:
            client.wait_ready(10)
            while min(counts()) < 3:  # both are used
                client.predict("lstm", sequences)
            stop = one.server._health.set("rnnserve.v1.SequenceService", health_pb2.HealthCheckResponse.NOT_SERVING)
            asyncio.run_coroutine_threadsafe(stop, one.loop).result(timeout=10)
            give_up_at = time.monotonic() + 10
            in_a_row = 0
            while in_a_row < 20:
                before = counts()[0]
                client.predict("lstm", sequences)
                in_a_row = in_a_row + 1 if counts()[0] == before else 0
                assert time.monotonic() < give_up_at


# Compression


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
async def test_requests_and_answers_are_compressed_if_the_client_is_told_to(tmp_path, compression):
    build("lstm").save(tmp_path, "lstm")
    x = np.zeros((4000, 3), np.float32)
    with serving(tmp_path, max_message_bytes=200_000) as served, proxied(served.address) as proxy:
        sizes = []
        for chosen in (None, compression):
            proxy.cut_at()
            async with AsyncClient(proxy.address, compression=chosen) as client:
                y = (await client.predict("lstm", [x]))[0]
                with Client(proxy.address, compression=chosen) as blocking:
                    np.testing.assert_array_equal(blocking.predict("lstm", [x])[0], y)
            sizes.append(proxy._num_bytes)
    assert sizes[1] < 0.5 * sizes[0]
    with pytest.raises(InvalidArgument, match="gzip or deflate"):
        Client("localhost", compression="br")
