"""Encoder and decoder: one sequence read as a whole, another made from it.

Source: Cho et al. (2014), "Learning phrase representations using RNN encoder-decoder"; with attention, Luong, Pham and
Manning (2015), "Effective approaches to attention-based neural machine translation", global attention with the score
"general", without input feeding: nothing but ids is fed back, and training runs over all steps of a target at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.graphs import GraphModule
from models.recipe import Recipe
from models.spec import GraphSpec, Layout, TensorSpec
from models.stack import Stack, frozen
from models.tasks.base import AnyTask
from models.tasks.generating import TransductionTask

ENCODER_FILE = "encoder.onnx"
MEMORY = "memory"
"""The encoder's output at every step, which a decoder with attention reads."""
INITIAL = "initial"
"""Prefix of the encoder's outputs that the decoder's states begin with."""
_MEMORY_SPREAD = 0.5


class Attention(nn.Module):
    """Luong's global attention with the score "general"."""

    def __init__(self, width: int, memory_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, memory_width, bias=False)
        self.mix = nn.Linear(width + memory_width, width)

    def forward(self, steps: Tensor, memory: Tensor, source_lengths: Tensor) -> Tensor:
        """Mix each step with what it finds in the memory.

        steps           [batch, time, width]
        memory          [batch, source time, memory width]; rows past a source's length are looked at by nobody
        source_lengths  [batch] int, from 1 to source time
        Returns [batch, time, width].
        """
        scores = self.query(steps) @ memory.transpose(1, 2)
        is_past = torch.arange(memory.shape[1], device=memory.device) >= source_lengths[:, None]
        weights = scores.masked_fill(is_past[:, None], float("-inf")).softmax(-1)
        mixed: Tensor = self.mix(torch.cat([steps, weights @ memory], dim=-1)).tanh()
        return mixed


class Encoder(nn.Module):
    """Reads a source of ids; gives the states that a decoder begins with and, for attention, a memory of every step."""

    def __init__(self, num_ids: int, recipe: Recipe) -> None:
        super().__init__()
        # Id 0, any value that is not known, and padding are a vector of zeros.
        self.table = nn.Embedding(num_ids, recipe.embedding, padding_idx=0)
        self.dropout = nn.Dropout(recipe.output_dropout)
        self.stack = Stack(recipe, recipe.embedding, bidirectional=recipe.bidirectional)
        self.bridges = nn.ModuleList(
            nn.Linear(self.stack.directions * recipe.hidden, recipe.hidden) for _ in self.stack.kinds
        )
        self.has_memory = recipe.attention

    def forward(self, x: Tensor, lengths: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Read whole sources.

        x        [batch, time] int64
        lengths  [batch] int32, from 1 to time
        states   each [batch, directions, hidden]; zeros, as every source is read from its beginning
        Returns (memory [batch, time, width] with attention, *initial states of the decoder [batch, 1, hidden], *next
        states).
        """
        steps, last = self.stack(self.dropout(self.table(x)).transpose(0, 1), lengths, states)
        initial = []
        for bridge, kind, state in zip(self.bridges, self.stack.kinds, last, strict=True):
            bridged = bridge(state.flatten(1)).unsqueeze(1)
            # A cell state may be of any size, what leaves a cell lies within -1 and 1.
            initial.append(bridged if kind.endswith("c") else bridged.tanh())
        memory = (self.dropout(steps.transpose(0, 1)),) if self.has_memory else ()
        return (*memory, *initial, *last)


class Decoder(nn.Module):
    """Makes the ids of the answer: a table of vectors, recurrent layers, attention if there is a memory, a head."""

    def __init__(self, num_ids: int, memory_width: int, recipe: Recipe) -> None:
        super().__init__()
        self.table = nn.Embedding(num_ids, recipe.embedding)
        self.dropout = nn.Dropout(recipe.output_dropout)
        self.stack = Stack(recipe, recipe.embedding)
        self.attention = Attention(self.stack.width, memory_width) if recipe.attention else None
        self.head = nn.Linear(self.stack.width, num_ids)

    def forward(self, token: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Foretell the id after each.

        token    [batch, time] int64, the ids that were chosen last
        inputs   with attention (memory [batch, source time, memory width], lengths, source_lengths, *states), else
                 (lengths, *states)
        Returns (log_probs [batch, time, ids], *next states).
        """
        memory, (lengths, *rest) = (inputs[0], inputs[1:]) if self.attention else (None, inputs)
        source_lengths, states = (rest[0], rest[1:]) if self.attention else (None, rest)
        steps, following = self.stack(self.table(token).transpose(0, 1), lengths, tuple(states))
        scores = self._scores(steps.transpose(0, 1), memory, source_lengths)
        return (scores.log_softmax(-1), *following)

    def scores(
        self, token: Tensor, lengths: Tensor, memory: Tensor | None, source_lengths: Tensor, states: tuple[Tensor, ...]
    ) -> Tensor:
        """What training compares with targets: `forward` before the softmax, [batch, time, ids]."""
        steps = self.stack.outputs(self.dropout(self.table(token)).transpose(0, 1), lengths, states)
        return self._scores(steps.transpose(0, 1), memory, source_lengths)

    def _scores(self, steps: Tensor, memory: Tensor | None, source_lengths: Tensor | None) -> Tensor:
        if self.attention is not None:
            steps = self.attention(steps, memory, source_lengths)
        scores: Tensor = self.head(self.dropout(steps))
        return scores


class EncoderDecoder(nn.Module):
    """An encoder, and the decoder that goes on from where it ends."""

    def __init__(self, task: TransductionTask, recipe: Recipe) -> None:
        """Make an untrained net."""
        super().__init__()
        self.encoder = Encoder(task.source_input.num_ids or 0, recipe)
        self.decoder = Decoder(len(task.vocabulary), self.encoder.stack.width, recipe)

    @property
    def num_parameters(self) -> int:
        """Trained parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def read(self, source: Tensor, source_lengths: Tensor) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Encode sources [batch, source time] int64; returns the memory, if there is one, and the decoder's states."""
        answers = self.encoder(source, source_lengths, *self.encoder.stack.zero_states(source))
        count = len(self.encoder.stack.kinds)
        return (answers[0], answers[1 : 1 + count]) if self.encoder.has_memory else (None, answers[:count])

    def scores(self, source: Tensor, source_lengths: Tensor, token: Tensor, lengths: Tensor) -> Tensor:
        """What training compares with targets: scores of the id after each, [batch, time, ids], before the softmax."""
        memory, states = self.read(source, source_lengths)
        return self.decoder.scores(token, lengths, memory, source_lengths, states)

    @torch.no_grad()
    def greedy(self, source: Tensor, source_lengths: Tensor, task: TransductionTask) -> list[Tensor]:
        """Answer sources [batch, source time] with the likeliest id at each step; each [length] int64."""
        memory, states = self.read(source, source_lengths)
        ones = torch.ones(len(source), dtype=torch.int32, device=source.device)
        token = torch.full((len(source), 1), task.begin_id, device=source.device)
        is_over = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        chosen: list[Tensor] = []
        while len(chosen) < task.generation.max_steps and not is_over.all():
            reads = (memory, ones, source_lengths) if memory is not None else (ones,)
            log_probs, *following = self.decoder(token, *reads, *states)
            states = tuple(following)
            token = log_probs.argmax(-1)
            is_over |= token[:, 0] == task.end_id
            chosen.append(token[:, 0])
        ids = torch.stack(chosen, dim=1).cpu()
        ends = (ids == task.end_id).int()
        lengths = torch.where(ends.any(1), ends.argmax(1), ids.shape[1])
        return [row[:length] for row, length in zip(ids, lengths.tolist(), strict=True)]

    def graphs(self, task: AnyTask) -> list[GraphModule]:
        """Describe the graphs that this net becomes: the decoder's, which answers, and the encoder's."""
        if not isinstance(task, TransductionTask):
            raise TypeError(f"{task.name} has nothing to encode")
        encoder, decoder = self.encoder, self.decoder
        width = encoder.stack.width
        states = decoder.stack.state_specs(initial=INITIAL)
        memory = TensorSpec(
            name=MEMORY, dtype="float32", row_shape=(width,), layout=Layout.PER_STEP, description="what was read"
        )
        memories = (memory,) * encoder.has_memory
        initial = [
            TensorSpec(
                name=state.initial,
                dtype="float32",
                row_shape=state.row_shape,
                layout=Layout.PER_SEQUENCE,
                description=f"what {state.name} of the decoder begins with",
            )
            for state in states
        ]
        answers = GraphSpec(
            role="decoder",
            layers=decoder.stack.layer_specs(),
            inputs=(*task.inputs, *(each.model_copy(update={"layout": Layout.PER_SOURCE_STEP}) for each in memories)),
            outputs=(task.output,),
            states=states,
        )
        reads = GraphSpec(
            role="encoder",
            file=ENCODER_FILE,
            layers=encoder.stack.layer_specs(),
            inputs=(task.source_input,),
            outputs=(*memories, *initial),
            states=encoder.stack.state_specs(),
        )
        parts: Sequence[tuple[nn.Module, Stack, GraphSpec]] = (
            (decoder, decoder.stack, answers),
            (encoder, encoder.stack, reads),
        )
        return [
            GraphModule(module=module, ready=frozen(module), spec=spec, draw=stack.draw(scale=_MEMORY_SPREAD))
            for module, stack, spec in parts
        ]
