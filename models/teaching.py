"""Batches of sequences to generate, what a net loses on them, and how it is judged.

In training the ids that are fed are those of the target, not the net's own (teacher forcing, Williams and Zipser 1989).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.compute import Compute
from models.generators import CurveNet, TextNet
from models.seq2seq import EncoderDecoder
from models.tasks.base import Array, pad
from models.tasks.examples import Examples
from models.tasks.generating import CurveTask, GenerationTask, TextTask, TokenTask, TransductionTask, perplexity

GeneratorNet = CurveNet | TextNet | EncoderDecoder

EVALUATION_BATCH = 256
"""Sequences evaluated at once."""
_SHOWN = 5
"""Answers that are written down for people, of each prompt."""
_POOL_BATCHES = 50
"""Batches' worth of sequences that are sorted by length, so that little of a batch is padding."""


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """Sequences of a split, padded, on a device."""

    contexts: Tensor
    """[batch, features]; no features where the task has no context."""
    sources: Tensor
    """[batch, source time] int64; no time where the task has no source."""
    source_lengths: Tensor
    """[batch] int32."""
    fed: Tensor
    """[batch, time] int64, the prompt and the target; no time where nothing is fed back."""
    lengths: Tensor
    """[batch] int32, steps of the net."""
    targets: Tensor
    """Of the steps that are asked, row after row: ids [n] int64, or values [n, outputs]."""
    is_asked: Tensor
    """[batch, time] bool, true where a step's answer is compared: from a prompt's last id on."""


def gather(task: GenerationTask, split: Examples, numbers: Sequence[int], device: torch.device) -> Lesson:
    """Take sequences of a split."""

    def padded(sequences: Sequence[Array]) -> Tensor:
        stacked = pad(sequences) if sequences else np.zeros((len(numbers), 0), dtype=np.int64)
        return torch.from_numpy(stacked).to(device)

    targets = [split.targets[n] for n in numbers]
    sources = [split.sources[n] for n in numbers] if split.sources else []
    contexts = np.stack([split.contexts[n] for n in numbers]) if split.contexts else np.zeros((len(numbers), 0))
    fed, begins = [], np.zeros(len(numbers), dtype=np.int32)
    if isinstance(task, TokenTask):
        prompts = [split.prompts[n] for n in numbers]
        fed = [np.concatenate([prompt, target]) for prompt, target in zip(prompts, targets, strict=True)]
        begins = np.array([len(prompt) - 1 for prompt in prompts], dtype=np.int32)
        end = np.array([task.end_id])
        targets = [np.concatenate([target, end]) for target in targets]
    lengths = begins + np.array([len(target) for target in targets], dtype=np.int32)
    steps = np.arange(lengths.max())
    is_asked = (steps >= begins[:, None]) & (steps < lengths[:, None])
    return Lesson(
        contexts=torch.from_numpy(contexts.astype(np.float32)).to(device),
        sources=padded(sources),
        source_lengths=torch.tensor([len(source) for source in sources], dtype=torch.int32, device=device),
        fed=padded(fed),
        lengths=torch.from_numpy(lengths).to(device),
        targets=torch.from_numpy(np.concatenate(targets)).to(device),
        is_asked=torch.from_numpy(is_asked).to(device),
    )


def training_loss(net: GeneratorNet, task: GenerationTask, compute: Compute, numbers: Sequence[int]) -> Tensor:
    """Compute what a step of the optimiser descends, [], of some training sequences."""
    lesson = gather(task, task.train, numbers, compute.device)
    with compute.autocast():
        scores = score(net, lesson)
    return losses(net, scores.float(), lesson).mean()


def score(net: GeneratorNet, lesson: Lesson) -> Tensor:
    """What a net answers at the steps that are asked: values [n, outputs], or scores [n, ids] before the softmax."""
    if isinstance(net, CurveNet):
        scores = net.scores(lesson.contexts, lesson.lengths)
    elif isinstance(net, TextNet):
        scores = net.scores(lesson.fed, lesson.lengths)
    else:
        scores = net.scores(lesson.sources, lesson.source_lengths, lesson.fed, lesson.lengths)
    return scores[lesson.is_asked]


def losses(net: GeneratorNet, scores: Tensor, lesson: Lesson) -> Tensor:
    """Compare answers with targets; returns [n] cross-entropies, or Huber losses in units of output_scale."""
    if not isinstance(net, CurveNet):
        return nn.functional.cross_entropy(scores, lesson.targets, reduction="none")
    errors = (scores - lesson.targets) / net.output_scale
    return nn.functional.huber_loss(errors, torch.zeros_like(errors), reduction="none").mean(dim=1)


def epoch_batches(split: Examples, size: int) -> list[list[int]]:
    """Put all sequences into batches of about equal lengths, in random order, by torch's random state."""
    order = torch.randperm(len(split)).numpy()
    targets, sources = split.lengths, split.source_lengths
    batches: list[list[int]] = []
    for start in range(0, len(order), size * _POOL_BATCHES):
        pool = order[start : start + size * _POOL_BATCHES]
        # Stable, and by the random order where lengths are the same.
        pool = pool[np.lexsort((targets[pool], sources[pool]))]
        batches += [pool[at : at + size].tolist() for at in range(0, len(pool), size)]
    return [batches[n] for n in torch.randperm(len(batches)).tolist()]


def evaluate(net: GeneratorNet, task: GenerationTask, split: Examples) -> dict[str, float]:
    """Compute the loss and the task's metrics over a split, in float32, where the net is.

    Curves and text are judged with teacher forcing, which is what a perplexity is of; answers to a source by what the
    net makes of it on its own, greedily.
    """
    net.eval()
    device = next(net.parameters()).device
    order = np.lexsort((split.lengths, split.source_lengths))
    total, count = 0.0, 0
    answers: dict[int, Array] = {}
    with torch.no_grad():
        for start in range(0, len(split), EVALUATION_BATCH):
            numbers = order[start : start + EVALUATION_BATCH].tolist()
            lesson = gather(task, split, numbers, device)
            scores = score(net, lesson)
            each = losses(net, scores, lesson)
            total, count = total + float(each.sum()), count + len(each)
            if isinstance(task, CurveTask):
                ends = lesson.lengths.cumsum(0)[:-1].tolist()
                answers |= dict(zip(numbers, np.split(scores.cpu().numpy(), ends), strict=True))
            elif isinstance(net, EncoderDecoder) and isinstance(task, TransductionTask):
                made = net.greedy(lesson.sources, lesson.source_lengths, task)
                answers |= dict(zip(numbers, (ids.numpy() for ids in made), strict=True))
    loss = total / count
    if isinstance(task, CurveTask | TransductionTask):
        return {"loss": loss, **task.judge(split, [answers[number] for number in range(len(split))])}
    return {"loss": loss, **perplexity(loss)}


def answers_for_people(net: GeneratorNet, task: GenerationTask) -> list[str]:
    """Write down a few answers: text drawn after each prompt, or what sources of the validation split become."""
    net = copy.deepcopy(net).cpu().eval()
    if isinstance(net, TextNet) and isinstance(task, TextTask):
        generator = torch.Generator().manual_seed(0)
        prompts = {task.text(prompt): torch.from_numpy(prompt) for prompt in task.train.prompts}
        return [
            f"{name} {task.text(net.sample(prompt, task, generator).numpy())}"
            for name, prompt in sorted(prompts.items())
            for _ in range(_SHOWN)
        ]
    if isinstance(net, EncoderDecoder) and isinstance(task, TransductionTask):
        lesson = gather(task, task.validation, range(min(_SHOWN, len(task.validation))), torch.device("cpu"))
        made = net.greedy(lesson.sources, lesson.source_lengths, task)
        letters = task.source_input.categories
        return [
            f"{''.join(letters[number] for number in source.tolist())}: {task.text(ids.numpy())}"
            for source, ids in zip(task.validation.sources, made, strict=False)
        ]
    return []
