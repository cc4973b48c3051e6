"""service.repository: what lies where, and that what is broken is said loudly while the rest is served."""

import numpy as np
import onnx
import pytest
from onnx.helper import make_tensor_value_info, set_model_props

from models.spec import METADATA_KEY, Golden, GoldenArray, Layout, TensorSpec
from service import repository
from service.config import load_settings
from service.errors import ConfigError, ModelBroken
from service.repository import load_repository, load_version
from tests.onnx_models import build


@pytest.fixture
def load(tmp_path):
    """Load the repository at tmp_path. Returns ([(name, version)], [(name, version, message)])."""

    def load(**settings):
        loaded = load_repository(load_settings({"repository": tmp_path, "version_policy": "all", **settings}))
        served = [(lane.name, lane.version) for lane in loaded.lanes]
        return served, [(broken.name, broken.version, str(broken.error)) for broken in loaded.broken]

    return load


def save(path, model=None):
    path.mkdir(parents=True)
    (path / "model.onnx").write_bytes((model or build()).content)


def test_versions_are_loaded_in_the_order_of_name_and_number(load, tmp_path):
    for name, version in (("b", "1"), ("a", "10"), ("a", "9"), ("a", "2")):
        save(tmp_path / name / version)
    assert load() == ([("a", 2), ("a", 9), ("a", 10), ("b", 1)], [])


def test_a_lane_serves_its_own_file(tmp_path):
    for version in (1, 2):
        build(seed=version).save(tmp_path, "m", version)
    lanes = load_repository(load_settings({"repository": tmp_path, "version_policy": "all"})).lanes
    x = np.ones((1, 1, 3), np.float32)
    states = [np.zeros((1, 1, 8), np.float32)] * 2
    first, second = (lane.backend.run({"x": x}, np.array([1], np.int32), states)[0][0] for lane in lanes)
    assert not np.array_equal(first, second)
    assert lanes[0].backend.digest != lanes[1].backend.digest
    assert [lane.exactness.verdict for lane in lanes] == ["exact", "exact"]


def test_an_empty_repository_is_none_broken(load):
    assert load() == ([], [])


def test_hidden_folders_and_files_are_none_of_a_models(load, tmp_path):
    save(tmp_path / ".git" / "1")
    save(tmp_path / "m" / "1")
    save(tmp_path / "m" / ".2")
    (tmp_path / "m" / "notes").mkdir()
    (tmp_path / "m" / "README").touch()
    (tmp_path / "model.onnx").write_bytes(build().content)
    assert load() == ([("m", 1)], [])


def test_links_are_followed(load, tmp_path):
    save(tmp_path / ".data" / "m" / "5")
    (tmp_path / "m").symlink_to(tmp_path / ".data" / "m")
    assert load() == ([("m", 5)], [])


@pytest.mark.parametrize("name", ["v1", "0", "01", "-1", "1.0", "1 ", "²", "٣", str(2**63), "latest"])
def test_a_version_of_another_name_is_said_to_be_misnamed(load, tmp_path, name):
    save(tmp_path / "m" / name)
    served, [(model, version, message)] = load()
    assert (served, model, version) == ([], "m", 0)
    assert message == f"{tmp_path / 'm' / name}: not a version: name it by a number from 1 on, without leading zeros"
    save(tmp_path / "m" / "1")
    served, broken = load()
    assert (served, [message for *_, message in broken]) == ([("m", 1)], [message])


def test_the_largest_version_is_served(load, tmp_path):
    save(tmp_path / "m" / str(2**63 - 1))
    assert load() == ([("m", 2**63 - 1)], [])


@pytest.mark.parametrize("has_file", [False, True])
def test_a_model_without_a_version_is_told_where_the_file_belongs(load, tmp_path, has_file):
    (tmp_path / "m").mkdir()
    if has_file:
        (tmp_path / "m" / "model.onnx").write_bytes(build().content)
    _, [(name, version, message)] = load()
    assert (name, version) == ("m", 0)
    assert "no version in it: the file belongs at m/1/model.onnx" in message


def test_a_version_without_a_file_is_broken(load, tmp_path):
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "2" / "model.onnx").mkdir(parents=True)
    paths = [tmp_path / "m" / version / "model.onnx" for version in "12"]
    assert load() == ([], [("m", number, f"{path}: no such file") for number, path in enumerate(paths, start=1)])


def respecced(model, *, golden=(), **changes):
    """The content of a model's file whose spec has other golden inputs, or something else in its graph."""
    graph = model.spec.graph.model_copy(update=changes)
    file = onnx.load_from_string(model.content)
    for added in graph.inputs[1:]:
        file.graph.input.append(make_tensor_value_info(added.name, onnx.TensorProto.FLOAT, added.row_shape))
    spec = model.spec.model_copy(update={"graphs": (graph,), "golden": golden})
    set_model_props(file, {METADATA_KEY: spec.to_json()})
    return file.SerializeToString()


def with_golden(array):
    return respecced(build(), golden=(Golden(inputs={"x": array}, outputs={}),))


[X] = build().spec.graph.inputs
[TOKENS] = build(num_ids=5).spec.graph.inputs
TABLE = TensorSpec(name="table", dtype="float32", row_shape=(4,), layout=Layout.SHARED)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a model", "onnxruntime can't load it"),
        (with_golden(GoldenArray(dtype="float32", shape=(2, 3), data="!")), "it loads, but a first run fails"),
        (
            with_golden(GoldenArray.of(np.zeros((2, 5), np.float32))),
            "a first run fails: cannot reshape array of size 10",
        ),
        (respecced(build(), inputs=(X, TABLE)), "inputs table are shared by all sequences, which can't be served"),
        (
            respecced(build(num_ids=5), inputs=(TOKENS.model_copy(update={"num_ids": 500}),)),
            "it loads, but a first run fails: onnxruntime failed: .*Gather.*out of data bounds",
        ),
    ],
)
def test_a_broken_version_is_told_and_the_others_are_served(load, tmp_path, content, message):
    save(tmp_path / "m" / "1")
    save(tmp_path / "z" / "1")
    broken = tmp_path / "m" / "2"
    broken.mkdir()
    (broken / "model.onnx").write_bytes(content)
    served, [(name, version, text)] = load()
    assert (served, name, version) == ([("m", 1), ("z", 1)], "m", 2)
    assert text.startswith(f"{broken / 'model.onnx'}: ")
    with pytest.raises(ModelBroken, match=message):
        load_version(load_settings({"repository": tmp_path}), "m", 2)


def test_states_that_memory_has_no_room_for_are_a_broken_model(load, tmp_path):
    save(tmp_path / "m" / "1")
    served, [(_, _, message)] = load(max_sessions=10**13)
    assert served == []
    assert "no memory for the states of all sequences: lower max_sessions" in message


def test_a_spill_store_that_cannot_be_written_is_a_setting_at_fault(load, tmp_path):
    save(tmp_path / "m" / "1")
    with pytest.raises(ConfigError, match=r"spill_store .*states.db: it can't be written") as caught:
        load(max_resident_sessions=1, spill_store=tmp_path / "none" / "states.db")
    assert caught.value.field == "spill_store"


def test_a_missing_repository_is_a_setting_at_fault(load, tmp_path):
    (tmp_path / "file").touch()
    for name, advice in (("none", "make it, then `rnnserve export"), ("file", "it is a file; name the directory that")):
        path = tmp_path / name
        with pytest.raises(ConfigError, match=f"repository {path} is no directory: {advice}") as caught:
            load(repository=path)
        assert caught.value.field == "repository"


def test_an_absent_provider_is_no_fault_of_the_models(load, tmp_path, monkeypatch):
    save(tmp_path / "m" / "1")

    def check(provider):
        raise ConfigError("no such provider", field=provider)

    monkeypatch.setattr(repository, "check_provider", check)
    with pytest.raises(ConfigError, match="no such provider"):
        load()
