"""A server for these tests alone: they count sessions, and others leave some that linger."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import Served, serving


@pytest.fixture(scope="module")
def served(repository: Path) -> Iterator[Served]:
    with serving(repository) as running:
        yield running
