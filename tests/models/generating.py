"""Small tasks of sequences to generate that more than one test file uses."""

import numpy as np

from models.recipe import Recipe
from models.spec import Generation, Layout, TensorSpec
from models.tasks.base import per_step
from models.tasks.examples import Examples
from models.tasks.generating import LOG_PROBS, TOKEN, CurveTask, TextTask, TransductionTask

LETTERS = ("", "a", "b", "c", "d")
VOCABULARY = ("<begin>", "<end>", "A", "B", "C", "D")
BEGIN, END = 0, 1
FIRST = 2
"""Id of the first word of the answers."""


def token_specs(vocabulary):
    token = TensorSpec(name=TOKEN, dtype="int64", layout=Layout.PER_STEP, num_ids=len(vocabulary))
    output = TensorSpec(name=LOG_PROBS, dtype="float32", row_shape=(len(vocabulary),), layout=Layout.PER_STEP)
    return {"token": token, "output": output, "vocabulary": vocabulary}


def curves(seed=0, **settings):
    """One of two curves of six steps, with noise, far from zero."""
    rng = np.random.default_rng(seed)
    shapes = 40 + 5 * np.stack([np.sin(np.arange(6)), np.cos(np.arange(6))])

    def split(count):
        kinds = np.arange(count) % 2
        targets = (shapes[kinds] + rng.normal(scale=0.5, size=(count, 6)))[:, :, None].astype(np.float32)
        return Examples(targets=tuple(targets), contexts=tuple(np.eye(2, dtype=np.float32)[kinds]))

    context = TensorSpec(name="kind", dtype="float32", row_shape=(2,), layout=Layout.PER_SEQUENCE)
    defaults = {"hidden": 12, "epochs": 30, "batch_size": 8, "lr": 2e-2}
    return CurveTask(
        name="curves",
        summary="one of two curves",
        topology="one-to-many",
        data_set="made up",
        license="none",
        context=context,
        output=per_step("y", ("value",), unit="m", description="a value"),
        generation=Generation(max_steps=6),
        train=split(40),
        validation=split(10),
        test=split(20),
        recipe=Recipe(**defaults | settings),
    )


def words(seed=0, **settings):
    """Palindromes of three letters or four, as the prompt says: two letters do not tell what the last has to be."""
    rng = np.random.default_rng(seed)
    vocabulary = ("<end>", "<three>", "<four>", "a", "b", "c", "d", "e", "f")

    def split(count):
        prompts = tuple(np.array([1 + number % 2]) for number in range(count))
        pairs = rng.integers(3, 9, size=(count, 2))
        targets = tuple(np.array([x, y, x] if number % 2 == 0 else [x, y, y, x]) for number, (x, y) in enumerate(pairs))
        return Examples(targets=targets, prompts=prompts)

    defaults = {"hidden": 16, "embedding": 8, "epochs": 25, "batch_size": 16, "lr": 2e-2}
    return TextTask(
        name="words",
        summary="palindromes",
        topology="one-to-many",
        data_set="made up",
        license="none",
        **token_specs(vocabulary),
        generation=Generation(max_steps=6, token_input=TOKEN, scores_output=LOG_PROBS, end_id=0),
        train=split(200),
        validation=split(40),
        test=split(80),
        recipe=Recipe(**defaults | settings),
    )


def backwards(seed=0, **settings):
    """A word read backwards, in capitals: what no letter by letter rule can do."""
    rng = np.random.default_rng(seed)

    def split(count):
        sources = [rng.integers(1, 5, size=rng.integers(1, 5)) for _ in range(count)]
        targets = tuple(source[::-1] - 1 + FIRST for source in sources)
        return Examples(targets=targets, prompts=(np.array([BEGIN]),) * count, sources=tuple(sources))

    source = TensorSpec(name="x", dtype="int64", layout=Layout.PER_STEP, num_ids=len(LETTERS), categories=LETTERS)
    defaults = {"hidden": 24, "embedding": 8, "epochs": 12, "batch_size": 16, "lr": 2e-2, "bidirectional": True}
    return TransductionTask(
        name="backwards",
        summary="a word read backwards",
        topology="encoder-decoder",
        data_set="made up",
        license="none",
        source_input=source,
        **token_specs(VOCABULARY),
        generation=Generation(
            max_steps=8, token_input=TOKEN, scores_output=LOG_PROBS, begin_id=BEGIN, end_id=END, separator=" "
        ),
        symbol_name="letter",
        sequence_name="word",
        train=split(300),
        validation=split(60),
        test=split(100),
        recipe=Recipe(**defaults | settings),
    )


TASKS = {"curves": curves, "words": words, "backwards": backwards}
