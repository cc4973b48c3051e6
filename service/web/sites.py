"""Where HTTP is listened for: a port, or a unix socket."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

from service.config import Settings
from service.errors import ConfigError


async def listen(app: web.Application, settings: Settings, path: Path | None = None) -> tuple[web.AppRunner, int]:
    """Serve an app on the port that is set, or on a unix socket at `path`.

    Returns (what to clean up, the port; 0 for a path). Raises ConfigError for a port in use.
    """
    runner = web.AppRunner(app, access_log=None)
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
