"""The gate that every export passes: torch against onnxruntime, with the weights that were trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from models.checks import MAX_TOLERANCE, TOLERANCE, differ, random_cuts, run_in_chunks, without_padding
from models.errors import ParityError
from models.graphs import GraphModule
from models.runtime import Array, Named, Runtime
from models.spec import LENGTHS, SOURCE_LENGTHS, Golden, GoldenArray, GraphSpec, Layout, Parity

# Rows and longest row of each case; rows are ragged, the first one longest.
_SHAPES = ((1, 1), (4, 1), (1, 9), (3, 5), (5, 40), (8, 17), (2, 233), (1, 301))
_NUM_CHUNKS = (2, 5, 9)
_CUT_SHAPE = (4, 37)
_LONGEST_SOURCE = 7
_NUM_GOLDEN, _GOLDEN_ROWS = 2, 3
_ROUNDING = 16.0
"""Times torch's own rounding error in a case that onnxruntime may be off: its sigmoid and tanh are coarser."""


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of a graph, and what torch answers."""

    name: str
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    tolerance: float
    """Largest difference allowed."""

    @property
    def lengths(self) -> Array:
        """Steps of each row, [batch] int32."""
        return self.inputs[LENGTHS]


def gate(part: GraphModule, content: bytes, graph: GraphSpec, *, seed: int = 0) -> tuple[Parity, tuple[Golden, ...]]:
    """Compare a module with the file made of it, over several batches, lengths, states, and cuts in time.

    Every output and every next state is compared. The largest difference allowed is TOLERANCE; only where rounding
    alone moves torch's float32 further from its float64, as it can in a cell that sums up over hundreds of steps, it is
    a multiple of that, up to MAX_TOLERANCE.
    Returns what was measured, and a few of the cases to travel with the file.
    Raises ParityError at the first case that differs, and ModelFileError when onnxruntime cannot run the file at all.
    """
    rng = np.random.default_rng(seed)
    runtime = Runtime(content)
    worst, widest, num_cases = 0.0, TOLERANCE, 0

    def compare(case: Case, found: dict[str, Array], how: str) -> None:
        nonlocal worst, widest, num_cases
        found = without_padding(graph, found, case.lengths)
        for name, expected in without_padding(graph, case.outputs, case.lengths).items():
            gap = differ(found[name], expected)
            if not gap.scaled <= case.tolerance:
                raise ParityError(case.name + how, name, error=gap.absolute, tolerance=case.tolerance, where=gap.where)
            worst = max(worst, gap.absolute)
        widest = max(widest, case.tolerance)
        num_cases += 1

    cases = draw_cases(part, rng)
    for case in cases:
        compare(case, runtime(case.inputs), "")
    if graph.is_causal and graph.fixed_steps is None:
        rows, longest = _CUT_SHAPE
        whole = make_case(part, rng, rows=rows, longest=longest, shortest=max(_NUM_CHUNKS), has_state=True)
        for num_chunks in _NUM_CHUNKS:
            cuts = random_cuts(rng, whole.lengths, num_chunks)
            compare(whole, run_in_chunks(runtime, graph, whole.inputs, cuts), f", in {num_chunks} chunks")
    return Parity(max_abs_error=worst, tolerance=widest, num_cases=num_cases), golden_of(cases)


def draw_cases(part: GraphModule, rng: np.random.Generator) -> list[Case]:
    """Draw cases of many sizes, each without and with initial states."""
    return [
        make_case(part, rng, rows=rows, longest=longest, has_state=has_state)
        for rows, longest in _SHAPES
        for has_state in (False, True)
    ]


def golden_of(cases: Sequence[Case]) -> tuple[Golden, ...]:
    """Choose those that travel with a file: the smallest ragged ones, for they have to fit into the metadata."""
    return tuple(_golden(case) for case in cases if len(case.lengths) == _GOLDEN_ROWS)[:_NUM_GOLDEN]


def make_case(
    part: GraphModule, rng: np.random.Generator, *, rows: int, longest: int, has_state: bool, shortest: int = 1
) -> Case:
    """Draw inputs as the training data were spread, and ask torch.

    Rows are ragged: the first is the longest, the last the shortest; sources too, if there are any. Ids are any that
    the module takes. States are zeros, or drawn.
    """
    graph = part.spec
    longest = min(longest, graph.fixed_steps or longest)
    lengths = rng.integers(shortest, longest, size=rows, endpoint=True).astype(np.int32)
    lengths[-1], lengths[0] = shortest, longest
    inputs: dict[str, Array] = {}
    time = graph.fixed_steps or longest
    for tensor in graph.inputs:
        axes = {
            Layout.PER_STEP: (rows, time),
            Layout.PER_SEQUENCE: (rows,),
            Layout.SHARED: (),
            Layout.PER_SOURCE_STEP: (rows, _LONGEST_SOURCE),
        }[tensor.layout]
        inputs[tensor.name] = part.draw(rng, tensor, (*axes, *tensor.row_shape))
    inputs[LENGTHS] = lengths
    if graph.reads_source:
        sources = rng.integers(1, _LONGEST_SOURCE, size=rows, endpoint=True).astype(np.int32)
        sources[0] = _LONGEST_SOURCE
        inputs[SOURCE_LENGTHS] = sources
    for state in graph.states:
        drawn = part.draw(rng, state, (rows, *state.row_shape))
        inputs[state.name] = drawn if has_state else np.zeros_like(drawn)
    with torch.no_grad():
        answers = part.module.eval()(*(torch.from_numpy(array) for array in inputs.values()))
        exact = copy.deepcopy(part.module).double()(*(torch.from_numpy(_widened(array)) for array in inputs.values()))
    about = f"{rows} rows of up to {longest} steps, {'nonzero' if has_state else 'zero'} initial states"
    outputs = {name: answer.numpy() for name, answer in zip(graph.output_names, answers, strict=True)}
    exactly = {name: answer.numpy() for name, answer in zip(graph.output_names, exact, strict=True)}
    return Case(about, inputs, outputs, _tolerance(graph, outputs, exactly, lengths))


def _tolerance(graph: GraphSpec, answers: Named, exact: Named, lengths: Array) -> float:
    """Allow for what rounding does to torch itself."""
    answers, exact = (without_padding(graph, each, lengths) for each in (answers, exact))
    rounding = max(differ(answers[name], exact[name]).scaled for name in exact)
    return float(np.clip(_ROUNDING * rounding, TOLERANCE, MAX_TOLERANCE))


def _widened(array: Array) -> Array:
    return array.astype(np.float64) if array.dtype == np.float32 else array


def _golden(case: Case) -> Golden:
    return Golden(
        inputs={name: GoldenArray.of(array) for name, array in case.inputs.items()},
        outputs={name: GoldenArray.of(array) for name, array in case.outputs.items()},
    )
