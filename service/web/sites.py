"""Where HTTP is listened for: a port, or a unix socket."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger

from service.config import Settings
from service.errors import ConfigError


async def listen(
    app: web.Application,
    settings: Settings,
    path: Path | None = None,
    access_log: type[AbstractAccessLogger] | None = None,
) -> tuple[web.AppRunner, int]:
    """Serve an app on the port that is set, or on a unix socket at `path`.

    access_log  writes the line of each request on the port, if they are to be logged
    Returns (what to clean up, the port; 0 for a path). Raises ConfigError for a port in use.
    """
    if access_log is None or settings.access_log == "off" or path is not None:  # the supervisor logs what it relays
        runner = web.AppRunner(app, access_log=None)
    else:
        runner = web.AppRunner(app, access_log_class=access_log)
    await runner.setup()
    if path is not None:
        await web.UnixSite(runner, str(path)).start()
        return runner, 0
    try:
        await web.TCPSite(runner, settings.host.strip("[]"), settings.http_port).start()
    except OSError as error:
        raise ConfigError(
            f"can't listen on {settings.host}:{settings.http_port} for HTTP: {error.strerror}; choose with --http-port",
            field="http_port",
        ) from error
    return runner, runner.addresses[0][1]
