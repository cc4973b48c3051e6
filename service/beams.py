"""Beam search for the likeliest ids of one sequence. Pure: it is given log-probabilities, and says whose state goes on.

Laws:

    a live path's total is the sum of the log-probabilities of its ids, in float64
    of equal candidates those of the better path go first, and of one path those of the lower ids
    it is over when no live path can become one of the hypotheses that are wanted, or at max_steps
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Path:
    """Ids that were chosen one after another."""

    ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    """Of each id."""
    total: float = 0.0
    """Log-probability of all, the ending id's included."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A path that is a result."""

    path: Path
    score: float
    """What results are ranked by."""
    is_ended: bool
    """Whether the model chose its ending id."""


class BeamSearch:
    """One sequence's search."""

    def __init__(
        self, *, width: int, num_wanted: int, max_steps: int, end_id: int | None, normalization: float = 0.0
    ) -> None:
        """Begin with one empty path.

        width          most live paths
        num_wanted     results, at most width
        max_steps      most ids of a path
        normalization  power of the number of ids, the end included, that a total is divided by to be a score
        """
        self.live: list[Path] = [Path()]
        """Best first."""
        self._width = width
        self._num_wanted = num_wanted
        self._max_steps = max_steps
        self._end_id = end_id
        self._normalization = normalization
        self._found: list[Hypothesis] = []  # best first

    def advance(self, log_probs: Array) -> list[int]:
        """Take what may follow each live path.

        log_probs  [live, ids] of the next id
        Returns, for each path that is live now, the number of the one that it goes on from.
        """
        totals = np.array([path.total for path in self.live])[:, None] + log_probs.astype(np.float64)
        num_ids = log_probs.shape[1]
        flat = totals.ravel()
        best = np.argsort(-flat, kind="stable")[: 2 * self._width].tolist()  # at most one in each path ends it
        parents: list[int] = []
        live: list[Path] = []
        for rank, candidate in enumerate(best):
            parent, chosen = divmod(candidate, num_ids)
            total = float(flat[candidate])
            if total == -np.inf or len(live) == self._width:
                break
            before = self.live[parent]
            if chosen == self._end_id:
                if rank < self._width:
                    self._keep(Path(before.ids, before.log_probs, total), is_ended=True)
                continue
            log_prob = float(log_probs[parent, chosen])
            live.append(Path((*before.ids, chosen), (*before.log_probs, log_prob), total))
            parents.append(parent)
        self.live = live
        if live and len(live[0].ids) == self._max_steps:
            for path in live:
                self._keep(path, is_ended=False)
            self.live = []
        elif live and len(self._found) >= self._num_wanted:
            # A total only falls: the best that a path can reach is its own, over as many ids as there may be.
            reachable = self._score(live[0].total, self._max_steps + 1)
            if reachable <= self._found[self._num_wanted - 1].score:
                self.live = []
        return parents if self.live else []

    @property
    def results(self) -> list[Hypothesis]:
        """The best hypotheses that were found, best first."""
        return self._found[: self._num_wanted]

    def _keep(self, path: Path, *, is_ended: bool) -> None:
        found = Hypothesis(path, self._score(path.total, len(path.ids) + is_ended), is_ended)
        self._found.append(found)
        self._found.sort(key=lambda each: -each.score)  # stable: what was found first stays before its equals

    def _score(self, total: float, num_ids: int) -> float:
        return total / num_ids**self._normalization if self._normalization else total
