"""Numbers that change, as JSON: the page asks for them every second and takes differences."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from service.engine import Engine
from service.lane import Lane

Json = dict[str, Any]
COUNTS = ("sessions", "queued_steps", "steps", "sequences", "runs", "run_rows", "run_seconds", "rejected")
"""What is told of each model version; all may be summed over workers."""


def stats_of(engine: Engine) -> Json:
    """Read the counters; `time` is in seconds, on a clock that never goes back."""
    return {
        "time": time.monotonic(),
        "is_draining": engine.is_draining,
        "workers": 1,
        "models": [_lane_stats(lane) for lane in engine.lanes],
    }


def _lane_stats(lane: Lane) -> Json:
    tally = lane.tally
    return {
        "name": lane.name,
        "version": lane.version,
        "sessions": lane.num_sessions,
        "queued_steps": lane.num_queued_steps,
        "steps": tally.steps,
        "sequences": tally.sequences,
        "runs": tally.runs,
        "run_rows": tally.run_rows_sum,
        "run_seconds": tally.run_seconds,
        "rejected": sum(tally.rejected.values()),
    }


def sum_stats(parts: Iterable[Json]) -> Json:
    """Add the numbers of the workers of one server up."""
    total: Json = {"time": time.monotonic(), "is_draining": False, "workers": 0, "models": []}
    by_version: dict[tuple[str, int], Json] = {}
    for part in parts:
        total["is_draining"] |= part["is_draining"]
        total["workers"] += part["workers"]
        for model in part["models"]:
            known = by_version.setdefault((model["name"], model["version"]), dict.fromkeys(COUNTS, 0))
            by_version[model["name"], model["version"]] = {
                **model,
                **{name: known[name] + model[name] for name in COUNTS},
            }
    total["models"] = [model for _, model in sorted(by_version.items())]
    return total
