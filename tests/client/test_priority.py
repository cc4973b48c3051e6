"""Priorities reach the server's queue, whichever way a caller gives them."""

import numpy as np
import pytest
from click.testing import CliRunner

from service.client.cli import main
from service.policies import Priority

X = np.zeros((2, 3), np.float32)
WORDS = {"high": Priority.HIGH, "normal": Priority.NORMAL, "low": Priority.LOW}


@pytest.fixture
def opened(served, monkeypatch):
    """Class of every sequence that was begun, in their order."""
    lane = served.lane("lstm")
    begin, priorities = lane.sessions.open, []

    def notes(slot, link, handle, terms, now):
        priorities.append(terms.priority)
        return begin(slot, link, handle, terms, now)

    monkeypatch.setattr(lane.sessions, "open", notes)
    return priorities


@pytest.mark.parametrize(("word", "priority"), WORDS.items())
def test_of_threads(client, opened, word, priority):
    client.predict("lstm", [X, X], priority=word)
    with client.stream("lstm", priority=word) as stream:
        list(stream.run(X))
    with client.gateway("lstm") as gateway:
        gateway.send({gateway.open(priority=word): X})
    assert opened == [priority] * 4


@pytest.mark.parametrize(("word", "priority"), WORDS.items())
async def test_of_asyncio(async_client, opened, word, priority):
    await async_client.predict("lstm", [X, X], priority=word)
    async with async_client.stream("lstm", priority=word) as stream:
        _ = [y async for y in stream.run(X)]
    async with async_client.gateway("lstm") as gateway:
        await gateway.send({gateway.open(priority=word): X})
    assert opened == [priority] * 4


@pytest.mark.parametrize("command", ["predict", "stream"])
def test_of_the_command(served, opened, command, tmp_path):
    np.save(tmp_path / "x.npy", X)
    arguments = [command, "lstm", str(tmp_path / "x.npy"), "--server", served.address, "--priority", "low"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert opened == [Priority.LOW]


def test_ends_with_the_session(client, served, opened):
    with client.stream("lstm", priority="low") as stream:
        list(stream.run(X))
    with client.stream("lstm") as stream:
        list(stream.run(X))
    client.predict("lstm", [X], priority="high")
    client.predict("lstm", [X])
    assert opened == [Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.NORMAL]
    lane = served.lane("lstm")
    served.wait_until(lambda: lane.num_sessions == 0)
    assert not lane.scheduler._line._ranks
