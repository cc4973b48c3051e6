"""Messages of Generate <-> what is asked and made. Field mapping and checks against the model, no more."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from models.spec import Generation, TensorSpec
from service.errors import BadValue, Exhausted, InvalidInput, NotGenerative, ShapeMismatch
from service.generation import Made, Request
from service.inputs import bad_rows, bad_value
from service.lane import Lane
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.rpc.codec import LanePlan, TensorPlan, empty_tensor, row_bytes_of
from service.rpc.requests import priority_of
from service.sampling import Choice

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
MAX_BEAMS = 64
"""Widest search: each of its paths takes a slot."""


def read_generate(plan: LanePlan, request: pb.GenerateRequest) -> Request:
    """Check a request. Raises NotGenerative, InvalidInput and its kin, and Exhausted."""
    lane = plan.lane
    generation = lane.backend.spec.generation
    if generation is None:
        raise NotGenerative(
            f"{lane.name} does not generate: it is {lane.step_mode.value}: {lane.step_mode_reason}; call Predict or "
            "StreamPredict",
            field="model",
        )
    given = _Given(plan, generation, request)
    choice = _choice(generation, request)
    beams, num_hypotheses = _beams(generation, request)
    is_drawn = choice.temperature > 0
    seeds = list(request.seeds)
    if is_drawn and not seeds:
        seeds = [secrets.randbits(64) for _ in range(given.num)]
    if not generation.token_input:
        outputs = plan.pick_outputs(request.outputs)
    elif request.outputs:
        raise InvalidInput(f"{lane.name} answers ids and their log-probabilities, no outputs", field="outputs")
    else:
        outputs = []
    max_steps = request.max_steps or generation.max_steps
    if max_steps > generation.max_steps:
        raise InvalidInput(
            f"max_steps {max_steps}: {lane.name} makes at most {generation.max_steps} outputs", field="max_steps"
        )
    return Request(
        num=given.num,
        prompts=given.prompts(),
        sources=given.sources,
        source_lengths=given.source_lengths,
        contexts=given.contexts,
        states=given.states,
        seeds=seeds if is_drawn else [],
        max_steps=max_steps,
        choice=choice,
        beams=beams,
        num_hypotheses=num_hypotheses,
        normalization=request.length_normalization,
        outputs=outputs,
        priority=priority_of(request.priority),
    )


def timeout_of(request: pb.GenerateRequest) -> float | None:
    """Read the time for all of it; None: no limit. Raises InvalidInput."""
    if not request.HasField("timeout"):
        return None
    timeout_s = request.timeout.ToNanoseconds() / 1e9
    if timeout_s <= 0:
        raise InvalidInput(f"timeout {timeout_s:g} s: expected more than 0", field="timeout")
    return timeout_s


def write_started(lane: Lane, request: Request) -> pb.GenerateResponse:
    """Say what answers."""
    started = pb.GenerateStarted(
        model=lane.name,
        version=lane.version,
        digest=lane.backend.digest,
        num_sequences=request.num,
        seeds=request.seeds,
    )
    return pb.GenerateResponse(started=started)


def write_made(plan: LanePlan, request: Request, made: Made) -> pb.GenerateResponse:
    """Write what was made."""
    output = pb.GenerateOutput(
        sequences=made.sequences,
        hypotheses=made.hypotheses if any(made.hypotheses) else None,
        positions=made.positions,
        lengths=made.lengths,
        ids=made.ids,
        log_probs=made.log_probs,
    )
    for index, parts in zip(request.outputs, zip(*made.outputs, strict=True), strict=False):
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        tensor = empty_tensor(plan.output_plans[index], rows)
        tensor.data = row_bytes_of(rows)
        output.tensors.append(tensor)
    if made.ends:
        ends, has_ids = made.ends, bool(request.prompts)
        output.ends.CopyFrom(
            pb.GenerateEnds(
                sequences=[end.sequence for end in ends],
                hypotheses=[end.hypothesis for end in ends] if any(end.hypothesis for end in ends) else None,
                reasons=[end.reason.value for end in ends],  # type: ignore[misc]  # values are ints
                num_outputs=[end.num_outputs for end in ends],
                log_probs=[end.log_prob for end in ends] if has_ids else None,
                scores=[end.score for end in ends] if request.beams > 1 else None,
            )
        )
    return pb.GenerateResponse(output=output)


class _Given:
    """Tensors of a request."""

    def __init__(self, plan: LanePlan, generation: Generation, request: pb.GenerateRequest) -> None:
        lane = plan.lane
        self._lane = lane
        self._generation = generation
        encoder = lane.encoder
        sources = [] if encoder is None else encoder.step_inputs
        self._per_step = {t.name: t for t in (*lane.step_inputs, *sources)}
        names = [t.name for t in sources] or [*plan.inputs, *plan.constants]
        self._sole = names[0] if len(names) == 1 else None
        self._prompt: tuple[Array, Ints] | None = None
        self.source_lengths: Ints | None = None
        counts: dict[str, int] = {}
        stepped: dict[str, tuple[Array, Ints]] = {}
        once: dict[str, Array] = {}
        for index, tensor in enumerate(request.inputs):
            name, at = tensor.name or self._sole or "", f"inputs[{index}]"
            if name in counts:
                raise InvalidInput(f"{name} is given twice", field=f"{at}.name")
            if name in self._per_step:
                stepped[name] = self._steps(self._per_step[name], tensor, at)
                counts[name] = len(stepped[name][1])
            elif name in plan.constants or name in plan.states:
                _, _, rows = plan.read([_named(tensor, name)], f"{at}:")
                once |= rows
                counts[name] = len(rows[name])
            else:
                takes = ", ".join([*self._per_step, *plan.constants, *plan.states])
                raise InvalidInput(f"no input {tensor.name!r}; {lane.name} takes {takes}", field=f"{at}.name")
        if request.seeds:
            counts["seeds"] = len(request.seeds)
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ShapeMismatch(f"different numbers of sequences: {told}", field="inputs")
        self.num = next(iter(counts.values()), 1)
        if not self.num:
            raise InvalidInput("no sequences: give at least one", field="inputs")
        if missing := [t for t in (*(s.name for s in sources), *plan.constants) if t not in counts]:
            raise InvalidInput(f"input {missing[0]} is missing: {lane.name} generates from it", field="inputs")
        for spec in lane.graph.states:
            if spec.initial and spec.name in once:
                raise InvalidInput(f"{spec.name} begins with what the encoder gives: leave it out", field="inputs")
        self.sources = [stepped[t.name][0] for t in sources]
        for t in sources:
            lengths = stepped[t.name][1]
            if not lengths.all():
                raise InvalidInput(f"a source of {t.name} has no steps: every one needs at least one", field="inputs")
            if self.source_lengths is not None and not np.array_equal(lengths, self.source_lengths):
                raise ShapeMismatch("source inputs have different lengths", field="inputs")
            self.source_lengths = lengths
        if generation.token_input in stepped:
            self._prompt = stepped[generation.token_input]
        self.contexts = {name: once[name] for name in plan.constants}
        self.states: list[Array | None] = [once.get(name) for name in plan.states]

    def prompts(self) -> list[Array]:
        """Ids that each sequence is fed first. Raises InvalidInput where there are none, and none to begin with."""
        generation = self._generation
        if not generation.token_input:
            return []
        prompts: Sequence[Array] = [np.empty(0, dtype=np.int64)] * self.num
        if self._prompt is not None:
            ids, lengths = self._prompt
            prompts = np.split(ids, np.cumsum(lengths)[:-1])
        empty = [index for index, prompt in enumerate(prompts) if not len(prompt)]
        if empty and generation.begin_id is None:
            raise InvalidInput(
                f"sequence {empty[0]} has no prompt, which {self._lane.name} begins with: give ids of "
                f"{generation.token_input}",
                field="inputs",
            )
        begin = np.array([generation.begin_id or 0], dtype=np.int64)
        return [prompt if len(prompt) else begin for prompt in prompts]

    def _steps(self, spec: TensorSpec, tensor: pb.Tensor, at: str) -> tuple[Array, Ints]:
        """Read a tensor with a row for every step: (rows, lengths)."""
        plan = TensorPlan(spec)
        num_rows = plan.num_rows(tensor, at)
        limit = self._lane.settings.max_steps_per_message
        if num_rows > limit:
            raise Exhausted(f"{num_rows} steps in one message, the limit (max_steps_per_message) is {limit}", field=at)
        rows = plan.rows(tensor.data, at)
        passes = self._lane.settings.non_finite == "pass"
        if (is_bad := bad_rows(spec, rows, passes_non_finite=passes)) is not None:
            row = int(np.argmax(is_bad))
            raise BadValue(f"{at}: {bad_value(spec, rows[row], row)}", field=at)
        lengths = np.array(tensor.lengths or [num_rows], dtype=np.int64)
        if lengths.sum() != num_rows:
            raise ShapeMismatch(
                f"lengths sum to {lengths.sum()}, but {spec.name} has {num_rows} rows", field=f"{at}.lengths"
            )
        return rows, lengths


def _named(tensor: pb.Tensor, name: str) -> pb.Tensor:
    """The tensor under the name that an empty one stands for."""
    if tensor.name:
        return tensor
    named = pb.Tensor()
    named.CopyFrom(tensor)
    named.name = name
    return named


def _choice(generation: Generation, request: pb.GenerateRequest) -> Choice:
    for name, low, high in (("temperature", 0.0, np.inf), ("top_p", 0.0, 1.0), ("length_normalization", 0.0, np.inf)):
        value = getattr(request, name)
        if not low <= value <= high or value == np.inf:
            wanted = f"{low:g} to {high:g}" if high < np.inf else "0 or more, and finite"
            raise InvalidInput(f"{name} {value:g}: expected {wanted}", field=name)
    choice = Choice(temperature=request.temperature, top_k=request.top_k, top_p=request.top_p)
    if choice.temperature and not generation.token_input:
        raise InvalidInput("temperature: this model feeds no ids back, so nothing is drawn", field="temperature")
    if not choice.temperature and (choice.top_k or choice.top_p):
        raise InvalidInput(
            "top_k and top_p are for drawing: give a temperature over 0 too",
            field="top_k" if choice.top_k else "top_p",
        )
    return choice


def _beams(generation: Generation, request: pb.GenerateRequest) -> tuple[int, int]:
    """Read (width, hypotheses wanted) of a search."""
    beams, num = request.beams or 1, request.num_hypotheses or 1
    if beams > MAX_BEAMS:
        raise InvalidInput(f"beams {beams}: at most {MAX_BEAMS}", field="beams")
    if beams > 1 and not generation.token_input:
        raise InvalidInput("beams: this model feeds no ids back, so there is nothing to search for", field="beams")
    if beams > 1 and request.temperature:
        raise InvalidInput("beams and temperature: search for the likeliest or draw, not both", field="beams")
    if num > beams:
        raise InvalidInput(
            f"num_hypotheses {num}, beams {beams}: a search answers as many as it is wide at most; to draw several, "
            "give the sequence several times with different seeds",
            field="num_hypotheses",
        )
    if request.length_normalization and beams == 1:
        raise InvalidInput("length_normalization is for a search: give beams too", field="length_normalization")
    return beams, num
