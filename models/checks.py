"""How answers are compared: with one another, and whole against cut in chunks. Numpy only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from models.quantization import Quantization
from models.runtime import Array, Named
from models.spec import LENGTHS, GraphSpec, Layout

TOLERANCE = 1e-5
"""Largest difference between two runtimes' answers, absolute below 1 and relative to the value above."""
MAX_TOLERANCE = 1e-3
"""What it may grow to for a model that makes more of a rounding error."""
ROUNDED_TOLERANCE = 2 / 127
"""What it is for a model that rounds states to integers: two of their steps. A state next to the border of two integers
falls on either side of it, by a rounding error; and on another CPU, on the other side."""


def widest_tolerance(quantization: Quantization | None) -> float:
    """Say what the tolerance of a model may grow to."""
    rounds_states = quantization is not None and quantization.form != "weights"
    return ROUNDED_TOLERANCE if rounds_states else MAX_TOLERANCE


@dataclass(frozen=True, slots=True)
class Difference:
    """How far an array is from what it should be."""

    scaled: float
    """Largest difference, divided by the expected value's size where that is above 1; compare it with TOLERANCE."""
    absolute: float
    """Largest difference."""
    where: tuple[int, ...]
    """Index of the largest scaled difference."""


def differ(found: Array, expected: Array) -> Difference:
    """Compare arrays; another shape, or a number that is not finite on one side alone, is infinitely far."""
    if found.shape != expected.shape:
        return Difference(float("inf"), float("inf"), ())
    if not expected.size:
        return Difference(0.0, 0.0, ())
    with np.errstate(invalid="ignore"):
        gaps = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    gaps = np.where((found == expected) | (np.isnan(found) & np.isnan(expected)), 0.0, gaps)
    gaps = np.where(np.isnan(gaps), np.inf, gaps)
    size = np.where(np.isfinite(expected), np.maximum(np.abs(expected), 1.0), 1.0)
    scaled = gaps / size
    where = np.unravel_index(int(np.argmax(scaled)), scaled.shape)
    return Difference(float(scaled[where]), float(gaps.max()), tuple(int(i) for i in where))


def without_padding(graph: GraphSpec, answers: Named, lengths: Array) -> dict[str, Array]:
    """Zero the rows of per-step outputs past each row's length: what they hold is not specified.

    answers  by name, batch first; lengths [batch]
    """
    per_step = {output.name for output in graph.outputs if output.layout is Layout.PER_STEP}
    cleaned = dict(answers)
    for name in per_step & answers.keys():
        array = answers[name]
        within = np.arange(array.shape[1]) < lengths[:, None]
        cleaned[name] = np.where(within.reshape(*within.shape, *(1,) * (array.ndim - 2)), array, np.zeros_like(array))
    return cleaned


def random_cuts(rng: np.random.Generator, lengths: Array, num_chunks: int) -> Array:
    """Cut sequences at random into chunks of at least one step; returns the chunks' lengths, [num_chunks, batch]."""
    cuts = []
    for length in lengths.tolist():
        ends = np.sort(rng.choice(np.arange(1, length), size=num_chunks - 1, replace=False))
        cuts.append(np.diff([0, *ends, length]))
    return np.stack(cuts, axis=1).astype(np.int32)


def run_in_chunks(
    run: Callable[[Named], dict[str, Array]], graph: GraphSpec, inputs: Named, cuts: Array
) -> dict[str, Array]:
    """Run a batch chunk by chunk, the states carried on, as a stream of a causal model is.

    inputs  every input of the graph by name, batch first
    cuts    [num_chunks, batch], steps of each row in each chunk
    Returns every output as a run over whole sequences gives it: per-step ones put together, padding zeroed, and the
    states after the last chunk.
    """
    per_step_in = [tensor.name for tensor in graph.inputs if tensor.layout is Layout.PER_STEP]
    longest = int(cuts.sum(axis=0).max())
    per_step_out = [tensor.name for tensor in graph.outputs if tensor.layout is Layout.PER_STEP]
    feeds, answers = dict(inputs), dict[str, Array]()
    starts = np.zeros_like(cuts[0])
    together: dict[str, Array] = {}
    for chunk in cuts:
        # Rows are shorter than the longest by different amounts: gather each one's own steps, its last as padding.
        steps = starts[:, None] + np.minimum(np.arange(chunk.max()), chunk[:, None] - 1)
        rows = np.arange(len(chunk))[:, None]
        feeds |= {name: inputs[name][rows, steps] for name in per_step_in} | {LENGTHS: chunk}
        answers = run(feeds)
        within = np.arange(chunk.max()) < chunk[:, None]
        for name in per_step_out:
            if name not in together:
                together[name] = np.zeros((len(chunk), longest, *answers[name].shape[2:]), answers[name].dtype)
            row, step = np.nonzero(within)
            together[name][row, starts[row] + step] = answers[name][row, step]
        feeds |= {state.name: answers[state.next_name] for state in graph.states}
        starts = starts + chunk
    return answers | together
