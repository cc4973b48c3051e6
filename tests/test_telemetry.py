"""What /metrics says: it parses, and agrees with itself and with what was sent."""

from __future__ import annotations

import math
from bisect import bisect_left
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from service.errors import RunFailed, Unavailable, reasons
from service.pb.inference import inference_pb2 as oip
from service.pb.inference import inference_pb2_grpc as oip_grpc
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.pb.rnnserve.v1 import rnnserve_pb2_grpc as pb_grpc
from service.rpc.metrics import merge, read_page, write_page
from service.tally import DURATIONS_S, Histogram
from service.telemetry import REASONS
from tests.generating import save, tokens
from tests.lanes import Client, drive, lane_maker, steps
from tests.metrics import Page, check_histograms
from tests.oip.calls import request, step
from tests.rpc import Received, Requests, frame, open_stream, predict, sequences
from tests.serving import Served, serving
from tests.workers import LSTM, wait_until


def stream(served: Served, model: str, x: np.ndarray, num_sessions: int, **opened: object) -> None:
    """Send a frame for each step of x to each session, and close."""
    opens = [pb.SessionOpen() for _ in range(num_sessions)]
    handles = list(range(num_sessions))
    frames = [frame(*[row[None]] * num_sessions, handles=handles) for row in x]
    with served.stub() as stub:
        received = Received.all(stub.StreamPredict(iter([open_stream(model, sessions=opens, **opened), *frames])))
    assert len(received.closed) == num_sessions


@given(
    st.lists(st.floats(0, 90), min_size=1, max_size=50),
    st.floats(100, 200),
)
def test_a_histogram_of_times_is_that_of_their_ages(times: list[float], now: float) -> None:
    times.sort()
    histogram, expected = Histogram(), [0] * (len(DURATIONS_S) + 1)
    histogram.observe_since(times, now)
    for time in times:
        expected[bisect_left(DURATIONS_S, now - time)] += 1
    assert sum(histogram.counts) == len(times)
    # A time that is a bound ago, but for rounding, may count on either side.
    assert np.abs(np.cumsum(histogram.counts) - np.cumsum(expected)).max() <= sum(
        any(math.isclose(now - time, bound, rel_tol=1e-12) for bound in DURATIONS_S) for time in times
    )
    assert histogram.sum == pytest.approx(sum(now - time for time in times))


def test_counts_are_those_of_what_was_sent(repository: Path) -> None:
    (x,) = sequences(1, 1, 20, 20)
    with serving(repository) as served:
        idle = Page(served)
        stream(served, "lstm", x, 3)
        with served.stub() as stub:
            predict(stub, "lstm", sequences(2, 5, 10, 10))
            bad = frame(x[:2], positions=[9])
            Received.all(stub.StreamPredict(iter([open_stream("lstm"), bad])))
            with pytest.raises(grpc.RpcError):
                stub.Predict(pb.PredictRequest(model="lstm", inputs=[pb.Tensor(data=b"123")]))
        with grpc.insecure_channel(served.address) as channel:
            triton = oip_grpc.GRPCInferenceServiceStub(channel)
            for t in range(4):
                triton.ModelInfer(step("lstm", 7, x[t : t + 1], sequence_start=t == 0, sequence_end=t == 3))
            with pytest.raises(grpc.RpcError):
                triton.ModelInfer(request("lstm", x[None, :, 1:]))
        page = Page(served)
    assert check_histograms(page) > 30
    assert page.of("rnnserve_steps_total", **LSTM) == 60 + 50 + 4
    requests = 60 + 5 + 4
    assert page.of("rnnserve_requests_total", outcome="success", **LSTM) == requests
    assert page.of("rnnserve_request_duration_seconds_count", graph="main", **LSTM) == requests
    assert page.of("rnnserve_queue_duration_seconds_count", **LSTM) == requests
    runs = page.of("rnnserve_runs_total", **LSTM)
    assert page.of("rnnserve_run_duration_seconds_count", **LSTM) == runs
    assert page.of("rnnserve_batch_size_count", **LSTM) == runs
    assert page.of("rnnserve_batch_size_sum", **LSTM) >= page.of("rnnserve_steps_total", **LSTM) / 10
    times = {part: page.of(f"rnnserve_{part}_duration_seconds_sum", **LSTM) for part in ("queue", "run", "request")}
    assert times["run"] > 0
    assert times["queue"] < times["request"]
    reasons = {reason: page.of("rnnserve_rejected_total", reason=reason, **LSTM) for reason in REASONS}
    assert {reason: count for reason, count in reasons.items() if count} == {"POSITION_GAP": 1, "SHAPE_MISMATCH": 2}
    assert page.of("rnnserve_requests_total", outcome="failure", **LSTM) == 3
    assert page.of("rnnserve_sessions_opened_total", **LSTM) == 3 + 1 + 1
    assert page.of("rnnserve_sessions_closed_total", cause="closed", **LSTM) == 5
    assert page.of("rnnserve_sessions", **LSTM) == 0
    assert page.of("rnnserve_requests_total", model="gru") == 0
    assert idle.of("rnnserve_model_load_duration_seconds", **LSTM) > 0
    assert idle.of("rnnserve_ready") == idle.of("rnnserve_build_info", provider="cpu") == 1
    assert page.of("process_resident_memory_bytes") > 2**20
    assert idle.of("process_cpu_seconds_total") <= page.of("process_cpu_seconds_total")


def test_a_request_waits_until_its_first_run_and_lasts_until_its_last(repository: Path) -> None:
    lane = lane_maker(repository)("lstm", max_chunk_steps=8)
    client = Client(lane)
    client.open()
    client.send({0: steps(1, 20)}, now=1.0)
    lane.flush()
    for number in range(3):
        run = lane.next_run(2.0 + number)
        lane.complete(run, run.execute(), 2.5 + number, 0.25)
    assert (lane.tally.queue_durations.count, lane.tally.queue_durations.sum) == (1, 1.25)
    assert (lane.tally.request_durations.count, lane.tally.request_durations.sum) == (1, 3.5)
    assert (lane.tally.run_durations.count, lane.tally.run_seconds) == (3, 0.75)


def test_pages_of_workers_add_up(repository: Path) -> None:
    (x,) = sequences(7, 1, 9, 9)
    pages = []
    for num_sessions in (1, 5):
        with serving(repository, max_batch_rows=8) as served:
            stream(served, "lstm", x, num_sessions)
            pages.append(Page(served))
    both = Page(write_page(merge([read_page(page.text.encode()) for page in pages])).decode())
    assert check_histograms(both) > 30
    summed = ("rnnserve_steps_total", "rnnserve_queue_duration_seconds_count", "rnnserve_run_duration_seconds_sum")
    for name in (*summed, "rnnserve_batch_size_sum", "rnnserve_slots", "rnnserve_sessions_opened_total"):
        assert both.of(name, **LSTM) == pytest.approx(sum(page.of(name, **LSTM) for page in pages)), name
    for name in ("rnnserve_ready", "rnnserve_build_info"):
        assert both.of(name) == 1
    loads = [page.of("rnnserve_model_load_duration_seconds", **LSTM) for page in pages]
    assert both.of("rnnserve_model_load_duration_seconds", **LSTM) == max(loads)
    assert both.of("process_start_time_seconds") == pages[0].of("process_start_time_seconds")
    resets = merge([read_page(b"# TYPE rnnserve_ready gauge\nrnnserve_ready 0.0\n"), read_page(both.text.encode())])
    assert Page(write_page(resets).decode()).of("rnnserve_ready") == 0


def test_a_request_of_many_steps_counts_once_however_many_runs_it_takes(repository: Path) -> None:
    (x,) = sequences(3, 1, 50, 50)
    with serving(repository, max_chunk_steps=8) as served:
        with served.stub() as stub:
            Received.all(stub.StreamPredict(iter([open_stream("lstm"), frame(x)])))
        page = Page(served)
    assert page.of("rnnserve_runs_total", **LSTM) == 7
    assert page.of("rnnserve_run_duration_seconds_count", **LSTM) == 7
    assert page.of("rnnserve_request_duration_seconds_count", **LSTM) == 1
    assert page.of("rnnserve_queue_duration_seconds_count", **LSTM) == 1
    lasted, ran = (page.of(f"rnnserve_{part}_duration_seconds_sum", **LSTM) for part in ("request", "run"))
    assert lasted > ran


def test_every_reason_of_the_server_is_a_label() -> None:
    """Also of errors that other modules than errors.py may add: this file has imported the whole server."""
    assert reasons() == REASONS
    assert {"OVERLOADED", "POSITION_GAP", "RUN_FAILED", "SESSION_EXPIRED"} < set(REASONS)
    assert not {"CONFIG", "MODEL_BROKEN"} & set(REASONS)


def test_sessions_end_by_cause(repository: Path) -> None:
    (x,) = sequences(5, 1, 3, 3)

    def ended(served: Served) -> dict[str, float]:
        page = Page(served)
        found = {
            cause: page.of("rnnserve_sessions_closed_total", cause=cause, **LSTM)
            for cause in ("closed", "disconnected", "expired", "failed", "drained")
        }
        live = page.of("rnnserve_sessions", **LSTM)
        assert page.of("rnnserve_sessions_opened_total", **LSTM) == sum(found.values()) + live
        return {cause: count for cause, count in found.items() if count}

    with serving(repository, session_idle_s=0.05, drain_s=0.0) as served, served.stub() as stub:
        stream(served, "lstm", x, 2)
        assert ended(served) == {"closed": 2}
        requests = Requests()
        responses = stub.StreamPredict(iter(requests), timeout=30)
        requests.put(open_stream("lstm"))
        requests.put(frame(x))
        wait_until(lambda: ended(served) == {"closed": 2, "expired": 1})
        requests.close()
        assert Received.all(responses).closed[0].reason == pb.CLOSE_REASON_EXPIRED


def test_sessions_of_a_lane_end_by_cause(repository: Path) -> None:
    lane = lane_maker(repository)("lstm", session_idle_s=5.0)
    ended = lane.tally.sessions_ended
    client = Client(lane)
    for _ in range(6):
        client.open()
    lane.close(client.link, 0)
    assert {cause: count for cause, count in ended.items() if count} == {"closed": 1}
    lane.lose([client.link.sessions[1].slot], RunFailed("it failed"))
    assert ended["failed"] == 1
    lane.lose([client.link.sessions[2].slot], Unavailable("it is unloaded"))
    assert ended["drained"] == 1
    client.send({3: steps(1, 1)}, now=4.0)
    drive(lane, now=4.0)
    lane.expire(now=6.0)
    assert ended["expired"] == 2
    assert lane.drop(client.link, now=6.0)
    assert ended == {"closed": 1, "failed": 1, "drained": 1, "expired": 2, "disconnected": 1}
    assert lane.tally.sessions_opened == 6


def test_unloaded_versions_are_shown_no_more(repository: Path) -> None:
    with serving(repository, drain_s=0.1) as served, grpc.insecure_channel(served.address) as channel:
        triton = oip_grpc.GRPCInferenceServiceStub(channel)
        requests = Requests()
        responses = pb_grpc.SequenceServiceStub(channel).StreamPredict(iter(requests), timeout=30)
        requests.put(open_stream("lstm", sessions=[pb.SessionOpen()]))
        next(responses)
        lane = served.lane("lstm")
        triton.RepositoryModelUnload(oip.RepositoryModelUnloadRequest(model_name="lstm"))
        assert Page(served).of("rnnserve_sessions_opened_total", **LSTM) == 1  # it drains, and is still seen
        wait_until(lambda: not any(("model", "lstm") in labels for _, labels in Page(served).series))
        assert lane.tally.sessions_ended["drained"] == 1
        triton.RepositoryModelLoad(oip.RepositoryModelLoadRequest(model_name="lstm"))
        assert Page(served).of("rnnserve_sessions_opened_total", **LSTM) == 0


def test_a_version_that_is_loaded_again_while_it_drains_is_shown_once(repository: Path) -> None:
    with serving(repository, drain_s=20.0) as served, grpc.insecure_channel(served.address) as channel:
        triton = oip_grpc.GRPCInferenceServiceStub(channel)
        requests = Requests()
        responses = pb_grpc.SequenceServiceStub(channel).StreamPredict(iter(requests), timeout=30)
        requests.put(open_stream("lstm", sessions=[pb.SessionOpen()]))
        next(responses)
        triton.RepositoryModelUnload(oip.RepositoryModelUnloadRequest(model_name="lstm"))
        triton.RepositoryModelLoad(oip.RepositoryModelLoadRequest(model_name="lstm"))
        assert served.on_loop(lambda: served.server.engine.retired)
        assert Page(served).of("rnnserve_sessions_opened_total", **LSTM) == 0
        requests.close()
        list(responses)


def test_what_generates_is_counted_and_encoders_are_seen(tmp_path: Path) -> None:
    save(tokens(7), tmp_path, "names")
    save(tokens(encoder=True, begin=True), tmp_path, "translate")
    with serving(tmp_path) as served:
        with served.stub() as stub:
            prompts = pb.Tensor(data=np.array([2, 3, 4], np.int64).tobytes(), lengths=[1, 1, 1])
            made = list(stub.Generate(pb.GenerateRequest(model="names", inputs=[prompts], max_steps=6)))
            source = served.lane("translate").encoder.step_inputs[0]
            data = np.zeros((5, *source.row_shape), source.dtype).tobytes()
            inputs = [pb.Tensor(name=source.name, data=data)]
            list(stub.Generate(pb.GenerateRequest(model="translate", inputs=inputs, max_steps=3)))
        page = Page(served)
    check_histograms(page)
    outputs = [each.output for each in made if each.HasField("output")]
    num_ids = sum(len(each.ids) for each in outputs)
    begun = {sequence for each in outputs for sequence in each.sequences}
    names = {"model": "names", "version": "1"}
    assert page.of("rnnserve_generated_outputs_total", **names) == num_ids > len(begun)
    assert page.of("rnnserve_time_to_first_output_seconds_count", **names) == len(begun)
    assert page.of("rnnserve_time_between_outputs_seconds_count", **names) == num_ids - len(begun)
    assert page.of("rnnserve_requests_total", outcome="success", **names) == 3
    assert page.of("rnnserve_steps_total", model="translate", graph="encoder") == 5
    assert page.of("rnnserve_steps_total", model="translate", graph="main") >= 1
    assert page.of("rnnserve_slots", model="translate", graph="encoder") > 0


def test_refusals_of_a_call_are_told_with_its_model(tmp_path: Path) -> None:
    save(tokens(7), tmp_path, "names")
    with serving(tmp_path) as served:
        with served.stub() as stub, pytest.raises(grpc.RpcError):
            list(stub.Generate(pb.GenerateRequest(model="names", max_steps=6)))
        prompts = pb.Tensor(data=np.full(500, 2).tobytes(), lengths=[1] * 500)
        late = pb.GenerateRequest(model="names", inputs=[prompts], timeout=Duration(nanos=1))
        with served.stub() as stub, pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
            list(stub.Generate(late))
        page = Page(served)
    assert page.of("rnnserve_rejected_total", model="names", reason="INVALID_INPUT") == 1
    assert page.of("rnnserve_rejected_total", model="names", reason="DEADLINE_EXPIRED") == 1
