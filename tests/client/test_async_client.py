"""AsyncClient over a real channel to the real server. What the machines decide is tested with Client."""

import asyncio
import math
import socket

import numpy as np
import pytest

from service.client import (
    AsyncClient,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SessionEnded,
    StepRejected,
    Unavailable,
)
from tests.serving import serving


async def collect(rows, into=None):
    found = [] if into is None else into
    async for row in rows:
        found.append(row)
    return np.array(found)


async def trickle(x):
    for row in x:
        await asyncio.sleep(0)
        yield row


async def test_models_health_and_errors(async_client):
    await async_client.wait_ready(timeout=5)
    assert await async_client.health("lstm")
    assert not await async_client.health("nope")
    assert "lstm" in [model.name for model in await async_client.models()]
    assert (await async_client.model("gru")).version == 2
    with pytest.raises(NotFound, match="no model 'nope'") as caught:
        await async_client.model("nope")
    assert caught.value.reason == "MODEL_NOT_FOUND"
    with pytest.raises(InvalidArgument, match=r"x\[0\]: expected shape \[time, 3\]"):
        await async_client.predict("lstm", [np.zeros((2, 4))])


async def test_predict_answers_as_the_blocking_client_does(async_client, client, sequences):
    expected = client.predict("lstm", sequences, return_state=True)
    found = await asyncio.gather(*(async_client.predict("lstm", sequences, return_state=True) for _ in range(3)))
    for prediction in found:
        for y, z in zip(prediction, expected, strict=True):
            np.testing.assert_array_equal(y, z)
        np.testing.assert_array_equal(prediction.states["state.0.c"], expected.states["state.0.c"])


@pytest.mark.parametrize("form", [np.asarray, list, iter, trickle])
async def test_run_gives_every_output_in_order(async_client, client, sequences, form):
    x = sequences[2]
    expected = client.predict("lstm", [x])[0]
    async with async_client.stream("lstm") as stream:
        np.testing.assert_array_equal(await collect(stream.run(form(x[:40]))), expected[:40])
        np.testing.assert_array_equal(await collect(stream.run(form(x[40:]))), expected[40:])
        assert stream.position == 70


async def test_run_answers_a_step_before_the_next_is_there(async_client, sequences):
    answered = asyncio.Semaphore(0)

    async def live():
        for row in sequences[0]:
            yield row
            async with asyncio.timeout(20):
                await answered.acquire()

    count = 0
    async with async_client.stream("lstm") as stream:
        async for _ in stream.run(live()):
            count += 1
            answered.release()
    assert count == 5


async def test_steps_chunks_and_emit_last(async_client, client, sequences):
    x = sequences[2]
    expected = client.predict("lstm", [x])[0]
    async with async_client.stream("lstm") as stream:
        np.testing.assert_array_equal(await stream.step(x[0]), expected[0])
        await stream.send(x[1:10])
        await stream.send(x[10:20])
        np.testing.assert_array_equal(await stream.receive(), expected[1:10])
        np.testing.assert_array_equal((await stream.receive_outputs())["y"], expected[10:20])
        with pytest.raises(FailedPrecondition, match="no answer is due"):
            await stream.receive()
    async with async_client.stream("lstm", emit="last") as stream:
        np.testing.assert_array_equal(await collect(stream.run(x)), expected)


async def test_many_streams_of_one_client(async_client, client, sequences):
    async def work(x):
        async with async_client.stream("lstm") as stream:
            return await collect(stream.run(trickle(x)))

    expected = client.predict("lstm", sequences)
    found = await asyncio.gather(*(work(sequences[i % 3]) for i in range(12)))
    for i, rows in enumerate(found):
        np.testing.assert_array_equal(rows, expected[i % 3])


async def test_more_steps_than_a_session_may_have_unanswered_wait(repository, sequences):
    x = sequences[2]
    with serving(repository, max_inflight_steps=8, max_chunk_steps=3) as narrow:
        async with AsyncClient(narrow.address) as client:
            expected = (await client.predict("lstm", [x]))[0]
            for form in (np.asarray, trickle):
                async with client.stream("lstm") as stream:
                    np.testing.assert_array_equal(await collect(stream.run(form(x))), expected)
            async with client.stream("lstm") as stream:
                await asyncio.gather(stream.send(x[:40]), stream.send(x[40:]))
                parts = [await stream.receive(), await stream.receive()]
                np.testing.assert_array_equal(np.concatenate(parts), expected)


async def test_a_cancelled_step_leaves_the_session_as_it_is(async_client, client, sequences):
    x = sequences[0]
    expected = client.predict("lstm", [x])[0]
    async with async_client.stream("lstm") as stream:
        task = asyncio.create_task(stream.step(x[0]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert stream.position == 1
        with pytest.raises(FailedPrecondition, match="1 sends have answers to receive first"):
            await stream.step(x[1])
        np.testing.assert_array_equal(await stream.receive(), expected[:1])
        np.testing.assert_array_equal(await stream.step(x[1]), expected[1])


async def test_leaving_a_run_drops_what_was_under_way(async_client, client, sequences):
    x = sequences[2]
    expected = client.predict("lstm", [x])[0]
    for form in (np.asarray, trickle):
        async with async_client.stream("lstm") as stream:
            async for y in stream.run(form(x[:20])):
                np.testing.assert_array_equal(y, expected[0])
                break
            assert len(await collect(stream.run(iter([])))) == 0
            at = stream.position
            np.testing.assert_array_equal(await stream.step(x[at]), expected[at])


async def test_a_rejected_step_leaves_the_session_where_it_was(async_client, client, sequences):
    x = sequences[2]
    expected = client.predict("lstm", [x])[0]
    broken = x.copy()
    broken[33] = math.nan
    for form in (np.asarray, trickle):
        rows = []
        async with async_client.stream("lstm") as stream:
            with pytest.raises(StepRejected) as caught:
                await collect(stream.run(form(broken)), rows)
            assert caught.value.expected_position == stream.position == len(rows)
            np.testing.assert_array_equal(rows, expected[: len(rows)])
            np.testing.assert_array_equal(await collect(stream.run(form(x[len(rows) :]))), expected[len(rows) :])


async def test_what_the_steps_raise_comes_after_the_outputs(async_client, client, sequences):
    async def faulty():
        for row in sequences[0]:
            yield row
        raise ZeroDivisionError("in the sensor")

    rows = []
    async with async_client.stream("lstm") as stream:
        with pytest.raises(ZeroDivisionError, match="sensor"):
            await collect(stream.run(faulty()), rows)
    np.testing.assert_array_equal(rows, client.predict("lstm", [sequences[0]])[0])


@pytest.mark.parametrize("form", [np.asarray, iter, trickle])
async def test_a_buffered_model_answers_at_the_end(async_client, client, sequences, form):
    x = sequences[2]
    async with async_client.stream("bilstm") as stream:
        np.testing.assert_array_equal(await collect(stream.run(form(x))), client.predict("bilstm", [x])[0])
    async with async_client.stream("bigru") as stream:
        np.testing.assert_array_equal(await collect(stream.run(form(x))), [client.predict("bigru", [x])[0]])


async def test_an_exception_in_the_block_frees_the_session(served, async_client, sequences):
    lane = served.lane("lstm")
    before = lane.num_sessions
    with pytest.raises(KeyError):
        async with async_client.stream("lstm") as stream:
            {}[len(await stream.step(sequences[0][0]))]
    await asyncio.to_thread(served.wait_until, lambda: lane.num_sessions == before)


async def test_a_session_that_lingers_is_taken_up_by_name(async_client, client, sequences):
    x = sequences[2]
    expected = client.predict("lstm", [x])[0]
    async with async_client.stream("lstm", session_id="async-name", linger=30) as stream:
        np.testing.assert_array_equal(await collect(stream.run(x[:10])), expected[:10])
    async with async_client.stream("lstm", session_id="async-name", resume_only=True, linger=30) as stream:
        assert (stream.resumed, stream.position) == (True, 10)
        async with async_client.stream("lstm", session_id="async-name") as other:
            np.testing.assert_array_equal(await collect(other.run(x[10:])), expected[10:])
        with pytest.raises(SessionEnded):
            await stream.step(x[0])


async def test_a_gateway_interleaves_many_sessions(async_client, client, sequences):
    expected = client.predict("lstm", sequences)
    async with async_client.gateway("lstm") as gateway:
        handles = [gateway.open() for _ in sequences]
        rows = {handle: [] for handle in handles}
        closed = []

        async def read():
            async for events in gateway.receive():
                assert not events.errors
                closed.extend(events.closed)
                for handle, y in events:
                    rows[handle].extend(y)

        reader = asyncio.create_task(read())
        for t in range(70):
            live = [i for i, x in enumerate(sequences) if t < len(x)]
            await gateway.send_columns([handles[i] for i in live], np.stack([sequences[i][t] for i in live]))
        await gateway.end()
        await reader
    for handle, y in zip(handles, expected, strict=True):
        np.testing.assert_array_equal(rows[handle], y)
    assert sorted(c.handle for c in closed) == handles


async def test_a_task_that_waits_for_events_may_be_cancelled(async_client, client, sequences):
    x = sequences[0]
    async with async_client.gateway("lstm") as gateway:
        handle = gateway.open()
        await gateway.flush()
        events = gateway.receive()
        opened = await anext(events)
        assert opened.opened[0].handle == handle
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await anext(gateway.receive())
        await gateway.send({handle: x})
        answer = await anext(gateway.receive())
        np.testing.assert_array_equal(answer.output(0), client.predict("lstm", [x])[0])


async def test_a_server_that_does_not_answer_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with AsyncClient(f"127.0.0.1:{silent.getsockname()[1]}") as client:
            with pytest.raises(DeadlineExceeded):
                await client.models(timeout=0.2)
            with pytest.raises(Unavailable, match=r"not ready within 0\.2 s"):
                await client.wait_ready(timeout=0.2)


async def test_no_server_is_unavailable():
    async with AsyncClient("localhost:1") as client:
        with pytest.raises(Unavailable, match="connect"):
            await client.health()
        with pytest.raises(Unavailable):
            async with client.gateway("lstm"):
                pass
