"""Japanese Vowels: which of nine speakers says this, from 7 to 29 frames of speech (many-to-one, ragged).

Source: see data/README.md. The official split is kept: 30 utterances of each speaker to train on, 370 recorded on other
occasions to test on. Validation is each speaker's last six training utterances: a block, not a random pick, since
neighbours resemble each other and the test utterances have none in training.

The recipe was chosen by five-fold cross-validation over such blocks of the training utterances. Shifting a whole
utterance did most: it makes up for what differs between two occasions.
"""

from __future__ import annotations

import numpy as np

from models.options import PRESETS
from models.recipe import Recipe
from models.tasks.base import Array, Split, Task, per_step, read

NUM_SPEAKERS = 9
NUM_VALIDATION = 6
"""Utterances of each speaker held out of training to choose by."""


def task() -> Task:
    """Load the task."""
    arrays = read("vowels")
    train, test = _utterances(arrays, "train"), _utterances(arrays, "test")
    held_out = np.zeros(len(train), dtype=bool)
    speakers = np.array(train.targets)
    for speaker in range(NUM_SPEAKERS):
        held_out[np.flatnonzero(speakers == speaker)[-NUM_VALIDATION:]] = True
    labels = tuple(f"speaker {number}" for number in range(1, NUM_SPEAKERS + 1))
    return Task(
        name="vowels",
        summary="which of nine speakers says the vowels /ae/, from 7 to 29 frames of speech",
        topology="many-to-one",
        kind="classification",
        data_set="Japanese Vowels (Kudo, Toyama, Shimbo), UCI Machine Learning Repository, doi:10.24432/C5NS47",
        license="CC BY 4.0",
        input=per_step(
            "x",
            tuple(f"lpc_{number}" for number in range(1, 13)),
            unit="",
            description="LPC cepstrum coefficients of a frame of speech, 25.6 ms long, one every 6.4 ms",
        ),
        output=per_step(
            "y", labels, unit="", description="probability of each speaker; a causal model judges by the frames so far"
        ),
        labels=labels,
        train=_pick(train, ~held_out),
        validation=_pick(train, held_out),
        test=test,
        recipe=Recipe(noise=0.3, shift=0.5, step_loss=0.3, lr=6e-3, epochs=120, patience=30).changed(
            **PRESETS["torch"]
        ),
    )


def _utterances(arrays: dict[str, Array], split: str) -> Split:
    ends = np.cumsum(arrays[f"{split}_lengths"])[:-1]
    return Split(tuple(np.split(arrays[f"{split}_frames"], ends)), tuple(arrays[f"{split}_speakers"]))


def _pick(split: Split, chosen: Array) -> Split:
    numbers = np.flatnonzero(chosen)
    return Split(tuple(split.inputs[n] for n in numbers), tuple(split.targets[n] for n in numbers))
