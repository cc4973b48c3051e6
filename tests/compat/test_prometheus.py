"""Metrics, dashboard and alerts before a real Prometheus, with load on a server of two workers."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
import yaml

from benchmarks.processes import Process, rnnserve
from benchmarks.prometheus import DEPLOY, PROGRAM, SCRAPE_S, TOOL, Watcher, filled_in, finite, panels, watching
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.pb.rnnserve.v1 import rnnserve_pb2_grpc as pb_grpc
from tests.generating import save, tokens
from tests.onnx_models import build
from tests.rpc import Received, frame, open_stream, predict, sequences
from tests.workers import wait_until

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="`make test-compat` says why it could not install it")
INTERVAL = "3s"
LOAD_S = 4.0
QUERIES = [
    pytest.param(target["expr"], id=f"{panel['title']}-{target['refId']}")
    for panel in panels()
    for target in panel.get("targets", ())
]
RULES = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]


@dataclass
class Watched:
    """A server that had load, and who watched it."""

    server: Process
    watcher: Watcher
    began_at: float
    loaded_at: float
    """When the load was at its height."""
    ended_at: float
    num_steps: int
    num_gaps: int
    num_ids: int

    def value(self, expr: str, when: float | None = None) -> float:
        [(_, value)] = self.watcher.at(expr, when or self.ended_at)
        return value


def round_of_load(target: str, seed: int) -> tuple[int, int, int]:
    """Stream, predict, generate, and do what is refused, once each. Returns (steps, gaps, ids)."""
    xs = sequences(seed, 4, 30, 30)
    prompt = pb.Tensor(data=np.array([2, 3], np.int64).tobytes(), lengths=[1, 1])
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own: the kernel chooses the worker
    with grpc.insecure_channel(target, options=options) as channel:
        stub = pb_grpc.SequenceServiceStub(channel)
        opens = [pb.SessionOpen() for _ in xs]
        frames = [frame(*(x[t : t + 1] for x in xs), handles=[0, 1, 2, 3]) for t in range(30)]
        received = Received.all(stub.StreamPredict(iter([open_stream("steps", sessions=opens), *frames])))
        assert received.num_answers == 120
        predict(stub, "steps", xs)
        Received.all(stub.StreamPredict(iter([open_stream("steps"), frame(xs[0][:1], positions=[7])])))
        made = list(stub.Generate(pb.GenerateRequest(model="names", inputs=[prompt], max_steps=6)))
        source = pb.Tensor(name="x", data=np.zeros(5, np.int64).tobytes())
        list(stub.Generate(pb.GenerateRequest(model="translate", inputs=[source], max_steps=3)))
        with pytest.raises(grpc.RpcError):
            stub.GetModel(pb.GetModelRequest(model="nothing"))
    return 240, 1, sum(len(each.output.ids) for each in made)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    root = tmp_path_factory.mktemp("watched")
    build("lstm").save(root / "models", "steps")
    save(tokens(7), root / "models", "names")
    save(tokens(encoder=True, begin=True), root / "models", "translate")
    (root / "models" / "hollow").mkdir()
    with rnnserve(root / "models", "--workers", "2") as server, watching(server.http_port, root) as watcher:
        began_at = time.time()
        totals = np.zeros(3, dtype=int)
        with ThreadPoolExecutor(4) as pool:
            while time.time() < began_at + LOAD_S:
                totals += sum(map(np.array, pool.map(round_of_load, [server.target] * 4, range(4))))
        loaded_at = time.time()
        wait_until(lambda: watcher.scraped_since(loaded_at))
        yield Watched(server, watcher, began_at, loaded_at, time.time(), *totals.tolist())


@pytest.mark.parametrize("expr", QUERIES)
def test_every_query_of_the_dashboard_has_data(watched: Watched, expr: str) -> None:
    found = watched.watcher.at(filled_in(expr, INTERVAL), watched.loaded_at)
    values = [value for _, value in found]
    assert finite(values), f"no data for {expr}"
    assert not np.isinf(values).any()
    assert min(finite(values)) >= 0


def test_prometheus_counts_what_clients_sent(watched: Watched) -> None:
    steps = 'rnnserve_steps_total{model="steps"}'
    assert watched.value(f"sum({steps})") == watched.num_steps
    lasted = f"{1000 * (watched.ended_at - watched.began_at + 2 * SCRAPE_S):.0f}ms"
    assert watched.value(f"sum(increase({steps}[{lasted}]))") == pytest.approx(watched.num_steps, rel=0.15)
    rejected = 'rnnserve_rejected_total{model="steps"}'
    assert watched.value(f'sum({rejected[:-1]}, reason="POSITION_GAP"}})') == watched.num_gaps
    assert watched.value(f"sum({rejected})") == watched.num_gaps
    assert watched.value('rnnserve_generated_outputs_total{model="names"}') == watched.num_ids
    num = watched.num_gaps  # rounds of load
    requests = 'rnnserve_requests_total{model="steps", outcome="success"}'
    assert watched.value(requests) == num * (120 + 4)
    assert watched.value('rnnserve_sessions_opened_total{model="steps"}') == num * (4 + 1)
    calls = 'grpc_server_call_duration_seconds_count{grpc_method="rnnserve.v1.SequenceService/%s"}'
    assert watched.value(f"sum({calls % 'StreamPredict'})") == 2 * num
    assert watched.watcher.at(calls % "GetModel", watched.ended_at)[0][0]["grpc_status"] == "NOT_FOUND"
    assert watched.value("rnnserve_broken_models") == 1
    assert watched.value("rnnserve_workers") == 2
    assert watched.value("rnnserve_ready") == 1


def test_times_of_a_request_are_those_of_its_parts(watched: Watched) -> None:
    """One run a request, of which no batch is larger than the load: the sums bound each other."""
    seconds = {
        part: watched.value(f'rnnserve_{part}_duration_seconds_sum{{model="names", graph="main"}}')
        for part in ("queue", "run", "request")
    }
    assert seconds["queue"] < seconds["request"]
    assert 0 < seconds["run"] < watched.ended_at - watched.began_at
    batches = watched.value('rnnserve_batch_size_sum{model="steps"}')
    runs = watched.value('rnnserve_runs_total{model="steps"}')
    assert 1 < batches / runs <= 16


def test_promtool_finds_nothing_to_say_of_the_names(watched: Watched) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{watched.server.http_port}/metrics") as response:
        page = response.read()
    done = subprocess.run([TOOL, "check", "metrics"], input=page, capture_output=True, check=False)
    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (0, "", "")


def test_alerts_are_evaluated_and_know_their_metrics(watched: Watched) -> None:
    def groups() -> list[dict]:
        return watched.watcher.ask("rules")["groups"]

    wait_until(lambda: all(rule["health"] != "unknown" for group in groups() for rule in group["rules"]))
    [group] = groups()
    assert [rule["name"] for rule in group["rules"]] == [rule["alert"] for rule in RULES]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    states = {rule["name"]: rule["state"] for rule in group["rules"]}
    assert {name for name, state in states.items() if state != "inactive"} == {"RnnserveModelBroken"}
    for rule in RULES:
        for name in re.findall(r"\b(?:up|rnnserve_\w+)(?=[\[{ ])", rule["expr"]):
            assert watched.watcher.at(name, watched.ended_at), f"{rule['alert']}: nothing is called {name}"


def test_alerts_fire_when_they_should() -> None:
    done = subprocess.run(
        [TOOL, "test", "rules", Path(__file__).with_name("alerts.yml")], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stdout + done.stderr
    tested = yaml.safe_load(Path(__file__).with_name("alerts.yml").read_text())["tests"]
    fired = {each["alertname"] for test in tested for each in test["alert_rule_test"] if each.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in RULES}


def test_the_shipped_configuration_is_valid() -> None:
    done = subprocess.run([TOOL, "check", "config", DEPLOY / "prometheus.yml"], capture_output=True, check=False)
    assert not done.returncode, done.stdout.decode() + done.stderr.decode()


def test_variables_offer_what_is_served(watched: Watched) -> None:
    from benchmarks.prometheus import DASHBOARD

    variables = json.loads(DASHBOARD.read_text())["templating"]["list"]
    found = {}
    for variable in variables:
        metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"]).groups()
        series = watched.watcher.ask("series", **{"match[]": filled_in(metric, INTERVAL)})
        found[variable["name"]] = {each[label] for each in series}
    assert found == {"model": {"steps", "names", "translate"}, "version": {"1"}}
