"""One ModelStreamInfer call: requests are answered in their order, once each, or in parts by a model that generates."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Any

import grpc.aio
from google.protobuf.message import DecodeError

from service.config import Settings
from service.errors import InvalidInput
from service.facts import current
from service.pb.inference import inference_pb2 as pb
from service.rpc.oip.desk import Desk
from service.rpc.oip.inference import Inference
from service.rpc.oip.repeat import StepReader
from service.rpc.oip.tensors import failed_on_stream, on_stream

log = logging.getLogger(__name__)


class InferStream:
    """Holds the requests of one call, and the answers that wait to be written."""

    def __init__(self, desk: Desk, settings: Settings) -> None:
        self._desk = desk
        self._settings = settings
        self._reader = StepReader(desk.patterns)
        self._line: deque[Inference] = deque()
        self._num_line_bytes = 0
        self._num_line_steps = 0
        self._num_steps = 0  # of all, and
        self._num_failed_steps = 0
        self._is_finishing = False
        self._wakeup: asyncio.Future[None] | None = None
        self._has_written = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Whether there is something to write."""
        return bool(self._line) and self._line[0].is_ready

    def take(self, raw: bytes) -> None:
        """Take one request. Raises InvalidInput where it is none."""
        inference = Inference(self._on_done, takes_parts=True)
        repeat = self._reader.read(raw)
        if repeat is not None:
            meaning, inference.id, rows = repeat
            self._line.append(inference)
            self._desk.repeat(meaning, rows, inference)
        else:
            try:
                request = pb.ModelInferRequest.FromString(raw)
            except DecodeError as error:
                raise InvalidInput(f"a message of the stream is no ModelInferRequest: {error}") from error
            inference.id = request.id.encode()
            self._line.append(inference)
            if (learned := self._desk.submit(request, inference)) is not None:
                self._reader.learn(raw, request, learned)
        self._num_line_bytes += inference.num_bytes
        self._num_line_steps += inference.num_steps
        self._num_steps += inference.num_steps

    def finish(self) -> None:
        """The client has sent all."""
        self._is_finishing = True
        self._wake()

    def drop(self) -> None:
        """The call is over: whole sequences that nobody waits for are given up; live ones go on."""
        for inference in self._line:
            inference.cancel()
        facts = current()
        facts.steps_in += self._num_steps
        facts.steps_out += self._num_steps - self._num_failed_steps - self._num_line_steps

    @property
    def wants_room(self) -> bool:
        """Whether so much is unanswered or unread that the client is to be read from no more for now."""
        return (
            self._num_line_bytes > self._settings.max_unsent_bytes
            or self._num_line_steps > self._settings.max_inflight_steps // 2
        )

    async def has_room(self) -> None:
        """Wait until that is over, or the client is gone."""
        while self.wants_room and self._line:
            self._has_written.clear()
            await self._has_written.wait()

    async def write_to(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Write answers as they come, until the client has sent all and has every answer, or is gone."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                while self.is_ready:
                    await context.write(self.pop())
                    self._has_written.set()
                if self._is_finishing and not self._line:
                    return
                self._wakeup = loop.create_future()
                await self._wakeup
        except grpc.aio.InternalError:  # a message can't be written any more: the connection broke
            log.debug("a client is gone")
        finally:
            self._has_written.set()

    def pop(self) -> bytes:
        """Take the first answer that waits, or the next part of it, as it is to be written."""
        if self._line[0].parts:
            return on_stream(self._line[0].pop_part())
        inference = self._line.popleft()
        self._num_line_bytes -= inference.num_bytes
        self._num_line_steps -= inference.num_steps
        if inference.response is not None:
            return on_stream(inference.response)
        self._num_failed_steps += inference.num_steps
        return failed_on_stream(inference.id, str(inference.error))

    def _on_done(self, inference: Inference) -> None:
        if inference is self._line[0]:
            self._wake()

    def _wake(self) -> None:
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)
