"""Generate over a real channel: what a sequence gets is what it gets alone, whatever is made beside it."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import grpc
import numpy as np
import onnxruntime as ort
import pytest

from service.client import Client
from service.config import load_settings
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.repository import load_repository
from service.sampling import Choice, Draws, choose
from tests.generating import IDS, LETTERS, MAX_STEPS, Oracle, curve, save, tokens
from tests.onnx_models import build
from tests.rpc import open_stream
from tests.serving import serving


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("generating")
    save(tokens(7), root, "names")
    save(tokens(4, begin=True), root, "begun")
    save(tokens(2, encoder=True), root, "spoken")
    save(tokens(2, encoder=True, attention=True), root, "attentive")
    save(curve(), root, "curve")
    build("gru").save(root, "steps")
    return root


@pytest.fixture(scope="module")
def served(repository):
    with serving(repository) as running:
        yield running


@pytest.fixture(scope="module")
def client(served):
    with Client(served.address) as client:
        yield client


def packed(name, sequences):
    data = np.array([each for ids in sequences for each in ids], "<i8").tobytes()
    return pb.Tensor(name=name, data=data, lengths=[len(ids) for ids in sequences])


class Result:
    """What one sequence, or one of its hypotheses, got."""

    def __init__(self):
        self.ids, self.log_probs, self.rows = [], [], []
        self.reason = self.total = self.score = None


def collect(responses):
    """{(sequence, hypothesis): Result}; outputs come in order, and none after an end."""
    started = next(responses).started
    results = {}
    for response in responses:
        output = response.output
        at = 0
        hypotheses = output.hypotheses or [0] * len(output.sequences)
        rows = None
        if output.tensors:
            [tensor] = output.tensors
            rows = np.frombuffer(tensor.data, "<f4").reshape(tuple(tensor.shape))
        for sequence, hypothesis, position, length in zip(
            output.sequences, hypotheses, output.positions, output.lengths, strict=True
        ):
            result = results.setdefault((sequence, hypothesis), Result())
            assert position == len(result.rows if output.tensors else result.ids)
            assert result.reason is None, "an output after the end"
            if output.tensors:
                result.rows.extend(rows[at : at + length])
            else:
                result.ids += output.ids[at : at + length]
                result.log_probs += output.log_probs[at : at + length]
            at += length
        ends = output.ends
        ranks = ends.hypotheses or [0] * len(ends.sequences)
        for index, key in enumerate(zip(ends.sequences, ranks, strict=True)):
            result = results.setdefault(key, Result())
            result.reason = ends.reasons[index]
            assert ends.num_outputs[index] == len(result.rows or result.ids)
            result.total = ends.log_probs[index] if ends.log_probs else None
            result.score = ends.scores[index] if ends.scores else None
    return started, results


def generate(stub, model, *inputs, **terms):
    return collect(stub.Generate(pb.GenerateRequest(model=model, inputs=inputs, **terms)))


def same(result, alone, *, is_exact=True):
    assert result.ids == alone.ids
    if is_exact:
        np.testing.assert_array_equal(np.float32(result.log_probs), np.float32(alone.log_probs))
    else:
        np.testing.assert_allclose(result.log_probs, alone.log_probs, rtol=1e-5, atol=1e-5)
    assert result.total == pytest.approx(alone.total, abs=0 if is_exact else 1e-4)
    assert result.reason == (pb.FINISH_REASON_END if alone.is_ended else pb.FINISH_REASON_MAX_STEPS)


def prompts_of(seed, count):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, IDS, n).tolist() for n in rng.integers(1, 40, count)]


def sources_of(seed, count):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, LETTERS, n).tolist() for n in rng.integers(1, 25, count)]


class TestAlone:
    """Beside many others of other calls, models and terms, each sequence gets what it gets alone."""

    def test_every_kind_at_once(self, served, repository):
        names, spoken, attentive = (Oracle(repository, name) for name in ("names", "spoken", "attentive"))
        prompts, sources = prompts_of(0, 60), sources_of(1, 40)
        choice = Choice(temperature=1.3, top_k=5, top_p=0.9)
        with served.stub() as stub, ThreadPoolExecutor(8) as pool:
            greedy = [pool.submit(generate, stub, "names", packed("token", [p])) for p in prompts[:20]]
            together = pool.submit(generate, stub, "names", packed("token", prompts))
            drawn = pool.submit(
                generate,
                stub,
                "names",
                packed("token", prompts),
                seeds=range(100, 160),
                temperature=1.3,
                top_k=5,
                top_p=0.9,
            )
            said = pool.submit(generate, stub, "spoken", packed("x", sources))
            seen = pool.submit(generate, stub, "attentive", packed("", sources))
            _, results = together.result()
            assert len(results) == 60
            assert {r.reason for r in results.values()} == {pb.FINISH_REASON_END, pb.FINISH_REASON_MAX_STEPS}
            for index, prompt in enumerate(prompts):
                alone = names.decode(prompt)
                same(results[index, 0], alone)
                if index < 20:
                    same(greedy[index].result()[1][0, 0], alone)
            started, results = drawn.result()
            assert list(started.seeds) == list(range(100, 160))
            for index, prompt in enumerate(prompts):
                draws = Draws(100 + index)

                def draw(row, n, draws=draws):
                    return choose(row[None], choice, np.array([draws.at(n)]))[0]

                same(results[index, 0], names.decode(prompt, choose=draw))
            for index, source in enumerate(sources):
                same(said.result()[1][index, 0], spoken.decode([1], source))
                same(seen.result()[1][index, 0], attentive.decode([1], source), is_exact=False)

    def test_a_prompt_is_optional_where_the_model_says_what_to_begin_with(self, served, repository):
        oracle = Oracle(repository, "begun")
        with served.stub() as stub:
            _, results = generate(stub, "begun", packed("token", [[], [3, 4]]))
            same(results[0, 0], oracle.decode([1]))
            same(results[1, 0], oracle.decode([3, 4]))
            same(generate(stub, "begun")[1][0, 0], oracle.decode([1]))
            started, results = generate(stub, "begun", temperature=1.0, seeds=[7, 7])
            assert (started.num_sequences, results[0, 0].ids) == (2, results[1, 0].ids)

    def test_seeds_that_the_server_makes_up_are_told_and_draw_the_same_again(self, served):
        with served.stub() as stub:
            started, results = generate(stub, "names", packed("token", [[2], [2], [2]]), temperature=2.0)
            assert len(set(started.seeds)) == 3
            _, again = generate(stub, "names", packed("token", [[2], [2], [2]]), temperature=2.0, seeds=started.seeds)
            assert [r.ids for r in results.values()] == [again[key].ids for key in results]
            assert not generate(stub, "names", packed("token", [[2]]))[0].seeds

    def test_a_curve_is_what_one_run_unrolls(self, served, repository):
        session = ort.InferenceSession(repository / "curve" / "1" / "model.onnx", providers=["CPUExecutionProvider"])
        seasons = np.random.default_rng(0).standard_normal((9, 3)).astype(np.float32)
        tensor = pb.Tensor(data=seasons.tobytes())
        with served.stub() as stub:
            _, results = generate(stub, "curve", tensor)
            brief = generate(stub, "curve", tensor, max_steps=5, outputs=["y"])[1]
        for index, season in enumerate(seasons):
            feeds = {"season": season[None], "lengths": np.array([24], np.int32)}
            [y] = session.run(["y"], {**feeds, "state.0.h": np.zeros((1, 1, 8), np.float32)})
            np.testing.assert_array_equal(results[index, 0].rows, y[0])
            np.testing.assert_array_equal(brief[index, 0].rows, y[0, :5])
            assert results[index, 0].reason == pb.FINISH_REASON_MAX_STEPS
            assert results[index, 0].total is None

    @pytest.mark.parametrize("settings", [{"keeps_states": True}, {"spill": True}, {"max_chunk_steps": 3}])
    def test_other_places_of_states_make_no_difference(self, repository, tmp_path, settings):
        if settings.pop("spill", False):
            settings = {"max_resident_sessions": 2, "spill_store": tmp_path / "states.db"}
        prompts, sources = prompts_of(3, 9), sources_of(4, 9)
        with serving(repository, **settings) as running, running.stub() as stub:
            names, attentive = (Oracle(repository, name) for name in ("names", "attentive"))
            _, results = generate(stub, "names", packed("token", prompts))
            _, seen = generate(stub, "attentive", packed("x", sources))
            _, found = generate(stub, "names", packed("token", prompts), beams=3)
            for index in range(9):
                same(results[index, 0], names.decode(prompts[index]))
                same(seen[index, 0], attentive.decode([1], sources[index]), is_exact=False)
                assert found[index, 0].total == pytest.approx(search(names, prompts[index], None, 3, 1)[0][0])


def search(oracle, prompt, source, width, wanted, normalization=0.0):
    """Hypotheses [(total, score, ids)] by a search written out anew, that never stops early."""
    row, held = oracle.step(oracle.begin(source), prompt)
    live, found = [(0.0, [], row, held)], []
    for n in range(1, MAX_STEPS + 1):
        nexts = [(t + float(p), rank, i) for rank, (t, _, row, _) in enumerate(live) for i, p in enumerate(row)]
        nexts.sort(key=lambda each: -each[0])
        found += [(t, t / n**normalization, live[rank][1]) for t, rank, i in nexts[:width] if i == 0]
        kept = [(t, rank, i) for t, rank, i in nexts if i != 0][:width]
        if n == MAX_STEPS:
            found += [(t, t / n**normalization, [*live[rank][1], i]) for t, rank, i in kept]
            break
        live = [(t, [*live[rank][1], i], *oracle.step(live[rank][3], [i])) for t, rank, i in kept]
    return sorted(found, key=lambda each: -each[1])[:wanted]


class TestBeams:
    @pytest.mark.parametrize(
        ("model", "width", "wanted", "power"), [("names", 4, 3, 0.0), ("spoken", 3, 3, 0.7), ("attentive", 5, 2, 1.0)]
    )
    def test_a_search_finds_what_one_without_shortcuts_finds(self, served, repository, model, width, wanted, power):
        oracle = Oracle(repository, model)
        prompts = prompts_of(8, 6) if model == "names" else [[1]] * 6
        sources = [None] * 6 if model == "names" else sources_of(9, 6)
        given = packed("token", prompts) if model == "names" else packed("x", sources)
        with served.stub() as stub:
            _, results = generate(stub, model, given, beams=width, num_hypotheses=wanted, length_normalization=power)
        for index in range(6):
            expected = search(oracle, prompts[index], sources[index], width, wanted, power)
            for rank, (total, score, ids) in enumerate(expected):
                result = results[index, rank]
                assert result.ids == ids
                assert (result.total, result.score) == (pytest.approx(total, abs=1e-4), pytest.approx(score, abs=1e-4))
        assert len(results) == 6 * wanted


class TestRefused:
    @pytest.mark.parametrize(
        ("model", "inputs", "terms", "code", "said"),
        [
            ("steps", [], {}, "FAILED_PRECONDITION", "steps does not generate: it is stepping.*call Predict"),
            (
                "names",
                [],
                {},
                "INVALID_ARGUMENT",
                "sequence 0 has no prompt, which names begins with: give ids of token",
            ),
            ("names", [[2], []], {}, "INVALID_ARGUMENT", "sequence 1 has no prompt"),
            ("names", [[2, 7]], {}, "INVALID_ARGUMENT", r"token ids lie in 0\.\.6"),
            ("names", [[2]], {"max_steps": 21}, "INVALID_ARGUMENT", "max_steps 21: names makes at most 20 outputs"),
            ("names", [[2]], {"temperature": -1.0}, "INVALID_ARGUMENT", "temperature -1: expected 0 or more"),
            ("names", [[2]], {"temperature": float("nan")}, "INVALID_ARGUMENT", "temperature nan"),
            ("names", [[2]], {"temperature": 1.0, "top_p": 1.5}, "INVALID_ARGUMENT", "top_p 1.5: expected 0 to 1"),
            ("names", [[2]], {"top_k": 3}, "INVALID_ARGUMENT", "give a temperature over 0 too"),
            ("names", [[2]], {"beams": 2, "temperature": 1.0}, "INVALID_ARGUMENT", "search for the likeliest or draw"),
            ("names", [[2]], {"beams": 65}, "INVALID_ARGUMENT", "beams 65: at most 64"),
            ("names", [[2]], {"num_hypotheses": 2}, "INVALID_ARGUMENT", "give the sequence several times"),
            ("names", [[2]], {"length_normalization": 1.0}, "INVALID_ARGUMENT", "give beams too"),
            ("names", [[2]], {"seeds": [1, 2]}, "INVALID_ARGUMENT", "different numbers of sequences: token 1, seeds 2"),
            ("names", [[2]], {"outputs": ["log_probs"]}, "INVALID_ARGUMENT", "answers ids and their log-prob"),
            ("names", [[2]], {"priority": 9}, "INVALID_ARGUMENT", "priority 9 is unknown"),
            ("curve", [], {}, "INVALID_ARGUMENT", "input season is missing: curve generates from it"),
            ("curve", None, {"temperature": 1.0}, "INVALID_ARGUMENT", "nothing is drawn"),
            ("curve", None, {"beams": 2}, "INVALID_ARGUMENT", "nothing to search for"),
            ("spoken", [], {}, "INVALID_ARGUMENT", "input x is missing: spoken generates from it"),
            ("spoken", [[1], []], {}, "INVALID_ARGUMENT", "a source of x has no steps"),
            ("spoken", [[6]], {}, "INVALID_ARGUMENT", r"token ids lie in 0\.\.5"),
            ("nobody", [], {}, "NOT_FOUND", "no model 'nobody'"),
        ],
    )
    def test_bad_input_says_what_to_do(self, served, model, inputs, terms, code, said):
        if inputs is None:
            tensors = [pb.Tensor(data=np.zeros((1, 3), "<f4").tobytes())]
        else:
            tensors = [packed("", inputs)] if inputs else []
        with served.stub() as stub, pytest.raises(grpc.RpcError) as caught:
            generate(stub, model, *tensors, **terms)
        assert caught.value.code().name == code
        assert re.search(said, caught.value.details()), caught.value.details()

    @pytest.mark.parametrize("model", ["curve", "spoken"])
    def test_models_that_can_t_be_given_steps_say_to_call_generate(self, served, model):
        with served.stub() as stub:
            for call in (
                lambda: stub.Predict(pb.PredictRequest(model=model, inputs=[pb.Tensor(data=b"")])),
                lambda: list(stub.StreamPredict(iter([open_stream(model)]))),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    call()
                assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
                assert "call Generate" in caught.value.details()

    def test_a_token_model_scores_the_ids_that_it_is_given(self, served, repository):
        ids = [2, 3, 4, 5]
        oracle = Oracle(repository, "names")
        with served.stub() as stub:
            answer = stub.Predict(pb.PredictRequest(model="names", inputs=[packed("token", [ids])]))
        rows = np.frombuffer(answer.outputs[0].data, "<f4").reshape(4, IDS)
        for n in range(1, 5):
            np.testing.assert_array_equal(rows[n - 1], oracle.step(oracle.begin(None), ids[:n])[0])

    def test_time_that_runs_out_ends_the_call_and_frees_what_it_held(self, served):
        request = pb.GenerateRequest(model="names", inputs=[packed("token", [[2] * 4] * 2000)])
        request.timeout.FromMilliseconds(1)
        with served.stub() as stub, pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        served.wait_until(lambda: is_idle(served.lane("names")))


def is_idle(lane):
    return not lane.sessions and not lane.slab.num_allocated and not lane.scheduler.num_queued_steps


class TestGone:
    def test_a_cancelled_call_frees_its_slots_and_costs_its_neighbours_nothing(self, served, repository):
        prompts = prompts_of(5, 50)
        oracle = Oracle(repository, "names")
        with served.stub() as stub:
            for beams in (1, 3):
                call = stub.Generate(
                    pb.GenerateRequest(model="names", beams=beams, inputs=[packed("token", [[2] * 30] * 900)])
                )
                next(call)
                call.cancel()
                _, results = generate(stub, "names", packed("token", prompts))
                for index, prompt in enumerate(prompts):
                    same(results[index, 0], oracle.decode(prompt))
        served.wait_until(lambda: is_idle(served.lane("names")))

    def test_what_a_reader_does_not_take_is_not_made(self, repository):
        with serving(repository, max_unsent_bytes=1) as running, running.stub() as stub:
            call = stub.Generate(pb.GenerateRequest(model="names", inputs=[packed("token", [[2]] * 50)], temperature=1))
            _, results = collect(call)
            assert len(results) == 50


def test_a_drain_lets_what_is_being_made_end(repository):
    prompts = prompts_of(9, 60) * 20
    with serving(repository, drain_s=20, max_predict_sequences=64) as running, running.stub() as stub:
        call = stub.Generate(pb.GenerateRequest(model="names", inputs=[packed("token", prompts)]))
        started = next(call)
        stopping = asyncio.run_coroutine_threadsafe(running.server.stop(), running.loop)
        running.wait_until(lambda: running.server.engine.is_draining)
        with pytest.raises(grpc.RpcError) as caught, running.stub() as late:
            generate(late, "names", packed("token", prompts[:1]))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        _, results = collect(chain([started], call))
        stopping.result(timeout=20)
    oracle = Oracle(repository, "names")
    for index, alone in enumerate(map(oracle.decode, prompts[:60])):
        for place in range(index, len(prompts), 60):
            same(results[place, 0], alone)


def test_the_client_generates_and_knows_what_is_taken(client, repository):
    info = client.model("attentive")
    assert [t.name for t in info.inputs] == ["x", "token"]
    assert info.generation is not None
    assert info.generation.source_inputs == ("x",)
    results = client.generate("attentive", ["abc", "de"])
    oracle = Oracle(repository, "attentive")
    assert [list(r.ids) for r in results] == [oracle.decode([1], [1, 2, 3]).ids, oracle.decode([1], [4, 5]).ids]


def test_an_encoder_of_another_version_is_refused(tmp_path):
    files = tokens(5, encoder=True)
    save({**files, "encoder.onnx": tokens(6, encoder=True)["encoder.onnx"]}, tmp_path, "mixed")
    save({"model.onnx": files["model.onnx"]}, tmp_path, "half")
    loaded = load_repository(load_settings({"repository": tmp_path}))
    assert {b.name: str(b.error) for b in loaded.broken}.keys() == {"mixed", "half"}
    half, mixed = (str(b.error) for b in loaded.broken)
    assert "encoder.onnx: can't be read" in half
    assert re.search("its SHA-256 is .* but model.onnx was exported with .*export both together again", mixed)
