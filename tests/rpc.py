"""Requests and answers of the native API in a few words, and the oracle: onnxruntime on one whole sequence alone."""

from __future__ import annotations

import queue
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc
import numpy as np
import onnxruntime as ort
from google.rpc import code_pb2, error_details_pb2, status_pb2

from service.pb.rnnserve.v1 import rnnserve_pb2 as pb

Rows = np.ndarray


def run_alone(repository: Path, model: str, x: Rows, version: int = 1, output: str = "y") -> Rows:
    """Outputs of one whole sequence, in a batch of one, by onnxruntime itself."""
    session = ort.InferenceSession(repository / model / str(version) / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {"x": x[None], "lengths": np.array([len(x)], dtype=np.int32)}
    for value in session.get_inputs():
        if value.name.startswith("state."):
            feeds[value.name] = np.zeros((1, *value.shape[1:]), dtype=np.float32)
    return session.run([output], feeds)[0][0]


def sequences(seed: int, count: int, low: int, high: int, features: int = 3) -> list[Rows]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, features)).astype(np.float32) for n in rng.integers(low, high + 1, count).tolist()]


def open_stream(model: str, **fields: object) -> pb.StreamPredictRequest:
    return pb.StreamPredictRequest(open=pb.StreamOpen(model=model, **fields))


def frame(*rows: Rows, **fields: object) -> pb.StreamPredictRequest:
    """A frame with the rows of each entry; lengths are filled in."""
    message = pb.StreamFrame(**fields)
    if rows:
        message.tensors.add(data=b"".join(np.ascontiguousarray(r).tobytes() for r in rows))
        message.lengths.extend(len(r) for r in rows)
    return pb.StreamPredictRequest(frame=message)


def predict(stub: object, model: str, xs: list[Rows], **fields: object) -> pb.PredictResponse:
    tensor = pb.Tensor(data=b"".join(x.tobytes() for x in xs), lengths=[len(x) for x in xs])
    return stub.Predict(pb.PredictRequest(model=model, inputs=[tensor], **fields))


def array(tensor: pb.Tensor) -> Rows:
    assert tensor.dtype == pb.DATA_TYPE_FLOAT32
    return np.frombuffer(tensor.data, dtype=np.float32).reshape(tuple(tensor.shape))


class Received:
    """Everything that a stream answered."""

    def __init__(self) -> None:
        self.opened: pb.StreamOpened | None = None
        self.sessions: list[pb.SessionOpened] = []
        self.steps: dict[int, dict[int, Rows]] = defaultdict(dict)
        """By handle and position."""
        self.num_answers = 0
        """Steps answered, those answered twice counted twice."""
        self.closed: dict[int, pb.SessionClosed] = {}
        self.errors: list[pb.StepError] = []
        self.drains: list[pb.StreamDrain] = []

    @classmethod
    def all(cls, responses: Iterable[pb.StreamPredictResponse]) -> Received:
        received = cls()
        received.take_all(responses)
        return received

    def take_all(self, responses: Iterable[pb.StreamPredictResponse]) -> None:
        for response in responses:
            self.take(response)

    def take(self, response: pb.StreamPredictResponse) -> None:
        kind = response.WhichOneof("message")
        if kind == "opened":
            assert self.opened is None
            self.opened = response.opened
            self.sessions.extend(response.opened.sessions)
        elif kind == "drain":
            self.drains.append(response.drain)
        else:
            answer = response.answer
            self.sessions.extend(answer.opened)
            self.errors.extend(answer.errors)
            if answer.handles:
                rows = array(answer.tensors[0])
                at = 0
                for handle, position, length in zip(answer.handles, answer.positions, answer.lengths, strict=True):
                    assert handle not in self.closed, "an answer after the close"
                    for step in range(length):
                        self.steps[handle][position + step] = rows[at + step]
                    self.num_answers += length
                    at += length
                assert at == len(rows)
            for closed in answer.closed:
                assert closed.handle not in self.closed, "closed twice"
                self.closed[closed.handle] = closed

    def rows(self, handle: int) -> Rows:
        """Outputs of a session in the order of positions, which must be complete."""
        steps = self.steps[handle]
        assert sorted(steps) == list(range(len(steps)))
        return np.array([steps[position] for position in range(len(steps))])


class Requests:
    """Requests that a test sends when it likes."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[pb.StreamPredictRequest | None] = queue.SimpleQueue()

    def put(self, request: pb.StreamPredictRequest) -> None:
        self._queue.put(request)

    def close(self) -> None:
        self._queue.put(None)

    def __iter__(self) -> Iterator[pb.StreamPredictRequest]:
        while (request := self._queue.get()) is not None:
            yield request


def details(error: grpc.RpcError) -> status_pb2.Status:
    """The google.rpc.Status that came with an error."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            return status_pb2.Status.FromString(value)
    raise AssertionError(f"no details in {error}")


def code_of(status: status_pb2.Status) -> str:
    return code_pb2.Code.Name(status.code)


def info_of(status: status_pb2.Status) -> error_details_pb2.ErrorInfo:
    return _detail(status, error_details_pb2.ErrorInfo())


def field_of(status: status_pb2.Status) -> str:
    return _detail(status, error_details_pb2.BadRequest()).field_violations[0].field


def retry_of(status: status_pb2.Status) -> float:
    return _detail(status, error_details_pb2.RetryInfo()).retry_delay.ToNanoseconds() / 1e9


def _detail(status: status_pb2.Status, into: object) -> object:
    for packed in status.details:
        if packed.Is(into.DESCRIPTOR):
            packed.Unpack(into)
            return into
    raise AssertionError(f"no {into.DESCRIPTOR.name} in {status}")
