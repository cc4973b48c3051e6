"""Is an unrolled graph faster than the operator? `python -m benchmarks.unroll` prints the table of docs/options.md.

One layer of 100 units with the weights that it begins with, in onnxruntime on one thread of the CPU; every row has the
graph's full length, which is the unrolled graph's best case. Times are the best of several rounds, taken in turns.
"""

from __future__ import annotations

import copy
import time

import numpy as np
import torch
from torch import Tensor, nn

from models.graphs import GraphModule, draw_like, to_onnx
from models.layers import STATES, Recurrent
from models.options import LayerOptions
from models.runtime import Named, Runtime
from models.spec import Cell, GraphSpec, Layout, StateSpec, TensorSpec

INPUTS, HIDDEN = 16, 100
ROUNDS, SECONDS = 5, 0.02
STEPS, ROWS = (4, 16, 64), (1, 64)


class Layer(nn.Module):
    """One recurrent layer, batch first."""

    def __init__(self, layer: Recurrent) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        y, following = self.layer(x.transpose(0, 1), lengths, states)
        return y.transpose(0, 1), *following


def graph(cell: Cell, unroll: int) -> bytes:
    """Export a layer as the operator, or unrolled for some steps."""
    torch.manual_seed(0)
    layer = Recurrent(cell, INPUTS, HIDDEN, options=LayerOptions(unroll=unroll))
    states = tuple(StateSpec(name=kind, next_name=f"{kind}.next", row_shape=(1, HIDDEN)) for kind in STATES[cell])
    spec = GraphSpec(
        layers=(layer.spec,),
        inputs=(TensorSpec(name="x", dtype="float32", row_shape=(INPUTS,), layout=Layout.PER_STEP),),
        outputs=(TensorSpec(name="y", dtype="float32", row_shape=(HIDDEN,), layout=Layout.PER_STEP),),
        states=states,
        fixed_steps=unroll or None,
    )
    module = Layer(layer).eval()
    ready = copy.deepcopy(module)
    ready.layer.freeze()
    part = GraphModule(module=module, ready=ready, spec=spec, draw=draw_like(np.float64(0), np.float64(1)))
    return to_onnx(part)[0].SerializeToString()


def seconds(runtime: Runtime, feeds: Named) -> float:
    """Time of one run, the mean of as many as fit into SECONDS."""
    begin, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - begin) < SECONDS or count < 2:
        runtime(feeds)
        count += 1
    return passed / count


def main() -> None:
    """Print the table."""
    rng = np.random.default_rng(0)
    print("| cell | steps | rows | operator us | unrolled us | unrolled / operator | operator KiB | unrolled KiB |")
    print("|---|---|---|---|---|---|---|---|")
    for cell in STATES:
        operator = graph(cell, 0)
        for steps in STEPS:
            files = (operator, graph(cell, steps))
            runtimes = [Runtime(file) for file in files]
            for rows in ROWS:
                feeds = {"x": rng.standard_normal((rows, steps, INPUTS)).astype(np.float32)}
                feeds |= {"lengths": np.full(rows, steps, np.int32)}
                feeds |= {kind: np.zeros((rows, 1, HIDDEN), np.float32) for kind in STATES[cell]}
                taken = [[seconds(runtime, feeds) for runtime in runtimes] for _ in range(ROUNDS)]
                native, unrolled = (1e6 * min(each) for each in zip(*taken, strict=True))
                sizes = " | ".join(f"{len(file) / 1024:.0f}" for file in files)
                said = f"{native:.0f} | {unrolled:.0f} | {unrolled / native:.2f}"
                print(f"| {cell} | {steps} | {rows} | {said} | {sizes} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
