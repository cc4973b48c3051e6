"""The page of several workers: one port, one page, numbers of all, and calls that go to any of them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import aiohttp
import numpy as np
import pytest

from tests.onnx_models import build
from tests.rpc import run_alone, sequences
from tests.web.calls import decoded, fault, frame, opening, until_over
from tests.workers import fleet_of, wait_until


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("fleet")
    build("lstm").save(root, "lstm")
    return root


@pytest.fixture(scope="module")
def fleet(repository):
    with fleet_of(repository, "--page-hosts", "models.test", "--max-message-bytes", "4000") as running:
        yield running


def test_the_supervisor_loads_no_runtime():
    code = "import sys, service.rpc.supervisor; print('onnxruntime' in sys.modules, 'grpc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False False\n"


def test_the_page_and_its_api_are_at_the_supervisors_port(fleet):
    assert "<title>rnnserve</title>" in fleet.get("/")
    [model] = json.loads(fleet.get("/api/models"))["models"]
    assert model["name"] == "lstm"
    assert json.loads(fleet.get("/api/models/lstm/versions/1"))["spec"]["topology"] == "many-to-many"


async def test_sessions_go_to_workers_in_turn_and_numbers_are_of_all(fleet, repository):
    xs = sequences(4, 4, 6, 6)

    async def stream(session, x):
        async with session.ws_connect("/api/stream") as socket:
            await socket.send_json(opening("lstm"))
            await socket.send_json(frame(x, closes=True))
            messages = await until_over(socket)
        return np.concatenate([decoded(t) for m in messages for t in m.get("answer", {}).get("tensors", ())])

    async with aiohttp.ClientSession(fleet.http) as session:
        rows = await asyncio.gather(*(stream(session, x) for x in xs))
        async with session.get("/api/stats") as response:
            stats = await response.json()
    for x, y in zip(xs, rows, strict=True):
        np.testing.assert_array_equal(y, run_alone(repository, "lstm", x))
    [numbers] = stats["models"]
    assert (stats["workers"], numbers["steps"], numbers["sequences"]) == (2, 24, 4)
    assert fleet.per_worker("rnnserve_steps_total") == [12, 12]


async def test_refusals_and_faults_are_passed_on(fleet):
    async with aiohttp.ClientSession(fleet.http) as session:
        async with session.get("/api/models/nothing/versions/1") as response:
            assert response.status == 404
            assert "no model 'nothing' is served" in (await response.json())["error"]["message"]
        async with session.get("/api/models", headers={"Origin": "http://evil.example"}) as response:
            assert response.status == 403
        headers = {"Host": "models.test", "Origin": "https://models.test"}
        async with session.ws_connect("/api/stream", headers=headers) as socket:
            await socket.send_json(opening("nothing"))
            assert (await fault(socket))["code"] == 5
        async with session.ws_connect("/api/stream") as socket:
            await socket.send_json(opening("lstm"))
            await socket.receive()
            await socket.send_json(frame(np.zeros((400, 3), np.float32)))
            message = await socket.receive()
            assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, aiohttp.WSCloseCode.MESSAGE_TOO_BIG)


async def test_closing_a_socket_frees_its_session(fleet):
    async with aiohttp.ClientSession(fleet.http) as session:
        async with session.ws_connect("/api/stream") as socket:
            await socket.send_json(opening("lstm"))
            await socket.receive()
            assert sum(fleet.per_worker("rnnserve_sessions")) == 1
        await asyncio.to_thread(wait_until, lambda: not sum(fleet.per_worker("rnnserve_sessions")))


async def test_a_worker_that_dies_ends_its_sockets_and_another_answers(repository):
    with fleet_of(repository) as fleet:
        async with aiohttp.ClientSession(fleet.http) as session:
            async with session.ws_connect("/api/stream") as socket:
                await socket.send_json(opening("lstm"))
                await socket.receive()
                [index] = [i for i, n in enumerate(fleet.per_worker("rnnserve_sessions")) if n]
                fleet.worker(index).kill()
                message = await asyncio.wait_for(socket.receive(), 10)
                assert message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
            for _ in range(2):  # whosever turn it is
                async with session.get("/api/models") as response:
                    assert response.status == 200


async def test_without_the_page_workers_have_none_either(repository):
    with fleet_of(repository, "--page", "false") as fleet:
        async with aiohttp.ClientSession(fleet.http) as session:
            for path, status in (("/", 404), ("/api/models", 404), ("/api/stream", 404), ("/metrics", 200)):
                async with session.get(path) as response:
                    assert response.status == status
