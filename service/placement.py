"""On which execution provider onnxruntime runs each node of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

CPU = "CPUExecutionProvider"
RECURRENT = frozenset({"RNN", "GRU", "LSTM", "DynamicQuantizeLSTM"})
"""Operators that a model on a device should run there: they are most of its work."""


@dataclass(frozen=True, slots=True)
class Node:
    """One node, after the optimizations that every provider shares."""

    name: str
    """As in the file; may be empty."""
    op_type: str
    """With its domain before it, unless it is ONNX's own."""
    provider: str
    """Execution provider that runs it."""

    def __str__(self) -> str:
        return f"{self.op_type} {self.name}".rstrip()


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the nodes of a graph run."""

    provider: str
    """Execution provider that was asked for."""
    nodes: Sequence[Node]

    @property
    def fallbacks(self) -> list[Node]:
        """Nodes that run elsewhere than asked for. Some belong there: computations on shapes."""
        return [node for node in self.nodes if node.provider != self.provider]

    @property
    def recurrent_fallbacks(self) -> list[Node]:
        """Those of them that cost."""
        return [node for node in self.fallbacks if node.op_type.rpartition(".")[2] in RECURRENT]

    def groups(self) -> list[tuple[str, str, list[Node]]]:
        """(operator, provider, its nodes), in the order of names."""
        nodes = sorted(self.nodes, key=_kind)
        return [(*kind, list(group)) for kind, group in groupby(nodes, key=_kind)]

    def __str__(self) -> str:
        there = len(self.nodes) - len(self.fallbacks)
        text = f"{there} of {len(self.nodes)} nodes on {self.provider}"
        if self.fallbacks:
            text += f"; elsewhere: {', '.join(f'{node} ({node.provider})' for node in self.fallbacks)}"
        return text


def _kind(node: Node) -> tuple[str, str]:
    return node.op_type, node.provider
