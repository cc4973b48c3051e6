"""Letters to phonemes without a net: which phonemes each letter stands for, and what it usually does in its context.

Source: the many-to-many alignment of Jiampojamarn, Kondrak and Sherif (2007), "Applying many-to-many alignments and
hidden Markov models to letter-to-phoneme conversion", in its simplest form: a letter stands for none, one or two
phonemes, and the best alignment is taken for the true one (Viterbi training).
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict

import numpy as np

from models.tasks.base import Array
from models.tasks.examples import Examples

MOST_PHONEMES = 2
"""Phonemes that a letter stands for at most."""
_ROUNDS = 4
WIDEST = 3
"""Letters on each side that a rule looks at, at most."""
_SMOOTHING = 0.1


class Rules:
    """What each letter stands for in the context that was seen most often."""

    def __init__(self, examples: Examples) -> None:
        """Align pairs of sources and targets, and count; those that cannot be aligned are left out."""
        aligned = align(examples)
        counts: dict[tuple[int, ...], Counter[tuple[int, ...]]] = defaultdict(Counter)
        for number, sizes in aligned.items():
            target, begin = examples.targets[number].tolist(), 0
            for contexts, size in zip(_contexts(examples.sources[number]), sizes.tolist(), strict=True):
                for context in contexts:
                    counts[context][tuple(target[begin : begin + size])] += 1
                begin += size
        self._usual = {context: chunks.most_common(1)[0][0] for context, chunks in counts.items()}

    def __call__(self, source: Array, widest: int = WIDEST) -> Array:
        """Answer a source, [length] ids; each letter by the widest context that was seen, up to a limit."""
        answer: list[int] = []
        for contexts in _contexts(source):
            tried = contexts[WIDEST - widest :]
            answer += next((self._usual[context] for context in tried if context in self._usual), ())
        return np.array(answer, dtype=np.int64)


@functools.lru_cache(maxsize=2)
def rules_of(examples: Examples) -> Rules:
    """The rules of a split; they are asked for once for every split that is scored."""
    return Rules(examples)


def align(examples: Examples) -> dict[int, Array]:
    """Find how many ids of the target each id of the source stands for, [source length], by number of the example."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, (source, target) in enumerate(zip(examples.sources, examples.targets, strict=True)):
        if 0 < len(target) <= MOST_PHONEMES * len(source):
            groups[len(source), len(target)].append(number)
    batches = [
        (numbers, np.stack([examples.sources[n] for n in numbers]), np.stack([examples.targets[n] for n in numbers]))
        for numbers in groups.values()
    ]
    num_letters = 1 + max(int(sources.max()) for _, sources, _ in batches)
    num_ids = 1 + max(int(targets.max()) for _, _, targets in batches)
    scores = _first_scores(batches, num_letters, num_ids)
    sizes: dict[int, Array] = {}
    for _ in range(_ROUNDS):
        counts = [np.full_like(table, _SMOOTHING) for table in scores]
        for numbers, sources, targets in batches:
            of_batch = _best_path(scores, sources, targets)
            sizes |= dict(zip(numbers, of_batch, strict=True))
            ends = of_batch.cumsum(axis=1)
            # The target's last id, repeated, where a letter stands for fewer: those are not counted.
            first, second = (
                np.take_along_axis(targets, (ends - back).clip(0, targets.shape[1] - 1), axis=1) for back in (2, 1)
            )
            for size, table in enumerate(counts):
                chosen = of_batch == size
                np.add.at(table, (sources[chosen], second[chosen], first[chosen])[: 1 + size][: table.ndim], 1.0)
        # A pair's table is indexed by its last id, then its first.
        total = sum(table.reshape(num_letters, -1).sum(axis=1) for table in counts)
        scores = [np.log(table / total.reshape(-1, *(1,) * (table.ndim - 1))) for table in counts]
    return sizes


def _first_scores(batches: list[tuple[list[int], Array, Array]], num_letters: int, num_ids: int) -> list[Array]:
    """Begin with how often a letter and an id lie at about the same place of a pair."""
    together = np.full((num_letters, num_ids), _SMOOTHING)
    for _, sources, targets in batches:
        length, asked = sources.shape[1], targets.shape[1]
        near = np.arange(length) * asked // length
        np.add.at(together, (sources, targets[:, near]), 1.0)
    one = np.log(together / together.sum(axis=1, keepdims=True))
    none = np.full(num_letters, np.log(1.0 / num_ids))
    return [none, one, one[:, :, None] + one[:, None, :]]


def _best_path(scores: list[Array], sources: Array, targets: Array) -> Array:
    """Choose how many ids each letter stands for; sources [n, length], targets [n, asked]; returns [n, length]."""
    count, length = sources.shape
    asked = targets.shape[1]
    none, one, two = scores
    best = np.full((count, asked + 1), -np.inf)
    best[:, 0] = 0.0
    choices = np.zeros((length, count, asked + 1), dtype=np.int64)
    for step in range(length):
        letter = sources[:, step]
        candidates = np.full((3, count, asked + 1), -np.inf)
        candidates[0] = best + none[letter][:, None]
        candidates[1, :, 1:] = best[:, :-1] + one[letter[:, None], targets]
        candidates[2, :, 2:] = best[:, :-2] + two[letter[:, None], targets[:, 1:], targets[:, :-1]]
        choices[step] = candidates.argmax(axis=0)
        best = candidates.max(axis=0)
    sizes = np.zeros((count, length), dtype=np.int64)
    left = np.full(count, asked)
    for step in range(length - 1, -1, -1):
        sizes[:, step] = choices[step, np.arange(count), left]
        left -= sizes[:, step]
    return sizes


def _contexts(source: Array) -> list[list[tuple[int, ...]]]:
    """The contexts of every letter, the widest first: windows around it, -1 past the ends."""
    padded = [-1] * WIDEST + source.tolist() + [-1] * WIDEST
    return [
        [tuple(padded[at - window : at + window + 1]) for window in range(WIDEST, -1, -1)]
        for at in range(WIDEST, WIDEST + len(source))
    ]
