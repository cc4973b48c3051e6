"""One request of the Open Inference Protocol under way, and the counts of those that were.

A request is answered once, or fails once. Whoever waits for it is told then, which may be before the call that began it
returns.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from service.errors import ServiceError
from service.events import Answer
from service.pb.inference import inference_pb2 as pb
from service.predict import Prediction
from service.rpc.codec import row_bytes_of
from service.rpc.oip.tensors import Given, InferPlan

Array = npt.NDArray[Any]
MAX_PARTS = 16
"""Most parts of an answer that wait to be taken."""
OVERHEAD_BYTES = 256
"""What a response takes beside its elements, roughly."""


class Counts:
    """What requests for one model version have come to. Times are seconds."""

    def __init__(self, plan: InferPlan) -> None:
        self._tally = plan.lane.tally
        self._num_successes = self._num_failures = self._num_inferences = self._num_executions = 0
        self._total_s = self._failed_s = self._input_s = self._compute_s = self._output_s = 0.0
        self._last_at = 0.0
        self._num_seen_runs = 0  # of the tally, up to which executions have been counted

    def succeed(self, inference: Inference, num: int, answered_at: float) -> None:
        """Count a request that was answered with `num` inferences and is written by now."""
        tally, now = self._tally, time.perf_counter()
        self._num_successes += 1
        self._num_inferences += num
        self._num_executions += tally.runs - max(inference.num_runs_before, self._num_seen_runs)
        self._num_seen_runs = tally.runs
        self._total_s += now - inference.began_at
        self._input_s += inference.queued_at - inference.began_at
        self._compute_s += min(tally.run_seconds - inference.run_seconds_before, answered_at - inference.queued_at)
        self._output_s += now - answered_at
        self._last_at = time.time()

    def fail(self, inference: Inference) -> None:
        """Count a request that failed."""
        self._num_failures += 1
        self._failed_s += time.perf_counter() - inference.began_at

    def fill(self, message: pb.ModelStatistics) -> None:
        """Write them into a message."""
        message.last_inference = int(self._last_at * 1000)
        message.inference_count = self._num_inferences
        message.execution_count = self._num_executions
        stats, done = message.inference_stats, self._num_successes
        queue_s = max(0.0, self._total_s - self._input_s - self._compute_s - self._output_s)
        for duration, count, seconds in (
            (stats.success, done, self._total_s),
            (stats.fail, self._num_failures, self._failed_s),
            (stats.queue, done, queue_s),
            (stats.compute_input, done, self._input_s),
            (stats.compute_infer, done, self._compute_s),
            (stats.compute_output, done, self._output_s),
        ):
            duration.count = count
            duration.ns = int(seconds * 1e9)

    @property
    def runs(self) -> tuple[int, float]:
        """Runs of the model so far, and their seconds."""
        return self._tally.runs, self._tally.run_seconds


class Inference:
    """A request under way."""

    __slots__ = (
        "_counts",
        "_given",
        "_has_room",
        "_num_left",
        "_on_done",
        "_outputs",
        "_parts",
        "_wants_final",
        "began_at",
        "ends",
        "error",
        "id",
        "num_bytes",
        "num_runs_before",
        "num_steps",
        "parts",
        "plan",
        "position",
        "queued_at",
        "response",
        "run_seconds_before",
        "takes_parts",
        "task",
    )

    def __init__(self, on_done: Callable[[Inference], None], *, takes_parts: bool = False) -> None:
        """Begin to read it.

        on_done      is told once it is answered or has failed, and of every part
        takes_parts  whether an answer that is made in parts is wanted so
        """
        self.began_at = self.queued_at = time.perf_counter()
        self.id = b""
        """What the request calls itself."""
        self._on_done = on_done
        self.response: bytes | None = None
        """The ModelInferResponse, or the last of several, once it is answered."""
        self.takes_parts = takes_parts
        self.parts: deque[bytes] | None = None
        """Those before the last that wait to be taken, of an answer in parts."""
        self.error: ServiceError | None = None
        """Why it failed, once it has."""
        self.task: asyncio.Task[None] | None = None
        """What computes it, of whole sequences."""
        self.num_steps = 0
        """Steps of a sequence that it is made of."""
        self.num_bytes = OVERHEAD_BYTES
        """What it and its answer take, roughly."""
        self._counts: Counts | None = None

    @property
    def is_done(self) -> bool:
        """Whether it was answered, or has failed."""
        return self.response is not None or self.error is not None

    @property
    def is_ready(self) -> bool:
        """Whether there is something to write."""
        return self.response is not None or self.error is not None or bool(self.parts)

    def begin(self, plan: InferPlan, counts: Counts, outputs: list[int], *, wants_final: bool) -> None:
        """Learn for which model it is, and which outputs to answer, by index."""
        self.plan = plan
        self._counts = counts
        self._outputs = outputs
        self._wants_final = wants_final
        self.queued_at = time.perf_counter()
        self.num_runs_before, self.run_seconds_before = counts.runs

    def expect(self, given: Given, position: int, *, ends: bool) -> None:
        """Expect answers to steps of a sequence.

        position  of the first
        ends      whether the sequence ends with them
        """
        self._given = given
        self.position = position
        self.ends = ends
        self.num_steps = self._num_left = given.form.num_steps if given.lengths is None else int(given.lengths[0])
        self.num_bytes += given.form.num_steps * self.plan.step_bytes
        self._parts: list[Answer] = []

    def take(self, answer: Answer) -> bool:
        """Take the answer to some of its steps. Returns whether that is all of them."""
        self._parts.append(answer)
        self._num_left -= answer.lengths[0]
        return not self._num_left

    def finish(self) -> None:
        """Write the response: the answers to all of its steps are here."""
        answered_at = time.perf_counter()
        parts, form = self._parts, self._given.form
        outputs = []
        for index in self._outputs:
            row = self.plan.outputs[index]
            values = parts[-1].outputs[index]
            if row.is_per_step:
                if len(parts) > 1:
                    values = np.concatenate([part.outputs[index] for part in parts])
                if len(values) < form.num_steps:  # the request was padded
                    values = np.concatenate(
                        [values, np.zeros((form.num_steps - len(values), *row.shape), values.dtype)]
                    )
            outputs.append((index, form.shape(1, row.shape, is_per_step=row.is_per_step), row_bytes_of(values)))
        self.succeed(self.plan.write(self.id, outputs, is_final=self._wants_final), 1, answered_at)

    def answer(self, given: Given, prediction: Prediction) -> None:
        """Write the response to whole sequences."""
        answered_at = time.perf_counter()
        response = self.plan.write_prediction(self.id, given, self._outputs, prediction, is_final=self._wants_final)
        self.succeed(response, given.num_sequences, answered_at)

    async def take_part(self, part: bytes) -> None:
        """Take a part of the answer that is not the last; returns once there is room for the next."""
        if self.parts is None:
            self.parts = deque()
            self._has_room = asyncio.Event()
        self.parts.append(part)
        self._on_done(self)
        if len(self.parts) >= MAX_PARTS:
            self._has_room.clear()
            await self._has_room.wait()

    def pop_part(self) -> bytes:
        """Give away the first part that waits."""
        assert self.parts  # noqa: S101  the caller has looked
        self._has_room.set()
        return self.parts.popleft()

    def succeed(self, response: bytes, num: int, answered_at: float) -> None:
        """Take the answer, or its last part, to `num` sequences or steps."""
        self.response = response
        if self._counts is not None:
            self._counts.succeed(self, num, answered_at)
        self._on_done(self)

    def fail(self, error: ServiceError) -> None:
        """Tell why there will be no answer."""
        self.error = error
        if self._counts is not None:
            self._counts.fail(self)
        self._on_done(self)

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        if self.task is not None:
            self.task.cancel()
