"""More live sessions than memory holds, in any order and over a real channel: what comes back is bit-equal."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

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

from service import express
from service.config import load_settings
from service.errors import Overloaded
from service.events import Closed, Steps, StepsFailed
from service.lane import Lane
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.sessions import SessionState, Terms
from service.spill import SpillStore
from tests import lanes
from tests.lanes import Client, drive, equal, finish, lane_maker, steps
from tests.rpc import Received, Requests, frame, open_stream, predict, sequences
from tests.serving import Served, serving

SESSIONS = 200
RESIDENT = 16


def get(served: Served, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{served.server.http_port}{path}") as response:
        return response.read().decode()


@pytest.mark.parametrize("inline_run_ms", [0.0, 1_000.0])
def test_200_sessions_of_each_model_with_16_in_memory(repository: Path, tmp_path: Path, inline_run_ms: float) -> None:
    """Runs happen on a thread, so that states are moved meanwhile, or on the loop, by the short way too."""
    rng = np.random.default_rng(8)
    xs = sequences(81, SESSIONS, 40, 40)
    limits = {"max_resident_sessions": RESIDENT, "spill_store": tmp_path / "states.db", "inline_run_ms": inline_run_ms}
    with serving(repository, **limits) as served, served.stub() as stub:
        for model in ("lstm", "gru"):
            lane = served.lane(model)
            requests, received = Requests(), Received()
            responses = stub.StreamPredict(iter(requests), timeout=60)
            requests.put(open_stream(model, sessions=[pb.SessionOpen()] * SESSIONS))
            sent = [0] * SESSIONS
            for most, count in [(100, 3), (5, 1), (5, 1)] * 8:
                handles = rng.choice(SESSIONS, int(rng.integers(1, most)), replace=False).tolist()
                requests.put(frame(*[xs[handle][sent[handle] :][:count] for handle in handles], handles=handles))
                for handle in handles:
                    sent[handle] += count
                while received.num_answers < sum(sent):
                    received.take(next(responses))
            resident, spilled = lane.residence.num_resident, lane.residence.num_spilled
            assert resident + spilled == SESSIONS
            assert RESIDENT - 2 <= resident <= RESIDENT
            labels = f'{{model="{model}",version="{lane.version}"}}'
            metrics = get(served, "/metrics").splitlines()
            assert f"rnnserve_sessions_resident{labels} {resident:.1f}" in metrics
            assert f"rnnserve_sessions_spilled{labels} {spilled:.1f}" in metrics
            assert f"rnnserve_spills_total{labels} {lane.tally.spills:.1f}" in metrics
            assert f"rnnserve_restores_total{labels} {lane.tally.restores:.1f}" in metrics
            assert f"rnnserve_spill_errors_total{labels} 0.0" in metrics
            assert lane.tally.spills == lane.tally.restores + spilled > 400
            requests.close()
            for response in responses:
                received.take(response)
            assert not received.errors
            assert len(received.closed) == SESSIONS
            for handle, count in enumerate(sent):
                expected = lanes.run_alone(lane, xs[handle][:count]).y if count else []
                np.testing.assert_array_equal(received.rows(handle), expected)
        store = lane.residence._store
        served.wait_until(lambda: len(store) == 0)  # swept soon after


def test_initial_states_are_spilled_as_they_were_given(repository: Path, tmp_path: Path) -> None:
    xs = sequences(82, 40, 12, 12)
    with serving(repository, max_resident_sessions=3, spill_store=tmp_path / "states.db") as served:
        lane = served.lane("lstm")
        with served.stub() as stub:
            first = predict(stub, "lstm", [x[:5] for x in xs], return_state=True)
            rest = frame(*[x[5:] for x in xs], handles=range(len(xs)), opens=[pb.SessionOpen()] * len(xs))
            rest.frame.tensors.extend(first.outputs[1:])
            received = Received.all(stub.StreamPredict(iter([open_stream("lstm"), rest])))
    for handle, x in enumerate(xs):
        np.testing.assert_array_equal(received.rows(handle), lanes.run_alone(lane, x).y[5:])
    assert lane.tally.restores > 30
    SpillStore(tmp_path / "states.db").close()  # the server has left it to others


@dataclass(eq=False)
class Sequence:
    """A session, and where its answers went."""

    name: str
    linger_s: float
    x: np.ndarray
    sent: int = 0
    client: Client | None = None
    handle: int = 0
    told: list[tuple[Client, int]] = field(default_factory=list)
    is_heard: bool = True
    """Whether its answers come to a client that is still there."""


class LaneMachine(RuleBasedStateMachine):
    """Clients that come and go; whatever they are answered is what each sequence gets alone."""

    def __init__(self, lane, store):
        super().__init__()
        self.parts = lane.name, lane.version, lane.backend, lane.exactness
        self.store = store

    @initialize(
        max_resident=st.integers(1, 4),
        max_rows=st.integers(1, 6),
        chunk=st.integers(1, 4),
        window=st.sampled_from([0, 3]),
    )
    def start(self, max_resident, max_rows, chunk, window):
        self.window = window  # sessions with one keep the short way from the others
        values = {"max_batch_rows": max_rows, "max_chunk_steps": chunk, "max_predict_sequences": 1}
        values |= {"max_resident_sessions": max_resident, "spill_store": self.store.path, "max_sessions": 20}
        self.lane = Lane(*self.parts, load_settings({"repository": "unused", **values}), self.store)
        self.clients = [Client(self.lane, wants_states=True) for _ in range(3)]
        self.live = []
        self.ended = []
        self.now = 0.0
        self.run = None
        self.num_opened = 0
        self.stored = len(self.store)

    def some(self, data, sessions):
        indices = st.lists(st.integers(0, len(sessions) - 1), unique=True, min_size=1, max_size=8)
        return [sessions[index] for index in data.draw(indices)]

    def attached(self, client=None):
        return [s for s in self.live if s.client is not None and client in (None, s.client)]

    @precondition(lambda self: len(self.live) < 12)
    @rule(which=st.integers(0, 2), name=st.sampled_from(["", "", "a", "b"]), linger_s=st.sampled_from([0.0, 5.0]))
    def open(self, which, name, linger_s):
        client = self.clients[which]
        terms = Terms(session_id=name, linger_s=linger_s, replay_window=self.window if name else 0)
        try:
            handle, position, was_live = self.lane.open(client.link, terms, self.now)
        except Overloaded:
            assert self.run is not None
            return
        session = next((s for s in self.live if name and s.name == name), None)
        assert was_live == (session is not None)
        if session is None:
            seed = self.num_opened = self.num_opened + 1
            session = Sequence(name, linger_s, steps(seed, 60))
            self.live.append(session)
        assert position == session.sent
        session.client, session.handle, session.linger_s = client, handle, linger_s
        session.told.append((client, handle))

    @precondition(lambda self: self.attached())
    @rule(data=st.data(), which=st.integers(0, 2), is_single=st.booleans(), again=st.sampled_from([0, 0, 2]))
    def send(self, data, which, is_single, again):
        client = self.clients[which]
        sessions = [s for s in self.attached(client) if s.sent < 50]
        if not sessions:
            return
        xs, positions = {}, []
        for session in self.some(data, sessions):
            count = 1 if is_single else data.draw(st.integers(1, 5))
            back = min(again, session.sent) if session.name and self.window else 0
            positions.append(session.sent - back)
            xs[session.handle] = session.x[session.sent - back : session.sent + count]
            session.sent += count
        lengths = [len(x) for x in xs.values()]
        data = b"".join(x.tobytes() for x in xs.values())
        sessions = [client.link.sessions[handle] for handle in xs]
        is_plain = set(lengths) == {1}
        self.lane.submit(Steps(client.link, sessions, positions, None if is_plain else lengths, [data]), self.now)

    @precondition(lambda self: self.attached())
    @rule(data=st.data(), which=st.integers(0, 2))
    def step_at_once(self, data, which):
        """Send one step each where nothing is under way, and go the short way if there is one."""
        self.run_all()
        self.send(data, which, is_single=True, again=0)
        num_messages, num_rows = express.num_rows(self.lane)
        boarded = express.board(self.lane, num_messages) if num_rows else None
        if boarded is not None:
            express.arrive(boarded, boarded.execute(), self.now, 0.0)

    @rule()
    def begin_or_finish(self):
        if self.run is None:
            self.lane.flush()
            self.run = self.lane.next_run(self.now)
        else:
            finish(self.lane, self.run, self.now)
            self.run = None

    @rule()
    def run_all(self):
        if self.run is not None:
            self.begin_or_finish()
        drive(self.lane, self.now)

    @precondition(lambda self: self.attached())
    @rule(data=st.data())
    def close(self, data):
        for session in self.some(data, self.attached()):
            self.lane.close(session.client.link, session.handle)
            self.live.remove(session)
            self.ended.append(session)

    @rule(which=st.integers(0, 2), is_orderly=st.booleans())
    def leave(self, which, is_orderly):
        client = self.clients[which]
        for session in self.attached(client):
            session.client = None
            if not session.linger_s:
                self.live.remove(session)
                self.ended.append(session)
        (self.lane.finish if is_orderly else self.lane.drop)(client.link, self.now)
        if not is_orderly:
            for session in self.live + self.ended:
                session.is_heard &= session.told[-1][0] is not client
            self.clients[which] = Client(self.lane, wants_states=True)

    @precondition(lambda self: not self.lane.inbox and self.run is None and not self.lane.num_queued_steps)
    @rule()
    def expire(self):
        self.now += 6.0
        self.lane.expire(self.now)
        for session in [s for s in self.live if s.client is None]:
            self.live.remove(session)
            self.ended.append(session)

    @invariant()
    def the_limit_is_kept(self):
        residence = self.lane.residence
        assert residence.num_resident <= residence.max_resident
        assert residence.num_resident + residence.num_spilled == residence.num_allocated

    def teardown(self):
        if not hasattr(self, "lane"):
            return
        self.run_all()
        assert self.lane.slab.num_allocated == self.lane.num_sessions == len(self.live)
        for session in self.live + self.ended:
            alone = lanes.run_alone(self.lane, session.x[: session.sent]) if session.sent else None
            seen = set()
            for client, handle in session.told:
                for position, row in client.answers(handle):
                    equal(row, alone.y[position])
                    seen.add(position)
                for closed in client.told(Closed):
                    if closed.handle == handle and closed.state is SessionState.CLOSED and closed.position:
                        ended = lanes.run_alone(self.lane, session.x[: closed.position])
                        for mine, expected in zip(closed.final_states, ended.states, strict=True):
                            equal(mine, expected)
            if session.is_heard and not session.name:
                assert len(seen) == session.sent
        assert not any(client.told(StepsFailed) for client in self.clients)
        for client in self.clients:
            self.lane.drop(client.link, self.now)
        self.lane.expire(self.now + 99.0)
        assert (self.lane.slab.num_allocated, len(self.store)) == (0, self.stored)


@pytest.mark.parametrize("model", ["lstm", "gru"])
def test_any_order_of_things(repository, store, model):
    lane = lane_maker(repository)(model)
    machine = settings(max_examples=40, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(lambda: LaneMachine(lane, store), settings=machine)
