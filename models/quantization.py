"""What a model file says of its 8-bit integers; part of the spec (models/spec.py), and as torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict

QuantizedForm = Literal["weights", "static", "dynamic"]
MAX_DROP = 0.005
"""Default of what a metric may lose: absolute of an accuracy, relative of an error."""


class Quantization(BaseModel):
    """How a file was made smaller, and what that did to it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    form: QuantizedForm
    """Weights stored in int8; products in int8 with fixed scales; or with scales measured over each batch."""
    is_exact: bool
    """Whether neighbours in a batch leave a sequence's answers as they are, by the graph; a server measures it."""
    quantized: tuple[str, ...]
    """What is of integers, and how."""
    kept: tuple[str, ...] = ()
    """What computes in float32 still, and why."""
    before: dict[str, float]
    """Every metric of the float32 file, over the test split."""
    after: dict[str, float]
    """Those of this file, over the same."""
    max_drop: float
    """Largest loss of any of them that was allowed: absolute of an accuracy, relative of an error."""
    max_abs_error: float
    """Largest difference from the float32 model's answers, over every output and state of the export gate's cases."""
    size_before: int
    """Bytes of the float32 files."""


def quantization_lines(quantization: Quantization, size: int) -> Iterator[str]:
    """Describe it in lines for people; size is the files' now, in bytes."""
    forms = {
        "weights": "weights stored in int8",
        "static": "int8 products with fixed scales",
        "dynamic": "int8 products with scales measured over each batch",
    }
    exact = "as exact in a batch as float32" if quantization.form == "weights" else "exact in a batch"
    batch = exact if quantization.is_exact else "neighbours in a batch change each other"
    yield f"{forms[quantization.form]}: {batch}"
    yield from quantization.quantized
    yield from quantization.kept
    for name, before in quantization.before.items():
        yield f"test {name} {quantization.after[name]:.4f}, {before:.4f} before ({quantization.max_drop:g} may be lost)"
    yield f"answers and states differ from float32's by {quantization.max_abs_error:.2g} at most"
    yield f"{size:,} bytes, {quantization.size_before:,} before"
