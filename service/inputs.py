"""Values that a model must not see: NaN and infinity, token ids outside the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from models.spec import TensorSpec
from service.errors import BadValue

Array = npt.NDArray[Any]


def bad_rows(tensor: TensorSpec, x: Array, *, passes_non_finite: bool) -> npt.NDArray[np.bool_] | None:
    """Mark rows [n] of an input that hold a bad value; None if all are good."""
    if x.dtype.kind == "f":
        if passes_non_finite:
            return None
        is_good: npt.NDArray[np.bool_] = np.isfinite(x)
    elif tensor.num_ids is not None:
        is_good = (x >= 0) & (x < tensor.num_ids)
    else:
        return None
    if is_good.all():
        return None
    return np.asarray(~is_good.reshape(len(x), -1).all(axis=1))


def bad_value(tensor: TensorSpec, row: Array, step: int) -> BadValue:
    """Say which value of a bad row it is, and what to send instead."""
    values = row.ravel()
    if row.dtype.kind == "f":
        element = int(np.argmin(np.isfinite(values)))
        wanted = "send finite values, or start the server with --non-finite pass"
    else:
        largest = (tensor.num_ids or 1) - 1
        element = int(np.argmin((values >= 0) & (values <= largest)))
        wanted = f"token ids lie in 0..{largest}"
    name = tensor.element_names[element] if element < len(tensor.element_names) else f"element {element}"
    return BadValue(f"{tensor.name}: {name} of step {step} is {values[element]}; {wanted}", field=tensor.name)


def bad_entries(
    tensors: Sequence[TensorSpec], inputs: Sequence[Array], starts: Sequence[int], *, passes_non_finite: bool
) -> dict[int, BadValue]:
    """Say what is wrong with each entry, rows [starts[i], starts[i + 1]) of every input, that has a bad row."""
    errors: dict[int, BadValue] = {}
    for tensor, x in zip(tensors, inputs, strict=True):
        is_bad = bad_rows(tensor, x, passes_non_finite=passes_non_finite)
        if is_bad is None:
            continue
        for entry in np.flatnonzero(np.logical_or.reduceat(is_bad, starts)).tolist():
            step = int(np.argmax(is_bad[starts[entry] :]))
            errors.setdefault(entry, bad_value(tensor, x[starts[entry] + step], step))
    return errors
