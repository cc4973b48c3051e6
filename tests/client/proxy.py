"""A TCP proxy that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Proxy:
    """Passes bytes to a server until it is told, or has counted enough, to break every connection."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._num_bytes = 0
        self._cut_at: list[int] = []
        self.is_refusing = False
        """Break new connections at once."""
        self.num_cuts = 0
        self.on_cut: Callable[[], object] = lambda: None
        self.address = ""

    def cut(self) -> None:
        """Break every connection now."""
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result(timeout=10)

    def cut_at(self, *num_bytes: int) -> None:
        """Break every connection when the server has sent so many bytes from now on, each time."""
        self._num_bytes = 0
        self._cut_at = sorted(num_bytes)

    async def _cut(self) -> None:
        self.num_cuts += 1
        self.on_cut()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine = {writer}
        try:
            if self.is_refusing:
                return
            up_reader, up_writer = await asyncio.open_connection(self._host, self._port)
            mine.add(up_writer)
            self._writers |= mine
            await asyncio.gather(
                self._pass(reader, up_writer, counts=False), self._pass(up_reader, writer, counts=True)
            )
        finally:
            self._writers -= mine
            for each in mine:
                each.transport.abort()
                with contextlib.suppress(OSError):
                    await each.wait_closed()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counts: bool) -> None:
        try:
            while data := await reader.read(65536):
                if counts:
                    self._num_bytes += len(data)
                    if self._cut_at and self._num_bytes >= self._cut_at[0]:
                        self._cut_at.pop(0)
                        await self._cut()
                        return
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.transport.abort()


@contextmanager
def proxied(target: str) -> Iterator[Proxy]:
    """Run a proxy in a thread until the block ends."""
    proxy = Proxy(target)
    loop = proxy._loop
    thread = threading.Thread(target=loop.run_forever, name="proxy")
    thread.start()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(proxy._serve, "127.0.0.1", 0)

    async def stop(server: asyncio.Server) -> None:
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    try:
        server = asyncio.run_coroutine_threadsafe(start(), loop).result(timeout=10)
        host, port = server.sockets[0].getsockname()
        proxy.address = f"{host}:{port}"
        yield proxy
        asyncio.run_coroutine_threadsafe(stop(server), loop).result(timeout=10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
