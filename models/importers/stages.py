"""What an imported model is made of, in torch: stages that a time-major batch goes through one after another.

x is [time, batch, *row] while the model has steps, and [batch, *row] once a stage has read a whole sequence. A row of
two axes, [window, features], is a window of fixed length, as Keras' RepeatVector makes one.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from models.convolution import convolve, num_past
from models.layers import STATES, Recurrent
from models.spec import LayerSpec, StateSpec

MergeMode = Literal["concat", "sum", "mul", "ave"]


class ImportedNet(nn.Module):
    """Stages in a row, as a graph that a server can step.

    forward takes (x, lengths [batch] int32, *states) and returns (y, *next states), all batch first. x is
    [batch, time, *row], or [batch, *row] where has_steps is false; y is so too where answers_by_step says.
    """

    def __init__(self, stages: list[nn.Module], *, has_steps: bool, answers_by_step: bool) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.has_steps = has_steps
        self.answers_by_step = answers_by_step

    @property
    def states(self) -> tuple[StateSpec, ...]:
        """The states in order, numbered by the layers over time."""
        found, number = list[StateSpec](), 0
        for stage in self.stages:
            if isinstance(stage, OverTime):
                found += stage.states_numbered(number)
                number += stage.num_layers
        return tuple(found)

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The recurrent layers in order, those within windows too."""
        found: list[LayerSpec] = []
        for stage in self.stages:
            if isinstance(stage, RecurrentStage):
                found += [layer.spec for layer in stage.recurrent]
            elif isinstance(stage, Window):
                found += [layer.spec.model_copy(update={"window": stage.window}) for layer in stage.over.recurrent]
        return tuple(found)

    def forward(self, x: Tensor, lengths: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Answer, and carry the states on; see the class."""
        if self.has_steps:
            x = x.transpose(0, 1)
        left, following = list(states), list[Tensor]()
        for stage in self.stages:
            if isinstance(stage, OverTime):
                taken, left = left[: stage.num_states], left[stage.num_states :]
                x, last = stage(x, lengths, tuple(taken))
                following += last
            elif isinstance(stage, Unroll):
                x = stage(x, lengths)
            else:
                x = stage(x)
        return (x.transpose(0, 1) if self.answers_by_step else x, *following)

    def freeze(self) -> None:
        """Fix the operators' weights, which a net needs before it is exported."""
        for module in self.modules():
            if isinstance(module, Recurrent):
                module.freeze()


class OverTime(nn.Module):
    """A stage that carries states over the steps of a sequence."""

    num_states: int
    num_layers: int = 1

    def states_numbered(self, first: int) -> list[StateSpec]:
        """Describe its states; first is the number of its first layer."""
        raise NotImplementedError

    def forward(self, x: Tensor, lengths: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run over every row's own length; x [time, batch, inputs], states [batch, *row] each."""
        raise NotImplementedError


class RecurrentStage(OverTime):
    """Recurrent layers side by side over the same steps: one, or two of which the second goes backwards.

    A layer that goes backwards alone answers in the order that it reads, as Keras does.
    """

    def __init__(self, layers: list[Recurrent], *, merge: MergeMode, is_final: bool) -> None:
        """Put layers together; is_final: answer with the states that they end in, [batch, width]."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.merge = merge
        self.is_final = is_final
        self.num_layers = len(layers)
        self.num_states = sum(len(STATES[layer.cell]) for layer in layers)

    @property
    def recurrent(self) -> list[Recurrent]:
        """The layers."""
        return cast("list[Recurrent]", list(self.layers))

    @property
    def width(self) -> int:
        """Features of an answer."""
        widths = [layer.hidden for layer in self.recurrent for _ in range(layer.directions)]
        return sum(widths) if self.merge == "concat" else widths[0]

    def states_numbered(self, first: int) -> list[StateSpec]:
        """Describe its states; first is the number of its first layer."""
        return [
            StateSpec(
                name=f"state.{number}.{kind}",
                next_name=f"state.{number}.{kind}.next",
                row_shape=(layer.directions, layer.hidden),
            )
            for number, layer in enumerate(self.recurrent, start=first)
            for kind in STATES[layer.cell]
        ]

    def forward(self, x: Tensor, lengths: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run every layer over each row's own length; x [time, batch, inputs], states [batch, directions, hidden]."""
        following, ways = list[Tensor](), list[Tensor]()
        for layer in self.recurrent:
            count = len(STATES[layer.cell])
            taken, states = states[:count], states[count:]
            y, last = layer(x, lengths, taken)
            following += last
            ways += last[0].unbind(1) if self.is_final else y.chunk(layer.directions, dim=-1)
        y = self._merged(ways)
        is_turned = not self.is_final and len(self.layers) == 1 and self.recurrent[0].options.go_backwards
        return reverse(y, lengths) if is_turned else y, tuple(following)

    def _merged(self, ways: list[Tensor]) -> Tensor:
        if len(ways) == 1:
            return ways[0]
        if self.merge == "concat":
            return torch.cat(ways, dim=-1)
        first, second = ways
        if self.merge == "mul":
            return first * second
        return first + second if self.merge == "sum" else (first + second) / 2


class Window(nn.Module):
    """A recurrent stage over windows [..., window, inputs], each of them from zero states."""

    def __init__(self, over: RecurrentStage, window: int) -> None:
        super().__init__()
        self.over = over
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """Answer [..., window, width], or [..., width] where the stage is final."""
        *lead, _, inputs = x.shape
        steps = x.reshape(-1, self.window, inputs).transpose(0, 1)
        rows = steps.shape[1]
        lengths = torch.full((rows,), self.window, dtype=torch.int32, device=x.device)
        zeros = tuple(steps.new_zeros(rows, *state.row_shape) for state in self.over.states_numbered(0))
        y, _ = self.over(steps, lengths, zeros)
        if self.over.is_final:
            answer: Tensor = y.reshape(*lead, y.shape[-1])
        else:
            answer = y.transpose(0, 1).reshape(*lead, self.window, y.shape[-1])
        return answer


class CausalConv(OverTime):
    """A convolution over the steps up to each one; its state is the past steps that the next ones still see.

    Source: keras.layers.Conv1D with padding="causal", strides=1.
    """

    num_states = 1

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.conv = conv
        self.num_past = num_past(conv)

    def states_numbered(self, first: int) -> list[StateSpec]:
        """Describe its state, the past steps."""
        shape = (self.num_past, self.conv.in_channels)
        return [StateSpec(name=f"state.{first}.past", next_name=f"state.{first}.past.next", row_shape=shape)]

    def forward(self, x: Tensor, lengths: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Convolve; x [time, batch, channels], the state [batch, past steps, channels]."""
        (past,) = states
        y, kept = convolve(self.conv, x, lengths, past)
        return y, (kept,)


class Unroll(nn.Module):
    """A step for each that lengths ask for, all with the same x [batch, features]: the start of a one-to-many model."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Return [max(lengths), batch, features]."""
        # No int() around it: while tracing, it is a symbol.
        return x.unsqueeze(0).expand(cast("int", lengths.max().item()), -1, -1)


class Repeat(nn.Module):
    """A window of equal rows. Source: keras.layers.RepeatVector."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """Turn [..., features] into [..., window, features]."""
        return x.unsqueeze(-2).expand(*x.shape[:-1], self.window, x.shape[-1])


class Reshape(nn.Module):
    """Another shape of each row, its elements in the same order."""

    def __init__(self, axes: int, shape: tuple[int, ...]) -> None:
        """Turn the last axes into shape."""
        super().__init__()
        self.axes = axes
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """Turn [..., *axes] into [..., *shape]."""
        return x.reshape(*x.shape[: x.ndim - self.axes], *self.shape)


class Affine(nn.Module):
    """(x - shift) * factor + offset, for each feature."""

    shift: Tensor
    factor: Tensor
    offset: Tensor

    def __init__(self, shift: Tensor, factor: Tensor, offset: Tensor) -> None:
        super().__init__()
        for name, value in (("shift", shift), ("factor", factor), ("offset", offset)):
            self.register_buffer(name, value.float())

    def forward(self, x: Tensor) -> Tensor:
        """Take [..., features]."""
        return (x - self.shift) * self.factor + self.offset


class PReLU(nn.Module):
    """x where it is positive, else slope * x. Source: keras.layers.PReLU."""

    slope: Tensor

    def __init__(self, slope: Tensor) -> None:
        super().__init__()
        self.register_buffer("slope", slope)

    def forward(self, x: Tensor) -> Tensor:
        """Take [..., *row]."""
        return x.clamp(min=0) + self.slope * x.clamp(max=0)


class Pointwise(nn.Module):
    """A convolution that sees one step, as the product it is."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """Take [time, batch, channels]."""
        y: Tensor = self.conv(x.permute(1, 2, 0))
        return y.permute(2, 0, 1)


def reverse(x: Tensor, lengths: Tensor) -> Tensor:
    """Turn each row's own steps round, and leave padding where it is.

    x [time, batch, width], lengths [batch]. Source: ONNX operator ReverseSequence.
    """
    if torch.onnx.is_in_onnx_export():
        turned: Tensor = torch.onnx.ops.symbolic(
            "ReverseSequence",
            (x, lengths.long()),
            attrs={"batch_axis": 1, "time_axis": 0},
            dtype=x.dtype,
            shape=x.shape,
            version=10,
        )
        return turned
    steps = torch.arange(x.shape[0], device=x.device)[:, None]
    from_end = lengths.long() - 1 - steps
    return x.take_along_dim(torch.where(from_end < 0, steps, from_end)[:, :, None], dim=0)
