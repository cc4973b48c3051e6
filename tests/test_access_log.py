"""What a running server logs: of calls, of sessions, of its start, and by which of its processes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2

from service.pb.inference import inference_pb2_grpc as oip_grpc
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.pb.rnnserve.v1 import rnnserve_pb2_grpc as pb_grpc
from tests.generating import save, tokens
from tests.oip.calls import step
from tests.rpc import details, frame, open_stream, predict, sequences
from tests.single import Single, single
from tests.web.calls import frame as rows_frame
from tests.web.calls import opening, until_over
from tests.workers import fleet_of, wait_until

NATIVE = "rnnserve.v1.SequenceService"


@pytest.fixture(scope="module")
def models(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("logged")
    for name in ("lstm", "gru"):
        (root / name).symlink_to(repository / name)
    save(tokens(), root, "chain")
    return root


@pytest.fixture(scope="module")
def logging_server(models: Path) -> Iterator[Single]:
    with single(models, "--log-format", "json", "--access-log", "sessions") as server:
        yield server


def line_of(server: Single, request_id: str, message: str = "call") -> dict[str, object]:
    """The line about a request without what differs from one time to the next."""
    line = server.wait_for(lambda line: line.get("request_id") == request_id and line["message"] == message)
    assert line.pop("peer").startswith("ipv4:127.0.0.1:")
    assert 0 < line.pop("duration_ms") < 10_000
    del line["time"], line["pid"]
    return line


def test_a_call_has_a_line_once_it_has_ended(logging_server):
    xs = sequences(1, 3, 2, 5)
    steps = sum(map(len, xs))
    with logging_server.stub() as stub:
        tensor = pb.Tensor(data=b"".join(x.tobytes() for x in xs), lengths=[len(x) for x in xs])
        asked = pb.PredictRequest(model="lstm", inputs=[tensor])
        answer, call = stub.Predict.with_call(asked, metadata=[("x-request-id", "predict-1")])
    assert ("x-request-id", "predict-1") in call.trailing_metadata()
    assert line_of(logging_server, "predict-1") == {
        "level": "info",
        "logger": "rnnserve.access",
        "message": "call",
        "method": f"{NATIVE}/Predict",
        "code": "OK",
        "request_id": "predict-1",
        "model": "lstm",
        "version": 1,
        "sequences": 3,
        "steps_in": steps,
        "steps_out": steps,
        "messages_in": 1,
        "messages_out": 1,
        "bytes_in": asked.ByteSize(),
        "bytes_out": answer.ByteSize(),
    }


def test_a_call_without_a_request_id_is_given_one(logging_server):
    with logging_server.stub() as stub:
        _, call = stub.ListModels.with_call(pb.ListModelsRequest())
    [made] = [value for key, value in call.trailing_metadata() if key == "x-request-id"]
    assert line_of(logging_server, made)["method"] == f"{NATIVE}/ListModels"


def test_a_stream_has_one_line_and_each_session_one(logging_server):
    x = np.zeros((300, 3), np.float32)
    asked = [
        open_stream("gru", version=2, sessions=[pb.SessionOpen(session_id="a\nb"), pb.SessionOpen(session_id="c")]),
        *(frame(x[:5], x[:2], handles=[0, 1]) for _ in range(4)),
        frame(x, handles=[1]),
    ]
    with logging_server.stub() as stub:
        answers = list(stub.StreamPredict(iter(asked), metadata=[("x-request-id", "stream-1")]))
    line = line_of(logging_server, "stream-1")
    counted = {
        name: line[name] for name in ("method", "code", "model", "version", "sequences", "steps_in", "steps_out")
    }
    assert counted == {
        "method": f"{NATIVE}/StreamPredict",
        "code": "OK",
        "model": "gru",
        "version": 2,
        "sequences": 2,
        "steps_in": 4 * 7 + 300,
        "steps_out": 4 * 7 + 300,
    }
    assert (line["messages_in"], line["messages_out"]) == (len(asked), len(answers))
    assert (line["bytes_in"], line["bytes_out"]) == (
        sum(each.ByteSize() for each in asked),
        sum(each.ByteSize() for each in answers),
    )
    ended = {each["session_id"]: each for each in logging_server.lines() if each["message"] == "session"}
    assert {name: (each["model"], each["version"], each["steps"], each["cause"]) for name, each in ended.items()} == {
        "a\nb": ("gru", 2, 20, "closed"),
        "c": ("gru", 2, 308, "closed"),
    }


def test_calls_of_triton_and_generate_are_counted_too(logging_server):
    x = np.zeros((2, 3), np.float32)
    with grpc.insecure_channel(logging_server.address) as channel:
        stub = oip_grpc.GRPCInferenceServiceStub(channel)
        stub.ModelInfer(step("lstm", 7, x, sequence_start=True), metadata=[("x-request-id", "infer-1")])
        asked = [step("lstm", 7, x), step("lstm", 7, x), step("lstm", 8, x), step("lstm", 7, x, sequence_end=True)]
        list(stub.ModelStreamInfer(iter(asked), metadata=[("x-request-id", "infer-2")]))
        generate = pb_grpc.SequenceServiceStub(channel).Generate
        prompts = pb.Tensor(data=np.array([2, 2, 2], np.int64).tobytes(), lengths=[1, 2])
        wanted = pb.GenerateRequest(model="chain", inputs=[prompts], max_steps=4)
        made = list(generate(wanted, metadata=[("x-request-id", "generate-1")]))
    lines = {name: line_of(logging_server, name) for name in ("infer-1", "infer-2", "generate-1")}
    assert {name: (line["model"], line["steps_in"], line["steps_out"]) for name, line in lines.items()} == {
        "infer-1": ("lstm", 2, 2),
        "infer-2": ("lstm", 6, 6),  # without those of sequence 8, which was not begun
        "generate-1": ("chain", 0, sum(sum(each.output.lengths) for each in made)),
    }
    assert lines["infer-1"]["session_id"] == "7"
    assert "session_id" not in lines["infer-2"]
    ended = logging_server.wait_for(lambda line: line.get("session_id") == "7" and line["message"] == "session")
    assert (ended["steps"], ended["cause"]) == (8, "closed")


async def test_a_call_over_a_websocket_has_a_request_id_too(logging_server):
    named = {"X-Request-Id": "socket-1"}
    asked = [opening("lstm"), rows_frame(np.zeros((3, 3), np.float32), closes=True)]
    client = aiohttp.ClientSession(logging_server.http, headers=named)
    async with client as session, session.ws_connect("/api/stream") as socket:
        for message in asked:
            await socket.send_json(message)
        await until_over(socket)
    told = [
        {name: logging_server.wait_for(fits)[name] for name in ("message", "request_id")}
        for fits in (
            lambda line: line.get("request_id") == "socket-1" and line["message"] == "session",
            lambda line: line.get("method") == "GET /api/stream",
        )
    ]
    assert told == [{"message": each, "request_id": "socket-1"} for each in ("session", "request")]


def test_an_error_says_how_its_call_is_found_in_the_log(logging_server):
    with logging_server.stub() as stub, pytest.raises(grpc.RpcError) as caught:
        predict(stub, "none\nnone", sequences(1, 1, 2, 2))
    [packed] = [each for each in details(caught.value).details if each.Is(error_details_pb2.RequestInfo.DESCRIPTOR)]
    info = error_details_pb2.RequestInfo()
    packed.Unpack(info)
    assert ("x-request-id", info.request_id) in caught.value.trailing_metadata()
    line = line_of(logging_server, info.request_id)
    assert (line["code"], line["reason"]) == ("NOT_FOUND", "MODEL_NOT_FOUND")
    assert "model" not in line


def test_a_method_that_is_not_there_is_logged_without_its_name(logging_server):
    with grpc.insecure_channel(logging_server.address) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary("/of.a/Stranger")(b"", metadata=[("x-request-id", "other-1")])
    line = logging_server.wait_for(lambda line: line.get("request_id") == "other-1")
    assert (line["method"], line["code"]) == ("other", "UNIMPLEMENTED")


def test_http_is_logged_but_probes_that_succeed(logging_server):
    for path in ("/livez", "/metrics", "/readyz", "/nothing%0Aat%20all"):
        asked = urllib.request.Request(f"{logging_server.http}{path}", headers={"x-request-id": "http-1"})
        try:
            urllib.request.urlopen(asked).close()
        except urllib.error.HTTPError as error:
            error.close()
    logging_server.wait_for(lambda line: line.get("request_id") == "http-1")
    told = [
        (line["method"], line["code"], line["request_id"])
        for line in logging_server.lines()
        if line["message"] == "request" and line["request_id"] == "http-1"
    ]
    assert told == [("GET /nothing\nat all", 404, "http-1")]


def test_the_lines_of_the_docs_are_those_that_are_written(models):
    page = (Path(__file__).parent.parent / "docs" / "logging-and-tracing.md").read_text()
    told = [
        json.loads(line)
        for line in page.split("<!-- lines -->")[1].split("<!-- end of lines -->")[0].splitlines()
        if line
    ]
    x = np.zeros((5, 3), np.float32)
    with single(models, "--log-format", "json", "--access-log", "sessions") as server:
        with server.stub() as stub:
            predict(stub, "lstm", sequences(1, 3, 2, 5))
            asked = [open_stream("lstm", sessions=[pb.SessionOpen(session_id="pump-7")]), frame(x, handles=[0])]
            list(stub.StreamPredict(iter(asked)))
            with pytest.raises(grpc.RpcError):
                predict(stub, "lstn", sequences(1, 3, 2, 5))
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{server.http}/nothing")
        wait_until(lambda: len(server.lines()) == 5)
        written = {(line["message"], line.get("method"), line.get("code")): list(line) for line in server.lines()}
    assert len(told) == 4
    for line in told:
        assert list(line) == written[line["message"], line.get("method"), line.get("code")]


def test_no_number_of_a_tensor_is_logged(models):
    x = np.full((1, 3), 1234.5, np.float32)
    x[0, 1] = np.nan
    with single(models, "--log-level", "debug", "--access-log", "sessions") as server:
        with server.stub() as stub, pytest.raises(grpc.RpcError):
            predict(stub, "lstm", [x])
        wait_until(lambda: "INVALID_ARGUMENT" in server.log)
        assert "1234" not in server.log
        assert re.search(
            r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO rnnserve\.access: call request_id=\w{16} model=lstm version=1 "
            rf"method={NATIVE}/Predict code=INVALID_ARGUMENT duration_ms=[\d.]+ peer=ipv4:",
            server.log,
            re.MULTILINE,
        )


def test_what_goes_wrong_at_the_start_is_a_line_too(models, tmp_path):
    broken = tmp_path / "bad" / "1"
    broken.mkdir(parents=True)
    (broken / "model.onnx").write_bytes(b"no model")
    (tmp_path / "lstm").symlink_to(models / "lstm")
    with single(tmp_path, "--log-format", "json") as server:
        [line] = server.lines()
        assert line["message"].startswith("BROKEN bad/1: ")
        command = (Path(sys.executable).with_name("rnnserve"), "serve", "--repository", str(models))
        port = server.http.rpartition(":")[2]
        taken = [*command, "--log-format", "json", "--port", "0", "--http-port", port]
        ended = subprocess.run(taken, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    line = json.loads(ended.stderr)
    assert (line["level"], f":{port} for HTTP: " in line["message"]) == ("critical", True)


def test_nothing_is_logged_of_calls_unless_it_is_asked_for(models):
    with single(models, "--log-format", "json") as server:
        with server.stub() as stub:
            _, call = stub.ListModels.with_call(pb.ListModelsRequest())
            assert "x-request-id" not in dict(call.trailing_metadata())
            predict(stub, "lstm", sequences(1, 1, 2, 2))
        assert server.stop() == 0
        assert server.lines() == []


def test_supervisor_and_workers_say_who_writes(repository, tmp_path):
    (tmp_path / "lstm").symlink_to(repository / "lstm")
    with fleet_of(tmp_path, "--log-format", "json", "--access-log", "calls") as fleet:
        for index in range(2):
            with fleet.connect_to(index):
                pass
        lines = [json.loads(line) for line in fleet.log.splitlines()]
    pids = {int(line["message"].split()[-1]) for line in lines if "is ready" in line["message"]}
    by_who = {line["process"]: {each["pid"] for each in lines if each["process"] == line["process"]} for line in lines}
    assert sorted(by_who) == ["supervisor", "worker 0", "worker 1"]
    assert by_who["worker 0"] | by_who["worker 1"] == pids
    assert {line["process"] for line in lines if line["message"] == "call"} == {"worker 0", "worker 1"}
