"""The example clients of docs/clients, each built by its own toolchain, beside the Python client."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import trustme

from service.client import Client
from tests.client.front import fault, fronted
from tests.onnx_models import build
from tests.serving import Served, serving

BUILT = Path(__file__).resolve().parent.parent.parent / "build" / "clients"
LENGTHS, NUM_STEPS, BAD_STEP = (5, 2, 9), 6, 3
Values = dict[tuple[int, ...], list[float]]


@pytest.fixture(params=["node", "cpp", "go", "java"])
def program(request: pytest.FixtureRequest) -> Path:
    """The built example of a language."""
    folder = BUILT / request.param
    if not (folder / "run").exists():
        reason = folder / "why"
        pytest.skip(reason.read_text().splitlines()[0] if reason.exists() else "`make test-compat` builds it")
    return folder / "run"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    build("lstm").save(root, "lstm")
    build("gru", seed=1).save(root, "gru")
    build("gru", seed=2, features=4).save(root, "gru", 2)
    return root


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    with serving(models) as running:
        yield running


def call(program: Path, *arguments: str | Path) -> tuple[int, list[str], str]:
    """Run an example: (status, lines, errors)."""
    done = subprocess.run([program, *arguments], check=False, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.splitlines(), done.stderr


def make_sequence(s: int, length: int, width: int) -> np.ndarray:
    """As the examples make it."""
    rows = [[((s * 5 + t * 7 + i * 3) % 11) / 10 - 0.5 for i in range(width)] for t in range(length)]
    return np.array(rows, np.float32)


def check_output(lines: list[str], client: Client, model: str, width: int) -> None:
    """Compare every number with the Python client's, bit for bit, and the fault with the server's."""
    predicted: dict[tuple[int, int], list[str]] = {}
    stepped: dict[int, list[str]] = {}
    rejected = []
    for words in map(str.split, lines):
        if words[0] == "predict":
            predicted[int(words[1]), int(words[2])] = words[3:]
        elif words[0] == "step":
            stepped[int(words[1])] = words[2:]
        elif words[0].startswith("STEP_ERROR"):
            rejected.append(words[:3])
    xs = [make_sequence(s, length, width) for s, length in enumerate(LENGTHS)]
    ys = client.predict(model, xs)
    assert list(predicted) == [(s, t) for s, length in enumerate(LENGTHS) for t in range(length)]
    for (s, t), row in predicted.items():
        np.testing.assert_array_equal(np.array(row, np.float32), ys[s][t])
    assert list(stepped) == list(range(NUM_STEPS))
    with client.stream(model) as stream:
        for row, expected in zip(stepped.values(), stream.run(make_sequence(0, NUM_STEPS, width)), strict=True):
            np.testing.assert_array_equal(np.array(row, np.float32), expected)
    assert rejected == [["STEP_ERROR_KIND_STEP_REJECTED", str(BAD_STEP), "INVALID_ARGUMENT"]]


@pytest.mark.parametrize(("model", "width"), [("lstm", 3), ("gru", 4)])
def test_numbers_and_faults_are_those_of_the_python_client(
    program: Path, served: Served, model: str, width: int
) -> None:
    status, lines, errors = call(program, served.address, model)
    assert status == 0, errors
    assert lines[:3] == [f"model {name} STEP_MODE_STEPPING EXACTNESS_EXACT" for name in ("gru 1", "gru 2", "lstm 1")]
    with Client(served.address) as client:
        check_output(lines, client, model, width)


def test_tls(program: Path, models: Path, tmp_path: Path) -> None:
    authority, other = trustme.CA(), trustme.CA()
    made = authority.issue_cert("localhost")
    made.private_key_pem.write_to_path(tmp_path / "key.pem")
    made.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    other.cert_pem.write_to_path(tmp_path / "other.pem")
    with serving(models, tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem") as secure:
        target = f"localhost:{secure.server.port}"
        status, lines, errors = call(program, target, "lstm", tmp_path / "ca.pem")
        assert status == 0, errors
        with Client(target, root_certificates=authority.cert_pem.bytes()) as client:
            check_output(lines, client, "lstm", 3)
        status, _, errors = call(program, target, "lstm", tmp_path / "other.pem")
        assert status == 1
        assert "UNAVAILABLE" in errors


def test_calls_are_tried_again_by_the_service_config(program: Path, served: Served) -> None:
    with fronted(served.address) as front:
        front.faults["ListModels"] = [fault(grpc.StatusCode.UNAVAILABLE)]
        front.faults["Predict"] = [
            fault(grpc.StatusCode.UNAVAILABLE),
            fault(grpc.StatusCode.RESOURCE_EXHAUSTED, pushback_ms=20),
        ]
        status, lines, errors = call(program, front.address, "lstm")
        assert status == 0, errors
        assert front.attempts == {"ListModels": [0, 1], "Predict": [0, 1, 2], "StreamPredict": [0]}
        with Client(served.address) as client:
            check_output(lines, client, "lstm", 3)
        front.faults["StreamPredict"] = [fault(grpc.StatusCode.UNAVAILABLE)]
        status, _, errors = call(program, front.address, "lstm")
        assert status == 1
        assert "UNAVAILABLE" in errors
        assert front.attempts["StreamPredict"] == [0, 0]


def test_a_server_that_says_nothing_is_given_up(program: Path, served: Served) -> None:
    is_over = threading.Event()

    def hang(context: grpc.ServicerContext) -> None:
        context.add_callback(is_over.set)
        is_over.wait(30)
        context.abort(grpc.StatusCode.CANCELLED, "too late")

    with fronted(served.address) as front:
        front.faults["ListModels"] = [hang]
        status, _, errors = call(program, front.address, "lstm")
    assert status == 1
    assert "DEADLINE_EXCEEDED" in errors


def test_what_the_server_refuses_is_told(program: Path, served: Served) -> None:
    status, _, errors = call(program, served.address, "nothing")
    assert status == 1
    assert "there is no model nothing" in errors
