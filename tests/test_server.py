"""The server as operators meet it: start-up, health, reflection, metrics, probes, drain, errors with a way out."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError

import grpc
import numpy as np
import pytest
import trustme
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client.parser import text_string_to_metric_families

from models.spec import parse_spec
from service.errors import ConfigError
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.pb.rnnserve.v1 import rnnserve_pb2_grpc as pb_grpc
from tests.onnx_models import build
from tests.rpc import Received, Requests, code_of, frame, open_stream, predict, run_alone, sequences
from tests.serving import Served, serving

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE = "rnnserve.v1.SequenceService"


def get(served: Served, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{served.server.http_port}{path}") as response:
        return response.read().decode()


def test_models_are_described(served: Served) -> None:
    with served.stub() as stub:
        models = {(m.name, m.version): m for m in stub.ListModels(pb.ListModelsRequest()).models}
        gru = stub.GetModel(pb.GetModelRequest(model="gru")).model
    assert sorted(models) == sorted(
        [*((n, 1) for n in ("bigru", "bilstm", "coupled", "gru", "lstm", "rnn", "tokens")), ("gru", 2)]
    )
    assert gru == models["gru", 2]
    assert (gru.cell, gru.topology, gru.step_mode) == ("gru", "many-to-many", pb.STEP_MODE_STEPPING)
    assert [(t.name, t.dtype, list(t.row_shape)) for t in gru.inputs] == [("x", pb.DATA_TYPE_FLOAT32, [3])]
    assert [(t.name, t.layout) for t in gru.outputs] == [("y", pb.LAYOUT_PER_STEP)]
    assert [(s.name, list(s.row_shape)) for s in gru.states] == [("state.0.h", [1, 8]), ("state.1.h", [1, 8])]
    assert gru.exactness == pb.EXACTNESS_EXACT
    assert models["rnn", 1].exactness == pb.EXACTNESS_ROUNDING
    assert gru.provider == "CPUExecutionProvider"
    assert len(gru.digest) == 64
    assert [layer.hidden for layer in parse_spec(gru.spec_json).layers] == [8, 8]
    assert models["bilstm", 1].step_mode == pb.STEP_MODE_BUFFERED
    assert "bidirectional" in models["bilstm", 1].step_mode_reason


def test_health_of_the_server_the_service_and_each_model(served: Served) -> None:
    with grpc.insecure_channel(served.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE, "gru", "gru/2", "lstm/1"):
            assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="nothing"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_tells_enough_to_call_without_our_proto(served: Served, repository: Path) -> None:
    from google.protobuf.descriptor_pool import DescriptorPool
    from google.protobuf.message_factory import GetMessageClass

    with grpc.insecure_channel(served.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(database.get_services()) >= {
            SERVICE,
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        pool = DescriptorPool(database)
        method = pool.FindServiceByName(SERVICE).methods_by_name["GetModel"]
        request, response = (GetMessageClass(t) for t in (method.input_type, method.output_type))
        call = channel.unary_unary(
            f"/{SERVICE}/GetModel",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        assert call(request(model="lstm")).model.cell == "lstm"
        # As grpcurl does: JSON in, with the bytes in base64, JSON out.
        (x,) = sequences(45, 1, 5, 5)
        method = pool.FindServiceByName(SERVICE).methods_by_name["Predict"]
        request, response = (GetMessageClass(t) for t in (method.input_type, method.output_type))
        call = channel.unary_unary(
            f"/{SERVICE}/Predict",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        data = base64.b64encode(x.tobytes()).decode()
        text = json.dumps({"model": "lstm", "emit": "EMIT_LAST", "inputs": [{"data": data}]})
        answer = json_format.MessageToDict(call(json_format.Parse(text, request(), descriptor_pool=pool)))
        y = np.frombuffer(base64.b64decode(answer["outputs"][0]["data"]), np.float32)
        np.testing.assert_array_equal(y, run_alone(repository, "lstm", x)[-1])


def test_metrics_count_what_was_done(repository: Path) -> None:
    with serving(repository) as served:
        with served.stub() as stub:
            predict(stub, "lstm", sequences(41, 6, 10, 10))
            bad = frame(sequences(42, 1, 2, 2)[0], positions=[9])
            Received.all(stub.StreamPredict(iter([open_stream("lstm"), bad])))
        found = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(get(served, "/metrics"))
            for sample in family.samples
        }
        lstm = (("model", "lstm"), ("version", "1"))
        graph = (("graph", "main"), *lstm)
        assert found["rnnserve_steps_total", *graph] == 60
        assert found["rnnserve_sequences_total", *graph] == 7
        assert found["rnnserve_rejected_total", lstm[0], ("reason", "POSITION_GAP"), lstm[1]] == 1
        assert found["rnnserve_slots_used", *graph] == 0
        assert found["rnnserve_batch_size_count", *graph] == found["rnnserve_runs_total", *graph] > 0
        assert found["rnnserve_batch_size_sum", *graph] == served.lane("lstm").tally.run_rows_sum
        assert found["rnnserve_model_exactness", lstm[0], ("verdict", "exact"), lstm[1]] == 1
        assert get(served, "/livez") == get(served, "/readyz") == "ok\n"


def test_broken_models_are_said_and_the_rest_is_served(tmp_path: Path) -> None:
    build("gru").save(tmp_path, "good")
    for name, content in {"corrupt": b"not onnx", "empty": b"", "truncated": build("lstm").content[:-200]}.items():
        path = tmp_path / name / "3" / "model.onnx"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    (tmp_path / "hollow").mkdir()
    with serving(tmp_path) as served, served.stub() as stub:
        response = stub.ListModels(pb.ListModelsRequest())
        predict(stub, "good", sequences(43, 1, 3, 3))
        assert "rnnserve_broken_models 4.0" in get(served, "/metrics")
    assert [m.name for m in response.models] == ["good"]
    assert [(b.name, b.version) for b in response.broken] == [
        ("corrupt", 3),
        ("empty", 3),
        ("hollow", 0),
        ("truncated", 3),
    ]
    assert all(str(tmp_path) in b.error for b in response.broken)
    assert "hollow/1/model.onnx" in response.broken[2].error


def test_drain_tells_streams_and_refuses_what_is_new(repository: Path) -> None:
    (x,) = sequences(44, 1, 8, 8)
    with (
        serving(repository, drain_s=20.0) as served,
        served.stub() as stub,
        grpc.insecure_channel(served.address) as channel,
    ):
        requests = Requests()
        responses = stub.StreamPredict(iter(requests), timeout=30)
        requests.put(open_stream("lstm"))
        requests.put(frame(x[:4]))
        received = Received()
        while len(received.steps[0]) < 4:
            received.take(next(responses))
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        stopping = asyncio.run_coroutine_threadsafe(served.server.stop(), served.loop)
        assert next(watch).status == NOT_SERVING
        while not received.drains:
            received.take(next(responses))
        assert received.drains[0].grace.seconds == 20
        with pytest.raises(HTTPError, match="503"):
            get(served, "/readyz")
        assert get(served, "/livez") == "ok\n"
        with served.stub() as late, pytest.raises(grpc.RpcError) as caught:
            predict(late, "lstm", [x])
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        watch.cancel()
        requests.put(frame(x[4:], opens=[pb.SessionOpen()], handles=[0]))
        requests.close()
        for response in responses:
            received.take(response)
        assert sorted(received.steps[0]) == list(range(8))
        assert code_of(received.sessions[0].status) == "UNAVAILABLE"
        stopping.result(timeout=10)


def test_port_in_use_says_so(repository: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{port}.*in use.*--port"), serving(repository, port=port):
            pass
        with pytest.raises(ConfigError, match=f"{port}.*--http-port"), serving(repository, http_port=port):
            pass


def test_two_servers_can_not_share_a_port(repository: Path) -> None:
    with (
        serving(repository) as served,
        pytest.raises(ConfigError, match="in use"),
        serving(repository, port=served.server.port),
    ):
        pass


@contextmanager
def command(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run `rnnserve serve` as a process."""
    process = subprocess.Popen(
        [Path(sys.executable).with_name("rnnserve"), "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_command_says_what_it_serves_and_ends_on_sigterm(repository: Path, tmp_path: Path) -> None:
    broken = tmp_path / "models"
    broken.mkdir()
    for model in repository.iterdir():
        (broken / model.name).symlink_to(model)
    (broken / "bad" / "1").mkdir(parents=True)
    (broken / "bad" / "1" / "model.onnx").write_bytes(b"bad")
    with command("--repository", str(broken), "--port", "0", RNNSERVE_HTTP_PORT="0") as process:
        lines = []
        while (line := process.stdout.readline()) != "ready\n":
            assert line, process.stderr.read()
            lines.append(line)
        address = lines[0].split("gRPC on ")[1].split(",")[0]
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.SequenceServiceStub(channel)
            assert len(stub.ListModels(pb.ListModelsRequest()).models) == 7  # of two versions the newest
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
    text = "".join(lines)
    assert "gru/2  gru8+gru8 many-to-many, stepping, CPUExecutionProvider, exact" in text
    assert "rnn/1  rnn8 many-to-many, stepping, CPUExecutionProvider, rounding" in text
    assert "bilstm/1  bilstm8 many-to-many, buffered" in text
    assert "coupled/1  lstm8 many-to-many, stepping, CPUExecutionProvider, coupled" in text
    assert "BROKEN bad/1" in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--repository", "/nowhere"), ("/nowhere", "rnnserve export")),
        ((), ("--repository", "RNNSERVE_REPOSITORY")),
        (("--repository", ".", "--port", "99999"), ("port", "65535")),
        (("--repository", ".", "--provider", "tpu"), ("provider", "'cpu', 'cuda' or 'cuda,cpu'")),
        (("--repository", ".", "--provider", "cuda"), ("CUDAExecutionProvider", "rnnserve[gpu]", "cuda,cpu")),
        (("--repository", ".", "--config", "/nowhere.toml"), ("/nowhere.toml",)),
        (("--repository", ".", "--tls-cert", "/nowhere.pem", "--port", "0"), ("--tls-key",)),
    ],
)
def test_command_says_what_to_mend(tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    with command(*arguments, "--http-port", "0") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1, errors
    for word in words:
        assert word in errors


def test_tls_and_client_certificates(repository: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("client@example.org")
    server.private_key_pem.write_to_path(tmp_path / "key.pem")
    for blob in server.cert_chain_pems:
        blob.write_to_path(tmp_path / "cert.pem", append=True)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    files = {"tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}
    trusted = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    known = grpc.ssl_channel_credentials(
        authority.cert_pem.bytes(), client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes()
    )

    def num_models(address: str, credentials: grpc.ChannelCredentials) -> int:
        with grpc.secure_channel(address, credentials) as channel:
            stub = pb_grpc.SequenceServiceStub(channel)
            return len(stub.ListModels(pb.ListModelsRequest(), timeout=10).models)

    with serving(repository, **files) as served:
        assert num_models(served.address, trusted) == 8
    with serving(repository, **files, tls_client_ca=tmp_path / "ca.pem") as served:
        assert num_models(served.address, known) == 8
        with pytest.raises(grpc.RpcError) as caught:
            num_models(served.address, trusted)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
