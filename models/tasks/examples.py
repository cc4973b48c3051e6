"""Sequences to generate, with what each is made from. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from models.tasks.base import Array


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Sequences that a model is to make, and what it makes each from; lengths differ."""

    targets: tuple[Array, ...]
    """Each values [length, outputs] float32, or ids [length] int64 without the one that ends a sequence."""
    contexts: tuple[Array, ...] = ()
    """Each the input that every step shares, [features] float32; empty where there is none."""
    prompts: tuple[Array, ...] = ()
    """Each the ids that are fed before the target, [length] int64; empty where nothing is fed back."""
    sources: tuple[Array, ...] = ()
    """Each the ids that an encoder reads, [length] int64; empty where there is no encoder."""
    references: tuple[tuple[Array, ...], ...] = ()
    """Each all right answers, its target among them; empty where the target is the only one."""

    def __post_init__(self) -> None:
        for name in ("contexts", "prompts", "sources", "references"):
            if (count := len(getattr(self, name))) not in (0, len(self)):
                raise ValueError(f"{len(self)} targets, but {count} {name}")

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, numbers: Sequence[int]) -> Self:
        """Pick some of the sequences."""

        def taken(sequences: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(sequences[n] for n in numbers) if sequences else ()

        return type(self)(*map(taken, (self.targets, self.contexts, self.prompts, self.sources, self.references)))

    @property
    def lengths(self) -> Array:
        """Steps of each target, [num_sequences] int32."""
        return np.array([len(target) for target in self.targets], dtype=np.int32)

    @property
    def source_lengths(self) -> Array:
        """Steps of each source, [num_sequences] int32; zeros where there is none."""
        if not self.sources:
            return np.zeros(len(self), dtype=np.int32)
        return np.array([len(source) for source in self.sources], dtype=np.int32)
