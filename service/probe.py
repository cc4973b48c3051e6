"""Measures at load what batching, and cutting in time, do to a model's numbers on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from models.spec import LENGTHS, SOURCE_LENGTHS, Layout, TensorSpec
from service.backend import Backend

Array = npt.NDArray[Any]
Verdict = Literal["exact", "rounding", "coupled"]

ROUNDING = 1e-5
"""Largest difference, relative to the largest value, that counts as rounding."""
PROBE_STEPS = 23
LOUDNESS = 1000.0


@dataclass(frozen=True, slots=True)
class Exactness:
    """What a batch, or a cut into chunks, does to a sequence's numbers on this machine."""

    verdict: Verdict
    detail: str
    is_chunkable: bool
    """Whether cutting a sequence changes its numbers by rounding at most."""


def probe(backend: Backend, max_rows: int) -> Exactness:
    """Measure whether neighbours, or cuts in time, change a sequence's numbers.

    The same sequences run alone, beside neighbours of LOUDNESS times their size and of NaN, in a batch of max_rows, and
    cut into chunks. A model that takes one sequence at a time is `coupled`, whatever others would do to it.
    """
    return _Probe(backend).measure(min(max_rows, backend.spec.max_batch or max_rows))


class _Probe:
    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.graph = backend.graph
        self.spec = backend.spec

    def measure(self, max_rows: int) -> Exactness:
        per_step = {LENGTHS, *(t.name for t in self.graph.inputs if t.layout is Layout.PER_STEP)}
        batch_error = chunk_error = 0.0
        rng = np.random.default_rng(0)
        quiet = self._sample(rng, PROBE_STEPS)
        alone = self._run_padded([quiet])[0]
        for neighbours in self._neighbours(rng, quiet) if max_rows > 1 else []:
            neighbours = neighbours[: max_rows - 1]
            batch_error = max(batch_error, _difference(alone, self._run_padded([*neighbours, quiet])[-1]))
        brief = {name: rows[:2] if name in per_step else rows for name, rows in quiet.items()}
        crowd = [brief] * max_rows  # as large as batches get: kernels block rows by their number
        batch_error = max(batch_error, _difference(self._run_padded([brief])[0], self._run_padded(crowd)[-1]))
        can_step = not self.backend.is_whole
        if can_step:
            for cuts in ([1] * PROBE_STEPS, [7, 1, 15]):
                chunk_error = max(chunk_error, _difference(alone, self._run_cut(quiet, cuts)))
        worst = max(batch_error, chunk_error)
        beside = f"largest relative difference beside neighbours {batch_error:.1e}"
        detail = (beside if max_rows > 1 else "it takes one sequence at a time; largest relative difference") + (
            f", cut into chunks {chunk_error:.1e}" if can_step else ""
        )
        verdict: Verdict = "exact" if worst == 0 else "rounding" if worst <= ROUNDING else "coupled"
        if max_rows == 1:
            verdict = "coupled"
        return Exactness(verdict, detail, chunk_error <= ROUNDING)

    def _sample(self, rng: np.random.Generator, steps: int) -> dict[str, Array]:
        """One sequence of plausible inputs, as long as the graph takes it: rows of the golden ones, in any order.

        LENGTHS has a one for each step.
        """
        steps = min(steps, self.graph.fixed_steps or steps)
        sequence: dict[str, Array] = {LENGTHS: np.ones(steps, dtype=np.int32)}
        for tensor in self.graph.inputs:
            rows = self._golden_rows(tensor)
            if len(rows):
                sequence[tensor.name] = rows[rng.integers(len(rows), size=steps)]
            else:
                sequence[tensor.name] = _random(rng, tensor, steps)
        return sequence

    def _golden_rows(self, tensor: TensorSpec) -> Array:
        """Finite golden rows [n, *row shape] of a per-step input; n is 0 where there are none."""
        mine = (each for each in self.spec.golden if self.spec.graphs[each.graph] is self.graph)
        golden = next((each.inputs.get(tensor.name) for each in mine), None)
        if golden is None or tensor.layout is not Layout.PER_STEP or tensor.dtype != "float32":
            return np.empty((0, *tensor.row_shape))
        rows = golden.array().reshape(-1, *tensor.row_shape)
        return rows[np.isfinite(rows).reshape(len(rows), -1).all(axis=1)]

    def _neighbours(self, rng: np.random.Generator, quiet: dict[str, Array]) -> list[list[dict[str, Array]]]:
        floats = [t.name for t in self.graph.inputs if t.dtype == "float32"]
        loud = {n: v * np.float32(LOUDNESS) if n in floats else v for n, v in quiet.items()}
        broken = {n: np.full_like(v, np.nan) if n in floats else v for n, v in quiet.items()}
        others = [self._sample(rng, steps) for steps in (1, PROBE_STEPS, 2 * PROBE_STEPS, 5)]
        return [[loud], [broken], others, [*others, loud, broken] * 3]

    def _begin(self, num: int) -> list[Array]:
        """States that sequences begin with."""
        rows = (np.zeros(s.row_shape, s.dtype) if s.begins is None else s.begins.array() for s in self.graph.states)
        return [np.repeat(row[None], num, axis=0) for row in rows]

    def _run_padded(self, sequences: list[dict[str, Array]]) -> list[list[Array]]:
        """Run sequences as one batch; returns each one's outputs and final states, unpadded."""
        lengths = np.array([len(s[LENGTHS]) for s in sequences], dtype=np.int32)
        inputs = {}
        for tensor in self.graph.inputs:
            rows = [s[tensor.name] for s in sequences]
            if tensor.layout is Layout.SHARED:
                inputs[tensor.name] = rows[0]
            elif tensor.layout is Layout.PER_SEQUENCE:
                inputs[tensor.name] = np.stack(rows)
            else:
                counts = np.array([len(x) for x in rows], dtype=np.int32)
                batch = np.zeros((len(rows), counts.max(), *tensor.row_shape), dtype=tensor.dtype)
                for row, x in zip(batch, rows, strict=True):
                    row[: len(x)] = x
                inputs[tensor.name] = batch
                if tensor.layout is Layout.PER_SOURCE_STEP:
                    inputs[SOURCE_LENGTHS] = counts
        states = self._begin(len(sequences))
        outputs, final = self.backend.run(inputs, lengths, states)
        is_per_step = [t.layout is Layout.PER_STEP for t in self.graph.outputs]
        return [
            [v[i, : lengths[i]] if steps else v[i] for v, steps in zip(outputs, is_per_step, strict=True)]
            + [v[i] for v in final]
            for i in range(len(sequences))
        ]

    def _run_cut(self, sequence: dict[str, Array], cuts: list[int]) -> list[Array]:
        """Run one sequence chunk by chunk; returns its outputs and final states."""
        states = self._begin(1)
        parts: list[list[Array]] = []
        start = 0
        for cut in cuts:
            inputs = {
                t.name: sequence[t.name][None, start : start + cut]
                if t.layout is Layout.PER_STEP
                else sequence[t.name]
                if t.layout is Layout.SHARED
                else sequence[t.name][None]
                for t in self.graph.inputs
            }
            if sources := [x for t, x in zip(self.graph.inputs, inputs.values(), strict=True) if _is_source(t)]:
                inputs[SOURCE_LENGTHS] = np.array([sources[0].shape[1]], dtype=np.int32)
            outputs, states = self.backend.run(inputs, np.array([cut], dtype=np.int32), states)
            parts.append([v[0] for v in outputs])
            start += cut
        joined = [
            np.concatenate(column) if t.layout is Layout.PER_STEP else column[-1]
            for t, column in zip(self.graph.outputs, zip(*parts, strict=True), strict=True)
        ]
        return joined + [s[0] for s in states]


def _is_source(tensor: TensorSpec) -> bool:
    return tensor.layout is Layout.PER_SOURCE_STEP


def _random(rng: np.random.Generator, tensor: TensorSpec, steps: int) -> Array:
    """Random values of an input of one sequence."""
    has_steps = tensor.layout in (Layout.PER_STEP, Layout.PER_SOURCE_STEP)
    shape = (steps, *tensor.row_shape) if has_steps else tensor.row_shape
    return random_values(rng, tensor.dtype, shape, tensor.num_ids)


def random_values(rng: np.random.Generator, dtype: str, shape: Sequence[int], num_ids: int | None) -> Array:
    """Random values of a dtype: ids in [0, num_ids), standard normal numbers, or truths."""
    if dtype in ("int64", "int32"):
        return np.asarray(rng.integers(num_ids or 2, size=shape), dtype)
    return np.asarray(rng.integers(2, size=shape) if dtype == "bool" else rng.standard_normal(shape), dtype)


def _difference(ours: list[Array], theirs: list[Array]) -> float:
    """Largest difference relative to the largest value; infinite where NaN stands against a number."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if np.array_equal(a, b, equal_nan=True):
            continue
        if a.shape != b.shape or (np.isnan(a) != np.isnan(b)).any():
            return np.inf
        scale = float(np.nanmax(np.abs(a))) or 1.0
        worst = max(worst, float(np.nanmax(np.abs(a - b))) / scale)
    return worst
