"""The memory of a version that is unloaded goes back to the operating system; the first runs of one are warm."""

from __future__ import annotations

import shutil
from pathlib import Path

import grpc
import psutil

from service.config import load_settings
from service.engine import Engine
from service.pb.inference import inference_pb2 as pb
from service.pb.inference import inference_pb2_grpc as pb_grpc
from service.repository import load_repository
from tests import generating
from tests.onnx_models import build
from tests.test_server import command
from tests.workers import wait_until


def test_memory_of_an_unloaded_version(tmp_path: Path) -> None:
    """Twice, so that what is reused does not pass for given back: glibc keeps most of it if it is not asked."""
    root = tmp_path / "models"
    build("gru").save(root, "small")
    file = build("lstm", hidden=1024, layers=2).save(tmp_path, "large")
    num_bytes = file.stat().st_size
    assert num_bytes > 48e6
    with command("--repository", str(root), "--port", "0", "--http-port", "0") as process:
        address = process.stdout.readline().split("gRPC on ")[1].split(",")[0]
        while process.stdout.readline() != "ready\n":
            pass
        memory = psutil.Process(process.pid).memory_info
        before = memory().rss
        shutil.move(tmp_path / "large", root)
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.GRPCInferenceServiceStub(channel)
            for _ in range(2):
                stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="large"))
                assert memory().rss > before + 2 * num_bytes
                stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="large"))
                wait_until(lambda: memory().rss < before + 0.25 * num_bytes)


def test_costs_of_runs_are_known_before_the_first(tmp_path: Path) -> None:
    build("lstm").save(tmp_path, "steps")
    build("lstm", bidirectional=True).save(tmp_path, "whole")
    build("lstm", coupled=True).save(tmp_path, "coupled")
    generating.save(generating.tokens(2, encoder=True, attention=True), tmp_path, "attentive")
    settings = load_settings({"repository": tmp_path, "max_batch_rows": 12})
    engine = Engine(settings)
    for lane in load_repository(settings).lanes:
        engine.add(lane)
        assert lane.slab.num_allocated == 0
    sizes = {(lane.name, *size): cost for (lane, *size), cost in engine._costs.items()}
    assert sizes.keys() == {("coupled", 0, 0), *(("steps", power, 0) for power in range(5))}
    assert all(0 < cost < 0.1 for cost in sizes.values())
