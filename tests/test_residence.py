"""service.residence: states keep their bits wherever they are, and those that have not run for longest go."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from models.spec import StateSpec
from service.errors import Exhausted, Overloaded, SpillFailed, SpillLost
from service.residence import MOVED_ROWS, Residence
from service.slots import StateSlab
from service.tally import Tally

STATES = [
    StateSpec(name=f"state.{i}.h", next_name=f"state.{i}.h.next", dtype=dtype, row_shape=shape)
    for i, (shape, dtype) in enumerate([((1, 3), "float32"), ((2,), "int64"), ((), "float64")])
]
ROW_BYTES = 12 + 16 + 8


def residence_with(store, *, max_resident, capacity=1_000, num_staying=4, running=()):
    slab = StateSlab([(s.row_shape, s.dtype) for s in STATES], max_resident + num_staying)
    return Residence(slab, STATES, capacity, max_resident, store, running.__contains__, Tally())


def write(residence, slot, seed):
    """Write random bits of any kind, NaN and -0.0 included. Returns them."""
    data = np.random.default_rng(seed).bytes(ROW_BYTES)
    for index, values in enumerate(residence._unpack([data])):
        residence.write(slot, index, values[0])
    return data


def read(residence, slot):
    return b"".join(values[0].tobytes() for values in residence.read(np.array([slot])))


def run(residence, *slots):
    residence.rows(np.array(slots))


def spilled(residence, slots):
    return set(residence.absent(list(slots)))


def test_those_that_have_not_run_for_longest_go_first(store):
    residence = residence_with(store, max_resident=3)
    a, b, c = (residence.admit() for _ in range(3))
    run(residence, b)
    run(residence, a)
    d = residence.admit()
    assert spilled(residence, (a, b, c, d)) == {c}
    run(residence, b)
    e = residence.admit()
    assert spilled(residence, (a, b, c, d, e)) == {c, a}
    assert residence.bring_back([a]) == {a: None}
    assert spilled(residence, (a, b, c, d, e)) == {c, d}


def test_one_that_runs_stays_and_where_all_run_there_is_no_room(store):
    running = set()
    residence = residence_with(store, max_resident=2, running=running)
    a, b = residence.admit(), residence.admit()
    running.add(a)
    c = residence.admit()
    assert spilled(residence, (a, b, c)) == {b}
    running.add(c)
    with pytest.raises(
        Overloaded, match=r"all 2 sessions in memory are in use.*max_resident_sessions\) is 2"
    ) as caught:
        residence.admit()
    assert caught.value.retry_after_s == 0.25
    assert residence.bring_back([b]) == {}
    assert (residence.num_allocated, residence.num_resident, residence.num_spilled) == (3, 2, 1)
    running.remove(a)
    assert residence.bring_back([b]) == {b: None}
    assert spilled(residence, (a, b, c)) == {a}


def test_what_stays_never_goes_and_takes_nobodys_room(store):
    residence = residence_with(store, max_resident=1)
    staying = residence.allocate(4)
    slots = [residence.admit() for _ in range(3)]
    assert spilled(residence, [*staying.tolist(), *slots]) == set(slots[:2])
    with pytest.raises(Exhausted, match="1 sequences need state, room for 0"):
        residence_with(store, max_resident=1, num_staying=0, capacity=0).allocate(1)
    residence.free(staying)
    assert (residence.num_allocated, residence.num_resident) == (3, 1)


def test_states_move_in_bounded_numbers_and_some_more_go_than_must(store):
    residence = residence_with(store, max_resident=800, capacity=3_000)
    slots = [residence.admit() for _ in range(800)]
    slots.append(residence.admit())
    assert residence.num_spilled == MOVED_ROWS  # so that the next opens find room
    slots += [residence.admit() for _ in range(799)]
    absent = residence.absent(slots)
    assert len(absent) == 832
    assert residence.bring_back(absent) == dict.fromkeys(absent[:MOVED_ROWS])
    assert residence._tally.restores == MOVED_ROWS


def test_large_states_move_one_at_a_time(store):
    large = [StateSpec(name="state.0.h", next_name="state.0.h.next", dtype="float32", row_shape=(1, 2**17))]
    slab = StateSlab([((1, 2**17), "float32")], 2)
    residence = Residence(slab, large, 9, 2, store, set().__contains__, Tally())
    slots = [residence.admit() for _ in range(4)]
    assert residence.bring_back(slots[:2]) == {slots[0]: None}


def test_rows_of_those_that_came_back_or_ended_are_swept(store):
    residence = residence_with(store, max_resident=1)
    a, b, c = (residence.admit() for _ in range(3))
    residence.bring_back([a])
    residence.free(np.array([b]))
    assert (residence.num_spilled, len(store)) == (1, 3)
    residence.sweep()
    assert (residence.num_spilled, len(store)) == (1, 1)
    assert spilled(residence, (a, c)) == {c}
    assert read(residence, c) == bytes(ROW_BYTES)


def test_slots_are_zero_at_first_whoever_had_them_or_their_row(store):
    residence = residence_with(store, max_resident=1)
    a = residence.admit()
    write(residence, a, 1)
    b = residence.admit()
    residence.free(np.array([a]))
    again = residence.admit()
    assert (again, read(residence, again), read(residence, b)) == (a, bytes(ROW_BYTES), bytes(ROW_BYTES))


def test_what_is_not_in_memory_is_neither_run_nor_written(store):
    residence = residence_with(store, max_resident=1)
    a, b = residence.admit(), residence.admit()
    assert (residence.holds(np.array([b])), residence.holds(np.array([b, a]))) == (True, False)
    with pytest.raises(ValueError, match="not in memory"):
        run(residence, b, a)
    with pytest.raises(ValueError, match="not in memory"):
        write(residence, a, 1)


def test_a_full_store_refuses_room_and_moves_nothing(store):
    residence = residence_with(store, max_resident=2)
    a, b, c = (residence.admit() for _ in range(3))
    data = [write(residence, slot, slot) for slot in (b, c)]
    store._db.execute("PRAGMA query_only = ON")  # as a disk that takes no more
    for _ in range(2):
        with pytest.raises(SpillFailed):
            residence.admit()
    outcome = residence.bring_back([a])
    assert isinstance(outcome[a], SpillFailed)
    assert (spilled(residence, (a, b, c)), residence.num_allocated) == ({a}, 3)
    assert [read(residence, slot) for slot in (b, c)] == data
    residence.free(np.array([b]))
    assert residence.bring_back([a]) == {a: None}  # there is room without it
    residence.sweep()
    assert residence._tally.spill_errors == 4
    store._db.execute("PRAGMA query_only = OFF")
    d = residence.admit()
    assert spilled(residence, (a, c, d)) == {c}
    assert read(residence, c) == data[1]


def test_a_state_that_is_lost_is_lost_alone(store):
    residence = residence_with(store, max_resident=3)
    slots = [residence.admit() for _ in range(6)]
    store._db.execute("UPDATE state SET checksum = 0 WHERE key = ?", (2**32 + slots[1],))
    outcome = residence.bring_back(slots[:3])
    assert (outcome[slots[0]], type(outcome[slots[1]]), outcome[slots[2]]) == (None, SpillLost, None)
    with pytest.raises(SpillLost):
        read(residence, slots[1])
    residence.free(np.array(slots))
    assert (residence.num_allocated, residence.num_resident, residence.num_spilled) == (0, 0, 0)


class ResidenceMachine(RuleBasedStateMachine):
    """Against a dict of bytes by slot, and a list of who ran when."""

    def __init__(self, store):
        super().__init__()
        self.store = store

    @initialize(max_resident=st.integers(1, 20))
    def start(self, max_resident):
        self.running = set()
        self.residence = residence_with(self.store, max_resident=max_resident, capacity=40, running=self.running)
        self.max_resident = max_resident
        self.data = {}
        self.ran_at = {}  # of those that may go
        self.now = 0
        self.gone = set()
        self.stored = len(self.store)

    def some(self, data, among, min_size=1):
        return data.draw(st.lists(st.sampled_from(sorted(among)), unique=True, min_size=min_size, max_size=12))

    def note_runs(self, slots):
        self.now += 1
        self.ran_at.update(dict.fromkeys(slots, self.now))

    def check_who_went(self, came=()):
        """Whoever went did not run, and ran before all that are still there and do not run."""
        gone = {slot for slot in self.residence.absent(sorted(self.ran_at)) if slot not in self.gone}
        there = set(self.ran_at) - self.gone - gone - self.running - set(came)
        assert not gone & self.running
        if gone and there:
            assert max(self.ran_at[slot] for slot in gone) <= min(self.ran_at[slot] for slot in there)
        self.gone = self.gone - set(came) | gone

    @precondition(lambda self: len(self.data) < 30)
    @rule(count=st.integers(1, 5))
    def admit(self, count):
        for _ in range(count):
            if len((set(self.ran_at) - self.gone) & self.running) == self.max_resident:
                with pytest.raises(Overloaded):
                    self.residence.admit()
                return
            slot = self.residence.admit()
            assert slot not in self.data
            self.data[slot] = bytes(ROW_BYTES)
            self.note_runs([slot])
            self.check_who_went(came=[slot])

    @precondition(lambda self: len(self.data) - len(self.ran_at) < 3)
    @rule()
    def allocate(self):
        [slot] = self.residence.allocate(1).tolist()
        self.data[slot] = bytes(ROW_BYTES)

    @precondition(lambda self: set(self.data) - self.gone)
    @rule(data=st.data(), seed=st.integers(0, 2**32))
    def run(self, data, seed):
        """Begin a run, that writes at once."""
        slots = self.some(data, set(self.data) - self.gone)
        run(self.residence, *slots)
        self.note_runs([slot for slot in slots if slot in self.ran_at])
        for slot in slots:
            self.data[slot] = write(self.residence, slot, (seed, slot))
        if data.draw(st.booleans()):
            self.running.update(slots)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def complete(self, data):
        self.running.difference_update(self.some(data, self.running))

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def bring_back(self, data):
        slots = self.some(data, self.gone)
        held = len((set(self.ran_at) - self.gone) & self.running)
        outcome = self.residence.bring_back(slots)
        assert outcome == dict.fromkeys(slots[: self.max_resident - held])
        if outcome:
            self.note_runs(outcome)
        self.check_who_went(came=outcome)

    @precondition(lambda self: set(self.data) - self.running)
    @rule(data=st.data())
    def free(self, data):
        slots = self.some(data, set(self.data) - self.running)
        self.residence.free(np.array(slots))
        for slot in slots:
            del self.data[slot]
            self.ran_at.pop(slot, None)
            self.gone.discard(slot)

    @rule()
    def sweep(self):
        self.residence.sweep()
        assert len(self.store) - self.stored == len(self.gone)

    @invariant()
    def states_and_counts_are_as_expected(self):
        residence = self.residence
        for slot, data in self.data.items():
            assert read(residence, slot) == data
        assert residence.num_allocated == len(self.data)
        assert residence.num_spilled == len(self.gone)
        assert residence.num_resident == len(self.ran_at) - len(self.gone) <= self.max_resident
        there = sorted(set(self.data) - self.gone)
        assert len(set(residence._row_of[there].tolist())) == len(there)

    def teardown(self):
        if hasattr(self, "data"):
            self.residence.free(np.array(sorted(self.data), dtype=np.int64))
            self.residence.sweep()
            assert len(self.store) == self.stored


def test_any_order_of_things(store):
    machine = settings(max_examples=60, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(lambda: ResidenceMachine(store), settings=machine)
