"""What comes with the metrics agrees with them: documentation, dashboard, alerts, and Grafana's setup."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import yaml

from tests.metrics_table import FILE, families, table, written

ROOT = Path(__file__).resolve().parent.parent
GRAFANA = ROOT / "deploy" / "grafana"
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
NAMES = {f"{each.name}{suffix}" for each in families() for suffix in SUFFIXES[each.type]}


def named(text: str) -> set[str]:
    """Metrics of ours that a text speaks of."""
    return set(re.findall(r"\b(?:rnnserve|grpc_server)_\w+", text))


def test_the_table_of_metrics_is_what_the_server_shows() -> None:
    assert written() == table(), "write it again: python -m tests.metrics_table"


def test_names_follow_the_conventions_of_prometheus() -> None:
    for each in families():
        assert re.fullmatch(r"(rnnserve|grpc_server)_[a-z_]+", each.name)
        assert each.documentation.endswith(".")
        assert not each.name.endswith(("_total", "_count", "_sum", "_bucket", "_ms", "_us", "_mb")), each.name
        assert ("duration" in each.name or "time_" in each.name) == each.name.endswith("_seconds")


def test_the_dashboard_is_what_its_script_writes() -> None:
    done = subprocess.run(
        [sys.executable, GRAFANA / "dashboard.py", "--check"], check=False, capture_output=True, text=True
    )
    assert not done.returncode, done.stdout


def test_dashboard_and_alerts_name_metrics_that_are_there() -> None:
    dashboard = json.loads((GRAFANA / "dashboards" / "rnnserve.json").read_text())
    shown = {target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())}
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    for expr in [*shown, *(rule["expr"] for rule in rules)]:
        assert named(expr) <= NAMES, expr
    whole = {name.removesuffix("_total") for expr in shown for name in named(expr)}
    left_out = {each.name for each in families() if not any(name.startswith(each.name) for name in whole)}
    assert left_out == {"rnnserve_sequences", "rnnserve_spills", "rnnserve_restores", "rnnserve_spill_errors"}


def test_panels_do_not_overlap() -> None:
    dashboard = json.loads((GRAFANA / "dashboards" / "rnnserve.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_documentation_names_metrics_and_alerts_that_are_there() -> None:
    text = FILE.read_text()
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    assert re.findall(r"^\| (Rnnserve\w+) \|", text, re.MULTILINE) == [rule["alert"] for rule in rules]
    bare = {each.name for each in families()}
    assert named(text) <= NAMES | bare


def test_grafana_finds_the_dashboard_and_prometheus() -> None:
    service = COMPOSE["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in service["volumes"])
    places = {target: (ROOT / source) for source, target in mounts.items()}
    provisioning = places["/etc/grafana/provisioning"]
    [provider] = yaml.safe_load((provisioning / "dashboards" / "rnnserve.yml").read_text())["providers"]
    assert (places[provider["options"]["path"]] / "rnnserve.json").is_file()
    home = Path(service["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (places[str(home.parent)] / home.name).is_file()
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    dashboard = json.loads((places[provider["options"]["path"]] / "rnnserve.json").read_text())
    used = {target["datasource"]["uid"] for panel in dashboard["panels"] for target in panel.get("targets", ())}
    assert used == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    assert all(volume.endswith(":ro") for volume in service["volumes"])
    assert re.fullmatch(r"docker\.io/grafana/grafana:\d+\.\d+\.\d+", service["image"])
    assert service["environment"]["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


def test_prometheus_is_given_the_rules_that_it_names() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    mounted = {volume.split(":")[1] for volume in COMPOSE["prometheus"]["volumes"]}
    assert {f"/etc/prometheus/{name}" for name in config["rule_files"]} <= mounted
