"""The part of the page's API that only tells: models, and numbers."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from service.engine import Engine
from service.holdings import Broken
from service.web.describe import describe_server, describe_whole
from service.web.stats import stats_of


def telling_routes(engine: Engine, broken: Sequence[Broken]) -> list[web.RouteDef]:
    """Make the routes that answer JSON about an engine."""

    async def models(_: web.Request) -> web.Response:
        return web.json_response(describe_server(engine, broken))

    async def model(request: web.Request) -> web.Response:
        name, version = request.match_info["name"], request.match_info["version"]
        return web.json_response(describe_whole(engine.lane(name, int(version))))

    async def stats(_: web.Request) -> web.Response:
        return web.json_response(stats_of(engine, broken))

    return [
        web.get("/api/models", models),
        web.get("/api/models/{name}/versions/{version:[0-9]{1,9}}", model),
        web.get("/api/stats", stats),
    ]
