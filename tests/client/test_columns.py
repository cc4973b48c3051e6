"""GatewayMachine: handles, positions and rejections of many sessions, without a server."""

import numpy as np
import pytest

from service.client import (
    Closed,
    FailedPrecondition,
    InvalidArgument,
    Opened,
    ProtocolError,
    SessionFailed,
    StepRejected,
)
from service.client._columns import GatewayMachine
from service.client._terms import SequenceTerms
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from tests.client.toy import SUM


def gateway(num_sessions=0, **terms):
    machine = GatewayMachine(SUM, SequenceTerms(**terms))
    machine.receive(pb.StreamPredictResponse(opened=pb.StreamOpened(version=1, digest="d1", max_inflight_steps=8)))
    for _ in range(num_sessions):
        open_session(machine)
    machine.flush()
    return machine


def open_session(machine, session_id="", *, linger_s=0.0, replay_window=0, states=None):
    return machine.open(
        session_id,
        linger_s=linger_s,
        replay_window=replay_window,
        resume_only=False,
        priority="normal",
        states=states,
        contexts=None,
    )


def answered(**columns):
    return pb.StreamPredictResponse(answer=pb.StreamAnswer(**columns))


def rejected(handle, position, expected, code=3, length=1):
    error = pb.StepError(
        handle=handle,
        position=position,
        length=length,
        expected_position=expected,
        kind=pb.STEP_ERROR_KIND_STEP_REJECTED,
    )
    error.status.code = code
    return answered(errors=[error])


def rows(*values):
    return np.array(values, dtype=np.float32)[:, None]


def positions_of(requests):
    return [list(request.frame.positions) for request in requests]


def test_handles_count_from_zero_and_outgrow_any_table():
    machine = gateway()
    assert [open_session(machine) for _ in range(200)] == list(range(200))
    [request] = machine.flush()
    assert len(request.frame.opens) == 200
    machine.send([199, 0], rows(1, 2))
    assert (machine.position(199), machine.position(0), machine.position(5)) == (1, 1, 0)


def test_steps_go_out_as_columns_at_their_positions():
    machine = gateway(3)
    machine.send([0, 2], rows(1, 2))
    [request] = machine.send_each({2: [[3.0], [4.0]], 1: [5.0]}, closes=[0], timeout_s=0.5)
    frame = request.frame
    assert (list(frame.handles), list(frame.positions), list(frame.lengths)) == ([2, 1], [1, 0], [2, 1])
    assert np.frombuffer(frame.tensors[0].data, "<f4").tolist() == [3, 4, 5]
    assert (list(frame.closes), frame.timeout.ToMilliseconds(), list(frame.acked_positions)) == ([0], 500, [])


def test_events_come_back_as_columns_and_one_by_one():
    machine = gateway(3)
    machine.send([0, 1], rows(1, 2, 3), [1, 2])
    tensor = pb.Tensor(name="y", data=rows(10, 20, 30).tobytes())
    events = machine.receive(
        answered(
            handles=[1, 0],
            positions=[0, 0],
            lengths=[2, 1],
            tensors=[tensor],
            closed=[pb.SessionClosed(handle=2, position=4, reason=pb.CLOSE_REASON_EXPIRED)],
        )
    )
    assert [(handle, y.tolist()) for handle, y in events] == [(1, [[10], [20]]), (0, [[30]])]
    assert events.output(1).tolist() == [[30]]
    assert events.closed == (Closed(2, 4, "EXPIRED"),)
    assert (machine.num_unanswered(0), machine.num_unanswered(1)) == (0, 0)


def test_under_last_every_entry_has_one_row():
    machine = gateway(2, emit="last")
    machine.send([0, 1], rows(1, 2, 3), [1, 2])
    tensor = pb.Tensor(name="y", data=rows(10, 20).tobytes())
    events = machine.receive(answered(handles=[0, 1], positions=[0, 1], lengths=[1, 1], tensors=[tensor]))
    assert [(handle, y.tolist()) for handle, y in events] == [(0, [10]), (1, [20])]
    assert machine.num_unanswered(1) == 0


def test_a_named_session_has_no_positions_until_it_is_open():
    machine = gateway()
    named, plain = open_session(machine, "a", linger_s=5, replay_window=3), open_session(machine)
    opens, known, unknown = machine.send([named, plain], rows(1, 2, 3), [2, 1])
    assert [(s.session_id, s.linger.seconds, s.replay_window) for s in opens.frame.opens] == [("a", 5, 3), ("", 0, 0)]
    assert (list(known.frame.handles), list(known.frame.positions)) == ([plain], [0])
    assert (list(unknown.frame.handles), list(unknown.frame.positions)) == ([named], [])
    assert np.frombuffer(unknown.frame.tensors[0].data, "<f4").tolist() == [1, 2]
    events = machine.receive(
        answered(opened=[pb.SessionOpened(handle=named, session_id="a", position=7, resumed=True)])
    )
    assert events.opened == (Opened(named, "a", 7, resumed=True, error=None),)
    [request] = machine.send([named], rows(4))
    assert (list(request.frame.positions), list(request.frame.acked_positions)) == ([9], [7])


def test_a_refused_open_uses_its_handle_up():
    machine = gateway()
    refused = open_session(machine, "a")
    message = pb.SessionOpened(handle=refused)
    message.status.code = 8
    message.status.message = "full"
    events = machine.receive(answered(opened=[message]))
    assert (events.opened[0].error.code, str(events.opened[0].error)) == ("RESOURCE_EXHAUSTED", "full")
    assert open_session(machine) == refused + 1


def test_opens_with_different_states_travel_in_different_frames():
    machine = gateway()
    for states in (None, {"state.0.h": [[1.0]]}, {"state.0.h": [[2.0]]}, None):
        open_session(machine, states=states)
    frames = [request.frame for request in machine.flush()]
    assert [len(frame.opens) for frame in frames] == [1, 2, 1]
    assert np.frombuffer(frames[1].tensors[0].data, "<f4").tolist() == [1, 2]
    assert list(frames[1].tensors[0].shape) == [2, 1, 1]


def test_after_a_rejection_the_next_steps_go_where_the_server_expects_them():
    machine = gateway(1)
    for value in (0, np.nan, 2, 3):
        machine.send([0], rows(value))
    events = machine.receive(rejected(0, 1, expected=1))
    assert isinstance(events.errors[0], StepRejected)
    assert positions_of(machine.send([0], rows(1))) == [[1]]
    for position in (2, 3):
        machine.receive(rejected(0, position, expected=1, code=10))
    assert positions_of(machine.send([0], rows(2))) == [[2]]


def test_a_second_rejection_counts_as_the_first_did():
    machine = gateway(1)
    for value in (np.nan, 1, 2):
        machine.send([0], rows(value))
    machine.receive(rejected(0, 0, expected=0))
    machine.send([0], rows(np.nan))
    machine.send([0], rows(1))
    for position, code in ((1, 10), (2, 10), (0, 3)):
        machine.receive(rejected(0, position, expected=0, code=code))
    assert positions_of(machine.send([0], rows(5))) == [[0]]
    machine.receive(rejected(0, 1, expected=0, code=10))
    assert machine.position(0) == 1


def test_an_answer_behind_a_rejection_ends_the_wait_for_aborted_steps():
    machine = gateway(1)
    for value in (np.nan, 1):
        machine.send([0], rows(value))
    machine.receive(rejected(0, 0, expected=0))
    machine.send([0], rows(1, 2), [2])
    tensor = pb.Tensor(name="y", data=rows(1, 3).tobytes())
    machine.receive(answered(handles=[0], positions=[0], lengths=[2], tensors=[tensor]))
    machine.send([0], rows(np.nan))
    machine.receive(rejected(0, 2, expected=2))
    assert positions_of(machine.send([0], rows(3))) == [[2]]


def test_seeking_wants_a_session_at_rest():
    machine = gateway(1)
    named = open_session(machine, "a")
    with pytest.raises(FailedPrecondition, match="not open yet"):
        machine.seek(named, 3)
    machine.send([0], rows(1))
    with pytest.raises(FailedPrecondition, match="unanswered steps"):
        machine.seek(0, 0)
    machine.receive(answered(opened=[pb.SessionOpened(handle=named, position=9)]))
    machine.seek(named, 6)
    assert positions_of(machine.send([named], rows(1, 2), [2])) == [[6]]


def test_failed_sessions_and_drains_are_events():
    machine = gateway(1)
    error = pb.StepError(handle=0, kind=pb.STEP_ERROR_KIND_SESSION_FAILED)
    assert isinstance(machine.receive(answered(errors=[error])).errors[0], SessionFailed)
    drain = pb.StreamPredictResponse(drain=pb.StreamDrain())
    drain.drain.grace.FromMilliseconds(1500)
    events = machine.receive(drain)
    assert (events.drain_s, list(events)) == (1.5, [])


@pytest.mark.parametrize(
    ("handles", "values", "lengths", "message"),
    [
        ([5], [1], None, "handles: expected some of the 2"),
        ([-1], [1], None, "handles: expected some of the 2"),
        ([0, 0], [1, 2], None, "one entry in a frame"),
        ([0, 1], [1], None, "expected 2 lengths of at least 1 that sum to 1 steps"),
        ([0], [1, 2], [1], "that sum to 2 steps"),
        ([0, 1], [1, 2], [0, 2], "at least 1"),
    ],
)
def test_columns_that_do_not_fit(handles, values, lengths, message):
    machine = gateway(2)
    with pytest.raises(InvalidArgument, match=message):
        machine.send(handles, rows(*values), lengths)
    assert (machine.position(0), machine.position(1)) == (0, 0)


def test_handles_that_were_not_opened():
    machine = gateway(1)
    for act in (machine.position, machine.num_unanswered, lambda handle: machine.send((), {}, closes=[handle])):
        with pytest.raises(InvalidArgument, match="handle 3: expected one of the 1"):
            act(3)
    with pytest.raises(ProtocolError, match="handle 3"):
        machine.receive(answered(handles=[3], positions=[0], lengths=[0]))
