"""First runs of a model version, before it takes work: its first callers should wait no longer than later ones.

A run of a size that is new binds buffers, and onnxruntime makes room for it; and while it is not known how long a run
takes, the engine sends it to a thread.
"""

from __future__ import annotations

import time

import numpy as np

from models.spec import Layout
from service.lane import Lane


def warm_up(lane: Lane) -> None:
    """Run one step of every size that costs are remembered for, and put down what each costs. Raises RunFailed.

    Sequences that are only run as a whole have no such sizes.
    """
    graph = lane.graph
    if lane.is_whole or graph.reads_source:
        return
    most_rows = lane.scheduler.config.max_rows
    for power in range((most_rows - 1).bit_length() + 1):
        num_rows = min(2**power, most_rows)
        slots = lane.runner.slab.allocate(num_rows)
        inputs = {
            t.name: np.zeros((num_rows, *((1,) if t.layout is Layout.PER_STEP else ()), *t.row_shape), dtype=t.dtype)
            for t in graph.inputs
        }
        for _ in range(2):  # the first of them is not what a run costs
            began = time.perf_counter()
            lane.runner.run(slots, inputs, np.ones(num_rows, dtype=np.int32))
            lane.run_costs[power, 0] = time.perf_counter() - began
        lane.runner.slab.free(slots[::-1])  # the lowest are used first
