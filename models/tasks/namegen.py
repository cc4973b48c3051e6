"""Names: a first name, character by character, for a girl or a boy (one-to-many, autoregressive).

Source: see data/README.md (names.npz). A name belongs to one split, in both lists if it is in both: of ten parts by a
checksum of its letters, one tests and one validates. Names count alike, however many people have them.
"""

from __future__ import annotations

import string
import zlib
from collections.abc import Callable

import numpy as np

from models.options import PRESETS
from models.recipe import Recipe
from models.spec import Generation, Layout, TensorSpec
from models.tasks.base import Array, read
from models.tasks.examples import Examples
from models.tasks.generating import LOG_PROBS, TOKEN, TextTask

LABELS = {"female": "<girl>", "male": "<boy>"}
"""Lists, and what is fed first for a name of each."""
VOCABULARY = ("<end>", *LABELS.values(), *string.ascii_lowercase)
END = 0
MAX_CHARACTERS = 20
_PARTS = 10


def task() -> TextTask:
    """Load the task."""
    arrays = read("names")
    return TextTask(
        name="namegen",
        summary="a first name, character by character, for a girl or a boy",
        topology="one-to-many",
        data_set="First names of the 1990 census of the United States, from the names package",
        license="public domain",
        token=TensorSpec(
            name=TOKEN,
            dtype="int64",
            layout=Layout.PER_STEP,
            description="<girl> or <boy>, then the character that was chosen last",
            num_ids=len(VOCABULARY),
        ),
        output=TensorSpec(
            name=LOG_PROBS,
            dtype="float32",
            row_shape=(len(VOCABULARY),),
            layout=Layout.PER_STEP,
            description="log-probability of each character to be the next",
            element_names=VOCABULARY,
        ),
        vocabulary=VOCABULARY,
        generation=Generation(max_steps=MAX_CHARACTERS, token_input=TOKEN, scores_output=LOG_PROBS, end_id=END),
        train=_names(arrays, lambda part: part > 1),
        validation=_names(arrays, lambda part: part == 1),
        test=_names(arrays, lambda part: part == 0),
        recipe=Recipe(
            hidden=96,
            embedding=24,
            output_dropout=0.4,
            epochs=60,
            patience=10,
            batch_size=32,
            lr=3e-3,
            schedule="cosine",
        ).changed(**PRESETS["torch"]),
    )


def ids(text: str) -> Array:
    """The ids of a name's characters, [length] int64."""
    return np.array([VOCABULARY.index(each) for each in text], dtype=np.int64)


def _names(arrays: dict[str, Array], is_chosen: Callable[[int], bool]) -> Examples:
    """Ask for the names of both lists that lie in some of the parts."""
    chosen = [
        (VOCABULARY.index(label), name.decode().lower())
        for which, label in LABELS.items()
        for name in arrays[f"{which}_names"].tolist()
        if is_chosen(zlib.crc32(name) % _PARTS)
    ]
    return Examples(
        targets=tuple(ids(name) for _, name in chosen),
        prompts=tuple(np.array([label]) for label, _ in chosen),
    )
