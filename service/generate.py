"""Generating: a source is encoded, then every output is decoded, over the engine.

Every live sequence's next step is work for its lane's scheduler, beside those of all other calls: one continuous batch.
An encoder is a lane of its own, whose sequences are those of a Predict call.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
import numpy.typing as npt

from models.spec import Layout
from service.decoding import Beams, Chain, Decoding, Unrolling
from service.engine import Engine
from service.facts import current
from service.generation import Made, Request
from service.lane import Lane
from service.predict import Sequences
from service.tally import Tally

Array = npt.NDArray[Any]


async def generate(engine: Engine, lane: Lane, request: Request) -> AsyncGenerator[Made, None]:
    """Make outputs; what is ready together comes together. Closing the iterator frees all that the call holds.

    Raises Unavailable, Exhausted, BadValue for a source, and what a run fails with.
    """
    engine.check_open()
    facts = current()
    facts.num_sequences += request.num
    began_at = engine.clock()
    meter = _Meter(lane.tally, request.num, began_at)
    with engine.holding(lane):  # between its encoder and its decoder nothing else tells that it is used
        states, constants = await _begin(engine, lane, request)
        with lane.tally.refusals():
            decoding = _decoding(lane, request, states, constants)
        with engine.queued(lane, decoding):
            while (made := await decoding.take()) is not None:
                now = engine.clock()
                meter.take(made, now)
                if not facts.steps_out:
                    facts.note("first output", seconds=now - began_at)
                facts.steps_out += sum(made.lengths)
                yield made
                decoding.resume()
                engine.wake()


class _Meter:
    """Counts what one call makes, and how long its sequences take."""

    def __init__(self, tally: Tally, num: int, now: float) -> None:
        self._tally = tally
        self._began_at = now
        self._last_at = [0.0] * num
        """When each sequence had its last output; 0: it has none yet."""

    def take(self, made: Made, now: float) -> None:
        """Count outputs that are handed to the caller."""
        tally, last_at, num_outputs = self._tally, self._last_at, sum(made.lengths)
        tally.outputs += num_outputs
        times = [last_at[sequence] for sequence in made.sequences]
        if num_outputs == len(times) and 0.0 not in times:  # mostly: one more of each
            tally.next_outputs.observe_since(sorted(times), now)
        else:
            for last, length in dict(zip(made.sequences, zip(times, made.lengths, strict=True), strict=True)).values():
                if last:
                    tally.next_outputs.observe((now - last) / length, length)
                else:
                    tally.first_outputs.observe(now - self._began_at)
        for sequence in made.sequences:
            last_at[sequence] = now
        if made.ends:
            tally.request_durations.observe(now - self._began_at, len({end.sequence for end in made.ends}))


async def _begin(engine: Engine, lane: Lane, request: Request) -> tuple[list[Array | None], list[list[Array] | Array]]:
    """Have sources encoded. Returns (initial states, what each sequence is given once, for each such input)."""
    given: dict[str, list[Array] | Array] = dict(request.contexts)
    states = list(request.states)
    if lane.encoder is not None and request.source_lengths is not None:
        outputs = lane.encoder.graph.outputs
        wanted = {s.initial for s in lane.graph.states} | {t.name for t in lane.graph.inputs}
        indexes = [index for index, tensor in enumerate(outputs) if tensor.name in wanted]
        encoded = await engine.predict(
            lane.encoder,
            Sequences(
                inputs=request.sources,
                lengths=request.source_lengths,
                states=[None] * len(lane.encoder.graph.states),
                outputs=indexes,
                priority=request.priority,
            ),
        )
        ends = np.cumsum(request.source_lengths)[:-1]
        by_name: dict[str, list[Array] | Array] = {}
        for index, values in zip(indexes, encoded.outputs, strict=True):
            is_packed = outputs[index].layout is Layout.PER_STEP
            by_name[outputs[index].name] = np.split(values, ends) if is_packed else values
        given |= by_name
        states = [
            np.asarray(by_name[spec.initial]) if spec.initial else rows
            for spec, rows in zip(lane.graph.states, states, strict=True)
        ]
    return states, [given[tensor.name] for tensor in (lane.constants.tensors if lane.constants else ())]


def _decoding(
    lane: Lane, request: Request, states: list[Array | None], constants: list[list[Array] | Array]
) -> Decoding:
    generation = lane.backend.spec.generation
    assert generation is not None  # noqa: S101  the caller has checked that it generates
    kind = Unrolling if not generation.token_input else Beams if request.beams > 1 else Chain
    return kind(lane, generation, request, states, constants)
