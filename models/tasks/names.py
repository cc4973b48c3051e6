"""First names: which of two census lists a name is from, letter by letter (text, many-to-one, ragged).

Source: see data/README.md. A name that is in both lists has the label of the one where more of the people have it; the
three that are as frequent in one as in the other are left out. So every name is there once, in one split: of each
label, 15% validate and 15% test, drawn by a seed that is fixed. Names that differ in a letter may be in two splits, as
a new name may resemble a known one.

Four names of five are women's, so classes are weighted, and what counts is the accuracy averaged over both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.recipe import Recipe
from models.spec import Layout, TensorSpec
from models.tasks.base import Array, Categorical, Split, Task, per_step, read

LABELS = ("female", "male")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
HELD_OUT = 0.15
"""Share of each label's names that validate, and that test."""
SPLIT_SEED = 0
LONGEST_ENDING = 3
"""Letters of the longest ending that a rival goes by."""


def task() -> Task:
    """Load the task."""
    names, classes = labelled(read("names"))
    parts = _deal(classes)
    train = parts == 0
    weights = np.bincount(classes[train]).sum() / (len(LABELS) * np.bincount(classes[train]))
    endings = {
        "the last letter": Endings(names[train], classes[train], weights, longest=1),
        f"the last {LONGEST_ENDING} letters": Endings(names[train], classes[train], weights, longest=LONGEST_ENDING),
    }

    def split(part: int) -> Split:
        chosen = names[parts == part].tolist()
        return Split(
            inputs=tuple(np.zeros((len(name), 0), dtype=np.float32) for name in chosen),
            targets=tuple(classes[parts == part]),
            ids=tuple(np.array([[LETTERS.index(letter) + 1] for letter in name], dtype=np.int64) for name in chosen),
            rivals={rival: tuple(each.scores(chosen)) for rival, each in endings.items()},
        )

    letter = TensorSpec(
        name="letter",
        dtype="int64",
        layout=Layout.PER_STEP,
        description="a letter of the name, a capital from A to Z; 0 is any other character",
        num_ids=len(LETTERS) + 1,
        categories=("", *LETTERS),
    )
    return Task(
        name="names",
        summary="which of two census lists a first name is from",
        topology="many-to-one",
        kind="classification",
        data_set="First names of the US census of 1990, from the names package",
        license="public domain",
        input=None,
        categorical=(Categorical(spec=letter, encoding="one-hot", width=len(LETTERS)),),
        output=per_step(
            "y", LABELS, unit="", description="probability of each list; a causal model judges by the letters so far"
        ),
        labels=LABELS,
        class_weights=tuple(weights.tolist()),
        train=split(0),
        validation=split(1),
        test=split(2),
        recipe=Recipe(hidden=64, output_dropout=0.3, lr=3e-3, epochs=60, patience=10),
    )


def labelled(arrays: dict[str, Array]) -> tuple[Array, Array]:
    """Give every name one label. Returns (names [names] text, in the order of the alphabet; classes [names] int64)."""
    percent: dict[str, dict[str, float]] = {}
    for label in LABELS:
        for name, share in zip(arrays[f"{label}_names"].astype(str).tolist(), arrays[f"{label}_percent"], strict=True):
            percent.setdefault(name, {})[label] = float(share)
    shares = {name: [percent[name].get(label, 0.0) for label in LABELS] for name in sorted(percent)}
    names = [name for name, (women, men) in shares.items() if women != men]
    return np.array(names), np.array([int(np.argmax(shares[name])) for name in names], dtype=np.int64)


class Endings:
    """Judges a name by the longest of its endings that names to train on have, the weighted counts of each class."""

    def __init__(self, names: Array, classes: Array, weights: Array, *, longest: int) -> None:
        self.longest = longest
        self.counts: dict[str, Array] = {}
        for name, label in zip(names.tolist(), classes.tolist(), strict=True):
            for length in range(min(longest, len(name)) + 1):
                counts = self.counts.setdefault(name[len(name) - length :], np.zeros(len(LABELS)))
                counts[label] += weights[label]

    def scores(self, names: Sequence[str]) -> list[Array]:
        """Scores of each class, [classes], for every name; the empty ending is known always."""
        endings = ([name[-length:] for length in range(self.longest, 0, -1)] + [""] for name in names)
        return [next(self.counts[each] for each in tried if each in self.counts) for tried in endings]


def _deal(classes: Array) -> Array:
    """Draw the part of every name, [names]: 0 to train, 1 to validate, 2 to test."""
    rng = np.random.default_rng(SPLIT_SEED)
    parts = np.zeros(len(classes), dtype=np.int64)
    for label in range(len(LABELS)):
        drawn = rng.permutation(np.flatnonzero(classes == label))
        size = round(len(drawn) * HELD_OUT)
        parts[drawn[:size]], parts[drawn[size : 2 * size]] = 1, 2
    return parts
