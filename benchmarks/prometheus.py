"""A Prometheus of our own that watches one server, and the dashboard's queries as Grafana would send them to it."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.processes import free_port

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv-compat" / "bin"
PROGRAM, TOOL = BIN / "prometheus", BIN / "promtool"
"""Where `make test-compat` puts them."""
DEPLOY = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "rnnserve.json"
SCRAPE_S = 0.5
READY_S = 20.0


@dataclass(frozen=True)
class Watcher:
    """A running Prometheus."""

    port: int

    def ask(self, path: str, **parameters: object) -> Any:
        """Ask its API. Raises RuntimeError with what it answers to a wrong query."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/{path}?{query}", timeout=10) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{parameters}: {error.read().decode()}") from error

    def at(self, expr: str, when: float) -> list[tuple[dict[str, str], float]]:
        """Values of an expression at a time: (labels, value) of each series."""
        found = self.ask("query", query=expr, time=when)["result"]
        return [(each["metric"], float(each["value"][1])) for each in found]

    def over(
        self, expr: str, start: float, stop: float, step_s: float
    ) -> list[tuple[dict[str, str], list[float], list[float]]]:
        """Values of an expression over time: (labels, times, values) of each series."""
        found = self.ask("query_range", query=expr, start=start, end=stop, step=step_s)["result"]
        return [
            (each["metric"], [float(at) for at, _ in each["values"]], [float(value) for _, value in each["values"]])
            for each in found
        ]

    def scraped_since(self, when: float) -> bool:
        """Whether the server has been scraped after a time."""
        found = self.at('timestamp(up{job="rnnserve"})', time.time())
        return bool(found) and found[0][1] > when


@contextlib.contextmanager
def watching(http_port: int, folder: Path) -> Iterator[Watcher]:
    """Run Prometheus as deploy/prometheus configures it, but for the address and the interval, until the block ends."""
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": f"{SCRAPE_S * 1000:g}ms", "evaluation_interval": f"{SCRAPE_S * 1000:g}ms"}
    [job] = config["scrape_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{http_port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    shutil.copy(DEPLOY / "alerts.yml", folder)
    watcher = Watcher(free_port())
    command = [PROGRAM, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        address = f"--web.listen-address=127.0.0.1:{watcher.port}"
        process = subprocess.Popen([*command, address], stdout=log, stderr=log)
        try:
            _until_it_scrapes(watcher, process, folder / "log")
            yield watcher
        finally:
            process.terminate()
            process.wait()


def _until_it_scrapes(watcher: Watcher, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + READY_S
    while True:
        with contextlib.suppress(OSError, RuntimeError):
            if watcher.scraped_since(0.0):
                return
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"Prometheus does not scrape:\n{log.read_text()}")
        time.sleep(0.05)


def panels() -> list[dict[str, Any]]:
    """Panels of the dashboard, rows among them."""
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return found


def filled_in(expr: str, interval: str) -> str:
    """A query of the dashboard as Grafana sends it, with all models chosen."""
    for name, value in (("$model", ".*"), ("$version", ".*"), ("$__rate_interval", interval)):
        expr = expr.replace(name, value)
    return expr


def finite(values: list[float]) -> list[float]:
    """Those that are numbers: a quantile of nothing is not."""
    return [value for value in values if math.isfinite(value)]
