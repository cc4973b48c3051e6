"""What the client packs and unpacks, without a server."""

from dataclasses import replace

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from service.client import (
    FieldViolation,
    InvalidArgument,
    NotFound,
    ProtocolError,
    ResourceExhausted,
    ServerError,
    SessionFailed,
    StepRejected,
    _codec,
)
from service.client._answers import read_entries
from service.client._channel import ChannelSettings
from service.client._status import from_rpc, is_connection_loss, step_error
from service.client._terms import SequenceTerms
from service.client.errors import error_for
from service.client.info import TensorInfo
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from tests.client.toy import SUM

PAIR = replace(
    SUM,
    inputs=(
        TensorInfo("x", "float32", (2,), "per_step"),
        TensorInfo("token", "int64", (), "per_step"),
        TensorInfo("context", "float32", (3,), "per_sequence"),
        TensorInfo("scale", "float64", (), "shared"),
    ),
)
lengths_strategy = st.lists(st.integers(1, 5), min_size=1, max_size=6)


# ---- arrays out ------------------------------------------------------------------------------------------------------


@given(lengths_strategy, st.sampled_from(["float32", "float64", "int16", "bool"]))
def test_predict_packs_ragged_sequences_end_to_end(lengths, dtype):
    xs = [np.arange(n).reshape(n, 1).astype(dtype) for n in lengths]
    request, steps = _codec.predict_request(SUM, xs)
    [tensor] = request.inputs
    assert steps == lengths == list(tensor.lengths)
    assert list(tensor.shape) == [sum(lengths), 1]
    assert (tensor.dtype, tensor.layout) == (pb.DATA_TYPE_FLOAT32, pb.LAYOUT_PER_STEP)
    packed = np.frombuffer(tensor.data, dtype="<f4")
    np.testing.assert_array_equal(packed, np.concatenate(xs)[:, 0].astype(np.float32))


def test_predict_packs_every_kind_of_input_by_name():
    xs = {
        "x": [np.ones((2, 2)), np.ones((1, 2))],
        "token": [[1, 2], [3]],
        "context": np.zeros((2, 3)),
        "scale": 0.5,
    }
    states = {"state.0.h": np.zeros((2, 1, 1))}
    request, lengths = _codec.predict_request(PAIR, xs, states=states, emit="last", outputs=["y"], return_state=True)
    assert lengths == [2, 1]
    assert [(t.name, list(t.shape), t.layout) for t in request.inputs] == [
        ("x", [3, 2], pb.LAYOUT_PER_STEP),
        ("token", [3], pb.LAYOUT_PER_STEP),
        ("context", [2, 3], pb.LAYOUT_PER_SEQUENCE),
        ("scale", [], pb.LAYOUT_SHARED),
        ("state.0.h", [2, 1, 1], pb.LAYOUT_PER_SEQUENCE),
    ]
    assert (request.emit, list(request.outputs), request.return_state) == (pb.EMIT_LAST, ["y"], True)


@pytest.mark.parametrize(
    ("xs", "message"),
    [
        (np.zeros((3, 1)), r"x: expected a list of sequences, got one array; for one sequence give \[x\]"),
        ([], "x: expected at least one sequence, got none"),
        (7, "x: expected a list of sequences, got int"),
        ([np.zeros((3, 1)), np.zeros((3, 2))], r"x\[1\]: expected shape \[time, 1\], got \[3, 2\]"),
        ([np.zeros(3)], r"x\[0\]: expected shape \[time, 1\], got \[3\]"),
        ([[[1], [2, 3]]], r"x\[0\]: expected an array of float32"),
        ([np.zeros((3, 1), complex)], r"x\[0\]: expected float32, got complex128"),
        ([np.full((1, 1), 1e300)], r"x\[0\]: a value of float64 does not fit into float32"),
        ({"z": []}, "model sum takes no z here: it takes x"),
        ({}, "model sum needs x too"),
    ],
)
def test_what_predict_refuses(xs, message):
    with pytest.raises(InvalidArgument, match=message):
        _codec.predict_request(SUM, xs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"emit": "first"}, 'emit: expected "all" or "last"'),
        ({"priority": "urgent"}, 'priority: expected "high", "normal" or "low"'),
        ({"states": {"h": np.zeros((1, 1, 1))}}, "no state 'h': it has state.0.h"),
        ({"states": {"state.0.h": np.zeros((1, 1))}}, r"state.0.h: expected shape \[sequences, 1, 1\]"),
    ],
)
def test_options_that_predict_refuses(options, message):
    with pytest.raises(InvalidArgument, match=message):
        _codec.predict_request(SUM, [np.zeros((1, 1))], **options)


def test_a_model_of_several_inputs_wants_names():
    with pytest.raises(InvalidArgument, match="takes several inputs: give a dict of x, token, context, scale"):
        _codec.predict_request(PAIR, [np.zeros((1, 2))])
    with pytest.raises(InvalidArgument, match="every input must have as many steps: x has 2, token has 3"):
        _codec.chunk_of(PAIR, {"x": np.zeros((2, 2)), "token": [1, 2, 3]})


def test_integers_keep_their_value():
    ids = TensorInfo("t", "int32", (), "per_step")
    np.testing.assert_array_equal(_codec.cast(np.array([1, 2], np.uint8), ids, "t"), np.array([1, 2], np.int32))
    with pytest.raises(InvalidArgument, match="a value of int64 does not fit into int32"):
        _codec.cast(np.array([2**31]), ids, "t")
    with pytest.raises(InvalidArgument, match="expected int32, got float64"):
        _codec.cast(np.array([1.0]), ids, "t")


def test_a_step_and_a_chunk_are_told_apart_by_their_axes():
    assert _codec.step_or_chunk_of(SUM, [1.0])["x"].tolist() == [[1.0]]
    assert _codec.step_or_chunk_of(SUM, [[1.0], [2.0]])["x"].tolist() == [[1.0], [2.0]]
    with pytest.raises(InvalidArgument, match=r"expected one step of shape \[1\], got \[2\]"):
        _codec.step_or_chunk_of(SUM, [1.0, 2.0])
    with pytest.raises(InvalidArgument, match="expected at least one step"):
        _codec.chunk_of(SUM, np.zeros((0, 1)))
    with pytest.raises(InvalidArgument, match=r"expected one step of shape \[1\], got \[1, 1\]"):
        _codec.step_of(SUM, [[1.0]])


# ---- arrays in -------------------------------------------------------------------------------------------------------


@given(lengths_strategy)
def test_prediction_cuts_outputs_by_sequence(lengths):
    rows = np.arange(sum(lengths), dtype=np.float32)[:, None]
    state = np.zeros((len(lengths), 1, 1), np.float32)
    tensors = [_codec.tensor("y", rows, "per_step", lengths), _codec.tensor("state.0.h", state, "per_sequence")]
    found = _codec.prediction(SUM, pb.PredictResponse(version=3, digest="d", outputs=tensors), lengths, "all")
    assert [len(y) for y in found] == lengths
    np.testing.assert_array_equal(np.concatenate(list(found)), rows)
    np.testing.assert_array_equal(found.states["state.0.h"], state)
    assert (found.version, found.digest, len(found)) == (3, "d", len(lengths))
    assert found[0] is found.outputs["y"][0]


def test_prediction_of_last_steps_is_a_row_a_sequence():
    rows = np.array([[1], [2]], np.float32)
    response = pb.PredictResponse(outputs=[_codec.tensor("y", rows, "per_sequence")])
    assert [y.tolist() for y in _codec.prediction(SUM, response, [4, 9], "last")] == [[1], [2]]


def test_what_an_answer_leaves_out_is_as_the_model_declares():
    bare = pb.Tensor(name="y", data=np.array([1, 2, 3], "<f4").tobytes())
    response = pb.PredictResponse(outputs=[bare])
    assert [y.tolist() for y in _codec.prediction(SUM, response, [1, 2], "all")] == [[[1]], [[2], [3]]]


@pytest.mark.parametrize(
    "tensor",
    [
        pb.Tensor(name="y", data=b"123"),
        pb.Tensor(name="y", shape=[2, 1], data=bytes(4)),
        pb.Tensor(name="y", shape=[3, 1], data=bytes(12)),
        pb.Tensor(name="y", shape=[2, 1], lengths=[3], data=bytes(8)),
        pb.Tensor(name="y", dtype=99, shape=[2, 1], layout=99, lengths=[2], data=bytes(8)),
        pb.Tensor(name="other", data=bytes(8)),
    ],
)
def test_an_answer_that_does_not_fit_breaks_the_protocol(tensor):
    with pytest.raises(ProtocolError):
        _codec.prediction(SUM, pb.PredictResponse(outputs=[tensor]), [1, 1], "all")


def test_entries_of_an_answer():
    info = replace(SUM, outputs=(*SUM.outputs, TensorInfo("z", "int64", (), "per_sequence")))
    rows = _codec.tensor("y", np.arange(3, dtype=np.float32)[:, None], "per_step")
    finals = _codec.tensor("z", np.array([7, 8]), "per_sequence")
    answer = pb.StreamAnswer(handles=[4, 2], positions=[10, 20], lengths=[1, 2], tensors=[rows, finals])
    first, second = read_entries(info, answer)
    assert (first.handle, first.position, first.per_step["y"].tolist(), first.rest["z"]) == (4, 10, [[0]], 7)
    assert (second.handle, second.position, second.per_step["y"].tolist(), second.rest["z"]) == (2, 20, [[1], [2]], 8)
    answer.lengths[1] = 3
    with pytest.raises(ProtocolError, match="not 4 rows"):
        list(read_entries(info, answer))
    del answer.positions[1]
    with pytest.raises(ProtocolError, match="2 handles, 1 positions"):
        list(read_entries(info, answer))


# ---- errors ----------------------------------------------------------------------------------------------------------


def detailed_status() -> status_pb2.Status:
    status = status_pb2.Status(code=8, message="full")
    info = error_details_pb2.ErrorInfo(reason="OVERLOADED", domain="rnnserve", metadata={"limit": "7"})
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="inputs[0]", description="too long")
    for detail in (info, bad, error_details_pb2.RetryInfo(retry_delay=Duration(nanos=250_000_000))):
        status.details.add().Pack(detail)
    return status


def test_a_failed_call_carries_its_details():
    trailers = [("x", "y"), ("grpc-status-details-bin", detailed_status().SerializeToString())]
    error = from_rpc("RESOURCE_EXHAUSTED", "full", trailers)
    assert isinstance(error, ResourceExhausted)
    assert (str(error), error.code, error.reason, error.retry_after_s) == (
        "full",
        "RESOURCE_EXHAUSTED",
        "OVERLOADED",
        0.25,
    )
    assert error.violations == (FieldViolation("inputs[0]", "too long"),)
    assert error.metadata == {"limit": "7"}


@pytest.mark.parametrize("junk", [b"\xff\xff\xff", b"", detailed_status().SerializeToString()])
def test_details_that_do_not_belong_are_ignored(junk):
    error = from_rpc("NOT_FOUND", "gone", [("grpc-status-details-bin", junk)])
    assert isinstance(error, NotFound)
    assert (str(error), error.reason, error.violations) == ("gone", "", ())


@pytest.mark.parametrize(
    ("code", "cls"),
    [("OUT_OF_RANGE", InvalidArgument), ("UNIMPLEMENTED", ServerError), ("DATA_LOSS", ServerError), ("X", ServerError)],
)
def test_every_code_has_a_class(code, cls):
    error = from_rpc(code, "", None)
    assert type(error) is cls
    assert (error.code, str(error)) == (code, code)


def test_step_errors_keep_place_and_cause():
    message = pb.StepError(
        handle=3,
        position=5,
        length=2,
        expected_position=5,
        status=detailed_status(),
        kind=pb.STEP_ERROR_KIND_STEP_REJECTED,
    )
    error = step_error(message)
    assert isinstance(error, StepRejected)
    assert (error.handle, error.position, error.length, error.expected_position) == (3, 5, 2, 5)
    assert (error.code, error.reason, error.retry_after_s) == ("RESOURCE_EXHAUSTED", "OVERLOADED", 0.25)
    message.kind = pb.STEP_ERROR_KIND_SESSION_FAILED
    assert isinstance(step_error(message), SessionFailed)


@pytest.mark.parametrize(
    ("code", "message", "is_loss"),
    [
        ("UNAVAILABLE", "Socket closed", True),
        ("CANCELLED", "", True),
        ("INTERNAL", "Received RST_STREAM with error code 2", True),
        ("INTERNAL", "a bug", False),
        ("INVALID_ARGUMENT", "RST_STREAM", False),
    ],
)
def test_lost_connections_are_told_from_faults(code, message, is_loss):
    assert is_connection_loss(error_for(code, message)) is is_loss


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "address"),
    [
        ("localhost", "localhost:8001"),
        ("10.0.0.1:9", "10.0.0.1:9"),
        ("[::1]", "[::1]:8001"),
        ("[::1]:9", "[::1]:9"),
        ("unix:/run/x", "unix:/run/x"),
        ("dns:///host:9", "dns:///host:9"),
    ],
)
def test_targets_have_a_default_port(target, address):
    assert ChannelSettings(target=target).address == address


def test_given_options_win_and_certificates_turn_tls_on():
    settings = ChannelSettings(options=[("grpc.keepalive_time_ms", 7)], root_certificates=b"x")
    options = settings.channel_options()
    assert [value for name, value in options if name == "grpc.keepalive_time_ms"] == [7]
    assert settings.is_secure
    assert not ChannelSettings().is_secure
    with pytest.raises(InvalidArgument, match="go together"):
        ChannelSettings(client_key=b"x")


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"step_mode": "fast"}, "step_mode: expected one of stepping, chunked"),
        ({"resume_only": True}, "resume_only needs a session_id"),
        ({"priority": "urgent"}, 'priority: expected "high", "normal" or "low", got \'urgent\''),
        ({"linger_s": -1}, "linger_s: expected at least 0, got -1"),
        ({"replay_window": -1}, "replay_window: expected at least 0"),
    ],
)
def test_terms_that_cannot_be(terms, message):
    with pytest.raises(InvalidArgument, match=message):
        SequenceTerms(**terms)


def test_a_stream_with_initial_states_opens_its_session_by_a_frame():
    terms = SequenceTerms(states={"state.0.h": [[2.0]]}, session_id="s")
    opening, frame = terms.open_requests(SUM)
    assert not opening.open.sessions
    assert [session.session_id for session in frame.frame.opens] == ["s"]
    assert np.frombuffer(frame.frame.tensors[0].data, "<f4").tolist() == [2.0]
    [again] = terms.open_requests(SUM, resume_version=3)
    assert again.open.sessions[0].resume_only
    with pytest.raises(InvalidArgument, match=r"expected shape \[1, 1\], got \[1\]"):
        SequenceTerms(states={"state.0.h": [2.0]}).open_requests(SUM)
