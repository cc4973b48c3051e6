"""Tasks whose answers are made one after another: what each sequence is made from, and how it is judged. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.spec import Generation, TensorSpec
from models.tasks.alignment import WIDEST, rules_of
from models.tasks.base import Array, BaseTask, spread
from models.tasks.examples import Examples
from models.tasks.ngrams import NGrams

TOKEN = "token"  # noqa: S105
"""Name of the input that takes the id that was chosen last."""
LOG_PROBS = "log_probs"
"""Name of the output that the next id is chosen by."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GenerationTask(BaseTask[Examples]):
    """Sequences to be generated."""

    generation: Generation
    """How outputs are made one after another."""

    @property
    def described(self) -> str:
        """What it is, in a line for people."""
        of_splits = (self.train, self.validation, self.test)
        lengths = np.concatenate([split.lengths for split in of_splits])
        counts = ", ".join(str(len(split)) for split in of_splits)
        return (
            f"{self.summary}; sequences of {lengths.min()} to {lengths.max()} steps: {counts} to train, validate and "
            "test on"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CurveTask(GenerationTask):
    """A curve that unrolls from one input, which every step shares (one-to-many)."""

    context: TensorSpec
    """The per-sequence input."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The per-sequence input."""
        return (self.context,)

    @property
    def score_unit(self) -> str:
        """Unit of the metrics."""
        return self.output.unit

    def scaling(self) -> dict[str, Array]:
        """Measure the training split, by name: mean and scale of context [features] and output [outputs], float32."""
        measured = {}
        for name, values in (
            ("context", np.stack(self.train.contexts)),
            ("output", np.concatenate(self.train.targets)),
        ):
            measured[f"{name}_mean"] = values.mean(axis=0).astype(np.float32)
            measured[f"{name}_scale"] = spread(values).astype(np.float32)
        return measured

    def judge(self, split: Examples, curves: Sequence[Array]) -> dict[str, float]:
        """Score curves, each [length, outputs] in raw units: mae and rmse, in the output's unit."""
        errors = np.concatenate(curves).astype(np.float64) - np.concatenate(split.targets)
        return {"mae": float(np.abs(errors).mean()), "rmse": float(np.sqrt((errors**2).mean()))}

    @property
    def metric(self) -> str:
        """The metric that counts most."""
        return "rmse"

    def baselines(self, split: Examples) -> dict[str, dict[str, float]]:
        """Score mean curves of training, all of one length: of all, and of those with the same input.

        The second is all that the input can tell.
        """
        targets, contexts = np.stack(self.train.targets), np.stack(self.train.contexts)
        same = [targets[(contexts == each).all(axis=1)].mean(axis=0) for each in split.contexts]
        return {
            "the mean curve": self.judge(split, [targets.mean(axis=0)] * len(split)),
            f"the mean curve of the {self.context.name}": self.judge(split, same),
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenTask(GenerationTask):
    """Ids that are fed back one by one, the answer's and before them a prompt's (autoregressive)."""

    token: TensorSpec
    """The per-step input that takes the id that was chosen last."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The token."""
        return (self.token,)

    @property
    def end_id(self) -> int:
        """Id that ends a sequence."""
        if self.generation.end_id is None:
            raise ValueError(f"{self.name} has no id that ends a sequence")
        return self.generation.end_id

    @property
    def begin_id(self) -> int:
        """Id that is fed first."""
        if self.generation.begin_id is None:
            raise ValueError(f"{self.name} has no id that begins a sequence")
        return self.generation.begin_id

    def text(self, ids: Array) -> str:
        """Write ids [length] for people."""
        return self.generation.separator.join(self.vocabulary[number] for number in ids.tolist())


def perplexity(loss: float) -> dict[str, float]:
    """Express a mean cross-entropy, nats per id of the answer and its end, as people read it."""
    return {"bits_per_character": loss / math.log(2), "perplexity": math.exp(loss)}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextTask(TokenTask):
    """Text, character by character, after a prompt that says of what kind it is to be (one-to-many)."""

    @property
    def metric(self) -> str:
        """The metric that counts most."""
        return "perplexity"

    def baselines(self, split: Examples) -> dict[str, dict[str, float]]:
        """Foretell each character by the one or the two before it."""
        models = {
            name: NGrams(self.train, order=order, num_ids=len(self.vocabulary), end_id=self.end_id)
            for order, name in ((2, "bigrams"), (3, "trigrams"))
        }
        return {name: perplexity(model.loss(split)) for name, model in models.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TransductionTask(TokenTask):
    """Ids that stand for other ids, which an encoder reads (encoder-decoder)."""

    source_input: TensorSpec
    """The encoder's per-step input."""
    symbol_name: str
    """What an id of the answer is, such as "phoneme"."""
    sequence_name: str
    """What a source is, such as "word"."""

    def judge(self, split: Examples, answers: Sequence[Array]) -> dict[str, float]:
        """Score answers, each ids [length]: the share of ids to be edited, and of answers that are not right.

        Of several right answers the nearest counts. Source: Levenshtein distance, summed over a split and divided by
        the length of the references, as word error rates of speech recognition are.
        """
        edits = asked = wrong = 0
        for number, answer in enumerate(answers):
            right = split.references[number] if split.references else (split.targets[number],)
            distance, length = min((edit_distance(answer.tolist(), each.tolist()), len(each)) for each in right)
            edits, asked, wrong = edits + distance, asked + length, wrong + (distance > 0)
        return {f"{self.symbol_name}_error_rate": edits / asked, f"{self.sequence_name}_error_rate": wrong / len(split)}

    @property
    def metric(self) -> str:
        """The metric that counts most."""
        return f"{self.sequence_name}_error_rate"

    def baselines(self, split: Examples) -> dict[str, dict[str, float]]:
        """Answer each id of the source by what it stands for most often: alone, or between the same neighbours."""
        rules = rules_of(self.train)
        return {
            name: self.judge(split, [rules(source, window) for source in split.sources])
            for name, window in (("each letter alone", 0), ("each letter by its neighbours", WIDEST))
        }


def edit_distance(found: Sequence[int], expected: Sequence[int]) -> int:
    """Fewest insertions, deletions and replacements that make one sequence of the other."""
    row = list(range(len(expected) + 1))
    for removed, one in enumerate(found, start=1):
        diagonal, row[0] = row[0], removed
        for column, other in enumerate(expected, start=1):
            diagonal, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, diagonal + (one != other))
    return row[-1]
