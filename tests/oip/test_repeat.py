"""Requests that repeat another are read without protobuf, and mean just what protobuf says that they mean."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.config import load_settings
from service.engine import Engine
from service.lane import Lane
from service.pb.inference import inference_pb2 as pb
from service.repository import load_version
from service.rpc.oip.desk import Desk
from service.rpc.oip.inference import Inference
from service.rpc.oip.repeat import MAX_LEARNED, StepReader
from service.rpc.oip.stream import InferStream
from tests.lanes import equal
from tests.oip.calls import array, step
from tests.oip.test_desk import desk_of, lane, steps_of  # noqa: F401
from tests.rpc import run_alone
from tests.serving import until


def request_of(number: int, x: np.ndarray, request_id: str = "", **parameters: object) -> pb.ModelInferRequest:
    message = step("lstm", number, x, **parameters)
    message.id = request_id
    return message


def learned(desk: Desk, reader: StepReader, message: pb.ModelInferRequest) -> bytes:
    """Have a desk take a request the long way, and the reader learn from it. Returns it as bytes."""
    raw = message.SerializeToString(deterministic=True)
    meaning = desk.submit(message, Inference(lambda _: None))
    if meaning is not None:
        reader.learn(raw, message, meaning)
    return raw


changes = st.fixed_dictionaries(
    {},
    optional={
        "request_id": st.text(max_size=200),
        "rows": st.integers(1, 3),
        "sequence": st.integers(1, 3),
        "parameters": st.sampled_from([{}, {"sequence_end": True}, {"timeout": 5}, {"sequence_start": False}]),
        "version": st.sampled_from(["", "1"]),
        "cut": st.integers(0, 200),
        "flip": st.tuples(st.integers(0, 200), st.integers(1, 255)),
        "more": st.binary(max_size=4),
    },
)


@settings(max_examples=150, deadline=None)
@given(st.lists(changes, max_size=6), st.integers(1, 3))
@example([{"request_id": "n" * 127}, {"request_id": "n" * 128}, {"request_id": "ü"}], 1)
@example([{"rows": 2}, {"rows": 3}], 2)
def test_what_is_read_is_what_protobuf_reads(lane: Lane, many: list[dict[str, object]], rows: int) -> None:  # noqa: F811
    async def act() -> None:
        async with desk_of(lane) as desk:
            reader = StepReader(desk.patterns)
            for number in (1, 2):
                learned(desk, reader, request_of(number, steps_of(0, 1), sequence_start=True))
                learned(desk, reader, request_of(number, steps_of(1, rows), "learned"))
            base = {number: request_of(number, steps_of(1, rows)) for number in (1, 2)}
            for change in many:
                number = change.get("sequence", 1)
                message = request_of(
                    number,
                    steps_of(2, change.get("rows", rows)),
                    change.get("request_id", "r"),
                    **change.get("parameters", {}),
                )
                message.model_version = change.get("version", "")
                raw = bytearray(message.SerializeToString(deterministic=True)) + change.get("more", b"")
                at, bits = change.get("flip", (0, 0))
                raw[at % len(raw)] ^= bits
                raw = bytes(raw[: len(raw) - change.get("cut", 0) % len(raw)])
                found = reader.read(raw)
                if not change.keys() - {"request_id"} and message.id.isascii() and len(message.id) < 128:
                    assert found is not None
                if found is None:
                    continue
                meaning, request_id, data = found
                try:
                    told = pb.ModelInferRequest.FromString(raw)
                except DecodeError:
                    raise AssertionError("read what protobuf can't") from None
                [same] = [
                    each
                    for each in base.values()
                    if meaning.sequence.key[2] == each.parameters["sequence_id"].int64_param
                ]
                same.id, same.raw_input_contents[0] = request_id.decode(), data
                assert told == same
            for number in (1, 2):
                learned(desk, reader, request_of(number, steps_of(0, 1), sequence_end=True))
                await asyncio.sleep(0)

    asyncio.run(act())


async def test_rows_of_another_length_are_no_repeat(lane: Lane) -> None:  # noqa: F811
    """Though the stream's last request had as many."""
    async with desk_of(lane) as desk:
        reader = StepReader(desk.patterns)
        raws = []
        for number in (1, 2):
            learned(desk, reader, request_of(number, steps_of(0, 1), sequence_start=True))
            raws.append(learned(desk, reader, request_of(number, steps_of(0, number))))
        assert reader.read(raws[1]) is not None
        assert reader.read(raws[0] + bytes(12)) is None
        assert reader.read(raws[0]) is None
        for number in (1, 2):
            learned(desk, reader, request_of(number, steps_of(0, 1), sequence_end=True))


async def test_sequences_of_two_versions_are_told_apart(repository: Path) -> None:
    """Their requests differ in the fields that name the model alone."""
    made = load_settings({"repository": repository})
    lanes = [load_version(made, "gru", version) for version in (1, 2)]
    engine = Engine(made)
    for each in lanes:
        engine.add(each)
    desk = Desk(engine)
    readers, raws = [], []
    for each in lanes:
        for is_start in (True, False):
            message = step("gru", 1, steps_of(0, 1), **({"sequence_start": True} if is_start else {}))
            message.model_version = str(each.version)
            readers.append(StepReader(desk.patterns))
            raws.append(learned(desk, readers[-1], message))
    assert readers[1].read(raws[1]) is None  # the other one's has taken its place
    found = readers[3].read(raws[3])
    assert found is not None
    assert found[0].sequence.plan.lane is lanes[1]


async def test_pattern_is_forgotten_with_its_sequence(lane: Lane) -> None:  # noqa: F811
    async with desk_of(lane) as desk:
        reader = StepReader(desk.patterns)
        learned(desk, reader, request_of(1, steps_of(0, 1), sequence_start=True))
        raw = learned(desk, reader, request_of(1, steps_of(0, 1)))
        assert reader.read(raw) is not None
        assert StepReader(desk.patterns).read(raw) is None  # another stream has yet to see how its requests look
        learned(desk, reader, request_of(1, steps_of(0, 1), sequence_end=True))
        assert reader.read(raw) is None
        assert not desk.patterns.num


async def test_no_sequence_has_many_patterns(lane: Lane) -> None:  # noqa: F811
    async with desk_of(lane) as desk:
        reader = StepReader(desk.patterns)
        learned(desk, reader, request_of(1, steps_of(0, 1), sequence_start=True))
        for count in range(1, 12):
            learned(desk, reader, request_of(1, steps_of(0, count), timeout=10**9 + count))
        assert desk.patterns.num == MAX_LEARNED
        learned(desk, reader, request_of(1, steps_of(0, 1), sequence_end=True))
        assert not desk.patterns.num


async def test_stream_answers_repeats_as_the_others(lane: Lane, repository: Path) -> None:  # noqa: F811
    x = steps_of(5, 12)
    async with desk_of(lane) as desk:
        stream = InferStream(desk, lane.settings)
        rows = []
        for t in range(12):
            flags = {"sequence_start": t == 0, "sequence_end": t == 11}
            stream.take(request_of(7, x[t : t + 1], f"step {t}", **flags).SerializeToString(deterministic=True))
            await until(lambda: stream.is_ready)
            answer = pb.ModelStreamInferResponse.FromString(stream.pop())
            assert answer.infer_response.id == f"step {t}"
            rows.append(array(answer.infer_response)[0])
        equal(np.concatenate(rows), run_alone(repository, "lstm", x))
