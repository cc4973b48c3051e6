"""What `rnnserve serve` prints when it is ready."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from service.repository import Loaded

log = logging.getLogger(__name__)
Line = tuple[str, str | None]
"""What is said, and in which colour; None for none."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a repository holds, in words."""

    models: list[Line]
    """For each version that is served: what it is, on which provider, what fell back, and what batching does to it."""
    broken: list[str]
    """For each that is not: the reason."""

    def show(self, host: str, port: int, http_port: int, *, num_workers: int = 1) -> None:
        """Print it, and where it is served; what is broken is logged."""
        workers = f", {num_workers} workers" if num_workers > 1 else ""
        click.echo(f"rnnserve {version('rnnserve')}: gRPC on {host}:{port}, HTTP on http://{host}:{http_port}{workers}")
        for line, colour in self.models:
            click.secho(f"  {line}", fg=colour)
        for line in self.broken:
            log.error("BROKEN %s", line)
        if not self.models:
            log.error(
                "no model is served: `rnnserve export` writes one, MODEL/1/model.onnx in the repository; only --watch "
                "sees it before the next start"
            )
        click.echo("ready")
        sys.stdout.flush()


def announcement_of(loaded: Loaded) -> Announcement:
    """Describe what was loaded."""
    models: list[Line] = []
    for lane in loaded.lanes:
        spec = lane.backend.spec
        layers = "+".join(f"{'bi' if each.directions == 2 else ''}{each.cell}{each.hidden}" for each in spec.layers)
        text = (
            f"{lane.name}/{lane.version}  {layers} {spec.topology}, {lane.step_mode.value}, {lane.backend.provider}, "
            f"{lane.exactness.verdict} ({lane.exactness.detail})"
        )
        models.append((text, None))
        placement = lane.backend.placement
        if placement.fallbacks:
            models.append((f"  {placement}", "yellow" if placement.recurrent_fallbacks else None))
    return Announcement(models, [f"{b.name}/{b.version or '?'}: {b.error}" for b in loaded.broken])
