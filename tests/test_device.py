"""service.device: states that stay on a device move as those on the host do, and a run costs the same however many.

The device is the CPU here; where there is a GPU, the tests that can differ run on it too.
"""

import threading

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service import device
from service.backend import Backend
from service.config import load_settings
from service.device import DeviceRunner
from service.devicegraph import step_graph
from service.errors import Exhausted, ModelBroken, RunFailed, StatesLost
from service.placement import Node, Placement
from service.repository import load_version
from service.runner import Runner
from tests.lanes import equal
from tests.onnx_models import build

CAPACITY = 24
PROVIDERS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MODELS = {
    "lstm": build("lstm"),
    "gru": build("gru"),
    "rnn": build("rnn"),
    "two layers": build("lstm", layers=2),
    "tokens": build("gru", num_ids=11),
    "bidirectional": build("gru", bidirectional=True, many_to_one=True),
}


@pytest.fixture
def make(tmp_path):
    """Make a runner of a model, and a backend on the CPU to compare it with."""

    def make(model, provider="cpu", capacity=CAPACITY):
        path = model.save(tmp_path, "model")
        return DeviceRunner(Backend(path, provider=provider), capacity), Backend(path)

    return make


def same(provider):
    """Bit for bit on the CPU, within rounding elsewhere."""
    return equal if provider == "cpu" else lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def batch_of(rng, backend, slots, steps):
    """(inputs, lengths) of random ragged rows."""
    [x] = backend.graph.inputs
    lengths = rng.integers(1, steps + 1, size=len(slots)).astype(np.int32)
    lengths[0] = steps
    shape = (len(slots), steps, *x.row_shape)
    values = rng.integers(11, size=shape) if x.num_ids else rng.standard_normal(shape)
    return {x.name: values.astype(x.dtype)}, lengths


def real(backend, y, lengths):
    """An output without its padding."""
    per_step = backend.graph.outputs[0].layout == "per_step"
    return np.concatenate([row[:length] for row, length in zip(y, lengths, strict=True)]) if per_step else y


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("model", MODELS)
def test_runs_equal_plain_ones_whose_states_travel(make, model, provider):
    runner, backend = make(MODELS[model], provider)
    rng = np.random.default_rng(0)
    runner.slab.allocate(CAPACITY)
    states = [np.zeros((CAPACITY, *s.row_shape), np.float32) for s in backend.graph.states]
    for num_rows, steps in [(1, 1), (CAPACITY, 1), (5, 4), (2, 9), (7, 1), (CAPACITY, 3)]:
        slots = rng.permutation(CAPACITY)[:num_rows]
        inputs, lengths = batch_of(rng, backend, slots, steps)
        [theirs], after = backend.run(inputs, lengths, [state[slots] for state in states])
        for state, rows in zip(states, after, strict=True):
            state[slots] = rows
        [ours] = runner.run(slots, inputs, lengths)
        same(provider)(real(backend, ours, lengths), real(backend, theirs, lengths))
        for mine, expected in zip(runner.slab.read(np.arange(CAPACITY)), states, strict=True):
            same(provider)(mine, expected)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_states_stay_where_they_are(make, provider):
    runner, backend = make(MODELS["two layers"], provider)
    values = list(runner.slab.inputs.values())
    addresses = [value.data_ptr() for value in values]
    rng = np.random.default_rng(1)
    slots = runner.slab.allocate(3)
    runner.slab.write(slots, 1, rng.standard_normal((3, 1, 8)))
    for steps in (1, 4, 1):
        runner.run(slots, *batch_of(rng, backend, slots, steps))
        outputs = runner._step._binding.get_outputs()
        assert [value.data_ptr() for value in outputs[1:]] == addresses
    assert [value.data_ptr() for value in runner.slab.inputs.values()] == addresses
    assert {value.device_name() for value in values} == {provider}


def test_outputs_outlive_the_next_run(make):
    runner, backend = make(MODELS["lstm"])
    slots = runner.slab.allocate(4)
    rng = np.random.default_rng(2)
    [first] = runner.run(slots, *batch_of(rng, backend, slots, 1))
    kept = first.copy()
    for steps in (1, 1, 3):
        runner.run(slots, *batch_of(rng, backend, slots, steps))
    equal(first, kept)


def test_inputs_of_any_memory_layout_are_taken(make):
    runner, backend = make(MODELS["lstm"])
    slots = runner.slab.allocate(6)
    x = np.random.default_rng(3).standard_normal((3, 5, 6)).astype(np.float32).T[:, :2]
    x.flags.writeable = False
    assert not x.flags.c_contiguous
    [theirs], _ = backend.run({"x": x.copy()}, np.full(6, 2, np.int32), [np.zeros((6, 1, 8), np.float32)] * 2)
    [ours] = runner.run(slots[::-1], {"x": x}, np.full(12, 2, np.int32)[::2])
    equal(ours, theirs)


# ---- the slab, against the one on the host --------------------------------------------------------------------------


class TwinMachine(RuleBasedStateMachine):
    """A runner on a device beside one on the host: every call gives the same."""

    @initialize(capacity=st.integers(2, 6))
    def start(self, capacity):
        self.device, self.host = DeviceRunner(self.backend, capacity), Runner(self.backend, capacity, 4)
        self.slots = []
        self.seed = 0

    def some(self, data):
        slots = data.draw(st.lists(st.sampled_from(self.slots), unique=True, min_size=1))
        self.seed += 1
        return np.array(slots, dtype=np.int64), np.random.default_rng(self.seed)

    @rule(count=st.integers(0, 7))
    def allocate(self, count):
        if count > self.host.slab.num_free:
            with pytest.raises(Exhausted, match="room for"):
                self.device.slab.allocate(count)
            return
        slots = self.host.slab.allocate(count)
        equal(self.device.slab.allocate(count), slots)
        self.slots += slots.tolist()

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def free(self, data):
        slots, _ = self.some(data)
        for runner in (self.device, self.host):
            runner.slab.free(slots)
            with pytest.raises(ValueError, match="not allocated"):
                runner.slab.free(slots[:1])
        self.slots = [slot for slot in self.slots if slot not in slots]

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), index=st.integers(0, 1))
    def write(self, data, index):
        slots, rng = self.some(data)
        rows = rng.standard_normal((len(slots), 1, 8)).astype(np.float32)
        for runner in (self.device, self.host):
            mine = rows.copy()
            if len(slots) == 1:
                runner.slab.write(int(slots[0]), index, mine[0])
            else:
                runner.slab.write(slots, index, mine)
            mine[:] = np.nan

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), steps=st.integers(1, 3))
    def run(self, data, steps):
        slots, rng = self.some(data)
        inputs, lengths = batch_of(rng, self.backend, slots, steps)
        for ours, theirs in zip(
            self.device.run(slots, inputs, lengths), self.host.run(slots, inputs, lengths), strict=True
        ):
            equal(ours, theirs)

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def fail_to_write_what_is_noted(self, data):
        slots, rng = self.some(data)
        writer = self.device.slab._writer
        binding, writer._binding = writer._binding, None
        has_notes = bool(self.device.slab._notes)
        try:
            if has_notes:
                with pytest.raises(RunFailed) as caught:
                    self.device.run(slots, *batch_of(rng, self.backend, slots, 1))
                assert not isinstance(caught.value, StatesLost)
        finally:
            writer._binding = binding

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def read(self, data):
        slots, _ = self.some(data)
        for ours, theirs in zip(self.device.slab.read(slots), self.host.slab.read(slots), strict=True):
            equal(ours, theirs)

    @invariant()
    def counts_are_the_same(self):
        ours, theirs = self.device.slab, self.host.slab
        assert (ours.num_free, ours.num_allocated, ours.capacity) == (
            theirs.num_free,
            theirs.num_allocated,
            theirs.capacity,
        )

    def teardown(self):
        if self.slots:
            slots = np.array(self.slots)
            for ours, theirs in zip(self.device.slab.read(slots), self.host.slab.read(slots), strict=True):
                equal(ours, theirs)


def test_device_and_host_are_twins(tmp_path):
    from hypothesis.stateful import run_state_machine_as_test

    machine = type("Twins", (TwinMachine,), {"backend": Backend(MODELS["lstm"].save(tmp_path, "model"))})
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None))


def test_what_is_noted_while_older_notes_fail_to_be_written_comes_after_them(make, monkeypatch):
    runner, _ = make(MODELS["lstm"])
    slab = runner.slab
    slots = slab.allocate(4)
    slab.free(slots)
    kept, rewritten, renewed, _ = slab.allocate(4).tolist()
    for slot in (kept, rewritten, renewed):
        slab.write(slot, 0, np.full((1, 8), 1.0))

    def fail(inputs):
        monkeypatch.undo()
        slab.write(rewritten, 0, np.full((1, 8), 2.0))
        slab.free(np.array([renewed]))
        assert slab.allocate(1).tolist() == [renewed]
        raise RunFailed("not now")

    monkeypatch.setattr(slab._writer, "bind", fail)
    with pytest.raises(RunFailed, match="not now"):
        slab.read(slots)
    h, c = slab.read(np.array([kept, rewritten, renewed]))
    equal(h, np.stack([np.full((1, 8), value, np.float32) for value in (1.0, 2.0, 0.0)]))
    assert not c.any()


def test_no_slot_is_written_twice_at_once(make, monkeypatch):
    runner, _ = make(MODELS["lstm"])
    slab = runner.slab
    slab.free(slab.allocate(4))
    slots = slab.allocate(4)
    slab.write(slots[1:3], 1, np.ones((2, 1, 8)))
    bind = slab._writer.bind
    written = []
    monkeypatch.setattr(slab._writer, "bind", lambda inputs: written.append(inputs) or bind(inputs))
    slab.read(slots)
    [inputs] = written
    for state in ("h", "c"):
        assert sorted(inputs[f"rnnserve.slots.state.0.{state}"].tolist()) == sorted(slots.tolist())


# ---- a run on a thread, and the loop beside it ----------------------------------------------------------------------


def test_the_loop_does_not_wait_for_a_run(make):
    runner, backend = make(MODELS["lstm"])
    rng = np.random.default_rng(4)
    slots = runner.slab.allocate(2)
    runner.run(slots, *batch_of(rng, backend, slots, 1))
    before = runner.slab.read(slots)
    rows = rng.standard_normal((1, 1, 8)).astype(np.float32)
    found = []
    reading = threading.Thread(target=lambda: found.append(runner.slab.read(slots)))
    with runner.slab.lock:  # as a run has it
        reading.start()
        runner.slab.free(slots[:1])
        [again] = runner.slab.allocate(1)
        runner.slab.write(np.array([again]), 1, rows)
        assert not found
    reading.join(timeout=10)
    h, c = found[0]
    assert again == slots[0]
    equal(h, np.stack([np.zeros((1, 8), np.float32), before[0][1]]))
    equal(c, np.stack([rows[0], before[1][1]]))


def test_a_run_holds_the_lock(make, monkeypatch):
    runner, backend = make(MODELS["lstm"])
    slots = runner.slab.allocate(1)
    run = runner._step.run
    held = []
    monkeypatch.setattr(runner._step, "run", lambda: held.append(runner.slab.lock.locked()) or run())
    runner.run(slots, *batch_of(np.random.default_rng(0), backend, slots, 1))
    assert held == [True]
    assert not runner.slab.lock.locked()


def test_slots_that_come_and_go_during_runs_do_not_disturb_them(make):
    runner, backend = make(MODELS["lstm"])
    rng = np.random.default_rng(5)
    mine = runner.slab.allocate(CAPACITY // 2)
    x = rng.standard_normal((300, len(mine), 1, 3)).astype(np.float32)
    ones = np.ones(len(mine), np.int32)
    outputs = []
    running = threading.Thread(target=lambda: outputs.extend(runner.run(mine, {"x": step}, ones)[0] for step in x))
    running.start()
    num_rounds = 0
    while running.is_alive() or not num_rounds:
        slots = runner.slab.allocate(3)
        rows = np.full((3, 1, 8), num_rounds, np.float32)
        runner.slab.write(slots, 0, rows)
        h, c = runner.slab.read(slots)
        equal(h, rows)
        equal(c, np.zeros_like(rows))
        runner.slab.free(slots)
        num_rounds += 1
    states = [np.zeros((len(mine), 1, 8), np.float32)] * 2
    for ours, step in zip(outputs, x, strict=True):
        [theirs], states = backend.run({"x": step}, ones, states)
        equal(ours, theirs)


# ---- failures -------------------------------------------------------------------------------------------------------


def test_what_fails_before_the_graph_begins_leaves_the_states(make):
    runner, backend = make(MODELS["lstm"])
    rng = np.random.default_rng(6)
    slots = runner.slab.allocate(2)
    runner.run(slots, *batch_of(rng, backend, slots, 1))
    before = runner.slab.read(slots)
    with pytest.raises(RunFailed, match=r"onnxruntime failed: .*y0") as caught:
        runner.run(slots, {"y0": np.ones((2, 1, 3), np.float32)}, np.ones(2, np.int32))
    assert not isinstance(caught.value, StatesLost)
    for ours, theirs in zip(runner.slab.read(slots), before, strict=True):
        equal(ours, theirs)


def test_what_fails_in_the_graph_loses_the_states_of_its_slots_alone(make):
    runner, backend = make(MODELS["tokens"])
    rng = np.random.default_rng(7)
    slots = runner.slab.allocate(3)
    runner.run(slots, *batch_of(rng, backend, slots, 2))
    before = runner.slab.read(slots)
    with pytest.raises(StatesLost, match=r"indices element out of data bounds.*state of every sequence in the run"):
        runner.run(slots[:2], {"x": np.array([[3], [11]])}, np.ones(2, np.int32))
    [h] = runner.slab.read(slots)
    equal(h[2], before[0][2])
    inputs, lengths = batch_of(rng, backend, slots[2:], 1)
    [theirs], _ = backend.run(inputs, lengths, [before[0][2:]])
    equal(runner.run(slots[2:], inputs, lengths)[0], theirs)


def test_a_model_whose_slabs_would_leave_the_device_is_broken(tmp_path, monkeypatch):
    backend = Backend(MODELS["lstm"].save(tmp_path, "model"))
    astray = [Node("rnnserve.scatter.state.0.h", "ScatterND", "OtherExecutionProvider"), Node("", "Shape", "Other")]
    monkeypatch.setattr(backend, "place", lambda _: Placement(backend.provider, astray))
    with pytest.raises(ModelBroken, match=r"copy all states .* for ScatterND rnnserve.scatter.state.0.h: serve with"):
        DeviceRunner(backend, CAPACITY)


def test_a_device_that_moves_states_otherwise_is_found_out_at_load(tmp_path, monkeypatch):
    MODELS["lstm"].save(tmp_path, "model")
    other = build("lstm", seed=1).content
    monkeypatch.setattr(device, "step_graph", lambda _, graph: step_graph(other, graph))
    with pytest.raises(ModelBroken, match=r"model.onnx: states on \('cpu', 0\) do not move .*--provider cpu"):
        load_version(load_settings({"repository": tmp_path}), "model", 1, keeps_states=True)


def test_too_little_memory_on_the_device_says_how_much_was_asked_for(tmp_path):
    backend = Backend(MODELS["lstm"].save(tmp_path, "model"))
    backend.device = ("cuda", 99)
    with pytest.raises(MemoryError, match=r"768 bytes on \('cuda', 99\): "):
        device.DeviceSlab(backend, CAPACITY)
