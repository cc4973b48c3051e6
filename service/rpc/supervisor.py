"""Starts the workers of one server, starts again those that die, drains them all, and shows them as one over HTTP.

It loads no model and sees no request: the workers share the port. A worker that dies takes its own sessions with it and
nothing else; a model that kills its worker again and again is waited for, longer each time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from service.changes import Key
from service.config import Settings
from service.errors import ConfigError, Unavailable
from service.holdings import Holdings, open_storage
from service.rpc.access import HttpAccessLog
from service.rpc.announcement import Announcement
from service.rpc.catalog import Catalog
from service.rpc.fleet import FleetHands, as_rows, catalog_routes, from_rows, read_broken
from service.rpc.metrics import Page, left_behind, merge, read_page, write_page
from service.rpc.peers import Peer, Place, ask_all
from service.rpc.ports import hold_port
from service.rpc.relay import Relay
from service.telemetry import worker_metrics
from service.web.page import add_page
from service.web.sites import listen

log = logging.getLogger(__name__)
QUICK_S = 10.0
"""A worker that dies sooner after it was ready is started again with a delay."""
FIRST_DELAY_S = 0.5
LAST_DELAY_S = 30.0
MAX_PATH_BYTES = 100
"""Longest path of a unix socket, nearly."""


async def run(settings: Settings) -> None:
    """Serve with several workers until SIGTERM or SIGINT, then drain.

    Raises ConfigError for a port in use, and for what keeps a worker from starting the first time.
    """
    with ExitStack() as held:
        port = hold_port(settings, held)
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="rnnserve-")))
        if len(os.fsencode(folder)) > MAX_PATH_BYTES - len("/999.sock"):
            raise ConfigError(f"{folder} is too long a path for sockets of workers: set TMPDIR to a shorter one")
        cache = settings.repository_cache or folder / "cache"  # they share what is fetched from a URL
        settings = settings.model_copy(update={"port": port, "repository_cache": cache})
        await Supervisor(settings, folder).run()


class _Live:
    """A worker that is ready."""

    def __init__(self, place: Place, process: Process) -> None:
        self._process = process
        self.peer = Peer(place.path)
        self.page: Page = []
        """Its metrics when they were last asked for."""

    def end(self) -> None:
        """Kill it, so that it is started again."""
        with suppress(ProcessLookupError):
            self._process.kill()


class Supervisor:
    """Holds the workers of one server, on the running loop."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._places = [Place(folder, index, settings.workers) for index in range(settings.workers)]
        self._processes: dict[Place, Process] = {}
        self._live: dict[Place, _Live] = {}
        self._past: Page = []  # totals of workers that have ended
        self._num_restarts = 0
        self._is_scraping = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._hands: FleetHands | None = None
        self._catalog: Catalog | None = None  # once all have started
        self._runners: list[web.AppRunner] = []

    async def run(self) -> None:
        """Serve until a signal comes and all has been drained. Raises ConfigError as `run` of the module."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        app = web.Application()
        app.add_routes(
            [web.get("/metrics", self._metrics), web.get("/livez", _livez), web.get("/readyz", self._readyz)]
        )
        if self._settings.page:
            relay = Relay(lambda: [worker.peer for worker in self._live.values()], self._settings.max_message_bytes)
            add_page(app, self._settings, relay.routes())
        http, http_port = await listen(app, self._settings, access_log=HttpAccessLog)
        self._runners.append(http)
        started = [loop.create_future() for _ in self._places]
        keepers = [loop.create_task(self._keep(*each)) for each in zip(self._places, started, strict=True)]
        try:
            announcement, *_ = await asyncio.gather(*started)
            await self._begin_catalog()
            if not self._stopping.is_set():
                num = len(self._places)
                announcement.show(self._settings.host, self._settings.port, http_port, num_workers=num)
            await asyncio.gather(*keepers)
        except ConfigError:
            if not self._stopping.is_set():  # else the signal ended it before it was ready
                raise
        finally:
            self._stopping.set()
            for process in self._processes.values():
                with suppress(ProcessLookupError):
                    process.kill()
            await asyncio.gather(*keepers, *started, return_exceptions=True)
            if self._catalog is not None:
                self._catalog.close()
            for runner in self._runners:
                await runner.cleanup()

    # ---- processes --------------------------------------------------------------------------------------------------

    async def _keep(self, place: Place, started: asyncio.Future[Announcement]) -> None:
        """Run a worker, and run it again whenever it has died, until the server stops."""
        delay_s = 0.0
        while True:
            try:
                async with nullcontext() if self._catalog is None else self._catalog.is_changing:
                    process, announcement = await self._start(place, await self._known())
                    self._live[place] = _Live(place, process)
                    if self._hands is not None:
                        await self._hands.tell_broken()
            except ConfigError as error:
                if not started.done():
                    started.set_exception(error)
                    return
                lived_s, end = 0.0, f"could not start: {error}"
            else:
                if not started.done():
                    started.set_result(announcement)
                lived_s, end = await self._watch(place, process)
            if self._stopping.is_set():
                return
            delay_s = 0.0 if lived_s >= QUICK_S else min(max(FIRST_DELAY_S, 2 * delay_s), LAST_DELAY_S)
            log.error("worker %d %s; it is started again in %.1f s", place.index, end, delay_s)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay_s)
                return
            self._num_restarts += 1

    async def _begin_catalog(self) -> None:
        """Begin to follow the repository, and to answer workers that ask for it. All have just started."""
        if self._stopping.is_set():
            return
        holdings = Holdings(storage=open_storage(self._settings))
        self._hands = FleetHands(holdings, lambda: list(self._live.values()), self._stopping)
        first, *others = await self._hands.known()
        holdings.found, holdings.broken = from_rows(first["found"]), read_broken(first["broken"])
        served = [set(from_rows(each["served"]).items()) for each in (first, *others)]
        holdings.prints = dict(set.intersection(*served))
        self._catalog = Catalog(self._settings, holdings, self._hands)
        if strays := {key for each in served for key, _ in each} - holdings.prints.keys():  # changed in between
            await self._hands.switch([], strays, math.inf)
            await self._catalog.follow()
        app = web.Application()
        app.add_routes(catalog_routes(self._catalog))
        runner, _ = await listen(app, self._settings, self._places[0].supervisor)
        self._runners.append(runner)
        self._catalog.watch()

    async def _known(self) -> dict[str, Any]:
        """What a worker that is started again is to begin with: what the others have."""
        if self._hands is None or self._catalog is None:
            return {}
        retired: dict[Key, str] = {}
        with suppress(Unavailable):
            for known in await self._hands.known():
                retired |= from_rows(known["retired"])
        return {"wanted": as_rows(self._hands.served), "retired": as_rows(retired)}

    async def _start(self, place: Place, more: dict[str, Any]) -> tuple[Process, Announcement]:
        """Start a worker and wait until it is ready. Raises ConfigError with what it says, or how it ended.

        more  of its order: what it is to begin with
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-P", "-m", "service.rpc.worker"),  # -P: nothing in the current folder takes a module's place
            stdin=PIPE,
            stdout=PIPE,
            start_new_session=True,  # Ctrl-C comes here alone
        )
        self._processes[place] = process
        if self._stopping.is_set():
            process.terminate()
        assert process.stdin is not None  # noqa: S101  they are pipes
        assert process.stdout is not None  # noqa: S101
        order = {"folder": str(place.folder), "index": place.index, "num_workers": place.num_workers, **more}
        process.stdin.write(json.dumps({**order, "settings": self._settings.model_dump(mode="json")}).encode() + b"\n")
        report = await process.stdout.read()
        if report and (content := json.loads(report)).keys() == {"models", "broken"}:
            log.info("worker %d is ready: process %d", place.index, process.pid)
            return process, Announcement(**content)
        status = await process.wait()
        if report:
            raise ConfigError(content["error"], field=content["field"])
        raise ConfigError(f"a worker {_how(status)} before it was ready; what it said stands above")

    async def _watch(self, place: Place, process: Process) -> tuple[float, str]:
        """Wait until a worker ends. Returns (how long it lived, how it ended)."""
        clock = asyncio.get_running_loop().time
        began = clock()
        live = self._live[place]
        status = await process.wait()
        del self._live[place]
        self._past = merge([self._past, left_behind(live.page)])
        await live.peer.close()
        return clock() - began, f"{_how(status)}, and its sessions are lost"

    def _stop(self) -> None:
        """Have every worker drain."""
        self._stopping.set()
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                process.terminate()

    # ---- HTTP -------------------------------------------------------------------------------------------------------

    async def _metrics(self, _: web.Request) -> web.Response:
        async with self._is_scraping:  # or a page that was asked for before another could come after it
            workers = list(self._live.values())
            answers = await ask_all([worker.peer for worker in workers], "/metrics")
            for worker, answer in zip(workers, answers, strict=True):
                if answer is not None:
                    worker.page = read_page(answer)
            live = list(self._live.values())
            is_ready = len(live) == len(self._places) and not self._stopping.is_set()
            whole = worker_metrics(len(live), self._num_restarts, is_ready=is_ready)
            page = merge([whole, self._past, *(each.page for each in live)])
        return web.Response(body=write_page(page), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _readyz(self, _: web.Request) -> web.Response:
        if self._stopping.is_set():
            return web.Response(status=503, text="draining\n")
        answers = await ask_all([worker.peer for worker in self._live.values()], "/readyz")
        num_ready = sum(answer is not None for answer in answers)
        if num_ready < len(self._places):
            return web.Response(status=503, text=f"{num_ready} of {len(self._places)} workers are ready\n")
        return web.Response(text="ok\n")


async def _livez(_: web.Request) -> web.Response:
    return web.Response(text="ok\n")


def _how(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"ended with status {status}"
    with suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"
