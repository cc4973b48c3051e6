"""A recurrent layer as one native ONNX operator: RNN, LSTM or GRU.

torch.onnx.export cannot be left to trace nn.LSTM: it bakes the traced length in, or comes out wrong with an initial
state. So while exporting, a layer puts down the one operator itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from models.activations import NATIVE
from models.cells import CellKind

# Rows of torch's stacked gate weights, in the order the operator wants them.
# torch: LSTM i f g o, GRU r z n. ONNX: LSTM i o f c, GRU z r h (operators' documentation, W and R).
GATES = {"rnn": (0,), "gru": (1, 0, 2), "lstm": (0, 3, 1, 2)}
_VERSION = 14  # of RNN, LSTM and GRU; the next, 22, has no CUDA kernels


def is_native(kind: CellKind) -> bool:
    """Whether the operator has the cell's activations."""
    return kind.activation in NATIVE and (kind.cell == "rnn" or kind.recurrent_activation in NATIVE)


def in_onnx_order(rows: Tensor, cell: str) -> Tensor:
    """Put the rows of torch's weights [gates * hidden, ...] into the operator's order."""
    gates = rows.detach().cpu().reshape(len(GATES[cell]), -1, *rows.shape[1:])
    return gates[list(GATES[cell])].reshape(rows.shape)


def native(
    kind: CellKind,
    x: Tensor,
    lengths: Tensor,
    states: tuple[Tensor, ...],
    weights: tuple[Tensor, Tensor, Tensor | None],
    *,
    backwards: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Put down the operator.

    x        [time, batch, inputs]
    lengths  [batch] int32, its sequence_lens
    states   [directions, batch, hidden]
    weights  W [directions, gates * hidden, inputs], R [directions, gates * hidden, hidden], B or nothing
             [directions, 2 * gates * hidden]
    Returns (y [time, directions, batch, hidden], next states).
    """
    directions, batch, hidden = states[0].shape
    attrs: dict[str, Any] = {
        "hidden_size": hidden,
        "direction": "bidirectional" if directions == 2 else "reverse" if backwards else "forward",
    }
    if kind.cell == "gru":
        attrs["linear_before_reset"] = int(kind.reset_after)
    attrs |= _activations(kind, int(directions))
    y, *last = torch.onnx.ops.symbolic_multi_out(
        kind.cell.upper(),
        (x, *weights, lengths, *states),
        attrs=attrs,
        dtypes=(x.dtype,) * (1 + len(states)),
        shapes=((x.shape[0], directions, batch, hidden), *(states[0].shape,) * len(states)),
        version=_VERSION,
    )
    return y, tuple(last)


def _activations(kind: CellKind, directions: int) -> dict[str, Any]:
    """The attributes that name the activations, where they are not the operator's defaults.

    Every alpha and beta belongs to the activations, in their order, that take one.
    """
    used = {
        "rnn": (kind.activation,),
        "gru": (kind.recurrent_activation, kind.activation),
        "lstm": (kind.recurrent_activation, kind.activation, kind.activation),
    }[kind.cell]
    if used == {"rnn": ("tanh",), "gru": ("sigmoid", "tanh"), "lstm": ("sigmoid", "tanh", "tanh")}[kind.cell]:
        return {}
    chosen = [NATIVE[each] for each in used] * directions
    attrs: dict[str, Any] = {"activations": [each.name for each in chosen]}
    for name in ("alpha", "beta"):
        if given := [value for each in chosen if not math.isnan(value := getattr(each, name))]:
            attrs[f"activation_{name}"] = given
    return attrs
