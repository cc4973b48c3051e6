"""Metrics of gRPC's calls, by its proposal A66; and that strangers, whatever they call, make no series."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.pb.inference import inference_pb2_grpc as oip_grpc
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.pb.rnnserve.v1 import rnnserve_pb2_grpc as pb_grpc
from tests.metrics import Page
from tests.oip.calls import request, step
from tests.rpc import Received, frame, open_stream, predict, sequences
from tests.serving import Served, serving
from tests.workers import LSTM, wait_until

NATIVE = "rnnserve.v1.SequenceService"


def test_calls_are_counted_by_method_and_status(repository: Path) -> None:
    (x,) = sequences(6, 1, 4, 4)
    messages = [open_stream("lstm"), *(frame(row[None]) for row in x)]
    name = "grpc_server_call_duration_seconds_count"
    with serving(repository) as served:
        with served.stub() as stub:
            replies = list(stub.StreamPredict(iter(messages)))
            models = [stub.ListModels(pb.ListModelsRequest()) for _ in range(3)]
            for model in ("no", "not"):
                with pytest.raises(grpc.RpcError):
                    stub.GetModel(pb.GetModelRequest(model=model))
        with grpc.insecure_channel(served.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest())
            next(watch)
            watch.cancel()
            with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
                list(health.Watch(health_pb2.HealthCheckRequest(), timeout=0.2))
            statuses = ("CANCELLED", "DEADLINE_EXCEEDED")
            wait_until(lambda: all(f'grpc_status="{status}"' in Page(served).text for status in statuses))
        page = Page(served)
    ended = {
        (dict(labels)["grpc_method"].split("/")[1], dict(labels)["grpc_status"]): value
        for (known, labels), value in page.series.items()
        if known == name
    }
    assert ended == {
        ("StreamPredict", "OK"): 1,
        ("Watch", "CANCELLED"): 1,
        ("Watch", "DEADLINE_EXCEEDED"): 1,
        ("ListModels", "OK"): 3,
        ("GetModel", "NOT_FOUND"): 2,
    }
    sizes = {
        (method, way): page.of(
            f"grpc_server_call_{way}_total_compressed_message_size_bytes_sum",
            grpc_method=f"{NATIVE}/{method}",
            grpc_status=status,
        )
        for method, status in (("StreamPredict", "OK"), ("ListModels", "OK"), ("GetModel", "NOT_FOUND"))
        for way in ("sent", "rcvd")
    }
    assert sizes == {
        ("StreamPredict", "rcvd"): sum(map(pb.StreamPredictRequest.ByteSize, messages)),
        ("StreamPredict", "sent"): sum(map(pb.StreamPredictResponse.ByteSize, replies)),
        ("ListModels", "rcvd"): 0,
        ("ListModels", "sent"): sum(map(pb.ListModelsResponse.ByteSize, models)),
        ("GetModel", "rcvd"): sum(pb.GetModelRequest(model=each).ByteSize() for each in ("no", "not")),
        ("GetModel", "sent"): 0,
    }
    seconds = page.of("grpc_server_call_duration_seconds_sum", grpc_status="DEADLINE_EXCEEDED")
    assert 0.1 < seconds < 10


def test_strangers_make_no_series(repository: Path) -> None:
    (x,) = sequences(4, 1, 2, 2)

    def call(served: Served, word: str) -> None:
        with grpc.insecure_channel(served.address) as channel:
            stub, triton = pb_grpc.SequenceServiceStub(channel), oip_grpc.GRPCInferenceServiceStub(channel)
            attempts = [
                lambda: predict(stub, word, [x]),
                lambda: predict(stub, "lstm", [x], version=len(word) + 9),
                lambda: stub.GetModel(pb.GetModelRequest(model=word)),
                lambda: Received.all(stub.StreamPredict(iter([open_stream(word)]))),
                lambda: triton.ModelInfer(request(word, x[None], request_id=word)),
                lambda: triton.ModelInfer(request("lstm", x[None], version="99", parameter=word)),
                lambda: triton.ModelInfer(step("lstm", word, x[:1])),
                lambda: channel.unary_unary(f"/{NATIVE}/{word}")(b""),
                lambda: channel.unary_unary(f"/{word}/{word}")(b""),
            ]
            for attempt in attempts:
                with pytest.raises(grpc.RpcError):
                    attempt()
            sessions = [pb.SessionOpen(session_id=word)]
            Received.all(stub.StreamPredict(iter([open_stream("lstm", sessions=sessions), frame(x)])))

    with serving(repository) as served:
        call(served, "first")
        before = Page(served)
        for number in range(20):
            call(served, f"hostile-{number}")
        after = Page(served)
    assert after.series.keys() == before.series.keys()
    assert "hostile" not in after.text
    assert after.of("grpc_server_call_started_total", grpc_method="other") == 42
    assert after.of("rnnserve_sessions_opened_total", **LSTM) == 21
