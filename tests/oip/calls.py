"""Requests and answers of the Open Inference Protocol in a few words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import grpc
import numpy as np
import pytest

from service.pb.inference import inference_pb2 as pb
from service.pb.inference import inference_pb2_grpc as pb_grpc
from tests.serving import Served

Rows = np.ndarray
DATATYPES = {"float32": "FP32", "int64": "INT64", "int32": "INT32", "float64": "FP64", "bool": "BOOL"}
CONTENTS = {
    "FP32": "fp32_contents",
    "INT64": "int64_contents",
    "INT32": "int_contents",
    "FP64": "fp64_contents",
    "BOOL": "bool_contents",
}


def parameter(value: bool | int | str) -> pb.InferParameter:
    if isinstance(value, bool):
        return pb.InferParameter(bool_param=value)
    return pb.InferParameter(int64_param=value) if isinstance(value, int) else pb.InferParameter(string_param=value)


def request(
    model: str,
    inputs: dict[str, Rows] | Rows,
    *,
    version: str = "",
    request_id: str = "",
    outputs: Iterable[str] = (),
    is_typed: bool = False,
    **parameters: bool | int | str,
) -> pb.ModelInferRequest:
    """A request with raw or typed contents."""
    message = pb.ModelInferRequest(model_name=model, model_version=version, id=request_id)
    for name, value in parameters.items():
        message.parameters[name].CopyFrom(parameter(value))
    for name, values in (inputs if isinstance(inputs, dict) else {"x": inputs}).items():
        datatype = DATATYPES[values.dtype.name]
        tensor = message.inputs.add(name=name, datatype=datatype, shape=values.shape)
        if is_typed:
            getattr(tensor.contents, CONTENTS[datatype]).extend(values.ravel().tolist())
        else:
            message.raw_input_contents.append(np.ascontiguousarray(values).tobytes())
    for name in outputs:
        message.outputs.add(name=name)
    return message


def step(model: str, sequence_id: int | str, x: Rows, **parameters: bool | int | str) -> pb.ModelInferRequest:
    """Steps x [time, features] of a sequence."""
    return request(model, x[None], sequence_id=sequence_id, **parameters)


def array(response: pb.ModelInferResponse, name: str = "y") -> Rows:
    """An output by its name; every output is raw."""
    assert len(response.raw_output_contents) == len(response.outputs)
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        assert not tensor.HasField("contents")
        if tensor.name == name:
            dtype = {datatype: dtype for dtype, datatype in DATATYPES.items()}[tensor.datatype]
            return np.frombuffer(raw, dtype=dtype).reshape(tuple(tensor.shape))
    raise AssertionError(f"no output {name}")


def refused(call: object, message: pb.ModelInferRequest) -> grpc.RpcError:
    """Make a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call(message)
    return caught.value


@contextmanager
def stub_of(served: Served) -> Iterator[pb_grpc.GRPCInferenceServiceStub]:
    """Calls of the protocol, on a connection of their own."""
    with grpc.insecure_channel(served.address) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel)
