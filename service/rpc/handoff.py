"""Moves named sessions between the workers of one server: whoever opens a name gets its session, wherever it lives.

A stream that opens names makes a *claim*: it asks every sibling who holds them, has the holders give them up, and
adopts them; then it opens them as if they had always been here. It asks even where a name is here, for an earlier claim
may be about to take it away. A holder first takes the session from its stream, as a stream of its own would, and
finishes what is queued. Laws:

    claims to one name follow each other in the order of their tickets, on whatever workers they are made
    so the last opener of a name has its session, and no name is live on two workers (but where one did not answer)
    a session whose opener is gone meanwhile lingers where it has come to
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from service.engine import Engine
from service.errors import Exhausted, ServiceError, SessionBusy
from service.events import Answer, Event, Link
from service.lane import Lane
from service.parcels import Leaving, Parcel, adopt, give, pack, unpack
from service.rpc.peers import Peer, ask_all
from service.sessions import Terms
from service.tensors import Array

log = logging.getLogger(__name__)
FINISH_S = 5.0
"""Longest that a holder runs queued steps before it gives a session up; an opener that is still waiting is refused."""
CLAIM_S = 2 * FINISH_S
"""Longest wait for an earlier claim."""
ROOM_S = 0.05
"""Time between looks for room for a session that has come."""
SLICE = 64
"""Sessions that are taken, given or adopted in one turn of the event loop, at most."""
HOLDERS, TAKE, USED = "/sessions/holders", "/sessions/take", "/sessions/used"
"""Routes: which of these names are yours; give them up; is anything live on a version."""

Ticket = tuple[int, int]
"""When a claim was made, on the clock that all processes of a machine share, and by which worker."""


@dataclass(eq=False, slots=True)
class _Claim:
    """Names that a stream is about to open."""

    lane: Lane
    names: frozenset[str]
    ticket: Ticket
    is_over: asyncio.Event = field(default_factory=asyncio.Event)

    def question(self, names: Iterable[str], **more: object) -> bytes:
        """What siblings are asked about some of the names."""
        lane = self.lane
        about = {"model": lane.name, "version": lane.version, "files": _files(lane), "ticket": self.ticket}
        return json.dumps({**about, "names": sorted(names), **more}).encode()


@dataclass(slots=True)
class _Arrival:
    """What came of a claim to a name that another worker held."""

    error: ServiceError | None = None
    answers: list[Answer] = field(default_factory=list)
    """Of steps that the holder finished: they are for the stream that opens it."""


class Handoff:
    """One worker's part in moving sessions."""

    def __init__(self, engine: Engine, siblings: Sequence[Peer], index: int) -> None:
        """Take part.

        siblings  the other workers
        index     this worker's number, different from theirs
        """
        self._engine = engine
        self._siblings = siblings
        self._index = index
        self._claims: dict[tuple[Lane, str], list[_Claim]] = {}
        self._tasks: set[asyncio.Task[dict[str, _Arrival]]] = set()  # the loop itself would forget them
        self._last_ns = 0

    def routes(self) -> list[web.RouteDef]:
        """What siblings ask."""
        return [
            web.post(HOLDERS, self._tell_held),
            web.post(TAKE, self._give_up),
            web.post(USED, self._tell_used),
        ]

    def mover(self, lane: Lane, outputs: list[int], *, emit_last: bool) -> Mover:
        """Help one stream, which wants these outputs."""
        return Mover(self, lane, outputs, emit_last=emit_last)

    async def find_home(self, lanes: Iterable[Lane], names: Collection[str]) -> Lane | None:
        """Find the one of some versions on which another worker has a session of one of those names."""
        for lane in lanes:
            question = _Claim(lane, frozenset(names), (0, self._index)).question(names)  # earlier than any claim
            if any(json.loads(answer or b"[]") for answer in await ask_all(self._siblings, HOLDERS, question)):
                return lane
        return None

    async def is_used_elsewhere(self, lane: Lane) -> bool:
        """Whether another worker serves a version, or something is live on it there."""
        answers = await ask_all(self._siblings, USED, _Claim(lane, frozenset(), (0, self._index)).question(()))
        return any(json.loads(answer or b"false") for answer in answers)

    async def close(self) -> None:
        """Ask no more."""
        for sibling in self._siblings:
            await sibling.close()

    # ---- claims -----------------------------------------------------------------------------------------------------

    def claim(self, link: Link, lane: Lane, names: frozenset[str]) -> tuple[_Claim, asyncio.Task[dict[str, _Arrival]]]:
        """Begin to have the sessions of those names here, held by a link until a stream opens them."""
        self._last_ns = max(self._last_ns + 1, time.monotonic_ns())
        claim = _Claim(lane, names, (self._last_ns, self._index))
        for name in names:
            self._claims.setdefault((lane, name), []).append(claim)
        task = asyncio.create_task(self._bring(claim, link))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return claim, task

    def release(self, claim: _Claim, link: Link) -> None:
        """Let later claims go on; sessions that no stream has opened linger, if they may."""
        self._engine.drop(claim.lane, link)
        for name in claim.names:
            claims = self._claims[claim.lane, name]
            claims.remove(claim)
            if not claims:
                del self._claims[claim.lane, name]
        claim.is_over.set()

    async def _bring(self, claim: _Claim, link: Link) -> dict[str, _Arrival]:
        lane = claim.lane
        late, answers = await asyncio.gather(
            self._wait_for_earlier(lane, claim.names, claim.ticket),
            ask_all(self._siblings, HOLDERS, claim.question(claim.names)),
        )
        room = lane.settings.max_sessions - lane.num_sessions  # for which more is not taken than there is
        asked: list[tuple[Peer, list[str]]] = []
        for sibling, answer in zip(self._siblings, answers, strict=True):
            names = json.loads(answer or b"[]")[: max(room, 0)]
            room -= len(names)
            if names:
                asked.append((sibling, names))
        more = {"outputs": link.outputs, "emit_last": link.emit_last}
        given = await asyncio.gather(*(each.ask(TAKE, claim.question(names, **more)) for each, names in asked))
        parcels = [parcel for data in given if data is not None for parcel in unpack(data)]
        arrivals = await self._take_in(lane, link, parcels)
        for name in (*late, *(name for _, names in asked for name in names)):
            if name not in arrivals and not _is_live(lane, name):
                arrivals[name] = _Arrival(SessionBusy(name))
        return arrivals

    async def _take_in(self, lane: Lane, link: Link, parcels: list[Parcel]) -> dict[str, _Arrival]:
        """Adopt sessions; one that there is no room for waits for some, for as long as a holder would."""
        arrivals: dict[str, _Arrival] = {}
        give_up_at = time.monotonic() + FINISH_S
        for number, parcel in enumerate(sorted(parcels, key=lambda each: each.used_at, reverse=True), 1):
            name = parcel.terms.session_id
            if _is_live(lane, name):  # only if a worker was taken for dead that was not: the one used last stays
                log.warning("two sessions of %s are called %r; one of them is dropped", lane.name, name)
                continue
            arrivals[name] = _Arrival(answers=parcel.answers)
            while True:
                try:
                    adopt(lane, link, parcel, self._engine.clock())
                    break
                except Exhausted as error:
                    if time.monotonic() >= give_up_at:
                        log.error("session %r of %s is lost, it found no room: %s", name, lane.name, error)
                        arrivals[name] = _Arrival(error)
                        break
                await asyncio.sleep(ROOM_S)
            if number % SLICE == 0:
                await asyncio.sleep(0)
        return arrivals

    async def _wait_for_earlier(self, lane: Lane, names: frozenset[str], ticket: Ticket) -> list[str]:
        """Let earlier claims of this worker to those names end. Returns names of claims that don't in time."""
        earlier = {claim for name in names for claim in self._claims.get((lane, name), ()) if claim.ticket < ticket}
        with suppress(TimeoutError):
            async with asyncio.timeout(CLAIM_S):
                for claim in earlier:
                    await claim.is_over.wait()
        return sorted({name for claim in earlier if not claim.is_over.is_set() for name in claim.names & names})

    # ---- what siblings ask ------------------------------------------------------------------------------------------

    async def _tell_held(self, request: web.Request) -> web.StreamResponse:
        question = await _read(request)
        response = await _begin(request)
        names: list[str] = []
        if (lane := self._lane(question)) is not None:
            asked = frozenset(question["names"])
            late = await self._wait_for_earlier(lane, asked, tuple(question["ticket"]))
            names = sorted({*late, *(name for name in asked if _is_live(lane, name))})
        await response.write_eof(json.dumps(names).encode())
        return response

    async def _tell_used(self, request: web.Request) -> web.StreamResponse:
        lane = self._lane(await _read(request))
        is_used = lane is not None and (lane in self._engine.lanes or self._engine.is_used(lane))
        return web.json_response(is_used)

    async def _give_up(self, request: web.Request) -> web.StreamResponse:
        question = await _read(request)
        response = await _begin(request)
        lane = self._lane(question)
        parcels = [] if lane is None else await self._collect(lane, question, request)
        await response.write_eof(pack(parcels))
        return response

    async def _collect(self, lane: Lane, question: dict[str, Any], request: web.Request) -> list[Parcel]:
        """Take sessions from their streams, finish what is queued, and end them here, unless nobody waits any more."""
        names = [name for name in question["names"] if _is_live(lane, name)]
        porters = [_Porter(lane, name, question["outputs"], emit_last=question["emit_last"]) for name in names]
        try:
            for number, porter in enumerate(porters, 1):
                porter.take(self._engine.clock())
                if number % SLICE == 0:
                    await asyncio.sleep(0)
            self._engine.wake()
            with suppress(TimeoutError):
                async with asyncio.timeout(FINISH_S):
                    for porter in porters:
                        await porter.finish()
            await asyncio.sleep(0)  # for the loop to see that the asker has gone
            if request.transport is None or request.transport.is_closing():
                return []
            parcels = []
            for start in range(0, len(porters), SLICE):
                ready = [porter.leaving for porter in porters[start : start + SLICE] if porter.is_ready]
                parcels += give(lane, ready)
                await asyncio.sleep(0)
            return parcels
        finally:
            for porter in porters:
                self._engine.drop(lane, porter.link)

    def _lane(self, question: dict[str, Any]) -> Lane | None:
        """The lane of the same files, if there is one."""
        wanted = [question["model"], question["version"], question["files"]]
        for lane in (*self._engine.lanes, *self._engine.besides(question["model"])):
            if [lane.name, lane.version, _files(lane)] == wanted:
                return lane
        return None


class Mover:
    """Has the sessions that one stream opens by name come here first."""

    def __init__(self, handoff: Handoff, lane: Lane, outputs: list[int], *, emit_last: bool) -> None:
        self._handoff = handoff
        self._lane = lane
        self._outputs = outputs
        self._emit_last = emit_last
        self._arrivals: dict[str, _Arrival] = {}

    @asynccontextmanager
    async def brought(self, terms: Sequence[Terms]) -> AsyncIterator[dict[str, ServiceError]]:
        """Within it, `open` finds sessions that lived on other workers. Gives those that can't be had now, and why."""
        names = frozenset(each.session_id for each in terms if each.session_id)
        if not names:
            yield {}
            return
        link = Link(_ignore, self._outputs, emit_last=self._emit_last)
        claim, task = self._handoff.claim(link, self._lane, names)
        try:
            self._arrivals = await asyncio.shield(task)  # what is given must be adopted, whoever has gone meanwhile
            yield {name: arrival.error for name, arrival in self._arrivals.items() if arrival.error is not None}
        finally:
            self._arrivals = {}
            task.add_done_callback(lambda _: self._handoff.release(claim, link))

    def open(self, link: Link, terms: Terms, now: float, given: list[Array] | None = None) -> tuple[int, int, bool]:
        """Open as Lane.open does, with the answers that a session brings along. Raises its errors, and SessionBusy."""
        arrival = self._arrivals.pop(terms.session_id, None)
        if arrival is None:
            return self._lane.open(link, terms, now, given)
        if arrival.error is not None:
            raise arrival.error
        opened = self._lane.open(link, terms, now, given)
        for answer in arrival.answers:
            answer.handles = [opened[0]]
            link.sink(answer)
        return opened


class _Porter:
    """Holds a session that is on its way out, in place of a stream."""

    def __init__(self, lane: Lane, name: str, outputs: list[int], *, emit_last: bool) -> None:
        self._lane = lane
        self._name = name
        self._answers: list[Answer] = []
        self._has_news = asyncio.Event()
        self._handle = 0
        self.link = Link(self._on_event, outputs, emit_last=emit_last)

    def take(self, now: float) -> None:
        """Take the session from its stream."""
        session = self._lane.find(Terms(session_id=self._name), now)
        if session is not None:
            self._handle, _, _ = self._lane.open(self.link, session.terms, now)

    @property
    def is_ready(self) -> bool:
        """Whether the session is here, with nothing queued."""
        session = self.link.sessions.get(self._handle)
        return session is not None and not self._lane.scheduler.is_busy(session.slot)

    async def finish(self) -> None:
        """Wait until nothing is queued, or the session is gone."""
        while self.link.sessions and not self.is_ready:
            self._has_news.clear()
            await self._has_news.wait()

    @property
    def leaving(self) -> Leaving:
        """The session, to be given away."""
        return Leaving(self.link, self._handle, self._answers)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Answer):
            self._answers.append(event)
        self._has_news.set()


def _files(lane: Lane) -> list[str]:
    """What tells a version from another of its name and number, whose files were replaced."""
    return [lane.backend.digest, lane.fingerprint]


def _is_live(lane: Lane, name: str) -> bool:
    return lane.find(Terms(session_id=name), time.monotonic()) is not None


async def _read(request: web.Request) -> dict[str, Any]:
    question: dict[str, Any] = json.loads(await request.content.read())
    return question


async def _begin(request: web.Request) -> web.StreamResponse:
    """Begin to answer: it tells that this worker is alive, however long the rest takes."""
    response = web.StreamResponse()
    await response.prepare(request)
    return response


def _ignore(event: Event) -> None:
    """A session that is carried has no one to tell."""
