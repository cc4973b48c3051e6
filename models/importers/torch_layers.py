"""torch's recurrent layers within a module: found as they are called, and replaced by ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from models.errors import ConversionError
from models.layers import STATES, Recurrent
from models.options import LayerOptions
from models.spec import Cell, LayerSpec, StateSpec

_CELLS: dict[type[nn.RNNBase], Cell] = {nn.RNN: "rnn", nn.LSTM: "lstm", nn.GRU: "gru"}

_READ = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
"""What a forward may ask a layer, to make its first states."""

States = tuple[Tensor, ...]


@dataclass(slots=True)
class Call:
    """One call of a recurrent layer of torch's."""

    name: str
    """The layer's name within the module."""
    axes: tuple[int, int]
    """Time and batch of what it took."""
    last: States
    """States that it ended in, each [layers * directions, batch, hidden]."""


class Recorded:
    """The recurrent layers of a module, which run as they are, with states put in and taken out.

    Raises ConversionError for a layer that ours cannot be equal to.
    """

    def __init__(self, module: nn.Module) -> None:
        self.layers = dict(_recurrent_layers(module))
        self.calls: list[Call] = []
        self._given: dict[str, States] = {}

    @contextmanager
    def given(self, states: dict[str, States]) -> Iterator[None]:
        """Let each layer begin with states of its own, zeros where it has none; forget the calls before."""
        self._given, self.calls = states, []
        hooks = []
        for name, layer in self.layers.items():
            hooks.append(layer.register_forward_pre_hook(self._before(name), with_kwargs=True))
            hooks.append(layer.register_forward_hook(self._after(name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _before(self, name: str) -> Any:
        def put_states_in(layer: nn.RNNBase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x, first = args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs.get("hx")
            if any(call.name == name for call in self.calls):
                raise ConversionError(
                    f"{name} is called more than once in a forward: give it whole sequences, or copies"
                )
            for state in first if isinstance(first, tuple) else (first,):
                if state is not None and state.any():
                    raise ConversionError(
                        f"{name} is called with a state that is not zero: leave it out, states are carried"
                    )
            given = self._given.get(name)
            if given is None:
                return None
            return (x, given if isinstance(layer, nn.LSTM) else given[0]), {}

        return put_states_in

    def _after(self, name: str) -> Any:
        def take_states_out(layer: nn.RNNBase, _: tuple[Any, ...], answer: Any) -> None:
            y, last = answer
            if isinstance(y, PackedSequence):
                axes = (len(y.batch_sizes), int(y.batch_sizes[0]))
            elif y.ndim == 3:
                axes = (y.shape[1], y.shape[0]) if layer.batch_first else (y.shape[0], y.shape[1])
            else:
                raise ConversionError(
                    f"{name} takes one sequence without a batch axis: give it [batch, time, features]"
                )
            self.calls.append(Call(name, axes, last if isinstance(last, tuple) else (last,)))

        return take_states_out


@dataclass(slots=True)
class Carried:
    """What a replaced layer is given beside its input, and what it leaves, while a module's forward runs."""

    lengths: Tensor
    """[batch] int32"""
    states: list[Tensor]
    """Those not taken yet, each [batch, directions, hidden]."""
    following: list[Tensor] = field(default_factory=list)
    """Those that layers ended in."""


class Replaced(nn.Module):
    """Our layers, one on the other, called and asked as the torch layer that they stand for is."""

    batch_first: bool

    def __init__(self, layer: nn.RNNBase, *, folds: bool, repeats: bool) -> None:
        """Copy a layer's weights.

        folds    answer every step as a sequence of its own: [1, time * batch, ...] in place of [time, batch, ...]
        repeats  let padding hold a row's last output, so that the last step of a batch is each row's last
        """
        super().__init__()
        cell = _CELLS[type(layer)]
        for name in _READ:
            setattr(self, name, getattr(layer, name))
        self.folds = folds
        self.repeats = repeats
        self.carried: Carried | None = None
        widths = [layer.input_size] + [layer.hidden_size * (2 if layer.bidirectional else 1)] * layer.num_layers
        self.layers = nn.ModuleList(_copied(layer, cell, number, width) for number, width in enumerate(widths[:-1]))
        self.cell = cell

    @property
    def recurrent(self) -> list[Recurrent]:
        """The layers, first to last."""
        return [layer for layer in self.layers if isinstance(layer, Recurrent)]

    def flatten_parameters(self) -> None:
        """Do nothing; torch's layer puts its weights together for a GPU."""

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:  # noqa: A002, ARG002  torch's
        """Answer as torch's layer does; states come from `carried`, whatever hx says, and go there."""
        carried = self.carried
        if carried is None:
            raise ConversionError("a replaced layer runs within the export alone")
        x = input.data if isinstance(input, PackedSequence) else input.transpose(0, 1) if self.batch_first else input
        ends: list[States] = []
        for layer in self.recurrent:
            count = len(STATES[self.cell])
            states, carried.states = tuple(carried.states[:count]), carried.states[count:]
            x, last = layer(x, carried.lengths, states)
            carried.following += last
            # Where steps are sequences of their own, each one's last hidden state is its output.
            ends.append((x.reshape(1, -1, layer.hidden).transpose(0, 1),) * count if self.folds else last)
        lengths = carried.lengths.long()
        if self.folds:
            x = x.reshape(1, -1, x.shape[2])
            lengths = torch.ones_like(x[0, :, 0], dtype=torch.int64)
        elif self.repeats and not isinstance(input, PackedSequence):
            steps = torch.minimum(torch.arange(x.shape[0], device=x.device)[:, None], lengths - 1)
            x = x.gather(0, steps[:, :, None].expand(-1, -1, x.shape[2]))
        finals = tuple(torch.cat([each.transpose(0, 1) for each in kind]) for kind in zip(*ends, strict=True))
        y = (
            PackedSequence(x, lengths)
            if isinstance(input, PackedSequence)
            else x.transpose(0, 1)
            if self.batch_first
            else x
        )
        return y, finals if self.cell == "lstm" else finals[0]


def specs_of(layers: list[Recurrent]) -> tuple[tuple[LayerSpec, ...], tuple[StateSpec, ...]]:
    """Describe layers in the order that they are called, and their states."""
    states = tuple(
        StateSpec(
            name=f"state.{number}.{kind}",
            next_name=f"state.{number}.{kind}.next",
            row_shape=(layer.directions, layer.hidden),
        )
        for number, layer in enumerate(layers)
        for kind in STATES[layer.cell]
    )
    return tuple(layer.spec for layer in layers), states


def as_torch_states(layer: nn.RNNBase, states: list[Tensor]) -> States:
    """Put states [batch, directions, hidden], layer by layer, together as a torch layer takes them."""
    count = len(STATES[_CELLS[type(layer)]])
    kinds = (states[kind::count] for kind in range(count))
    return tuple(torch.cat([state.transpose(0, 1) for state in kind]).contiguous() for kind in kinds)


def as_our_states(layer: nn.RNNBase, states: States) -> list[Tensor]:
    """The reverse of `as_torch_states`."""
    directions = 2 if layer.bidirectional else 1
    by_layer = [state.reshape(layer.num_layers, directions, *state.shape[1:]).transpose(1, 2) for state in states]
    return [kind[number] for number in range(layer.num_layers) for kind in by_layer]


def num_states(layer: nn.RNNBase) -> int:
    """States of a torch layer, as ours has them."""
    return layer.num_layers * len(STATES[_CELLS[type(layer)]])


def _recurrent_layers(module: nn.Module) -> Iterator[tuple[str, nn.RNNBase]]:
    for name, layer in module.named_modules():
        about = f"{name or 'the module'} ({type(layer).__name__})"
        if isinstance(layer, nn.RNNCellBase):
            raise ConversionError(
                f"{about} takes one step at a time, in a loop of Python: use nn.RNN, nn.LSTM or nn.GRU"
            )
        if isinstance(layer, torch.jit.ScriptModule):
            raise ConversionError(f"{about} is TorchScript: give the nn.Module that it was made of")
        if not isinstance(layer, nn.RNNBase):
            continue
        if type(layer) not in _CELLS:
            raise ConversionError(
                f"{about} is a class of its own: its forward may be any; use nn.RNN, nn.LSTM or nn.GRU"
            )
        if layer.proj_size:
            raise ConversionError(f"{about}: proj_size={layer.proj_size} has no ONNX operator: train it without")
        yield name, layer


def _copied(layer: nn.RNNBase, cell: Cell, number: int, inputs: int) -> Recurrent:
    """Make one layer of ours of one of torch's stack."""
    options = LayerOptions(
        activation=layer.nonlinearity if isinstance(layer, nn.RNN) else "tanh",
        use_bias=layer.bias,
        kernel_initializer="zeros",
        recurrent_initializer="zeros",
    )
    made = Recurrent(cell, inputs, layer.hidden_size, bidirectional=layer.bidirectional, options=options)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.copy_(layer.get_parameter(name.rpartition(".")[2].replace("_l0", f"_l{number}")))
    return made
