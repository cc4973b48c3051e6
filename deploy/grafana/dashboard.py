"""Write dashboards/rnnserve.json, the dashboard of Grafana, from the panels below.

python deploy/grafana/dashboard.py [--check]: with --check, only fail unless it is what would be written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "dashboards" / "rnnserve.json"
SOURCE = {"type": "prometheus", "uid": "prometheus"}
"""As provisioning/datasources/prometheus.yml names it."""
CHOSEN = 'model=~"$model", version=~"$version"'
MAIN = f'{CHOSEN}, graph="main"'
"""Of the graph that is stepped; an encoder before it has `graph="encoder"`."""
WIDTH, HEIGHT = 24, 8
"""Columns of Grafana's grid, and rows of a panel."""
QUANTILES = (0.5, 0.9, 0.99)
STREAMS = ".*Stream.*|.*/Generate|.*/Watch|.*/ServerReflectionInfo"
"""Methods whose calls last for as long as their client likes."""

Query = tuple[str, str]
"""PromQL, and the legend of its series."""
Panel = dict[str, Any]


def rate(metric: str, labels: str = MAIN, by: str = "model, version") -> str:
    """PromQL of a sum of rates."""
    return f"sum by ({by}) (rate({metric}{{{labels}}}[$__rate_interval]))"


def total(metric: str, by: str = "model, version", labels: str = CHOSEN) -> str:
    """PromQL of a sum."""
    return f"sum by ({by}) ({metric}{{{labels}}})"


def quantiles(metric: str, labels: str = MAIN, by: str = "") -> list[Query]:
    """Ask for quantiles of a histogram."""
    legend = f" {{{{{by}}}}}" if by else ""
    inner = rate(f"{metric}_bucket", labels, f"le, {by}" if by else "le")
    return [(f"histogram_quantile({q}, {inner})", f"p{q * 100:g}{legend}") for q in QUANTILES]


def panel(title: str, unit: str, queries: list[Query], text: str = "", kind: str = "timeseries", **more: Any) -> Panel:
    """Make a panel, without its place."""
    instant = kind in ("stat", "table")
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": SOURCE,
            "expr": expr,
            "legendFormat": legend,
            "instant": instant,
            "format": "table" if kind == "table" else "time_series",
        }
        for number, (expr, legend) in enumerate(queries)
    ]
    return {
        "type": kind,
        "title": title,
        "description": text,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": targets,
        **more,
    }


def heatmap(title: str, query: str, text: str) -> Panel:
    """Show a histogram over time."""
    made = panel(title, "short", [(query, "{{le}}")], text, "heatmap")
    made["targets"][0]["format"] = "heatmap"
    made["options"] = {"calculate": False, "color": {"mode": "scheme", "scheme": "Oranges"}, "yAxis": {"unit": "short"}}
    return made


EACH = "{{model}}/{{version}}"
ROWS: dict[str, list[Panel]] = {
    "Overview": [
        panel("Ready", "bool_yes_no", [("min(rnnserve_ready)", "ready")], "As /readyz says.", "stat"),
        panel("Steps per second", "ops", [(rate("rnnserve_steps_total"), EACH)]),
        panel("Live sessions", "short", [(total("rnnserve_sessions"), EACH)]),
        panel("Requests per second", "reqps", [(rate("rnnserve_requests_total", CHOSEN, "outcome"), "{{outcome}}")]),
        panel(
            "Rejected per second, by reason",
            "reqps",
            [(rate("rnnserve_rejected_total", CHOSEN, "reason") + " > 0", "{{reason}}")],
        ),
        panel(
            "Sessions per second: opened, and ended by cause",
            "ops",
            [
                (f"sum({rate('rnnserve_sessions_opened_total', CHOSEN)})", "opened"),
                (rate("rnnserve_sessions_closed_total", CHOSEN, "cause"), "{{cause}}"),
            ],
        ),
    ],
    "Latency": [
        panel(
            "Request: from its arrival until its last step is computed",
            "s",
            quantiles("rnnserve_request_duration_seconds"),
        ),
        panel("Queue: from its arrival until its first run", "s", quantiles("rnnserve_queue_duration_seconds")),
        panel("Compute: one run of onnxruntime", "s", quantiles("rnnserve_run_duration_seconds")),
        panel("Generate: to the first output", "s", quantiles("rnnserve_time_to_first_output_seconds", CHOSEN)),
        panel("Generate: between outputs", "s", quantiles("rnnserve_time_between_outputs_seconds", CHOSEN)),
        panel(
            "Generate: outputs per second", "ops", [(rate("rnnserve_generated_outputs_total", CHOSEN) + " > 0", EACH)]
        ),
    ],
    "Batching": [
        heatmap(
            "Batch size",
            f"sum by (le) (increase(rnnserve_batch_size_bucket{{{MAIN}}}[$__rate_interval]))",
            "Sequences advanced by one run.",
        ),
        panel(
            "Mean batch size",
            "short",
            [(f"{rate('rnnserve_batch_size_sum')} / {rate('rnnserve_batch_size_count')}", EACH)],
        ),
        panel(
            "Runs per second, encoders' too",
            "ops",
            [(rate("rnnserve_runs_total", CHOSEN, "model, version, graph"), f"{EACH} {{{{graph}}}}")],
        ),
        panel("Queued steps", "short", [(total("rnnserve_queued_steps"), EACH)]),
        panel(
            "Share of time in onnxruntime",
            "percentunit",
            [(rate("rnnserve_run_duration_seconds_sum", CHOSEN), EACH)],
            "1 is one core's time, without what --compute-threads adds.",
        ),
    ],
    "gRPC": [
        panel(
            "Calls begun per second",
            "reqps",
            [("sum by (grpc_method) (rate(grpc_server_call_started_total[$__rate_interval]))", "{{grpc_method}}")],
        ),
        panel(
            "Calls ended per second, by status",
            "reqps",
            [
                (
                    "sum by (grpc_status) (rate(grpc_server_call_duration_seconds_count[$__rate_interval]))",
                    "{{grpc_status}}",
                )
            ],
        ),
        panel(
            "Duration of calls without streams",
            "s",
            quantiles("grpc_server_call_duration_seconds", f'grpc_method!~"{STREAMS}"', "grpc_method"),
        ),
        panel(
            "Bytes per second, of calls that ended",
            "Bps",
            [
                (
                    f"sum(rate(grpc_server_call_{way}_total_compressed_message_size_bytes_sum[$__rate_interval]))",
                    legend,
                )
                for way, legend in (("rcvd", "received"), ("sent", "sent"))
            ],
        ),
    ],
    "Resources": [
        panel("CPU", "cores", [("sum(rate(process_cpu_seconds_total[$__rate_interval]))", "cores")]),
        panel("Memory", "bytes", [("sum(process_resident_memory_bytes)", "resident")]),
        panel(
            "File descriptors",
            "short",
            [("sum(process_open_fds)", "open"), ("min(process_max_fds)", "limit of a process")],
        ),
        panel(
            "Share in use: of state slots, and of max_sessions",
            "percentunit",
            [
                (
                    f"{total('rnnserve_slots_used', labels=MAIN)} / {total('rnnserve_slots', labels=MAIN)}",
                    f"slots {EACH}",
                ),
                (f"{total('rnnserve_sessions')} / {total('rnnserve_max_sessions')}", f"sessions {EACH}"),
            ],
        ),
        panel(
            "States of sessions",
            "short",
            [
                (f"sum({total('rnnserve_sessions_resident')})", "in memory"),
                (f"sum({total('rnnserve_sessions_spilled')})", "in the spill store"),
            ],
        ),
        panel(
            "Workers",
            "short",
            [("sum(rnnserve_workers)", "ready"), ("sum(rnnserve_worker_restarts_total)", "restarts so far")],
            "Of a server with --workers over 1.",
        ),
    ],
    "Repository": [
        panel("Broken versions", "short", [("max(rnnserve_broken_models)", "broken")], kind="stat"),
        panel(
            "Batches are exact",
            "short",
            [(f"max by (model, version, verdict) (rnnserve_model_exactness{{{CHOSEN}}})", "")],
            "The probe's verdict at load: whether a batch computes what its sequences get alone.",
            "table",
        ),
        panel(
            "Load time",
            "s",
            [(f"max by (model, version) (rnnserve_model_load_duration_seconds{{{CHOSEN}}})", EACH)],
            kind="stat",
        ),
        panel(
            "Build",
            "short",
            [("max by (version, onnxruntime, python, provider) (rnnserve_build_info)", "")],
            kind="table",
        ),
    ],
}


def variable(name: str, metric: str) -> dict[str, Any]:
    """Choose some values of a label, or all."""
    query = f"label_values({metric}, {name})"
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def dashboard() -> dict[str, Any]:
    """Put the panels in their places, three or four abreast."""
    placed: list[Panel] = []
    y = 0
    for title, panels in ROWS.items():
        placed.append({"type": "row", "title": title, "collapsed": False, "panels": [], **_at(0, y, WIDTH, 1)})
        y += 1
        most = 4 if len(panels) == 4 else 3
        for start in range(0, len(panels), most):
            abreast = panels[start : start + most]
            width = WIDTH // len(abreast)
            placed += [{**each, **_at(column * width, y, width, HEIGHT)} for column, each in enumerate(abreast)]
            y += HEIGHT
    return {
        "uid": "rnnserve",
        "title": "rnnserve",
        "schemaVersion": 39,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "graphTooltip": 1,
        "templating": {
            "list": [variable("model", "rnnserve_slots"), variable("version", 'rnnserve_slots{model=~"$model"}')]
        },
        "panels": [{"id": number, **each} for number, each in enumerate(placed, 1)],
    }


def _at(x: int, y: int, width: int, height: int) -> Panel:
    return {"gridPos": {"x": x, "y": y, "w": width, "h": height}}


def main() -> int:
    """Write the file, or compare."""
    text = json.dumps(dashboard(), indent=1) + "\n"
    if sys.argv[1:] != ["--check"]:
        FILE.write_text(text, encoding="utf-8")
    elif not FILE.exists() or FILE.read_text(encoding="utf-8") != text:
        print(f"{FILE} is not what {__file__} writes: run it")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
