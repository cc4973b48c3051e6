"""Clients that nobody here wrote: the newest tritonclient in every manner, and one that knows reflection alone."""

from __future__ import annotations

import base64
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.processes import rnnserve
from tests.compat.conftest import BIN, ROOT
from tests.generating import WORDS, Oracle, save, tokens
from tests.lanes import equal
from tests.onnx_models import build
from tests.rpc import run_alone

RunClient = Callable[..., dict[str, object]]
Rows = np.ndarray


def rows(seed: int, *shape: int) -> Rows:
    return np.random.default_rng(seed).standard_normal((*shape, 32)).astype(np.float32)


def alone(models: Path, model: str, xs: Rows) -> Rows:
    return np.stack([run_alone(models, model, x) for x in xs])


def test_blocking_client(run_client: RunClient, models: Path) -> None:
    x, batch, lengths = rows(1, 20), rows(2, 3, 9), np.array([9, 4, 1], dtype=np.int32)
    found = run_client("sync", x=x, batch=batch, lengths=lengths)
    equal(found["steps"], run_alone(models, "steps", x))
    for row, y, length in zip(batch, found["whole"], lengths, strict=True):
        equal(y[:length], run_alone(models, "whole", row[:length]))
        assert not y[length:].any()
    assert found["live"]
    assert found["ready"]
    assert found["models ready"] == [True, True, False]
    assert found["server"] == "rnnserve"
    assert {"sequence", "statistics"} <= set(found["extensions"])
    assert found["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "-1", "32"]}]
    assert found["versions"] == ["1"]
    assert found["steps batching"] == ["sequence_batching"]
    assert found["whole batching"] == ["dynamic_batching"]
    assert found["max_batch_size"] == 256
    assert found["index"] == [{"name": name, "version": "1", "state": "READY"} for name in ("names", "steps", "whole")]
    assert int(found["statistics"]["inference_count"]) >= 20
    assert found["id"] == "w1"
    errors = found["errors"]
    assert {name: status for name, (status, _) in errors.items()} == {
        "no start": "StatusCode.NOT_FOUND",
        "no model": "StatusCode.NOT_FOUND",
        "wrong shape": "StatusCode.INVALID_ARGUMENT",
        "shared memory": "StatusCode.UNIMPLEMENTED",
        "trace": "StatusCode.UNIMPLEMENTED",
        "log": "StatusCode.UNIMPLEMENTED",
    }
    assert "sequence_start=true" in errors["no start"][1]


def test_blocking_client_with_callbacks(run_client: RunClient, models: Path) -> None:
    xs = rows(3, 40, 12)
    equal(run_client("future", xs=xs)["whole"], alone(models, "whole", xs))


def test_stream_of_sequences(run_client: RunClient, models: Path) -> None:
    xs = rows(4, 16, 30)
    found = run_client("stream", xs=xs)
    equal(found["steps"], alone(models, "steps", xs))
    assert found["order"] == [number for _ in range(30) for number in range(16)]
    assert found["all final"]
    assert "sequence 5 of model 'steps' is not live" in found["error"]
    equal(found["whole"], run_alone(models, "whole", xs[0]))


def test_model_that_generates(run_client: RunClient, models: Path) -> None:
    prompts = np.array([[2, 3], [5, 4], [6, 6]])
    found = run_client("generate", prompts=prompts)
    alone = [Oracle(models, "names").decode(prompt.tolist()).ids for prompt in prompts]
    assert [row[:length].tolist() for row, length in zip(found["ids"], found["lengths"], strict=True)] == alone
    assert found["streamed"] == alone
    assert found["text"] == [" ".join(WORDS[each] for each in ids) for ids in alone]
    assert found["drawn"] != found["text"]
    assert found["decoupled"]


def test_client_on_asyncio(run_client: RunClient, models: Path) -> None:
    xs = rows(5, 12, 10)
    found = run_client("aio", xs=xs)
    equal(found["whole"], alone(models, "whole", xs))
    equal(found["steps"], alone(models, "steps", xs))


def test_client_that_knows_reflection_alone(run_client: RunClient, models: Path) -> None:
    x = rows(6, 2, 5)
    found = run_client("reflection", x=x)
    assert {"inference.GRPCInferenceService", "rnnserve.v1.SequenceService", "grpc.health.v1.Health"} <= set(
        found["services"]
    )
    assert {"ModelInfer", "ModelStreamInfer", "ModelStatistics", "RepositoryIndex"} <= set(found["methods"])
    assert found["metadata"]["platform"] == "onnxruntime_onnx"
    assert found["native"] == "steps"
    for response in (found["response"], *(each["infer_response"] for each in found["streamed"])):
        raw = np.frombuffer(base64.b64decode(response["raw_output_contents"][0]), dtype=np.float32)
        equal(raw.reshape(2, 5, 16), alone(models, "whole", x))
    assert len(found["streamed"]) == 2


def test_page_for_users_of_triton(tmp_path: Path) -> None:
    """The examples in docs/triton.md, as they stand there, but for the letters of a smaller alphabet."""
    code = "".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "triton.md").read_text(), re.DOTALL))
    assert "[[8, 5, 12, 12, 15]]" in code
    code = code.replace("[[8, 5, 12, 12, 15]]", "[[1, 3, 2]]")
    build("gru", features=12, hidden=64, outputs=9).save(tmp_path, "vowels")
    save(tokens(11, encoder=True), tmp_path, "g2p")
    found = tmp_path / "found.npz"
    with rnnserve(tmp_path) as server:
        code = code.replace("localhost:8001", server.target)
        code += "text, ids = result.as_numpy('text').astype(str), result.as_numpy('ids')\n"
        code += f"np.savez({str(found)!r}, live=np.stack(live), whole=whole, text=text, ids=ids)\n"
        done = subprocess.run([BIN / "python", "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert not done.returncode, done.stderr
    frames = np.random.default_rng(0).standard_normal((20, 12)).astype(np.float32)
    expected = run_alone(tmp_path, "vowels", frames)
    with np.load(found) as arrays:
        equal(arrays["live"], expected)
        equal(arrays["whole"][0], expected)
        equal(arrays["whole"][1, :13], expected[:13])
        assert not arrays["whole"][1, 13:].any()
        assert arrays["ids"].size
        assert arrays["text"].tolist() == [" ".join(WORDS[each] for each in arrays["ids"][0])]
