"""service.remote: repositories behind URLs, in memory, in a folder, and on a server that speaks S3."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import s3fs
from fsspec.implementations.memory import MemoryFileSystem
from moto.server import ThreadedMotoServer

from service import remote
from service.client import Client
from service.config import load_settings
from service.errors import ConfigError, ModelBroken, RepositoryUnreachable
from service.remote import RemoteStorage
from service.repository import load_repository
from tests import generating
from tests.onnx_models import build
from tests.rpc import run_alone, sequences
from tests.serving import serving
from tests.workers import fleet_of, wait_until

LATEST = {"version_policy": "latest:1", "watch": 3600}


class FlakyFileSystem(MemoryFileSystem):
    """A network that fails: so many of the next calls, after the first file of each."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    num_failures: ClassVar[int] = 0
    num_gets: ClassVar[int] = 0

    def _fail(self) -> None:
        cls = type(self)
        if cls.num_failures:
            cls.num_failures -= 1
            raise ConnectionResetError("the connection was reset")

    def find(self, path: str, **options: Any) -> Any:
        self._fail()
        return super().find(path, **options)

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        super().get_file(rpath, lpath, **options)
        type(self).num_gets += 1
        self._fail()


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.0)
    for cls in (MemoryFileSystem, FlakyFileSystem):
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
    FlakyFileSystem.num_failures = FlakyFileSystem.num_gets = 0


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A server that speaks S3. Gives its endpoint."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> s3fs.S3FileSystem:
    """A bucket "models" of that server, and an environment in which it is found."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    if files.exists("models"):
        files.rm("models", recursive=True)
    files.mkdir("models")
    return files


def put(url: str, name: str, version: int, *, seed: int | None = None) -> bytes:
    content = build("gru", seed=version if seed is None else seed).content
    fs, path = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{path}/{name}/{version}/model.onnx", content)
    return content


def names(served: Any) -> list[str]:
    return served.on_loop(lambda: [f"{each.name}/{each.version}" for each in served.server.engine.lanes])


def look(served: Any, times: int = 2) -> list[str]:
    for _ in range(times):
        served.run(served.server.catalog.look())
    return names(served)


def test_whole_folders_are_fetched_of_what_is_served_alone(tmp_path: Path) -> None:
    url = "memory://bucket/models"
    fs = MemoryFileSystem()
    for name, content in generating.tokens(2, encoder=True).items():
        fs.pipe_file(f"/bucket/models/g/1/{name}", content)
    fs.pipe_file("/bucket/models/g/1/data/weights.bin", b"weights")
    fs.pipe_file("/bucket/models/g/1/.hidden", b"hidden")
    fs.pipe_file("/bucket/models/README", b"no model")
    fs.pipe_file("/bucket/models/m/v1/model.onnx", b"misnamed")
    fs.pipe_file("/bucket/models/n/notes", b"no version")
    put(url, "m", 1)
    content = put(url, "m", 2)
    loaded = load_repository(load_settings({"repository": url, "repository_cache": tmp_path}))
    assert [(lane.name, lane.version) for lane in loaded.lanes] == [("g", 1), ("m", 2)]
    assert [(each.name, each.version) for each in loaded.broken] == [("m", 0), ("n", 0)]
    assert str(loaded.broken[0].error).startswith("memory://bucket/models/m/v1: not a version")
    assert str(loaded.broken[1].error).startswith("memory://bucket/models/n: no version in it")
    [root] = tmp_path.iterdir()
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and ".lock" not in path.name}
    assert files == {
        *("g/.1.fetched", "g/1/model.onnx", "g/1/encoder.onnx", "g/1/data/weights.bin"),
        *("m/.2.fetched", "m/2/model.onnx"),
    }
    assert (root / "m" / "2" / "model.onnx").read_bytes() == content


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_restart_fetches_what_has_changed_alone(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "service.remote")
    url = "memory://bucket" if kind == "memory" else f"file://{tmp_path}/there"
    for name in ("a", "b"):
        (tmp_path / "there" / name / "1").mkdir(parents=True)
        put(url, name, 1)
    cache = tmp_path / "cache"

    def start() -> list[str]:
        caplog.clear()
        storage = RemoteStorage(url, cache)
        for key, fingerprint in storage.look().prints.items():
            storage.fetch(key, fingerprint)
            storage.check(key, fingerprint)
        storage.close()
        return sorted(record.getMessage().split(" ")[0] for record in caplog.records)

    assert start() == [f"{url}/a/1", f"{url}/b/1"]
    assert start() == []
    put(url, "b", 1, seed=9)
    assert start() == [f"{url}/b/1"]
    fs, path = fsspec.core.url_to_fs(url)
    fs.rm(f"{path}/b", recursive=True)
    assert start() == []
    assert {each.name for each in next(cache.iterdir()).glob("*/[0-9]*")} == {"1"}
    assert not list(cache.glob("*/b/1"))


def test_cache_that_is_not_to_be_kept_is_removed() -> None:
    put("memory://bucket", "m", 1)
    with serving("memory://bucket") as served:  # type: ignore[arg-type]
        root = served.server._storage.root
        assert (root / "m" / "1" / "model.onnx").is_file()
    assert not root.exists()
    assert not root.parent.exists()


def test_what_fails_in_the_middle_counts_as_nothing(tmp_path: Path) -> None:
    for name, content in generating.tokens(2, encoder=True).items():
        FlakyFileSystem().pipe_file(f"flaky://bucket/g/1/{name}", content)
    storage = RemoteStorage("flaky://bucket", tmp_path)
    [(key, fingerprint)] = storage.look().prints.items()
    FlakyFileSystem.num_gets = 0
    FlakyFileSystem.num_failures = 100
    with pytest.raises(RepositoryUnreachable, match=r"flaky://bucket/g/1: the connection was reset"):
        storage.fetch(key, fingerprint)
    assert FlakyFileSystem.num_failures == 100 - remote.ATTEMPTS
    assert not [path for path in storage.root.rglob("*") if path.suffix == ".onnx"]
    FlakyFileSystem.num_failures = 2  # the third attempt works
    storage.fetch(key, fingerprint)
    assert sorted(path.name for path in (storage.root / "g" / "1").iterdir()) == ["encoder.onnx", "model.onnx"]


def test_version_that_changes_while_it_is_fetched_is_not_loaded(tmp_path: Path) -> None:
    put("memory://bucket", "m", 1)
    storage = RemoteStorage("memory://bucket", tmp_path)
    [(key, fingerprint)] = storage.look().prints.items()
    put("memory://bucket", "m", 1, seed=9)
    with pytest.raises(ModelBroken, match="m/1: its files are being changed"):
        storage.fetch(key, fingerprint)
    assert not (storage.root / "m" / "1").exists()
    [(key, newer)] = storage.look().prints.items()
    storage.fetch(key, newer)
    with pytest.raises(ModelBroken, match="being changed"):
        storage.check(key, fingerprint)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://bucket", r"repository gs://bucket: gs:// needs a library: pip install 'rnnserve\[gcs\]'"),
        ("abfs://bucket", r"pip install 'rnnserve\[azure\]'"),
        ("nope://bucket", "repository nope://bucket: Protocol not known: nope"),
        ("memory://nothing", "repository memory://nothing: there are no files: put models at <model>/<version>/model"),
        ("flaky://down", "repository flaky://down: the connection was reset"),
    ],
)
def test_what_is_wrong_with_a_url_is_said(url: str, message: str) -> None:
    FlakyFileSystem.num_failures = remote.ATTEMPTS
    with pytest.raises(ConfigError, match=message) as caught:
        load_repository(load_settings({"repository": url}))
    assert caught.value.field == "repository"


def test_url_of_a_folder_is_a_folder(tmp_path: Path) -> None:
    assert load_settings({"repository": f"file://{tmp_path}"}).repository == tmp_path
    assert load_settings({"repository": "s3://b/models"}).repository == "s3://b/models"


def test_server_follows_what_is_uploaded(caplog: pytest.LogCaptureFixture) -> None:
    [x] = sequences(1, 1, 5, 5)
    put("flaky://bucket", "m", 1)
    with serving("flaky://bucket", **LATEST) as served, Client(served.address) as client:  # type: ignore[arg-type]
        first = client.predict("m", [x])
        put("flaky://bucket", "m", 2)
        assert look(served, 1) == ["m/1"]
        assert look(served, 1) == ["m/2"]
        FlakyFileSystem.num_failures = 100  # the network is down
        put("flaky://bucket", "m", 3)
        assert look(served, 3) == ["m/2"]
        assert caplog.text.count("the connection was reset; what is served goes on") == 1
        FlakyFileSystem.num_failures = 0
        assert look(served, 1) == ["m/2"]
        FlakyFileSystem.num_failures = 0
        assert look(served, 1) == ["m/3"]
        second = client.predict("m", [x])
    assert [first.version, second.version] == [1, 3]
    assert not np.array_equal(first[0], second[0])


def test_version_that_could_not_be_fetched_is_tried_again_though_it_has_not_changed() -> None:
    put("flaky://bucket", "m", 1)
    with serving("flaky://bucket", **LATEST) as served:  # type: ignore[arg-type]
        put("flaky://bucket", "m", 2)
        look(served, 1)
        storage, fetch = served.server._storage, served.server._storage.fetch

        def fail(key: Any, fingerprint: str) -> None:
            FlakyFileSystem.num_failures = 100
            try:
                fetch(key, fingerprint)
            finally:
                FlakyFileSystem.num_failures = 0

        storage.fetch = fail  # type: ignore[method-assign]
        assert look(served, 2) == ["m/1"]
        assert [str(each.error) for each in served.server.broken] == ["flaky://bucket/m/2: the connection was reset"]
        storage.fetch = fetch  # type: ignore[method-assign]
        assert look(served, 1) == ["m/2"]
        assert not served.server.broken


def test_s3(bucket: s3fs.S3FileSystem, tmp_path: Path) -> None:
    """The whole way on a server that speaks S3: load, upgrade, replace, and a start from the cache."""
    [x] = sequences(1, 1, 5, 5)
    for version in (1, 2, 3):
        build("gru", seed=version).save(tmp_path, "m", version)
    bucket.put(f"{tmp_path}/m/1/", "models/live/m/1", recursive=True)
    settings = {**LATEST, "repository_cache": tmp_path / "cache"}
    answers = []
    with serving("s3://models/live", **settings) as served, Client(served.address) as client:  # type: ignore[arg-type]
        answers.append(client.predict("m", [x])[0])
        bucket.put(f"{tmp_path}/m/2/", "models/live/m/2", recursive=True)
        assert look(served) == ["m/2"]
        answers.append(client.predict("m", [x])[0])
        bucket.put_file(f"{tmp_path}/m/3/model.onnx", "models/live/m/2/model.onnx")
        assert look(served) == ["m/2"]
        answers.append(client.predict("m", [x])[0])
    for version, answer in enumerate(answers, 1):
        np.testing.assert_array_equal(answer, run_alone(tmp_path, "m", x, version=version))
    cached = next((tmp_path / "cache").glob("*/m/2/model.onnx"))
    before = cached.stat().st_mtime_ns, cached.stat().st_ino
    with serving("s3://models/live", **settings) as served:  # type: ignore[arg-type]
        assert names(served) == ["m/2"]
    assert before == (cached.stat().st_mtime_ns, cached.stat().st_ino)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://nothing/here", "repository s3://nothing/here: The specified bucket does not exist"),
        ("s3://models/empty", "repository s3://models/empty: there are no files"),
    ],
)
def test_s3_without_a_repository(bucket: s3fs.S3FileSystem, url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_repository(load_settings({"repository": url}))


def test_s3_with_several_workers(bucket: s3fs.S3FileSystem, tmp_path: Path) -> None:
    """They share what is fetched, and follow what is uploaded."""
    for version in (1, 2):
        build("gru", seed=version).save(tmp_path, "m", version)
    bucket.put(f"{tmp_path}/m/1/", "models/live/m/1", recursive=True)
    with fleet_of("s3://models/live", "--watch", "0.1") as fleet, Client(fleet.address) as client:  # type: ignore[arg-type]
        [cached] = fleet.folder.glob("cache/*/m/1/model.onnx")
        assert fleet.log.count("s3://models/live/m/1 was fetched") == 1
        assert client.model("m").version == 1
        bucket.put(f"{tmp_path}/m/2/", "models/live/m/2", recursive=True)
        wait_until(lambda: client.model("m").version == 2)
        wait_until(lambda: fleet.log.count("s3://models/live/m/2 was fetched") == 1)
        folder = fleet.folder
    wait_until(lambda: not folder.exists())
    assert not cached.exists()
