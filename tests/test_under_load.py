"""The promise, with everything on at once: every kind of client, priorities, threads, and states that are spilled."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc.aio
import numpy as np
import pytest

from service.lane import Lane
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.pb.rnnserve.v1 import rnnserve_pb2_grpc as pb_grpc
from tests.onnx_models import build
from tests.rpc import Received, Rows, array, frame, open_stream, run_alone, sequences
from tests.serving import serving_here

STEPS = 60
SINGLES, CHUNKED, GATEWAYS, MEMBERS, CALLS = 12, 8, 2, 24, 4
PRIORITIES = [pb.PRIORITY_HIGH, pb.PRIORITY_NORMAL, pb.PRIORITY_LOW]
ALL_ON = {"compute_threads": 2, "max_resident_sessions": 40, "max_chunk_steps": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for cell in ("lstm", "gru"):
        build(cell, features=5, hidden=96, outputs=4, layers=2).save(root, cell)
    return root


def row(x: Rows, step: int) -> bytes:
    return x[step : step + 1].tobytes()


async def single(
    stub: pb_grpc.SequenceServiceStub, cell: str, x: Rows, received: Received, opened: asyncio.Barrier
) -> None:
    """One step a message, the next when the last is answered."""
    call = stub.StreamPredict()
    await call.write(open_stream(cell))
    received.take(await call.read())
    await opened.wait()
    for step in range(len(x)):
        request = pb.StreamFrame(tensors=[pb.Tensor(data=row(x, step))])
        await call.write(pb.StreamPredictRequest(frame=request))
        received.take(await call.read())
    await call.done_writing()
    while (response := await call.read()) is not grpc.aio.EOF:
        received.take(response)


async def chunked(
    stub: pb_grpc.SequenceServiceStub, cell: str, x: Rows, received: Received, opened: asyncio.Barrier, number: int
) -> None:
    """Chunks of several steps, sent without waiting, by sessions of every class."""
    call = stub.StreamPredict()
    await call.write(open_stream(cell, sessions=[pb.SessionOpen(priority=PRIORITIES[number % 3])]))
    received.take(await call.read())
    await opened.wait()
    for start in range(0, len(x), 3 + number):
        await call.write(frame(x[start : start + 3 + number]))
    await call.done_writing()
    while (response := await call.read()) is not grpc.aio.EOF:
        received.take(response)


async def gateway(
    stub: pb_grpc.SequenceServiceStub, cell: str, xs: list[Rows], received: Received, opened: asyncio.Barrier
) -> None:
    """A step of every session in each frame, now with positions and now without; in between for half of them."""
    call = stub.StreamPredict()
    await call.write(open_stream(cell, sessions=[pb.SessionOpen()] * len(xs)))
    received.take(await call.read())
    await opened.wait()
    sent = [0] * len(xs)
    while min(sent) < STEPS:
        handles = [h for h, num in enumerate(sent) if num < STEPS]
        if sent[handles[0]] % 7 == 6:
            handles = handles[len(handles) // 2 :] or handles
        request = pb.StreamFrame(handles=handles)
        if sent[0] % 20 < 10:
            request.positions.extend(sent[h] for h in handles)
        request.tensors.add(data=b"".join(row(xs[h], sent[h]) for h in handles))
        await call.write(pb.StreamPredictRequest(frame=request))
        for handle in handles:
            sent[handle] += 1
        while sum(map(len, received.steps.values())) < sum(sent):
            received.take(await call.read())
    await call.done_writing()
    while (response := await call.read()) is not grpc.aio.EOF:
        received.take(response)


async def bulk(stub: pb_grpc.SequenceServiceStub, cell: str, xs: list[Rows], opened: asyncio.Barrier) -> list[Rows]:
    await opened.wait()
    tensor = pb.Tensor(data=b"".join(x.tobytes() for x in xs), lengths=[len(x) for x in xs])
    request = pb.PredictRequest(model=cell, inputs=[tensor], priority=pb.PRIORITY_LOW)
    response = await stub.Predict(request)
    return np.split(array(response.outputs[0]), np.cumsum([len(x) for x in xs])[:-1])


async def quitter(stub: pb_grpc.SequenceServiceStub, cell: str, x: Rows, opened: asyncio.Barrier) -> None:
    """Goes away in the middle of its steps, again and again."""
    await opened.wait()
    for _ in range(10):
        call = stub.StreamPredict()
        await call.write(open_stream(cell, sessions=[pb.SessionOpen()] * 3))
        await call.write(frame(x, x, x, handles=range(3)))
        await call.read()
        call.cancel()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
async def test_everything_at_once_leaves_each_sequence_its_numbers(models: Path, tmp_path: Path, cell: str) -> None:
    num_streamed = SINGLES + CHUNKED + GATEWAYS * MEMBERS
    xs = sequences(7, num_streamed, STEPS, STEPS, features=5)
    ragged = sequences(8, 30, 1, 90, features=5)
    alone = [run_alone(models, cell, x) for x in xs]
    async with serving_here(models, **ALL_ON, spill_store=tmp_path / "spill") as server:
        lane: Lane = server.engine.lane(cell)
        target = f"127.0.0.1:{server.port}"
        async with grpc.aio.insecure_channel(target) as one, grpc.aio.insecure_channel(target) as two:
            stubs = [pb_grpc.SequenceServiceStub(channel) for channel in (one, two)]
            parts = np.split(np.arange(num_streamed), [SINGLES, SINGLES + CHUNKED])
            members = np.split(parts[2], GATEWAYS)
            received = [Received() for _ in range(SINGLES + CHUNKED + GATEWAYS)]
            # Sessions are refused, for now, while all that have their state in memory run: these are opened before.
            opened = asyncio.Barrier(len(received) + CALLS + 1)
            work = [single(stubs[i % 2], cell, xs[i], received[i], opened) for i in parts[0]]
            work += [chunked(stubs[i % 2], cell, xs[i], received[i], opened, i) for i in parts[1]]
            work += [
                gateway(stubs[i], cell, [xs[m] for m in each], received[SINGLES + CHUNKED + i], opened)
                for i, each in enumerate(members)
            ]
            predicted, *_ = await asyncio.gather(
                asyncio.gather(*(bulk(stubs[i % 2], cell, ragged, opened) for i in range(CALLS))),
                quitter(stubs[0], cell, xs[0], opened),
                *work,
            )
        assert lane.tally.spills > 0
        assert lane.tally.restores > 0
        assert lane.tally.run_rows_sum / lane.tally.runs > 4
    assert [e for each in received for e in each.errors] == []
    for number in [*parts[0], *parts[1]]:
        np.testing.assert_array_equal(received[number].rows(0), alone[number])
    for index, each in enumerate(members):
        for handle, member in enumerate(each):
            np.testing.assert_array_equal(received[SINGLES + CHUNKED + index].rows(handle), alone[member])
    for ys in predicted:
        for x, y in zip(ragged, ys, strict=True):
            np.testing.assert_array_equal(y, run_alone(models, cell, x))
