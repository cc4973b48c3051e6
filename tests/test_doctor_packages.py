"""`rnnserve doctor` where packages are missing, broken, or there twice: in a process that sees only some of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _environment():
    """The machine's own, without settings."""
    return {name: value for name, value in os.environ.items() if not name.upper().startswith("RNNSERVE_")}


@pytest.fixture
def without(tmp_path):
    """Run the doctor where only some packages are installed, and others are put in: (exit code, findings by name)."""

    def run(blocked, *arguments, files=None):
        site = tmp_path / "site"
        site.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not any(entry.name == name or entry.name.startswith(f"{name}-") for name in blocked):
                (site / entry.name).symlink_to(entry)
        for name, content in (files or {}).items():
            path = site / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
        command = "from service.client.cli import main; main()"
        done = subprocess.run(
            [
                sys.executable,
                "-S",
                "-c",
                command,
                "doctor",
                "--json",
                *("--port", "0", "--http-port", "0"),
                *map(str, arguments),
            ],
            env={**_environment(), "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"},
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.stdout, done.stderr
        return done.returncode, {each["name"]: each for each in json.loads(done.stdout)["findings"]}

    return run


TORCH_SIDE = ("torch", "onnx", "onnxscript", "tqdm")


@pytest.mark.parametrize("is_serving", [False, True])
def test_without_onnxruntime_and_torch_it_says_what_to_install(without, repository, is_serving):
    arguments = ("--repository", repository) if is_serving else ()
    code, found = without(("onnxruntime", *TORCH_SIDE), *arguments)
    assert code == is_serving
    assert found["onnxruntime"]["level"] == ("problem" if is_serving else "note")
    assert "pip install 'rnnserve[cpu]'" in found["onnxruntime"]["advice"]
    assert "onnx, onnxscript, torch" in found["train"]["text"]
    assert "tqdm" in found["train"]["text"]
    assert "pip install 'rnnserve[train]'" in found["train"]["advice"]
    assert "onnxruntime" not in found["packages"]["text"]
    assert "lstm/1" not in found


def test_an_extra_that_a_setting_needs_is_a_problem_if_it_is_missing(without):
    extras = ("s3fs", "opentelemetry_sdk", "opentelemetry_exporter_otlp")
    code, found = without(extras, "--otlp-endpoint", "http://localhost:4317")
    assert code == 1
    assert found["otel"]["level"] == "problem"
    assert "s3" not in found
    assert "pip install 'rnnserve[otel]'" in found["otel"]["advice"]


def test_two_builds_of_onnxruntime_at_once_are_a_problem(without, repository):
    second = {
        "onnxruntime_gpu-1.32.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.32.0\n"
    }
    code, found = without((), "--repository", repository, files=second)
    assert code == 1
    assert "onnxruntime and onnxruntime-gpu are both installed" in found["onnxruntime"]["text"]
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in found["onnxruntime"]["advice"]


def test_an_onnxruntime_that_can_not_be_loaded_is_told_with_the_reason(without, repository):
    broken = {"onnxruntime/__init__.py": "raise ImportError('libonnxruntime.so.1: cannot open shared object file')"}
    code, found = without(("onnxruntime",), "--repository", repository, files=broken)
    assert code == 1
    assert "libonnxruntime.so.1: cannot open shared object file" in found["onnxruntime"]["text"]


def test_an_onnxruntime_that_crashes_is_told_of(without, repository):
    code, found = without(("onnxruntime",), files={"onnxruntime/__init__.py": "import os; os.abort()"})
    assert (code, found["onnxruntime"]["level"]) == (0, "note")
    assert "ended with status -6" in found["onnxruntime"]["text"]


def test_what_onnxruntime_says_does_not_get_between(without):
    loud = {"onnxruntime/__init__.py": "import os; print('loud'); os.write(1, b'louder'); raise ImportError('x')"}
    code, found = without(("onnxruntime",), "--provider", "cpu", files=loud)
    assert code == 1
    assert found["onnxruntime"]["text"].endswith("does not work: x")


def test_without_grpc_it_still_looks_at_the_rest(without):
    code, found = without(("grpc",))
    assert code == 1
    assert "No module named 'grpc'" in found["grpc"]["text"]
    assert found["cpu"]["level"] == "ok"
