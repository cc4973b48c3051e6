"""Streams that outlive their connection: a proxy in between is cut."""

import itertools

import numpy as np
import pytest

from service.client import AsyncClient, Client, SessionEnded, SessionFailed, Unavailable
from tests.client.proxy import proxied

names = itertools.count()


@pytest.fixture
def proxy(served):
    with proxied(served.address) as running:
        yield running


@pytest.fixture(scope="module")
def long_sequence():
    return np.random.default_rng(5).normal(size=(400, 3)).astype(np.float32)


@pytest.fixture
def expected(client, long_sequence):
    return client.predict("lstm", [long_sequence])[0]


def terms(replay_window=16, **more):
    """A session that lingers, under a name of its own."""
    return {"session_id": f"resume-{next(names)}", "linger": 60, "replay_window": replay_window, **more}


def by_steps(stream, x):
    return (stream.step(row) for row in x)


def by_hand(stream, x):
    for start in range(0, len(x), 7):
        stream.send(x[start : start + 7])
    for _ in range(0, len(x), 7):
        yield from stream.receive()


@pytest.mark.parametrize(
    ("act", "emit"),
    [
        (lambda s, x: s.run(x), "all"),
        (lambda s, x: s.run(iter(x)), "all"),
        (by_steps, "all"),
        (by_hand, "all"),
        (lambda s, x: s.run(x), "last"),
        (by_steps, "last"),
    ],
    ids=["array", "iterator", "steps", "hand", "array-last", "steps-last"],
)
def test_every_output_comes_once_however_often_the_connection_breaks(proxy, long_sequence, expected, act, emit):
    with Client(proxy.address) as client, client.stream("lstm", emit=emit, **terms()) as stream:
        proxy.cut_at(900, 1700, 1900, 4000)
        rows = np.array(list(act(stream, long_sequence)))
        assert stream.position == 400
    assert proxy.num_cuts == 4
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("seed", range(6))
async def test_every_output_comes_once_with_asyncio_too(proxy, long_sequence, expected, seed):
    rng = np.random.default_rng(seed)
    proxy_cuts = sorted(rng.integers(300, 5000, size=5).tolist())
    async with AsyncClient(proxy.address) as client, client.stream("lstm", **terms(int(rng.integers(1, 40)))) as stream:
        proxy.cut_at(*proxy_cuts)
        rows = [row async for row in stream.run(long_sequence if seed % 2 else iter(long_sequence))]
    assert proxy.num_cuts >= 3
    np.testing.assert_array_equal(rows, expected)


def test_steps_are_applied_once(served, proxy, long_sequence):
    applied = served.lane("lstm").tally
    before = served.on_loop(lambda: applied.steps)
    with Client(proxy.address) as client, client.stream("lstm", **terms()) as stream:
        proxy.cut_at(1000, 2000, 3000)
        for _ in stream.run(long_sequence):
            pass
    assert served.on_loop(lambda: applied.steps) == before + 400


def test_a_break_between_steps_goes_unnoticed(proxy, long_sequence, expected):
    with Client(proxy.address) as client, client.stream("lstm", **terms()) as stream:
        rows = []
        for row in long_sequence[:5]:
            rows.append(stream.step(row))
            proxy.cut()
    assert proxy.num_cuts == 5
    np.testing.assert_array_equal(rows, expected[:5])


def test_a_buffered_sequence_survives(proxy, client, long_sequence):
    with Client(proxy.address) as cut_off, cut_off.stream("bilstm", **terms(0)) as stream:
        stream.send(long_sequence[:200])
        proxy.cut()
        stream.send(long_sequence[200:])
        with pytest.raises(Exception, match="when the sequence has ended"):
            stream.receive()
        stream.close()
        rows = [*stream.receive(), *stream.receive()]
    np.testing.assert_array_equal(rows, client.predict("bilstm", [long_sequence])[0])


def test_a_session_without_linger_is_lost(proxy, long_sequence):
    with Client(proxy.address) as client, client.stream("lstm", session_id="x") as stream:
        proxy.cut()
        with pytest.raises(Unavailable):
            stream.step(long_sequence[0])


def test_resuming_ends_when_its_time_is_over(proxy, long_sequence):
    with Client(proxy.address, resume_timeout_s=0.3) as client, client.stream("lstm", **terms()) as stream:
        stream.step(long_sequence[0])
        proxy.is_refusing = True
        proxy.cut()
        with pytest.raises(Unavailable, match=r"could not be resumed within 0\.3 s") as caught:
            stream.step(long_sequence[1])
        assert caught.value.reason == "NOT_RESUMED"
        with pytest.raises(Unavailable):
            stream.step(long_sequence[1])


async def test_resuming_ends_when_its_time_is_over_with_asyncio_too(proxy, long_sequence):
    async with AsyncClient(proxy.address, resume_timeout_s=0.3) as client, client.stream("lstm", **terms()) as stream:
        await stream.step(long_sequence[0])
        proxy.is_refusing = True
        proxy.cut()
        with pytest.raises(Unavailable, match=r"could not be resumed within 0\.3 s"):
            await stream.step(long_sequence[1])


def test_a_session_that_was_ended_meanwhile_is_gone(proxy, client, long_sequence):
    options = terms()
    with Client(proxy.address) as cut_off, cut_off.stream("lstm", **options) as stream:
        stream.step(long_sequence[0])
        proxy.is_refusing = True
        proxy.cut()
        with client.stream("lstm", session_id=options["session_id"]) as other:
            other.step(long_sequence[1])
        proxy.is_refusing = False
        with pytest.raises(SessionFailed, match="can't be resumed") as caught:
            stream.step(long_sequence[1])
        assert caught.value.code == "NOT_FOUND"
        assert not isinstance(caught.value, SessionEnded)


def test_closing_while_the_connection_is_gone_does_not_wait(proxy, long_sequence):
    with Client(proxy.address) as client:
        stream = client.stream("lstm", **terms()).open()
        stream.step(long_sequence[0])
        proxy.is_refusing = True
        proxy.cut()
        stream.close()
        assert stream.position == 1
