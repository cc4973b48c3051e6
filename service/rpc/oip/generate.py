"""Requests of the Open Inference Protocol for models that generate: those of Generate, in its tensors and parameters.

ModelInfer answers all of it in one response; on ModelStreamInfer, as of a decoupled model of Triton, each piece is a
response as soon as it is made. What is chosen by ids comes as

    ids            [rows, outputs] INT64, zeros past a row's length
    log_probs      [rows, outputs] FP32, the log-probability of each
    text           [rows] BYTES, its words by the model's vocabulary, where it has one of every id
    lengths        [rows] INT32
    finish_reasons [rows] INT32, as rnnserve.v1.FinishReason
    scores         [rows] FP32, of a search its score, otherwise the sum of log-probabilities, the ending id's included

with a row for every hypothesis of every sequence; a model that feeds no ids back gives its own outputs beside lengths
and finish_reasons. Lengths are of source inputs where there is an encoder, otherwise of prompts.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from models.spec import LENGTHS, TensorSpec
from service.errors import InvalidInput, ShapeMismatch
from service.generation import End, Made, Request
from service.lane import Lane
from service.pb.inference import inference_pb2 as pb
from service.pb.rnnserve.v1 import rnnserve_pb2 as native
from service.rpc.codec import LanePlan, inputs_of, row_bytes_of
from service.rpc.generation import read_generate
from service.rpc.oip.contents import DATATYPES, Form, Row, check_raw, content_of, lengths_of, wanted_outputs
from service.rpc.oip.options import Options

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

Described = tuple[str, str, tuple[int, ...]]
"""Name, datatype, and shape without the batch, of a tensor."""
_CHOSEN = {
    "ids": ("INT64", True),
    "log_probs": ("FP32", True),
    "text": ("BYTES", False),
    "lengths": ("INT32", False),
    "finish_reasons": ("INT32", False),
    "scores": ("FP32", False),
}
"""Outputs of a model that ids are chosen of: (datatype, whether it has an axis of outputs)."""
_ALWAYS = ("lengths", "finish_reasons")
_NUMBERS = {
    "temperature": float,
    "top_p": float,
    "length_normalization": float,
    "max_steps": int,
    "top_k": int,
    "beams": int,
    "num_hypotheses": int,
}
"""Parameters with the names and meanings of GenerateRequest's fields."""
_SEED = "seed"
"""Parameter: sequence i draws by this number plus i. Where none is given, responses tell the one that was made up."""
_MAX_INT32, _SEEDS = 2**31 - 1, 2**64


@dataclass(slots=True)
class _Row:
    """What a hypothesis of a sequence has so far."""

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    outputs: list[list[Array]] = field(default_factory=list)
    end: End | None = None


class MakePlan:
    """Reads requests and writes responses of one version of a model that generates."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        spec = lane.backend.spec
        assert spec.generation is not None  # noqa: S101  it is made for no other
        self._separator = spec.generation.separator
        self._words = spec.vocabulary
        self._native = LanePlan(lane)
        sources = [] if lane.encoder is None else lane.encoder.step_inputs
        self._stepped = {t.name: Row(t) for t in (*sources, *lane.step_inputs)}
        self._takes_lengths = {t.name for t in (sources or lane.step_inputs)}
        once = [t for t in inputs_of(lane) if t.name not in self._stepped]
        self._once = {t.name: Row(t) for t in once} | {s.name: Row(s) for s in lane.graph.states}
        self._own = [] if spec.generation.token_input else [Row(t) for t in lane.graph.outputs]
        num_ids = sum(t.row_shape[0] for t in lane.graph.outputs if t.name == spec.generation.scores_output)
        chosen = [name for name in _CHOSEN if name != "text" or len(self._words) >= num_ids]
        self._made = _ALWAYS if self._own else tuple(chosen)
        self._names = [*(row.name for row in self._own), *self._made]

    # ---- requests ---------------------------------------------------------------------------------------------------

    def read(self, request: pb.ModelInferRequest, options: Options) -> tuple[Request, list[str]]:
        """Read a request: (what to make, names of the outputs to answer).

        Raises InvalidInput and its kin, Exhausted, and Unimplemented for shared memory.
        """
        wanted = wanted_outputs(request, self._names, self.lane.name) or self._names
        asked = native.GenerateRequest(model=self.lane.name, inputs=self._tensors(request), **_numbers(request))
        asked.outputs.extend(row.name for row in self._own if row.name in wanted)
        if self._own and not asked.outputs:
            raise InvalidInput(f"outputs: name one of {', '.join(row.name for row in self._own)} too", field="outputs")
        made = read_generate(self._native, asked)
        made.priority = options.priority
        seed = _seed(request)
        if asked.temperature:
            first = secrets.randbits(63) if seed is None else seed
            made.seeds = [(first + number) % _SEEDS for number in range(made.num)]
        elif seed is not None:
            raise InvalidInput("seed is for drawing: give a temperature over 0 too", field=f"parameters.{_SEED}")
        return made, wanted

    def _tensors(self, request: pb.ModelInferRequest) -> list[native.Tensor]:
        check_raw(request)
        lengths: Ints | None = None
        tensors: dict[str, native.Tensor] = {}
        forms: dict[str, Form] = {}
        for number, tensor in enumerate(request.inputs):
            at, name = f"inputs[{number}]", tensor.name
            if name in tensors or (name == LENGTHS and lengths is not None):
                raise InvalidInput(f"{name} is given twice", field=f"{at}.name")
            content = content_of(request, number, at)
            if name == LENGTHS:
                lengths = lengths_of(tensor, content, at)
                continue
            if (row := self._stepped.get(name)) is not None:
                forms[name] = row.form(tensor, at)
                row.view(tensor, content, at)
            elif (row := self._once.get(name)) is not None:
                row.view_once(tensor, content, at)
            else:
                takes = ", ".join([*self._stepped, LENGTHS, *self._once])
                raise InvalidInput(f"no input {name!r}; {self.lane.name} takes {takes}", field=f"{at}.name")
            tensors[name] = native.Tensor(name=name, data=content)
        for name, form in forms.items():
            self._cut(tensors[name], form, lengths if name in self._takes_lengths else None)
        if lengths is not None and not self._takes_lengths & forms.keys():
            raise ShapeMismatch("lengths of no tensor: leave them out", field=LENGTHS)
        return list(tensors.values())

    def _cut(self, tensor: native.Tensor, form: Form, lengths: Ints | None) -> None:
        """Say where sequences end in a per-step tensor, and leave out what is padding."""
        if lengths is None:
            tensor.lengths.extend([form.num_steps] * (form.num_sequences or 1))
            return
        tensor.data = self._stepped[tensor.name].pack(tensor.data, form, form.check(lengths))
        tensor.lengths.extend(lengths.tolist())

    # ---- responses --------------------------------------------------------------------------------------------------

    def describe(self) -> tuple[list[Described], list[Described]]:
        """List (name, datatype, shape without the batch) of every input that has to be given, and of every output."""
        prompt = self.lane.step_inputs if self.lane.encoder is None else []
        given = [t for t in inputs_of(self.lane) if t in prompt or t not in self.lane.step_inputs]
        inputs = [(t.name, DATATYPES[t.dtype], self._dims(t)) for t in given]
        outputs = [(row.name, row.datatype, (-1, *row.shape)) for row in self._own]
        outputs += [(name, _CHOSEN[name][0], (-1,) if _CHOSEN[name][1] else (1,)) for name in self._made]
        return inputs, outputs

    def _dims(self, tensor: TensorSpec) -> tuple[int, ...]:
        return (*((-1,) if tensor.name in self._stepped else ()), *tensor.row_shape) or (1,)

    def whole(self, request_id: str, wanted: Sequence[str], rows: Rows, *, is_final: bool) -> bytes:
        """Write everything that was made as one ModelInferResponse."""
        response = self._response(request_id, rows.request, is_final=is_final)
        self._fill(response, wanted, rows.all())
        return response.SerializeToString()

    def pieces(
        self, request_id: str, wanted: Sequence[str], made: Made, request: Request, *, is_final: bool
    ) -> Iterator[bytes]:
        """Write what was made last, a ModelInferResponse for each sequence, or hypothesis, that it is of.

        is_final  say of the last one that it is the last of its request
        """
        rows = Rows(request)
        rows.take(made)
        pieces = list(rows)
        for place, ((sequence, hypothesis), row) in enumerate(pieces, start=1):
            response = self._response(request_id, request, is_final=is_final and place == len(pieces))
            response.parameters["sequence"].int64_param = sequence
            if request.num_hypotheses > 1:
                response.parameters["hypothesis"].int64_param = hypothesis
            self._fill(response, wanted, [row])
            yield response.SerializeToString()

    def _response(self, request_id: str, request: Request, *, is_final: bool) -> pb.ModelInferResponse:
        response = pb.ModelInferResponse(model_name=self.lane.name, model_version=str(self.lane.version), id=request_id)
        if request.seeds:
            response.parameters[_SEED].uint64_param = request.seeds[0]
        if is_final:
            response.parameters["triton_final_response"].bool_param = True
        return response

    def _fill(self, response: pb.ModelInferResponse, wanted: Sequence[str], rows: Sequence[_Row]) -> None:
        own = [row for row in self._own if row.name in wanted]
        lengths = [len(row.ids) or sum(len(part[0]) for part in row.outputs) for row in rows]
        for name in wanted:
            if name in self._made:
                datatype, shape, content = self._column(name, rows, lengths)
            else:
                place = next(index for index, each in enumerate(own) if each.name == name)
                spec = own[place]
                datatype, shape = spec.datatype, (len(rows), max(lengths), *spec.shape)
                values = np.zeros(shape, dtype=spec.dtype)
                for row, length, into in zip(rows, lengths, values, strict=True):
                    if length:
                        into[:length] = np.concatenate([part[place] for part in row.outputs])
                content = row_bytes_of(values)
            response.outputs.add(name=name, datatype=datatype, shape=shape)
            response.raw_output_contents.append(content)

    def _column(self, name: str, rows: Sequence[_Row], lengths: list[int]) -> tuple[str, tuple[int, ...], bytes]:
        datatype, is_wide = _CHOSEN[name]
        if name == "text":
            texts = [self._separator.join(self._words[each] for each in row.ids).encode() for row in rows]
            return datatype, (len(rows),), b"".join(struct.pack("<I", len(text)) + text for text in texts)
        dtype = {"INT64": "<i8", "INT32": "<i4", "FP32": "<f4"}[datatype]
        if is_wide:
            values = np.zeros((len(rows), max(lengths)), dtype=dtype)
            for row, length, into in zip(rows, lengths, values, strict=True):
                into[:length] = row.ids if name == "ids" else row.log_probs
        elif name == "lengths":
            values = np.array(lengths, dtype=dtype)
        elif name == "finish_reasons":
            values = np.array([row.end.reason if row.end else 0 for row in rows], dtype=dtype)
        else:
            values = np.array([row.end.score if row.end else 0.0 for row in rows], dtype=dtype)
        return datatype, values.shape, values.tobytes()


class Rows:
    """What was made of a request, by sequence and hypothesis."""

    def __init__(self, request: Request) -> None:
        self.request = request
        """What was asked for."""
        self._rows: dict[tuple[int, int], _Row] = {}

    def take(self, made: Made) -> None:
        """Put what was made behind what was before."""
        at, outputs = 0, [np.concatenate(parts) for parts in zip(*made.outputs, strict=True)]
        for sequence, hypothesis, length in zip(made.sequences, made.hypotheses, made.lengths, strict=True):
            row = self._row(sequence, hypothesis)
            row.ids += made.ids[at : at + length]
            row.log_probs += made.log_probs[at : at + length]
            if outputs:
                row.outputs.append([values[at : at + length] for values in outputs])
            at += length
        for end in made.ends:
            self._row(end.sequence, end.hypothesis).end = end

    def _row(self, sequence: int, hypothesis: int) -> _Row:
        return self._rows.setdefault((sequence, hypothesis), _Row())

    def all(self) -> list[_Row]:
        """A row for every hypothesis of every sequence; one that a search did not find has nothing in it."""
        request = self.request
        return [self._row(each, rank) for each in range(request.num) for rank in range(request.num_hypotheses)]

    def __iter__(self) -> Iterator[tuple[tuple[int, int], _Row]]:
        """Go over what there is: ((sequence, hypothesis), row)."""
        return iter(sorted(self._rows.items()))


def _numbers(request: pb.ModelInferRequest) -> dict[str, Any]:
    """Read the parameters that say how to choose. Raises InvalidInput."""
    found: dict[str, Any] = {}
    for name, kind in _NUMBERS.items():
        if name not in request.parameters:
            continue
        value = _number(request, name)
        if kind is int and not (isinstance(value, int) and 0 <= value <= _MAX_INT32):
            raise InvalidInput(
                f"{name} {value}: expected a whole number, 0 to {_MAX_INT32}", field=f"parameters.{name}"
            )
        found[name] = kind(value)
    return found


def _seed(request: pb.ModelInferRequest) -> int | None:
    if _SEED not in request.parameters:
        return None
    value = _number(request, _SEED)
    if not isinstance(value, int):
        raise InvalidInput(f"seed {value}: expected a whole number", field=f"parameters.{_SEED}")
    return value


def _number(request: pb.ModelInferRequest, name: str) -> float:
    parameter = request.parameters[name]
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param", "double_param"):
        raise InvalidInput(f"parameter {name}: expected a number, got {kind or 'no value'}", field=f"parameters.{name}")
    return getattr(parameter, kind)  # type: ignore[no-any-return]  # of a number it is one
