"""Models that generate, over ModelInfer and ModelStreamInfer: what Generate answers, in the protocol's tensors."""

from __future__ import annotations

import struct

import numpy as np
import onnx
import pytest

from models.spec import METADATA_KEY, Spec
from service.pb.inference import inference_pb2 as pb
from service.pb.rnnserve.v1 import rnnserve_pb2 as native
from tests.generating import IDS, LETTERS, MAX_STEPS, SEASONS, WORDS, Oracle, contextual, curve, save, tokens
from tests.lanes import equal
from tests.oip.calls import array, refused, request, step, stub_of
from tests.rpc import array as native_array
from tests.rpc import code_of, details, field_of
from tests.serving import serving

ENDED, FULL = native.FINISH_REASON_END, native.FINISH_REASON_MAX_STEPS


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("generating")
    save(tokens(7), root, "names")
    save(without_words(tokens(7)), root, "wordless")
    save(tokens(2, encoder=True), root, "spoken")
    save(tokens(2, encoder=True, attention=True), root, "attentive")
    save(curve(), root, "curve")
    save(contextual(), root, "contextual")
    return root


@pytest.fixture(scope="module")
def served(repository):
    with serving(repository) as running:
        yield running


@pytest.fixture(scope="module")
def native_stub(served):
    with served.stub() as stub:
        yield stub


def ask(model, inputs, *, request_id="", outputs=(), numbers=None, **parameters):
    message = request(model, inputs, request_id=request_id, outputs=outputs, **parameters)
    for name, value in (numbers or {}).items():
        message.parameters[name].double_param = value
    return message


def texts(response):
    [raw] = [
        raw for each, raw in zip(response.outputs, response.raw_output_contents, strict=True) if each.name == "text"
    ]
    found, at = [], 0
    while at < len(raw):
        [size] = struct.unpack_from("<I", raw, at)
        found.append(raw[at + 4 : at + 4 + size].decode())
        at += 4 + size
    return found


def sources(seed, count):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 25, count).astype(np.int32)
    padded = np.full((count, lengths.max()), LETTERS - 1)
    return [rng.integers(0, LETTERS, n) for n in lengths], padded, lengths


def answers(response):
    """[(ids, log-probabilities, reason, score)] of every row."""
    lengths = array(response, "lengths")
    found = []
    for row, length in enumerate(lengths.tolist()):
        ids, log_probs = array(response, "ids")[row], array(response, "log_probs")[row]
        assert not ids[length:].any()
        assert not log_probs[length:].any()
        found.append(
            (
                ids[:length].tolist(),
                log_probs[:length],
                int(array(response, "finish_reasons")[row]),
                float(array(response, "scores")[row]),
            )
        )
    return found


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_an_encoders_sources_are_ragged(stub, repository, form):
    each, padded, lengths = sources(1, 6)
    for row, source in zip(padded, each, strict=True):
        row[: len(source)] = source
    x = padded if form == "padded" else np.concatenate(each)
    response = stub.ModelInfer(ask("spoken", {"x": x, "lengths": lengths}, request_id="r1"))
    assert (response.model_name, response.model_version, response.id) == ("spoken", "1", "r1")
    oracle = Oracle(repository, "spoken")
    alone = [oracle.decode([1], source.tolist()) for source in each]
    for (ids, log_probs, reason, score), wanted in zip(answers(response), alone, strict=True):
        assert ids == wanted.ids
        equal(log_probs, np.float32(wanted.log_probs))
        assert reason == (ENDED if wanted.is_ended else FULL)
        assert score == pytest.approx(wanted.total, abs=1e-5)
    assert texts(response) == [" ".join(WORDS[each] for each in wanted.ids) for wanted in alone]
    assert len({len(wanted.ids) for wanted in alone}) > 1


def test_prompts_of_one_length_need_no_lengths(stub, repository):
    prompts = np.array([[2, 3], [4, 5], [6, 6]])
    response = stub.ModelInfer(ask("names", {"token": prompts}, max_steps=9))
    oracle = Oracle(repository, "names")
    assert [ids for ids, *_ in answers(response)] == [oracle.decode(row.tolist()).ids[:9] for row in prompts]


def without_words(files):
    """The files of a model whose ids are no words."""
    model = onnx.load_from_string(files["model.onnx"])
    [entry] = [each for each in model.metadata_props if each.key == METADATA_KEY]
    entry.value = Spec.model_validate_json(entry.value).model_copy(update={"vocabulary": ()}).to_json()
    return {**files, "model.onnx": model.SerializeToString()}


def test_ids_that_are_no_words_have_no_text(stub, repository):
    response = stub.ModelInfer(ask("wordless", {"token": np.array([[2, 3]])}))
    assert answers(response)[0][0] == Oracle(repository, "names").decode([2, 3]).ids
    given = ["ids", "log_probs", "lengths", "finish_reasons", "scores"]
    assert [each.name for each in response.outputs] == given
    assert [t.name for t in stub.ModelMetadata(pb.ModelMetadataRequest(name="wordless")).outputs] == given
    error = refused(stub.ModelInfer, ask("wordless", {"token": np.array([[2, 3]])}, outputs=["text"]))
    assert "no output 'text'; wordless has ids, log_probs, lengths" in error.details()


def test_drawing_is_repeated_by_its_seed(stub, native_stub, repository):
    prompts = np.array([[2], [2], [2], [2]])
    drawn = stub.ModelInfer(ask("names", {"token": prompts}, numbers={"temperature": 1.2}, top_k=5))
    seed = drawn.parameters["seed"].uint64_param
    again = ask("names", {"token": prompts}, numbers={"temperature": 1.2}, top_k=5)
    again.parameters["seed"].uint64_param = seed
    assert [each[0] for each in answers(stub.ModelInfer(again))] == [each[0] for each in answers(drawn)]
    assert len({tuple(each[0]) for each in answers(drawn)}) > 1
    asked = native.GenerateRequest(
        model="names",
        inputs=[native.Tensor(name="token", data=np.array([2]).tobytes(), lengths=[1])],
        seeds=[(seed + 2) % 2**64],
        temperature=1.2,
        top_k=5,
    )
    ids = [each for response in native_stub.Generate(asked) for each in response.output.ids]
    assert answers(drawn)[2][0] == ids


def test_hypotheses_of_a_search_are_rows(stub, native_stub):
    prompts = np.array([[2, 3], [5, 4]])
    response = stub.ModelInfer(ask("names", {"token": prompts}, beams=4, num_hypotheses=3))
    asked = native.GenerateRequest(
        model="names",
        inputs=[native.Tensor(name="token", data=prompts.tobytes(), lengths=[2, 2])],
        beams=4,
        num_hypotheses=3,
    )
    wanted = {}
    for each in native_stub.Generate(asked):
        output, at = each.output, 0
        ranks = output.hypotheses or [0] * len(output.sequences)
        for key, length in zip(zip(output.sequences, ranks, strict=True), output.lengths, strict=True):
            wanted[key] = list(output.ids[at : at + length])
            at += length
    assert [row[0] for row in answers(response)] == [
        wanted.get((sequence, rank), []) for sequence in range(2) for rank in range(3)
    ]
    assert [score for *_, score in answers(response)[:3]] == sorted(
        (s for *_, s in answers(response)[:3]), reverse=True
    )


def test_curve_gives_its_own_outputs(stub, native_stub):
    season = np.random.default_rng(3).standard_normal((4, SEASONS)).astype(np.float32)
    response = stub.ModelInfer(ask("curve", {"season": season}, max_steps=11))
    assert [each.name for each in response.outputs] == ["y", "lengths", "finish_reasons"]
    assert array(response, "lengths").tolist() == [11] * 4
    asked = native.GenerateRequest(
        model="curve", inputs=[native.Tensor(name="season", data=season.tobytes())], max_steps=11
    )
    parts = {}
    for each in native_stub.Generate(asked):
        output, at = each.output, 0
        rows = native_array(output.tensors[0]) if output.tensors else None
        for sequence, length in zip(output.sequences, output.lengths, strict=True):
            parts.setdefault(sequence, []).append(rows[at : at + length])
            at += length
    equal(array(response, "y"), np.stack([np.concatenate(parts[each]) for each in range(4)]))


class TestStream:
    def test_every_piece_is_a_response(self, stub, repository):
        wanted = Oracle(repository, "names").decode([2, 3])
        message = ask("names", {"token": np.array([[2, 3]])}, request_id="s", triton_enable_empty_final_response=True)
        responses = list(stub.ModelStreamInfer(iter([message])))
        assert not any(each.error_message for each in responses)
        pieces = [each.infer_response for each in responses]
        assert {piece.id for piece in pieces} == {"s"}
        ids = np.concatenate([array(piece, "ids")[0] for piece in pieces])
        assert ids.tolist() == wanted.ids
        equal(np.concatenate([array(piece, "log_probs")[0] for piece in pieces]), np.float32(wanted.log_probs))
        finals = [piece.parameters["triton_final_response"].bool_param for piece in pieces]
        assert finals == [False] * (len(pieces) - 1) + [True]
        reasons = [int(array(piece, "finish_reasons")[0]) for piece in pieces]
        assert reasons[:-1] == [0] * (len(pieces) - 1)
        assert reasons[-1] == (ENDED if wanted.is_ended else FULL)

    def test_sequences_are_told_apart(self, stub, repository):
        prompts = np.random.default_rng(5).integers(1, IDS, (5, 3))
        pieces = [each.infer_response for each in stub.ModelStreamInfer(iter([ask("names", {"token": prompts})]))]
        ids = {row: [] for row in range(5)}
        for piece in pieces:
            ids[piece.parameters["sequence"].int64_param] += array(piece, "ids")[0].tolist()
        oracle = Oracle(repository, "names")
        assert ids == {row: oracle.decode(prompt.tolist()).ids for row, prompt in enumerate(prompts)}
        assert not any(piece.parameters["triton_final_response"].bool_param for piece in pieces)

    def test_the_last_of_many_is_marked(self, stub):
        curves = {"season": np.zeros((4, SEASONS), np.float32)}  # which end together
        message = ask("curve", curves, max_steps=6, triton_enable_empty_final_response=True)
        responses = list(stub.ModelStreamInfer(iter([message])))
        finals = [each.infer_response.parameters["triton_final_response"].bool_param for each in responses]
        assert finals == [False] * 3 + [True]

    def test_requests_are_answered_in_their_order_whatever_they_are(self, stub):
        x = {"x": np.zeros((1, 4, SEASONS), np.float32), "season": np.zeros((1, SEASONS), np.float32)}
        sent = [
            ask("names", {"token": np.array([[2, 3]])}, request_id="a"),
            ask("names", {"token": np.array([[99]])}, request_id="b"),
            request("contextual", x, request_id="c"),
            ask("spoken", {"x": np.array([[1, 2, 3]])}, request_id="d", outputs=["text"]),
        ]
        responses = list(stub.ModelStreamInfer(iter(sent)))
        ids = [each.infer_response.id for each in responses]
        assert ids == sorted(ids)
        assert set(ids) == set("abcd")
        assert [each.infer_response.id for each in responses if each.error_message] == ["b"]
        assert {each.name for each in responses[-1].infer_response.outputs} == {"text"}

    def test_a_client_that_leaves_frees_what_it_held(self, stub, served):
        call = stub.ModelStreamInfer(iter([ask("names", {"token": np.array([[2, 3]] * 512)})]))
        next(call)
        call.cancel()
        served.wait_until(lambda: not served.lane("names").slab.num_allocated)


def test_whole_sequences_take_contexts(stub, native_stub):
    rng = np.random.default_rng(8)
    lengths = np.array([5, 2, 7], np.int32)
    x = rng.standard_normal((3, 7, SEASONS)).astype(np.float32)
    season = rng.standard_normal((3, SEASONS)).astype(np.float32)
    response = stub.ModelInfer(request("contextual", {"x": x, "lengths": lengths, "season": season}))
    packed = np.concatenate([row[:length] for row, length in zip(x, lengths, strict=True)])
    wanted = native_stub.Predict(
        native.PredictRequest(
            model="contextual",
            inputs=[
                native.Tensor(name="x", data=packed.tobytes(), lengths=lengths.tolist()),
                native.Tensor(name="season", data=season.tobytes()),
            ],
        )
    )
    got = array(response, "y")
    equal(
        np.concatenate([row[:length] for row, length in zip(got, lengths, strict=True)]),
        native_array(wanted.outputs[0]),
    )
    assert "input season is missing" in refused(stub.ModelInfer, request("contextual", x)).details()
    few = request("contextual", {"x": x, "season": season[:2]})
    assert "season has 2 rows for 3 sequences" in refused(stub.ModelInfer, few).details()
    wild = request("contextual", {"x": x, "season": season * np.float32(np.inf)})
    assert "not finite" in refused(stub.ModelInfer, wild).details()
    stepped = step("contextual", 3, x[0], sequence_start=True)
    assert "send the whole sequence in one request without sequence_id" in refused(stub.ModelInfer, stepped).details()


def test_models_that_generate_are_described(stub):
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="spoken"))
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("x", "INT64", [-1, -1])]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [
        ("ids", "INT64", [-1, -1]),
        ("log_probs", "FP32", [-1, -1]),
        ("text", "BYTES", [-1, 1]),
        ("lengths", "INT32", [-1, 1]),
        ("finish_reasons", "INT32", [-1, 1]),
        ("scores", "FP32", [-1, 1]),
    ]
    config = stub.ModelConfig(pb.ModelConfigRequest(name="spoken")).config
    assert config.model_transaction_policy.decoupled
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert [t.data_type for t in config.output][:3] == [pb.TYPE_INT64, pb.TYPE_FP32, pb.TYPE_STRING]
    drawn = stub.ModelConfig(pb.ModelConfigRequest(name="curve")).config
    assert [(t.name, list(t.dims)) for t in drawn.input] == [("season", [SEASONS])]
    assert (drawn.output[0].name, list(drawn.output[0].dims)) == ("y", [-1, 2])
    assert [t.name for t in stub.ModelMetadata(pb.ModelMetadataRequest(name="names")).inputs] == ["token"]
    assert not stub.ModelConfig(pb.ModelConfigRequest(name="contextual")).config.model_transaction_policy.decoupled


PROMPT = {"token": np.array([[2, 3]])}


def twice(message, name):
    number = [each.name for each in message.inputs].index(name)
    message.inputs.append(message.inputs[number])
    message.raw_input_contents.append(message.raw_input_contents[number])
    return message


LENGTHS = np.array([2], np.int32)


@pytest.mark.parametrize(
    ("message", "field", "words"),
    [
        (ask("names", PROMPT, max_steps=MAX_STEPS + 1), "max_steps", f"at most {MAX_STEPS} outputs"),
        (ask("names", PROMPT, max_steps=-1), "parameters.max_steps", "max_steps -1: expected a whole number"),
        (ask("names", PROMPT, temperature="hot"), "parameters.temperature", "expected a number, got string_param"),
        (ask("names", PROMPT, seed=3), "parameters.seed", "give a temperature over 0 too"),
        (ask("names", PROMPT, numbers={"seed": 0.5, "temperature": 1}), "parameters.seed", "a whole number"),
        (ask("names", PROMPT, numbers={"beams": 2.5}), "parameters.beams", "beams 2.5: expected a whole number"),
        (ask("names", PROMPT, outputs=["y"]), "outputs[0].name", "names has ids, log_probs, text"),
        (ask("names", PROMPT, outputs=["ids", "ids"]), "outputs", "named twice"),
        (ask("names", {"x": np.array([[1]])}), "inputs[0].name", "names takes token, lengths, state.0.h"),
        (ask("names", {"token": np.array([[2.0]])}), "inputs[0].datatype", "token is INT64, got FP64"),
        (ask("names", {"token": np.array([[IDS]])}), "inputs[0]", "element 0"),
        (ask("names", {}), "inputs", "has no prompt"),
        (twice(ask("names", PROMPT), "token"), "inputs[1].name", "token is given twice"),
        (twice(ask("names", {**PROMPT, "lengths": LENGTHS}), "lengths"), "inputs[2].name", "lengths is given twice"),
        (
            ask("names", {**PROMPT, "lengths": np.array([3], np.int32)}),
            "lengths",
            "lengths lie in 1..2, the axis of time",
        ),
        (ask("names", {"lengths": np.array([3], np.int32)}), "lengths", "lengths of no tensor"),
        (ask("curve", {"season": np.zeros((1, SEASONS), np.float32)}, outputs=["lengths"]), "outputs", "one of y too"),
        (ask("curve", {"season": np.zeros((1, 5), np.float32)}), "inputs[0].shape", "each row is [3]"),
    ],
)
def test_wrong_requests_are_refused(stub, message, field, words):
    error = refused(stub.ModelInfer, message)
    assert code_of(details(error)) == "INVALID_ARGUMENT"
    assert words in error.details()
    assert field_of(details(error)) == field


def test_what_generates_is_not_stepped(stub):
    error = refused(stub.ModelInfer, step("names", 4, np.array([2, 3]), sequence_start=True))
    assert code_of(details(error)) == "FAILED_PRECONDITION"
    assert "send the request that it is to generate from in one request without sequence_id" in error.details()


def test_timeout_ends_what_takes_too_long(stub, served):
    error = refused(stub.ModelInfer, ask("names", {"token": np.array([[2, 3]] * 900)}, timeout=1))
    assert code_of(details(error)) == "DEADLINE_EXCEEDED"
    served.wait_until(lambda: not served.lane("names").slab.num_allocated)


def test_statistics_count_sequences(repository):
    with serving(repository) as served, stub_of(served) as stub:
        stub.ModelInfer(ask("names", {"token": np.array([[2, 3]] * 3)}))
        [found] = stub.ModelStatistics(pb.ModelStatisticsRequest(name="names")).model_stats
        assert (found.inference_count, found.inference_stats.success.count) == (3, 1)
        assert found.execution_count >= 1
