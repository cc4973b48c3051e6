"""Asking the processes of one server over their unix sockets, one or all at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

ALIVE_S = 2.0
"""Time in which a process begins to answer; one that does not is taken for dead."""
PATIENCE_S = 20.0
"""Time for the rest of an answer."""
MAX_BEGINNING = 16
"""Most questions to one process that it has not begun to answer: it must not seem dead for being asked much."""


class Peer:
    """A process that answers HTTP on a unix socket."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._session: aiohttp.ClientSession | None = None
        self._turns = asyncio.Semaphore(MAX_BEGINNING)

    async def ask(
        self, route: str, body: bytes | None = None, alive_s: float | None = None, patience_s: float | None = None
    ) -> bytes | None:
        """GET a route, or POST a body to it. Returns None where the answer is not 200, or there is none in time.

        alive_s     time in which it is to begin, ALIVE_S by default
        patience_s  and for the rest of it, PATIENCE_S by default
        """
        answer = await self.fetch(route, body, alive_s, patience_s)
        return answer[1] if answer is not None and answer[0] == 200 else None

    async def fetch(
        self, route: str, body: bytes | None = None, alive_s: float | None = None, patience_s: float | None = None
    ) -> tuple[int, bytes] | None:
        """Ask in the same way. Returns (status, content), None where there is no answer."""
        method = "GET" if body is None else "POST"
        try:
            async with self._turns, asyncio.timeout(alive_s or ALIVE_S):
                response = await self._client().request(method, f"http://peer{route}", data=body)
            async with response, asyncio.timeout(patience_s or PATIENCE_S):
                return response.status, await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None

    async def connect(self, route: str) -> aiohttp.ClientWebSocketResponse | None:
        """Open a WebSocket. Returns None where it can't be had."""
        try:
            async with asyncio.timeout(ALIVE_S):
                return await self._client().ws_connect(f"http://peer{route}", max_msg_size=0)
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            # Kept connections could be closed by the other side just as they are used, and it would be taken for dead.
            connector = aiohttp.UnixConnector(str(self._path), limit=0, force_close=True)
            self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        return self._session

    async def close(self) -> None:
        """Close its connections."""
        if self._session is not None:
            await self._session.close()


async def ask_all(peers: Sequence[Peer], route: str, body: bytes | None = None) -> list[bytes | None]:
    """Ask every peer the same at once. Returns the answers in the order of peers."""
    return await asyncio.gather(*(peer.ask(route, body) for peer in peers))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker stands among those of its server."""

    folder: Path
    """Of all sockets, private to the user."""
    index: int
    num_workers: int

    @property
    def path(self) -> Path:
        """Of its own socket."""
        return self.folder / f"{self.index}.sock"

    @property
    def supervisor(self) -> Path:
        """Of the supervisor's socket."""
        return self.folder / "supervisor.sock"

    @property
    def siblings(self) -> list[Place]:
        """The other workers."""
        return [Place(self.folder, each, self.num_workers) for each in range(self.num_workers) if each != self.index]
