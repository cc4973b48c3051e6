"""service.slots: allocated or free, zeros at first, and rows that nobody else's rows touch."""

import numpy as np
import psutil
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.errors import Exhausted
from service.slots import StateSlab

STATES = [((1, 3), "float32"), ((2,), "int64"), ((), "float64")]


def rows_for(slots, seed):
    """Random rows for every state of STATES; float bits of any kind, NaN and -0.0 included."""
    rng = np.random.default_rng(seed)
    return [
        np.frombuffer(rng.bytes(len(slots) * int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(
            len(slots), *shape
        )
        for shape, dtype in STATES
    ]


def test_a_new_slot_is_zero_though_its_last_owner_wrote_to_it():
    slab = StateSlab(STATES, 2)
    first = slab.allocate(2)
    slab.scatter(first, rows_for(first, seed=1))
    slab.free(first[:1])
    again = slab.allocate(1)
    assert again.tolist() == first[:1].tolist()
    for values, (shape, dtype) in zip(slab.read(again), STATES, strict=True):
        np.testing.assert_array_equal(values, np.zeros((1, *shape), dtype), strict=True)


def test_slots_are_used_from_the_lowest_and_given_back_ones_first():
    slab = StateSlab(STATES, 5)
    assert slab.allocate(3).tolist() == [0, 1, 2]
    slab.free(np.array([1]))
    assert slab.allocate(2).tolist() == [1, 3]


def test_more_than_are_free_is_refused_and_changes_nothing():
    slab = StateSlab(STATES, 3)
    slab.allocate(2)
    with pytest.raises(Exhausted, match="2 sequences need state, room for 1 of 3 is left"):
        slab.allocate(2)
    assert (slab.num_free, slab.num_allocated) == (1, 2)
    assert slab.allocate(1).tolist() == [2]


@pytest.mark.parametrize("slots", [[0, 0], [2], [0, 2]])
def test_freeing_what_is_not_allocated_is_a_bug_and_changes_nothing(slots):
    slab = StateSlab(STATES, 3)
    slab.allocate(2)
    with pytest.raises(ValueError, match="not allocated"):
        slab.free(np.array(slots))
    assert slab.num_allocated == 2
    slab.free(np.array([0, 1]))
    with pytest.raises(ValueError, match=r"not allocated: \[1\]"):
        slab.free(np.array([1]))


def test_gathered_rows_are_a_copy():
    slab = StateSlab(STATES, 2)
    slots = slab.allocate(2)
    slab.read(slots)[0][:] = 7
    assert not slab.read(slots)[0].any()


def test_slots_that_were_never_used_cost_no_memory():
    process = psutil.Process()
    before = process.memory_info().rss
    slab = StateSlab([((1, 1024), "float32")], 2**17)  # 512 MiB
    slots = slab.allocate(2)
    slab.scatter(slots, [np.ones((2, 1, 1024), np.float32)])
    assert process.memory_info().rss - before < 16 * 2**20
    assert slab.num_free == 2**17 - 2


class SlabMachine(RuleBasedStateMachine):
    """Against a dict of rows by slot."""

    @initialize(capacity=st.integers(1, 6))
    def start(self, capacity):
        self.slab = StateSlab(STATES, capacity)
        self.capacity = capacity
        self.rows = {}
        self.seed = 0

    def some(self, data, min_size=0):
        slots = st.lists(st.sampled_from(sorted(self.rows)), unique=True, min_size=min_size)
        return np.array(data.draw(slots), dtype=np.int64)

    @rule(count=st.integers(0, 7))
    def allocate(self, count):
        if count > self.capacity - len(self.rows):
            with pytest.raises(Exhausted):
                self.slab.allocate(count)
            return
        slots = self.slab.allocate(count).tolist()
        assert len(set(slots)) == count
        assert not set(slots) & self.rows.keys()
        assert all(0 <= slot < self.capacity for slot in slots)
        self.rows |= {slot: [np.zeros(shape, dtype).tobytes() for shape, dtype in STATES] for slot in slots}

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def free(self, data):
        slots = self.some(data)
        self.slab.free(slots)
        for slot in slots.tolist():
            del self.rows[slot]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def scatter(self, data):
        slots = self.some(data)
        self.seed += 1
        values = rows_for(slots, self.seed)
        self.slab.scatter(slots, values)
        for row, slot in enumerate(slots.tolist()):
            self.rows[slot] = [value[row].tobytes() for value in values]

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), index=st.integers(0, len(STATES) - 1))
    def write_one_state(self, data, index):
        slots = self.some(data, min_size=1)
        self.seed += 1
        values = rows_for(slots, self.seed)[index]
        if len(slots) == 1:
            self.slab.write(int(slots[0]), index, values[0])
        else:
            self.slab.write(slots, index, values)
        for row, slot in enumerate(slots.tolist()):
            self.rows[slot][index] = values[row].tobytes()

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def read_in_any_order(self, data):
        slots = self.some(data)
        gathered = self.slab.read(slots)
        buffers = [np.full_like(values, 7) for values in gathered]
        self.slab.gather(slots, buffers)
        for row, slot in enumerate(slots.tolist()):
            assert [values[row].tobytes() for values in gathered] == self.rows[slot]
            assert [values[row].tobytes() for values in buffers] == self.rows[slot]

    @invariant()
    def every_row_and_count_is_as_expected(self):
        assert self.slab.num_allocated == len(self.rows)
        assert self.slab.num_free == self.capacity - len(self.rows)
        slots = sorted(self.rows)
        gathered = self.slab.read(np.array(slots, dtype=np.int64))
        for row, slot in enumerate(slots):
            assert [values[row].tobytes() for values in gathered] == self.rows[slot]


TestSlab = SlabMachine.TestCase
TestSlab.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
