"""HTTP beside gRPC: /metrics for Prometheus, /livez and /readyz for probes."""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from service.engine import Engine

ENGINE = web.AppKey("engine", Engine)
REGISTRY = web.AppKey("registry", CollectorRegistry)


def make_app(engine: Engine, registry: CollectorRegistry) -> web.Application:
    """Put the routes together."""
    app = web.Application()
    app[ENGINE] = engine
    app[REGISTRY] = registry
    app.add_routes([web.get("/metrics", _metrics), web.get("/livez", _livez), web.get("/readyz", _readyz)])
    return app


async def _metrics(request: web.Request) -> web.Response:
    return web.Response(body=generate_latest(request.app[REGISTRY]), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _livez(_: web.Request) -> web.Response:
    return web.Response(text="ok\n")


async def _readyz(request: web.Request) -> web.Response:
    if request.app[ENGINE].is_draining:
        return web.Response(status=503, text="draining\n")
    return web.Response(text="ok\n")
