"""SequenceMachine, case by case; test_network.py has what no one thought of."""

import math

import numpy as np
import pytest

from service.client import FailedPrecondition, NotFound, ProtocolError, SessionEnded, SessionFailed, StepRejected
from service.client._sequence import SequenceMachine, State
from service.client._terms import SequenceTerms
from service.client.errors import Unavailable
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from tests.client.toy import SUM

LOST = Unavailable("the connection was lost")


def opened(machine, position=0, *, resumed=False, step_mode=pb.STEP_MODE_STEPPING, inflight=8):
    machine.open_requests()
    session = pb.SessionOpened(position=position, resumed=resumed)
    message = pb.StreamOpened(
        version=1, digest="d1", step_mode=step_mode, max_inflight_steps=inflight, sessions=[session]
    )
    machine.receive(pb.StreamPredictResponse(opened=message))
    return machine


def send(machine, *values):
    return machine.add(machine.begin(), {"x": np.array(values, dtype=np.float32)[:, None]}, is_last=True)


def answer(position, *values):
    tensor = pb.Tensor(name="y", data=np.array(values, dtype="<f4").tobytes())
    frame = pb.StreamAnswer(handles=[0], positions=[position], lengths=[len(values)], tensors=[tensor])
    return pb.StreamPredictResponse(answer=frame)


def rejection(position, length, expected, code=3, kind=pb.STEP_ERROR_KIND_STEP_REJECTED):
    error = pb.StepError(position=position, length=length, kind=kind, expected_position=expected)
    error.status.code = code
    return pb.StreamPredictResponse(answer=pb.StreamAnswer(errors=[error]))


def closed(reason, position=0):
    ended = pb.SessionClosed(position=position, reason=reason)
    return pb.StreamPredictResponse(answer=pb.StreamAnswer(closed=[ended]))


def test_frames_carry_positions_and_acknowledge_what_has_come():
    machine = opened(SequenceMachine(SUM, SequenceTerms(session_id="s", linger_s=1, replay_window=4)), 5)
    first = send(machine, 1, 2)
    machine.receive(answer(5, 1))
    second = send(machine, 3)
    assert [list(r.frame.positions) for r in (*first, *second)] == [[5], [7]]
    assert [list(r.frame.acked_positions) for r in (*first, *second)] == [[5], [6]]


def test_a_rejection_that_overtakes_answers_waits_for_them():
    machine = opened(SequenceMachine(SUM, SequenceTerms()))
    send(machine, 1, 2)
    send(machine, math.nan)
    send(machine, 3)
    machine.receive(rejection(2, 1, expected=2))
    assert not machine.is_ready
    machine.receive(rejection(3, 1, expected=2, code=10))
    machine.receive(answer(0, 1, 3))
    np.testing.assert_array_equal(machine.take()["y"], [[1], [3]])
    with pytest.raises(StepRejected) as caught:
        machine.take()
    assert (caught.value.position, caught.value.expected_position, caught.value.code) == (2, 2, "INVALID_ARGUMENT")
    with pytest.raises(StepRejected) as caught:
        machine.take()
    assert caught.value.code == "ABORTED"
    assert machine.ledger.position == 2


def test_what_is_sent_before_the_caller_knows_of_a_rejection_is_not_applied_in_its_place():
    machine = opened(SequenceMachine(SUM, SequenceTerms()))
    send(machine, math.nan)
    machine.receive(rejection(0, 1, expected=0))
    assert send(machine, 7) == []
    with pytest.raises(StepRejected):
        machine.take()
    with pytest.raises(StepRejected) as caught:
        machine.take()
    assert caught.value.code == "ABORTED"
    [request] = send(machine, 8)
    assert list(request.frame.positions) == [0]


def test_a_rejection_of_what_came_behind_another_keeps_its_place():
    machine = opened(SequenceMachine(SUM, SequenceTerms()))
    send(machine, math.nan)
    send(machine, 1)
    machine.receive(rejection(0, 1, expected=0))
    with pytest.raises(StepRejected):
        machine.take()
    send(machine, math.nan)
    machine.receive(rejection(1, 1, expected=0, code=10))
    machine.receive(rejection(0, 1, expected=0))
    with pytest.raises(StepRejected):
        machine.take()
    assert send(machine, 7) == []  # the second rejection is not seen yet
    with pytest.raises(StepRejected) as caught:
        machine.take()
    assert caught.value.code == "INVALID_ARGUMENT"


def test_what_was_rejected_is_not_sent_again_when_the_connection_is_lost():
    machine = opened(SequenceMachine(SUM, SequenceTerms(session_id="s", linger_s=1, replay_window=8)))
    send(machine, 1, 2)
    send(machine, math.nan)
    send(machine, 3)
    machine.receive(rejection(2, 1, expected=2))
    assert machine.end(LOST)
    machine.open_requests()
    session = pb.SessionOpened(position=2, resumed=True)
    requests = machine.receive(pb.StreamPredictResponse(opened=pb.StreamOpened(sessions=[session])))
    assert [list(request.frame.positions) for request in requests] == [[0]]
    machine.receive(answer(0, 1, 3))
    assert machine.take()["y"].tolist() == [[1], [3]]
    for code in ("INVALID_ARGUMENT", "ABORTED"):
        with pytest.raises(StepRejected) as caught:
            machine.take()
        assert (caught.value.code, caught.value.expected_position) == (code, 2)


def test_steps_aborted_by_a_lost_connection_name_the_position_of_their_time():
    machine = opened(SequenceMachine(SUM, SequenceTerms(session_id="s", linger_s=1, replay_window=8)))
    send(machine, math.nan)
    send(machine, 1)
    machine.receive(rejection(0, 1, expected=0))
    with pytest.raises(StepRejected):
        machine.take()
    send(machine, 2)
    assert machine.end(LOST)
    with pytest.raises(StepRejected) as caught:
        machine.take()
    assert (caught.value.code, caught.value.position, caught.value.expected_position) == ("ABORTED", 1, 0)


def test_under_last_only_steps_that_were_not_applied_are_sent_again():
    machine = opened(SequenceMachine(SUM, SequenceTerms(emit="last", session_id="s", linger_s=1, replay_window=8)))
    send(machine, 1, 2, 3)
    assert machine.end(LOST)
    machine.open_requests()
    session = pb.SessionOpened(position=2, resumed=True)
    [request] = machine.receive(pb.StreamPredictResponse(opened=pb.StreamOpened(sessions=[session])))
    assert list(request.frame.positions) == [2]
    assert np.frombuffer(request.frame.tensors[0].data, "<f4").tolist() == [3]
    machine.receive(answer(2, 6))
    assert machine.take()["y"].tolist() == [6]


def test_what_has_come_is_neither_sent_again_nor_forgotten_too_early():
    machine = opened(SequenceMachine(SUM, SequenceTerms(session_id="s", linger_s=1, replay_window=8)))
    send(machine, 1, 2, 3)
    machine.receive(answer(0, 1))
    assert machine.end(LOST)
    machine.open_requests()
    session = pb.SessionOpened(position=3, resumed=True)
    [request] = machine.receive(pb.StreamPredictResponse(opened=pb.StreamOpened(sessions=[session])))
    assert (list(request.frame.positions), list(request.frame.acked_positions)) == ([1], [1])
    assert np.frombuffer(request.frame.tensors[0].data, "<f4").tolist() == [2, 3]


def test_steps_that_will_be_aborted_acknowledge_nothing():
    machine = opened(SequenceMachine(SUM, SequenceTerms(session_id="s", linger_s=1, replay_window=8)))
    send(machine, math.nan)
    send(machine, 1, 2)
    machine.receive(rejection(0, 1, expected=0))
    with pytest.raises(StepRejected):
        machine.take()
    [request] = send(machine, 3)
    assert (list(request.frame.positions), list(request.frame.acked_positions)) == ([0], [0])


def test_a_buffered_sequence_that_is_left_to_linger_is_owed_nothing():
    machine = SequenceMachine(SUM, SequenceTerms(session_id="s", linger_s=1))
    opened(machine, step_mode=pb.STEP_MODE_BUFFERED)
    send(machine, 1)
    machine.detach()
    assert machine.is_ending
    assert not machine.end(LOST)
    assert machine.state is State.OVER
    assert not machine.is_ready


def test_a_chunk_that_is_rejected_midway_gives_its_first_outputs():
    machine = opened(SequenceMachine(SUM, SequenceTerms()))
    send(machine, 1, 2, 3)
    machine.receive(rejection(1, 2, expected=1, code=4))
    machine.receive(answer(0, 1))
    np.testing.assert_array_equal(machine.take()["y"], [[1]])
    with pytest.raises(StepRejected) as caught:
        machine.take()
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert machine.ledger.position == 1
    assert machine.ledger.num_unanswered == 0


def test_an_answer_nobody_waits_for_is_a_fault():
    machine = opened(SequenceMachine(SUM, SequenceTerms()))
    send(machine, 1)
    machine.receive(answer(3, 1))
    with pytest.raises(ProtocolError, match="position 3"):
        machine.take()


def test_outputs_that_come_again_count_once():
    machine = opened(SequenceMachine(SUM, SequenceTerms(session_id="s", linger_s=1, replay_window=4)))
    send(machine, 1, 2)
    send(machine, 3)
    machine.receive(answer(0, 1))
    machine.receive(answer(0, 1, 3, 6))
    machine.receive(answer(1, 3, 6))
    np.testing.assert_array_equal(machine.take()["y"], [[1], [3]])
    np.testing.assert_array_equal(machine.take()["y"], [[6]])
    assert not machine.is_ready


def test_a_failed_session_gives_what_came_before():
    machine = opened(SequenceMachine(SUM, SequenceTerms()))
    send(machine, 1)
    send(machine, 2)
    machine.receive(answer(0, 1))
    machine.receive(rejection(1, 1, expected=1, code=13, kind=pb.STEP_ERROR_KIND_SESSION_FAILED))
    np.testing.assert_array_equal(machine.take()["y"], [[1]])
    with pytest.raises(SessionFailed) as caught:
        machine.take()
    assert caught.value.code == "INTERNAL"
    with pytest.raises(SessionFailed):
        machine.begin()


@pytest.mark.parametrize(
    ("reason", "word"), [(pb.CLOSE_REASON_TAKEN_OVER, "TAKEN_OVER"), (pb.CLOSE_REASON_EXPIRED, "EXPIRED")]
)
def test_a_session_that_ends_otherwise_says_why(reason, word):
    machine = opened(SequenceMachine(SUM, SequenceTerms(session_id="s", linger_s=1)))
    machine.receive(closed(reason, 4))
    with pytest.raises(SessionEnded, match=word.lower().replace("_", " ")) as caught:
        machine.take()
    assert (caught.value.reason, caught.value.position) == (word, 4)
    assert not machine.end(LOST)


def test_only_a_session_that_lingers_is_resumed():
    machine = opened(SequenceMachine(SUM, SequenceTerms(session_id="s")))
    send(machine, 1)
    assert not machine.end(LOST)
    with pytest.raises(Unavailable, match="lost"):
        machine.take()


def test_a_resumed_session_that_is_gone_is_an_error():
    machine = opened(SequenceMachine(SUM, SequenceTerms(session_id="s", linger_s=1)))
    send(machine, 1)
    assert machine.end(LOST)
    [request] = machine.open_requests()
    assert request.open.sessions[0].resume_only
    gone = pb.SessionOpened()
    gone.status.code = 5
    gone.status.message = "it expired"
    machine.receive(pb.StreamPredictResponse(opened=pb.StreamOpened(sessions=[gone])))
    with pytest.raises(SessionFailed, match="can't be resumed: it expired") as caught:
        machine.take()
    assert caught.value.code == "NOT_FOUND"


def test_a_session_that_does_not_open_raises():
    machine = SequenceMachine(SUM, SequenceTerms(session_id="s", resume_only=True))
    machine.open_requests()
    refused = pb.SessionOpened()
    refused.status.code = 5
    with pytest.raises(NotFound):
        machine.receive(pb.StreamPredictResponse(opened=pb.StreamOpened(sessions=[refused])))


def test_closing_ends_in_order():
    machine = opened(SequenceMachine(SUM, SequenceTerms()))
    send(machine, 1)
    [request] = machine.close()
    assert list(request.frame.closes) == [0]
    with pytest.raises(FailedPrecondition, match="closed"):
        machine.begin()
    machine.receive(answer(0, 1))
    machine.receive(closed(pb.CLOSE_REASON_CLIENT, 1))
    assert machine.state is State.OVER
    assert not machine.end(None)
    np.testing.assert_array_equal(machine.take()["y"], [[1]])


def test_a_stream_that_ends_with_steps_unanswered_is_a_fault():
    machine = opened(SequenceMachine(SUM, SequenceTerms()))
    send(machine, 1)
    machine.close()
    machine.end(None)
    with pytest.raises(ProtocolError, match="before 1 steps were answered"):
        machine.take()


def test_a_buffered_sequence_is_resent_from_where_the_server_has_it():
    machine = SequenceMachine(SUM, SequenceTerms(session_id="s", linger_s=1))
    opened(machine, step_mode=pb.STEP_MODE_BUFFERED)
    whole = machine.begin()
    machine.add(whole, {"x": np.ones((3, 1), np.float32)}, is_last=False)
    machine.add(whole, {"x": np.ones((2, 1), np.float32)}, is_last=True)
    assert machine.end(LOST)
    machine.open_requests()
    session = pb.SessionOpened(position=2, resumed=True)
    requests = machine.receive(pb.StreamPredictResponse(opened=pb.StreamOpened(sessions=[session])))
    assert [list(r.frame.positions) for r in requests] == [[2], [3]]
    assert [len(r.frame.tensors[0].data) for r in requests] == [4, 8]
    machine.close()
    machine.receive(answer(0, 1, 2, 3, 4, 5))
    np.testing.assert_array_equal(machine.take()["y"][:, 0], [1, 2, 3, 4, 5])


def test_long_chunks_are_cut_to_the_window():
    machine = opened(SequenceMachine(SUM, SequenceTerms()), inflight=3)
    parts = list(machine.cut({"x": np.arange(7, dtype=np.float32)[:, None]}))
    assert [(part["x"][:, 0].tolist(), is_last) for part, is_last in parts] == [
        ([0, 1, 2], False),
        ([3, 4, 5], False),
        ([6], True),
    ]
