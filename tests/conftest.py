"""Fixtures that more than one test file uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnxruntime as ort
import pytest

from service.spill import SpillStore
from tests.onnx_models import build
from tests.serving import Served, serving


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none to use."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        skip = pytest.mark.skip(reason="this onnxruntime has no CUDAExecutionProvider")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of every kind: see tests/onnx_models.py."""
    root = tmp_path_factory.mktemp("repository")
    build("lstm").save(root, "lstm")
    build("gru", layers=2).save(root, "gru", 1)
    build("gru", layers=2, seed=1).save(root, "gru", 2)
    build("rnn").save(root, "rnn")
    build("gru", num_ids=11).save(root, "tokens")
    build("lstm", bidirectional=True).save(root, "bilstm")
    build("gru", bidirectional=True, many_to_one=True).save(root, "bigru")
    build("lstm", coupled=True).save(root, "coupled")
    return root


@pytest.fixture(scope="session")
def served(repository: Path) -> Iterator[Served]:
    """A server of all of them with default settings."""
    with serving(repository) as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SpillStore]:
    """A place for the states of idle sessions."""
    store = SpillStore(tmp_path / "states.db")
    yield store
    store.close()
