"""Whole sequences over ModelInfer: padded and packed, raw and typed, with states that the client keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.lanes import equal
from tests.oip.calls import array, refused, request, stub_of
from tests.oip.mixed import save_mixed
from tests.rpc import code_of, details, field_of, run_alone, sequences
from tests.serving import serving


def padded(xs: list[np.ndarray], value: float = 0.0) -> np.ndarray:
    """[sequences, longest, ...], filled up with a value."""
    out = np.full((len(xs), max(map(len, xs)), *xs[0].shape[1:]), value, dtype=xs[0].dtype)
    for row, x in zip(out, xs, strict=True):
        row[: len(x)] = x
    return out


@pytest.mark.parametrize("model", ["lstm", "bilstm"])
def test_padded_batch_equals_each_sequence_alone(stub, repository: Path, model: str) -> None:
    xs = sequences(3, 5, 1, 40)
    lengths = np.array([len(x) for x in xs], dtype=np.int32)
    response = stub.ModelInfer(request(model, {"x": padded(xs, np.nan), "lengths": lengths}, request_id="a7"))
    assert (response.model_name, response.model_version, response.id) == (model, "1", "a7")
    assert response.outputs[0].datatype == "FP32"
    expected = padded([run_alone(repository, model, x) for x in xs])
    equal(array(response), expected)


@pytest.mark.parametrize("lengths_shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_packed_rows_are_answered_packed(stub, repository: Path, dtype: str, lengths_shape: tuple[int, ...]) -> None:
    xs = sequences(4, 4, 1, 30)
    lengths = np.array([len(x) for x in xs], dtype=dtype).reshape(lengths_shape)
    response = stub.ModelInfer(request("lstm", {"lengths": lengths, "x": np.concatenate(xs)}))
    equal(array(response), np.concatenate([run_alone(repository, "lstm", x) for x in xs]))


def test_without_lengths_every_step_is_real(stub, repository: Path) -> None:
    [x] = sequences(5, 1, 9, 9)
    equal(array(stub.ModelInfer(request("lstm", np.stack([x, x])))), np.stack([run_alone(repository, "lstm", x)] * 2))
    equal(array(stub.ModelInfer(request("lstm", x))), run_alone(repository, "lstm", x))


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_one_answer_a_sequence_has_no_time(stub, repository: Path, form: str) -> None:
    xs = sequences(6, 3, 4, 9)
    lengths = np.array([len(x) for x in xs], dtype=np.int32)
    x = padded(xs) if form == "padded" else np.concatenate(xs)
    equal(
        array(stub.ModelInfer(request("bigru", {"x": x, "lengths": lengths}))),
        np.stack([run_alone(repository, "bigru", x) for x in xs]),
    )


def test_typed_contents_give_the_same(stub) -> None:
    xs = sequences(7, 3, 5, 5)
    lengths = np.array([5, 2, 4], dtype=np.int32)
    given = {"x": np.stack(xs), "lengths": lengths}
    typed, raw = (stub.ModelInfer(request("gru", given, is_typed=is_typed)) for is_typed in (True, False))
    assert typed == raw


def test_tokens_in_both_contents(stub, repository: Path) -> None:
    ids = np.array([[1, 5, 10, 0]])
    expected = run_alone(repository, "tokens", ids[0])[None]
    for is_typed in (True, False):
        equal(array(stub.ModelInfer(request("tokens", ids, is_typed=is_typed))), expected)


def test_versions_are_asked_for_by_number(stub, repository: Path) -> None:
    [x] = sequences(8, 1, 6, 6)
    newest = stub.ModelInfer(request("gru", x[None]))
    first = stub.ModelInfer(request("gru", x[None], version="1"))
    assert (newest.model_version, first.model_version) == ("2", "1")
    equal(array(newest)[0], run_alone(repository, "gru", x, version=2))
    equal(array(first)[0], run_alone(repository, "gru", x, version=1))


def test_client_that_keeps_states_itself_gets_the_same(stub, repository: Path) -> None:
    [x] = sequences(9, 1, 20, 20)
    wanted = ("y", "state.0.c.next", "state.0.h.next")
    first = stub.ModelInfer(request("lstm", x[None, :13], outputs=wanted))
    states = {name.removesuffix(".next"): array(first, name) for name in wanted[1:]}
    assert [tensor.name for tensor in first.outputs] == list(wanted)
    assert states["state.0.h"].shape == (1, 1, 8)
    second = stub.ModelInfer(request("lstm", {"x": x[None, 13:], **states}))
    whole = np.concatenate([array(first)[0], array(second)[0]])
    equal(whole, run_alone(repository, "lstm", x))
    alone = stub.ModelInfer(request("lstm", x[None, :13], outputs=["state.0.h.next"]))
    equal(array(alone, "state.0.h.next"), states["state.0.h"])


def test_final_response_is_marked_where_asked(stub) -> None:
    [x] = sequences(1, 1, 3, 3)
    plain = stub.ModelInfer(request("lstm", x[None]))
    marked = stub.ModelInfer(request("lstm", x[None], triton_enable_empty_final_response=True))
    assert not plain.parameters
    assert marked.parameters["triton_final_response"].bool_param
    assert marked.raw_output_contents == plain.raw_output_contents


def test_every_dtype_goes_in_and_out(tmp_path: Path) -> None:
    save_mixed(tmp_path, "mixed")
    given = {
        "double": np.array([[[1.5, -2.5], [1e-300, 0.0]]]),
        "whole": np.array([[7, -(2**31)]], dtype=np.int32),
        "flags": np.array([[[True, False], [False, False]]]),
        "long": np.array([[2**62, -1]]),
    }
    with serving(tmp_path) as served, stub_of(served) as stub:
        for is_typed in (False, True):
            response = stub.ModelInfer(request("mixed", given, is_typed=is_typed))
            for name, values in given.items():
                equal(array(response, f"{name}.same"), values)
        message = request("mixed", given)
        message.raw_input_contents[2] = b"\0\1\2\0"
        error = refused(stub.ModelInfer, message)
        assert code_of(details(error)) == "INVALID_ARGUMENT"
        assert "bool at element 2: expected a byte 0 or 1, got 2" in error.details()


X = np.zeros((2, 4, 3), dtype=np.float32)


@pytest.mark.parametrize(
    ("given", "field", "words"),
    [
        ({}, "inputs", "input x is missing"),
        ({"z": X}, "inputs[0].name", "takes x, lengths, state.0.h, state.0.c"),
        ({"x": X.astype(np.float64)}, "inputs[0].datatype", "x is FP32, got FP64; convert it"),
        ({"x": X[..., :2]}, "inputs[0].shape", "expected [sequences, time, 3] or [steps, 3], got shape [2, 4, 2]"),
        ({"x": X[:, :0]}, "inputs[0].shape", "no steps"),
        ({"x": X[None]}, "inputs[0].shape", "got shape [1, 2, 4, 3]"),
        ({"x": X, "lengths": np.array([4, 5], np.int32)}, "lengths", "lengths lie in 1..4, the axis of time"),
        ({"x": X, "lengths": np.array([4, 0], np.int32)}, "lengths", "lengths lie in 1..4"),
        ({"x": X, "lengths": np.array([4], np.int32)}, "lengths", "1 lengths for 2 sequences"),
        ({"x": X[0], "lengths": np.array([3], np.int32)}, "lengths", "sum to 4 rows"),
        ({"x": X, "lengths": np.array([4.0, 4.0], np.float32)}, "inputs[1].datatype", "INT32 or INT64"),
        ({"x": X, "lengths": np.array([[4, 4]], np.int32)}, "inputs[1].shape", "[sequences, 1]"),
        ({"x": X, "state.0.h": np.zeros((1, 1, 8), np.float32)}, "state.0.h", "1 rows for 2 sequences"),
        ({"x": X, "state.0.h": np.zeros((2, 8), np.float32)}, "inputs[1].shape", "each row is [1, 8]"),
        ({"x": X, "state.0.h": np.full((2, 1, 8), np.inf, np.float32)}, "inputs[1]", "not finite"),
        ({"x": X + np.float32(np.nan)}, "x", "sequence 0: x: element 0 of step 0 is nan"),
    ],
)
def test_wrong_tensors_are_refused(stub, given: dict[str, np.ndarray], field: str, words: str) -> None:
    error = refused(stub.ModelInfer, request("lstm", given))
    assert code_of(details(error)) == "INVALID_ARGUMENT"
    assert field_of(details(error)) == field
    assert words in error.details()


def test_wrong_contents_are_refused(stub) -> None:
    message = request("lstm", X)
    message.inputs[0].contents.fp32_contents.append(1.0)
    assert "contents beside raw_input_contents" in refused(stub.ModelInfer, message).details()
    del message.raw_input_contents[:]
    assert "expected 24 elements in fp32_contents, got 1" in refused(stub.ModelInfer, message).details()
    message = request("lstm", X)
    message.raw_input_contents.append(b"")
    assert "2 entries for 1 inputs" in refused(stub.ModelInfer, message).details()
    message = request("lstm", X)
    message.raw_input_contents[0] = bytes(95)
    assert "expected 96 bytes, got 95" in refused(stub.ModelInfer, message).details()
    message = request("lstm", X, is_typed=True)
    message.inputs[0].datatype = "BYTES"
    assert "datatype 'BYTES': expected FP32" in refused(stub.ModelInfer, message).details()
    message = request("lstm", X)
    message.inputs.append(message.inputs[0])
    message.raw_input_contents.append(message.raw_input_contents[0])
    assert "x is given twice" in refused(stub.ModelInfer, message).details()


def test_wrong_outputs_are_refused(stub) -> None:
    error = refused(stub.ModelInfer, request("lstm", X, outputs=["z"]))
    assert code_of(details(error)) == "INVALID_ARGUMENT"
    assert "no output 'z'; lstm has y, state.0.h.next, state.0.c.next" in error.details()
    assert "named twice" in refused(stub.ModelInfer, request("lstm", X, outputs=["y", "y"])).details()


@pytest.mark.parametrize("name", ["shared_memory_region", "classification"])
def test_parameters_that_would_change_the_answer_are_refused(stub, name: str) -> None:
    message = request("lstm", X, outputs=["y"])
    message.outputs[0].parameters[name].int64_param = 1
    error = refused(stub.ModelInfer, message)
    assert code_of(details(error)) == "UNIMPLEMENTED"
    assert f"{name} is not supported" in error.details()


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"priority": 4}, "priority 4 is unknown: it is high (1), normal (2) or low (3)"),
        ({"timeout": -1}, "timeout -1: expected microseconds"),
        ({"timeout": "soon"}, "parameter timeout: expected int64_param or uint64_param, got string_param"),
        ({"sequence_start": True}, "need a sequence_id"),
        ({"sequence_id": -3}, "sequence_id -3 is negative"),
        ({"sequence_id": "n" * 257}, "at most 256 bytes"),
    ],
)
def test_wrong_parameters_are_refused(stub, parameters: dict[str, object], words: str) -> None:
    error = refused(stub.ModelInfer, request("lstm", X, **parameters))
    assert code_of(details(error)) == "INVALID_ARGUMENT"
    assert words in error.details()


def test_unknown_models_are_named(stub) -> None:
    error = refused(stub.ModelInfer, request("nope", X))
    assert code_of(details(error)) == "NOT_FOUND"
    assert "served: bigru, bilstm" in error.details()
    assert "has no version 9; served: 1, 2" in refused(stub.ModelInfer, request("gru", X, version="9")).details()
    assert "expected a number" in refused(stub.ModelInfer, request("gru", X, version="x")).details()


def test_more_steps_than_the_limit(repository: Path) -> None:
    with serving(repository, max_steps_per_message=7) as served, stub_of(served) as stub:
        error = refused(stub.ModelInfer, request("lstm", X))
        assert code_of(details(error)) == "RESOURCE_EXHAUSTED"
        assert "8 steps in one request, the limit (max_steps_per_message) is 7" in error.details()


def test_timeout_ends_what_takes_too_long(stub) -> None:
    x = np.zeros((256, 256, 3), dtype=np.float32)
    error = refused(stub.ModelInfer, request("lstm", x, timeout=1))
    assert code_of(details(error)) == "DEADLINE_EXCEEDED"
