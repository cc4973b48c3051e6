"""Packing that a graph can hold: pack_padded_sequence and pad_packed_sequence, without sorting or squeezing.

A packed sequence is then a PackedSequence whose data are [time, batch, ...], padded, and whose batch_sizes are each
row's length: what is done to its data is done to every step alike, and a replaced layer reads each row to its own end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils import rnn
from torch.nn.utils.rnn import PackedSequence

from models.errors import ConversionError

Names = dict[str, Any]
"""What a function's code refers to by name."""


def names_within(module: nn.Module) -> tuple[Names, ...]:
    """Find the names that the code of a torch module and its children knows things by, torch's own code left out."""
    classes = {cls for each in module.modules() for cls in type(each).__mro__}
    functions = [each for cls in classes for each in vars(cls).values() if inspect.isfunction(each)]
    known = {id(each.__globals__): each.__globals__ for each in functions}
    return tuple(each for each in known.values() if str(each.get("__name__")).partition(".")[0] != "torch")


@contextmanager
def light_packing(code: tuple[Names, ...], num_steps: Callable[[], int]) -> Iterator[None]:
    """Replace torch's packing within `code`, by whatever names it knows it.

    num_steps  asked for the steps that an unpacked sequence has
    """

    def pad_packed_sequence(
        sequence: PackedSequence,
        batch_first: bool = False,
        padding_value: float = 0.0,
        total_length: int | None = None,  # noqa: ARG001  the graph's time axis is as long as its input's
    ) -> tuple[Tensor, Tensor]:
        y, lengths = sequence.data, sequence.batch_sizes
        within = torch.arange(num_steps(), device=y.device)[:, None] < lengths
        y = torch.where(within.reshape(*within.shape, *(1,) * (y.ndim - 2)), y, padding_value)
        return (y.transpose(0, 1) if batch_first else y), lengths

    replacements: dict[Callable[..., Any], Callable[..., Any]] = {
        rnn.pack_padded_sequence: _pack_padded_sequence,
        rnn.pad_packed_sequence: pad_packed_sequence,
        rnn.pack_sequence: _refused,
        rnn.unpack_sequence: _refused,
    }
    with ExitStack() as stack:
        for names in (vars(rnn), *code):
            known = {name: value for name, value in names.items() if inspect.isfunction(value)}
            replaced = {name: replacements[value] for name, value in known.items() if value in replacements}
            stack.enter_context(mock.patch.dict(names, replaced))
        yield


def _pack_padded_sequence(
    input: Tensor,  # noqa: A002  torch's name
    lengths: Tensor,
    batch_first: bool = False,
    enforce_sorted: bool = True,  # noqa: ARG001  rows need no order
) -> PackedSequence:
    if not isinstance(lengths, Tensor):
        raise ConversionError(
            "lengths reach pack_padded_sequence as numbers, which a graph cannot follow: pass the tensor on"
        )
    return PackedSequence(input.transpose(0, 1) if batch_first else input, lengths)


def _refused(*_: Any, **__: Any) -> None:
    raise ConversionError("pack_sequence and unpack_sequence take lists: use pack_padded_sequence(..., lengths)")
