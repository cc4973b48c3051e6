"""Clients of the real server."""

import numpy as np
import pytest

from service.client import AsyncClient, Client


@pytest.fixture
def client(served):
    with Client(served.address) as made:
        yield made


@pytest.fixture
async def async_client(served):
    async with AsyncClient(served.address) as made:
        yield made


@pytest.fixture(scope="session")
def sequences():
    """Three sequences of different lengths, [time, 3]."""
    rng = np.random.default_rng(3)
    return [rng.normal(size=(length, 3)).astype(np.float32) for length in (5, 1, 70)]
