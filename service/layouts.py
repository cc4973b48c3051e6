"""How tensors of a graph that was made elsewhere lie: where their batch and time are, and the row that is served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from service.errors import ModelBroken
from service.modelfile import Axis

if TYPE_CHECKING:
    import onnx

DTYPES = {1: "float32", 11: "float64", 7: "int64", 6: "int32", 9: "bool"}
"""dtype of each onnx.TensorProto.DataType that travels."""


@dataclass(frozen=True)
class Lie:
    """How a tensor of the graph lies, and its row as it is served.

    canonical: [batch, *row], where row begins with the time axis's entries where those travel as one step.
    """

    batch: Axis
    time: Axis
    rest: tuple[int, ...]
    """Sizes of all other axes."""
    entries: int | None
    """Entries of the time axis in one call, which are part of the row; None: the axis has one of each step."""
    in_one_call: bool = False
    """Whether a call has all steps."""

    @property
    def row(self) -> tuple[int, ...]:
        """Shape of a row, as it is served."""
        return (self.entries, *self.rest) if self.time != "none" and self.entries is not None else self.rest

    @property
    def permutation(self) -> list[int]:
        """Where each axis of the graph's tensor is in [batch, time, *rest], of those that it has."""
        axes: list[str | int] = list(range(len(self.rest)))
        for at, name in sorted((at, name) for at, name in ((self.batch, "b"), (self.time, "t")) if at != "none"):
            axes.insert(int(at), name)
        canonical = [name for name, at in (("b", self.batch), ("t", self.time)) if at != "none"]
        order = [*canonical, *range(len(self.rest))]
        return [order.index(each) for each in axes]


def dtype_of(value: onnx.ValueInfoProto, key: str) -> Any:
    """Dtype of a tensor. Raises ModelBroken for one that does not travel."""
    kind = value.type.tensor_type.elem_type
    if kind not in DTYPES:
        raise ModelBroken(
            f"{key}: its element type {kind} (of onnx.TensorProto) can't travel: {', '.join(DTYPES.values())} can"
        )
    return DTYPES[kind]


def inputs_of(graph: onnx.GraphProto) -> dict[str, onnx.ValueInfoProto]:
    """A graph's inputs by name, without those that older files list its weights as."""
    weights = {each.name for each in graph.initializer}
    return {each.name: each for each in graph.input if each.name not in weights}


def rank_of(value: onnx.ValueInfoProto) -> int | None:
    """Number of a tensor's axes, or None where the graph does not know it."""
    tensor = value.type.tensor_type
    return len(tensor.shape.dim) if tensor.HasField("shape") else None


def size_of(value: onnx.ValueInfoProto, axis: int) -> int | None:
    """Size of an axis, or None where it is dynamic, which some exporters write as 0 or -1."""
    rank = rank_of(value)
    if rank is None or axis >= rank:
        return None
    size = value.type.tensor_type.shape.dim[axis].dim_value
    return size if size > 0 else None


def sizes_of(value: onnx.ValueInfoProto) -> list[int | None]:
    """Sizes of all axes; none where the graph does not know how many there are."""
    return [size_of(value, axis) for axis in range(rank_of(value) or 0)]


def shape_text(value: onnx.ValueInfoProto) -> str:
    """Shape of a tensor, for people."""
    return "[" + ", ".join("?" if size is None else str(size) for size in sizes_of(value)) + "]"
