"""`rnnserve bench`: load a running server, and print rates and latencies."""

from __future__ import annotations

import json
from typing import Any

import click

from service.client._cli_options import client_of, server_options


@click.command(short_help="Load a server, and print rates and latencies.")
@click.argument("model")
@click.option("--kind", type=click.Choice(["steps", "frames", "predict"]), default="steps", help="What to send.")
@click.option("--streams", default="1,16,64", show_default=True, help="Concurrent streams or calls; several: a ramp.")
@click.option("--steps", type=click.IntRange(1), default=1, show_default=True, help="Steps of a session in a message.")
@click.option("--sessions", type=click.IntRange(1), default=1, show_default=True, help="Sessions in a frame or a call.")
@click.option("--longest", type=click.IntRange(0), default=0, help="Predict: lengths are spread over 1..longest.")
@click.option(
    "--rate", type=click.FloatRange(0), default=0.0, help="Messages a second of each stream; else closed loop."
)
@click.option("--seconds", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="Time for each line.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line.")
@server_options
def bench(
    model: str,
    kind: Any,
    streams: str,
    steps: int,
    sessions: int,
    longest: int,
    rate: float,
    seconds: float,
    *,
    as_json: bool,
    **options: Any,
) -> None:
    """Load a server with MODEL's steps, and print rates and latencies.

    Paced load (--rate) is the honest kind: a message is sent when it is due, and its latency counts from then.
    """
    import asyncio

    from service.client.load import Load, drive

    target = options["server"]
    if any(options[name] for name in ("tls", "ca", "cert", "key")):
        raise click.UsageError("bench speaks to servers without TLS only")
    ramp = _ramp(streams)
    with client_of(options) as client:
        info = client.model(model)
    if not as_json:
        click.echo(f"{info.name}/{info.version} on {target}: {kind}, {'paced' if rate else 'closed loop'}")
        click.echo(f"{'streams':>8} {'steps/s':>10} {'messages/s':>11} {'p50 ms':>8} {'p90 ms':>8} {'p99 ms':>8}")
    for number in ramp:
        load = Load(kind=kind, streams=number, steps=steps, sessions=sessions, longest=longest, rate=rate)
        measured = asyncio.run(drive(target, info, load, seconds=seconds))
        p50, p90, p99 = (measured.percentile_ms(percent) for percent in (50, 90, 99))
        messages_per_s = len(measured.latencies_ms) / measured.seconds
        if as_json:
            row = {"streams": number, "steps_per_s": measured.steps_per_s, "messages_per_s": messages_per_s}
            click.echo(json.dumps({**row, "p50_ms": p50, "p90_ms": p90, "p99_ms": p99}))
        else:
            click.echo(
                f"{number:>8} {measured.steps_per_s:>10.0f} {messages_per_s:>11.0f} {p50:>8.2f} {p90:>8.2f} {p99:>8.2f}"
            )


def _ramp(streams: str) -> list[int]:
    try:
        ramp = [int(part) for part in streams.split(",")]
    except ValueError:
        ramp = []
    if not ramp or min(ramp) < 1:
        raise click.BadParameter(f"expected numbers such as 1,16,64, got {streams!r}", param_hint="--streams")
    return ramp
