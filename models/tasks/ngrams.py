"""N-grams of ids: what a net that foretells them has to beat. Torch-free."""

from __future__ import annotations

import math

from models.tasks.examples import Examples


class NGrams:
    """Interpolated n-grams of ids, the prompt's included.

    Source: Witten-Bell smoothing as in Chen and Goodman (1999), "An empirical study of smoothing techniques for
    language modeling"; the last to fall back on is the uniform distribution.
    """

    def __init__(self, examples: Examples, *, order: int, num_ids: int, end_id: int) -> None:
        self.order, self.num_ids, self.end_id = order, num_ids, end_id
        self.counts: dict[tuple[int, ...], dict[int, int]] = {}
        for ids, begins in self._sequences(examples):
            for at in range(begins, len(ids)):
                for start in range(max(at - order + 1, 0), at + 1):
                    after = self.counts.setdefault(tuple(ids[start:at]), {})
                    after[ids[at]] = after.get(ids[at], 0) + 1

    def probability(self, before: tuple[int, ...], number: int) -> float:
        """Probability of an id after others."""
        shorter = self.probability(before[1:], number) if before else 1.0 / self.num_ids
        after = self.counts.get(before)
        if after is None:
            return shorter
        kinds, total = len(after), sum(after.values())
        return (after.get(number, 0) + kinds * shorter) / (total + kinds)

    def loss(self, examples: Examples) -> float:
        """Mean cross-entropy of targets and their ends, in nats."""
        losses = [
            -math.log(self.probability(tuple(ids[max(at - self.order + 1, 0) : at]), ids[at]))
            for ids, begins in self._sequences(examples)
            for at in range(begins, len(ids))
        ]
        return sum(losses) / len(losses)

    def _sequences(self, examples: Examples) -> list[tuple[list[int], int]]:
        """Each prompt, target and end, and where the target begins."""
        return [
            ([*prompt.tolist(), *target.tolist(), self.end_id], len(prompt))
            for prompt, target in zip(examples.prompts, examples.targets, strict=True)
        ]
