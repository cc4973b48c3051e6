"""Following a repository while a server runs: each test takes the looks that --watch takes, one by one."""

from __future__ import annotations

import logging
import os
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.client import Client, NotFound
from service.pb.inference import inference_pb2 as pb
from tests.oip.calls import array, stub_of
from tests.oip.calls import step as step_of
from tests.onnx_models import build
from tests.rpc import run_alone, sequences
from tests.serving import Served, serving
from tests.workers import page_of, value

LATEST = {"version_policy": "latest:1", "watch": 3600}  # the test looks, not the clock


class Watched:
    """A server, and what it serves."""

    def __init__(self, served: Served, root: Path) -> None:
        self.served = served
        self.root = root

    def look(self, times: int = 2) -> list[str]:
        """Look so many times, and tell what is served."""
        for _ in range(times):
            self.served.run(self.served.server.catalog.look())
        return self.names

    @property
    def names(self) -> list[str]:
        return self.served.on_loop(lambda: [f"{each.name}/{each.version}" for each in self.served.server.engine.lanes])

    @property
    def retired(self) -> list[str]:
        return self.served.on_loop(
            lambda: [f"{each.name}/{each.version}" for each in self.served.server.engine.retired]
        )

    def wait_for_leaving(self) -> None:
        """Wait until no version is on its way out."""
        self.served.wait_until(lambda: not self.served.server.hands.retirer.leaving)

    def index(self) -> dict[str, tuple[str, str]]:
        """State and reason of each version."""
        with stub_of(self.served) as stub:
            models = stub.RepositoryIndex(pb.RepositoryIndexRequest()).models
        return {f"{each.name}/{each.version}": (each.state, each.reason) for each in models}

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.served.server.http_port}/metrics", timeout=10) as page:
            return value(page_of(page.read().decode()), name)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save(tmp_path, "m", 1)
    return tmp_path


@pytest.fixture
def watched(root: Path) -> Iterator[Watched]:
    with serving(root, **LATEST) as served:
        yield Watched(served, root)


def save(root: Path, name: str, version: int, *, seed: int | None = None) -> Path:
    return build("gru", seed=version if seed is None else seed).save(root, name, version)


def break_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"no model")


def test_new_version_is_served_once_it_has_been_seen_twice(
    watched: Watched, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.rpc.catalog")
    save(root, "m", 2)
    save(root, "n", 1)
    assert watched.look(1) == ["m/1"]
    assert watched.index()["m/2"] == ("UNAVAILABLE", "it is loaded once its files stay the same for 3600 s")
    assert watched.look(1) == ["m/2", "n/1"]
    assert watched.index()["m/1"][0] in ("UNLOADING", "UNAVAILABLE")
    watched.wait_for_leaving()
    assert watched.index()["m/1"] == ("UNAVAILABLE", "the version policy, latest:1, leaves it out")
    assert "m/2 is served" in caplog.text
    with grpc.insecure_channel(watched.served.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        states = [health.Check(health_pb2.HealthCheckRequest(service=name)).status for name in ("m", "m/1", "m/2")]
    assert states == [health_pb2.HealthCheckResponse.SERVING, 2, 1]


def test_half_written_version_waits_until_it_is_whole(watched: Watched, root: Path) -> None:
    content = build("gru", seed=2).content
    path = root / "m" / "2" / "model.onnx"
    path.parent.mkdir()
    for part in range(1, 6):  # each look finds more of it than the last
        path.write_bytes(content[: len(content) * part // 5])
        assert watched.look(1) == ["m/1"]
        assert watched.metric("rnnserve_broken_models") == 0
    assert watched.look(1) == ["m/2"]


def test_version_that_seems_whole_and_is_not_is_tried_again_once_it_has_changed(watched: Watched, root: Path) -> None:
    content = build("gru", seed=2).content
    path = root / "m" / "2" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes(content[:100])
    assert watched.look() == ["m/1"]
    assert watched.metric("rnnserve_broken_models") == 1
    path.write_bytes(content)
    assert watched.look() == ["m/2"]
    assert watched.metric("rnnserve_broken_models") == 0


def test_hidden_folder_is_renamed_into_its_place(watched: Watched, root: Path) -> None:
    save(root / "m", ".new", 2)
    assert watched.look() == ["m/1"]
    (root / "m" / ".new" / "2").rename(root / "m" / "2")
    assert watched.look() == ["m/2"]


def test_broken_version_leaves_the_one_before(watched: Watched, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    break_file(root / "m" / "2" / "model.onnx")
    assert watched.look() == ["m/1"]
    state, reason = watched.index()["m/2"]
    assert (state, "onnxruntime can't load it" in reason) == ("UNAVAILABLE", True)
    assert watched.index()["m/1"] == ("READY", "")
    assert watched.metric("rnnserve_broken_models") == 1
    assert watched.look(3) == ["m/1"]
    assert caplog.text.count("m/2 can't be loaded") == 1, "it is tried again though it has not changed"
    shutil.rmtree(root / "m" / "2")
    assert watched.look() == ["m/1"]
    assert caplog.text.count("m/2 can't be loaded") == 1, "it is tried again though it is gone"
    assert watched.metric("rnnserve_broken_models") == 0
    assert "m/2" not in watched.index()


def test_server_that_starts_with_a_broken_newest_version_serves_the_one_before(root: Path) -> None:
    save(root, "m", 2)
    break_file(root / "m" / "3" / "model.onnx")
    with serving(root, **LATEST) as served:
        watched = Watched(served, root)
        assert watched.names == ["m/2"]
        save(root, "m", 3)
        assert watched.look() == ["m/3"]


def test_replaced_file_is_served_in_place_of_the_one_before(watched: Watched, root: Path) -> None:
    [x] = sequences(1, 1, 6, 6)
    before = run_alone(root, "m", x)
    with stub_of(watched.served) as stub:
        stub.ModelInfer(step_of("m", 7, x[:2], sequence_start=True))
        save(root, "m", 1, seed=9)
        assert watched.look() == ["m/1"]
        assert watched.retired == ["m/1"]
        assert watched.index()["m/1"] == ("READY", "")
        rest = array(stub.ModelInfer(step_of("m", 7, x[2:], sequence_end=True)))[0]
        np.testing.assert_array_equal(rest, before[2:])  # what is live goes on with what it began with
        new = array(stub.ModelInfer(step_of("m", 8, x, sequence_start=True, sequence_end=True)))[0]
    np.testing.assert_array_equal(new, run_alone(root, "m", x))
    assert not np.array_equal(new, before)
    watched.wait_for_leaving()
    assert watched.names == ["m/1"]


@pytest.mark.parametrize(("begun_with", "goes_on_with"), [("", "1"), ("1", "")])
def test_sequence_goes_on_though_its_version_is_spelled_otherwise(
    watched: Watched, root: Path, begun_with: str, goes_on_with: str
) -> None:
    [x] = sequences(1, 1, 6, 6)
    with stub_of(watched.served) as stub:
        first = step_of("m", 7, x[:2], sequence_start=True)
        first.model_version = begun_with
        rows = [array(stub.ModelInfer(first))[0]]
        save(root, "m", 2)
        assert watched.look() == ["m/2"]
        for part, flags in ((x[2:4], {}), (x[4:], {"sequence_end": True})):
            message = step_of("m", 7, part, **flags)
            message.model_version = goes_on_with
            rows.append(array(stub.ModelInfer(message))[0])
    np.testing.assert_array_equal(np.concatenate(rows), run_alone(root, "m", x))


def test_broken_replacement_leaves_what_is_served(watched: Watched, root: Path) -> None:
    [x] = sequences(1, 1, 6, 6)
    before = run_alone(root, "m", x)
    break_file(root / "m" / "1" / "model.onnx")
    assert watched.look(3) == ["m/1"]
    state, reason = watched.index()["m/1"]
    assert (state, reason[:30]) == ("READY", "its files have changed, and th")
    with Client(watched.served.address) as client:
        np.testing.assert_array_equal(client.predict("m", [x])[0], before)
    save(root, "m", 1, seed=9)
    assert watched.look() == ["m/1"]
    assert watched.index()["m/1"] == ("READY", "")
    with Client(watched.served.address) as client:
        np.testing.assert_array_equal(client.predict("m", [x])[0], run_alone(root, "m", x))


def test_same_files_written_again_are_loaded_again_and_nothing_else(watched: Watched, root: Path) -> None:
    lane = watched.served.lane("m")
    assert watched.look(3) == ["m/1"]
    assert watched.served.lane("m") is lane
    os.utime(root / "m" / "1" / "model.onnx", ns=(1, 1))
    watched.look()
    assert watched.served.lane("m") is not lane


def test_every_file_of_a_version_counts_but_hidden_ones(watched: Watched, root: Path) -> None:
    lane = watched.served.lane("m")
    (root / "m" / "1" / ".notes").touch()
    watched.look()
    assert watched.served.lane("m") is lane
    (root / "m" / "1" / "data").mkdir()
    (root / "m" / "1" / "data" / "weights").touch()
    watched.look()
    assert watched.served.lane("m") is not lane


def test_version_that_is_gone_gives_its_place_to_the_one_below(watched: Watched, root: Path) -> None:
    save(root, "m", 2)
    assert watched.look() == ["m/2"]
    shutil.rmtree(root / "m" / "2")
    assert watched.look(1) == ["m/2"]  # it may be back in a moment
    assert watched.look(1) == ["m/1"]


def test_model_that_is_gone_is_unloaded_once_what_is_live_has_ended(watched: Watched, root: Path) -> None:
    [x] = sequences(1, 1, 4, 4)
    expected = run_alone(root, "m", x)
    with stub_of(watched.served) as stub:
        stub.ModelInfer(step_of("m", 7, x[:2], sequence_start=True))
        shutil.rmtree(root / "m")
        assert watched.look() == []
        assert watched.index() == {"m/1": ("UNLOADING", "1 live sessions go on")}
        rest = array(stub.ModelInfer(step_of("m", 7, x[2:], sequence_end=True)))[0]
    np.testing.assert_array_equal(rest, expected[2:])
    watched.wait_for_leaving()
    assert watched.index() == {}
    with Client(watched.served.address) as client, pytest.raises(NotFound, match="served: none"):
        client.predict("m", [x])


def test_repository_that_cannot_be_read_changes_nothing(
    watched: Watched, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = root.with_name(f"{root.name}-away")
    root.rename(away)
    assert watched.look(3) == ["m/1"]
    assert caplog.text.count("No such file or directory; what is served goes on") == 1
    away.rename(root)
    save(root, "m", 2)
    assert watched.look() == ["m/2"]


@pytest.mark.parametrize(
    ("policy", "before", "after"),
    [
        ("all", ["m/1", "n/4"], ["m/1", "m/2", "m/3", "n/4", "n/5"]),
        ("latest:2", ["m/1", "n/4"], ["m/2", "m/3", "n/4", "n/5"]),
        ("2,4", ["n/4"], ["m/2", "n/4"]),
        ("1 n=latest:1", ["m/1", "n/4"], ["m/1", "n/5"]),
    ],
)
def test_every_policy_is_followed(root: Path, policy: str, before: list[str], after: list[str]) -> None:
    save(root, "n", 4)
    with serving(root, version_policy=policy, watch=3600) as served:
        watched = Watched(served, root)
        assert watched.names == before
        for name, version in (("m", 2), ("m", 3), ("n", 5)):
            save(root, name, version)
        assert watched.look() == after
        index = watched.index()
        assert {key for key, (state, _) in index.items() if state == "READY"} == set(after)
        if policy == "2,4":
            assert index["n/2"] == ("UNAVAILABLE", "the version policy names it, but it is not there")


def test_unloaded_model_stays_so_until_it_is_loaded(watched: Watched, root: Path) -> None:
    with stub_of(watched.served) as stub:
        stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="m"))
        watched.wait_for_leaving()
        save(root, "m", 2)
        assert watched.look() == []
        reason = "the model was unloaded by a call: load it by another"
        assert watched.index() == {"m/1": ("UNAVAILABLE", reason), "m/2": ("UNAVAILABLE", reason)}
        stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="m"))
        assert watched.names == ["m/2"]
        save(root, "m", 3)
        assert watched.look() == ["m/3"]


def test_load_takes_at_once_what_is_there_and_tries_again_what_was_broken(
    watched: Watched, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(root, "m", 2)
    whole = path.read_bytes()
    break_file(path)
    os.utime(path, ns=(1, 1))
    assert watched.look() == ["m/1"]
    with stub_of(watched.served) as stub:
        load = pb.RepositoryModelLoadRequest(model_name="m")
        with pytest.raises(grpc.RpcError, match=r"version 2: .* can't load it"):
            stub.RepositoryModelLoad(load)
        assert watched.names == ["m/1"]
        path.write_bytes(whole)
        stub.RepositoryModelLoad(load)
    assert watched.names == ["m/2"]


def test_the_clock_looks_by_itself(root: Path) -> None:
    with serving(root, version_policy="latest:1", watch=0.01) as served:
        save(root, "m", 2)
        served.wait_until(lambda: [lane.version for lane in served.server.engine.lanes] == [2])
