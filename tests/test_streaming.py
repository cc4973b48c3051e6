"""The promise: batching never changes a sequence's numbers, over a real channel, however it is sent."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc.aio
import numpy as np
import pytest

from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.pb.rnnserve.v1 import rnnserve_pb2_grpc as pb_grpc
from service.rpc.server import Server
from tests.onnx_models import build
from tests.rpc import Received, Rows, array, frame, open_stream, predict, run_alone, sequences
from tests.serving import Served, serving, serving_here

SESSIONS = 32
EARLY = 20  # sessions that are there from the start; the others join when the first one has ended
TOLERANCE = {"lstm": 0.0, "gru": 0.0, "rnn": 2e-6}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of a realistic width, so that kernels block and vectorise as they do in use."""
    root = tmp_path_factory.mktemp("wide")
    for cell, hidden in {"lstm": 224, "gru": 256, "rnn": 448}.items():
        build(cell, features=5, hidden=hidden, outputs=4, layers=2).save(root, cell)
    return root


def chunks_of(x: Rows, seed: int, most: int) -> list[Rows]:
    """Cut a sequence into random chunks of 1 to `most` steps."""
    rng = np.random.default_rng(seed)
    cuts = np.cumsum(rng.integers(1, most + 1, len(x)))
    return [part for part in np.split(x, cuts[cuts < len(x)]) if len(part)]


def assert_same(received: Rows, alone: Rows, cell: str) -> None:
    assert received.shape == alone.shape
    if TOLERANCE[cell]:
        np.testing.assert_allclose(received, alone, atol=TOLERANCE[cell], rtol=0)
    else:
        np.testing.assert_array_equal(received, alone)


class Load:
    """Sessions that were live together, and the batches that the server made of them."""

    def __init__(self, server: Server, model: str) -> None:
        self._tally = server.engine.lane(model).tally
        self._runs, self._rows = self._tally.runs, self._tally.run_rows_sum
        self._live: set[int] = set()
        self.joined_midway = 0
        self.left_midway = 0

    def joins(self, number: int, *, is_midway: bool) -> None:
        self._live.add(number)
        self.joined_midway += is_midway and len(self._live) > 1

    def leaves(self, number: int) -> None:
        self._live.discard(number)
        self.left_midway += bool(self._live)

    @property
    def mean_batch(self) -> float:
        return (self._tally.run_rows_sum - self._rows) / (self._tally.runs - self._runs)


@pytest.mark.parametrize("cell", TOLERANCE)
async def test_separate_streams_equal_each_sequence_alone(wide: Path, cell: str) -> None:
    xs = sequences(1, SESSIONS, 60, 120, features=5)
    async with serving_here(wide, inline_run_ms=0) as server:  # on a thread, so that steps arrive during a run
        load = Load(server, cell)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = pb_grpc.SequenceServiceStub(channel)
            first_end = asyncio.Event()

            async def stream(number: int) -> Rows:
                if number >= EARLY:
                    await first_end.wait()
                call = stub.StreamPredict()
                await call.write(open_stream(cell))
                load.joins(number, is_midway=number >= EARLY)
                for chunk in chunks_of(xs[number], number, most=3):
                    await call.write(frame(chunk))
                await call.done_writing()
                received = Received()
                async for response in call:
                    received.take(response)
                load.leaves(number)
                first_end.set()
                assert not received.errors
                return received.rows(0)

            outputs = await asyncio.gather(*(stream(number) for number in range(SESSIONS)))
    for x, y in zip(xs, outputs, strict=True):
        assert_same(y, run_alone(wide, cell, x), cell)
    assert load.joined_midway >= 8
    assert load.left_midway >= 8
    assert load.mean_batch >= 8, load.mean_batch


@pytest.mark.parametrize("cell", TOLERANCE)
async def test_frames_of_many_sessions_equal_each_sequence_alone(wide: Path, cell: str) -> None:
    xs = sequences(2, SESSIONS, 60, 90, features=5)
    chunks = [chunks_of(x, number, most=3) for number, x in enumerate(xs)]
    async with serving_here(wide, inline_run_ms=0) as server:  # on a thread, so that steps arrive during a run
        load = Load(server, cell)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            call = pb_grpc.SequenceServiceStub(channel).StreamPredict()
            await call.write(open_stream(cell))
            received = Received()
            received.take(await call.read())
            next_chunk = [0] * SESSIONS
            sent = [0] * SESSIONS
            opened = 0
            while opened < SESSIONS or any(n < len(c) for n, c in zip(next_chunk, chunks, strict=True)):
                new = EARLY if opened == 0 else min(2, SESSIONS - opened) if load.left_midway else 0
                for handle in range(opened, opened + new):
                    load.joins(handle, is_midway=opened > 0)
                opened += new
                handles = [h for h in range(opened) if next_chunk[h] < len(chunks[h])]
                entries = [chunks[h][next_chunk[h]] for h in handles]
                positions = [sent[h] for h in handles]
                for h, entry in zip(handles, entries, strict=True):
                    next_chunk[h] += 1
                    sent[h] += len(entry)
                ends = [h for h in handles if next_chunk[h] == len(chunks[h])]
                for h in ends:
                    load.leaves(h)
                opens = [pb.SessionOpen()] * new
                await call.write(frame(*entries, handles=handles, positions=positions, opens=opens, closes=ends))
                while sum(map(len, received.steps.values())) < sum(sent):
                    received.take(await call.read())
            await call.done_writing()
            while (response := await call.read()) is not grpc.aio.EOF:
                received.take(response)
    assert not received.errors
    assert [s.handle for s in received.sessions] == list(range(SESSIONS))
    for handle, x in enumerate(xs):
        assert_same(received.rows(handle), run_alone(wide, cell, x), cell)
        assert received.closed[handle].position == len(x)
        assert received.closed[handle].reason == pb.CLOSE_REASON_CLIENT
    assert load.joined_midway >= 8
    assert load.left_midway >= 8
    assert load.mean_batch >= 8, load.mean_batch


@pytest.mark.parametrize("cell", TOLERANCE)
def test_ragged_predict_equals_each_sequence_alone(wide: Path, cell: str) -> None:
    xs = sequences(3, 40, 1, 70, features=5)
    with serving(wide) as served, served.stub() as stub:
        response = predict(stub, cell, xs)
        last = predict(stub, cell, xs, emit=pb.EMIT_LAST)
    assert list(response.outputs[0].lengths) == [len(x) for x in xs]
    ys = np.split(array(response.outputs[0]), np.cumsum([len(x) for x in xs])[:-1])
    assert last.outputs[0].layout == pb.LAYOUT_PER_SEQUENCE
    for x, y, final in zip(xs, ys, array(last.outputs[0]), strict=True):
        alone = run_alone(wide, cell, x)
        assert_same(y, alone, cell)
        assert_same(final, alone[-1], cell)


def test_final_states_continue_a_sequence(served: Served, repository: Path) -> None:
    xs = sequences(4, 5, 6, 20)
    with served.stub() as stub:
        first = predict(stub, "lstm", [x[:5] for x in xs], return_state=True)
        assert [t.name for t in first.outputs] == ["y", "state.0.h", "state.0.c"]
        tensor = pb.Tensor(data=b"".join(x[5:].tobytes() for x in xs), lengths=[len(x) - 5 for x in xs])
        states = list(first.outputs[1:])
        rest = stub.Predict(pb.PredictRequest(model="lstm", inputs=[tensor, *states]))
        opens = [pb.SessionOpen()] * len(xs)
        steps = frame(*[x[5:] for x in xs], handles=range(len(xs)), opens=opens)
        steps.frame.tensors.extend(states)
        streamed = Received.all(stub.StreamPredict(iter([open_stream("lstm"), steps])))
    ys = np.split(array(rest.outputs[0]), np.cumsum([len(x) - 5 for x in xs])[:-1])
    for handle, (x, y) in enumerate(zip(xs, ys, strict=True)):
        alone = run_alone(repository, "lstm", x)[5:]
        np.testing.assert_array_equal(y, alone)
        np.testing.assert_array_equal(streamed.rows(handle), alone)


def test_more_sequences_than_slots_take_turns(repository: Path) -> None:
    xs = sequences(5, 50, 1, 9)
    with serving(repository, max_predict_sequences=4) as served, served.stub() as stub:
        response = predict(stub, "gru", xs, version=1)
        assert served.lane("gru").slab.num_allocated == 0
    np.testing.assert_array_equal(
        array(response.outputs[0]), np.concatenate([run_alone(repository, "gru", x) for x in xs])
    )


def test_plain_stream_counts_positions_by_itself(served: Served, repository: Path) -> None:
    (x,) = sequences(6, 1, 9, 9)
    with served.stub() as stub:
        requests = [open_stream("lstm"), *(frame(row[None]) for row in x)]
        received = Received.all(stub.StreamPredict(iter(requests)))
    np.testing.assert_array_equal(received.rows(0), run_alone(repository, "lstm", x))
    assert received.opened.step_mode == pb.STEP_MODE_STEPPING
    assert received.opened.max_inflight_steps == 16_384
    assert received.closed[0].position == 9


def test_emit_last_answers_the_last_step_of_each_entry(served: Served, repository: Path) -> None:
    (x,) = sequences(7, 1, 40, 40)
    with served.stub() as stub:
        requests = [open_stream("lstm", emit=pb.EMIT_LAST), frame(x[:33]), frame(x[33:36]), frame(x[36:])]
        received = Received.all(stub.StreamPredict(iter(requests)))
    alone = run_alone(repository, "lstm", x)
    assert sorted(received.steps[0]) == [32, 35, 39]
    for position, y in received.steps[0].items():
        np.testing.assert_array_equal(y, alone[position])


@pytest.mark.parametrize("end", ["close", "half-close"])
def test_bidirectional_model_answers_when_the_sequence_ends(served: Served, repository: Path, end: str) -> None:
    (x,) = sequences(8, 1, 13, 13)
    closing = [frame(closes=[0])] if end == "close" else []
    requests = [open_stream("bilstm"), frame(x[:4]), frame(x[4:5]), frame(x[5:]), *closing]
    with served.stub() as stub:
        received = Received.all(stub.StreamPredict(iter(requests)))
    assert received.opened.step_mode == pb.STEP_MODE_BUFFERED
    np.testing.assert_array_equal(received.rows(0), run_alone(repository, "bilstm", x))


def test_bidirectional_many_to_one_answers_once(served: Served, repository: Path) -> None:
    xs = sequences(9, 6, 3, 12)
    handles = range(len(xs))
    opens = [pb.SessionOpen()] * len(xs)
    with served.stub() as stub:
        responses = list(
            stub.StreamPredict(iter([open_stream("bigru"), frame(*xs, handles=handles, opens=opens, closes=handles)]))
        )
        predicted = array(predict(stub, "bigru", xs).outputs[0])
    answers = {}
    for response in responses[1:]:
        for handle, row in zip(
            response.answer.handles, array(response.answer.tensors[0]) if response.answer.tensors else (), strict=True
        ):
            assert handle not in answers
            answers[handle] = row
    for handle, x in enumerate(xs):
        alone = run_alone(repository, "bigru", x)
        np.testing.assert_array_equal(answers[handle], alone)
        np.testing.assert_array_equal(predicted[handle], alone)


def test_coupled_model_runs_alone(served: Served, repository: Path) -> None:
    xs = sequences(10, 12, 2, 9)
    tally = served.lane("coupled").tally
    with served.stub() as stub:
        response = predict(stub, "coupled", xs)
        assert stub.GetModel(pb.GetModelRequest(model="coupled")).model.exactness == pb.EXACTNESS_COUPLED
    assert tally.run_rows.keys() == {1}
    np.testing.assert_array_equal(
        array(response.outputs[0]), np.concatenate([run_alone(repository, "coupled", x) for x in xs])
    )


def test_tokens_step_through_their_embedding(served: Served, repository: Path) -> None:
    tokens = np.random.default_rng(11).integers(0, 11, 17)
    with served.stub() as stub:
        received = Received.all(stub.StreamPredict(iter([open_stream("tokens"), frame(tokens[:9]), frame(tokens[9:])])))
    np.testing.assert_array_equal(received.rows(0), run_alone(repository, "tokens", tokens))


def test_long_answers_are_cut_for_clients_with_default_limits(tmp_path: Path) -> None:
    build("gru", hidden=4, outputs=600).save(tmp_path, "broad")
    build("gru", hidden=4, outputs=600, bidirectional=True).save(tmp_path, "bibroad")
    (x,) = sequences(12, 1, 3000, 3000)
    with serving(tmp_path) as served, served.stub() as stub:
        for model in ("broad", "bibroad"):
            responses = list(stub.StreamPredict(iter([open_stream(model), frame(x)])))
            assert max(r.ByteSize() for r in responses) < 2 * 1024 * 1024
            np.testing.assert_array_equal(Received.all(responses).rows(0), run_alone(tmp_path, model, x))
