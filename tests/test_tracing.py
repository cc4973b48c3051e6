"""Traces as a collector receives them from a real server: whose children they are, and what they say."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collector_pb
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, use_span

from service.client import Client
from service.config import load_settings
from service.errors import ConfigError
from service.pb.inference import inference_pb2_grpc as oip_grpc
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.rpc import otel
from service.rpc.tracing import MAX_RUNS
from tests.collecting import Collector, Span, attributes, collecting
from tests.generating import save, tokens
from tests.oip.calls import step
from tests.rpc import Requests, frame, open_stream, predict, sequences
from tests.single import Single, single
from tests.workers import fleet_of, wait_until

NATIVE = "rnnserve.v1.SequenceService"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = [("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "vendor=opaque")]
UNSAMPLED = [("traceparent", f"00-{TRACE}-{PARENT}-00")]
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "50"}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as running:
        yield running


@pytest.fixture(scope="module")
def models(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("traced")
    (root / "lstm").symlink_to(repository / "lstm")
    save(tokens(), root, "chain")
    save(tokens(encoder=True, begin=True), root, "translate")
    return root


@pytest.fixture(scope="module")
def exporting(models: Path) -> Iterator[tuple[Single, Collector]]:
    with collecting() as collector, single(models, "--otlp-endpoint", collector.url, **SOON) as server:
        yield server, collector


@pytest.fixture
def traced(exporting: tuple[Single, Collector]) -> tuple[Single, Collector]:
    """A server and the collector that it exports to, which has nothing of other tests: they have waited for theirs."""
    exporting[1].requests.clear()
    return exporting


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)


def test_a_call_is_a_child_of_its_callers_span_and_has_its_waiting_and_runs_below_it(traced):
    server, collector = traced
    xs = sequences(1, 3, 20, 40)
    num_steps = sum(map(len, xs))
    with server.stub() as stub:
        tensor = pb.Tensor(data=b"".join(x.tobytes() for x in xs), lengths=[len(x) for x in xs])
        asked = pb.PredictRequest(model="lstm", inputs=[tensor])
        stub.Predict(asked, metadata=[*SAMPLED, ("x-request-id", "job-1")])
    span = collector.wait_for(f"{NATIVE}/Predict")
    peer = attributes(span).pop("network.peer.port")
    port = int(server.address.rpartition(":")[2])
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert (span.kind, span.status.code) == (Span.SPAN_KIND_SERVER, trace_pb2.Status.STATUS_CODE_UNSET)
    assert span.trace_state == "vendor=opaque"
    children = collector.children(span)
    assert attributes(span) == {
        "rpc.system.name": "grpc",
        "rpc.method": f"{NATIVE}/Predict",
        "rpc.response.status_code": "OK",
        "server.address": "127.0.0.1",
        "server.port": port,
        "network.peer.address": "127.0.0.1",
        "network.peer.port": peer,
        "rnnserve.request_id": "job-1",
        "rnnserve.messages.in": 1,
        "rnnserve.messages.out": 1,
        "rnnserve.model.name": "lstm",
        "rnnserve.model.version": 1,
        "rnnserve.sequences": 3,
        "rnnserve.steps.in": num_steps,
        "rnnserve.steps.out": num_steps,
        "rnnserve.runs": len(children) - 1,
    }
    queue, *runs = children
    assert [each.name for each in children] == ["queue", *["run"] * len(runs)]
    assert {each.trace_id.hex() for each in children} == {TRACE}
    told = [attributes(run) for run in runs]
    assert sum(each["rnnserve.batch.steps"] for each in told) == num_steps
    assert [each["rnnserve.run.number"] for each in told] == list(range(1, len(runs) + 1))
    assert told[0]["rnnserve.batch.rows"] == 3
    assert {(each["rnnserve.model.name"], each["rnnserve.model.version"]) for each in told} == {("lstm", 1)}
    times = [span.start_time_unix_nano, queue.start_time_unix_nano, queue.end_time_unix_nano]
    for run in runs:
        times += [run.start_time_unix_nano, run.end_time_unix_nano]
    times.append(span.end_time_unix_nano)
    assert times == sorted(times)
    assert queue.end_time_unix_nano == runs[0].start_time_unix_nano
    [resource] = collector.resources[:1]
    assert resource["service.name"] == "rnnserve"
    assert {"service.version", "service.instance.id", "telemetry.sdk.name"} <= set(resource)


def test_calls_in_one_batch_are_linked(traced):
    server, collector = traced
    x = np.zeros((20_000, 3), np.float32)  # more than a thousand runs, so that the calls meet
    asked = pb.PredictRequest(model="lstm", inputs=[pb.Tensor(data=x.tobytes(), lengths=[len(x)])], emit=pb.EMIT_LAST)
    with server.stub() as stub:
        for call in [stub.Predict.future(asked) for _ in range(2)]:
            call.result()
        wait_until(lambda: sum(span.name == f"{NATIVE}/Predict" for span in collector.spans) == 2)
    spans = {span.span_id: span for span in collector.spans if span.name == f"{NATIVE}/Predict"}
    assert len({span.trace_id for span in spans.values()}) == 2
    num_shared = 0
    for run in (span for span in collector.spans if span.name == "run"):
        assert len(run.links) == attributes(run)["rnnserve.batch.rows"] - 1
        for link in run.links:
            num_shared += 1
            assert spans[link.span_id].trace_id == link.trace_id != run.trace_id
    assert num_shared


def test_the_span_of_a_stream_tells_of_its_sessions_and_stays_small(traced):
    server, collector = traced
    x = np.zeros((1, 3), np.float32)
    num_frames = 150
    requests = Requests()
    with server.stub() as stub:
        call = stub.StreamPredict(iter(requests), metadata=SAMPLED)
        requests.put(open_stream("lstm", sessions=[pb.SessionOpen(session_id="pump")]))
        next(call)
        for _ in range(num_frames):
            requests.put(frame(x, handles=[0]))
            next(call)
        requests.close()
        list(call)
    span = collector.wait_for(f"{NATIVE}/StreamPredict")
    told = attributes(span)
    counted = ("rnnserve.runs", "rnnserve.steps.in", "rnnserve.steps.out", "rnnserve.sequences", "rnnserve.session.id")
    assert [told[name] for name in counted] == [num_frames, num_frames, num_frames, 1, "pump"]
    events = [(event.name, attributes(event)) for event in span.events]
    assert events == [
        ("session opened", {"rnnserve.handle": 0, "rnnserve.session_id": "pump"}),
        ("session closed", {"rnnserve.handle": 0, "rnnserve.steps": num_frames}),
    ]
    children = collector.children(span)
    numbers = [attributes(each)["rnnserve.run.number"] for each in children if each.name == "run"]
    assert sorted(numbers) == [*range(1, MAX_RUNS + 1), 32, 64, 128]
    assert sum(each.name == "queue" for each in children) == len(numbers)


def test_of_many_events_the_last_are_kept(traced):
    server, collector = traced
    bad = np.full((1, 3), np.nan, np.float32)
    asked = [open_stream("lstm", sessions=[pb.SessionOpen() for _ in range(200)]), frame(bad, handles=[0])]
    with server.stub() as stub:
        list(stub.StreamPredict(iter(asked)))
    span = collector.wait_for(f"{NATIVE}/StreamPredict")
    assert (len(span.events), span.dropped_events_count) == (128, 2 * 200 + 1 - 128)
    assert {event.name for event in span.events} == {"session closed"}


def test_steps_that_are_refused_are_told_of(traced):
    server, collector = traced
    with server.stub() as stub:
        list(stub.StreamPredict(iter([open_stream("lstm"), frame(np.full((1, 3), np.nan, np.float32))])))
    span = collector.wait_for(f"{NATIVE}/StreamPredict")
    assert [(event.name, attributes(event)) for event in span.events][1] == (
        "steps refused",
        {"rnnserve.handle": 0, "rnnserve.position": 0, "rnnserve.reason": "BAD_VALUE"},
    )


def test_generate_tells_of_its_first_output_and_of_its_encoder(traced):
    server, collector = traced
    source = pb.Tensor(name="x", data=np.array([3, 4, 5, 1], np.int64).tobytes(), lengths=[3, 1])
    with server.stub() as stub:
        made = list(stub.Generate(pb.GenerateRequest(model="translate", inputs=[source], max_steps=4)))
        num_outputs = sum(sum(each.output.lengths) for each in made)
    span = collector.wait_for(f"{NATIVE}/Generate")
    [event] = span.events
    assert event.name == "first output"
    assert 0 < attributes(event)["rnnserve.seconds"] < 10
    assert span.start_time_unix_nano < event.time_unix_nano < span.end_time_unix_nano
    assert attributes(span)["rnnserve.steps.out"] == num_outputs
    children = collector.children(span)
    assert [each.name for each in children][:4] == ["queue", "run", "queue", "run"]  # of the encoder, and the decoder
    assert {each.name for each in children[4:]} <= {"run"}
    assert [attributes(each)["rnnserve.graph"] for each in children if each.name == "run"][:2] == ["encoder", "main"]
    assert all(span.start_time_unix_nano < each.start_time_unix_nano for each in children)


def test_requests_of_triton_have_their_runs_below_the_call_that_brought_them(traced):
    server, collector = traced
    x = np.zeros((1, 3), np.float32)
    with grpc.insecure_channel(server.address) as channel:
        stub = oip_grpc.GRPCInferenceServiceStub(channel)
        stub.ModelInfer(step("lstm", 7, x, sequence_start=True), metadata=SAMPLED)
        list(stub.ModelStreamInfer(iter([step("lstm", 7, x), step("lstm", 7, x, sequence_end=True)])))
    infer = collector.wait_for("inference.GRPCInferenceService/ModelInfer")
    stream = collector.wait_for("inference.GRPCInferenceService/ModelStreamInfer")
    assert infer.trace_id.hex() == TRACE != stream.trace_id.hex()
    assert attributes(infer)["rnnserve.session.id"] == "7"
    assert [each.name for each in collector.children(infer)] == ["queue", "run"]
    assert attributes(stream)["rnnserve.runs"] == 2


@pytest.mark.parametrize(
    ("model", "code", "reason", "is_fault"),
    [("none", "NOT_FOUND", "MODEL_NOT_FOUND", False), (None, "UNIMPLEMENTED", None, True)],
)
def test_what_fails_says_how_and_the_servers_faults_are_errors(traced, model, code, reason, is_fault):
    server, collector = traced
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/of.a/Stranger" if model is None else f"/{NATIVE}/Predict")
        with pytest.raises(grpc.RpcError):
            call(pb.PredictRequest(model=model).SerializeToString())
    span = collector.wait_for("_OTHER" if model is None else f"{NATIVE}/Predict")
    told = attributes(span)
    assert (told["rpc.response.status_code"], told["error.type"], told.get("rnnserve.reason")) == (code, code, reason)
    assert (span.status.code == trace_pb2.Status.STATUS_CODE_ERROR) is is_fault
    assert told.get("rpc.method_original") == ("of.a/Stranger" if model is None else None)


def test_nothing_is_sent_when_opentelemetrys_variables_say_so(models, collector, monkeypatch):
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_SDK_DISABLED": "true", **SOON}
    with single(models, **variables) as server:
        with server.stub() as stub:
            stub.GetModel(pb.GetModelRequest(model="lstm"), metadata=SAMPLED)
        assert server.stop() == 0
    assert collector.requests == []
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    settings = load_settings({"repository": models, "otlp_endpoint": collector.url})
    assert otel.tracing_of(settings, None) is None


def test_nothing_of_opentelemetry_is_loaded_when_traces_are_off(models):
    script = """
import sys
from service.client import Client
from service.config import load_settings
from service.repository import load_repository
from service.rpc.server import Server
settings = load_settings({"repository": sys.argv[1]})
assert Server(settings, load_repository(settings)).engine.watch is None
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    printed = subprocess.run([sys.executable, "-c", script, str(models)], capture_output=True, text=True, timeout=60)
    assert printed.stdout == "[]\n", printed.stderr


def test_our_client_passes_on_where_its_caller_is_in_a_trace(traced):
    server, collector = traced
    context = SpanContext(int(TRACE, 16), int(PARENT, 16), is_remote=False, trace_flags=TraceFlags(1))
    with Client(server.address) as client:
        client.models()
        with use_span(NonRecordingSpan(context)):
            client.predict("lstm", [np.zeros((2, 3), np.float32)])
            with client.stream("lstm") as stream:
                stream.step(np.zeros(3, np.float32))
    names = [f"{NATIVE}/{name}" for name in ("ListModels", "GetModel", "Predict", "StreamPredict")]
    parents = {name: collector.wait_for(name).parent_span_id.hex() for name in names}
    assert parents == {names[0]: "", **dict.fromkeys(names[1:], PARENT)}


def test_the_variables_are_heard_the_caller_decides_and_the_log_names_the_trace_anyway(models, collector):
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_SERVICE_NAME": "pumps",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test,service.instance.id=mine",
        "OTEL_TRACES_SAMPLER": "parentbased_always_off",
    }
    with single(models, "--log-format", "json", "--access-log", "calls", **SOON, **variables) as server:
        with server.stub() as stub:
            stub.ListModels(pb.ListModelsRequest(), metadata=UNSAMPLED)
            predict(stub, "lstm", sequences(1, 1, 2, 2))
            stub.GetModel(pb.GetModelRequest(model="lstm"), metadata=SAMPLED)
        collector.wait_for(f"{NATIVE}/GetModel")
        assert server.stop() == 0
        told = {line["method"].rpartition("/")[2]: line for line in server.lines() if line["message"] == "call"}
    [span] = collector.spans
    assert span.trace_id.hex() == told["ListModels"]["trace_id"] == told["GetModel"]["trace_id"] == TRACE
    assert told["GetModel"]["span_id"] == span.span_id.hex()
    [resource] = collector.resources
    assert (resource["service.name"], resource["service.instance.id"], resource["deployment.environment.name"]) == (
        "pumps",
        "mine",
        "test",
    )


def test_over_http_and_at_the_end_of_the_server(models):
    received: list[tuple[str, collector_pb.ExportTraceServiceRequest]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, collector_pb.ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    late = {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "600000"}
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever).start()
        with single(models, "--otlp-endpoint", f"http://127.0.0.1:{http.server_port}", **late) as server:
            with server.stub() as stub:
                stub.GetModel(pb.GetModelRequest(model="lstm"))
            assert received == []
            assert server.stop() == 0
        http.shutdown()
    [(path, request)] = received
    assert path == "/v1/traces"
    assert request.resource_spans[0].scope_spans[0].spans[0].name == f"{NATIVE}/GetModel"


def test_a_dead_collector_does_no_harm(models):
    with collecting() as gone:
        url = gone.url
    with single(
        models, "--otlp-endpoint", url, "--log-format", "json", OTEL_BSP_MAX_QUEUE_SIZE="512", **SOON
    ) as server:
        with server.stub() as stub:
            for _ in range(600):
                stub.GetModel(pb.GetModelRequest(model="lstm"), timeout=5)
        server.wait_for(lambda line: "UNAVAILABLE" in line["message"] or "exporting" in line["message"])
        assert server.stop() == 0
        said = [(line["logger"], line["message"].split("retrying")[0]) for line in server.lines()]
    assert len(said) < 8, said
    assert len(set(said)) == len(said)


def test_each_worker_exports_by_itself(repository, tmp_path, collector, monkeypatch):
    (tmp_path / "lstm").symlink_to(repository / "lstm")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with fleet_of(tmp_path, "--otlp-endpoint", collector.url) as fleet:
        for index in range(2):
            fleet.connect_to(index).close()
        wait_until(lambda: len({each["service.instance.id"] for each in collector.resources}) == 2)


@pytest.mark.parametrize(
    ("endpoint", "protocol", "message"),
    [
        ("localhost:4317", "grpc", "'localhost:4317' is no URL: expected http://HOST:PORT"),
        ("http://localhost:4317", "json", "OTEL_EXPORTER_OTLP_PROTOCOL is 'json': it may be grpc or http/protobuf"),
    ],
)
def test_what_cannot_work_is_said_at_the_start(models, monkeypatch, endpoint, protocol, message):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    settings = load_settings({"repository": models, "otlp_endpoint": endpoint})
    with pytest.raises(ConfigError, match=message) as caught:
        otel.tracing_of(settings, None)
    assert caught.value.field == "otlp_endpoint"


def test_without_the_packages_the_setting_is_refused_and_the_environment_is_warned_of(models, tmp_path):
    script = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from service.client.cli import main
main(["serve", "--repository", sys.argv[1], "--port", "0", "--http-port", "0", *sys.argv[2:]])
"""
    ended = subprocess.run(
        [sys.executable, "-c", script, str(models), "--otlp-endpoint", "http://127.0.0.1:4317"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert "traces need OpenTelemetry's SDK and its OTLP exporter: pip install 'rnnserve[otel]'" in ended.stderr
    assert "Traceback" not in ended.stderr
