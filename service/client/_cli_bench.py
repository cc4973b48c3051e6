"""`rnnserve bench`: load a running server, and print rates and latencies."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from service.client._cli_options import client_of, complete_models, server_options

if TYPE_CHECKING:
    from service.client.load import Measured


@click.command(
    short_help="Load a server, and print rates and latencies.",
    epilog="""\b
Examples:
  rnnserve bench lstm --streams 1,16,64                          one step a message, closed loop
  rnnserve bench lstm --streams 64 --rate 50                     the same, 50 a second of each, paced
  rnnserve bench lstm --steps 16                                 chunks of 16 steps
  rnnserve bench lstm --kind frames --sessions 256 --streams 1   one message for 256 sessions
  rnnserve bench lstm --kind predict --sessions 64 --longest 200 whole sequences of 1 to 200 steps
""",
)
@click.argument("model", shell_complete=complete_models)
@click.option(
    "--kind",
    type=click.Choice(["steps", "frames", "predict"]),
    default="steps",
    show_default=True,
    help="One session a stream, many sessions in each message, or whole sequences in calls of Predict.",
)
@click.option("--streams", default="1,16,64", show_default=True, help="Concurrent streams or calls; several: a ramp.")
@click.option("--steps", type=click.IntRange(1), default=1, show_default=True, help="Steps of a session in a message.")
@click.option("--sessions", type=click.IntRange(1), default=1, show_default=True, help="Sessions in a frame or a call.")
@click.option("--longest", type=click.IntRange(0), default=0, help="Predict: lengths are spread over 1..longest.")
@click.option(
    "--rate", type=click.FloatRange(0), default=0.0, help="Messages a second of each stream; else closed loop."
)
@click.option(
    "--connections", type=click.IntRange(1), default=4, show_default=True, help="Most connections for the streams."
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
    connections: int,
    seconds: float,
    *,
    as_json: bool,
    **options: Any,
) -> None:
    """Load a server with MODEL's steps, and print rates and latencies.

    In a closed loop the next message is sent when the last is answered. Paced load (--rate) is the honest kind: a
    message is sent when it is due, and its latency counts from then; "late" is how late this client sent the latest
    1 in 100, which is part of their latency. Steps that the server has no room for are counted as refused.
    """
    from service.client.load import Load, drive, run

    target = options["server"]
    if any(options[name] for name in ("tls", "ca", "cert", "key")):
        raise click.UsageError("bench speaks to servers without TLS only")
    if sessions > 1 and kind == "steps":
        raise click.UsageError("--sessions is for --kind frames and --kind predict; --streams opens more streams")
    if longest and kind != "predict":
        raise click.UsageError("--longest is for --kind predict")
    ramp = _ramp(streams)
    with client_of(options) as client:
        info = client.model(model)
    if not as_json:
        click.echo(f"{info.name}/{info.version} on {target}: {_words(kind, steps, sessions, longest, rate)}")
        click.echo(_header(is_paced=bool(rate)))
    for number in ramp:
        load = Load(
            kind=kind,
            streams=number,
            steps=steps,
            sessions=sessions,
            longest=longest,
            rate=rate,
            connections=connections,
        )
        row = _row(number, run(drive(target, info, load, seconds=seconds)))
        click.echo(json.dumps(row) if as_json else _line(row))


def _ramp(streams: str) -> list[int]:
    try:
        ramp = [int(part) for part in streams.split(",")]
    except ValueError:
        ramp = []
    if not ramp or min(ramp) < 1:
        raise click.BadParameter(f"expected numbers such as 1,16,64, got {streams!r}", param_hint="--streams")
    return ramp


def _words(kind: str, steps: int, sessions: int, longest: int, rate: float) -> str:
    """Say what is sent, and when."""
    length = f"1 to {longest} steps" if longest else f"{steps} step{'s' if steps > 1 else ''}"
    many = {"steps": "", "frames": f" of each of {sessions} sessions", "predict": f", {sessions} sequences"}[kind]
    where = "a call of Predict" if kind == "predict" else "a message"
    pace = f"paced, {rate:g} a second of each stream" if rate else "closed loop"
    return f"{length}{many} {where}, {pace}"


def _row(streams: int, measured: Measured) -> dict[str, Any]:
    """What is printed; JSON has no NaN, so it is None where nothing was answered."""
    from service.client.load import percentile

    columns = {f"p{percent}_ms": (measured.latencies_ms, percent) for percent in (50, 90, 99)}
    if len(measured.late_ms):
        columns["late_p99_ms"] = (measured.late_ms, 99)
    return {
        "streams": streams,
        "seconds": measured.seconds,
        "steps_per_s": measured.steps_per_s,
        "messages_per_s": measured.messages_per_s,
        "refused_steps": dict(measured.refused_steps),
        **{name: percentile(values, p) if len(values) else None for name, (values, p) in columns.items()},
    }


def _header(*, is_paced: bool) -> str:
    names = ["p50 ms", "p90 ms", "p99 ms", *(["late ms"] if is_paced else [])]
    columns = " ".join(f"{name:>8}" for name in names)
    return f"{'streams':>8} {'steps/s':>10} {'messages/s':>11} {columns} {'refused':>9}"


def _line(row: dict[str, Any]) -> str:
    names = ["p50_ms", "p90_ms", "p99_ms", *(["late_p99_ms"] if "late_p99_ms" in row else [])]
    columns = " ".join("       -" if row[name] is None else f"{row[name]:>8.2f}" for name in names)
    rates = f"{row['steps_per_s']:>10.0f} {row['messages_per_s']:>11.0f}"
    return f"{row['streams']:>8} {rates} {columns} {sum(row['refused_steps'].values()):>9}"
