"""A server as its own process, and the environment of clients that others wrote: `make test-compat` makes it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.measure import FEATURES, HIDDEN, OUTPUTS
from benchmarks.processes import Process, rnnserve
from tests.generating import save, tokens
from tests.onnx_models import build

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = ROOT / ".venv-compat" / "bin"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all that is here, and skip it where the environment is missing."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("compat")
            if not (BIN / "python").exists():
                item.add_marker(pytest.mark.skip(reason="`make test-compat` installs the clients"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model that steps, one that needs whole sequences, and one that generates."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"features": FEATURES, "hidden": HIDDEN, "outputs": OUTPUTS}
    build("lstm", **sizes).save(root, "steps")
    build("gru", bidirectional=True, **sizes).save(root, "whole")
    save(tokens(7), root, "names")
    return root


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Process]:
    with rnnserve(models) as process:
        yield process


@pytest.fixture
def run_client(server: Process, tmp_path: Path) -> Callable[..., dict[str, object]]:
    """Run a part of clients.py with arrays, in the other environment. Returns what it found, arrays among it."""

    def run(part: str, **arrays: np.ndarray) -> dict[str, object]:
        np.savez(tmp_path / "given.npz", **arrays)
        command = [BIN / "python", HERE / "clients.py", part, server.target, tmp_path]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        assert not done.returncode, done.stdout + done.stderr
        with np.load(tmp_path / "found.npz") as found:
            return {**json.loads((tmp_path / "found.json").read_text()), **found}

    return run
