"""`rnnserve doctor`: what it finds on machines and with settings that have something wrong with them."""

from __future__ import annotations

import datetime
import json
import math
import os
import socket
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import trustme
from click.testing import CliRunner
from onnx import numpy_helper

from service.client.cli import main
from service.config import PREFIX
from service.doctor import providers, trial
from service.doctor.findings import Finding, Level
from service.doctor.machine import Machine
from tests.onnx_models import build

ROOT = Path(__file__).resolve().parent.parent
HAS_DRIVER = not providers.cuda_driver()
CERT_DAYS = 90
FREE = ("--port", "0", "--http-port", "0")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nothing of the machine's own environment, and a way to set more."""
    for name in os.environ:
        if name.upper().startswith(PREFIX):
            monkeypatch.delenv(name)
    return monkeypatch.setenv


@pytest.fixture(scope="session")
def runtime():
    """What is found of this machine's onnxruntime, in a process of its own, once."""
    return trial.examine()


@pytest.fixture(autouse=True)
def examined_once(monkeypatch, runtime):
    monkeypatch.setattr(providers, "examine", lambda: runtime)


def examined(*arguments):
    """Run the command on free ports: (exit code, findings by name)."""
    free = FREE if "--port" not in arguments else ()
    result = CliRunner().invoke(main, ["doctor", "--json", *map(str, (*free, *arguments))])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    content = json.loads(result.stdout)
    assert content["is_fine"] == (result.exit_code == 0)
    return result.exit_code, {each["name"]: each for each in content["findings"]}


# A machine where all is well


def test_a_server_that_works_is_told_to(repository):
    code, found = examined("--repository", repository)
    assert code == 0
    assert {each["level"] for each in found.values()} <= {"ok", "note", "warning"}
    assert found["cpu"]["level"] == "ok"
    assert "rnnserve 0.1.0, CPython 3." in found["rnnserve"]["text"]
    assert f"onnxruntime {ort.__version__}" in found["packages"]["text"]
    assert found["lstm/1"]["text"] == "lstm/1: stepping, CPUExecutionProvider, exact"
    assert found["coupled/1"]["text"].endswith("coupled")
    assert {"gru/2", "bilstm/1", "tokens/1", "cores", "memory", "uvloop", "port"} <= set(found)


def test_people_are_told_in_words(repository):
    result = CliRunner().invoke(main, ["doctor", "--repository", str(repository / "none"), *FREE])
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0] == "installed"
    [at] = [number for number, line in enumerate(lines) if "is no directory" in line]
    assert lines[at].startswith("  FAIL  repository ")
    assert lines[at + 1] == "        -> mend that, then ask again"
    assert lines[-1].startswith("1 of what was asked for does not work")


def test_advice_is_never_missing():
    with pytest.raises(ValueError, match="say what to do"):
        Finding("machine", "cores", Level.WARNING, "too few")


# Execution providers


def test_the_model_that_providers_run_is_an_lstm_of_ones():
    model = onnx.load_from_string(trial.MODEL)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["LSTM"]
    assert [numpy_helper.to_array(each).tolist() for each in model.graph.initializer] == [[[[1.0]] * 4]] * 2
    gate = 1 / (1 + math.exp(-1))
    assert math.isclose(gate * math.tanh(gate * math.tanh(1)), trial.EXPECTED, rel_tol=1e-6)


def test_what_is_found_in_another_process_is_what_is_so(runtime):
    assert runtime == trial.look()
    assert dict(runtime.faults)[trial.CPU] == ""


def test_a_provider_that_leaves_the_work_to_the_cpu_does_not_work():
    assert trial.run_on(ort, "CPUExecutionProvider") == ""
    if "AzureExecutionProvider" in ort.get_available_providers():
        assert "CPU EP" in trial.run_on(ort, "AzureExecutionProvider")


def test_a_provider_that_computes_something_else_does_not_work(monkeypatch):
    monkeypatch.setattr(trial, "EXPECTED", 0.5)
    assert trial.run_on(ort, "CPUExecutionProvider").startswith("it computed 0.369")


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this onnxruntime has CUDA")
def test_cuda_is_a_problem_if_it_is_asked_for_alone(repository):
    code, found = examined("--provider", "cuda", "--repository", repository)
    assert code == 1
    assert found["cuda"]["level"] == "problem"
    assert "is a build without it" in found["cuda"]["text"]
    assert ("no NVIDIA driver" in found["cuda"]["text"]) != HAS_DRIVER
    assert "rnnserve[gpu]" in found["cuda"]["advice"]
    code, found = examined("--provider", "cuda,cpu", "--repository", repository)
    assert (code, found["cuda"]["level"]) == (0, "warning")
    code, found = examined()
    assert (code, found["cuda"]["level"]) == (0, "note")


def test_a_library_that_cuda_lacks_is_named(tmp_path):
    library = tmp_path / "libonnxruntime_providers_cuda.so"
    assert trial.missing_library(library) == ""
    library.write_bytes(b"not a library")
    assert str(library) in trial.missing_library(library)


CPU_WORKS, CUDA_FAILS = (trial.CPU, ""), (trial.CUDA, "no kernel image is available")
LIBRARY = "libcudnn.so.9: cannot open shared object file: No such file or directory"


@pytest.mark.parametrize(
    ("faults", "library", "driver", "level", "words", "advice"),
    [
        ((CPU_WORKS,), "", "", "problem", "a build without it", "pip install 'rnnserve[gpu]'"),
        ((CPU_WORKS, CUDA_FAILS), LIBRARY, "", "problem", f"can't work: {LIBRARY}", "brings CUDA's libraries"),
        ((CPU_WORKS, CUDA_FAILS), LIBRARY, "no driver", "problem", f"no driver; {LIBRARY}", "--gpus all"),
        ((CPU_WORKS, CUDA_FAILS), "", "", "problem", "no kernel image is available", "nvidia-smi"),
        ((CPU_WORKS, (trial.CUDA, "")), "", "", "ok", "it ran an LSTM", ""),
    ],
)
def test_what_keeps_cuda_from_working_is_told_with_what_to_do(faults, library, driver, level, words, advice):
    runtime = trial.Runtime(True, "1.32.0", faults, library)
    found = providers.judge_cuda(runtime, driver, is_asked=True, falls_back=False)
    assert (found.level, words in found.text, advice in found.advice) == (level, True, True), found
    if level != "ok":
        assert providers.judge_cuda(runtime, driver, is_asked=True, falls_back=True).level == "warning"
        assert providers.judge_cuda(runtime, driver, is_asked=False, falls_back=False).level == "note"


# The machine


def write(root, **files):
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_a_processor_and_the_limits_of_control_groups_are_read(tmp_path):
    write(
        tmp_path,
        proc__cpuinfo="processor\t: 0\nmodel name\t: A Processor\nflags\t\t: fpu avx avx2 avx512_vnni\n",
        proc__meminfo="MemTotal:        8000 kB\n",
        proc__self__cgroup="0::/pod/container\n",
    )
    group = tmp_path / "sys/fs/cgroup"
    for folder, cpu, memory in (
        ("", "max 100000", "max"),
        ("pod", "150000 100000", "4096000"),
        ("pod/container", "max 100000", "max"),
    ):
        (group / folder).mkdir(parents=True, exist_ok=True)
        (group / folder / "cpu.max").write_text(cpu)
        (group / folder / "memory.max").write_text(memory)
    machine = Machine(tmp_path)
    assert machine.cpu() == ("A Processor", ["avx2", "avx512_vnni"])
    assert machine.cores() == (len(os.sched_getaffinity(0)), 1.5)
    assert machine.memory() == 4096000


def test_control_groups_of_version_1_are_read(tmp_path):
    write(tmp_path, proc__self__cgroup="4:memory:/a\n3:cpu,cpuacct:/a\n", proc__meminfo="MemTotal: 8000 kB\n")
    for name, content in {
        "cpu,cpuacct/a/cpu.cfs_quota_us": "50000",
        "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
        "memory/a/memory.limit_in_bytes": "9223372036854771712",
    }.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert Machine(tmp_path).cores()[1] == 0.5
    assert Machine(tmp_path).memory() == 8000 * 1024


def test_a_machine_that_tells_nothing_is_no_fault(tmp_path):
    machine = Machine(tmp_path)
    assert (machine.cpu(), machine.cores()[1], machine.memory()) == (("processor", []), None, None)


def test_more_workers_than_cores_and_few_files_are_warned_about(environment):
    environment("GRPC_EXPERIMENTS", "")
    code, found = examined("--workers", 500, "--max-sessions", 10**9)
    assert code == 0
    assert found["cores"]["level"] == found["files"]["level"] == found["grpc_experiments"]["level"] == "warning"
    assert "workers x compute_threads is 500" in found["cores"]["text"]
    assert "ulimit -n" in found["files"]["advice"]
    assert found["tmp"]["level"] == "ok"


# Settings


def test_ports_that_are_in_use_are_named(repository):
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
            each.listen()
        ports = ("--port", one.getsockname()[1], "--http-port", two.getsockname()[1])
        code, found = examined(*ports, "--repository", repository)
        assert code == 1
        assert found["port"]["text"] == f"127.0.0.1:{one.getsockname()[1]} is in use"
        assert "--http-port" in found["http_port"]["advice"]
        code, found = examined(*ports)
        assert (code, found["port"]["level"]) == (0, "note")
    code, found = examined("--host", "192.0.2.1", "--repository", repository)
    assert code == 1
    assert "--host" in found["port"]["advice"]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Files of certificates of several kinds, each with its key."""
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    now = datetime.datetime.now(datetime.UTC)
    ends = {"good": CERT_DAYS, "soon": 5, "over": -1}
    for name, days in ends.items():
        lasts = {"not_before": now - datetime.timedelta(days=9), "not_after": now + datetime.timedelta(days=days)}
        made = authority.issue_cert("localhost", "10.0.0.1", **lasts)
        made.private_key_pem.write_to_path(folder / f"{name}.key")
        for blob in made.cert_chain_pems:
            blob.write_to_path(folder / f"{name}.pem", append=True)
    authority.cert_pem.write_to_path(folder / "ca.pem")
    (folder / "junk.pem").write_text("junk")
    return folder


@pytest.mark.parametrize(
    ("cert", "key", "level", "words"),
    [
        ("good.pem", "good.key", "ok", "fits its key, is for localhost, 10.0.0.1, and ends"),
        ("soon.pem", "soon.key", "warning", "in 5 days"),
        ("over.pem", "over.key", "problem", "certificate has expired"),
        ("good.pem", "soon.key", "problem", "the key is not that of"),
        ("junk.pem", "good.key", "problem", "can't be used"),
        ("none.pem", "good.key", "problem", "can't read"),
        ("good.pem", "none.key", "problem", "none.key: No such file"),
    ],
)
def test_certificates_are_tried(certificates, cert, key, level, words):
    code, found = examined("--tls-cert", certificates / cert, "--tls-key", certificates / key)
    assert found["tls_cert"]["level"] == level, found["tls_cert"]
    assert words in found["tls_cert"]["text"]
    assert code == (level == "problem")


def test_authorities_of_clients_are_tried(certificates):
    pair = ("--tls-cert", certificates / "good.pem", "--tls-key", certificates / "good.key", "--tls-client-ca")
    code, found = examined(*pair, certificates / "ca.pem")
    assert code == 0
    assert found["tls_client_ca"]["text"].endswith("1 authorities that may sign clients' certificates")
    assert examined(*pair, certificates / "junk.pem")[1]["tls_client_ca"]["level"] == "problem"
    assert examined("--tls-cert", certificates / "good.pem")[1]["tls"]["level"] == "problem"


def test_settings_that_can_not_work_are_told(tmp_path, environment):
    code, found = examined("--max-sessions", "none")
    assert code == 1
    assert "max_sessions: Input should be a valid integer" in found["max_sessions"]["text"]
    environment("RNNSERVE_MAX_SESIONS", "1")
    assert examined()[1]["RNNSERVE_MAX_SESIONS"]["advice"] == "did you mean RNNSERVE_MAX_SESSIONS?"
    assert examined("--config", tmp_path / "none.toml")[1]["config"]["level"] == "problem"


def test_broken_models_and_empty_repositories_are_problems(tmp_path):
    assert "holds no model" in examined("--repository", tmp_path)[1]["repository"]["text"]
    build("lstm").save(tmp_path, "good")
    path = build("lstm").save(tmp_path, "torn")
    path.write_bytes(b"torn")
    code, found = examined("--repository", tmp_path)
    assert code == 1
    assert found["good/1"]["level"] == "ok"
    assert found["torn/1"]["level"] == "problem"
    assert "rnnserve verify" in found["torn/1"]["advice"]


def test_states_that_were_spilled_are_left_alone(tmp_path):
    build("lstm").save(tmp_path / "models", "lstm")
    store = tmp_path / "states.db"
    store.write_bytes(b"of a server that runs")
    settings = ("--repository", tmp_path / "models", "--max-resident-sessions", 5, "--spill-store")
    code, found = examined(*settings, store)
    assert (code, found["spill_store"]["level"]) == (0, "ok")
    assert store.read_bytes() == b"of a server that runs"
    code, found = examined(*settings, tmp_path / "nowhere" / "states.db")
    assert code == 1
    assert "can't be written to: No such file or directory" in found["spill_store"]["text"]
