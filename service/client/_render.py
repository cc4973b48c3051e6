"""Outputs -> lines of text and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from service.client.info import ModelInfo
from service.tensors import Array

FLOAT32_DIGITS = 9
"""Decimal digits that tell any two float32 apart."""


class Renderer:
    """Writes outputs of one model: with labels the top one and its probability, else the values."""

    def __init__(self, info: ModelInfo, first_output: str) -> None:
        self._labels = info.labels
        spec = info.output(first_output)
        self._first = first_output
        self.has_labels = bool(info.labels) and spec is not None and spec.row_shape == (len(info.labels),)
        """Whether the first output has a score for each label."""

    def top(self, row: Array) -> tuple[str, float]:
        """Find the label with the highest score."""
        best = int(np.argmax(row))
        return self._labels[best], float(row[best])

    def text(self, row: Array) -> str:
        """Write one row of the first output, tabs between its cells."""
        if self.has_labels:
            label, probability = self.top(row)
            return f"{label}\t{probability:.4f}"
        return "\t".join(f"{value:.6g}" for value in np.ravel(row).tolist())

    def facts(self, outputs: Mapping[str, Array], *, is_row: bool) -> dict[str, Any]:
        """Tell outputs in values that JSON has; is_row: the first output is one row."""
        facts: dict[str, Any] = {}
        if self.has_labels:
            first = outputs[self._first]
            row = first if is_row else first[-1]
            facts["label"], probability = self.top(row)
            facts["probability"] = _plain(probability, FLOAT32_DIGITS)
        if len(outputs) == 1:
            return facts | {"output": plain(outputs[self._first])}
        return facts | {"outputs": {name: plain(array) for name, array in outputs.items()}}


def dump(facts: Mapping[str, Any]) -> str:
    """Write one line of JSON."""
    return json.dumps(facts, ensure_ascii=False, allow_nan=False)


def plain(array: Array) -> Any:
    """Write an array as lists of what JSON has."""
    return _plain(array.tolist(), FLOAT32_DIGITS if array.dtype == np.float32 else None)


def _plain(value: Any, digits: int | None) -> Any:
    """Shorten floats to the digits that tell them apart, and replace NaN and infinity, which JSON lacks, by null."""
    if isinstance(value, list):
        return [_plain(each, digits) for each in value]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}") if digits else value
