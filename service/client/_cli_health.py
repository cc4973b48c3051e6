"""`rnnserve health`: for the health checks of containers, so it imports as little as it can."""

from __future__ import annotations

import time
from typing import Any

import click

from service.client._channel import HEALTH_CHECK, ChannelSettings
from service.client._cli_options import complete_models, server_options, settings_of

SERVING = 1
"""HealthCheckResponse.ServingStatus."""
INTERVAL_S = 0.2


@click.command(short_help="Tell whether the server, or one model, is ready.")
@click.option(
    "--model",
    default="",
    metavar="NAME",
    shell_complete=complete_models,
    help='Ask about one model, as "name" or "name/version".',
)
@click.option("--timeout", default=5.0, show_default=True, metavar="SECONDS", help="Longest time for an answer.")
@click.option("--wait", default=0.0, metavar="SECONDS", help="Ask again until it is healthy, for that long.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing.")
@server_options
@click.pass_context
def health(ctx: click.Context, /, model: str, timeout: float, wait: float, *, quiet: bool, **options: Any) -> None:
    """Tell whether the server, or one model, is ready: exit code 0 if so, else 1."""
    settings = settings_of(**options)
    give_up_at = time.monotonic() + wait
    while True:
        is_healthy, why = _ask(settings, model, timeout)
        if is_healthy or time.monotonic() + INTERVAL_S > give_up_at:
            break
        time.sleep(INTERVAL_S)
    if not quiet:
        click.echo(f"{model or settings.address}: {why}", err=not is_healthy)
    ctx.exit(0 if is_healthy else 1)


def _ask(settings: ChannelSettings, service: str, timeout_s: float) -> tuple[bool, str]:
    """Ask once: whether it is healthy, and why or why not. Protobuf is left out: the messages have one field each."""
    import grpc

    name = service.encode()
    request = b"\x0a" + _varint(len(name)) + name if name else b""
    options = settings.channel_options()
    channel = (
        grpc.secure_channel(settings.address, settings.credentials(), options=options)
        if settings.is_secure
        else grpc.insecure_channel(settings.address, options=options)
    )
    with channel:
        try:
            check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(HEALTH_CHECK)
            answer = check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            words = error.code().name.lower().replace("_", " ")
            return False, f"{words}: {error.details()}" if error.details() else words
    return (True, "healthy") if answer == bytes([0x08, SERVING]) else (False, "not serving")


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])
