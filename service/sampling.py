"""Chooses the next id of each sequence from its log-probabilities.

Laws:

draw n of a sequence depends on its seed and n alone, and a choice on its own row: neighbours never change it
without temperature it is the likeliest id, of several the lowest
what is drawn is among the top_k likeliest ids, and among the fewest of those whose probabilities reach top_p
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]
BLOCK = 64
"""Draws of a sequence that are made at a time."""
_COUNTS = BLOCK // 4
"""How far Philox's counter is moved by a block: it makes four numbers at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How ids are chosen."""

    temperature: float = 0.0
    """What log-probabilities are divided by; 0 chooses the likeliest."""
    top_k: int = 0
    """So many of the likeliest may be drawn; 0: all."""
    top_p: float = 0.0
    """The fewest likeliest that have this probability together may be drawn; 0: all."""


class Draws:
    """Numbers in [0, 1) of one sequence. Source: Philox 4x64 (Salmon et al., 2011), keyed by the seed."""

    __slots__ = ("_block", "_number", "_seed")

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._number = -1
        self._block: list[float] = []

    def at(self, position: int) -> float:
        """Draw of one position: 53 bits."""
        number, place = divmod(position, BLOCK)
        if number != self._number:
            raw = np.random.Philox(key=self._seed, counter=number * _COUNTS).random_raw(BLOCK)
            self._block = ((raw >> np.uint64(11)) * 2.0**-53).tolist()
            self._number = number
        return self._block[place]


def choose(log_probs: Array, choice: Choice, draws: Array | None) -> Ids:
    """Choose an id for each row.

    log_probs  [rows, ids] natural; none is NaN
    draws      [rows] in [0, 1); None where temperature is 0
    """
    if draws is None:
        likeliest: Ids = log_probs.argmax(axis=1)
        return likeliest
    scores = log_probs.astype(np.float64) / choice.temperature
    scores -= scores.max(axis=1, keepdims=True)
    weights = np.exp(scores)
    num_ids = weights.shape[1]
    is_cut = 0 < choice.top_k < num_ids
    if is_cut or choice.top_p:
        order = np.argsort(-weights, axis=1, kind="stable")  # of equal ones the lowest id first
        ranked = np.take_along_axis(weights, order, axis=1)
        if is_cut:
            ranked[:, choice.top_k :] = 0.0
        if choice.top_p:
            before = np.cumsum(ranked, axis=1) - ranked
            ranked[before >= choice.top_p * ranked.sum(axis=1, keepdims=True)] = 0.0
        np.put_along_axis(weights, order, ranked, axis=1)
    sums = np.cumsum(weights, axis=1)
    wanted = draws[:, None] * sums[:, -1:]
    # The first id whose sum is beyond the draw; rounding must not lead past the last one that may be drawn.
    last = num_ids - 1 - np.argmax(weights[:, ::-1] > 0, axis=1)
    drawn: Ids = np.minimum((sums <= wanted).sum(axis=1), last)
    return drawn
