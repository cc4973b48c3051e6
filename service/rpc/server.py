"""Puts the server together: gRPC with health and reflection, HTTP, start, drain and stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from collections.abc import Callable, Sequence

import grpc
import grpc.aio
from aiohttp import web
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from service.changes import Prints
from service.config import Settings
from service.engine import Engine
from service.errors import ConfigError, ServiceError
from service.holdings import Broken
from service.repository import Loaded
from service.rpc.access import AccessLog, HttpAccessLog
from service.rpc.calls import CallInterceptor, CallObserver
from service.rpc.catalog import Catalog
from service.rpc.fleet import Forwarding, Obeying
from service.rpc.handoff import Handoff
from service.rpc.hands import OwnHands
from service.rpc.interceptors import ErrorInterceptor, SeeingInterceptor
from service.rpc.native import SERVICE_NAME, SequenceServicer
from service.rpc.oip.servicer import SERVICE_NAME as INFERENCE_NAME
from service.rpc.oip.servicer import InferenceServicer
from service.rpc.otel import tracing_of
from service.rpc.peers import Peer, Place
from service.rpc.transport import ConnectionAges, add_diagnostics, server_options
from service.rpc.websocket import Sockets
from service.tally import CallTally
from service.telemetry import CallCollector, registry_of
from service.web.app import make_app
from service.web.page import add_page
from service.web.sites import listen
from service.web.telling import telling_routes

log = logging.getLogger(__name__)


class Server:
    """A server of loaded models, on the running loop."""

    def __init__(self, settings: Settings, loaded: Loaded, place: Place | None = None) -> None:
        """Prepare.

        place  of a worker that shares the port with others; None where it is alone
        """
        self.settings = settings
        self.broken: Sequence[Broken] = loaded.broken
        self._store = loaded.store
        self._storage = loaded.storage
        self.engine = Engine(settings)
        for lane in loaded.lanes:
            self.engine.add(lane)
        self.port = 0
        """Port of gRPC, once started."""
        self.http_port = 0
        """Port of HTTP, once started."""
        self._health = health.aio.HealthServicer()
        self._place = place
        self._handoff = None
        if place is not None:
            self._handoff = Handoff(self.engine, [Peer(each.path) for each in place.siblings], place.index)
        self._ages = ConnectionAges.of(settings)
        self._native = SequenceServicer(self.engine, loaded.broken, self._handoff, self._ages)
        self.hands = OwnHands(self.engine, loaded, self._health)
        if self._handoff is not None:
            self.hands.retirer.is_used_elsewhere = self._handoff.is_used_elsewhere
        self.catalog = Catalog(settings, loaded, self.hands)
        self._supervisor = None if place is None else Forwarding(Peer(place.supervisor))
        self._obeying = Obeying(self.hands, loaded)
        self._inference = InferenceServicer(self.engine, self._supervisor or self.catalog, self._handoff)
        self.hands.retirer.streams = (self._native,)
        self.hands.retirer.keepers = (self._native.forget, self._inference.desk.forget)
        self._sockets = Sockets(self._native, settings.max_message_bytes)
        self._calls = CallTally()
        self._tracing = tracing_of(settings, None if place is None else place.index)
        self._observers: list[CallObserver] = [] if settings.access_log == "off" else [AccessLog()]
        if self._tracing is not None:
            self._observers.append(self._tracing)
            self.engine.watch = self._tracing.ran
        self._grpc: grpc.aio.Server | None = None
        self._http: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen and answer. Raises ConfigError for a port in use, an address or a certificate that does not work."""
        interceptors: list[grpc.aio.ServerInterceptor] = [
            CallInterceptor(self._calls, self._observers),
            ErrorInterceptor(self.settings.max_response_bytes),
        ]
        if self._ages is not None:
            interceptors.append(SeeingInterceptor(self._ages.see))
        self._grpc = grpc.aio.server(
            interceptors=interceptors,
            options=server_options(self.settings, shares_port=self._place is not None),
        )
        self._grpc.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(SERVICE_NAME, self._native.handlers()),
                grpc.method_handlers_generic_handler(INFERENCE_NAME, self._inference.handlers()),
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        add_diagnostics(self._grpc, self.settings, (SERVICE_NAME, INFERENCE_NAME, health.SERVICE_NAME))
        self.port = self._bind(self._grpc)
        if self._tracing is not None:
            self._tracing.listen(self.port)
        self.engine.start()
        await self._start_http()
        await self._grpc.start()
        for name in ("", SERVICE_NAME, INFERENCE_NAME):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self.hands.announce()
        if self._supervisor is None:
            self.catalog.watch()

    async def begin_retired(self, retired: Prints) -> None:
        """Load versions that other workers have retired, whose sessions may come here."""
        for key, fingerprint in retired.items():
            try:
                await self.hands.begin_retired(key, fingerprint)
            except ServiceError as error:
                log.warning("sessions of %s/%d can't move to this worker: %s", *key, error)

    async def stop(self) -> None:
        """Drain: refuse what is new, tell the streams, let them end within the time that is set, then stop."""
        if self._grpc is None:
            return
        self.engine.is_draining = True
        self.catalog.close()
        self.hands.retirer.close()
        await self._health.enter_graceful_shutdown()
        streams = self._native.streams
        if streams:
            log.info("draining: %d streams have %.0f s to end", len(streams), self.settings.drain_s)
        for stream in streams:
            stream.announce_drain(self.settings.drain_s)
        drain_s = self.settings.drain_s
        await asyncio.gather(self._grpc.stop(drain_s), self._sockets.drained(drain_s))
        if self._http is not None:
            await self._http.cleanup()
        if self._handoff is not None:
            await self._handoff.close()
        if self._supervisor is not None:
            await self._supervisor.close()
        self.engine.stop()
        if self._tracing is not None:
            await self._tracing.close()
        if self._store is not None:
            self._store.close()
        self._storage.close()

    def _bind(self, server: grpc.aio.Server) -> int:
        settings = self.settings
        address = f"{settings.host}:{settings.port}"
        try:
            if settings.tls_cert or settings.tls_key or settings.tls_client_ca:
                return server.add_secure_port(address, _credentials(settings))
            return server.add_insecure_port(address)
        except RuntimeError as error:
            tls = ", or the certificate and the key don't fit" if settings.tls_cert else ""
            raise ConfigError(
                f"can't listen on {address}: the port is in use, or the address is not of this machine{tls}; "
                "stop the other server, or choose with --host and --port",
                field="port",
            ) from error

    async def _start_http(self) -> None:
        app = make_app(self.engine, registry_of(self.engine, self.broken, CallCollector(self._calls)))
        if self._handoff is not None:
            app.add_routes([*self._handoff.routes(), *self._obeying.routes()])
        if self.settings.page:
            app.on_shutdown.append(self._sockets.close)
            add_page(app, self.settings, [*telling_routes(self.engine, self.broken), *self._sockets.routes()])
        path = None if self._place is None else self._place.path
        self._http, self.http_port = await listen(app, self.settings, path, HttpAccessLog)


def _credentials(settings: Settings) -> grpc.ServerCredentials:
    if settings.tls_cert is None or settings.tls_key is None:
        raise ConfigError("TLS needs both --tls-cert and --tls-key", field="tls_cert")
    try:
        pair = (settings.tls_key.read_bytes(), settings.tls_cert.read_bytes())
        authorities = settings.tls_client_ca.read_bytes() if settings.tls_client_ca else None
    except OSError as error:
        raise ConfigError(f"can't read {error.filename}: {error.strerror}", field="tls_cert") from error
    return grpc.ssl_server_credentials(
        [pair], root_certificates=authorities, require_client_auth=authorities is not None
    )


async def run(
    settings: Settings,
    loaded: Loaded,
    on_ready: Callable[[Server], None],
    place: Place | None = None,
    retired: Prints | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    retired  versions that other workers have retired, whose sessions may come here
    """
    server = Server(settings, loaded, place)
    await server.start()
    await server.begin_retired(retired or {})
    _calm_garbage_collector()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    on_ready(server)
    await stopping.wait()
    await server.stop()


def _calm_garbage_collector() -> None:
    """Leave what is loaded out of every collection, so that one walks over what is new alone.

    Collections are as frequent as ever, nearly: every call leaves a cycle of gRPC's behind, of some hundreds of bytes.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(2_000, 20, 20)
