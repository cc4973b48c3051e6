"""What is asked of a model that generates, and what is made of it, in columns."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from service.policies import Priority
from service.sampling import Choice

Array = npt.NDArray[Any]
ENTRY_BYTES = 32
"""What an entry's columns and an id take in a message, roughly."""


class FinishReason(IntEnum):
    """Why a sequence ended."""

    END = 1
    MAX_STEPS = 2


@dataclass(slots=True, kw_only=True)
class Request:
    """Sequences to generate, checked against the model's shapes."""

    num: int
    """Number of sequences."""
    prompts: list[Array]
    """Ids of each that are fed first, at least one; none of a model that feeds no ids back."""
    sources: list[Array]
    """The encoder's inputs, packed; none where there is no encoder."""
    source_lengths: npt.NDArray[np.int64] | None
    """[num] steps of each source."""
    contexts: dict[str, Array]
    """Per-sequence inputs by name, [num, ...]."""
    states: list[Array | None]
    """Initial states [num, ...], or None for zeros or what the encoder gives."""
    seeds: list[int]
    """One a sequence where something is drawn."""
    max_steps: int
    choice: Choice
    beams: int = 1
    num_hypotheses: int = 1
    normalization: float = 0.0
    outputs: list[int] = field(default_factory=list)
    """Those to answer of a model that feeds no ids back, by index."""
    priority: Priority = Priority.NORMAL


@dataclass(slots=True)
class End:
    """The end of a sequence, or of one of its hypotheses."""

    sequence: int
    hypothesis: int
    reason: FinishReason
    num_outputs: int
    log_prob: float
    score: float


@dataclass(slots=True)
class Made:
    """Outputs in columns: entry i is the next lengths[i] outputs of a sequence."""

    sequences: list[int] = field(default_factory=list)
    hypotheses: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    outputs: list[list[Array]] = field(default_factory=list)
    """Of a model that feeds no ids back: parts, each with an array [steps, ...] an output."""
    ends: list[End] = field(default_factory=list)
    num_bytes: int = 0
    """What it takes in a message, roughly."""

    def __bool__(self) -> bool:
        return bool(self.sequences or self.ends)

    def add(self, sequence: int, hypothesis: int, position: int, ids: list[int], log_probs: list[float]) -> None:
        """Put ids behind."""
        self.sequences.append(sequence)
        self.hypotheses.append(hypothesis)
        self.positions.append(position)
        self.lengths.append(len(ids))
        self.ids += ids
        self.log_probs += log_probs
        self.num_bytes += ENTRY_BYTES * (1 + len(ids))
