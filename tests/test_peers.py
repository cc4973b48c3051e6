"""Questions of one process to another."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from aiohttp import web

from service.rpc import peers
from service.rpc.peers import Peer
from tests.siblings import until


async def test_a_peer_is_asked_in_turns_until_it_begins_to_answer():
    num_asked = most_asked = num_begun = 0
    may_end = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal num_asked, most_asked, num_begun
        num_asked += 1
        most_asked = max(most_asked, num_asked)
        await asyncio.sleep(0.002)
        num_asked -= 1
        num_begun += 1
        response = web.StreamResponse()
        await response.prepare(request)
        await may_end.wait()
        await response.write_eof(b"done")
        return response

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        path = Path(folder) / "0.sock"
        app = web.Application()
        app.add_routes([web.get("/", answer)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.UnixSite(runner, str(path)).start()
        peer = Peer(path)
        asking = asyncio.gather(*(peer.ask("/") for _ in range(3 * peers.MAX_BEGINNING)))
        await until(lambda: num_begun == 3 * peers.MAX_BEGINNING)
        may_end.set()
        assert await asking == [b"done"] * 3 * peers.MAX_BEGINNING
        assert most_asked == peers.MAX_BEGINNING
        await peer.close()
        await runner.cleanup()
