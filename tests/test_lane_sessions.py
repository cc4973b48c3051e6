"""service.lane: sessions that end, linger and are resumed; models that need the whole sequence; Predict's sequences."""

import numpy as np
import onnx
import pytest

from models.spec import METADATA_KEY, Layout, TensorSpec
from service.errors import AnswersNotKept, Exhausted, NotFound, Overloaded, SessionExpired, SessionNotFound
from service.events import Answer, Closed, StepsFailed
from service.predict import submit_sequences
from service.sessions import SessionState, Terms
from tests.lanes import Client, drive, equal, finish, lane_maker, run_alone, steps
from tests.onnx_models import build

NAMED = Terms(session_id="a", linger_s=10.0, replay_window=50)


@pytest.fixture(params=["host", "device"])
def lane_of(repository, request):
    """The states are where the parameter says: nothing else may differ."""
    return lane_maker(repository, keeps_states=request.param == "device")


@pytest.fixture
def lane(lane_of):
    return lane_of("lstm", max_chunk_steps=4)


@pytest.fixture
def two_outputs(tmp_path):
    """A lane whose model answers y, per step, and the last hidden state, per sequence."""
    model = build("lstm")
    file = onnx.load_from_string(model.content)
    file.graph.node.append(onnx.helper.make_node("Squeeze", ["state.0.h.next", "axis"], ["last"]))
    file.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axis"))
    file.graph.output.append(onnx.helper.make_tensor_value_info("last", onnx.TensorProto.FLOAT, ["batch", 8]))
    last = TensorSpec(name="last", dtype="float32", row_shape=(8,), layout=Layout.PER_SEQUENCE)
    graph = model.spec.graph.model_copy(update={"outputs": (*model.spec.graph.outputs, last)})
    onnx.helper.set_model_props(file, {METADATA_KEY: model.spec.model_copy(update={"graphs": (graph,)}).to_json()})
    path = tmp_path / "two" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(file.SerializeToString())
    return lane_maker(tmp_path)("two", max_chunk_steps=4)


# ---- ends -----------------------------------------------------------------------------------------------------------


def test_a_closed_session_is_answered_to_its_last_step_and_its_name_is_free_at_once(lane):
    client, other = Client(lane), Client(lane)
    x = steps(1, 10)
    client.send({client.open(NAMED): x})
    lane.close(client.link, 0)
    assert lane.open(other.link, NAMED, 0.0) == (0, 0, False)
    with pytest.raises(NotFound, match="handle 0 is not open on this stream"):
        lane.close(client.link, 0)
    other.send({0: x[:3]})
    drive(lane)
    equal(client.rows(), run_alone(lane, x).y)
    equal(other.rows(), run_alone(lane, x[:3]).y)
    assert client.events[-1] == Closed(0, 10, SessionState.CLOSED)
    assert (lane.num_sessions, lane.slab.num_allocated, other.told(Closed)) == (1, 1, [])


def test_a_client_that_has_sent_all_leaves_only_sessions_that_linger(lane):
    client = Client(lane)
    x = steps(1, 6)
    kept, plain, idle = client.open(NAMED), client.open(), client.open(Terms(session_id="b", linger_s=1.0))
    client.send({kept: x, plain: x})
    lane.finish(client.link, 0.0)
    assert client.told(Closed) == [Closed(idle, 0, SessionState.OPEN)]
    drive(lane)
    equal(client.rows(kept), run_alone(lane, x).y)
    equal(client.rows(plain), run_alone(lane, x).y)
    assert sorted((c.handle, c.position, c.state) for c in client.told(Closed)[1:]) == [
        (kept, 6, SessionState.OPEN),
        (plain, 6, SessionState.CLOSED),
    ]
    assert (lane.num_sessions, client.link.members) == (2, set())


def test_a_session_lingers_after_its_connection_and_expires_after_its_linger(lane):
    client, late = Client(lane), Client(lane)
    client.send({client.open(NAMED): steps(1, 3)})
    lane.drop(client.link, 5.0)
    drive(lane, 6.0)
    lane.expire(14.9)
    assert lane.num_sessions == 1
    lane.expire(15.0)
    assert (lane.num_sessions, lane.slab.num_allocated, client.events) == (0, 0, [])
    with pytest.raises(SessionNotFound, match="session 'a' is not live"):
        lane.open(late.link, Terms(session_id="a", resume_only=True), 15.0)
    assert lane.open(late.link, NAMED, 15.0) == (1, 0, False)


def test_a_lane_counts_what_expires(lane_of):
    lane = lane_of("lstm", session_idle_s=2.0)
    client = Client(lane)
    client.open(Terms(session_id="quiet"))
    lane.expire(2.0)
    [failed] = client.told(StepsFailed)
    assert isinstance(failed.error, SessionExpired)
    assert str(failed.error).startswith("session 'quiet': idle 2.0 s, limit 2.0 s; its state is freed")
    assert lane.tally.rejected == {"SESSION_EXPIRED": 1}


# ---- resumption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_old_alive", [True, False])
def test_the_newest_connection_takes_a_session_over_with_what_is_under_way(lane, is_old_alive):
    old, new = Client(lane), Client(lane, wants_states=True)
    x = steps(1, 12)
    old.send({old.open(NAMED): x[:8]})
    lane.flush()
    finish(lane, lane.next_run(0.0))
    run = lane.next_run(0.0)
    old.send({0: x[8:10]})
    if not is_old_alive:
        lane.drop(old.link, 0.0)
    new.open()
    assert lane.open(new.link, NAMED, 1.0) == (1, 10, True)
    finish(lane, run)
    new.send({1: x[10:]})
    lane.close(new.link, 1)
    drive(lane)
    alone = run_alone(lane, x)
    equal(old.rows(), alone.y[:4])
    assert [position for position, _ in new.answers(1)] == list(range(4, 12))
    equal(np.array([row for _, row in new.answers(1)]), alone.y[4:])
    equal(new.told(Closed)[0].final_states[0], alone.states[0])
    taken = [Closed(0, 4, SessionState.CLOSED, is_taken_over=True)]
    assert old.told(Closed) == (taken if is_old_alive else [])
    assert (old.link.members, old.link.sessions, new.link.sessions.keys()) == (set(), {}, {0})


def test_a_session_that_is_taken_over_before_it_lingers_stays_with_the_new_connection(lane):
    old, new = Client(lane), Client(lane)
    x = steps(1, 6)
    old.send({old.open(NAMED): x})
    lane.finish(old.link, 0.0)
    new.open(NAMED)
    drive(lane)
    equal(new.rows(), run_alone(lane, x).y)
    assert (new.told(Closed), list(new.link.sessions)) == ([], [0])
    lane.expire(99.0)
    assert lane.num_sessions == 1


def test_resent_steps_are_answered_as_before_and_applied_once(lane):
    old, new = Client(lane), Client(lane)
    x = steps(1, 9)
    old.send({old.open(NAMED): x[:7]})
    drive(lane)
    lane.drop(old.link, 0.0)
    new.open(NAMED)
    new.send({0: x[2:]}, positions=[2])
    new.send({0: x[:1]}, positions=[0])
    drive(lane)
    alone = run_alone(lane, x).y
    answers = new.answers()
    assert [position for position, _ in answers] == [2, 3, 4, 5, 6, 0, 7, 8]
    for position, row in answers:
        equal(row, alone[position])
    new.link.sessions[0].acknowledge(5)
    new.send({0: x[4:]}, positions=[4])
    lane.flush()
    [refused] = new.told(StepsFailed)
    assert (type(refused.error), refused.position, refused.expected) == (AnswersNotKept, 4, 9)


def test_steps_resent_while_they_run_are_answered_once(lane):
    client = Client(lane)
    x = steps(1, 6)
    client.send({client.open(NAMED): x})
    lane.flush()
    run = lane.next_run(0.0)
    client.send({0: x}, positions=[0])
    lane.flush()
    finish(lane, run)
    drive(lane)
    equal(client.rows(), run_alone(lane, x).y)


def test_a_kept_answer_keeps_nothing_else_of_its_run(lane):
    client, others = Client(lane), Client(lane)
    client.send({client.open(NAMED): steps(1, 1)})
    others.send({others.open(): steps(seed, 1) for seed in range(5)})
    lane.flush()
    run = lane.next_run(0.0)
    outputs = run.execute()
    lane.complete(run, outputs, 0.0, 0.0)
    [kept] = client.link.sessions[0].kept
    assert not np.shares_memory(kept.outputs[0], outputs[0])
    equal(kept.outputs[0], outputs[0][0])


@pytest.mark.parametrize(("num_done", "expected"), [(1, [6]), (2, [6, 6])])
def test_a_client_that_wants_last_steps_alone_is_replayed_nothing_else(lane, num_done, expected):
    client = Client(lane, emit_last=True)
    x = steps(1, 7)
    client.send({client.open(NAMED): x})
    lane.flush()
    for _ in range(num_done):
        finish(lane, lane.next_run(0.0))
    client.send({0: x}, positions=[0])
    drive(lane)
    assert [position for position, _ in client.answers()] == expected
    for _, row in client.answers():
        equal(row, run_alone(lane, x).y[6])


@pytest.mark.parametrize("emit_last", [False, True])
def test_outputs_are_replayed_as_the_new_connection_wants_them(two_outputs, emit_last):
    lane = two_outputs
    old, new = Client(lane, outputs=[0]), Client(lane, outputs=[1, 0], emit_last=emit_last)
    x = steps(1, 7)
    old.send({old.open(NAMED): x})
    drive(lane)
    lane.drop(old.link, 0.0)
    new.open(NAMED)
    new.send({0: x}, positions=[0])
    lane.flush()
    [answer] = new.told(Answer)
    alone = run_alone(lane, x)
    last, y = answer.outputs
    equal(last, alone.states[0])  # [1, hidden]
    equal(y, alone.y[6:] if emit_last else alone.y)
    assert (answer.positions, answer.lengths) == (([6], [1]) if emit_last else ([0], [7]))


# ---- whole sequences ------------------------------------------------------------------------------------------------


def test_a_whole_sequence_model_answers_when_the_session_closes(lane_of):
    lane = lane_of("bilstm")
    xs = [steps(seed, count) for seed, count in ((1, 30), (2, 28), (3, 5))]
    client = Client(lane, wants_states=True)
    for _ in xs:
        client.open()
    for start in range(0, 30, 10):
        client.send({handle: x[start : start + 10] for handle, x in enumerate(xs) if len(x) > start})
    client.send({0: xs[0][5:20]}, positions=[5])  # kept already
    drive(lane)
    assert (client.events, lane.num_queued_steps) == ([], 63)
    for handle in range(3):
        lane.close(client.link, handle)
    drive(lane)
    for handle, x in enumerate(xs):
        equal(client.rows(handle), run_alone(lane, x).y)
    assert lane.tally.run_rows == {1: 1, 2: 1}
    assert (lane.num_queued_steps, lane.slab.num_allocated, len(client.told(Closed))) == (0, 0, 3)


def test_one_output_a_sequence(lane_of):
    lane = lane_of("bigru")
    client = Client(lane)
    x = steps(1, 20)
    client.send({client.open(): x, client.open(): x[:18]})
    lane.finish(client.link, 0.0)
    drive(lane)
    [answer] = client.told(Answer)
    assert (answer.handles, answer.positions, answer.lengths) == ([0, 1], [0, 0], [20, 18])
    equal(answer.outputs[0], np.stack([run_alone(lane, x).y, run_alone(lane, x[:18]).y]))


def test_a_session_that_closes_without_steps_is_told_so(lane_of):
    lane = lane_of("bilstm")
    client = Client(lane)
    lane.close(client.link, client.open())
    assert (client.events, lane.slab.num_allocated) == ([Closed(0, 0, SessionState.CLOSED)], 0)


def test_kept_steps_are_bounded_by_session_and_by_model(lane_of):
    lane = lane_of("bilstm", max_inflight_steps=8, max_queued_steps=12)
    client = Client(lane)
    first, second = client.open(), client.open()
    client.send({first: steps(1, 6)})
    client.send({first: steps(1, 3)})
    client.send({second: steps(2, 7)})
    client.send({second: steps(2, 6)}, positions=[0])
    drive(lane)
    assert [(e.handle, type(e.error)) for e in client.told(StepsFailed)] == [(first, Exhausted), (second, Overloaded)]
    assert lane.num_queued_steps == 12
    lane.close(client.link, first)
    assert lane.num_queued_steps == 12
    lane.drop(client.link, 0.0)
    assert lane.num_queued_steps == 0


def test_an_idle_session_of_a_whole_sequence_model_expires_with_what_it_sent(lane_of):
    lane = lane_of("bilstm", session_idle_s=5.0)
    client = Client(lane)
    client.send({client.open(): steps(1, 6)}, now=1.0)
    drive(lane, 1.0)
    lane.expire(5.9)
    assert lane.num_queued_steps == 6
    lane.expire(6.0)
    [failed] = client.told(StepsFailed)
    assert (failed.num_steps, failed.is_over, lane.num_queued_steps, lane.slab.num_allocated) == (6, True, 0, 0)


# ---- Predict --------------------------------------------------------------------------------------------------------


def predict(lane, client, xs, states=None):
    lengths = [len(x) for x in xs]
    starts = [sum(lengths[:index]) for index in range(len(xs))]
    submit_sequences(lane, client.link, [np.concatenate(xs)], starts, lengths, states or [None, None], 0.0)


def test_sequences_of_a_predict_call_go_beside_live_sessions(lane):
    xs = [steps(seed, 3 * seed + 1) for seed in range(6)]
    live, whole = Client(lane), Client(lane, is_predicting=True, wants_states=True)
    live.send({live.open(): xs[0]})
    predict(lane, whole, xs)
    lane.flush()
    assert (lane.num_sessions, lane.num_predicting) == (1, 6)
    drive(lane)
    equal(live.rows(), run_alone(lane, xs[0]).y)
    for handle, x in enumerate(xs):
        equal(whole.rows(handle), run_alone(lane, x).y)
    for closed in whole.told(Closed):
        equal(closed.final_states[1], run_alone(lane, xs[closed.handle]).states[1])
    assert (lane.num_sessions, lane.num_predicting, lane.slab.num_allocated) == (1, 0, 1)


def test_a_predict_call_goes_on_from_the_states_that_it_gives(lane):
    x = steps(1, 11)
    first, second = (Client(lane, is_predicting=True, wants_states=True) for _ in range(2))
    predict(lane, first, [x[:5]])
    drive(lane)
    states = [row[None] for row in first.told(Closed)[0].final_states]
    predict(lane, second, [x[5:]], states)
    drive(lane)
    equal(np.concatenate([first.rows(), second.rows()]), run_alone(lane, x).y)


@pytest.mark.parametrize("is_running", [False, True])
def test_a_predict_call_that_is_cancelled_frees_all_that_it_held(lane, is_running):
    client = Client(lane, is_predicting=True)
    predict(lane, client, [steps(1, 9), steps(2, 9)])
    run = lane.next_run(0.0) if is_running else None
    lane.drop(client.link, 0.0)
    if run is not None:
        finish(lane, run)
    assert (lane.num_predicting, lane.num_sessions, lane.slab.num_allocated, lane.num_queued_steps) == (0, 0, 0, 0)
    drive(lane)
    assert client.events == []
