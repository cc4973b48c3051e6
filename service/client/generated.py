"""What a model generates, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from service.client.info import ModelInfo
from service.tensors import Array

FinishReason = Literal["end", "max_steps"]


def text_of(info: ModelInfo, ids: Array) -> str:
    """Write ids as the model's words, with what it puts between them."""
    if info.generation is None or not info.vocabulary:
        return ""
    return info.generation.separator.join(info.vocabulary[int(each)] for each in ids)


@dataclass(frozen=True, slots=True, eq=False)
class Generated:
    """One sequence that a model made."""

    ids: Array
    """Chosen ids [n] int64, without the ending one; empty for a model that feeds no ids back."""
    text: str
    """The ids as words of the model's vocabulary."""
    log_probs: Array
    """Log-probability of each id [n] float32, natural, before temperature and limits."""
    log_prob: float
    """Sum over the ids, the ending one included; 0 for a model that feeds no ids back."""
    finish_reason: FinishReason
    """Whether the model ended it, or it has as many outputs as were asked for."""
    outputs: Mapping[str, Array] = field(default_factory=dict)
    """Outputs [n, ...] by name of a model that feeds no ids back."""
    score: float | None = None
    """What a beam search ranked it by."""
    seed: int | None = None
    """Seed of its draws, if any were made."""
    others: tuple[Generated, ...] = ()
    """Further hypotheses of a beam search, best first."""

    @property
    def num_outputs(self) -> int:
        """Outputs that it has."""
        return len(next(iter(self.outputs.values()))) if self.outputs else len(self.ids)


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Outputs of one sequence that came together, while it is being made."""

    sequence: int
    """Number of the sequence in the request."""
    position: int
    """Place of the first of them in the sequence."""
    ids: Array
    """Chosen ids [n] int64."""
    text: str
    """The ids as words of the model's vocabulary."""
    log_probs: Array
    """Log-probability of each id [n] float32."""
    outputs: Mapping[str, Array]
    """Outputs [n, ...] by name of a model that feeds no ids back."""
    finished: Generated | None = None
    """The whole sequence, where these are its last outputs."""


NO_IDS = np.empty(0, dtype=np.int64)
NO_LOG_PROBS = np.empty(0, dtype=np.float32)
