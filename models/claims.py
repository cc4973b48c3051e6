"""Put a claim to the test: a plain RNN does well on short sequences and fails on long ones, where LSTM and GRU succeed.

    python -m models.claims

trains small nets on the adding problem over growing lengths and writes models/tasks/records/claims.json;
`python -m models.results` makes a picture and a table of it.

Source of the problem: S. Hochreiter and J. Schmidhuber (1997), "Long Short-Term Memory", Neural Computation 9(8),
section 5.4, here with numbers from 0 to 1. A sequence is of pairs: a number and a mark. Two steps are marked, one in
each half, and the net is asked at the end for the sum of their numbers. Whoever remembers nothing does best by
answering 1, with a mean square error of 1/6. How far apart the marks are, and how far from the end, grows with the
length; nothing else does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import click
import torch
from torch import Tensor, nn

from models.layers import Recurrent
from models.records import CLAIMS, LEARNED_MSE, RECORDS, Claims, Trial
from models.runs import versions, write_whole
from models.spec import Cell

LENGTHS = (10, 30, 100)
LEARNING_RATES = (1e-2, 2e-3)
"""Tried in this order until a net has learned it, as the validation sequences say; else the best of them counts."""
SEEDS = 3
STEPS = 1000
BATCH_SIZE = 64
HIDDEN = 32
NUM_VALIDATION, NUM_TEST = 500, 1000
CLIP_NORM = 1.0
_VALIDATION_SEED, _TEST_SEED = 1_000_001, 1_000_002


class Adder(nn.Module):
    """One recurrent layer, and a number for the state that it ends in."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.recurrent = Recurrent(cell, 2, HIDDEN)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Answer; x [time, batch, 2], returns [batch]."""
        lengths = torch.full((x.shape[1],), x.shape[0], dtype=torch.int32)
        sums: Tensor = self.head(self.recurrent.outputs(x, lengths)[-1])
        return sums[:, 0]


def draw_sequences(generator: torch.Generator, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Draw sequences of the adding problem: (x [length, count, 2], numbers from 0 to 1 and marks; sums [count])."""
    x = torch.zeros(length, count, 2)
    x[..., 0] = torch.rand(length, count, generator=generator)
    half, rows = length // 2, torch.arange(count)
    sums = torch.zeros(count)
    for start, end in ((0, half), (half, length)):
        marked = torch.randint(start, end, (count,), generator=generator)
        x[marked, rows, 1] = 1.0
        sums += x[marked, rows, 0]
    return x, sums


def learn(cell: Cell, length: int, *, seed: int, lr: float, steps: int) -> tuple[Adder, float]:
    """Train a net on fresh sequences at every step. Returns it, and its mean square error on validation sequences."""
    torch.manual_seed(seed)
    net = Adder(cell)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, sums = draw_sequences(generator, BATCH_SIZE, length)
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.mse_loss(net(x), sums))
        nn.utils.clip_grad_norm_(net.parameters(), CLIP_NORM)
        optimizer.step()
    return net, mean_square_error(net, _VALIDATION_SEED, NUM_VALIDATION, length)


def best(cell: Cell, length: int, *, seed: int, steps: int) -> tuple[float, Adder]:
    """Train a net with one learning rate after the other. Returns the one that did best, and its net."""
    found: list[tuple[float, float, Adder]] = []
    for lr in LEARNING_RATES:
        net, error = learn(cell, length, seed=seed, lr=lr, steps=steps)
        found.append((error, lr, net))
        if error < LEARNED_MSE:
            break
    _, lr, net = min(found, key=lambda each: each[0])
    return lr, net


def mean_square_error(net: Adder, seed: int, count: int, length: int) -> float:
    """Judge a net by sequences that it was not trained on."""
    with torch.no_grad():
        x, sums = draw_sequences(torch.Generator().manual_seed(seed), count, length)
        return float(nn.functional.mse_loss(net(x), sums))


def compare(*, lengths: Sequence[int], seeds: int, steps: int) -> Claims:
    """Train every cell on every length with every seed."""
    began = time.process_time()
    trials: list[Trial] = []
    num_parameters: dict[str, int] = {}
    for length in lengths:
        for cell in get_args(Cell):
            for seed in range(seeds):
                lr, net = best(cell, length, seed=seed, steps=steps)
                mse = mean_square_error(net, _TEST_SEED, NUM_TEST, length)
                trials.append(Trial(cell=cell, length=length, seed=seed, lr=lr, mse=mse))
                click.echo(f"{length} steps, {cell}, seed {seed}: mean square error {mse:.4f}, learning rate {lr:g}")
            num_parameters[cell] = sum(p.numel() for p in net.parameters())
    return Claims(
        hidden=HIDDEN,
        steps=steps,
        batch_size=BATCH_SIZE,
        learning_rates=list(LEARNING_RATES),
        num_parameters=num_parameters,
        cpu_seconds=round(time.process_time() - began, 1),
        versions=versions("torch"),
        trials=trials,
    )


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=RECORDS, help="Directory of the record.")
def main(out: Path) -> None:
    """Train RNN, LSTM and GRU on sums of two numbers in ever longer sequences, and write down how they do."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / CLAIMS, compare(lengths=LENGTHS, seeds=SEEDS, steps=STEPS).to_json().encode())


if __name__ == "__main__":
    main()
