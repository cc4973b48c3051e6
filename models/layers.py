"""Recurrent layers: eager torch, and the native ONNX operator they become.

Everything here is time-major, [time, batch, ...], as torch and the ONNX operators are by default; states are
batch-first, [batch, directions, hidden], as the graph's inputs and outputs are.

torch.onnx.export cannot be left to trace nn.LSTM: it bakes the traced length in, or comes out wrong with an initial
state. So while exporting, a layer's forward puts down the one operator itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from models.recipe import Activation
from models.spec import Cell

Array = np.ndarray[Any, Any]

STATES: dict[Cell, tuple[str, ...]] = {"rnn": ("h",), "gru": ("h",), "lstm": ("h", "c")}
"""States of each cell, in the order of its operator's inputs."""

# Rows of torch's stacked gate weights, in the order the operator wants them.
# torch: LSTM i f g o, GRU r z n. ONNX: LSTM i o f c, GRU z r h (operators' documentation, W and R).
_GATES: dict[Cell, tuple[int, ...]] = {"rnn": (0,), "gru": (1, 0, 2), "lstm": (0, 3, 1, 2)}
_OPERATOR_VERSION = 14  # of RNN, LSTM and GRU; the next, 22, has no CUDA kernels


class Recurrent(nn.Module):
    """One recurrent layer, forward or bidirectional."""

    native_w: Tensor
    native_r: Tensor
    native_b: Tensor

    def __init__(
        self,
        cell: Cell,
        inputs: int,
        hidden: int,
        *,
        bidirectional: bool = False,
        activation: Activation = "tanh",
    ) -> None:
        super().__init__()
        if activation != "tanh" and cell != "rnn":
            raise ValueError(f"a {cell} has tanh inside; only an rnn takes activation={activation!r}")
        self.cell: Cell = cell
        self.hidden = hidden
        self.directions = 2 if bidirectional else 1
        self.activation = activation
        self.rnn: nn.RNNBase
        if cell == "rnn":
            self.rnn = nn.RNN(inputs, hidden, nonlinearity=activation, bidirectional=bidirectional)
        elif cell == "gru":
            self.rnn = nn.GRU(inputs, hidden, bidirectional=bidirectional)
        else:
            self.rnn = nn.LSTM(inputs, hidden, bidirectional=bidirectional)

    @property
    def width(self) -> int:
        """Width of a step's output."""
        return self.directions * self.hidden

    def forward(self, x: Tensor, lengths: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the layer over every row's own length.

        x        [time, batch, inputs] float32
        lengths  [batch] int, from 1 to time
        states   one per state of the cell, [batch, directions, hidden]
        Returns (y [time, batch, directions * hidden], states after each row's last step). Rows of y past a row's length
        are padding.
        """
        if torch.onnx.is_in_onnx_export():
            return self._native(x, lengths, states)
        first = tuple(state.transpose(0, 1).contiguous() for state in states)
        packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        packed_y, last = self.rnn(packed, first if self.cell == "lstm" else first[0])
        y, _ = pad_packed_sequence(packed_y, total_length=x.shape[0])
        return y, tuple(state.transpose(0, 1) for state in (last if self.cell == "lstm" else (last,)))

    def outputs(self, x: Tensor, lengths: Tensor, states: tuple[Tensor, ...] = ()) -> Tensor:
        """Run for the outputs alone, as training does, from zero states unless others are given.

        x [time, batch, inputs], lengths [batch] int, states and y as `forward` has them.
        A causal layer needs no packing for them, which makes it up to five times as fast on a CPU.
        """
        if self.directions == 1:
            first = tuple(state.transpose(0, 1).contiguous() for state in states)
            y: Tensor = self.rnn(x, (first if self.cell == "lstm" else first[0]) if first else None)[0]
            return y
        zero = x.new_zeros(x.shape[1], self.directions, self.hidden)
        return self.forward(x, lengths, states or (zero,) * len(STATES[self.cell]))[0]

    def native_weights(self) -> tuple[Array, Array, Array]:
        """Arrange the weights as the operator takes them.

        Returns (W [directions, gates * hidden, inputs], R [directions, gates * hidden, hidden],
        B [directions, 2 * gates * hidden], the input's biases before the recurrent ones).
        """

        def stacked(name: str) -> Array:
            rows = []
            for suffix in ("", "_reverse")[: self.directions]:
                weights: Array = getattr(self.rnn, f"{name}_l0{suffix}").detach().cpu().numpy()
                gates = weights.reshape(-1, self.hidden, *weights.shape[1:])
                rows.append(gates[list(_GATES[self.cell])].reshape(weights.shape))
            return np.stack(rows)

        bias = np.concatenate([stacked("bias_ih"), stacked("bias_hh")], axis=1)
        return stacked("weight_ih"), stacked("weight_hh"), bias

    def absorb(self, shift: Array, scale: Array) -> None:
        """Change the weights so that the layer takes x where it took (x - shift) / scale; both are [inputs]."""
        with torch.no_grad():
            for suffix in ("", "_reverse")[: self.directions]:
                weight, bias = getattr(self.rnn, f"weight_ih_l0{suffix}"), getattr(self.rnn, f"bias_ih_l0{suffix}")
                scaled = weight.double() / torch.from_numpy(scale.astype(np.float64))
                weight.copy_(scaled)
                bias.copy_(bias.double() - scaled @ torch.from_numpy(shift.astype(np.float64)))

    def freeze(self) -> None:
        """Fix the operator's weights as they are now, which a layer needs before it is exported."""
        for name, weights in zip(("native_w", "native_r", "native_b"), self.native_weights(), strict=True):
            self.register_buffer(name, torch.from_numpy(weights), persistent=False)

    def _native(self, x: Tensor, lengths: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`forward` as one ONNX operator. Call `freeze` first."""
        time, batch, _ = x.shape
        attrs: dict[str, Any] = {
            "hidden_size": self.hidden,
            "direction": "bidirectional" if self.directions == 2 else "forward",
        }
        if self.cell == "gru":
            attrs["linear_before_reset"] = 1
        if self.cell == "rnn":
            attrs["activations"] = [self.activation.capitalize()] * self.directions
        first = [state.transpose(0, 1) for state in states]
        state_shape = (self.directions, batch, self.hidden)
        y, *last = torch.onnx.ops.symbolic_multi_out(
            self.cell.upper(),
            (x, self.native_w, self.native_r, self.native_b, lengths, *first),
            attrs=attrs,
            dtypes=(x.dtype,) * (1 + len(states)),
            shapes=((time, self.directions, batch, self.hidden), *(state_shape,) * len(states)),
            version=_OPERATOR_VERSION,
        )
        if self.directions == 1:
            return y.squeeze(1), tuple(state.transpose(0, 1) for state in last)
        # A plain reshape would be exported with nodes that work out time and batch; 0 keeps an axis as it is.
        y = torch.onnx.ops.symbolic(
            "Reshape",
            (y.transpose(1, 2), torch.tensor([0, 0, self.width])),
            dtype=x.dtype,
            shape=(time, batch, self.width),
            version=14,
        )
        return y, tuple(state.transpose(0, 1) for state in last)
