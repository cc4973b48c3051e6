"""Sessions that come and go beside a steady load, in every way that they can end.

churn.py TARGET MODEL goes on until it is stopped, in a process of its own, so that it makes no other load late.
"""

from __future__ import annotations

import asyncio
import sys
import time
from itertools import count

import numpy as np

from service.client import AsyncClient
from service.client.load import run
from service.tensors import Array

CYCLE_S = 0.5
NUM_GATEWAY = 32
"""Sessions of a gateway in each cycle; two thirds of them are closed, the rest go with their connection."""
SESSIONS_PER_CYCLE = NUM_GATEWAY + 3


async def churn(target: str, model: str) -> None:
    """Go on for ever, a cycle every so often: each has connections and sessions of its own, and a Predict."""
    due = time.perf_counter()
    for number in count():
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        due += CYCLE_S
        await cycle(target, model, f"reconnects-{number}")


async def cycle(target: str, model: str, name: str) -> None:
    """Let sessions come and go once; one of a name made of `name` is left to expire."""
    async with AsyncClient(target) as client:
        [x] = (await client.model(model)).inputs
        rng = np.random.default_rng(0)
        xs = [rng.standard_normal((length, *x.row_shape)).astype(np.float32) for length in (1, 7, 20, 50)]
        await _gateway(client, model, xs[1])
        await _reconnects(client, model, name, xs[1])
        await client.predict(model, xs)


async def _gateway(client: AsyncClient, model: str, x: Array) -> None:
    """Many sessions on one stream, with some steps each; some are closed, and the connection takes the rest."""
    async with client.gateway(model) as gateway:
        handles = [gateway.open() for _ in range(NUM_GATEWAY)]
        await gateway.send(dict.fromkeys(handles, x), close=handles[: 2 * NUM_GATEWAY // 3])
        answered = 0
        async for events in gateway.receive():
            answered += int(events.lengths.sum())
            if answered == NUM_GATEWAY * len(x):
                return


async def _reconnects(client: AsyncClient, model: str, name: str, x: Array) -> None:
    """A session that ends by close after a second connection took it up; one that expires; one that is broken off."""
    async with client.stream(model, session_id=name, linger=30.0, replay_window=16) as stream:
        await stream.step(x[0])
    async with client.stream(model, session_id=name, resume_only=True) as stream:
        await stream.step(x[1])
    async with client.stream(model, session_id=f"{name}-expires", linger=1.0, replay_window=16) as stream:
        await stream.step(x[0])
    stream = await client.stream(model).open()
    await stream.send(x)
    await stream.__aexit__(RuntimeError, None, None)  # as a block that raises


if __name__ == "__main__":
    run(churn(sys.argv[1], sys.argv[2]))
