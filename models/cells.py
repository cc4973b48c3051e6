"""Recurrent cells step by step in torch, with every option: what torch's own fast layers do not do.

Weights are torch's, gates stacked along the rows: RNN has one, GRU r z n, LSTM i f g o. A step takes what the inputs
bring to the gates, x @ w_ih.T + b_ih, which is worked out for all steps at once.
Source: keras.layers.SimpleRNNCell, GRUCell, LSTMCell 3, whose numbers these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as nnf

from models.activations import ACTIVATIONS
from models.options import Activation
from models.spec import Cell

NUM_GATES: dict[Cell, int] = {"rnn": 1, "gru": 3, "lstm": 4}
States = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class CellKind:
    """A cell and what changes its formula."""

    cell: Cell
    activation: Activation
    recurrent_activation: Activation
    reset_after: bool


@dataclass(frozen=True, slots=True)
class Recurrence:
    """What carries a state on to the next step."""

    kernel: Tensor
    """[hidden, gates * hidden]."""
    bias: Tensor | None
    """[gates * hidden]."""
    masks: Sequence[Tensor] = ()
    """What is kept of the hidden state, scaled up, each [batch, hidden]: one for every gate, or none at all."""


def step(kind: CellKind, from_x: Tensor, states: States, recurrence: Recurrence) -> States:
    """Advance every row by a step.

    from_x  [batch, gates * hidden]
    states  h, and c of an lstm, each [batch, hidden]
    Returns the next states; the first is the step's output.
    """
    f, g = ACTIVATIONS[kind.recurrent_activation], ACTIVATIONS[kind.activation]
    if kind.cell == "rnn":
        return (g(from_x + _product(states[0], recurrence)),)
    if kind.cell == "lstm":
        h, c = states
        i, forget, candidate, o = (from_x + _product(h, recurrence)).chunk(4, dim=-1)
        c = f(forget) * c + f(i) * g(candidate)
        return f(o) * g(c), c
    [h] = states
    if kind.reset_after:
        x_r, x_z, x_n = from_x.chunk(3, dim=-1)
        h_r, h_z, h_n = _product(h, recurrence).chunk(3, dim=-1)
        z = f(x_z + h_z)
        n = g(x_n + f(x_r + h_r) * h_n)
        return (z * h + (1.0 - z) * n,)
    hidden = h.shape[-1]
    x_gates, x_n = from_x[:, : 2 * hidden], from_x[:, 2 * hidden :]
    of_gates, of_candidate = _split(recurrence, 2 * hidden)
    r, z = (f(each) for each in (x_gates + _product(h, of_gates)).chunk(2, dim=-1))
    n = g(x_n + _product(r * h, of_candidate))
    return (z * h + (1.0 - z) * n,)


def run(
    kind: CellKind,
    from_x: Tensor,
    lengths: Tensor,
    states: States,
    recurrence: Recurrence,
    *,
    backwards: bool = False,
) -> tuple[Tensor, States]:
    """Run one direction of a layer over every row's own length.

    from_x     [time, batch, gates * hidden]
    lengths    [batch] int; past it a row's state stands still, so that one read backwards begins at its last step
    states     h, and c of an lstm, each [batch, hidden]
    Returns (y [time, batch, hidden], states after the last step that each row reads).
    """
    time = from_x.shape[0]
    is_within = within(lengths, time)
    ys: list[Tensor] = [from_x] * time
    for t in reversed(range(time)) if backwards else range(time):
        following = step(kind, from_x[t], states, recurrence)
        states = tuple(torch.where(is_within[t], new, old) for new, old in zip(following, states, strict=True))
        ys[t] = states[0]
    return torch.stack(ys), states


def within(lengths: Tensor, time: int) -> Tensor:
    """Which steps of rows are not padding, [time, batch, 1] bool."""
    return (torch.arange(time, device=lengths.device)[:, None] < lengths).unsqueeze(-1)


def inputs_of_gates(x: Tensor, kernel: Tensor, bias: Tensor | None, masks: Sequence[Tensor]) -> Tensor:
    """What inputs bring to the gates, [time, batch, gates * hidden].

    x [time, batch, inputs], kernel [gates * hidden, inputs], bias [gates * hidden]; masks [batch, inputs]: one for all
    gates, one for every gate, or none at all.
    """
    if len(masks) <= 1:
        return nnf.linear(x * masks[0] if masks else x, kernel, bias)
    rows = kernel.chunk(len(masks))
    from_x = torch.cat([nnf.linear(x * mask, part) for mask, part in zip(masks, rows, strict=True)], dim=-1)
    return from_x if bias is None else from_x + bias


def _product(h: Tensor, recurrence: Recurrence) -> Tensor:
    """What the hidden state brings to the gates, [batch, gates * hidden]."""
    kernel, bias = recurrence.kernel, recurrence.bias
    if not recurrence.masks:
        return h @ kernel if bias is None else h @ kernel + bias
    columns = kernel.chunk(len(recurrence.masks), dim=1)
    product = torch.cat([(h * mask) @ part for mask, part in zip(recurrence.masks, columns, strict=True)], dim=-1)
    return product if bias is None else product + bias


def _split(recurrence: Recurrence, columns: int) -> tuple[Recurrence, Recurrence]:
    """The recurrence of the first gates, and that of the others."""
    kernel, bias, masks = recurrence.kernel, recurrence.bias, recurrence.masks
    gates = len(masks) * columns // kernel.shape[1]
    first = Recurrence(kernel[:, :columns], None if bias is None else bias[:columns], masks[:gates])
    return first, Recurrence(kernel[:, columns:], None if bias is None else bias[columns:], masks[gates:])
