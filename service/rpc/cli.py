"""`rnnserve serve`."""

from __future__ import annotations

import logging
import os
from collections.abc import Coroutine
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.rpc.flags import settings_options

if TYPE_CHECKING:
    from service.config import Settings

log = logging.getLogger(__name__)


@click.command(short_help="Serve a repository of models over gRPC.")
@click.option("--config", type=click.Path(path_type=Path), help="TOML file of settings, below flags and environment.")
@click.option("--print-config", is_flag=True, help="Print every setting as TOML, with where it is from, and end.")
@settings_options
def serve(config: Path | None, *, print_config: bool, **flags: str | None) -> None:
    """Serve a repository of models over gRPC, with metrics and probes over HTTP.

    SIGTERM or Ctrl-C drains: what is new is refused, live streams get --drain-s to end.
    """
    # Read by gRPC's core when it is imported: its event-engine listener costs more than the older one here.
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
    if find_spec("onnxruntime") is None and not print_config:
        _end("serving needs onnxruntime: pip install 'rnnserve[cpu]', or 'rnnserve[gpu]' on a machine with CUDA", 2)

    from service.config import load_settings, sources_of, write_toml
    from service.errors import ConfigError
    from service.logs import log_to_stderr

    given = {name: value for name, value in flags.items() if value is not None}
    form = "text"
    try:
        settings = load_settings(given, config)
        form = settings.log_format
        log_to_stderr(settings.log_level, settings.log_format, who="supervisor" if settings.workers > 1 else "")
        _warn_of_variables()
        if print_config:
            click.echo(write_toml(settings, sources_of(given, config)), nl=False)
            return
        if settings.workers > 1:
            _supervise(settings)
        else:
            _serve(settings)
    except ConfigError as error:
        code = 2 if error.field else 1
        if form == "json":
            log.critical(str(error))
            raise SystemExit(code) from None
        _end(str(error), code)


def _warn_of_variables() -> None:
    from service.config import unknown_variables

    for name, meant in unknown_variables().items():
        log.warning("the environment variable %s sets nothing%s", name, f": did you mean {meant}?" if meant else "")


def _serve(settings: Settings) -> None:
    from service.repository import load_repository
    from service.rpc import server
    from service.rpc.announcement import announcement_of

    loaded = load_repository(settings)
    announcement = announcement_of(loaded)
    _run(server.run(settings, loaded, lambda it: announcement.show(settings.host, it.port, it.http_port)))


def _supervise(settings: Settings) -> None:
    import asyncio

    from service.rpc import supervisor

    asyncio.run(supervisor.run(settings))  # not uvloop, whose children inherit more than they are given


def _run(serving: Coroutine[Any, Any, None]) -> None:
    import asyncio

    try:
        import uvloop
    except ModuleNotFoundError:  # it is not made for Windows
        asyncio.run(serving)
    else:
        uvloop.run(serving)


def _end(message: str, code: int) -> None:
    click.echo(f"error: {message}", err=True)
    raise SystemExit(code)
