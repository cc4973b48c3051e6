"""SequenceService: the native API on the engine. Streams are in stream.py; here is what answers in one message."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

import grpc
import grpc.aio

from service.engine import Engine
from service.errors import DeadlineExpired, InvalidInput, ServiceError, ShapeMismatch, Unavailable
from service.facts import current
from service.generate import generate
from service.holdings import Broken
from service.lane import Lane
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.pb.rnnserve.v1 import rnnserve_pb2_grpc as pb_grpc
from service.predict import Sequences
from service.rpc.answers import write_prediction
from service.rpc.codec import LanePlan, empty_tensor, lengths_of, model_message
from service.rpc.generation import read_generate, timeout_of, write_made, write_started
from service.rpc.handlers import unary_handlers
from service.rpc.handoff import Handoff, Mover
from service.rpc.requests import Opening, check_driven, priority_of, read_open, read_request
from service.rpc.stream import Stream
from service.rpc.transport import ConnectionAges

log = logging.getLogger(__name__)
_SERVICE = pb.DESCRIPTOR.services_by_name["SequenceService"]
SERVICE_NAME = _SERVICE.full_name
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True)
class _Call:
    """What runs a stream."""

    lane: Lane
    task: asyncio.Task[None]
    error: Unavailable | None = None
    """Why the server ends it, if it does."""


class SequenceServicer(pb_grpc.SequenceServiceServicer):
    """Maps requests to the engine and results to responses."""

    def __init__(
        self,
        engine: Engine,
        broken: Sequence[Broken],
        handoff: Handoff | None = None,
        ages: ConnectionAges | None = None,
    ) -> None:
        self._engine = engine
        self._ages = ages
        self._broken = broken
        self._handoff = handoff
        self._plans: dict[Lane, LanePlan] = {}
        self._calls: dict[Stream, _Call] = {}  # of open streams

    @property
    def streams(self) -> list[Stream]:
        """Open streams."""
        return list(self._calls)

    # ---- as catalog.Streams -----------------------------------------------------------------------------------------

    def announce_unload(self, lane: Lane, grace_s: float) -> None:
        """Tell the streams of a version that it will be gone, after so long if that is finite."""
        for stream, call in self._calls.items():
            if call.lane is lane:
                stream.announce_drain(grace_s)

    def are_open(self, lane: Lane) -> bool:
        """Whether a version has streams."""
        return any(call.lane is lane for call in self._calls.values())

    def end_all(self, lane: Lane, error: Unavailable) -> None:
        """End the streams of a version."""
        for call in self._calls.values():
            if call.lane is lane:
                call.error = error
                call.task.cancel()

    # ---- calls ------------------------------------------------------------------------------------------------------

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """List what is served and what is broken."""
        return pb.ListModelsResponse(
            models=[model_message(lane) for lane in self._engine.lanes],
            broken=[pb.BrokenModel(name=b.name, version=b.version, error=str(b.error)) for b in self._broken],
        )

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Describe one model version."""
        lane = self._engine.lane(request.model, request.version, or_retired=True)
        return pb.GetModelResponse(model=model_message(lane))

    async def Predict(self, request: pb.PredictRequest, context: Context) -> bytes:
        """Run whole sequences. Returns a serialised PredictResponse."""
        facts, lane = current(), self._engine.lane(request.model, request.version)
        facts.serve(lane.name, lane.version)
        plan = self.plan(lane)
        with lane.tally.refusals():
            check_driven(lane)
            outputs = plan.pick_outputs(request.outputs)
            data, num_rows, states = plan.read(request.inputs, "inputs")
            if not num_rows:
                raise InvalidInput(f"no steps: {lane.name} takes {', '.join(plan.inputs)}", field="inputs")
            lengths = lengths_of(request.inputs, plan, num_rows)
            for name, values in states.items():
                if len(values) != len(lengths):
                    raise ShapeMismatch(f"{name} has {len(values)} rows for {len(lengths)} sequences", field="inputs")
            if missing := [name for name in plan.constants if name not in states]:
                raise InvalidInput(f"input {missing[0]} is missing: one row a sequence", field="inputs")
            if request.emit not in pb.Emit.values():
                raise InvalidInput(f"emit {request.emit} is unknown", field="emit")
        facts.steps_in, facts.num_sequences = num_rows, len(lengths)
        prediction = await self._engine.predict(
            lane,
            Sequences(
                inputs=[tensor.rows(rows) for tensor, rows in zip(plan.inputs.values(), data, strict=True)],
                lengths=lengths,
                states=[states.get(name) for name in plan.states],
                outputs=outputs,
                emit_last=request.emit == pb.EMIT_LAST,
                return_state=request.return_state,
                priority=priority_of(request.priority),
                constants=[states[name] for name in plan.constants],
            ),
        )
        facts.steps_out = len(lengths) if request.emit == pb.EMIT_LAST else num_rows
        tensors = []
        for index, values in zip(outputs, prediction.outputs, strict=True):
            is_packed = lane.is_output_per_step[index] and request.emit != pb.EMIT_LAST
            tensor = empty_tensor(plan.output_plans[index], values, lengths if is_packed else None)
            if not is_packed:
                tensor.layout = pb.LAYOUT_PER_SEQUENCE
            tensors.append((tensor, values))
        for state, values in zip(plan.states.values(), prediction.states, strict=False):
            tensors.append((empty_tensor(state, values), values))
        header = pb.PredictResponse(model=lane.name, version=lane.version, digest=lane.backend.digest)
        return write_prediction(header, tensors)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Make outputs one after another, and answer them as they are made."""
        lane = self._engine.lane(request.model, request.version)
        current().serve(lane.name, lane.version)
        plan = self.plan(lane)
        with lane.tally.refusals():
            asked = read_generate(plan, request)
            timeout_s = timeout_of(request)
        clock = asyncio.get_running_loop().time
        ends_at = None if timeout_s is None else clock() + timeout_s
        try:
            async with aclosing(generate(self._engine, lane, asked)) as parts:
                await context.write(write_started(lane, asked))
                while True:
                    try:
                        async with asyncio.timeout_at(ends_at):  # not of writing: no status could be sent after it
                            made = await anext(parts, None)
                    except TimeoutError:
                        made = None
                    if ends_at is not None and clock() >= ends_at:
                        lane.tally.count_rejected(DeadlineExpired.reason)
                        raise DeadlineExpired(f"not all was made within the request's timeout, {timeout_s:g} s")
                    if made is None:
                        return
                    await context.write(write_made(plan, asked, made))
        except grpc.aio.InternalError:  # a message can't be written any more: the connection broke
            log.debug("a client of %s is gone", lane.name)

    async def StreamPredict(self, request: object, context: Context) -> None:
        """Step live sequences until the client has sent all, or is gone."""
        raw = await context.read()
        first = pb.StreamPredictRequest() if raw is grpc.aio.EOF else read_request(raw)
        if first.WhichOneof("message") != "open":
            raise InvalidInput("the first message of a stream must be `open`, naming the model", field="open")
        self._engine.check_open()
        lane = await self._lane_of(first.open)
        with self._engine.holding(lane):
            stream = await self._open(self.plan(lane), first.open)
        call = self._calls[stream] = _Call(lane, cast("asyncio.Task[None]", asyncio.current_task()))
        writer = asyncio.create_task(stream.write_to(context))
        telling = None
        if self._ages is not None and (peer := context.peer()):
            telling = self._ages.call_when_old(peer, stream.announce_drain)
        try:
            await self._read(stream, writer, context)
            await writer
        except ServiceError:  # the status can only be sent once no message is being written
            stream.finish_writing()
            await writer
            raise
        except asyncio.CancelledError:
            if call.error is None:
                raise
            call.task.uncancel()
            stream.finish_writing()
            await writer
            raise call.error from None
        finally:
            del self._calls[stream]
            stream.drop()
            writer.cancel()
            if telling is not None:
                telling.cancel()

    async def _lane_of(self, request: pb.StreamOpen) -> Lane:
        """Find the version of a stream: a retired one, where a session that it opens by name lives only there.

        Raises ModelNotFound.
        """
        engine, model = self._engine, request.model
        names = [session.session_id for session in request.sessions if session.session_id]
        if names and engine.besides(model):
            lanes = [lane for lane in engine.lanes if lane.name == model] + engine.besides(model)
            lanes = [lane for lane in lanes if request.version in (0, lane.version)]
            home = next((lane for lane in lanes if lane.has_any(names)), None)
            if home is None and self._handoff is not None:
                home = await self._handoff.find_home(lanes, names)
            if home is not None and (home in engine.lanes or home in engine.besides(model)):
                return home
        return engine.lane(model, request.version)

    async def _open(self, plan: LanePlan, request: pb.StreamOpen) -> Stream:
        opening = read_open(plan, request)
        if self._handoff is None:
            return await self._begin(plan, opening, None)
        mover = self._handoff.mover(plan.lane, opening.outputs, emit_last=opening.emit_last)
        async with mover.brought(opening.terms) as refused:
            for error in refused.values():
                raise error
            self._engine.check_open()
            return await self._begin(plan, opening, mover)

    async def _begin(self, plan: LanePlan, opening: Opening, mover: Mover | None) -> Stream:
        stream = Stream(self._engine, plan, opening, mover)
        try:
            await stream.open(opening.terms)
        except BaseException:
            stream.drop()
            raise
        return stream

    @staticmethod
    async def _read(stream: Stream, writer: asyncio.Task[None], context: Context) -> None:
        while (raw := await context.read()) is not grpc.aio.EOF:
            stream.take(raw)
            if stream.held is not None:
                await stream.take_held()
            if stream.answers:  # they were made at once: begin to write them, and then to read
                await asyncio.sleep(0)
            if stream.wants_room:
                await stream.has_room()
                if writer.done():
                    return
        await asyncio.sleep(0)  # where the client is gone, and has not sent all, gRPC cancels this now
        stream.finish()

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Every method by its name; those that carry tensors write bytes, and StreamPredict reads them too."""
        unary = unary_handlers(_SERVICE, self, write_bytes={"Predict"})
        generating: grpc.RpcMethodHandler[Any, Any] = grpc.unary_stream_rpc_method_handler(
            self.Generate,
            request_deserializer=pb.GenerateRequest.FromString,
            response_serializer=pb.GenerateResponse.SerializeToString,
        )
        streaming: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(self.StreamPredict)
        return {**unary, "Generate": generating, "StreamPredict": streaming}

    def forget(self, lane: Lane) -> None:
        """Keep nothing of a version."""
        self._plans.pop(lane, None)

    def plan(self, lane: Lane) -> LanePlan:
        """Plan of a lane's tensors, made once."""
        plan = self._plans.get(lane)
        if plan is None:
            plan = self._plans[lane] = LanePlan(lane)
        return plan
