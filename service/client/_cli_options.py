"""Options that every subcommand of the client has, and the client that they make."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from service.client._channel import DEFAULT_TARGET, ChannelSettings
from service.client.errors import RnnserveError

if TYPE_CHECKING:
    from service.client._sync import Client

COMPLETION_S = 1.0
"""Longest time that the names of models are waited for."""
F = TypeVar("F", bound=Callable[..., Any])
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_OPTIONS = (
    click.option(
        "--server",
        envvar="RNNSERVE_SERVER",
        default=DEFAULT_TARGET,
        show_default=True,
        show_envvar=True,
        metavar="HOST:PORT",
        help="Server to ask.",
    ),
    click.option("--tls", is_flag=True, help="Encrypt, and check the server's certificate."),
    click.option("--ca", type=_FILE, help="PEM file of the authorities to trust; turns --tls on."),
    click.option("--cert", type=_FILE, help="PEM file of the certificate to show; turns --tls on."),
    click.option("--key", type=_FILE, help="PEM file of its private key."),
)
priority_option = click.option(
    "--priority",
    type=click.Choice(["high", "normal", "low"]),
    default="normal",
    show_default=True,
    help="Which work of the model goes first.",
)
text_option = click.option(
    "--text", "is_text", is_flag=True, help="What stands for a FILE is a text itself, a character a timestep."
)


def server_options(command: F) -> F:
    """Add --server and the options of TLS."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def settings_of(server: str, *, tls: bool, ca: Path | None, cert: Path | None, key: Path | None) -> ChannelSettings:
    """Make what the options say. Raises click.UsageError."""
    try:
        return ChannelSettings(
            target=server,
            tls=tls,
            root_certificates=_content(ca),
            client_certificate=_content(cert),
            client_key=_content(key),
        )
    except RnnserveError as error:
        raise click.UsageError("--cert and --key go together") from error


def client_of(options: dict[str, Any]) -> Client:
    """Take the server's options out of a subcommand's, and make the client that they say. Raises click.UsageError."""
    from service.client._sync import Client

    names = ("server", "tls", "ca", "cert", "key")
    settings = settings_of(**{name: options.pop(name) for name in names})
    return Client(
        settings.target,
        tls=settings.tls,
        root_certificates=settings.root_certificates,
        client_certificate=settings.client_certificate,
        client_key=settings.client_key,
    )


def complete_models(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Name the models of the server that the command line names, if it answers quickly; nothing else imports gRPC."""
    given = {name: context.params.get(name) for name in ("server", "tls", "ca", "cert", "key")}
    given["server"] = given["server"] or os.environ.get("RNNSERVE_SERVER") or DEFAULT_TARGET
    try:
        with client_of(given) as client:
            names = {model.name for model in client.models(timeout=COMPLETION_S)}
    except (RnnserveError, click.UsageError):
        return []
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


def complete_files(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Have the shell name files."""
    return [CompletionItem(incomplete, type="file")]


def _content(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()
