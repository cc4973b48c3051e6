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
from service.generation import Made, Request
from service.lane import Lane
from service.predict import Sequences

Array = npt.NDArray[Any]


async def generate(engine: Engine, lane: Lane, request: Request) -> AsyncGenerator[Made, None]:
    """Make outputs; what is ready together comes together. Closing the iterator frees all that the call holds.

    Raises Unavailable, Exhausted, BadValue for a source, and what a run fails with.
    """
    engine.check_open(lane)
    states, constants = await _begin(engine, lane, request)
    decoding = _decoding(lane, request, states, constants)
    with engine.queued(lane, decoding):
        while (made := await decoding.take()) is not None:
            yield made
            decoding.resume()
            engine.wake()


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
