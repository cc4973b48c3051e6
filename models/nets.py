"""Networks by topology: recurrent layers and a head, with the scaling of raw units inside.

Every net keeps one contract: (x [batch, time, features], lengths [batch] int32, *states) -> (y, *next states). States
are batch-first, [batch, directions, hidden], named by `state_names`. Rows of a per-step y past a row's length are
padding.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from models.activations import NON_NEGATIVE
from models.convolution import ConvOptions, FrontEnd
from models.errors import RecipeError
from models.graphs import Draw, GraphModule, draw_like
from models.layers import STATES, Recurrent
from models.options import LayerOptions
from models.recipe import Recipe
from models.spec import Cell, GraphSpec, Layout, StateSpec
from models.tasks.base import AnyTask, Scaling, Task

FOLD_LIMIT = 32.0
"""Largest |input_mean| / input_scale to fold into weights; above it, float32 would cancel too many digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetConfig:
    """Shape of a net."""

    cell: Cell
    """Recurrent cell."""
    inputs: int
    """Features of a step."""
    outputs: int
    """Classes, or values of an answer."""
    hidden: int
    """Hidden units of each layer, per direction."""
    layers: int = 1
    """Recurrent layers, one on the other."""
    bidirectional: bool = False
    """Whether layers also read the sequence from its end."""
    conv: ConvOptions | None = None
    """A causal convolution before the recurrent layers."""
    options: LayerOptions = field(default_factory=LayerOptions)
    """Options of every recurrent layer."""
    output_dropout: float = 0.0
    """Probability that an output of a recurrent layer is dropped on its way to the next layer or the head."""
    is_classifier: bool
    """Whether the answer is probabilities."""
    one_answer: bool
    """Whether the sequence as a whole has one answer (many-to-one), or every step its own (many-to-many)."""
    changes_of: tuple[int, ...] = ()
    """Input features that the head's output is added to; empty: none."""

    @property
    def is_per_sequence(self) -> bool:
        """Whether y is [batch, outputs]: one answer, and a backward layer that has none to give before the end."""
        return self.one_answer and (self.bidirectional or self.options.go_backwards)


class RecurrentNet(nn.Module):
    """Recurrent layers under a linear head, raw units in and raw units or probabilities out.

    A causal net answers at every step; of a many-to-one net, that is the running answer, and the last is final. A
    bidirectional many-to-one net answers once, from the state that each direction ends in.
    """

    input_mean: Tensor
    input_scale: Tensor
    output_mean: Tensor
    output_scale: Tensor
    changes_of: Tensor

    def __init__(self, config: NetConfig, scaling: Scaling) -> None:
        super().__init__()
        self.config = config
        width = config.inputs
        self.conv = FrontEnd(width, config.conv) if config.conv else None
        if config.conv:
            width = config.conv.filters
        self.layers = nn.ModuleList()
        for _ in range(config.layers):
            layer = Recurrent(
                config.cell, width, config.hidden, bidirectional=config.bidirectional, options=config.options
            )
            self.layers.append(layer)
            width = layer.width
        self.dropout = nn.Dropout(config.output_dropout)
        self.head = nn.Linear(width, config.outputs)
        for name in ("input_mean", "input_scale", "output_mean", "output_scale"):
            self.register_buffer(name, torch.from_numpy(np.array(getattr(scaling, name), dtype=np.float32)))
        self.register_buffer("changes_of", torch.tensor(config.changes_of, dtype=torch.int64), persistent=False)
        self.scales_input = True
        self.scales_output = not config.is_classifier

    @property
    def recurrent(self) -> list[Recurrent]:
        """The recurrent layers, first to last."""
        return cast("list[Recurrent]", list(self.layers))

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the states, in the order that `forward` takes and returns them."""
        return tuple(state.name for state in self.state_specs)

    @property
    def state_specs(self) -> tuple[StateSpec, ...]:
        """The states, that of the convolution before those of the recurrent layers."""
        names = (f"state.{layer}.{kind}" for layer in range(self.config.layers) for kind in STATES[self.config.cell])
        recurrent = [StateSpec(name=name, next_name=f"{name}.next", row_shape=self.state_shape) for name in names]
        return (*([self.conv.spec] if self.conv else []), *recurrent)

    @property
    def state_shape(self) -> tuple[int, int]:
        """(directions, hidden) of every state of a recurrent layer."""
        return (2 if self.config.bidirectional else 1, self.config.hidden)

    @property
    def num_parameters(self) -> int:
        """Trained parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def forward(self, x: Tensor, lengths: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Answer, and carry the states on.

        x        [batch, time, features] float32, raw units
        lengths  [batch] int32, from 1 to time
        states   in the order of state_specs, each [batch, *row shape]
        Returns (y, *next states): y is [batch, time, outputs], or [batch, outputs] where config.is_per_sequence.
        """
        raw = x.transpose(0, 1)
        steps = self._scaled(raw)
        per_layer = len(STATES[self.config.cell])
        following: list[Tensor] = []
        if self.conv is not None:
            past, states = states[0], states[1:]
            steps, kept = self.conv(steps, lengths, past)
            following.append(kept)
        last: tuple[Tensor, ...] = ()
        for number, layer in enumerate(self.recurrent):
            steps, last = layer(steps, lengths, states[number * per_layer : (number + 1) * per_layer])
            steps = self.dropout(steps)
            following += last
        if self.config.is_per_sequence:
            y = self._answer(self.dropout(self.recurrent[-1].merged(last[0].flatten(1))), raw)
        else:
            y = self._answer(steps, raw).transpose(0, 1)
        return (y.softmax(-1) if self.config.is_classifier else y, *following)

    def scores(self, x: Tensor, lengths: Tensor) -> Tensor:
        """What training compares with targets: `forward` from zero states without the softmax.

        Returns [batch, time, outputs], or [batch, outputs] where config.is_per_sequence.
        """
        raw = x.transpose(0, 1)
        steps = self._scaled(raw)
        if self.conv is not None:
            steps, _ = self.conv(steps, lengths)
        *below, top = self.recurrent
        for layer in below:
            steps = self.dropout(layer.outputs(steps, lengths))
        if not self.config.is_per_sequence:
            return self._answer(self.dropout(top.outputs(steps, lengths)), raw).transpose(0, 1)
        zero = steps.new_zeros(steps.shape[1], *self.state_shape)
        _, last = top(steps, lengths, (zero,) * len(STATES[self.config.cell]))
        return self._answer(self.dropout(top.merged(last[0].flatten(1))), raw)

    def for_export(self) -> RecurrentNet:
        """Copy the net with the scaling folded into its weights, ready for torch.onnx.export.

        Features far from zero for their spread (FOLD_LIMIT), layers without biases, and a convolution, before whose
        first step come zeros that stand for the mean, keep their scaling as nodes of the graph. The copy rounds
        differently from the net it came from; the export gate compares it with that net.
        """
        net = copy.deepcopy(self).cpu().eval()
        mean, scale = self.input_mean.cpu().numpy(), self.input_scale.cpu().numpy()
        if net.conv is None and net.recurrent[0].can_absorb and np.abs(mean / scale).max() <= FOLD_LIMIT:
            net.recurrent[0].absorb(mean, scale)
            net.scales_input = False
        if net.scales_output:
            with torch.no_grad():
                net.head.weight.copy_(self.head.weight.double() * self.output_scale.double()[:, None])
                net.head.bias.copy_(self.head.bias.double() * self.output_scale.double() + self.output_mean.double())
            net.scales_output = False
        for layer in net.recurrent:
            layer.freeze()
        return net

    def graphs(self, task: AnyTask) -> list[GraphModule]:
        """Describe the graph that this net becomes; a mixed net's has its own inputs."""
        return [
            GraphModule(
                module=self,
                ready=self.for_export(),
                spec=self.graph_spec(task),
                draw=self.draw(self.config.inputs),
            )
        ]

    def graph_spec(self, task: AnyTask) -> GraphSpec:
        """Say what the graph takes and gives."""
        config = self.config
        layout = Layout.PER_SEQUENCE if config.is_per_sequence else Layout.PER_STEP
        return GraphSpec(
            layers=tuple(layer.spec for layer in self.recurrent),
            fixed_steps=config.options.unroll or None,
            inputs=task.inputs,
            outputs=(task.output.model_copy(update={"layout": layout}),),
            states=self.state_specs,
        )

    def draw(self, num_features: int) -> Draw:
        """Draw as the first features of the training data were spread."""
        mean, scale = self.input_mean[:num_features].numpy(), self.input_scale[:num_features].numpy()
        return draw_like(mean, scale, non_negative_states=self.config.options.activation in NON_NEGATIVE)

    def _scaled(self, raw: Tensor) -> Tensor:
        return (raw - self.input_mean) * (1.0 / self.input_scale) if self.scales_input else raw

    def _answer(self, hidden: Tensor, raw: Tensor) -> Tensor:
        """Apply the head; hidden [..., width], raw [time, batch, features]; returns [..., outputs]."""
        answer: Tensor = self.head(hidden)
        if self.scales_output:
            answer = answer * self.output_scale + self.output_mean
        if self.config.changes_of:
            answer = answer + raw.index_select(-1, self.changes_of)
        return answer


def build(task: Task, recipe: Recipe) -> RecurrentNet:
    """Make an untrained net for a task, its scaling measured on the training split.

    Raises RecipeError when the recipe does not fit the task.
    """
    if (recipe.bidirectional or recipe.go_backwards) and task.looks_ahead:
        how = "be bidirectional" if recipe.bidirectional else "go backwards"
        raise RecipeError(f"{task.name} cannot {how}: {task.looks_ahead}, which a backward layer reads")
    config = NetConfig(
        cell=recipe.cell,
        inputs=task.width,
        outputs=task.num_outputs,
        hidden=recipe.hidden,
        layers=recipe.layers,
        bidirectional=recipe.bidirectional,
        conv=_conv(recipe),
        options=recipe.options,
        output_dropout=recipe.output_dropout,
        is_classifier=task.is_classification,
        one_answer=task.one_answer,
        changes_of=task.changes_of,
    )
    return RecurrentNet(config, task.scaling())


def _conv(recipe: Recipe) -> ConvOptions | None:
    if not recipe.conv_filters:
        return None
    return ConvOptions(
        filters=recipe.conv_filters,
        kernel_size=recipe.conv_kernel_size,
        dilation=recipe.conv_dilation,
        activation=recipe.conv_activation,
    )
