"""Recurrent layers: eager torch with the options of Keras 3, and what they become in ONNX.

Everything here is time-major, [time, batch, ...], as torch and the ONNX operators are by default; states are
batch-first, [batch, directions, hidden], as the graph's inputs and outputs are. Weights have torch's names and order.

With options that torch's own layers have, those run; with any other, the steps of models/cells.py. In ONNX a layer is
one native operator where that has its activations (models/operators.py), or else a Scan over the same steps
(models/scans.py); with `unroll`, it is the steps one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from models.cells import NUM_GATES, CellKind, Recurrence, inputs_of_gates, run, within
from models.constraints import constrained, penalty_of
from models.initializers import initial
from models.operators import in_onnx_order, is_native, native
from models.options import (
    LayerOptions,
    parse_bias_initializer,
    parse_constraint,
    parse_initializer,
    parse_regularizer,
)
from models.scans import scanned
from models.spec import Cell, LayerSpec

Array = np.ndarray[Any, Any]

STATES: dict[Cell, tuple[str, ...]] = {"rnn": ("h",), "gru": ("h",), "lstm": ("h", "c")}
"""States of each cell, in the order of its operator's inputs."""

# Gates in Keras' order as blocks of torch's: Keras has GRU z r h, torch r z n; LSTM is i f c o in both.
_KERAS_GATES: dict[Cell, tuple[int, ...]] = {"rnn": (0,), "gru": (1, 0, 2), "lstm": (0, 1, 2, 3)}
_FORGET_GATE = 1


class Recurrent(nn.Module):
    """One recurrent layer: forward, backwards or bidirectional."""

    native_w: Tensor
    native_r: Tensor
    native_b: Tensor | None

    def __init__(
        self,
        cell: Cell,
        inputs: int,
        hidden: int,
        *,
        bidirectional: bool = False,
        options: LayerOptions | None = None,
    ) -> None:
        super().__init__()
        self.cell: Cell = cell
        self.hidden = hidden
        self.directions = 2 if bidirectional else 1
        self.options = options or LayerOptions()
        chosen = self.options
        if bidirectional and chosen.go_backwards:
            raise ValueError("a bidirectional layer goes backwards too: leave go_backwards out")
        self.kind = CellKind(cell, chosen.activation, chosen.recurrent_activation, chosen.reset_after)
        settings: dict[str, Any] = {"bias": chosen.use_bias, "bidirectional": bidirectional}
        self.rnn: nn.RNNBase
        if cell == "rnn":
            nonlinearity = "relu" if chosen.activation == "relu" else "tanh"
            self.rnn = nn.RNN(inputs, hidden, nonlinearity=nonlinearity, **settings)
        else:
            self.rnn = (nn.GRU if cell == "gru" else nn.LSTM)(inputs, hidden, **settings)
        self.activity: Tensor | None = None
        self._initialize()

    @property
    def width(self) -> int:
        """Width of a step's output."""
        return self.hidden * (2 if self.directions == 2 and self.options.merge_mode == "concat" else 1)

    @property
    def spec(self) -> LayerSpec:
        """The layer as a model file describes it."""
        form = "unrolled" if self.options.unroll else "operator" if is_native(self.kind) else "decomposed"
        return LayerSpec(
            cell=self.cell,
            hidden=self.hidden,
            directions=2 if self.directions == 2 else 1,
            go_backwards=self.options.go_backwards,
            activation=self.options.activation,
            recurrent_activation=self.options.recurrent_activation,
            reset_after=self.options.reset_after,
            form=form,
        )

    @property
    def is_fast(self) -> bool:
        """Whether torch's own layer says the same, dropout apart."""
        activations = (self.kind.activation, self.kind.recurrent_activation)
        if self.cell == "rnn":
            return self.kind.activation in ("tanh", "relu")
        return activations == ("tanh", "sigmoid") and (self.cell == "lstm" or self.kind.reset_after)

    @property
    def can_absorb(self) -> bool:
        """Whether a scaling of the inputs can be put into the weights: it needs biases."""
        return self.options.use_bias

    @property
    def has_one_bias(self) -> bool:
        """Whether the recurrent bias stays as it is, so that what is trained is one bias, as Keras has it.

        A GRU with reset_after needs both; and who begins as torch does, trains both as torch does.
        """
        is_gru_with_two = self.cell == "gru" and self.options.reset_after
        return not is_gru_with_two and self.options.bias_initializer != "torch"

    def forward(self, x: Tensor, lengths: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the layer over every row's own length.

        x        [time, batch, inputs] float32
        lengths  [batch] int, from 1 to time
        states   one per state of the cell, [batch, directions, hidden]
        Returns (y [time, batch, width], states after the last step that each row reads). Rows of y past a row's length
        are padding. Keras returns the rows of a layer that goes backwards in the order that they were read; here, row t
        belongs to step t.
        """
        if torch.onnx.is_in_onnx_export():
            return self._exported(x, lengths, states)
        if self.is_fast and not self._drops:
            y, last = self._packed(x, lengths, states)
        else:
            y, last = self._by_steps(x, lengths, states)
        return self._noted(self.merged(y), lengths), last

    def outputs(self, x: Tensor, lengths: Tensor, states: tuple[Tensor, ...] = ()) -> Tensor:
        """Run for the outputs alone, as training does, from zero states unless others are given.

        x [time, batch, inputs], lengths [batch] int, states and y as `forward` has them.
        A causal layer needs no packing for them, which makes it up to five times as fast on a CPU.
        """
        is_causal = self.directions == 1 and not self.options.go_backwards
        drops_hidden = self.training and self.options.recurrent_dropout > 0
        if self.is_fast and is_causal and not drops_hidden:
            [masks] = self._masks(x, self.options.dropout, x.shape[2], count=1)
            first = tuple(state.transpose(0, 1).contiguous() for state in states)
            given = (first if self.cell == "lstm" else first[0]) if first else None
            y: Tensor = self.rnn(x * masks[0] if masks else x, given)[0]
            return self._noted(y, lengths)
        zero = x.new_zeros(x.shape[1], self.directions, self.hidden)
        return self.forward(x, lengths, states or (zero,) * len(STATES[self.cell]))[0]

    def merged(self, y: Tensor) -> Tensor:
        """Put the outputs of both directions, [..., 2 * hidden], together by merge_mode: [..., width]."""
        if self.directions == 1 or self.options.merge_mode == "concat":
            return y
        forth, back = y.chunk(2, dim=-1)
        match self.options.merge_mode:
            case "sum":
                return forth + back
            case "mul":
                return forth * back
        return (forth + back) / 2.0

    def penalty(self) -> Tensor:
        """What the regularizers add to the loss, []: for the weights, and the outputs since this was last asked."""
        total = self._weight("weight_ih", 0).new_zeros(())
        for name, weights, _ in self._regulated():
            if text := getattr(self.options, f"{name}_regularizer"):
                total = total + penalty_of(parse_regularizer(text), weights)
        activity, self.activity = self.activity, None
        return total if activity is None else total + activity

    def constrain(self) -> None:
        """Make the weights keep to the constraints, as after every step of the optimiser."""
        with torch.no_grad():
            for name, weights, put in self._regulated():
                if text := getattr(self.options, f"{name}_constraint"):
                    put(constrained(parse_constraint(text), weights))

    def native_weights(self) -> tuple[Array, Array, Array | None]:
        """Arrange the weights as the operator takes them.

        Returns (W [directions, gates * hidden, inputs], R [directions, gates * hidden, hidden],
        B [directions, 2 * gates * hidden], the input's biases before the recurrent ones, or None without biases).
        """

        def stacked(name: str) -> Array:
            rows = [in_onnx_order(self._weight(name, number), self.cell) for number in range(self.directions)]
            weights: Array = torch.stack(rows).numpy()
            return weights

        bias = None
        if self.options.use_bias:
            bias = np.concatenate([stacked("bias_ih"), stacked("bias_hh")], axis=1)
        return stacked("weight_ih"), stacked("weight_hh"), bias

    def absorb(self, shift: Array, scale: Array) -> None:
        """Change the weights so that the layer takes x where it took (x - shift) / scale; both are [inputs].

        Raises ValueError for a layer without biases: ask `can_absorb` first.
        """
        if not self.can_absorb:
            raise ValueError("a layer without biases cannot take a shift of its inputs")
        with torch.no_grad():
            for number in range(self.directions):
                weight, bias = self._weight("weight_ih", number), self._weight("bias_ih", number)
                scaled = weight.double() / torch.from_numpy(scale.astype(np.float64))
                weight.copy_(scaled)
                bias.copy_(bias.double() - scaled @ torch.from_numpy(shift.astype(np.float64)))

    def freeze(self) -> None:
        """Fix the operator's weights as they are now, which a layer needs before it is exported."""
        for name, weights in zip(("native_w", "native_r", "native_b"), self.native_weights(), strict=True):
            self.register_buffer(name, None if weights is None else torch.from_numpy(weights), persistent=False)

    @property
    def _drops(self) -> bool:
        return self.training and (self.options.dropout > 0 or self.options.recurrent_dropout > 0)

    def _weight(self, name: str, direction: int) -> nn.Parameter:
        weight: nn.Parameter = getattr(self.rnn, f"{name}_l0{('', '_reverse')[direction]}")
        return weight

    def _initialize(self) -> None:
        """Draw the first weights as Keras does."""
        options, hidden = self.options, self.hidden
        columns = NUM_GATES[self.cell] * hidden
        kernel = parse_initializer(options.kernel_initializer)
        recurrent = parse_initializer(options.recurrent_initializer)
        bias = parse_bias_initializer(options.bias_initializer)
        if {kernel.name, recurrent.name, bias.name} == {"torch"}:
            return  # they are torch's already: the same seed gives the weights that torch.nn begins with
        with torch.no_grad():
            for number in range(self.directions):
                for name, term in (("weight_ih", kernel), ("weight_hh", recurrent)):
                    weight = self._weight(name, number)
                    drawn = initial(term, (weight.shape[1], columns), hidden=hidden)
                    weight.copy_(self._in_torch_order(drawn.T))
                if not options.use_bias:
                    continue
                of_input, of_hidden = self._weight("bias_ih", number), self._weight("bias_hh", number)
                if self.has_one_bias:
                    of_input.copy_(self._in_torch_order(initial(bias, (columns,), hidden=hidden)))
                    of_hidden.zero_().requires_grad_(False)
                else:
                    both = initial(bias, (2, columns), hidden=hidden)
                    for weight, drawn in zip((of_input, of_hidden), both, strict=True):
                        weight.copy_(self._in_torch_order(drawn))
                if self.cell == "lstm" and options.unit_forget_bias and bias.name != "torch":
                    of_input[_FORGET_GATE * hidden : (_FORGET_GATE + 1) * hidden] = 1.0

    def _in_torch_order(self, rows: Tensor) -> Tensor:
        """Put gates from Keras' order into torch's, or back: [gates * hidden, ...]."""
        gates = rows.reshape(NUM_GATES[self.cell], self.hidden, *rows.shape[1:])
        return gates[list(_KERAS_GATES[self.cell])].reshape(rows.shape)

    def _regulated(self) -> list[tuple[str, Tensor, Callable[[Tensor], object]]]:
        """Every weight in Keras' shape, with the name of its options, and what puts another in its place."""
        found: list[tuple[str, Tensor, Callable[[Tensor], object]]] = []
        for number in range(self.directions):
            for name, parameter in (("kernel", "weight_ih"), ("recurrent", "weight_hh")):
                weight = self._weight(parameter, number)
                found.append((name, weight.T, weight.T.copy_))
            if self.options.use_bias:
                biases = (self._weight("bias_ih", number), self._weight("bias_hh", number))
                if self.cell == "gru" and self.options.reset_after:
                    found.append(("bias", torch.stack(biases), _put(biases)))
                else:
                    found.append(("bias", biases[0] + biases[1], _put_sum(biases)))
        return found

    def _masks(self, x: Tensor, rate: float, width: int, *, count: int) -> list[list[Tensor]]:
        """Draw masks for every direction, each [batch, width], the same for all steps: none where nothing drops."""
        if not self.training or rate == 0:
            return [[] for _ in range(self.directions)]
        ones = x.new_ones(x.shape[1], width)
        return [[nn.functional.dropout(ones, rate) for _ in range(count)] for _ in range(self.directions)]

    def _noted(self, y: Tensor, lengths: Tensor) -> Tensor:
        """Remember what the activity regularizer asks of outputs [time, batch, width] that training is by."""
        text = self.options.activity_regularizer
        if text and self.training:
            within = torch.arange(y.shape[0], device=y.device)[:, None] < lengths
            self.activity = penalty_of(parse_regularizer(text), y[within]) / y.shape[1]
        return y

    def _packed(self, x: Tensor, lengths: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`forward` by torch's own layer."""
        turn = _reversal(lengths, x.shape[0]) if self.options.go_backwards else None
        first = tuple(state.transpose(0, 1).contiguous() for state in states)
        read = x if turn is None else _taken(x, turn)
        packed = pack_padded_sequence(read, lengths.cpu(), enforce_sorted=False)
        packed_y, last = self.rnn(packed, first if self.cell == "lstm" else first[0])
        y, _ = pad_packed_sequence(packed_y, total_length=x.shape[0])
        y = y if turn is None else _taken(y, turn)
        return y, tuple(state.transpose(0, 1) for state in (last if self.cell == "lstm" else (last,)))

    def _by_steps(self, x: Tensor, lengths: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`forward` step by step, with every option."""
        drops_hidden = self.training and self.options.recurrent_dropout > 0
        # Keras: one mask for the inputs of all gates, unless the hidden state drops too; then each gate has its own.
        count = NUM_GATES[self.cell] if drops_hidden else 1
        of_inputs = self._masks(x, self.options.dropout, x.shape[2], count=count)
        of_hidden = self._masks(x, self.options.recurrent_dropout, self.hidden, count=NUM_GATES[self.cell])
        ys: list[Tensor] = []
        after: list[tuple[Tensor, ...]] = []
        for number in range(self.directions):
            biases = [self._weight(name, number) if self.options.use_bias else None for name in ("bias_ih", "bias_hh")]
            from_x = inputs_of_gates(x, self._weight("weight_ih", number), biases[0], of_inputs[number])
            recurrence = Recurrence(self._weight("weight_hh", number).T, biases[1], of_hidden[number])
            first = tuple(state[:, number] for state in states)
            backwards = number == 1 or self.options.go_backwards
            if torch.onnx.is_in_onnx_export() and not self.options.unroll:
                is_within = within(lengths, x.shape[0])
                y, last = scanned(self.kind, from_x, is_within, first, recurrence, backwards=backwards)
            else:
                y, last = run(self.kind, from_x, lengths, first, recurrence, backwards=backwards)
            ys.append(y)
            after.append(last)
        return torch.cat(ys, dim=-1), tuple(torch.stack(each, dim=1) for each in zip(*after, strict=True))

    def _exported(self, x: Tensor, lengths: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`forward` as nodes of a graph. Call `freeze` first."""
        if self.spec.form != "operator":
            y, last = self._by_steps(x, lengths, states)
            return self.merged(y), last
        first = tuple(state.transpose(0, 1) for state in states)
        weights = (self.native_w, self.native_r, self.native_b)
        y, after = native(self.kind, x, lengths, first, weights, backwards=self.options.go_backwards)
        if self.directions == 1:
            return y.squeeze(1), tuple(state.transpose(0, 1) for state in after)
        # A plain reshape would be exported with nodes that work out time and batch; 0 keeps an axis as it is.
        time, batch, _ = x.shape
        both = torch.onnx.ops.symbolic(
            "Reshape",
            (y.transpose(1, 2), torch.tensor([0, 0, 2 * self.hidden])),
            dtype=x.dtype,
            shape=(time, batch, 2 * self.hidden),
            version=14,
        )
        return self.merged(both), tuple(state.transpose(0, 1) for state in after)


def penalty(net: nn.Module) -> Tensor | float:
    """What the regularizers of all recurrent layers of a net add to the loss, []; 0 where it has none."""
    return sum(layer.penalty() for layer in net.modules() if isinstance(layer, Recurrent))


def constrain(net: nn.Module) -> None:
    """Make all recurrent layers of a net keep to their constraints, as after every step of the optimiser."""
    for layer in net.modules():
        if isinstance(layer, Recurrent):
            layer.constrain()


def _put(targets: Sequence[Tensor]) -> Callable[[Tensor], object]:
    """Make what copies rows into tensors."""
    return lambda rows: [target.copy_(row) for target, row in zip(targets, rows, strict=True)]


def _put_sum(biases: tuple[Tensor, Tensor]) -> Callable[[Tensor], object]:
    """Make what changes the first of two tensors so that they add up to what is given."""
    return lambda total: biases[0].copy_(total - biases[1])


def _reversal(lengths: Tensor, time: int) -> Tensor:
    """Steps of every row from its own last to its first, then the padding: [time, batch] int64."""
    steps = torch.arange(time, device=lengths.device)[:, None]
    return torch.where(steps < lengths, lengths.long() - 1 - steps, steps)


def _taken(x: Tensor, steps: Tensor) -> Tensor:
    """Rows of x [time, batch, width] at steps [time, batch]."""
    return x.gather(0, steps.unsqueeze(-1).expand(-1, -1, x.shape[2]))
