"""Runs through bound buffers give what plain runs give, and move only the states that are theirs."""

import numpy as np
import pytest

from service.backend import Backend
from service.errors import RunFailed
from service.runner import Runner
from service.splitting import TRIALS
from tests.lanes import equal
from tests.onnx_models import build

CAPACITY, MAX_ROWS = 40, 16


@pytest.fixture(params=["lstm", "gru", "rnn"])
def backend(request, tmp_path):
    build(request.param).save(tmp_path, "model")
    return Backend(tmp_path / "model" / "1" / "model.onnx")


@pytest.fixture(params=[1, 3])
def runner(request, backend):
    return Runner(backend, CAPACITY, MAX_ROWS, threads=request.param)


def plain(runner, slots, x, lengths):
    """Run by onnxruntime on arrays of its own, without touching the slab."""
    return runner._backend.run({"x": x}, lengths, runner.slab.read(slots))


def test_runs_equal_plain_ones(runner, backend):
    rng = np.random.default_rng(0)
    runner.slab.allocate(CAPACITY)
    untouched = np.arange(CAPACITY - 4, CAPACITY)
    before = runner.slab.read(untouched)
    for num_rows, steps in [(1, 1), (16, 1), (5, 1), (16, 1), (3, 4), (1, 1), (17, 1)] * (2 * TRIALS):
        slots = rng.permutation(CAPACITY - 4)[:num_rows]
        x = rng.standard_normal((num_rows, steps, 3)).astype(np.float32)
        lengths = np.full(num_rows, steps, np.int32)
        expected, states = plain(runner, slots, x, lengths)
        outputs = runner.run(slots, {"x": x}, lengths)
        for ours, theirs in zip([*outputs, *runner.slab.read(slots)], [*expected, *states], strict=True):
            if backend.spec.cell == "rnn":  # its kernel rounds differently in other batches: see the probe
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
            else:
                equal(ours, theirs)
    for ours, theirs in zip(runner.slab.read(untouched), before, strict=True):
        equal(ours, theirs)


def test_outputs_outlive_the_next_run(runner):
    slots, ones = runner.slab.allocate(4), np.ones(4, np.int32)
    x = np.random.default_rng(1).standard_normal((2, 4, 1, 3)).astype(np.float32)
    [first] = runner.run(slots, {"x": x[0]}, ones)
    kept = first.copy()
    runner.run(slots, {"x": x[1]}, ones)
    equal(first, kept)


def test_a_run_that_fails_leaves_the_states(runner, monkeypatch):
    slots, ones = runner.slab.allocate(2), np.ones(2, np.int32)
    runner.run(slots, {"x": np.ones((2, 1, 3), np.float32)}, ones)
    before = runner.slab.read(slots)
    for bound in runner._bounds.values():
        monkeypatch.setattr(bound._binding, "_iobinding", None)
    with pytest.raises(RunFailed, match="onnxruntime failed"):
        runner.run(slots, {"x": np.ones((2, 1, 3), np.float32)}, ones)
    with pytest.raises(RunFailed, match="onnxruntime failed"):
        runner.run(slots, {"x": np.ones((2, 3, 2), np.float32)}, np.full(2, 3, np.int32))
    for ours, theirs in zip(runner.slab.read(slots), before, strict=True):
        equal(ours, theirs)
