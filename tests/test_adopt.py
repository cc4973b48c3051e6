"""`rnnserve adopt`: what is found by looking, what is asked for, and that what it writes is served."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from models.errors import ModelFileError
from models.modelfile import ModelFile
from service.adoptcli import adopt
from service.client import Client
from tests import foreign
from tests.foreign import FEATURES, HIDDEN, Foreign
from tests.onnx_models import build
from tests.serving import serving


def run(*arguments: object) -> tuple[int, str]:
    """Run the command: (exit code, everything it prints)."""
    done = CliRunner().invoke(adopt, [str(each) for each in arguments])
    return done.exit_code, done.output


def adopted(path: Path, *arguments: object) -> dict[str, object]:
    """What it writes beside a file."""
    code, output = run(path, *arguments)
    assert code == 0, output
    return tomllib.loads((path.parent / "model.toml").read_text())


LSTM_STATES = {"h0": {"next": "hn", "batch_axis": 1}, "c0": {"next": "cn", "batch_axis": 1}}


def test_an_lstm_as_torch_leaves_it(tmp_path: Path) -> None:
    assert adopted(foreign.lstm(tmp_path / "it.onnx")) == {
        "inputs": {"input": {"time_axis": 1}},
        "outputs": {"logits": {"time_axis": 1}},
        "states": LSTM_STATES,
    }


def test_time_first(tmp_path: Path) -> None:
    found = adopted(foreign.lstm(tmp_path / "it.onnx", batch_first=False))
    assert found["inputs"] == {"input": {"batch_axis": 1, "time_axis": 0}}
    assert found["outputs"] == {"logits": {"batch_axis": 1, "time_axis": 0}}


def test_lengths_are_known_by_their_name_and_type(tmp_path: Path) -> None:
    assert adopted(foreign.lstm(tmp_path / "it.onnx", lengths=True))["lengths"] == "lens"


def test_axes_without_names(tmp_path: Path) -> None:
    found = adopted(foreign.lstm(tmp_path / "it.onnx", batch=None, time=None))
    assert found["inputs"] == {"input": {"time_axis": 1}}
    assert found["states"] == LSTM_STATES


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_axis_of_sequences_is_found_in_states(tmp_path: Path, axis: int) -> None:
    found = adopted(foreign.cell(tmp_path / "it.onnx", state_axis=axis))
    assert found["states"]["memory"] == {"next": "memory_out", **({"batch_axis": axis} if axis else {})}
    assert found["inputs"] == {"frame": {}}


def test_a_scalar_is_asked_for(tmp_path: Path) -> None:
    path = foreign.cell(tmp_path / "it.onnx", rate=True)
    code, output = run(path)
    assert code == 1
    assert "input 'rate' is a single float32, which is the same in every call: say which, --constant rate=" in output
    assert adopted(path, "--constant", "rate=0.5")["constants"] == {"rate": 0.5}


def test_a_tensor_of_one_number_is_no_batch(tmp_path: Path) -> None:
    it = Foreign()
    it.node("Add", [it.node("Mul", ["x", "rate"], "scaled"), "h"], "h_out")
    it.node("Identity", ["h_out"], "y")
    row = ["batch", FEATURES]
    it.save(tmp_path / "it.onnx", [("x", row), ("h", row), ("rate", [1])], [("y", row), ("h_out", row)])
    code, output = run(tmp_path / "it.onnx")
    assert code == 1
    assert "input 'rate' is a single float32" in output
    found = adopted(tmp_path / "it.onnx", "--constant", "rate=0.5")
    assert (found["constants"], found["inputs"], "max_batch" in found) == ({"rate": 0.5}, {"x": {}}, False)


def test_control_inputs_of_triton_are_constants(tmp_path: Path) -> None:
    """START [batch, 1] would zero the state, which the server does itself; READY would keep it as it was."""
    it = Foreign()
    it.node("Sub", ["READY", "START"], "goes on")
    it.node("Add", [it.node("Mul", ["h", "goes on"], "kept"), "x"], "h_out")
    it.node("Identity", ["h_out"], "y")
    row, control = ["batch", FEATURES], ["batch", 1]
    takes = [("x", row), ("h", row), ("START", control), ("READY", control)]
    it.save(tmp_path / "it.onnx", takes, [("y", row), ("h_out", row)])
    constants = ["--constant", "START=[[0]]", "--constant", "READY=[[1]]"]
    code, output = run(tmp_path / "it.onnx", "--repository", tmp_path / "root", *constants)
    assert code == 0, output
    x = np.random.default_rng(0).standard_normal((9, FEATURES)).astype(np.float32)
    with serving(tmp_path / "root") as served, Client(served.address) as client:
        for y in client.predict("it", [x, x]):
            np.testing.assert_allclose(y, np.cumsum(x, axis=0), rtol=1e-5, atol=1e-6)


def test_frames_of_samples_are_doubted_until_the_chunk_is_said(tmp_path: Path) -> None:
    path = foreign.framed(tmp_path / "it.onnx")
    found = adopted(path, "--chunk", 4, "--context", 2)
    assert found["inputs"] == {"audio": {"time_axis": 1, "chunk": 4, "context": 2}}
    _, output = run(path, "--force")
    assert "a model that takes frames of samples needs --chunk" in output


def test_one_that_takes_one_sequence_and_a_fixed_frame(tmp_path: Path) -> None:
    path = foreign.framed(tmp_path / "it.onnx", size="fixed", batch=1)
    found = adopted(path, "--chunk", 4, "--context", 2)
    assert found["max_batch"] == 1
    assert "the graph's batch is fixed at 1" in (tmp_path / "model.toml").read_text()


def test_neighbours_that_change_each_other_run_alone(tmp_path: Path) -> None:
    found = adopted(foreign.cell(tmp_path / "it.onnx", mean=True))
    assert found["max_batch"] == 1
    text = (tmp_path / "model.toml").read_text()
    assert "max_batch: neighbours in a batch change each other's numbers" in text
    assert "# Batching, measured: coupled" in text


def two_states(path: Path, names: tuple[str, str], nexts: tuple[str, str]) -> Path:
    """Two states that shapes don't tell apart: the second is the first's last value."""
    it = Foreign()
    it.node("Add", [it.node("MatMul", ["x", it.weight("U", FEATURES, HIDDEN)], "fed"), names[1]], nexts[0])
    it.node("Identity", [names[0]], nexts[1])
    it.node("MatMul", [nexts[0], it.weight("head", HIDDEN, 2)], "y")
    row = ["batch", HIDDEN]
    gives = [("y", ["batch", 2]), *((each, row) for each in nexts)]
    return it.save(path, [("x", ["batch", FEATURES]), *((each, row) for each in names)], gives)


@pytest.mark.parametrize(
    ("names", "nexts"),
    [
        (("h0", "c0"), ("hn", "cn")),
        (("hidden_in", "cell_in"), ("hidden_out", "cell_out")),
        (("state.0.h", "state.1.h"), ("state.0.h.next", "state.1.h.next")),
        (("past_h", "past_c"), ("present_h", "present_c")),
        (("initial_h", "initial_c"), ("Y_h", "Y_c")),
        (("hState", "cState"), ("hStateN", "cStateN")),
    ],
)
def test_names_pair_states(tmp_path: Path, names: tuple[str, str], nexts: tuple[str, str]) -> None:
    for order in (nexts, nexts[::-1]):
        found = adopted(two_states(tmp_path / "it.onnx", names, order), "--force")
        assert {name: entry["next"] for name, entry in found["states"].items()} == dict(zip(names, nexts, strict=True))


def test_what_neither_names_nor_shapes_tell_is_asked_for(tmp_path: Path) -> None:
    path = two_states(tmp_path / "it.onnx", ("a", "b"), ("p", "q"))
    code, output = run(path)
    assert code == 1
    assert "a, b may be states, with p, q as next values, and neither names nor shapes tell which" in output
    assert not (tmp_path / "model.toml").exists()
    found = adopted(path, "--state", "a=p", "--state", "b=q")
    assert {name: entry["next"] for name, entry in found["states"].items()} == {"a": "p", "b": "q"}


def test_a_pair_by_shape_alone_is_doubted(tmp_path: Path) -> None:
    it = Foreign()
    it.node("Add", [it.node("MatMul", ["x", it.weight("U", FEATURES, HIDDEN)], "fed"), "kept"], "after")
    it.node("MatMul", ["after", it.weight("head", HIDDEN, 2)], "y")
    row = ["batch", HIDDEN]
    it.save(tmp_path / "it.onnx", [("x", ["batch", FEATURES]), ("kept", row)], [("y", ["batch", 2]), ("after", row)])
    found = adopted(tmp_path / "it.onnx")
    assert found["states"] == {"kept": {"next": "after"}}
    assert "states.kept: taken for a state since after has its shape" in (tmp_path / "model.toml").read_text()


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    it = Foreign()
    x = it.node("Transpose", ["input"], "x", perm=[1, 0, 2])
    shapes = {"W": FEATURES, "R": HIDDEN}
    weights = [it.weight(name, 2, 3 * HIDDEN, width) for name, width in shapes.items()]
    it.node("GRU", [x, *weights, "", "", "h0"], ["Y", "hn"], hidden_size=HIDDEN, direction="bidirectional")
    it.node("ReduceMean", ["Y"], "mean", axes=[1], keepdims=0)
    it.node("Transpose", ["mean"], "y", perm=[1, 0, 2])
    state = [2, "batch", HIDDEN]
    takes = [("input", ["batch", "seq", FEATURES]), ("h0", state)]
    it.save(tmp_path / "it.onnx", takes, [("y", ["batch", "seq", HIDDEN]), ("hn", state)])
    code, output = run(tmp_path / "it.onnx")
    assert code == 1
    assert "it can't be stepped: 7 steps at once are answered otherwise" in output

    it = Foreign()
    it.node("ReduceMean", ["input"], "mean", axes=[1], keepdims=1)
    it.node("Sub", ["input", "mean"], "y")
    it.save(tmp_path / "mean.onnx", takes[:1], [("y", ["batch", "seq", FEATURES])])
    code, output = run(tmp_path / "mean.onnx")
    assert code == 1
    assert "it can't be stepped: 7 steps at once are answered otherwise" in output
    assert "an answer depends on steps to come (a bidirectional layer?)" in output


def test_a_fixed_time_without_states_is_refused(tmp_path: Path) -> None:
    it = Foreign()
    it.node("ReduceMean", ["x"], "y", axes=[1], keepdims=0)
    it.save(tmp_path / "it.onnx", [("x", ["batch", 20, 3])], [("y", ["batch", 3])])
    code, output = run(tmp_path / "it.onnx")
    assert code == 1
    assert "the time axis of x is fixed at 20 steps, and no state goes on from one call to the next" in output


def test_sizes_that_the_graph_leaves_open_are_measured(tmp_path: Path) -> None:
    it = Foreign()
    it.node("Add", [it.node("MatMul", ["x", it.weight("U", FEATURES, HIDDEN)], "fed"), "h"], "h_out")
    it.node("MatMul", ["h_out", it.weight("head", HIDDEN, 2)], "y")
    row = ["batch", HIDDEN]
    it.save(tmp_path / "it.onnx", [("x", ["batch", FEATURES]), ("h", row)], [("y", [None, None]), ("h_out", row)])
    assert adopted(tmp_path / "it.onnx")["outputs"] == {"y": {"shape": [2]}}


def test_ids_are_counted_by_the_table_that_they_are_looked_up_in(tmp_path: Path) -> None:
    it = Foreign()
    it.node("Gather", [it.weight("table", 6, HIDDEN), "ids"], "looked up")
    it.node("Add", ["looked up", "h"], "h_out")
    it.node("MatMul", ["h_out", it.weight("head", HIDDEN, 2)], "y")
    row = ["batch", HIDDEN]
    ids = ("ids", onnx.TensorProto.INT64, ["batch"])
    it.save(tmp_path / "it.onnx", [ids, ("h", row)], [("y", ["batch", 2]), ("h_out", row)])
    assert adopted(tmp_path / "it.onnx")["inputs"] == {"ids": {"num_ids": 6}}


def test_a_state_that_never_moves_is_doubted(tmp_path: Path) -> None:
    it = Foreign()
    it.node("Identity", ["h"], "h_out")
    it.node("MatMul", ["x", it.weight("U", FEATURES, 2)], "y")
    row = ["batch", HIDDEN]
    it.save(tmp_path / "it.onnx", [("x", ["batch", FEATURES]), ("h", row)], [("y", ["batch", 2]), ("h_out", row)])
    _, output = run(tmp_path / "it.onnx")
    assert "look at states.h: a step of random input left it all zeros" in output


def test_an_output_of_a_frame_has_the_frames_size(tmp_path: Path) -> None:
    it = Foreign()
    it.node("Add", [it.node("ReduceMean", ["x"], "mean", axes=[1]), "h"], "h_out")
    it.node("Sub", ["x", "h_out"], "y")
    frame, row = ["batch", "samples"], ["batch", 1]
    it.save(tmp_path / "it.onnx", [("x", frame), ("h", row)], [("y", frame), ("h_out", row)])
    found = adopted(tmp_path / "it.onnx", "--chunk", 4)
    assert found["inputs"] == {"x": {"time_axis": 1, "chunk": 4}}
    assert found["outputs"] == {"y": {"shape": [4]}}


def test_taps_that_reach_back_are_a_context(tmp_path: Path) -> None:
    it = Foreign()
    it.node("Conv", ["x", it.weight("kernel", 2, FEATURES, 4)], "y", kernel_shape=[4])
    path = it.save(tmp_path / "it.onnx", [("x", ["batch", FEATURES, "samples"])], [("y", ["batch", 2, "out"])])
    found = adopted(path, "--context", 3)
    assert found["inputs"] == {"x": {"time_axis": 2, "context": 3}}

    it.node("Pad", ["x", it.constant("pads", 0, 0, 3, 0, 0, 1)], "padded")  # an entry too many
    it.nodes.reverse()
    it.nodes[1].input[0] = "padded"
    it.save(path, [("x", ["batch", FEATURES, "samples"])], [("y", ["batch", 2, "samples"])])
    code, output = run(path, "--force")
    assert code == 1
    assert "it loads, but does not run: " in output


def test_steps_that_are_left_out(tmp_path: Path) -> None:
    it = Foreign()
    ends = [it.constant(name, value) for name, value in (("from", 0), ("to", 2**31), ("axis", 1), ("stride", 2))]
    it.node("Slice", ["x", *ends], "y")
    it.save(tmp_path / "it.onnx", [("x", ["batch", "t", FEATURES])], [("y", ["batch", "u", FEATURES])])
    code, output = run(tmp_path / "it.onnx")
    assert code == 1
    assert "it can't be stepped: y of 7 steps is [4, 3] at once, and one by one [7, 3]" in output


def test_states_are_answered_where_nothing_else_is(tmp_path: Path) -> None:
    it = Foreign()
    it.node("Add", ["x", it.node("Squeeze", ["h", it.constant("zero", 0)], "flat")], "sum")
    it.node("Unsqueeze", ["sum", "zero"], "h_out")
    state = [1, "batch", FEATURES]
    it.save(tmp_path / "it.onnx", [("x", ["batch", FEATURES]), ("h", state)], [("h_out", state)])
    found = adopted(tmp_path / "it.onnx")
    assert (found["states"], found["outputs"]) == (
        {"h": {"next": "h_out", "batch_axis": 1}},
        {"h_out": {"batch_axis": 1}},
    )
    assert "outputs: every one is a state's next value" in (tmp_path / "model.toml").read_text()


def test_names_and_numbers_as_toml_has_them(tmp_path: Path) -> None:
    it, name = Foreign(), 'a "b" \\ \U0001f600'
    it.node("Min", [it.node("Add", [name, "h"], "sum"), "limit"], "h_out")
    it.node("Identity", ["h_out"], "é.y")
    row = ["batch", FEATURES]
    it.save(tmp_path / "it.onnx", [(name, row), ("h", row), ("limit", [])], [("é.y", row), ("h_out", row)])
    found = adopted(tmp_path / "it.onnx", "--constant", "limit=1e999")
    assert (list(found["inputs"]), list(found["outputs"])) == ([name], ["é.y"])
    assert found["constants"] == {"limit": float("inf")}


def test_in_place_within_a_repository(tmp_path: Path) -> None:
    path = foreign.lstm(tmp_path / "it" / "1" / "model.onnx")
    before = path.read_bytes()
    code, output = run(path, "--repository", tmp_path, "--name", "it")
    assert code == 0, output
    assert path.read_bytes() == before


def test_into_a_repository_with_its_weights(tmp_path: Path) -> None:
    source = tmp_path / "source" / "speech model.onnx"
    model = onnx.load(foreign.lstm(source))
    onnx.save(model, source, save_as_external_data=True, location="weights.bin", size_threshold=64)
    root = tmp_path / "root"
    code, output = run(source, "--repository", root, "--name", "it", "--version", 3)
    assert code == 0, output
    assert sorted(each.name for each in (root / "it" / "3").iterdir()) == ["model.onnx", "model.toml", "weights.bin"]
    assert f"next: rnnserve serve --repository {root}" in output
    x = np.random.default_rng(0).standard_normal((9, FEATURES)).astype(np.float32)
    with serving(root) as served, Client(served.address) as client:
        np.testing.assert_array_equal(client.predict("it", [x])[0], foreign.lstm_alone(source, x))
    assert run(source, "--repository", root, "--name", "it", "--version", 3)[0] == 2
    assert run(source, "--repository", root, "--name", "it", "--version", 3, "--force")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--constant", "rate"], 2, "--constant rate: expected NAME=VALUE"),
        (["--constant", "rate=fast"], 2, "'fast' is no number, list of numbers, true or false"),
        (["--constant", "speed=1"], 1, "the graph has no input 'speed'; it has input, h0, c0"),
        (["--state", "h0=y"], 1, "the graph has no output 'y'; it has logits, hn, cn"),
        (["--state", "h0=logits"], 1, "h0=logits: logits is float32 [?, ?, 2], and the state float32 [1, ?, 5]"),
        (["--name", "../it"], 2, "--name ../it: expected the name of a folder of the repository"),
        (["--repository", __file__], 1, "test_adopt.py/it/1: Not a directory"),
    ],
)
def test_what_is_asked_for_and_does_not_fit(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    found, output = run(foreign.lstm(tmp_path / "it.onnx"), *arguments)
    assert (found, words in output) == (code, True), output


def test_describing_and_verifying_point_to_the_server(tmp_path: Path) -> None:
    path = foreign.lstm(tmp_path / "model.onnx")
    adopted(path)
    with pytest.raises(ModelFileError, match=r"the model\.toml beside it .* `rnnserve doctor --repository REPOSITORY`"):
        ModelFile(path)


def test_files_that_say_themselves_what_they_are(tmp_path: Path) -> None:
    code, output = run(build("gru").save(tmp_path, "own"))
    assert code == 1
    assert "it is served without a model.toml" in output


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "it.onnx").write_bytes(b"no model")
    code, output = run(tmp_path / "it.onnx")
    assert code == 1
    assert "onnx can't read it" in output
