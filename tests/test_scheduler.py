"""service.scheduler: its laws one by one, then all of them at once against plain dicts and lists."""

import itertools

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.scheduler import WHOLE_SPREAD, BatchConfig, Dropped, Scheduler

NEVER = float("inf")


def submit(scheduler, lengths, *, payload=None, deadlines=None):
    """Queue one entry a slot: {slot: steps}."""
    slots, counts = list(lengths), list(lengths.values())
    starts = [sum(counts[:index]) for index in range(len(counts))]
    scheduler.submit(slots, counts, starts, payload, deadlines=deadlines)


def run(scheduler):
    """Run one batch. Returns {slot: steps that it advanced}."""
    batch = scheduler.next_batch()
    scheduler.complete(batch)
    return dict(zip(batch.slots, batch.counts, strict=True))


def test_a_step_runs_at_once_and_once():
    scheduler = Scheduler(4, BatchConfig())
    payload = [np.zeros((2, 3))]
    submit(scheduler, {2: 1, 0: 1}, payload=payload)
    batch = scheduler.next_batch()
    assert (batch.slots, batch.starts, batch.counts) == ([2, 0], [0, 1], [1, 1])
    assert all(p is payload for p in batch.payloads)
    assert (batch.steps, batch.is_last) == (1, [True, True])
    assert scheduler.next_batch() is None
    assert scheduler.complete(batch) == set()
    assert scheduler.next_batch() is None
    assert (scheduler.num_queued_steps, scheduler.is_busy(2)) == (0, False)


def test_nothing_waits_for_company_and_a_slot_is_never_in_two_batches():
    scheduler = Scheduler(4, BatchConfig())
    submit(scheduler, {0: 1})
    first = scheduler.next_batch()
    submit(scheduler, {0: 1, 1: 1})
    second = scheduler.next_batch()
    assert second.slots == [1]
    assert scheduler.next_batch() is None
    scheduler.complete(second)
    assert scheduler.next_batch() is None
    scheduler.complete(first)
    assert run(scheduler) == {0: 1}


def test_entries_of_a_slot_keep_their_order():
    scheduler = Scheduler(1, BatchConfig(max_chunk_steps=4))
    for payload, steps in (("a", 6), ("b", 1), ("c", 2)):
        submit(scheduler, {0: steps}, payload=payload)
    seen = []
    while (batch := scheduler.next_batch()) is not None:
        scheduler.complete(batch)
        seen.append((batch.payloads[0], int(batch.starts[0]), int(batch.counts[0]), bool(batch.is_last[0])))
    assert seen == [("a", 0, 4, False), ("a", 4, 2, True), ("b", 0, 1, True), ("c", 0, 2, True)]


def test_a_long_entry_does_not_starve_a_short_one():
    scheduler = Scheduler(3, BatchConfig(max_rows=1, max_chunk_steps=8))
    submit(scheduler, {0: 100})
    assert run(scheduler) == {0: 8}
    submit(scheduler, {1: 1, 2: 9})
    assert [run(scheduler) for _ in range(5)] == [{0: 8}, {1: 1}, {2: 8}, {0: 8}, {2: 1}]


def test_everyone_has_a_turn_before_anyone_has_two():
    scheduler = Scheduler(10, BatchConfig(max_rows=3, max_chunk_steps=1))
    submit(scheduler, dict.fromkeys(range(10), 3))
    turns = list(itertools.chain.from_iterable(run(scheduler) for _ in range(10)))
    assert turns == list(range(10)) * 3


def test_a_short_entry_is_passed_over_once_for_each_halving_at_most():
    scheduler = Scheduler(64, BatchConfig(max_rows=64, max_chunk_steps=16))
    submit(scheduler, {0: 16, 1: 8, 2: 4, 3: 2, 4: 1} | dict.fromkeys(range(5, 64), 1000))
    batches = [run(scheduler) for _ in range(5)]
    assert [4 in batch for batch in batches] == [False, False, False, False, True]
    assert [max(batch.values()) for batch in batches] == [16, 8, 4, 2, 1]


def test_longer_entries_join_a_batch_and_much_shorter_ones_do_not():
    scheduler = Scheduler(5, BatchConfig(max_chunk_steps=16))
    submit(scheduler, {0: 7, 1: 4, 2: 5, 3: 100, 4: 1})
    assert run(scheduler) == {0: 7, 2: 5, 3: 8}
    assert run(scheduler) == {1: 4, 3: 4}
    assert run(scheduler) == {4: 1, 3: 1}
    assert run(scheduler) == {3: 16}


def test_companions_are_found_beyond_the_first_max_rows():
    scheduler = Scheduler(9, BatchConfig(max_rows=2, max_chunk_steps=16))
    submit(scheduler, {0: 16, 1: 1, 2: 1, 3: 1, 4: 16})
    assert run(scheduler) == {0: 16, 4: 16}
    assert run(scheduler) == {1: 1, 2: 1}


def test_whole_entries_are_never_cut_and_run_beside_those_of_their_length():
    scheduler = Scheduler(6, BatchConfig(max_chunk_steps=2, whole=True))
    submit(scheduler, {0: 40, 1: 100, 2: 44, 3: 34, 4: 90, 5: 50})
    assert run(scheduler) == {0: 40, 2: 44, 5: 50}
    assert run(scheduler) == {1: 100, 4: 90}
    assert run(scheduler) == {3: 34}


def test_a_batch_of_whole_entries_is_bounded_beyond_the_first():
    scheduler = Scheduler(5, BatchConfig(whole=True, max_whole_steps=25))
    submit(scheduler, {0: 10, 1: 10, 2: 10, 3: 30, 4: 30})
    assert [run(scheduler) for _ in range(4)] == [{0: 10, 1: 10}, {2: 10}, {3: 30}, {4: 30}]


def test_a_cancelled_slot_leaves_its_neighbours_alone():
    scheduler = Scheduler(3, BatchConfig())
    submit(scheduler, {0: 1, 1: 1, 2: 1})
    assert scheduler.cancel(1) is False
    assert (scheduler.num_queued_steps, scheduler.num_ready) == (2, 2)
    assert run(scheduler) == {0: 1, 2: 1}
    assert scheduler.cancel(1) is False


def test_a_slot_cancelled_while_it_runs_is_reported_and_can_begin_again():
    scheduler = Scheduler(2, BatchConfig(max_chunk_steps=4))
    submit(scheduler, {0: 10, 1: 10})
    submit(scheduler, {0: 5})
    batch = scheduler.next_batch()
    assert scheduler.cancel(0) is True
    assert scheduler.is_busy(0)
    assert scheduler.complete(batch) == {0}
    assert (scheduler.is_busy(0), scheduler.num_queued_steps) == (False, 6)
    submit(scheduler, {0: 4}, payload="new")
    batch = scheduler.next_batch()
    assert batch.slots == [1, 0]
    assert (batch.payloads, batch.starts) == ([None, "new"], [4 + 10, 0])
    assert scheduler.complete(batch) == set()


def test_only_entries_that_have_not_begun_expire_with_what_is_behind_them():
    scheduler = Scheduler(3, BatchConfig(max_chunk_steps=4))
    submit(scheduler, {0: 8, 1: 3, 2: 2}, deadlines=[1.0, 2.0, NEVER])
    batch = scheduler.next_batch()
    assert batch.slots == [0, 1]
    scheduler.complete(batch)  # slot 0 has begun
    submit(scheduler, {1: 3}, deadlines=[2.0])
    submit(scheduler, {1: 7})
    assert scheduler.expire(1.99) == []
    assert scheduler.expire(2.0) == [Dropped(slot=1, num_expired=3, num_behind=7)]
    assert scheduler.num_queued_steps == 4 + 2
    assert scheduler.expire(9.0) == []
    assert run(scheduler) == {2: 2, 0: 2}
    assert run(scheduler) == {0: 2}


def test_rows_of_a_failed_batch_can_be_completed_alone_without_padding():
    scheduler = Scheduler(3, BatchConfig(max_chunk_steps=4))
    submit(scheduler, {0: 7, 1: 3, 2: 4}, payload="p")
    batch = scheduler.next_batch()
    assert (batch.counts, batch.steps) == ([4, 3, 4], 4)
    middle = batch.row(1)
    assert (middle.slots, middle.starts, middle.steps, middle.payloads) == ([1], [7], 3, ["p"])
    assert [scheduler.complete(batch.row(index)) for index in (2, 0, 1)] == [set()] * 3
    batch = scheduler.next_batch()
    assert (batch.slots, batch.counts, batch.steps) == ([0], [3], 3)
    scheduler.complete(batch)
    assert scheduler.num_queued_steps == 0


def test_a_thousand_entries_behind_one_another_use_their_places_again():
    scheduler = Scheduler(2, BatchConfig(max_rows=1))
    for round_ in range(5):
        for index in range(1000):
            submit(scheduler, {index % 2: 1}, payload=(round_, index))
        seen = []
        while (batch := scheduler.next_batch()) is not None:
            scheduler.complete(batch)
            seen.append(batch.payloads[0])
        assert seen == [(round_, index) for index in range(1000)]


class SchedulerMachine(RuleBasedStateMachine):
    """Every step is named (payload number, row), and is in `ran` or `dropped` once in the end."""

    @initialize(
        config=st.builds(
            BatchConfig,
            max_rows=st.integers(1, 4),
            max_chunk_steps=st.integers(1, 9),
            whole=st.booleans(),
            max_whole_steps=st.sampled_from([1, 20, 1000]),
        ),
        num_slots=st.integers(1, 20),
    )
    def start(self, config, num_slots):
        self.config = config
        self.scheduler = Scheduler(num_slots, config)
        self.slots = range(num_slots)
        self.queues = {slot: [] for slot in self.slots}  # each entry [payload, first row, length, steps done, deadline]
        self.line = []
        self.running = []
        self.doomed = set()
        self.passed_for = {}  # slot: steps, rounded up to a power of two, of the run that it was last too short for
        self.num_payloads = 0
        self.submitted = []
        self.ran = []
        self.dropped = []
        self.now = 0.0

    def in_batches(self):
        return {slot for batch in self.running for slot in batch.slots}

    def drop(self, entry):
        number, first, length, done, _ = entry
        self.dropped += [(number, first + step) for step in range(done, length)]

    @rule(data=st.data())
    def submit(self, data):
        open_ = [slot for slot in self.slots if slot not in self.doomed]
        if not open_:
            return
        slots = data.draw(st.lists(st.sampled_from(open_), unique=True, max_size=len(open_)))
        length = st.one_of(st.integers(1, 3), st.integers(1, 24), st.integers(8, 12))
        lengths = data.draw(st.lists(length, min_size=len(slots), max_size=len(slots)))
        wait = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0, NEVER])
        waits = data.draw(st.none() | st.lists(wait, min_size=len(slots), max_size=len(slots)))
        deadlines = None if waits is None else [self.now + wait for wait in waits]
        number = self.num_payloads
        self.num_payloads += 1
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
        self.scheduler.submit(slots, lengths, starts, [number], deadlines=deadlines)
        for index, slot in enumerate(slots):
            if not self.queues[slot]:
                self.line.append(slot)
            deadline = NEVER if deadlines is None else deadlines[index]
            self.queues[slot].append([number, starts[index], lengths[index], 0, deadline])
            self.submitted += [(number, starts[index] + step) for step in range(lengths[index])]

    @rule()
    def next_batch(self):
        batch = self.scheduler.next_batch()
        if batch is None:
            assert not self.line
            return
        slots = batch.slots
        assert slots[0] == self.line[0]  # the one that has waited longest always runs
        assert slots == [slot for slot in self.line if slot in set(slots)]
        assert len(slots) == len(set(slots)) <= self.config.max_rows
        assert not set(slots) & self.in_batches()
        entries = [self.queues[slot][0] for slot in slots]
        left = [length - done for _, _, length, done, _ in entries]
        counts = batch.counts
        assert batch.payloads == [[number] for number, *_ in entries]
        assert batch.starts == [first + done for _, first, _, done, _ in entries]
        assert batch.steps == max(counts)
        assert batch.is_last == [count == rest for count, rest in zip(counts, left, strict=True)]
        if self.config.whole:
            assert counts == left
            assert max(counts) <= min(counts) * WHOLE_SPREAD
            assert len(counts) == 1 or sum(counts) <= self.config.max_whole_steps
        else:
            assert counts[0] == min(left[0], self.config.max_chunk_steps)
            assert counts == [min(rest, batch.steps) for rest in left]
            assert batch.steps <= self.config.max_chunk_steps
            assert all(2 * count > batch.steps for count in counts)  # under half of any row is padding
            if len(slots) < self.config.max_rows:
                self.check_passed(slots, wanted=1 << (counts[0] - 1).bit_length())
        for slot in slots:
            self.passed_for.pop(slot, None)
        self.line = [slot for slot in self.line if slot not in slots]
        self.running.append(batch)

    def check_passed(self, slots, wanted):
        """Slots are passed over only for being short, and for ever shorter runs."""
        for slot in self.line[: 4 * self.config.max_rows]:
            if slot not in slots:
                _, _, length, done, _ = self.queues[slot][0]
                assert 2 * (length - done) <= wanted < self.passed_for.get(slot, NEVER)
                self.passed_for[slot] = wanted

    def account(self, batch):
        """What completing a batch, or a row of one, should do. Returns the cancelled slots."""
        cancelled = self.doomed.intersection(batch.slots)
        for slot, count in zip(batch.slots, batch.counts, strict=True):
            entry = self.queues[slot][0]
            self.ran += [(entry[0], entry[1] + entry[3] + step) for step in range(count)]
            entry[3] += count
            if slot in self.doomed:
                self.doomed.remove(slot)
                self.drop(entry)
                self.queues[slot] = []
            elif entry[3] == entry[2]:
                self.queues[slot].pop(0)
            if self.queues[slot]:
                self.line.append(slot)
        return cancelled

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def complete(self, data):
        batch = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        if data.draw(st.booleans()):
            assert self.scheduler.complete(batch) == self.account(batch)
            return
        for index in data.draw(st.permutations(range(len(batch.slots)))):
            row = batch.row(index)
            assert (row.slots, row.steps) == ([batch.slots[index]], batch.counts[index])
            assert self.scheduler.complete(row) == self.account(row)

    @rule(data=st.data())
    def cancel(self, data):
        slot = data.draw(st.sampled_from(self.slots))
        is_running = slot in self.in_batches()
        if slot in self.doomed:
            return
        self.passed_for.pop(slot, None)
        assert self.scheduler.cancel(slot) is is_running
        kept = self.queues[slot][:1] if is_running else []
        for entry in self.queues[slot][len(kept) :]:
            self.drop(entry)
        self.queues[slot] = kept
        if is_running:
            self.doomed.add(slot)
        elif slot in self.line:
            self.line.remove(slot)

    @rule(elapsed=st.sampled_from([0.0, 0.5, 1.0]))
    def expire(self, elapsed):
        self.now += elapsed
        expected = []
        for slot in list(self.line):
            (_, _, length, done, deadline), *behind = self.queues[slot]
            if not done and deadline <= self.now:
                expected.append(Dropped(slot, length, sum(entry[2] for entry in behind)))
                for entry in self.queues[slot]:
                    self.drop(entry)
                self.queues[slot] = []
                self.line.remove(slot)
                self.passed_for.pop(slot, None)
        assert list(self.scheduler.expire(self.now)) == expected

    @invariant()
    def counts_are_as_expected(self):
        queued = sum(length - done for queue in self.queues.values() for _, _, length, done, _ in queue)
        assert self.scheduler.num_queued_steps == queued
        assert self.scheduler.num_ready == len(self.line)
        assert [self.scheduler.is_busy(slot) for slot in self.slots] == [bool(self.queues[s]) for s in self.slots]

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        while self.line or self.running:
            while self.running:
                batch = self.running.pop()
                assert self.scheduler.complete(batch) == self.account(batch)
            self.next_batch()
        assert self.scheduler.num_queued_steps == 0
        assert sorted(self.ran + self.dropped) == self.submitted


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=250, stateful_step_count=30, deadline=None)
