"""Calls over WebSockets: the native API's answers bit for bit, its limits, its errors, and its end."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import numpy as np
import pytest

from service.client import Client
from tests.generating import save, tokens
from tests.rpc import run_alone, sequences
from tests.serving import serving
from tests.web.calls import browsing, decoded, encoded, fault, frame, opening, until_over


async def stream(session, model, parts):
    """Send parts of one sequence; returns (rows that were answered, messages)."""
    async with session.ws_connect("/api/stream") as socket:
        await socket.send_json(opening(model))
        for number, part in enumerate(parts):
            await socket.send_json(frame(part, closes=number == len(parts) - 1))
        messages = await until_over(socket)
    answers = [message["answer"] for message in messages if "answer" in message]
    rows = [decoded(tensor) for answer in answers for tensor in answer.get("tensors", ())]
    return np.concatenate(rows), messages


@pytest.mark.parametrize("model", ["lstm", "gru", "rnn"])
async def test_steps_are_answered_as_onnxruntime_does(served, repository, model):
    [x] = sequences(1, 1, 20, 20)
    alone = run_alone(repository, model, x, 2 if model == "gru" else 1)
    async with browsing(served) as session:
        rows, messages = await stream(session, model, [*x[:7].reshape(7, 1, 3), x[7:]])
    if served.lane(model).exactness.verdict == "exact":
        np.testing.assert_array_equal(rows, alone)
    else:
        np.testing.assert_allclose(rows, alone, rtol=1e-5, atol=1e-6)
    positions = [int(each) for m in messages if "answer" in m for each in m["answer"].get("positions", ())]
    assert positions == sorted(positions)
    assert len(positions) > 1, "answers come as they are ready"
    assert messages[0]["opened"]["model"] == model
    assert messages[-1]["answer"]["closed"][0]["position"] == "20"


async def test_a_model_that_needs_the_whole_sequence_answers_at_its_end(served, repository):
    [x] = sequences(2, 1, 9, 9)
    async with browsing(served) as session:
        rows, _ = await stream(session, "bilstm", [x[:4], x[4:]])
    np.testing.assert_array_equal(rows, run_alone(repository, "bilstm", x))


async def test_the_page_gets_what_a_grpc_client_gets(served):
    [x] = sequences(3, 1, 12, 12)
    with Client(served.address) as client, client.stream("lstm") as live:
        expected = np.array(list(live.run(x)))
    async with browsing(served) as session:
        rows, _ = await stream(session, "lstm", [x])
    np.testing.assert_array_equal(rows, expected)


async def test_a_session_is_counted_and_ends_with_its_socket(served):
    lane = served.lane("lstm")
    before = served.on_loop(lambda: (lane.tally.sequences, lane.tally.steps))
    async with browsing(served) as session:
        async with session.ws_connect("/api/stream") as socket:
            await socket.send_json(opening("lstm"))
            await socket.send_json(frame(np.zeros((3, 3), np.float32)))
            await socket.receive()
            assert "handles" in (await socket.receive_json())["answer"]
            assert served.on_loop(lambda: lane.num_sessions) == 1
            stats = await (await session.get("/api/stats")).json()
            [numbers] = [each for each in stats["models"] if each["name"] == "lstm"]
            assert numbers["sessions"] == 1
            assert numbers["steps"] == before[1] + 3
        await asyncio.to_thread(served.wait_until, lambda: lane.num_sessions == 0)
    after = served.on_loop(lambda: (lane.tally.sequences, lane.tally.steps))
    assert after == (before[0] + 1, before[1] + 3)


async def test_a_connection_that_breaks_frees_its_session(served):
    lane = served.lane("lstm")
    async with browsing(served) as session:
        socket = await session.ws_connect("/api/stream")
        await socket.send_json(opening("lstm"))
        await socket.receive()
        assert served.on_loop(lambda: lane.num_sessions) == 1
        socket._response.connection.transport.abort()  # no closing message
        await asyncio.to_thread(served.wait_until, lambda: lane.num_sessions == 0)


async def test_a_bad_value_is_told_in_band_as_to_every_client(served):
    rows = np.zeros((2, 3), np.float32)
    rows[1, 2] = np.nan
    async with browsing(served) as session, session.ws_connect("/api/stream") as socket:
        await socket.send_json(opening("lstm"))
        await socket.receive()
        await socket.send_json(frame(rows))
        [error] = (await socket.receive_json())["answer"]["errors"]
    assert error["kind"] == "STEP_ERROR_KIND_STEP_REJECTED"
    assert "x: element 2 of step 1 is nan; send finite values" in error["status"]["message"]


@pytest.mark.parametrize(
    ("first", "code", "text"),
    [
        (opening("nothing"), 5, "no model 'nothing' is served"),
        ({"frame": {}}, 3, "the first message of a stream must be `open`"),
        ({"opne": {}}, 3, 'no field named "opne"'),
        ({"open": {"model": 7}}, 3, "is no StreamPredictRequest as JSON"),
        ([1], 3, "is no StreamPredictRequest as JSON"),
        ("text", 3, "is no StreamPredictRequest as JSON"),
    ],
)
async def test_a_first_message_that_opens_nothing_ends_the_call(served, first, code, text):
    async with browsing(served) as session, session.ws_connect("/api/stream") as socket:
        await socket.send_json(first)
        status = await fault(socket)
        assert status["code"] == code
        assert text in status["message"]
        assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE


@pytest.mark.parametrize("content", ["{", "", "NaN", "[" * 100_000])
async def test_what_is_no_json_ends_the_call(served, content):
    async with browsing(served) as session, session.ws_connect("/api/stream") as socket:
        await socket.send_str(content)
        status = await fault(socket)
    assert status["code"] == 3
    assert "is no StreamPredictRequest as JSON" in status["message"]


async def test_a_binary_message_ends_the_call(served):
    async with browsing(served) as session, session.ws_connect("/api/stream") as socket:
        await socket.send_bytes(b"\x0a\x00")
        assert "expected a text message" in (await fault(socket))["message"]


async def test_a_wrong_number_of_columns_is_told_in_band(served):
    async with browsing(served) as session, session.ws_connect("/api/stream") as socket:
        await socket.send_json(opening("lstm"))
        await socket.receive()
        await socket.send_json(frame(np.zeros((1, 4), np.float32)))
        [error] = (await socket.receive_json())["answer"]["errors"]
    assert "16 bytes are not a whole number of rows, where a row has 12 bytes" in error["status"]["message"]


async def test_a_message_past_the_limit_closes_the_socket(repository):
    with serving(repository, max_message_bytes=4_000) as served:
        async with browsing(served) as session, session.ws_connect("/api/stream") as socket:
            await socket.send_json(opening("lstm"))
            await socket.receive()
            await socket.send_json(frame(np.zeros((400, 3), np.float32)))
            message = await socket.receive()
            assert message.type is aiohttp.WSMsgType.CLOSE
            assert message.data == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
            await asyncio.to_thread(served.wait_until, lambda: served.lane("lstm").num_sessions == 0)


async def test_a_session_past_the_limit_is_refused(repository):
    with serving(repository, max_sessions=1) as served:
        async with browsing(served) as session, session.ws_connect("/api/stream") as one:
            await one.send_json(opening("lstm"))
            await one.receive()
            async with session.ws_connect("/api/stream") as other:
                await other.send_json(opening("lstm"))
                [refused] = (await other.receive_json())["opened"]["sessions"]
    assert refused["status"]["code"] == 8
    assert "max_sessions" in refused["status"]["message"]


async def test_a_client_that_does_not_read_is_read_from_no_more(repository):
    """What is queued for it stays within the limits, though it goes on sending."""
    with serving(repository, max_inflight_steps=64, max_unsent_bytes=4_096) as served:
        lane = served.lane("lstm")
        async with browsing(served) as session, session.ws_connect("/api/stream") as socket:
            await socket.send_json(opening("lstm"))
            message = json.dumps(frame(np.zeros((16, 3), np.float32)))

            async def send():
                while True:
                    await socket.send_str(message)

            sending = asyncio.create_task(send())
            taken = -1
            async with asyncio.timeout(30):
                while taken != (taken := served.on_loop(lambda: lane.tally.steps)) or not taken:
                    assert served.on_loop(lambda: lane.num_queued_steps) <= 64
                    await asyncio.sleep(0.3)
            assert not sending.done(), "it was made to wait"
            sending.cancel()


async def test_a_server_that_stops_says_so(repository):
    with serving(repository) as served:
        async with browsing(served) as session, session.ws_connect("/api/stream") as socket:
            await socket.send_json(opening("lstm"))
            await socket.receive()
            stopping = asyncio.run_coroutine_threadsafe(served.server.stop(), served.loop)
            assert "drain" in await socket.receive_json()
            message = await socket.receive()
            assert message.type is aiohttp.WSMsgType.CLOSE
            assert (message.data, message.extra) == (aiohttp.WSCloseCode.GOING_AWAY, "the server is stopping")
            await asyncio.wait_for(asyncio.wrap_future(stopping), 5)


async def test_what_is_live_may_end_while_the_server_drains(repository):
    [x] = sequences(5, 1, 8, 8)
    with serving(repository, drain_s=20) as served:
        async with browsing(served) as session, session.ws_connect("/api/stream") as socket:
            await socket.send_json(opening("lstm"))
            await socket.send_json(frame(x[:4]))
            await socket.receive()
            stopping = asyncio.run_coroutine_threadsafe(served.server.stop(), served.loop)
            await socket.send_json(frame(x[4:], closes=True))
            messages = await until_over(socket)
            async with session.ws_connect("/api/stream") as other:
                await other.send_json(opening("lstm"))
                assert (await fault(other))["code"] == 14
            await socket.close()
            await asyncio.wait_for(asyncio.wrap_future(stopping), 10)
    rows = [decoded(tensor) for message in messages for tensor in message.get("answer", {}).get("tensors", ())]
    np.testing.assert_array_equal(np.concatenate(rows), run_alone(repository, "lstm", x))
    assert sum("drain" in message for message in messages) == 1


# Generate


@pytest.fixture(scope="module")
def generating(tmp_path_factory):
    root = tmp_path_factory.mktemp("generating")
    save(tokens(7), root, "names")
    with serving(root) as running:
        yield running


def asked(*prompts, **fields):
    ids = np.concatenate([np.array(each, np.int64) for each in prompts])
    tensor = {"name": "token", "data": encoded(ids), "lengths": [len(each) for each in prompts]}
    return {"model": "names", "inputs": [tensor], **fields}


async def test_what_is_made_is_what_a_grpc_client_gets(generating):
    terms = {"temperature": 0.9, "top_k": 5}
    with Client(generating.address) as client:
        expected = client.generate("names", [[2], [3, 4]], seed=3, **terms)
    ids = {0: [], 1: []}
    async with browsing(generating) as session, session.ws_connect("/api/generate") as socket:
        await socket.send_json(asked([2], [3, 4], seeds=["3", "4"], **terms))
        messages = await until_over(socket)
    assert messages[0]["started"]["num_sequences"] == 2
    assert messages[-1] == {"status": {"code": 0}}
    for output in [message["output"] for message in messages[1:-1]]:
        at = 0
        for sequence, length in zip(output.get("sequences", ()), output.get("lengths", ()), strict=True):
            ids[sequence] += [int(each) for each in output["ids"][at : at + length]]
            at += length
    assert [ids[0], ids[1]] == [made.ids.tolist() for made in expected]
    assert ids[0]


async def test_generate_refuses_as_it_does_over_grpc(generating):
    async with browsing(generating) as session:
        async with session.ws_connect("/api/generate") as socket:
            await socket.send_json(asked([1], top_k=3))
            assert "top_k and top_p are for drawing" in (await fault(socket))["message"]
        async with session.ws_connect("/api/generate") as socket:
            await socket.send_json({"model": "nothing"})
            assert (await fault(socket))["code"] == 5


async def test_closing_the_socket_ends_what_is_made(generating):
    lane = generating.lane("names")
    async with browsing(generating) as session:
        async with session.ws_connect("/api/generate") as socket:
            await socket.send_json(asked(*[[1]] * 500, temperature=1.0))
            await socket.receive()
        await asyncio.to_thread(generating.wait_until, lambda: not generating.server.engine.is_used(lane))
