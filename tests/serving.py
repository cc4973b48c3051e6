"""A real server in a thread, for tests that talk to it over a real channel."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import uvloop

from service.config import load_settings
from service.lane import Lane
from service.pb.rnnserve.v1 import rnnserve_pb2_grpc as pb_grpc
from service.repository import load_repository
from service.rpc.server import Server

T = TypeVar("T")
FREE = {"port": 0, "http_port": 0, "drain_s": 0.1, "version_policy": "all"}
"""Settings that servers of tests have, unless they are given others."""


@dataclass
class Served:
    """A running server."""

    server: Server
    loop: asyncio.AbstractEventLoop

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def on_loop(self, act: Callable[[], T]) -> T:
        """Call a function on the server's loop, and wait for what it returns."""

        async def call() -> T:
            return act()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(timeout=10)

    def run(self, doing: Coroutine[Any, Any, T]) -> T:
        """Await something on the server's loop."""
        return asyncio.run_coroutine_threadsafe(doing, self.loop).result(timeout=30)

    def lane(self, model: str) -> Lane:
        return self.server.engine.lane(model)

    def wait_until(self, holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Wait until something holds on the server's loop, asked again and again."""

        end = time.monotonic() + timeout_s
        while not self.on_loop(holds):
            assert time.monotonic() < end, "it did not come to hold in time"

    @contextmanager
    def stub(self) -> Iterator[pb_grpc.SequenceServiceStub]:
        with grpc.insecure_channel(self.address) as channel:
            yield pb_grpc.SequenceServiceStub(channel)


async def until(holds: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait until something holds on the running loop, asked again and again."""
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.01)


@asynccontextmanager
async def serving_here(repository: Path, **settings: object) -> AsyncIterator[Server]:
    """Serve on the running loop, for clients on asyncio: gRPC is at its best with one such loop in a process."""
    values = load_settings({"repository": repository, **FREE, **settings})
    server = Server(values, load_repository(values))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@contextmanager
def serving(repository: Path, *, keeps_states: bool | None = None, **settings: object) -> Iterator[Served]:
    """Serve a repository on free ports until the block ends, then drain and stop; keeps_states as Backend takes it."""
    values = {"repository": repository, **FREE, **settings}
    loaded = load_repository(load_settings(values), keeps_states=keeps_states)
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server")
    thread.start()
    try:

        async def start() -> Server:
            server = Server(load_settings(values), loaded)
            await server.start()
            return server

        server = asyncio.run_coroutine_threadsafe(start(), loop).result(timeout=30)
        try:
            yield Served(server, loop)
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result(timeout=30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
