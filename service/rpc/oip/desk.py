"""Takes requests of the Open Inference Protocol in: to live sequences, or as whole ones."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress

from models.spec import StepMode
from service.engine import Engine
from service.errors import DeadlineExpired, InvalidInput, NotSteppable, ServiceError, ShapeMismatch
from service.events import NEVER
from service.facts import current
from service.generate import generate
from service.generation import Request
from service.lane import Lane
from service.pb.inference import inference_pb2 as pb
from service.policies import Priority
from service.predict import Sequences
from service.rpc.handoff import Handoff
from service.rpc.oip.generate import MakePlan, Rows
from service.rpc.oip.inference import Counts, Inference
from service.rpc.oip.moving import Movers
from service.rpc.oip.options import Options, read_options
from service.rpc.oip.repeat import Meaning, Patterns
from service.rpc.oip.sequences import Key, Sequence, SequenceTable
from service.rpc.oip.tensors import Given, InferPlan
from service.sessions import ANONYMOUS, Terms

log = logging.getLogger(__name__)


class Desk:
    """Where requests of every call come in."""

    def __init__(self, engine: Engine, handoff: Handoff | None = None) -> None:
        """Take requests in.

        handoff  brings sequences that live on other workers; None where there are none
        """
        self._engine = engine
        self._movers = None if handoff is None else Movers(engine, handoff)
        self._plans: dict[Lane, tuple[InferPlan, Counts]] = {}
        self.patterns = Patterns()
        """What requests of live sequences look like."""
        self._sequences = SequenceTable(engine, self.patterns.forget)
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself would forget them

    def lane(self, model: str, version: str) -> Lane:
        """Find a served model version. Raises ModelNotFound, and InvalidInput for a version that is no number."""
        if version and not (version.isascii() and version.isdecimal()):
            raise InvalidInput(f"version {version!r}: expected a number, or nothing for the newest", field="version")
        return self._engine.lane(model, int(version or 0))

    def plan(self, lane: Lane) -> tuple[InferPlan, Counts]:
        """Plan and counts of a model version, made once."""
        known = self._plans.get(lane)
        if known is None:
            plan = InferPlan(lane)
            known = self._plans[lane] = plan, Counts(plan)
        return known

    def forget(self, lane: Lane) -> None:
        """Keep nothing of a version."""
        self._plans.pop(lane, None)

    # ---- requests ---------------------------------------------------------------------------------------------------

    def submit(self, request: pb.ModelInferRequest, inference: Inference) -> Meaning | None:
        """Take a request; the inference tells its answer, or why there is none: at once, or later.

        Returns what later ones that only differ in id and rows will mean, if this is a step of a sequence that goes on.
        """
        try:
            options = read_options(request.parameters)
            if options.sequence_id:
                return self._step(request, options, inference)
            self._predict(request, options, inference, self.lane(request.model_name, request.model_version))
        except ServiceError as error:
            with suppress(ServiceError):  # of a model that is not served
                self.lane(request.model_name, request.model_version).tally.count_rejected(error.reason)
            inference.fail(error)
        return None

    def repeat(self, meaning: Meaning, rows: bytes, inference: Inference) -> None:
        """Take a request whose meaning is known."""
        sequence = meaning.sequence
        plan, counts = self.plan(sequence.plan.lane)
        inference.begin(plan, counts, meaning.outputs, wants_final=meaning.options.wants_final)
        sequence.submit(self._engine, inference, Given([rows], meaning.form), meaning.options)

    # ---- steps of live sequences ------------------------------------------------------------------------------------

    def _step(self, request: pb.ModelInferRequest, options: Options, inference: Inference) -> Meaning | None:
        key: Key = (request.model_name, request.model_version, options.sequence_id)
        sequence = None if options.is_start else self._sequences.find(key) or self._find_retired(key)
        if sequence is not None:
            plan, counts = self.plan(sequence.plan.lane)
        else:
            lane = self.lane(request.model_name, request.model_version)
            if lane.is_whole and options.is_start and options.is_end:
                self._predict(request, options, inference, lane)
                return None
            _check_steppable(lane)
            plan, counts = self.plan(lane)
            if not options.is_start:
                sequence = self._sequences.find_spelled(key, plan)
        facts = current()
        facts.serve(plan.lane.name, plan.lane.version)
        if not inference.takes_parts:  # else its call may carry many sequences
            facts.session_id = str(options.sequence_id)
        given = plan.read(request)
        outputs = plan.pick_outputs(request)
        inference.begin(plan, counts, outputs, wants_final=options.wants_final)
        _check_one_sequence(given)
        if self._movers is not None and (sequence is None or self._movers.is_moving(key)):
            self._move(self._movers, request, key, plan, given, options, inference)
            return None
        if sequence is None:
            if not options.is_start:
                raise self._sequences.missing(key)
            self._engine.check_open()
            terms = ANONYMOUS if options.priority is Priority.NORMAL else Terms(priority=options.priority)
            sequence = self._sequences.begin(key, plan, terms, plan.lane.open)
        self._hand_in(sequence, given, options, inference)
        goes_on = not (options.is_start or options.is_end)
        if goes_on and plan.takes_any_bytes and given.lengths is None and len(request.raw_input_contents) == 1:
            return Meaning(sequence, given.form, outputs, options)
        return None

    def _find_retired(self, key: Key) -> Sequence | None:
        """Find a sequence of a version that is served no more, which was begun with its other spelling."""
        for lane in self._engine.besides(key[0]):
            if key[1] in ("", str(lane.version)):
                sequence = self._sequences.find_spelled(key, self.plan(lane)[0])
                if sequence is not None:
                    return sequence
        return None

    def _hand_in(self, sequence: Sequence, given: Given, options: Options, inference: Inference) -> None:
        if options.is_end:
            self.patterns.forget(sequence)
        sequence.submit(self._engine, inference, given, options)

    def _move(
        self,
        movers: Movers,
        request: pb.ModelInferRequest,
        key: Key,
        plan: InferPlan,
        given: Given,
        options: Options,
        inference: Inference,
    ) -> None:
        """Take a step of a sequence that may live on another worker, or that others wait for already."""
        if options.is_start and (old := self._sequences.find_spelled(key, plan)) is not None:
            self.patterns.forget(old)  # what comes behind this request is for the new one
        lock = movers.reserve(key)

        async def act() -> None:
            async with lock:
                sequence = None if options.is_start else self._sequences.find_spelled(key, plan)
                if sequence is not None:
                    self._hand_in(sequence, given, options, inference)
                    return
                home = await movers.find_home(key, plan.lane)
                if home is None or options.is_start:
                    if home is not None:
                        await movers.end_at(home, key)
                    sequence = await movers.bring(self._sequences, key, plan, options)
                    self._hand_in(sequence, given, options, inference)
                    return
                other, counts = self.plan(home)  # of a version that was replaced, on which it goes on
                with self._engine.holding(home):
                    there, outputs = other.read(request), other.pick_outputs(request)
                    inference.begin(other, counts, outputs, wants_final=options.wants_final)
                    sequence = await movers.bring(self._sequences, key, other, options)
                    self._hand_in(sequence, there, options, inference)

        self._do(plan.lane, inference, act()).add_done_callback(lambda _: movers.release(key))

    # ---- whole sequences --------------------------------------------------------------------------------------------

    def _predict(self, request: pb.ModelInferRequest, options: Options, inference: Inference, lane: Lane) -> None:
        facts = current()
        facts.serve(lane.name, lane.version)
        if lane.step_mode is StepMode.GENERATIVE:
            self._generate(request, options, inference, lane)
            return
        plan, counts = self.plan(lane)
        given = plan.read(request)
        outputs = plan.pick_outputs(request, with_states=True)
        inference.begin(plan, counts, outputs, wants_final=options.wants_final)
        sequences = Sequences(
            inputs=plan.rows(given),
            lengths=given.all_lengths,
            states=[given.states.get(name) for name in plan.states],
            outputs=[index for index in outputs if index < len(plan.outputs)],
            return_state=any(index >= len(plan.outputs) for index in outputs),
            priority=options.priority,
            constants=[given.contexts[name] for name in plan.contexts],
        )
        inference.num_bytes += plan.step_bytes * given.form.num_rows
        facts.num_sequences += given.num_sequences
        facts.steps_in += int(given.all_lengths.sum())
        self._do(lane, inference, self._run(lane, sequences, given, options, inference))

    def _generate(self, request: pb.ModelInferRequest, options: Options, inference: Inference, lane: Lane) -> None:
        plan, counts = self.plan(lane)
        making = MakePlan(lane)
        asked, wanted = making.read(request, options)
        inference.num_bytes += request.ByteSize()
        inference.begin(plan, counts, [], wants_final=options.wants_final)
        self._do(lane, inference, self._make(making, asked, wanted, options, inference))

    async def _make(
        self, making: MakePlan, asked: Request, wanted: list[str], options: Options, inference: Inference
    ) -> None:
        """Generate: in parts as they are made, or in one answer, as the request's call can take it."""
        request_id, ends, rows = inference.id.decode(), set[int](), Rows(asked)
        async with _limit(options, making.lane), aclosing(generate(self._engine, making.lane, asked)) as parts:
            async for made in parts:
                answered_at = time.perf_counter()
                ends.update(end.sequence for end in made.ends)
                if not inference.takes_parts:
                    rows.take(made)
                    continue
                is_last = len(ends) == asked.num
                *pieces, last = making.pieces(request_id, wanted, made, asked, is_final=is_last and options.wants_final)
                for piece in (*pieces, *(() if is_last else (last,))):
                    await inference.take_part(piece)
                if is_last:
                    inference.succeed(last, asked.num, answered_at)
                    return
            response = making.whole(request_id, wanted, rows, is_final=options.wants_final)
            inference.succeed(response, asked.num, answered_at)

    async def _run(
        self, lane: Lane, sequences: Sequences, given: Given, options: Options, inference: Inference
    ) -> None:
        async with _limit(options, lane):
            prediction = await self._engine.predict(lane, sequences)
        current().steps_out += int(given.all_lengths.sum())
        inference.answer(given, prediction)

    def _do(self, lane: Lane, inference: Inference, act: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Do something on a model version that takes a while for a request, which fails where that does."""
        inference.task = task = asyncio.create_task(_guarded(inference, act))
        self._tasks.add(task)
        self._engine.hold(lane)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self._engine.release(lane))
        return task


@asynccontextmanager
async def _limit(options: Options, lane: Lane) -> AsyncIterator[None]:
    """Give what is done within the request's timeout. Raises DeadlineExpired."""
    try:
        async with asyncio.timeout(None if options.timeout_s == NEVER else options.timeout_s):
            yield
    except TimeoutError:
        lane.tally.count_rejected(DeadlineExpired.reason)
        raise DeadlineExpired(f"no answer within the request's timeout, {options.timeout_s:g} s") from None


async def _guarded(inference: Inference, act: Coroutine[None, None, None]) -> None:
    try:
        await act
    except ServiceError as error:
        inference.fail(error)
    except Exception:
        log.exception("a bug ended a request")
        inference.fail(ServiceError("the server failed; its log says how"))


def _check_steppable(lane: Lane) -> None:
    _check_contexts(lane)
    if lane.step_mode in (StepMode.BUFFERED, StepMode.GENERATIVE):
        whole = "whole sequence" if lane.step_mode is StepMode.BUFFERED else "request that it is to generate from"
        raise NotSteppable(
            f"{lane.name} can't be stepped: {lane.step_mode_reason}; send the {whole} in one request without "
            "sequence_id",
            field="parameters.sequence_id",
        )


def _check_one_sequence(given: Given) -> None:
    if given.num_sequences != 1:
        raise ShapeMismatch(
            f"a request with a sequence_id has {given.num_sequences} sequences: expected 1; send each with its own "
            "sequence_id, or whole ones without",
            field="inputs",
        )
    if given.states:
        raise InvalidInput(
            f"{next(iter(given.states))}: the server keeps the states of a sequence; leave them out, or leave "
            "sequence_id out and keep them yourself",
            field="inputs",
        )


def _check_contexts(lane: Lane) -> None:
    if lane.constants is not None and lane.step_mode is not StepMode.GENERATIVE:
        raise NotSteppable(
            f"{lane.name} takes {', '.join(lane.constants.names)} once a sequence, which steps of this protocol can't "
            "carry: send the whole sequence in one request without sequence_id, or call rnnserve.v1",
            field="inputs",
        )
