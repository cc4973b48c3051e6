"""Messages that go past protobuf's parser and writer say what protobuf itself would read and write."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.spec import Layout, TensorSpec
from service.crews import Crew
from service.events import Answer, Link, Steps
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.rpc.answers import MAX_ANSWER_BYTES, AnswerWriter, write_prediction
from service.rpc.codec import TensorPlan, empty_tensor
from service.rpc.repeat import CREW_SESSIONS, Repeat, learn, varint
from service.sessions import ANONYMOUS, Session

PLANS = [
    TensorPlan(TensorSpec(name="y", dtype="float32", row_shape=(3,), layout=Layout.PER_STEP)),
    TensorPlan(TensorSpec(name="class", dtype="int64", row_shape=(), layout=Layout.PER_SEQUENCE)),
]
numbers = st.one_of(st.integers(0, 300), st.integers(0, 2**31))


# ---- answers --------------------------------------------------------------------------------------------------------


def answer_of(handles: list[int], positions: list[int], lengths: list[int], seed: int = 0) -> Answer:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((sum(lengths), 3)).astype(np.float32)
    return Answer(handles, positions, lengths, [rows, rng.integers(9, size=len(handles))])


@st.composite
def answers(draw):
    entries = draw(st.lists(st.tuples(numbers, numbers, st.integers(1, 4)), min_size=1, max_size=6))
    handles, positions, lengths = map(list, zip(*entries, strict=True))
    if draw(st.booleans()):
        positions, lengths = [positions[0]] * len(handles), [1] * len(handles)
    return answer_of(handles, positions, lengths, draw(st.integers(0, 9)))


def read(messages: list[bytes]) -> list[pb.StreamAnswer]:
    parsed = [pb.StreamPredictResponse.FromString(message) for message in messages]
    assert all(message.WhichOneof("message") == "answer" for message in parsed)
    return [message.answer for message in parsed]


@given(st.lists(st.lists(answers(), min_size=1, max_size=3), min_size=1, max_size=4), st.booleans())
def test_answers_are_what_protobuf_would_write(turns, has_events):
    writer = AnswerWriter(PLANS)
    for ready in turns:
        events = pb.StreamAnswer(closed=[pb.SessionClosed(handle=3, position=7)]) if has_events else None
        [found] = read(writer.write(ready, events))
        expected = pb.StreamAnswer(
            handles=[h for a in ready for h in a.handles],
            positions=[p for a in ready for p in a.positions],
            lengths=[n for a in ready for n in a.lengths],
            closed=events.closed if events else [],
        )
        for index, plan in enumerate(PLANS):
            rows = np.concatenate([a.outputs[index] for a in ready])
            expected.tensors.add(
                name=plan.name,
                dtype=plan.wire_dtype,
                shape=rows.shape,
                layout=plan.wire_layout,
                data=rows.tobytes(),
            )
        assert found == expected


def test_large_answers_are_cut_between_events(monkeypatch):
    monkeypatch.setattr("service.rpc.answers.MAX_ANSWER_BYTES", 400)
    ready = [answer_of([1, 2], [0, 0], [9, 9]), answer_of([3], [5], [1])]
    writer = AnswerWriter(PLANS[:1])
    ready = [Answer(a.handles, a.positions, a.lengths, a.outputs[:1]) for a in ready]
    events = pb.StreamAnswer(opened=[pb.SessionOpened(handle=3)], closed=[pb.SessionClosed(handle=1)])
    first, *middle, last = read(writer.write(ready, events))
    assert [o.handle for o in first.opened] == [3]
    assert not first.handles
    assert [c.handle for c in last.closed] == [1]
    assert [h for a in middle for h in a.handles] == [1, 2, 3]
    data = b"".join(a.tensors[0].data for a in middle)
    assert data == b"".join(a.outputs[0].tobytes() for a in ready)
    assert all(a.ByteSize() <= 400 for a in middle)


def test_events_alone_are_a_message():
    [found] = read(AnswerWriter(PLANS).write([], pb.StreamAnswer(opened=[pb.SessionOpened(handle=1)])))
    assert found == pb.StreamAnswer(opened=[pb.SessionOpened(handle=1)])
    assert MAX_ANSWER_BYTES < 4 * 2**20  # gRPC's default limit


@given(st.lists(st.integers(0, 5), max_size=3), st.booleans())
def test_predictions_are_what_protobuf_would_write(nums, is_packed):
    header = pb.PredictResponse(model="m", version=3, digest="d" * 64)
    expected = pb.PredictResponse(model="m", version=3, digest="d" * 64)
    outputs = []
    for num in nums:
        rows = np.arange(3 * num, dtype=np.float32).reshape(num, 3)
        empty = empty_tensor(PLANS[0], rows, np.full(num, 1) if is_packed else None)
        outputs.append((empty, rows))
        expected.outputs.add(data=rows.tobytes()).MergeFrom(empty)
    assert pb.PredictResponse.FromString(write_prediction(header, outputs)) == expected


@given(st.integers(0, 2**64 - 1))
def test_varints_are_protobuf_ones(value):
    assert pb.StreamAnswer.FromString(b"\x10" + varint(value)).positions == [value]


# ---- frames ---------------------------------------------------------------------------------------------------------


def message(frame: pb.StreamFrame) -> bytes:
    return pb.StreamPredictRequest(frame=frame).SerializeToString()


def rows_of(num: int, seed: int) -> bytes:
    return np.random.default_rng(seed).standard_normal((num, 3)).astype(np.float32).tobytes()


def frame_of(num: int, seed: int, *, position: int | None = None, **tensor: object) -> pb.StreamFrame:
    frame = pb.StreamFrame(tensors=[pb.Tensor(data=rows_of(num, seed), **tensor)])
    if num > 1 or position is not None:
        frame.handles.extend(range(num))
    if position is not None:
        frame.positions.extend([position] * num)
    return frame


def steps_of(num: int) -> Steps:
    link = Link(lambda _: None, [0])
    sessions = [Session(slot, link, slot, ANONYMOUS, 0.0) for slot in range(num)]
    return Steps(link, sessions, None, None, [b""])


def learned(frame: pb.StreamFrame, num: int) -> Repeat | None:
    return learn(steps_of(num), message(frame), frame)


@given(
    st.sampled_from([1, 3, 20]),
    st.none() | st.integers(0, 2**40) | st.sampled_from([126, 127, 16382]),
    st.sampled_from([{}, {"name": "x"}, {"dtype": pb.DATA_TYPE_FLOAT32, "layout": pb.LAYOUT_PER_STEP}]),
    st.booleans(),
)
def test_frames_that_follow_are_read_as_protobuf_reads_them(num, position, tensor, has_lengths):
    frame = frame_of(num, 0, position=position, **tensor)
    if has_lengths:
        frame.lengths.extend([1] * num)
    repeat = learned(frame, num)
    assert repeat is not None
    for seed in range(1, 4):
        frame.tensors[0].data = rows_of(num, seed)
        if position is not None:
            frame.positions[:] = [position + seed] * num
        steps = repeat.read(message(frame))
        assert steps is not None
        assert steps.inputs == [frame.tensors[0].data]
        assert steps.positions == (None if position is None else list(frame.positions))
        assert (steps.lengths, len(steps.sessions)) == (None, num)
        assert (steps.crew is not None) == (num >= CREW_SESSIONS)


OTHERS = {
    "other handles": lambda f: f.handles.__setitem__(0, 9),
    "a handle more": lambda f: f.handles.append(9),
    "other positions": lambda f: f.positions.__setitem__(0, 99),
    "a row more": lambda f: setattr(f.tensors[0], "data", rows_of(6, 1)),
    "other shape": lambda f: f.tensors[0].shape.extend([5, 3]),
    "a close": lambda f: f.closes.append(1),
    "an open": lambda f: f.opens.add(),
    "an acknowledgement": lambda f: f.acked_positions.extend([3] * 5),
    "a timeout": lambda f: f.timeout.FromMilliseconds(5),
    "lengths": lambda f: f.lengths.extend([1] * 5),
    "a second tensor": lambda f: f.tensors.add(name="state.0.h", data=b"1234"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_frames_that_say_anything_else_are_left_to_protobuf(other):
    repeat = learned(frame_of(5, 0, position=7), 5)
    frame = frame_of(5, 1, position=8)
    OTHERS[other](frame)
    assert repeat.read(message(frame)) is None
    assert repeat.read(message(frame_of(5, 1, position=8))) is not None


UNLEARNABLE = ["other positions", "a close", "an open", "an acknowledgement", "a timeout", "a second tensor"]


@pytest.mark.parametrize("other", UNLEARNABLE)
def test_frames_that_say_more_are_no_pattern(other):
    frame = frame_of(5, 1, position=8)
    OTHERS[other](frame)
    assert learned(frame, 5) is None


def test_a_frame_that_resends_is_left_to_protobuf():
    repeat = learned(frame_of(5, 0, position=7), 5)
    assert repeat.read(message(frame_of(5, 0, position=7))) is None


def test_bytes_after_the_rows_are_no_part_of_them():
    """An unknown field that looks like the rows must not be taken for them."""
    frame = frame_of(5, 0)
    data = frame.tensors[0].data
    body = frame.SerializeToString() + b"\x7a" + varint(len(data)) + data  # field 15
    raw = b"\x12" + varint(len(body)) + body
    parsed = pb.StreamPredictRequest.FromString(raw).frame
    assert raw.endswith(parsed.tensors[0].data)
    assert learn(steps_of(5), raw, parsed) is None


def test_a_pattern_ends_when_the_links_sessions_change():
    steps = steps_of(5)
    repeat = learn(steps, message(frame_of(5, 0)), frame_of(5, 0))
    assert repeat.read(message(frame_of(5, 1))) is not None
    steps.link.version += 1
    assert repeat.read(message(frame_of(5, 1))) is None


# ---- crews ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 9))
def test_a_crew_leaves_its_sessions_as_if_each_had_counted(expected, num_frames):
    sessions = [Session(slot, None, slot, ANONYMOUS, 0.0) for slot in range(len(expected))]
    for session, position in zip(sessions, expected, strict=True):
        session.sent = session.expected = session.applied = position
    crew = Crew(sessions)
    assert crew.gather()
    for frame in range(num_frames):
        assert crew.positions() == [position + frame for position in expected]
        assert crew.expects([None, *crew.positions()[1:]])
        assert not crew.expects([expected[0] + frame + 1, *crew.positions()[1:]])
        crew.advance(float(frame))
    crew.part()
    for session, position in zip(sessions, expected, strict=True):
        assert session.sent == session.expected == session.applied == position + num_frames
        assert session.used_at == max(0, num_frames - 1)


def test_a_crew_does_not_come_together_around_a_rejected_step():
    sessions = [Session(slot, None, slot, ANONYMOUS, 0.0) for slot in range(3)]
    sessions[1].reject_sent(1)
    assert not Crew(sessions).gather()
