"""Numbers that change, as JSON: the page asks for them every second and takes differences."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from service.engine import Engine
from service.holdings import Broken
from service.lane import Lane

Json = dict[str, Any]


def stats_of(engine: Engine, broken: Sequence[Broken]) -> Json:
    """Read the counters; `time` is in seconds, on a clock that never goes back."""
    return {
        "time": time.monotonic(),
        "is_draining": engine.is_draining,
        "workers": 1,
        "broken": len(broken),
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
