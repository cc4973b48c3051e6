"""All laws of service.scheduler at once, against plain dicts and lists."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.policies import PATIENCE, Priority
from service.scheduler import WHOLE_SPREAD, BatchConfig, Dropped, Scheduler

NEVER = float("inf")


class SchedulerMachine(RuleBasedStateMachine):
    """Every step is named (payload number, row), and is in `ran` or `dropped` once in the end."""

    @initialize(
        config=st.builds(
            BatchConfig,
            max_rows=st.integers(1, 4),
            max_chunk_steps=st.integers(1, 9),
            padding_steps=st.sampled_from([0, 5, 48]),
            padding_share=st.sampled_from([0.0, 0.125]),
            whole=st.booleans(),
            max_whole_steps=st.sampled_from([1, 20, 1000]),
        ),
        num_slots=st.integers(1, 20),
        has_classes=st.booleans(),
    )
    def start(self, config, num_slots, has_classes):
        self.config = config
        self.has_classes = has_classes
        self.scheduler = Scheduler(num_slots, config)
        self.slots = range(num_slots)
        self.queues = {slot: [] for slot in self.slots}  # each entry [payload, first row, length, steps done, deadline]
        self.priorities = dict.fromkeys(self.slots, Priority.NORMAL)
        self.line = []  # of all classes, in the order in which slots became ready
        self.num_passed = dict.fromkeys(Priority, 0)  # batches in a row that had none of a class that was ready
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
        self.enqueue(slots, lengths, None if waits is None else [self.now + wait for wait in waits])

    def enqueue(self, slots, lengths, deadlines=None):
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
        order, leaders = self.in_order()
        assert slots[0] == leaders[0]
        assert slots == [slot for slot in order if slot in set(slots)]
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
            assert set(leaders[: self.config.max_rows]) <= set(slots)
            wanted = 1 << (min(self.left(slot) for slot in leaders) - 1).bit_length()
            wanted = min(wanted, self.config.max_chunk_steps)
            if batch.steps > wanted:
                wanted = self.check_stretched(order, batch)
            assert counts == [min(rest, wanted) for rest in left]
            padding = sum(wanted - count for count in counts if 2 * count <= wanted)
            assert padding <= self.room(sum(min(self.left(slot), wanted) for slot in order))
            if len(slots) < self.config.max_rows:
                self.check_short(order, leaders, slots, wanted)
        for slot in slots:
            self.passed_for.pop(slot, None)
        ready = {self.priorities[slot] for slot in self.line}
        served = {self.priorities[slot] for slot in slots}
        for priority in Priority:
            self.num_passed[priority] = self.num_passed[priority] + 1 if priority in ready - served else 0
            assert self.num_passed[priority] <= PATIENCE
        self.line = [slot for slot in self.line if slot not in slots]
        self.running.append(batch)

    def room(self, num_steps):
        return max(self.config.padding_steps, self.config.padding_share * num_steps)

    def check_stretched(self, order, batch):
        """A run is longer than its first row wants only if nobody is left out and nobody who is new is held up."""
        limit = min(1 << (batch.steps - 1).bit_length(), self.config.max_chunk_steps)
        assert batch.slots == order[: self.config.max_rows]
        assert len({self.priorities[slot] for slot in self.line}) == 1
        for slot, count in zip(batch.slots, batch.counts, strict=True):
            assert 2 * count > limit or self.queues[slot][0][3] > 0
        assert sum(limit - count for count in batch.counts) <= self.room(sum(batch.counts))
        return limit

    def left(self, slot):
        _, _, length, done, _ = self.queues[slot][0]
        return length - done

    def in_order(self):
        """Returns (ready slots in the order in which a batch takes them, those that decide on its length)."""
        by_class = sorted(self.line, key=self.priorities.get)
        highest = self.priorities[by_class[0]]
        ready = sorted({self.priorities[slot] for slot in by_class})
        due = max(ready, key=self.num_passed.get)
        if self.num_passed[due] < PATIENCE - 1 or due == highest:
            return by_class, by_class[:1]
        leaders = [next(slot for slot in self.line if self.priorities[slot] == each) for each in (due, highest)]
        rest = [slot for slot in by_class if slot not in leaders]
        return leaders + sorted(rest, key=lambda slot: self.priorities[slot] != due), leaders

    def check_short(self, order, leaders, slots, wanted):
        """Slots are passed over only for being short, and where their class leads for ever shorter runs."""
        for slot in order[: 4 * self.config.max_rows]:
            if slot not in slots:
                assert 2 * self.left(slot) <= wanted
                if len(leaders) == 1 and self.priorities[slot] == self.priorities[leaders[0]]:
                    assert wanted < self.passed_for.get(slot, NEVER)
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

    def finish(self, batch):
        assert self.scheduler.complete(batch) == self.account(batch)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def complete(self, data):
        batch = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        if data.draw(st.booleans()):
            self.finish(batch)
            return
        for index in data.draw(st.permutations(range(len(batch.slots)))):
            row = batch.row(index)
            assert (row.slots, row.steps) == ([batch.slots[index]], batch.counts[index])
            assert self.scheduler.complete(row) == self.account(row)

    @precondition(lambda self: not self.running)
    @rule(count=st.integers(2, 12))
    def run_on(self, count):
        """Run many batches, and give every sequence in them another step."""
        for _ in range(count):
            self.next_batch()
            for batch in self.running:
                self.finish(batch)
                self.enqueue(batch.slots, [1] * len(batch.slots))
            self.running.clear()

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

    @precondition(lambda self: self.has_classes)
    @rule(data=st.data(), priority=st.sampled_from(Priority))
    def prioritize(self, data, priority):
        slot = data.draw(st.sampled_from(self.slots))
        self.scheduler.prioritize(slot, priority)
        if priority is self.priorities[slot]:
            return
        self.priorities[slot] = priority
        self.passed_for.pop(slot, None)
        if slot in self.line:
            self.line.remove(slot)
            self.line.append(slot)

    @rule(elapsed=st.sampled_from([0.0, 0.5, 1.0]))
    def expire(self, elapsed):
        self.now += elapsed
        expected = []
        for slot in sorted(self.line, key=self.priorities.get):
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
                self.finish(self.running.pop())
            self.next_batch()
        assert self.scheduler.num_queued_steps == 0
        assert sorted(self.ran + self.dropped) == self.submitted


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=250, stateful_step_count=30, deadline=None)
