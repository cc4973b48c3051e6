"""Models of several workers: one supervisor decides, every worker does the same.

A call to load or unload, or for the index, reaches one worker, which asks the supervisor. Its catalog follows the
repository with hands that are all workers. Laws:

    a version takes work once every worker has it ready: wherever a session is taken next, its version is known
    what one worker can't load, none serves
    nothing changes while a worker is started again, and it begins with what the others serve
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web

from service.changes import Key, Prints
from service.errors import (
    ConfigError,
    ModelBroken,
    ModelNotFound,
    RepositoryUnreachable,
    ServiceError,
    Unavailable,
)
from service.holdings import Broken, Holdings
from service.rpc.catalog import Catalog, Entry
from service.rpc.peers import Peer

if TYPE_CHECKING:  # it imports onnxruntime, which a supervisor has no use for
    from service.repository import Loaded
    from service.rpc.hands import OwnHands

log = logging.getLogger(__name__)
ALIVE_S, PATIENCE_S = 30.0, 3600.0
"""Time in which a worker begins to answer, or it is ended; and longest that it may take to load a version."""
LOAD, DROP, SWITCH = "/models/load", "/models/drop", "/models/switch"
TELL, KNOWN = "/models/tell", "/models/known"
"""Routes of a worker: what the supervisor has it do."""
ASK_LOAD, ASK_UNLOAD, ASK_INDEX = "/catalog/load", "/catalog/unload", "/catalog/index"
"""Routes of the supervisor: what a worker asks for."""
_ERRORS = {
    each.__name__: each for each in (ConfigError, ModelBroken, ModelNotFound, RepositoryUnreachable, Unavailable)
}
_Act = Callable[[dict[str, Any]], Awaitable[Any]]
"""Does what a message of JSON says, and returns what can be written as JSON."""


class Worker(Protocol):
    """A worker that is ready."""

    peer: Peer

    def end(self) -> None:
        """Kill it, so that it is started again."""


class FleetHands:
    """All workers, which do as one."""

    def __init__(self, holdings: Holdings, workers: Callable[[], Sequence[Worker]], stopping: asyncio.Event) -> None:
        """Workers  gives those that are ready."""
        self._holdings = holdings
        self._workers = workers
        self._stopping = stopping

    @property
    def served(self) -> Prints:
        """What every worker serves."""
        return self._holdings.prints

    @property
    def is_stopping(self) -> bool:
        """Whether the server stops."""
        return self._stopping.is_set()

    async def load(self, key: Key, fingerprint: str) -> None:
        """Have a version ready on every worker, or on none. Raises ModelBroken and its kin."""
        try:
            await self._order(LOAD, key=key, fingerprint=fingerprint)
        except ServiceError:
            await self._order(DROP, key=key)
            raise

    async def switch(self, serve: Collection[Key], retire: Collection[Key], grace_s: float) -> None:
        """Let versions that are ready take work, and let others leave."""
        grace = grace_s if math.isfinite(grace_s) else None
        await self._order(SWITCH, serve=list(serve), retire=list(retire), grace_s=grace)

    async def leaving(self) -> dict[Key, int]:
        """Versions on their way out, and how many sessions are live on each."""
        found: dict[Key, int] = {}
        for known in await self.known():
            for key, num_sessions in known["leaving"]:
                found[tuple(key)] = found.get(tuple(key), 0) + num_sessions
        return found

    async def tell_broken(self) -> None:
        """Let every worker tell which versions are broken."""
        await self._order(TELL, broken=[[*_broken_of(each)] for each in self._holdings.broken])

    async def known(self) -> list[dict[str, Any]]:
        """What each worker has."""
        return await self._order(KNOWN)

    async def _order(self, route: str, **content: Any) -> list[Any]:
        """Have every worker do something. Raises what the first could not do; one that does not answer is ended."""
        workers, body = self._workers(), json.dumps(content).encode()
        answers = await asyncio.gather(*(each.peer.ask(route, body, ALIVE_S, PATIENCE_S) for each in workers))
        done, errors = [], []
        for worker, answer in zip(workers, answers, strict=True):
            if answer is None and self.is_stopping:
                continue
            if answer is None:
                log.error("a worker does not answer: it is ended, and started again with what the others serve")
                worker.end()
            elif "error" in (result := json.loads(answer)):
                errors.append(_error_of(result["error"]))
            else:
                done.append(result["result"])
        if errors:
            raise errors[0]
        if not done:
            raise Unavailable("no worker is ready: try again after a while", retry_after_s=1.0)
        return done


class Obeying:
    """A worker's part: its own hands do what the supervisor says."""

    def __init__(self, hands: OwnHands, loaded: Loaded) -> None:
        self._hands = hands
        self._loaded = loaded

    def routes(self) -> list[web.RouteDef]:
        """What the supervisor says."""
        acts = {LOAD: self._load, DROP: self._drop, SWITCH: self._switch}
        return _routes({**acts, TELL: self._tell, KNOWN: self._tell_known})

    async def _load(self, order: dict[str, Any]) -> None:
        await self._hands.load(tuple(order["key"]), order["fingerprint"])

    async def _drop(self, order: dict[str, Any]) -> None:
        self._hands.drop(tuple(order["key"]))

    async def _switch(self, order: dict[str, Any]) -> None:
        serve, retire = ([tuple(key) for key in order[name]] for name in ("serve", "retire"))
        await self._hands.switch(serve, retire, math.inf if order["grace_s"] is None else order["grace_s"])

    async def _tell(self, order: dict[str, Any]) -> None:
        self._loaded.broken[:] = read_broken(order["broken"])

    async def _tell_known(self, _: dict[str, Any]) -> dict[str, Any]:
        return {
            "found": as_rows(self._loaded.found),
            "served": as_rows(self._hands.prints),
            "retired": as_rows(self._hands.leaving_prints),
            "leaving": list((await self._hands.leaving()).items()),
            "broken": [_broken_of(each) for each in self._loaded.broken],
        }


class Forwarding:
    """A worker's catalog: it asks the supervisor."""

    def __init__(self, supervisor: Peer) -> None:
        self._supervisor = supervisor

    async def entries(self, *, is_ready: bool) -> list[Entry]:
        """As Catalog.entries."""
        rows: list[list[Any]] = await self._ask(ASK_INDEX, is_ready=is_ready)
        return [(name, version, state, reason) for name, version, state, reason in rows]

    async def load(self, name: str) -> None:
        """As Catalog.load."""
        await self._ask(ASK_LOAD, name=name)

    async def unload(self, name: str) -> None:
        """As Catalog.unload."""
        await self._ask(ASK_UNLOAD, name=name)

    async def close(self) -> None:
        """Ask no more."""
        await self._supervisor.close()

    async def _ask(self, route: str, **content: Any) -> Any:
        answer = await self._supervisor.ask(route, json.dumps(content).encode(), ALIVE_S, PATIENCE_S)
        if answer is None:
            raise Unavailable("not every worker is ready: try again after a while", retry_after_s=1.0)
        result = json.loads(answer)
        if "error" in result:
            raise _error_of(result["error"])
        return result["result"]


def catalog_routes(catalog: Catalog) -> list[web.RouteDef]:
    """What workers ask the supervisor's catalog."""

    async def index(question: dict[str, Any]) -> list[Entry]:
        return await catalog.entries(is_ready=question["is_ready"])

    async def load(question: dict[str, Any]) -> None:
        await catalog.load(question["name"])

    async def unload(question: dict[str, Any]) -> None:
        await catalog.unload(question["name"])

    return _routes({ASK_INDEX: index, ASK_LOAD: load, ASK_UNLOAD: unload})


def as_rows(prints: Prints) -> list[tuple[str, int, str]]:
    """Write what versions are known by."""
    return [(*key, fingerprint) for key, fingerprint in prints.items()]


def from_rows(rows: Sequence[Sequence[Any]]) -> dict[Key, str]:
    """Read what `as_rows` wrote."""
    return {(model, version): fingerprint for model, version, fingerprint in rows}


def read_broken(rows: Sequence[Any]) -> list[Broken]:
    """Read broken versions, as a worker tells of them."""
    return [Broken(name, version, _error_of(error), fingerprint) for name, version, error, fingerprint in rows]


def _broken_of(broken: Broken) -> tuple[str, int, dict[str, Any], str]:
    return broken.name, broken.version, _told(broken.error), broken.fingerprint


def _told(error: ServiceError) -> dict[str, Any]:
    return {"kind": type(error).__name__, "text": str(error), "field": error.field}


def _error_of(told: dict[str, Any]) -> ServiceError:
    return _ERRORS.get(told["kind"], ServiceError)(told["text"], field=told["field"])


def _routes(acts: dict[str, _Act]) -> list[web.RouteDef]:
    """Answer questions in JSON: the answer begins at once, which tells that the process is alive."""

    def handler(act: _Act) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            question = json.loads(await request.content.read())
            response = web.StreamResponse()
            await response.prepare(request)
            try:
                answer: dict[str, Any] = {"result": await act(question)}
            except ServiceError as error:
                answer = {"error": _told(error)}
            except Exception:
                log.exception("a bug in changing models")
                answer = {"error": _told(ServiceError("the server failed; its log says how"))}
            await response.write_eof(json.dumps(answer).encode())
            return response

        return handle

    return [web.post(route, handler(act)) for route, act in acts.items()]
