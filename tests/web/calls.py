"""What the page does, in a few words: GET of JSON, and calls over WebSockets."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import numpy as np

from tests.serving import Served

DTYPES = {"DATA_TYPE_FLOAT32": "<f4"}


@asynccontextmanager
async def browsing(served: Served) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of the server's HTTP port."""
    async with aiohttp.ClientSession(f"http://127.0.0.1:{served.server.http_port}") as session:
        yield session


def encoded(rows: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(rows).tobytes()).decode()


def decoded(tensor: dict[str, object]) -> np.ndarray:
    shape = [int(each) for each in tensor["shape"]]
    return np.frombuffer(base64.b64decode(tensor["data"]), DTYPES[tensor["dtype"]]).reshape(shape)


def opening(model: str, version: int = 0) -> dict[str, object]:
    return {"open": {"model": model, "version": str(version), "sessions": [{}]}}


def frame(rows: np.ndarray, *, closes: bool = False, name: str = "x") -> dict[str, object]:
    steps = {"handles": [0], "lengths": [len(rows)], "tensors": [{"name": name, "data": encoded(rows)}]}
    return {"frame": {**steps, **({"closes": [0]} if closes else {})}}


async def until_over(socket: aiohttp.ClientWebSocketResponse) -> list[dict[str, object]]:
    """Every message until a session or the call has ended."""
    messages = []
    async for message in socket:
        messages.append(json.loads(message.data))
        if "status" in messages[-1] or messages[-1].get("answer", {}).get("closed"):
            break
    return messages


async def fault(socket: aiohttp.ClientWebSocketResponse) -> dict[str, object]:
    """The status that ends a call."""
    [message] = await until_over(socket)
    return message["status"]
