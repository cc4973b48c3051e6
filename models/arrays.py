"""Arrays as JSON has them, in a spec. Torch-free."""

from __future__ import annotations

import base64
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict

Array = np.ndarray[Any, Any]
DType = Literal["float32", "int64", "int32", "float64", "bool"]


class GoldenArray(BaseModel):
    """An array in JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dtype: DType
    """Type of the elements."""
    shape: tuple[int, ...]
    """Dimensions."""
    data: str
    """base64 of the little-endian row-major bytes."""

    @classmethod
    def of(cls, array: Array) -> Self:
        """Encode an array."""
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        data = base64.b64encode(little.tobytes()).decode("ascii")
        return cls.model_validate({"dtype": array.dtype.name, "shape": array.shape, "data": data})

    def array(self) -> Array:
        """Decode it; the result is read-only."""
        dtype = np.dtype(self.dtype).newbyteorder("<")
        return np.frombuffer(base64.b64decode(self.data), dtype=dtype).reshape(self.shape)
