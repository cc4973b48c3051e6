"""Settings of connections and messages, by what a client sees of them on the wire."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import time
import zlib
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from service.client import AsyncClient, Client, Unavailable
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.pb.rnnserve.v1 import rnnserve_pb2_grpc as pb_grpc
from tests.onnx_models import build
from tests.rpc import Received, Requests, code_of, details, frame, open_stream, predict, run_alone, sequences
from tests.serving import Served, serving
from tests.web.calls import browsing, decoded, opening, until_over
from tests.web.calls import frame as json_frame
from tests.wire import wire
from tests.workers import fleet_of

GET_MODEL = "/rnnserve.v1.SequenceService/GetModel"
STREAM = "/rnnserve.v1.SequenceService/StreamPredict"
LSTM = pb.GetModelRequest(model="lstm").SerializeToString()
OPEN = open_stream("lstm", sessions=[pb.SessionOpen()]).SerializeToString()


# Keepalive


def test_a_silent_client_is_pinged_for_as_long_as_it_answers_and_then_given_up(repository: Path) -> None:
    with serving(repository, keepalive_s=0.1, keepalive_timeout_s=1.0) as served, wire(served.address) as client:
        client.call(STREAM, OPEN, ends=False)
        client.read_until("data")
        lane = served.lane("lstm")
        began = time.monotonic()
        while client.pings < 5:
            client.read(1.0)
        assert time.monotonic() - began < 5
        assert not client.is_closed
        assert served.on_loop(lambda: lane.slab.num_allocated) == 1
        client.answers_pings = False
        served.wait_until(lambda: lane.slab.num_allocated == 0, 5.0)
        client.read_until("is_closed", 5.0)


def test_connections_without_calls_are_checked_unless_idle_pings_are_off(repository: Path) -> None:
    with serving(repository, keepalive_s=0.1) as served, wire(served.address) as client:
        client.read_until("pings")
    with serving(repository, keepalive_s=0.1, idle_pings=False) as served, wire(served.address) as client:
        client.read(0.4)
        client.read(0.4)
        assert client.pings == 0


@pytest.mark.parametrize(
    ("settings", "is_calling", "is_welcome"),
    [
        ({"min_ping_interval_s": 0.01}, True, True),
        ({"min_ping_interval_s": 0.01}, False, True),
        ({"min_ping_interval_s": 0.01, "idle_pings": False}, False, False),
        ({}, True, False),
    ],
)
def test_pings_of_clients(repository: Path, settings: dict[str, object], is_calling: bool, is_welcome: bool) -> None:
    with serving(repository, **settings) as served, wire(served.address) as client:
        if is_calling:
            client.call(STREAM, OPEN, ends=False)
            client.read_until("data")
        for number in range(1, 9):
            if not client.goaway:
                client.ping()
            while client.ping_acks < number and not client.goaway:
                client.read(1.0)
            time.sleep(0.03)  # the interval is what is tested
        if is_welcome:
            assert (client.ping_acks, client.goaway) == (8, None)
        else:
            assert client.goaway == (ErrorCodes.ENHANCE_YOUR_CALM, b"too_many_pings")


# The end of connections


def test_a_connection_without_calls_is_closed_and_the_next_call_makes_another(repository: Path) -> None:
    with serving(repository, max_connection_idle_s=0.2) as served:
        with wire(served.address) as client:
            client.call(GET_MODEL, LSTM)
            client.read_until("trailers")
            assert client.read_until("goaway", 3.0) > 0.1
            assert client.goaway[1] == b"connection idle"
        with grpc.insecure_channel(served.address) as channel:
            states: list[grpc.ChannelConnectivity] = []
            channel.subscribe(states.append)
            stub = pb_grpc.SequenceServiceStub(channel)
            stub.GetModel(pb.GetModelRequest(model="lstm"))
            served.wait_until(lambda: grpc.ChannelConnectivity.IDLE in states[1:], 3.0)
            assert stub.GetModel(pb.GetModelRequest(model="lstm")).model.name == "lstm"


def test_an_old_connection_is_told_in_band_and_ends_after_its_grace(repository: Path) -> None:
    (x,) = sequences(1, 1, 4, 4)
    with serving(repository, max_connection_age_s=1.0, max_connection_age_grace_s=0.5) as served, served.stub() as stub:
        stub.GetModel(pb.GetModelRequest(model="lstm"))  # the connection's age counts from here
        time.sleep(0.6)  # or the stream's own age would do as well
        requests = Requests()
        responses = stub.StreamPredict(iter(requests), timeout=10)
        requests.put(open_stream("lstm"))
        received = Received()
        began = time.monotonic()
        while not received.drains:
            received.take(next(responses))
        assert time.monotonic() - began < 0.7
        assert received.drains[0].grace.ToMilliseconds() == 500
        requests.put(frame(x))  # it is still served
        while len(received.steps[0]) < 4:
            received.take(next(responses))
        with pytest.raises(grpc.RpcError) as caught:
            next(responses)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - began < 2.0
        requests.close()
        assert stub.GetModel(pb.GetModelRequest(model="lstm")).model.name == "lstm"


def test_streams_that_are_told_of_the_age_of_their_connection_may_end_well(repository: Path) -> None:
    (x,) = sequences(1, 1, 4, 4)
    with serving(repository, max_connection_age_s=0.3, max_connection_age_grace_s=20) as served, served.stub() as stub:
        requests = Requests()
        responses = stub.StreamPredict(iter(requests), timeout=10)
        requests.put(open_stream("lstm"))
        received = Received()
        while not received.drains:
            received.take(next(responses))
        requests.put(frame(x))
        requests.close()
        received.take_all(responses)  # to a good end
        assert len(received.rows(0)) == 4


async def test_a_session_that_lingers_loses_nothing_to_the_age_of_connections(repository: Path) -> None:
    x = np.random.default_rng(8).normal(size=(250, 3)).astype(np.float32)
    expected = run_alone(repository, "lstm", x)
    ages = {"max_connection_age_s": 0.4, "max_connection_age_grace_s": 0.1}
    terms = {"linger": 30.0, "replay_window": 32}

    def paced():
        for row in x:
            time.sleep(0.01)  # a sensor
            yield row

    with serving(repository, **ages) as served:
        tally = served.lane("lstm").tally
        with Client(served.address) as client, client.stream("lstm", session_id="a", **terms) as stream:
            rows = list(stream.run(paced()))
        np.testing.assert_array_equal(rows, expected)
        async with AsyncClient(served.address) as client, client.stream("lstm", session_id="b", **terms) as stream:
            began = time.monotonic()
            rows = []
            for row in itertools.cycle(x[:1]):
                rows.append(await stream.step(row))
                if time.monotonic() - began > 1.2:
                    break
        np.testing.assert_array_equal(rows, run_alone(repository, "lstm", np.repeat(x[:1], len(rows), axis=0)))
        assert served.on_loop(lambda: tally.steps) == 250 + len(rows)  # none was applied twice
        with Client(served.address) as client, client.stream("lstm") as stream:  # without linger, but told in time
            with pytest.raises(Unavailable):
                for _ in stream.run(itertools.cycle(x)):
                    pass
            assert stream.drain_s == 0.1


def test_sessions_move_between_workers_with_the_age_of_connections(repository: Path) -> None:
    x = np.random.default_rng(9).normal(size=(1000, 3)).astype(np.float32)
    ages = ("--max-connection-age-s", "0.2", "--max-connection-age-grace-s", "0.1")
    with fleet_of(repository, *ages) as fleet, Client(fleet.address) as client:
        rows: list[np.ndarray] = []
        with client.stream("lstm", session_id="moves", linger=30.0, replay_window=32) as stream:
            while min(fleet.per_worker("rnnserve_steps_total")) == 0:  # until both have had it
                assert len(rows) < len(x)
                rows += [stream.step(row) for row in x[len(rows) : len(rows) + 5]]
        np.testing.assert_array_equal(rows, run_alone(repository, "lstm", x[: len(rows)]))
        assert sum(fleet.per_worker("rnnserve_steps_total")) == len(rows)


async def test_calls_over_websockets_have_no_age(repository: Path) -> None:
    (x,) = sequences(5, 1, 3, 3)
    ages = {"max_connection_age_s": 0.2, "max_connection_age_grace_s": 0.1}
    with serving(repository, **ages) as served:
        async with browsing(served) as session, session.ws_connect("/api/stream") as socket:
            await socket.send_json(opening("lstm"))
            await asyncio.sleep(0.5)  # past the age is what is tested
            await socket.send_json(json_frame(x, closes=True))
            messages = await until_over(socket)
    assert [kind for message in messages for kind in message] == ["opened", "answer"]
    np.testing.assert_array_equal(decoded(messages[1]["answer"]["tensors"][0]), run_alone(repository, "lstm", x))


# Limits


def test_calls_past_the_limit_of_a_connection_wait_for_room(repository: Path) -> None:
    with serving(repository, max_concurrent_streams=1) as served:
        with wire(served.address) as client:
            client.read_until("settings")
            assert client.settings[SettingCodes.MAX_CONCURRENT_STREAMS] == 1
        with served.stub() as stub:
            requests = Requests()
            responses = stub.StreamPredict(iter(requests))
            requests.put(open_stream("lstm"))
            next(responses)
            with pytest.raises(grpc.RpcError) as caught:
                stub.GetModel(pb.GetModelRequest(model="lstm"), timeout=0.3)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            waiting = stub.GetModel.future(pb.GetModelRequest(model="lstm"), timeout=10)
            requests.close()
            assert list(responses) == []
            assert waiting.result().model.name == "lstm"


def test_metadata_past_the_limit_is_refused(repository: Path) -> None:
    with serving(repository, max_metadata_bytes=8192) as served, served.stub() as stub:
        with wire(served.address) as client:
            client.read_until("settings")
            assert client.settings[SettingCodes.MAX_HEADER_LIST_SIZE] == 8192
        for size in (1000, 7000):
            stub.GetModel(pb.GetModelRequest(model="lstm"), metadata=(("x", "y" * size),))
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetModel(pb.GetModelRequest(model="lstm"), metadata=(("x", "y" * 8192),))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_answer_past_the_limit_is_refused_with_a_way_out(tmp_path: Path) -> None:
    build("gru", outputs=64).save(tmp_path, "wide")
    xs = sequences(2, 1, 9000, 9000)
    unlimited = (("grpc.max_receive_message_length", -1),)
    with (
        serving(tmp_path, max_response_bytes=2 * 1024 * 1024) as served,
        grpc.insecure_channel(served.address, options=unlimited) as channel,
    ):
        stub = pb_grpc.SequenceServiceStub(channel)
        with pytest.raises(grpc.RpcError, match=r"max_response_bytes\) is 2097152: send fewer") as caught:
            predict(stub, "wide", xs)
        assert code_of(details(caught.value)) == "RESOURCE_EXHAUSTED"
        assert predict(stub, "wide", xs, emit=pb.EMIT_LAST).outputs[0].shape == [1, 64]
        received = Received.all(stub.StreamPredict(iter([open_stream("wide"), frame(*xs)])))  # cut into messages
        np.testing.assert_array_equal(received.rows(0), run_alone(tmp_path, "wide", xs[0]))


# Compression


@pytest.mark.parametrize(
    ("settings", "headers", "encoding"),
    [
        ({"compress_responses": True}, {"grpc_accept_encoding": "identity,deflate,gzip"}, "gzip"),
        ({"compress_responses": True}, {"grpc_accept_encoding": "identity,deflate"}, "deflate"),
        ({"compress_responses": True}, {"grpc_accept_encoding": "identity"}, None),
        ({"compress_responses": True}, {}, None),
        ({}, {"grpc_accept_encoding": "identity,deflate,gzip"}, None),
        ({}, {"grpc_accept_encoding": "identity,gzip", "rnnserve_compression": "gzip"}, "gzip"),
        ({}, {"grpc_accept_encoding": "identity,deflate", "rnnserve_compression": "deflate"}, "deflate"),
    ],
)
def test_answers_are_compressed_where_the_client_accepts_and_someone_asks(
    repository: Path, settings: dict[str, object], headers: dict[str, str], encoding: str | None
) -> None:
    with serving(repository, **settings) as served, wire(served.address) as client, served.stub() as stub:
        client.call(GET_MODEL, LSTM, **headers)
        client.read_until("trailers")
        plain = stub.GetModel(pb.GetModelRequest(model="lstm"))
    assert client.headers.get("grpc-encoding", "identity") == (encoding or "identity")
    is_compressed, body = client.data[0], client.data[5:]
    assert is_compressed == (encoding is not None)
    expand = {"gzip": gzip.decompress, "deflate": zlib.decompress, None: bytes}[encoding]
    assert pb.GetModelResponse.FromString(expand(body)) == plain
    if encoding:
        assert len(body) < 0.6 * plain.ByteSize()


def test_a_compression_that_does_not_exist_is_refused(served: Served) -> None:
    with served.stub() as stub, pytest.raises(grpc.RpcError, match=r"rnnserve-compression.*'br'.*gzip") as caught:
        stub.GetModel(pb.GetModelRequest(model="lstm"), metadata=(("rnnserve-compression", "br"),))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_requests_are_taken_and_bombs_are_not(repository: Path, compression: grpc.Compression) -> None:
    (x,) = sequences(3, 1, 2000, 2000)
    limit = 64 * 1024
    with (
        serving(repository, max_message_bytes=limit) as served,
        grpc.insecure_channel(served.address, compression=compression) as channel,
    ):
        stub = pb_grpc.SequenceServiceStub(channel)
        response = predict(stub, "lstm", [x])
        y = np.frombuffer(response.outputs[0].data, np.float32).reshape(-1, 2)
        np.testing.assert_array_equal(y, run_alone(repository, "lstm", x))
        bomb = pb.PredictRequest(model="lstm", inputs=[pb.Tensor(data=bytes(3_000_000))])  # 3 KB on the wire
        with pytest.raises(grpc.RpcError, match="larger than max") as caught:
            stub.Predict(bomb)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        responses = stub.StreamPredict(
            iter([open_stream("lstm"), pb.StreamPredictRequest(frame=pb.StreamFrame(tensors=bomb.inputs))])
        )
        with pytest.raises(grpc.RpcError, match="larger than max"):
            list(responses)


# What tells of the server


def test_reflection_can_be_turned_off(repository: Path, served: Served) -> None:
    def services(address: str) -> list[str]:
        with grpc.insecure_channel(address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            [response] = stub.ServerReflectionInfo(iter([request]))
            return [each.name for each in response.list_services_response.service]

    assert "rnnserve.v1.SequenceService" in services(served.address)
    with serving(repository, reflection=False) as without, pytest.raises(grpc.RpcError) as caught:
        services(without.address)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_channelz_tells_of_connections_if_it_is_on(repository: Path, served: Served) -> None:
    with grpc.insecure_channel(served.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channelz_pb2_grpc.ChannelzStub(channel).GetServers(channelz_pb2.GetServersRequest())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    with serving(repository, channelz=True) as watched, grpc.insecure_channel(watched.address) as channel:
        for _ in range(3):
            pb_grpc.SequenceServiceStub(channel).ListModels(pb.ListModelsRequest())
        with pytest.raises(grpc.RpcError):
            pb_grpc.SequenceServiceStub(channel).GetModel(pb.GetModelRequest(model="none"))
        stub = channelz_pb2_grpc.ChannelzStub(channel)
        [server] = stub.GetServers(channelz_pb2.GetServersRequest()).server  # none of those that have it off
        assert server.data.calls_started == 5
        assert (server.data.calls_succeeded, server.data.calls_failed) == (3, 1)
        [ours] = stub.GetServerSockets(channelz_pb2.GetServerSocketsRequest(server_id=server.ref.server_id)).socket_ref
        socket = stub.GetSocket(channelz_pb2.GetSocketRequest(socket_id=ours.socket_id)).socket
        assert socket.data.streams_started == 7
        assert socket.local.tcpip_address.port == watched.server.port
