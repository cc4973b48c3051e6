"""Descriptions that do not fit: such a version says what to change, and the others are served."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from service.client import Client
from service.config import load_settings
from service.repository import load_repository
from tests import foreign
from tests.foreign import Foreign, Rows
from tests.rpc import sequences
from tests.serving import serving
from tests.test_adapter import LSTM_STATES, TIMED, describe, fault_of
from tests.test_odd_graphs import ROW, SUM, running_sum

SCALED = SUM + "[constants]\nscale = "


def scaled_sum(path: Path, kind: int = TensorProto.FLOAT) -> Path:
    """A running sum with a constant of some type that scales inputs."""
    it = Foreign()
    it.node("Mul", ["x", it.node("Cast", ["scale"], "factor", to=TensorProto.FLOAT)], "scaled")
    it.node("Add", ["scaled", "s"], "s_out")
    it.node("Identity", ["s_out"], "y")
    return it.save(path, [("x", ROW), ("s", ROW), ("scale", kind, [])], [("y", ROW), ("s_out", ROW)])


def refused(folder: Path, text: str, words: str) -> None:
    """The model there can't be served and says so, and another beside it is served."""
    (folder / "it" / "1" / "model.toml").write_text(text)
    running_sum(describe(folder, "sound", SUM))
    loaded = load_repository(load_settings({"repository": folder}))
    assert [lane.name for lane in loaded.lanes] == ["sound"]
    [broken] = loaded.broken
    assert words in str(broken.error)


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("INT64", "9223372036854775808000", "constants.scale: expected a number of 64 bits, true, false, or lists"),
        (
            "FLOAT",
            "[[1, 2], [3]]",
            "constants.scale: expected a number of 64 bits, true, false, or lists of them, all of",
        ),
        ("FLOAT", '"1"', "constants.scale: expected a number"),
        ("FLOAT", "[]", "constants.scale: expected a number"),
        ("INT32", "2147483648", "constants.scale: 2147483648 is not of the input's type, int32"),
        ("INT64", "1.5", "constants.scale: 1.5 is not of the input's type, int64"),
        ("INT64", "inf", "constants.scale: inf is not of the input's type, int64"),
        ("BOOL", "2", "constants.scale: 2 is not of the input's type, bool"),
        ("FLOAT16", "1.0", "constants.scale: its element type 10 (of onnx.TensorProto) can't travel"),
    ],
)
def test_constants_that_their_inputs_can_not_hold(tmp_path: Path, kind: str, value: str, words: str) -> None:
    scaled_sum(describe(tmp_path, "it", ""), TensorProto.DataType.Value(kind))
    refused(tmp_path, SCALED + value + "\n", words)


def npy(array: Rows) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04abc",
        b"\x93NUMPY\x01\x00\x10\x00" + b"{" * 16,
        npy(np.zeros(3, np.float32))[:-2],
        npy(np.zeros(3, np.float32)).replace(b"(3,), }         ", b"(300000000000,),}"),
    ],
    ids=["empty", "zip", "header", "short", "huge"],
)
def test_initial_states_that_can_not_be_read(tmp_path: Path, content: bytes) -> None:
    path = running_sum(describe(tmp_path, "it", ""))
    path.with_name("begin.npy").write_bytes(content)
    refused(tmp_path, SUM + 'initial = "begin.npy"\n', "states.s.initial: begin.npy can't be read: ")


@pytest.mark.parametrize(
    ("names", "text", "words"),
    [
        (
            ("lengths", "s", "y", "s_out"),
            SUM.replace(".x", ".lengths"),
            "inputs.lengths: the server has an input of that",
        ),
        (
            ("x", "s", "lengths", "s_out"),
            SUM.replace(".y", ".lengths"),
            "outputs.lengths: lengths is the name of an input",
        ),
        (
            ("x", "s", "y", "s_out"),
            SUM.replace("[outputs.y]", '[outputs.y]\nname = "x"'),
            "outputs.y: x is the name of",
        ),
    ],
)
def test_names_that_clients_could_not_tell_apart(
    tmp_path: Path, names: tuple[str, str, str, str], text: str, words: str
) -> None:
    running_sum(describe(tmp_path, "it", ""), names)
    refused(tmp_path, text, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            SUM.replace("[outputs.y]", '[outputs.y]\nelement_names = ["a"]'),
            "outputs.y.element_names: 1 names for 3 elements",
        ),
        ('labels = ["a", "b"]\n' + SUM, "labels: 2 names for 3 elements"),
        (SUM.replace("[inputs.x]", "[inputs.x]\nnum_ids = 5"), "inputs.x.num_ids: it is float32, and ids are integers"),
    ],
)
def test_what_is_said_of_elements_has_to_fit(tmp_path: Path, text: str, words: str) -> None:
    running_sum(describe(tmp_path, "it", ""))
    refused(tmp_path, text, words)


@pytest.mark.parametrize(
    "text", ["max_batch = " + "9" * 5000, "labels = " + "[" * 100_000, "\0", "labels = 2026-13-40", "\udcff"]
)
def test_texts_that_are_no_toml(tmp_path: Path, text: str) -> None:
    running_sum(describe(tmp_path, "it", ""))
    (tmp_path / "it" / "1" / "model.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "is not TOML" in fault_of(tmp_path)


def test_axes_of_tensors_whose_shape_is_not_known(tmp_path: Path) -> None:
    path = running_sum(describe(tmp_path, "it", SUM.replace("[outputs.y]", "[outputs.y]\nshape = [3]\nbatch_axis = 2")))
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, path)
    assert "outputs.y: axis 2 of a tensor of 2 axes" in fault_of(tmp_path)


def test_a_batch_of_more_than_one_has_to_be_dynamic(tmp_path: Path) -> None:
    foreign.lstm(describe(tmp_path, "it", TIMED), batch=4)
    assert "inputs.input: its axis of sequences, 0, is fixed at 4" in fault_of(tmp_path)


def test_an_output_without_sequences_is_of_one(tmp_path: Path) -> None:
    it = Foreign()
    it.node("Add", ["x", "s"], "s_out")
    it.node("ReduceMean", ["s_out"], "y", axes=[0], keepdims=0)
    text = SUM.replace("[outputs.y]", '[outputs.y]\nbatch_axis = "none"')
    it.save(describe(tmp_path, "it", text), [("x", ROW), ("s", ROW)], [("y", [3]), ("s_out", ROW)])
    assert "the graph takes one sequence at a time: set max_batch = 1" in fault_of(tmp_path)


def test_an_output_of_a_chunk_says_its_size(tmp_path: Path) -> None:
    it = Foreign()
    it.node("Add", [it.node("ReduceMean", ["x"], "mean", axes=[1]), "s"], "s_out")
    it.node("Sub", ["x", "s_out"], "y")
    text = SUM.replace("[inputs.x]", "[inputs.x]\ntime_axis = 1\nchunk = 4")
    frame, row = ["b", "samples"], ["b", 1]
    path = describe(tmp_path, "it", text.replace("[outputs.y]", "[outputs.y]\ntime_axis = 1"))
    it.save(path, [("x", frame), ("s", row)], [("y", frame), ("s_out", row)])
    assert "outputs.y: a step has several entries of axis 1, and the graph does not say how many" in fault_of(tmp_path)
    describe(tmp_path, "it", text.replace("[outputs.y]", "[outputs.y]\nshape = [4]"))
    [x] = sequences(3, 1, 9, 9, features=4)
    with serving(tmp_path) as served, Client(served.address) as client:
        wanted = x - np.cumsum(x.mean(axis=1))[:, None]
        np.testing.assert_allclose(client.predict("it", [x])[0], wanted, rtol=1e-4, atol=1e-5)


def test_with_lengths_everything_of_a_step_has_an_axis_of_time(tmp_path: Path) -> None:
    path = describe(tmp_path, "it", "")
    foreign.lstm(path, lengths=True)
    start = 'lengths = "lens"\n[inputs.input]\ntime_axis = 1\n[outputs.logits]\n'
    refused(tmp_path, start + LSTM_STATES, "outputs.logits: the graph takes lengths, so that what is per step has")
    refused(tmp_path, start + 'time_axis = 1\nper = "sequence"\n' + LSTM_STATES, "and what has none is per = ")
