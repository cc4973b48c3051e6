"""service.scheduler: its laws one by one; tests/test_scheduler_laws.py has all of them at once."""

import itertools

import numpy as np

from service.policies import Priority
from service.scheduler import BatchConfig, Dropped, Scheduler

NEVER = float("inf")
HIGH, NORMAL, LOW = Priority


UNPADDED = {"padding_steps": 0, "padding_share": 0.0}


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
    scheduler = Scheduler(64, BatchConfig(**UNPADDED, max_rows=64, max_chunk_steps=16))
    submit(scheduler, {0: 16, 1: 8, 2: 4, 3: 2, 4: 1} | dict.fromkeys(range(5, 64), 1000))
    batches = [run(scheduler) for _ in range(5)]
    assert [4 in batch for batch in batches] == [False, False, False, False, True]
    assert [max(batch.values()) for batch in batches] == [16, 8, 4, 2, 1]


def test_longer_entries_join_a_batch_and_much_shorter_ones_do_not():
    scheduler = Scheduler(5, BatchConfig(**UNPADDED, max_chunk_steps=16))
    submit(scheduler, {0: 7, 1: 4, 2: 5, 3: 100, 4: 1})
    assert run(scheduler) == {0: 7, 2: 5, 3: 8}
    assert run(scheduler) == {1: 4, 3: 4}
    assert run(scheduler) == {4: 1, 3: 1}
    assert run(scheduler) == {3: 16}


def test_companions_are_found_beyond_the_first_max_rows():
    scheduler = Scheduler(9, BatchConfig(**UNPADDED, max_rows=2, max_chunk_steps=16))
    submit(scheduler, {0: 16, 1: 1, 2: 1, 3: 1, 4: 16})
    assert run(scheduler) == {0: 16, 4: 16}
    assert run(scheduler) == {1: 1, 2: 1}


def test_short_entries_join_while_their_padding_costs_less_than_another_run():
    scheduler = Scheduler(7, BatchConfig(padding_steps=20))
    submit(scheduler, {0: 16, 1: 8, 2: 4, 3: 7, 4: 1, 5: 40, 6: 9})
    assert run(scheduler) == {0: 16, 1: 8, 2: 4, 5: 16, 6: 9}  # 8 + 12 = 20 steps of padding
    assert run(scheduler) == {3: 7, 4: 1, 5: 8}


def test_ends_of_long_entries_do_not_make_runs_short():
    scheduler = Scheduler(5, BatchConfig(padding_steps=20))
    submit(scheduler, {0: 18, 1: 100, 2: 21, 3: 100})
    assert run(scheduler) == {0: 16, 1: 16, 2: 16, 3: 16}
    assert run(scheduler) == {0: 2, 1: 8, 2: 5, 3: 8}  # of 16 steps, 14 + 11 would be padding
    submit(scheduler, {4: 1})
    assert run(scheduler) == {1: 16, 3: 16, 4: 1}
    submit(scheduler, {4: 1})
    assert run(scheduler) == {1: 16, 3: 16, 4: 1}


def test_a_step_that_is_first_in_line_is_not_held_up_by_long_company():
    scheduler = Scheduler(3, BatchConfig())
    submit(scheduler, {0: 1, 1: 100, 2: 100})
    assert run(scheduler) == {0: 1, 1: 1, 2: 1}


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
    scheduler = Scheduler(3, BatchConfig(**UNPADDED, max_chunk_steps=4))
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


def test_parts_of_a_batch_run_until_each_is_completed():
    scheduler = Scheduler(4, BatchConfig(max_chunk_steps=4))
    submit(scheduler, {0: 4, 1: 6, 2: 3, 3: 4})
    batch = scheduler.next_batch()
    part = batch.part([2, 0])
    assert (part.slots, part.counts, part.steps, part.is_last) == ([2, 0], [3, 4], 4, [True, True])
    scheduler.complete(part)
    assert [scheduler.is_running(slot) for slot in range(4)] == [False, True, False, True]
    submit(scheduler, {0: 1, 1: 1})
    assert run(scheduler) == {0: 1}
    scheduler.complete(batch.part([1, 3]))
    assert run(scheduler) == {1: 2}
    assert run(scheduler) == {1: 1}
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


def test_a_batch_is_filled_from_the_highest_class_down():
    scheduler = Scheduler(7, BatchConfig(max_rows=4))
    for slot, priority in {0: LOW, 2: HIGH, 4: LOW, 5: HIGH}.items():
        scheduler.prioritize(slot, priority)
    submit(scheduler, dict.fromkeys(range(7), 1))
    assert [list(run(scheduler)) for _ in range(2)] == [[2, 5, 1, 3], [6, 0, 4]]


def test_a_low_chunk_makes_a_high_step_wait_for_no_more_than_the_run_that_goes_on():
    scheduler = Scheduler(9, BatchConfig(max_rows=4, max_chunk_steps=16))
    for slot in range(8):
        scheduler.prioritize(slot, LOW)
    scheduler.prioritize(8, HIGH)
    submit(scheduler, dict.fromkeys(range(8), 1000))
    batches = []
    for _ in range(30):
        batch = scheduler.next_batch()
        submit(scheduler, {8: 1})  # while a run goes on
        scheduler.complete(batch)
        batches.append(run(scheduler))
    assert all(list(batch.values()) == [1, 1, 1, 1] and next(iter(batch)) == 8 for batch in batches)


def test_a_class_that_is_passed_over_is_served_by_every_eighth_batch():
    scheduler = Scheduler(3, BatchConfig(max_rows=1))
    scheduler.prioritize(0, HIGH)
    scheduler.prioritize(2, LOW)
    submit(scheduler, dict.fromkeys(range(3), 1))
    turns = []
    for _ in range(27):
        [slot] = run(scheduler)
        submit(scheduler, {slot: 1})
        turns.append(slot)
    assert turns == [0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0]


def test_a_class_that_has_its_turns_in_between_is_not_due():
    scheduler = Scheduler(2, BatchConfig(max_rows=1))
    scheduler.prioritize(0, HIGH)
    for _ in range(20):
        submit(scheduler, {0: 1, 1: 1})
        assert [list(run(scheduler)) for _ in range(2)] == [[0], [1]]


def test_a_class_that_is_due_shares_its_batch_with_the_first_of_the_highest():
    scheduler = Scheduler(6, BatchConfig(max_rows=2, max_chunk_steps=16))
    for slot in (0, 1, 2):
        scheduler.prioritize(slot, HIGH)
    submit(scheduler, {3: 100, 4: 100, 5: 100})
    batches = []
    for _ in range(16):
        submit(scheduler, {slot: 1 for slot in (0, 1, 2) if not scheduler.is_busy(slot)})
        batches.append(run(scheduler))
    due = [index for index, batch in enumerate(batches) if max(batch) > 2]
    assert due == [7, 15]
    assert [list(batches[index].values()) for index in due] == [[1, 1], [1, 1]]
    assert [min(batches[index]) <= 2 for index in due] == [True, True]


def test_a_slot_that_changes_its_class_takes_along_what_it_has_queued():
    scheduler = Scheduler(4, BatchConfig(max_rows=1))
    submit(scheduler, dict.fromkeys(range(4), 1))
    scheduler.prioritize(2, HIGH)
    batch = scheduler.next_batch()
    assert batch.slots == [2]
    submit(scheduler, {2: 1})
    scheduler.prioritize(2, LOW)  # while it runs
    scheduler.prioritize(1, LOW)
    scheduler.complete(batch)
    assert [list(run(scheduler)) for _ in range(2)] == [[0], [3]]
    scheduler.prioritize(2, NORMAL)
    assert [list(run(scheduler)) for _ in range(2)] == [[2], [1]]
    assert scheduler.next_batch() is None


def test_a_deadline_is_found_wherever_its_entry_stands():
    scheduler = Scheduler(4, BatchConfig(max_rows=1))
    scheduler.prioritize(1, HIGH)
    submit(scheduler, {0: 1, 1: 1, 2: 1, 3: 1}, deadlines=[NEVER, 5.0, 3.0, NEVER])
    submit(scheduler, {3: 1}, deadlines=[2.0])
    assert scheduler.expire(2.9) == []  # the one that is over stands behind another, and is not looked at yet
    assert scheduler.expire(3.0) == [Dropped(slot=2, num_expired=1, num_behind=0)]
    assert [list(run(scheduler)) for _ in range(3)] == [[1], [0], [3]]
    assert scheduler.expire(3.0) == [Dropped(slot=3, num_expired=1, num_behind=0)]
    assert scheduler.next_batch() is None
