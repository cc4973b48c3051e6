"""The commands, and what they say of files that are wrong."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

from models import cli
from models.checks import differ, random_cuts, run_in_chunks
from models.modelfile import ModelFile
from models.spec import LENGTHS, METADATA_KEY, GoldenArray, GraphSpec, Layout, parse_spec
from tests.models.conftest import make_task
from tests.models.exports import exported_net

ROOT = Path(__file__).resolve().parents[2]


def invoke(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def altered(file, tmp_path, alter):
    """Write a changed copy of a model file."""
    model = onnx.load(file)
    alter(model)
    path = tmp_path / "altered.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def set_spec(model, **changes):
    [prop] = model.metadata_props
    prop.value = json.dumps(json.loads(prop.value) | changes)


# From a run to a file


def test_train_export_verify_describe(tmp_path):
    out, repository = tmp_path / "run", tmp_path / "repository"
    done = invoke(cli.train, "waterflow", "--cell", "lstm", "--hidden", 4, "--layers", 2, "--epochs", 2, "--out", out)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "waterflow: lstm, 2 x 4 units, " in done.stdout
    assert "l/s  (persistence: no change: 0.2092)" in done.stdout

    done = invoke(cli.export, out, "--repository", repository, "--name", "flow", "--version", 3)
    assert (done.exit_code, done.stderr) == (0, "")
    file = repository / "flow" / "3" / "model.onnx"
    assert done.stdout.startswith(f"{file}: {file.stat().st_size:,} bytes, ")
    assert "2 LSTM" in done.stdout

    done = invoke(cli.verify, file)
    assert (done.exit_code, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()[:-1]] == ["ok", "ok", "ok"]

    done = invoke(cli.export, out, "--repository", repository, "--name", "flow", "--version", 3)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["vowels", "--hidden", "0"], 2, "error: hidden: Input should be greater than 0"),
        (
            ["vowels", "--kernel-constraint", "max_norm=two"],
            2,
            "kernel_constraint: 'max_norm=two': max_value cannot be",
        ),
        (["waterflow", "--bidirectional"], 2, "error: waterflow cannot be bidirectional"),
        (["vowel"], 2, "'vowel' is not one of 'vowels', 'waterflow'"),
        (["vowels", "--out", "nowhere", "--resume"], 1, "error: nowhere is not a run"),
    ],
)
def test_train_refuses(arguments, code, said):
    done = invoke(cli.train, *arguments)
    assert done.exit_code == code
    assert said in done.stderr
    assert done.stdout == ""


def test_export_refuses_what_is_no_run(tmp_path):
    done = invoke(cli.export, tmp_path, "--repository", tmp_path / "repository")
    assert done.exit_code == 1
    assert done.stderr == f"error: {tmp_path} has no best.pt: it is no run, or ended before its first epoch did\n"


# Reading files


def test_verify_refuses_a_file_whose_weights_changed(vowels_file, tmp_path):
    def alter(model):
        [bias] = [each for each in model.graph.initializer if each.name == "head.bias"]
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * np.float32(1.01), bias.name))

    done = invoke(cli.verify, altered(vowels_file, tmp_path, alter))
    assert done.exit_code == 1
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["FAILED", "FAILED", "ok"]
    assert "golden input 1, golden input 2 off by more than 1e-05; do not serve it" in done.stderr


def test_verify_refuses_a_file_that_does_not_carry_its_state_on(vowels_file, tmp_path):
    def alter(model):
        # The golden answers agree with the graph, so that only the chunks can tell.
        gru = next(node for node in model.graph.node if node.op_type == "GRU")
        gru.input[5] = ""
        spec = parse_spec(model.metadata_props[0].value)
        golden = spec.golden[:1]  # from zero states
        set_spec(model, golden=[each.model_dump(mode="json") for each in golden])

    done = invoke(cli.verify, altered(vowels_file, tmp_path, alter))
    assert done.exit_code == 1
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["ok", "FAILED"]
    assert "4 chunks against whole off by more than" in done.stderr


def without_spec(model):
    del model.metadata_props[:]


def without_golden(model):
    set_spec(model, golden=[])


def half_a_spec(model):
    set_spec(model, hidden=[16, 16])


def other_state_names(model):
    spec = json.loads(model.metadata_props[0].value)
    spec["graphs"][0]["states"][0]["name"] = "h0"
    set_spec(model, **spec)


def other_golden(model):
    spec = json.loads(model.metadata_props[0].value)
    del spec["golden"][0]["inputs"]["x"]
    set_spec(model, **spec)


def unknown_operator(model):
    model.graph.node[0].op_type = "Magic"


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (without_spec, "no 'rnnserve.spec' in the file's metadata: export it with `rnnserve export`"),
        (half_a_spec, "the spec in the file's metadata is not valid"),
        (
            other_state_names,
            "its spec names other inputs than its graph has: h0, lengths, x against lengths, state.0.h, x",
        ),
        (other_golden, "its golden inputs or outputs are not those of its graph"),
        (unknown_operator, "onnxruntime cannot load it: "),
    ],
)
@pytest.mark.parametrize("command", [cli.verify, cli.describe], ids=["verify", "describe"])
def test_wrong_file_is_one_clear_line(command, vowels_file, tmp_path, alter, said):
    path = altered(vowels_file, tmp_path, alter)
    done = invoke(command, path)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {path}: {said}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [cli.verify, cli.describe], ids=["verify", "describe"])
def test_corrupt_or_missing_file_is_one_clear_line(command, vowels_file, tmp_path):
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(vowels_file.read_bytes()[:5000])
    for path, said, code in (
        (cut, "onnxruntime cannot load it", 1),
        (tmp_path / "none.onnx", "No such file", 2),
        (tmp_path, "Is a", 2),
    ):
        done = invoke(command, path)
        assert (done.exit_code, done.stdout) == (code, "")
        assert done.stderr.startswith(f"error: {path}: {said}")
        assert done.stderr.count("\n") == 1


def test_verify_needs_golden_inputs(vowels_file, tmp_path):
    done = invoke(cli.verify, altered(vowels_file, tmp_path, without_golden))
    assert done.exit_code == 1
    assert "it carries no golden inputs to check it by" in done.stderr


def test_describe_for_people(vowels_file):
    done = invoke(cli.describe, vowels_file)
    assert done.exit_code == 0
    model = ModelFile(vowels_file)
    text = " ".join(done.stdout.split())
    for expected in (
        "task vowels, many-to-one",
        "licence CC BY 4.0",
        "layers 0: GRU, 16 units, forward, activation tanh, gates sigmoid",
        "parameters 1,593",
        "step mode stepping: every layer is causal",
        "x [batch, time, 12] float32: LPC cepstrum coefficients",
        "elements: lpc_1, lpc_2,",
        "lengths [batch] int32, steps of each row, never 0",
        "y [batch, time, 9] float32: probability of each speaker",
        "state.0.h -> state.0.h.next [batch, 1, 16] float32",
        "operators 1 Add, 1 GRU, 1 MatMul, 1 Softmax, 1 Squeeze, 4 Transpose",
        "0 = speaker 1, 1 = speaker 2",
        f"test_accuracy {model.spec.training.metrics['test_accuracy']:.4f}",
        "in 19 cases; 1e-05 is allowed",
        f"size {vowels_file.stat().st_size:,} bytes",
        f"sha256 {model.digest}",
    ):
        assert expected in text, expected
    assert max(map(len, done.stdout.splitlines()[1:])) <= 110


def test_describe_tells_units_and_why_a_model_is_buffered(tmp_path):
    _, model, _ = exported_net(bidirectional=True)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    text = " ".join(invoke(cli.describe, tmp_path / "m.onnx").stdout.split())
    assert "step mode buffered: layer 0 is bidirectional: its output at any step depends on the steps that come" in text
    assert "x [batch, time, 2] float32, in mV: a wave, and noise" in text
    assert "y [batch, 3] float32" in text


def test_describe_for_programs(vowels_file):
    told = json.loads(invoke(cli.describe, vowels_file, "--json").stdout)
    model = ModelFile(vowels_file)
    assert told["sha256"] == model.digest
    assert told["step_mode"] == "stepping"
    assert told["num_golden"] == 2
    assert told["spec"] == model.spec.model_dump(mode="json", exclude={"golden"})


# What is not installed


def test_reading_files_needs_neither_torch_nor_onnx(vowels_file):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['onnx'] = sys.modules['onnxscript'] = None\n"
        "from models import cli\n"
        f"cli.describe([{str(vowels_file)!r}], standalone_mode=False)\n"
        f"cli.verify([{str(vowels_file)!r}], standalone_mode=False)\n"
    )
    done = run_python(code)
    assert (done.returncode, done.stderr) == (0, "")
    assert "answers as it should, within 1e-05" in done.stdout


def test_commands_import_nothing_heavy():
    heavy = {"torch", "onnx", "onnxscript", "onnxruntime", "matplotlib", "tqdm"}
    done = run_python(f"import sys, models.cli; print(sorted({heavy!r} & set(sys.modules)))")
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("command", "missing", "said"),
    [
        (
            "train(['vowels'])",
            "torch",
            "rnnserve train needs the training extra (torch is missing): pip install 'rnnserve[train]'",
        ),
        (
            "train(['vowels'])",
            "tqdm",
            "rnnserve train needs the training extra (tqdm is missing): pip install 'rnnserve[train]'",
        ),
        (
            "export(['r', '--repository', 'd'])",
            "onnx",
            "rnnserve export needs the training extra (onnx is missing): pip install 'rnnserve[train]'",
        ),
        (
            "export(['r', '--repository', 'd'])",
            "onnxruntime",
            "rnnserve export needs the runtime extra (onnxruntime is missing): pip install 'rnnserve[cpu]'",
        ),
        (
            "verify(['f'])",
            "onnxruntime",
            "rnnserve verify needs the runtime extra (onnxruntime is missing): pip install 'rnnserve[cpu]'",
        ),
    ],
)
def test_missing_extra_says_what_to_install(command, missing, said):
    done = run_python(f"import sys; sys.modules[{missing!r}] = None\nfrom models import cli; cli.{command}")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {said}\n")


# How answers are compared


def test_difference_is_relative_above_one_and_infinite_for_what_is_not_a_number():
    ones = np.ones((2, 2), np.float32)
    assert differ(ones, ones).scaled == 0.0
    gap = differ(np.array([0.5, 100.5]), np.array([0.4, 100.0]))
    assert gap.scaled == pytest.approx(0.1)
    assert gap.absolute == pytest.approx(0.5)
    assert gap.where == (0,)
    for wrong in (np.nan, np.inf):
        spoiled = ones.copy()
        spoiled[1, 0] = wrong
        assert differ(spoiled, ones).scaled == np.inf
        assert differ(spoiled, ones).where == (1, 0)
        assert differ(ones, spoiled).scaled == np.inf
        assert differ(spoiled, spoiled).scaled == 0.0
    assert differ(ones[:1], ones).scaled == np.inf


def test_cuts_have_a_step_each_and_add_up():
    lengths = np.array([4, 30, 11], np.int32)
    for seed in range(20):
        cuts = random_cuts(np.random.default_rng(seed), lengths, 4)
        assert cuts.dtype == np.int32
        assert cuts.min() >= 1
        np.testing.assert_array_equal(cuts.sum(axis=0), lengths)


def test_chunks_hand_every_row_its_own_steps_and_state():
    """A model that sums up: y is the running sum, the state the sum so far, and n the steps given in the last run."""
    task = make_task()
    graph = GraphSpec.model_validate(
        {
            "inputs": [task.input.model_dump()],
            "outputs": [
                task.output.model_dump() | {"name": "y"},
                {"name": "n", "dtype": "int32", "layout": Layout.PER_SEQUENCE},
            ],
            "states": [{"name": "s", "next_name": "s.next", "row_shape": (1, 2)}],
        }
    )
    given = []

    def run(feeds):
        lengths = feeds[LENGTHS]
        given.append(lengths.tolist())
        y = feeds["s"] + np.cumsum(feeds["x"], axis=1)
        last = y[np.arange(len(lengths)), lengths - 1]
        return {"y": y, "n": lengths, "s.next": last[:, None]}

    rng = np.random.default_rng(0)
    x, lengths = rng.standard_normal((3, 12, 2)), np.array([12, 5, 9], np.int32)
    cuts = random_cuts(rng, lengths, 3)
    start = rng.standard_normal((3, 1, 2))
    answers = run_in_chunks(run, graph, {"x": x, LENGTHS: lengths, "s": start}, cuts)
    assert given == cuts.tolist()
    assert answers["y"].shape == (3, 12, 2)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(answers["y"][row, :length], start[row] + np.cumsum(x[row, :length], axis=0))
        np.testing.assert_array_equal(answers["y"][row, length:], 0)
        np.testing.assert_allclose(answers["s.next"][row, 0], start[row, 0] + x[row, :length].sum(axis=0))
    np.testing.assert_array_equal(answers["n"], cuts[-1])


def test_metadata_of_another_maker_is_no_spec(tmp_path):
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: "not JSON"})
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    done = invoke(cli.describe, tmp_path / "m.onnx")
    assert done.exit_code == 1
    assert "the spec in the file's metadata is not valid" in done.stderr


def test_golden_arrays_survive_json():
    for array in (
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.array([3, 1], np.int32),
        np.zeros((0, 2), np.float32),
    ):
        again = GoldenArray.model_validate_json(GoldenArray.of(array).model_dump_json()).array()
        assert again.dtype == array.dtype
        np.testing.assert_array_equal(again, array)
