"""The index, and loading while the server runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.pb.inference import inference_pb2 as pb
from tests.lanes import equal
from tests.oip.calls import array, request, step, stub_of
from tests.onnx_models import build
from tests.rpc import code_of, details, run_alone, sequences
from tests.serving import Served, serving


@pytest.fixture
def root(tmp_path: Path) -> Path:
    build("gru").save(tmp_path, "good", 1)
    build("gru").save(tmp_path, "good", 12)
    build("gru").save(tmp_path, "good", 3)
    broken(tmp_path, "bad")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.fixture
def own(root: Path) -> Iterator[Served]:
    with serving(root) as served:
        yield served


def broken(root: Path, name: str, version: int = 1) -> None:
    (root / name / str(version)).mkdir(parents=True)
    (root / name / str(version) / "model.onnx").write_bytes(b"no model")


def index(stub, **fields: object) -> list[tuple[str, str, str]]:
    models = stub.RepositoryIndex(pb.RepositoryIndexRequest(**fields)).models
    assert all(bool(m.reason) == (m.state != "READY") for m in models)
    return [(m.name, m.version, m.state) for m in models]


def load(stub, name: str) -> None:
    stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=name))


def refusal(call: object, message: object) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(message)
    return code_of(details(caught.value)), caught.value.details()


def test_index_lists_what_is_served_and_what_is_not(own: Served, root: Path) -> None:
    with stub_of(own) as stub:
        expected = [
            ("bad", "1", "UNAVAILABLE"),
            ("empty", "", "UNAVAILABLE"),
            ("good", "1", "READY"),
            ("good", "3", "READY"),
            ("good", "12", "READY"),
        ]
        assert index(stub) == expected
        assert index(stub, ready=True) == expected[2:]
        build("gru").save(root, "good", 13)
        build("gru").save(root, "new", 1)
        assert index(stub) == [*expected, ("good", "13", "UNAVAILABLE"), ("new", "1", "UNAVAILABLE")]
        code, text = refusal(stub.RepositoryIndex, pb.RepositoryIndexRequest(repository_name="other"))
        assert (code, "there is one, without a name" in text) == ("INVALID_ARGUMENT", True)


def test_new_version_is_for_new_sequences(own: Served, root: Path) -> None:
    first, second = sequences(1, 2, 6, 6)
    with stub_of(own) as stub:
        stub.ModelInfer(step("good", 1, first[:3], sequence_start=True))
        build("gru", seed=7).save(root, "good", 13)
        load(stub, "good")
        assert ("good", "13", "READY") in index(stub)
        assert list(stub.ModelMetadata(pb.ModelMetadataRequest(name="good")).versions) == ["1", "3", "12", "13"]
        old = stub.ModelInfer(step("good", 1, first[3:5]))
        assert old.model_version == "12"
        equal(array(old)[0], run_alone(root, "good", first, version=12)[3:5])
        new = stub.ModelInfer(step("good", 1, second, sequence_start=True, sequence_end=True))  # replaces the old one
        assert new.model_version == "13"
        equal(array(new)[0], run_alone(root, "good", second, version=13))
        assert own.on_loop(lambda: [lane.num_sessions for lane in own.server.engine.lanes]) == [0, 0, 0, 0]
        load(stub, "good")  # there is nothing more to do


def test_health_knows_what_was_loaded(own: Served, root: Path) -> None:
    build("gru").save(root, "new", 4)
    with stub_of(own) as stub, grpc.insecure_channel(own.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError):
            health.Check(health_pb2.HealthCheckRequest(service="new/4"))
        load(stub, "new")
        for name in ("new", "new/4"):
            status = health.Check(health_pb2.HealthCheckRequest(service=name)).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        assert stub.ModelReady(pb.ModelReadyRequest(name="new")).ready


def test_broken_version_leaves_the_others_alone(own: Served, root: Path) -> None:
    broken(root, "good", 13)
    build("gru").save(root, "good", 14)
    with stub_of(own) as stub:
        code, text = refusal(stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name="good"))
        assert (code, "version 13: " in text) == ("FAILED_PRECONDITION", True)
        assert index(stub)[-2:] == [("good", "13", "UNAVAILABLE"), ("good", "14", "READY")]
        build("gru").save(root, "good", 13)  # it was mended
        build("gru").save(root, "bad", 1)
        build("gru").save(root, "empty", 1)
        for name in ("good", "bad", "empty"):
            load(stub, name)
        assert all(state == "READY" for _, _, state in index(stub))
        x = np.zeros((1, 2, 3), dtype=np.float32)
        assert stub.ModelInfer(request("bad", x)).model_version == "1"


@pytest.mark.parametrize("name", ["nope", "", "..", "good/1", "../" + "good"])
def test_what_is_not_there_is_not_loaded(own: Served, name: str) -> None:
    with stub_of(own) as stub:
        code, text = refusal(stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name=name))
        assert (code, "is in the repository" in text) == ("NOT_FOUND", True)


def test_models_do_not_come_over_the_network(own: Served) -> None:
    with stub_of(own) as stub:
        message = pb.RepositoryModelLoadRequest(model_name="good")
        message.parameters["file:1/model.onnx"].bytes_param = b"a model"
        code, text = refusal(stub.RepositoryModelLoad, message)
        assert (code, "file:1/model.onnx: models and configurations come" in text) == ("UNIMPLEMENTED", True)


def test_loads_at_once_load_once(own: Served, root: Path) -> None:
    build("lstm").save(root, "new", 1)
    failures = []

    def act() -> None:
        with stub_of(own) as stub:
            try:
                load(stub, "new")
            except grpc.RpcError as error:
                failures.append(error)

    threads = [threading.Thread(target=act) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert own.on_loop(lambda: [lane.name for lane in own.server.engine.lanes]).count("new") == 1


def test_draining_server_loads_nothing(own: Served, root: Path) -> None:
    build("lstm").save(root, "new", 1)
    with stub_of(own) as stub:
        own.on_loop(lambda: setattr(own.server.engine, "is_draining", True))
        code, _ = refusal(stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name="new"))
        assert code == "UNAVAILABLE"
