"""The `rnnserve` command: against the real server, and as a process."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from service.client.cli import main
from tests.onnx_models import build
from tests.serving import serving

LABELS = ("quiet", "loud")
MODULE = [sys.executable, "-m", "service.client.cli"]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A server of a forecaster, a classifier, and one that needs the whole sequence."""
    root = tmp_path_factory.mktemp("models")
    build("lstm").save(root, "flow")
    build("gru", labels=LABELS).save(root, "noise")
    build("gru", bidirectional=True, many_to_one=True).save(root, "whole")
    (root / "torn" / "1").mkdir(parents=True)
    (root / "torn" / "1" / "model.onnx").write_bytes(b"torn")
    with serving(root) as running:
        yield running.address


@pytest.fixture
def run(address, monkeypatch):
    """Run the command in this process: (exit code, standard output, standard error)."""
    monkeypatch.setenv("RNNSERVE_SERVER", address)

    def call(*args, stdin=None):
        result = CliRunner().invoke(main, [str(arg) for arg in args], input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr

    return call


@pytest.fixture
def recording(tmp_path):
    """A file of five steps of three channels."""
    path = tmp_path / "recording.npy"
    np.save(path, np.random.default_rng(1).normal(size=(5, 3)))
    return path


@pytest.fixture
def expected(address, recording):
    """What the models say of it."""
    from service.client import Client

    with Client(address) as client:
        return {name: client.predict(name, [np.load(recording)])[0] for name in ("flow", "noise", "whole")}


def environment(address):
    return os.environ | {"RNNSERVE_SERVER": address, "PYTHONPATH": os.pathsep.join(sys.path)}


# ---- models and health -----------------------------------------------------------------------------------------------


def test_models_are_listed_and_told(run):
    code, out, _ = run("models")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ["MODEL", "VERSION", "CELL", "TOPOLOGY", "STEPS", "INPUT", "OUTPUT", "BATCHING"]
    assert [line.split()[0] for line in lines[1:4]] == ["flow", "noise", "whole"]
    assert lines[4].startswith("broken: torn 1: ")
    code, out, _ = run("models", "noise")
    assert code == 0
    assert "labels      quiet, loud" in out
    assert "input       x float32 [time, 3]" in out
    facts = json.loads(run("models", "whole", "--json")[1])
    assert (facts["step_mode"], facts["outputs"][0]["row_shape"]) == ("buffered", [2])
    assert [model["name"] for model in json.loads(run("models", "--json")[1])["models"]] == ["flow", "noise", "whole"]


def test_health_is_an_exit_code(run, address):
    assert run("health") == (0, f"{address}: healthy\n", "")
    assert run("health", "--model", "noise/1", "-q") == (0, "", "")
    assert run("health", "--model", "n" * 200)[0] == 1
    code, out, err = run("health", "--server", "localhost:1", "--wait", "0.3")
    assert (code, out) == (1, "")
    assert err.startswith("localhost:1: unavailable")


def test_health_loads_neither_numpy_nor_protobuf(address):
    code = (
        "import sys\n"
        "from service.client.cli import main\n"
        "assert main(['health'], standalone_mode=False) == 0\n"
        "heavy = ('numpy', 'google.protobuf', 'pydantic', 'importlib.metadata')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(address), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


# ---- whole sequences -------------------------------------------------------------------------------------------------


def test_predict_prints_the_values_of_every_step(run, recording, expected):
    code, out, _ = run("predict", "flow", recording)
    cells = [line.split("\t") for line in out.splitlines()]
    assert code == 0
    assert [row[:2] for row in cells] == [[str(recording), str(step)] for step in range(5)]
    np.testing.assert_allclose(np.array([row[2:] for row in cells], float), expected["flow"], rtol=1e-5)


def test_predict_prints_labels_and_last_rows(run, recording, expected):
    label = LABELS[int(expected["noise"][-1].argmax())]
    assert (
        run("predict", "noise", recording, "--last")[1] == f"{recording}\t{label}\t{expected['noise'][-1].max():.4f}\n"
    )
    assert len(run("predict", "whole", recording)[1].splitlines()) == 1


def test_predict_takes_many_files_and_writes_json_and_npz(run, tmp_path, recording, expected):
    np.savez(tmp_path / "two.npz", a=np.load(recording), b=np.zeros((2, 3)))
    target = tmp_path / "out.npz"
    code, out, _ = run(
        "predict", "flow", recording, tmp_path / "two.npz", "-", "--json", "--output", target, stdin="1,2,3\n"
    )
    facts = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [fact["sequence"] for fact in facts] == [
        str(recording),
        f"{tmp_path / 'two.npz'}:a",
        f"{tmp_path / 'two.npz'}:b",
        "-",
    ]
    np.testing.assert_array_equal(np.float32(facts[1]["output"]), expected["flow"])
    with np.load(target) as saved:
        np.testing.assert_array_equal(saved[str(recording)], expected["flow"])
        assert saved["-"].shape == (1, 2)
    fact = json.loads(run("predict", "noise", recording, "--json")[1])
    assert fact["label"] == LABELS[int(expected["noise"][-1].argmax())]


# ---- streams ---------------------------------------------------------------------------------------------------------


def test_stream_prints_a_line_a_step(run, recording, expected):
    code, out, _ = run("stream", "flow", recording)
    assert code == 0
    cells = np.array([line.split("\t") for line in out.splitlines()], float)
    assert cells[:, 0].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(cells[:, 1:], expected["flow"], rtol=1e-5)
    lines = run("stream", "noise", recording)[1].splitlines()
    assert [line.split("\t")[1] for line in lines] == [LABELS[i] for i in expected["noise"].argmax(axis=1)]


def test_stream_reads_standard_input_and_writes_json(run, recording, expected):
    rows = "".join(f"{json.dumps(row)}\n" for row in np.load(recording).tolist())
    code, out, _ = run("stream", "noise", "--json", stdin=rows)
    facts = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [fact["position"] for fact in facts] == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(np.float32([fact["output"] for fact in facts]), expected["noise"])
    assert {"label", "probability"} <= facts[0].keys()


def test_stream_of_a_buffered_model_answers_once(run, recording, expected):
    code, out, _ = run("stream", "whole", recording)
    position, *values = out.split("\t")
    assert (code, position) == (0, "4")
    np.testing.assert_allclose(np.array(values, float), expected["whole"], rtol=1e-5)


def test_stream_goes_on_with_a_session(run):
    step = "0.5,-1,2\n"
    assert run("stream", "flow", "--session", "cli", "--linger", "30", stdin=step * 2)[0] == 0
    code, out, _ = run("stream", "flow", "--session", "cli", "--resume", stdin=step)
    whole = run("stream", "flow", stdin=step * 3)[1].splitlines()
    assert (code, out.splitlines()) == (0, [whole[2]])
    code, out, err = run("stream", "flow", "--session", "cli", "--resume", stdin=step)
    assert (code, out) == (1, "")
    assert "not live" in err


def test_stream_paces_steps(run, recording):
    import time

    begin = time.monotonic()
    assert run("stream", "flow", recording, "--rate", "20")[0] == 0
    assert time.monotonic() - begin >= 4 / 20


def test_stream_answers_each_line_as_it_arrives(address):
    process = subprocess.Popen(
        [*MODULE, "stream", "flow"], env=environment(address), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        for position in range(3):
            process.stdin.write("1,2,3\n")
            process.stdin.flush()
            assert process.stdout.readline().split("\t")[0] == str(position)
        process.stdin.close()
        assert process.wait(timeout=20) == 0


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "stdin", "code", "message"),
    [
        (["predict", "nope", "-"], "1,2,3\n", 1, "no model 'nope' is served"),
        (["predict", "flow", "Mary", "--text"], None, 2, "model flow takes no text: x is not of characters"),
        (["predict", "flow", "-"], "1,2\n", 2, "standard input, line 1, column 3: expected 3 values, got 2"),
        (["stream", "flow"], "1,2,3\n1,b,3\n", 2, "standard input, line 2, column 2: expected a number, got 'b'"),
        (["stream", "flow"], "nan,2,3\n", 1, "is nan"),
        (["stream", "flow"], "", 2, "standard input: no timesteps"),
        (["stream", "flow", "gone.csv"], None, 2, "gone.csv: No such file"),
        (
            ["models", "--server", "localhost:1", "--timeout", "5"],
            None,
            3,
            "; start a server by `rnnserve serve`",
        ),
        (["stream", "flow", "--server", "localhost:1"], "1,2,3\n", 3, "connect"),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(run, args, stdin, code, message):
    got, _, err = run(*args, stdin=stdin)
    assert got == code
    assert err.startswith("rnnserve: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        ["predict", "flow"],
        ["stream", "flow", "--resume"],
        ["stream", "flow", "--text"],
        ["stream", "flow", "--rate", "0"],
        ["stream", "flow", "--priority", "urgent"],
        ["models", "--cert", __file__],
        ["nothing"],
        ["--nothing"],
    ],
)
def test_wrong_usage_is_2(run, args):
    code, _, err = run(*args)
    assert code == 2
    assert "Usage: " in err


def test_a_subcommand_that_does_not_exist_is_told_with_what_was_meant(run):
    _, _, err = run("sreve")
    assert err.endswith("Error: No such command 'sreve'. (Did you mean 'serve'?)\n")
    assert "mean" not in run("nothing")[2]


def test_an_interrupted_stream_ends_quietly(address):
    process = subprocess.Popen(
        [*MODULE, "stream", "flow"],
        env=environment(address),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What is started in the background of a shell ignores Ctrl-C, and so does what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        process.stdin.write("1,2,3\n")
        process.stdin.flush()
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stderr.read() == ""


def test_a_reader_that_goes_away_ends_the_stream_quietly(address):
    process = subprocess.Popen(
        [*MODULE, "stream", "flow"],
        env=environment(address),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        process.stdout.close()
        process.stdin.write("1,2,3\n" * 10)
        process.stdin.close()
        assert process.wait(timeout=20) == 141
        assert process.stderr.read() == ""


# ---- subcommands of others -------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package that brings subcommands: one works, one lacks torch, one onnxruntime, one is broken."""
    info = tmp_path / "extra-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n")
    modules = {
        "fine": "import click\n@click.command()\ndef command():\n    'Does well.'\n    click.echo('well')\n",
        "torchless": "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n",
        "lateless": "import click\n@click.command()\ndef command():\n    'Needs more.'\n    raise ModuleNotFoundError("
        "\"No module named 'onnxruntime'\", name='onnxruntime')\n",
        "broken": "command = undefined\n",
        "empty": "",
    }
    points = ["[rnnserve.commands]"]
    for name, text in modules.items():
        (tmp_path / f"extra_{name}.py").write_text(text)
        points.append(f"{name} = extra_{name}:command")
    (info / "entry_points.txt").write_text("\n".join(points))
    monkeypatch.syspath_prepend(tmp_path)


def test_help_lists_subcommands_that_cannot_be_loaded(run, installed):
    code, out, _ = run("--help")
    assert code == 0
    listed = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert {"models", "predict", "stream", "health", "fine", "torchless", "lateless", "empty"} <= listed.keys()
    assert "Does well." in listed["fine"]
    assert "pip install 'rnnserve[train]'" in listed["torchless"]
    assert "130  interrupted" in out


def test_a_subcommand_says_what_to_install(run, installed):
    assert run("fine") == (0, "well\n", "")
    code, _, err = run("torchless", "--some", "option")
    assert (code, err) == (1, "rnnserve: torchless: this needs torch: pip install 'rnnserve[train]'\n")
    code, _, err = run("lateless")
    assert (code, err) == (1, "rnnserve: this needs onnxruntime: pip install 'rnnserve[cpu]' or 'rnnserve[gpu]'\n")
    for name in ("empty", "broken"):
        code, _, err = run(name)
        assert code == 1
        assert "can't be loaded" in err


def test_version(run):
    assert run("--version")[1].startswith("rnnserve, version ")
