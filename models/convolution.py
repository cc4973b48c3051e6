"""Causal convolution over time: its state is the past steps that the next ones still see.

Source: keras.layers.Conv1D with padding="causal", strides=1; ONNX operator Conv.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.activations import ACTIVATIONS
from models.options import Activation
from models.spec import StateSpec

STATE = "state.conv.x"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvOptions:
    """A convolution before the recurrent layers."""

    filters: int
    """Features of a step that come out."""
    kernel_size: int
    """Steps that one sees, itself among them; at least 2."""
    dilation: int = 1
    """Distance between those steps."""
    activation: Activation = "relu"
    """What is applied to each feature."""


class FrontEnd(nn.Module):
    """A causal convolution with its activation. Steps are time-major, the state is batch-first."""

    def __init__(self, inputs: int, options: ConvOptions) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, options.filters, options.kernel_size, dilation=options.dilation)
        self.activation = options.activation
        # As Keras begins.
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.constant_(self.conv.get_parameter("bias"), 0.0)

    @property
    def spec(self) -> StateSpec:
        """Describe its state, the scaled past steps."""
        return StateSpec(name=STATE, next_name=f"{STATE}.next", row_shape=(num_past(self.conv), self.conv.in_channels))

    def forward(self, x: Tensor, lengths: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolve every row over its own length; without a past, zeros come before it.

        x        [time, batch, inputs]
        lengths  [batch] int, from 1 to time
        past     [batch, past steps, inputs]
        Returns (y [time, batch, filters], the last past steps of each row). Rows of y past a row's length are padding.
        """
        if past is None:
            past = x.new_zeros(x.shape[1], *self.spec.row_shape)
        y, kept = convolve(self.conv, x, lengths, past)
        return ACTIVATIONS[self.activation](y), kept


def num_past(conv: nn.Conv1d) -> int:
    """Steps before a step that it depends on."""
    return int(conv.dilation[0] * (conv.kernel_size[0] - 1))


def convolve(conv: nn.Conv1d, x: Tensor, lengths: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve x [time, batch, channels] behind its past [batch, past steps, channels].

    Returns (y [time, batch, filters], the last past steps of each row).
    """
    steps = torch.cat([past, x.transpose(0, 1)], dim=1)
    y = conv(steps.transpose(1, 2)).permute(2, 0, 1)
    # A row's last real step is at its length - 1 behind the past.
    last = lengths.long()[:, None] + torch.arange(past.shape[1], device=x.device)
    return y, steps.gather(1, last[:, :, None].expand(-1, -1, steps.shape[2]))
