"""`rnnserve serve`: one flag for every setting, made from the settings themselves."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from service.repository import Loaded
    from service.rpc.server import Server


def _settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for every field of Settings; its help is the text under the field."""
    from service.config import PREFIX, Settings

    for name, field in reversed(Settings.model_fields.items()):
        default = "" if field.is_required() or field.default is None else f"  [default: {field.default}]"
        command = click.option(
            f"--{name.replace('_', '-')}",
            name,
            metavar="VALUE",
            default=None,
            help=f"{field.description}{default}  [env: {PREFIX}{name.upper()}]",
        )(command)
    return command


@click.command(short_help="Serve a repository of models over gRPC.")
@click.option("--config", type=click.Path(path_type=Path), help="TOML file of settings, below flags and environment.")
@_settings_options
def serve(config: Path | None, **flags: str | None) -> None:
    """Serve a repository of models over gRPC, with metrics and probes over HTTP.

    SIGTERM or Ctrl-C drains: what is new is refused, live streams get --drain-s to end.
    """
    # Read by gRPC's core when it is imported: its event-engine listener costs more than the older one here.
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
    if find_spec("onnxruntime") is None:
        _end("serving needs onnxruntime: pip install 'rnnserve[cpu]', or 'rnnserve[gpu]' on a machine with CUDA", 2)

    import logging

    from service.config import load_settings
    from service.errors import ConfigError
    from service.repository import load_repository
    from service.rpc import server

    try:
        settings = load_settings({name: value for name, value in flags.items() if value is not None}, config)
        logging.basicConfig(
            level=settings.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        loaded = load_repository(settings)
        _run(server.run(settings, loaded, lambda running: _announce(running, loaded)))
    except ConfigError as error:
        _end(str(error), 2 if error.field else 1)


def _run(serving: Any) -> None:
    import asyncio

    try:
        import uvloop
    except ModuleNotFoundError:  # it is not made for Windows
        asyncio.run(serving)
    else:
        uvloop.run(serving)


def _announce(server: Server, loaded: Loaded) -> None:
    """Print what is served, where, on which provider, what fell back, and what batching does to its numbers."""
    host = server.settings.host
    click.echo(
        f"rnnserve {version('rnnserve')}: gRPC on {host}:{server.port}, HTTP on http://{host}:{server.http_port}"
    )
    for lane in server.engine.lanes:
        spec = lane.backend.spec
        layers = "+".join(
            f"{'bi' if d == 2 else ''}{spec.cell}{h}" for d, h in zip(spec.directions, spec.hidden, strict=True)
        )
        click.echo(
            f"  {lane.name}/{lane.version}  {layers} {spec.topology}, {lane.step_mode.value}, {lane.backend.provider}, "
            f"{lane.exactness.verdict} ({lane.exactness.detail})"
        )
        placement = lane.backend.placement
        if placement.fallbacks:
            click.secho(f"    {placement}", fg="yellow" if placement.recurrent_fallbacks else None)
    for broken in loaded.broken:
        click.secho(f"  BROKEN {broken.name}/{broken.version or '?'}: {broken.error}", fg="red", err=True)
    if not server.engine.lanes:
        click.secho("  no model is served", fg="red", err=True)
    click.echo("ready")
    sys.stdout.flush()


def _end(message: str, code: int) -> None:
    click.echo(f"error: {message}", err=True)
    raise SystemExit(code)
