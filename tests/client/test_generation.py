"""What is asked of Generate, and what is made of its answers: messages by hand, no server."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.client import FailedPrecondition, GenerationInfo, InvalidArgument, ProtocolError, TensorInfo, _codec
from service.client._generation import Collector, GenerateTerms, generate_request, values_of
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from tests.client.toy import SUM

WORDS = ("<end>", "<girl>", "a", "b")
TOKEN = TensorInfo("token", "int64", (), "per_step")
SCORES = TensorInfo("log_probs", "float32", (4,), "per_step")
NAMES = dataclasses.replace(
    SUM,
    name="names",
    step_mode="generative",
    inputs=(TOKEN,),
    outputs=(SCORES,),
    vocabulary=WORDS,
    generation=GenerationInfo(max_steps=9, token_input="token", end_id=0),
)
SPOKEN = dataclasses.replace(
    NAMES,
    name="spoken",
    inputs=(TensorInfo("x", "int64", (), "per_step", categories=("", "h", "i")), TOKEN),
    vocabulary=("<begin>", "<end>", "HH", "AY"),
    generation=GenerationInfo(
        max_steps=9, token_input="token", source_inputs=("x",), begin_id=0, end_id=1, separator=" "
    ),
)
CURVES = dataclasses.replace(
    NAMES,
    name="curves",
    inputs=(TensorInfo("season", "float32", (2,), "per_sequence", element_names=("winter", "summer")),),
    outputs=(TensorInfo("y", "float32", (1,), "per_step"),),
    vocabulary=(),
    generation=GenerationInfo(max_steps=24),
)


def request(info, inputs=None, prompts=None, **terms):
    return generate_request(info, inputs, prompts, GenerateTerms(**terms))


def ids_of(message):
    return np.frombuffer(message.data, "<i8").tolist(), list(message.lengths)


def test_sources_are_packed_by_their_letters():
    asked = request(SPOKEN, ["hi", "Ih?", [2, 1, 1]], max_steps=5, beams=3, num_hypotheses=2, priority="low")
    [source] = asked.inputs
    assert source.name == "x"
    assert ids_of(source) == ([1, 2, 2, 1, 0, 2, 1, 1], [2, 3, 3])
    assert (asked.max_steps, asked.beams, asked.num_hypotheses, asked.priority) == (5, 3, 2, pb.PRIORITY_LOW)
    assert not asked.HasField("timeout")


def test_a_source_of_longer_words_is_split_at_spaces():
    words = TensorInfo("x", "int64", (), "per_step", categories=("", "good", "day"))
    info = dataclasses.replace(SPOKEN, inputs=(words, TOKEN))
    assert ids_of(request(info, ["good day", "day"]).inputs[0]) == ([1, 2, 2], [2, 1])


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [("<girl>", [1]), ("<girl>ab", [1, 2, 3]), ("<girl>AB", [1, 2, 3]), (["<girl>", "b"], [1, 3]), ([1, 3], [1, 3])],
)
def test_prompts_are_words_texts_or_ids(prompt, ids):
    [message] = request(NAMES, prompts=[prompt]).inputs
    assert (message.name, *ids_of(message)) == ("token", ids, [len(ids)])
    assert request(NAMES, [prompt]) == request(NAMES, prompts=[prompt])


def test_words_with_spaces_between_are_prompts_too():
    source, message = request(SPOKEN, ["hi", "h"], ["<begin> hh", ["AY"]]).inputs
    assert ids_of(source)[1] == [2, 1]
    assert ids_of(message) == ([0, 2, 3], [2, 1])


def test_one_prompt_is_made_of_several_times():
    asked = request(NAMES, prompts=["<girl>"], num_sequences=3, seed=2**64 - 2)
    assert ids_of(asked.inputs[0]) == ([1, 1, 1], [1, 1, 1])
    assert list(asked.seeds) == [2**64 - 2, 2**64 - 1, 0]
    begun = replace(NAMES, generation=replace(NAMES.generation, begin_id=1))  # which the server begins by itself
    assert ids_of(request(begun, num_sequences=2).inputs[0]) == ([], [0, 0])


def test_contexts_are_rows():
    asked = request(CURVES, [[1, 0], [0, 1]], timeout=1.5, seed=[4, 5])
    [message] = asked.inputs
    assert (message.layout, list(message.shape)) == (pb.LAYOUT_PER_SEQUENCE, [2, 2])
    assert asked.timeout.ToMilliseconds() == 1500
    assert list(asked.seeds) == [4, 5]


@pytest.mark.parametrize(
    ("info", "arguments", "said"),
    [
        (SPOKEN, {}, "spoken generates from x: give them"),
        (SPOKEN, {"inputs": "hi"}, r"expected a list of sequences, got one text; for one give \['hi'\]"),
        (SPOKEN, {"inputs": []}, "expected at least one sequence"),
        (SPOKEN, {"inputs": ["hi"], "prompts": ["HH", "HH"]}, "different numbers of sequences"),
        (SPOKEN, {"inputs": ["hi"], "num_sequences": 2}, "num_sequences is 2, but the inputs are of 1"),
        (NAMES, {"prompts": ["<girl>?"]}, r"prompt: '\?' is not in the vocabulary of names: <end> <girl> a b"),
        (NAMES, {}, "names begins with a prompt: give a text of its vocabulary, <end> <girl> a b"),
        (NAMES, {"prompts": "<girl>"}, "prompts: expected a list, got one text"),
        (NAMES, {"inputs": ["a"], "prompts": ["a"]}, "names takes no inputs, only prompts"),
        (NAMES, {"prompts": ["a"], "max_steps": -1}, "max_steps: expected 0 or more"),
        (NAMES, {"prompts": ["a"], "seed": [1, 2]}, "seed: expected one number, or 1"),
        (NAMES, {"prompts": ["a"], "seed": [-1]}, "seed: expected one number, or 1 of 0 to"),
        (NAMES, {"prompts": ["a"], "priority": "urgent"}, "priority: expected"),
        (NAMES, {"prompts": ["a"], "timeout": 0}, "timeout: expected more than 0"),
        (CURVES, {"inputs": [[1, 0]], "prompts": ["a"]}, "curves takes no prompt: it feeds no ids back"),
        (CURVES, {"inputs": [[1, 0, 0]]}, r"season: expected shape \[sequences, 2\]"),
    ],
)
def test_what_makes_no_sense_is_said_before_it_is_sent(info, arguments, said):
    with pytest.raises(InvalidArgument, match=said):
        request(info, **arguments)


def test_a_model_that_does_not_generate_says_what_it_does():
    with pytest.raises(FailedPrecondition, match="sum does not generate: it is stepping; call predict"):
        request(SUM, [[1.0]])


@pytest.mark.parametrize("info", [SPOKEN, CURVES])
def test_what_makes_its_outputs_by_itself_is_not_predicted_with(info):
    with pytest.raises(FailedPrecondition, match="makes its outputs by itself: call generate"):
        _codec.predict_request(info, ["hi"])
    request, lengths = _codec.predict_request(NAMES, [[1, 2]])
    assert (request.inputs[0].name, lengths) == ("token", [2])


def test_values_are_read_by_place_and_by_name():
    [spec] = CURVES.inputs
    np.testing.assert_array_equal(values_of("0.5, 2", spec), [0.5, 2.0])
    np.testing.assert_array_equal(values_of("summer", spec), [0.0, 1.0])
    np.testing.assert_array_equal(values_of("summer=3,winter=-1", spec), [-1.0, 3.0])
    for wrong in ("1", "spring", "summer=much", ""):
        with pytest.raises(InvalidArgument, match="season: expected 2 numbers with commas between, or names of winter"):
            values_of(wrong, spec)


# ---- answers ---------------------------------------------------------------------------------------------------------


def started(num, seeds=()):
    return pb.GenerateResponse(started=pb.GenerateStarted(version=2, digest="d", num_sequences=num, seeds=seeds))


def output(entries, ends=(), **columns):
    """entries: (sequence, position, ids, log-probabilities); ends: (sequence, reason, outputs, log-probability)."""
    message = pb.GenerateOutput(**columns)
    for sequence, position, ids, log_probs in entries:
        message.sequences.append(sequence)
        message.positions.append(position)
        message.lengths.append(len(ids))
        message.ids.extend(ids)
        message.log_probs.extend(log_probs)
    for sequence, reason, num, log_prob in ends:
        message.ends.sequences.append(sequence)
        message.ends.reasons.append(reason)
        message.ends.num_outputs.append(num)
        message.ends.log_probs.append(log_prob)
    return pb.GenerateResponse(output=message)


def test_pieces_become_sequences():
    collector = Collector(NAMES)
    assert collector.take(started(2, [7, 8])) == []
    first = collector.take(output([(1, 0, [2], [-0.5]), (0, 0, [3], [-1.0])]))
    assert [(piece.sequence, piece.position, piece.text, piece.finished) for piece in first] == [
        (1, 0, "a", None),
        (0, 0, "b", None),
    ]
    second = collector.take(
        output(
            [(1, 1, [3, 2], [-0.25, -2.0])],
            [(0, pb.FINISH_REASON_END, 1, -1.5), (1, pb.FINISH_REASON_MAX_STEPS, 3, -2.75)],
        )
    )
    assert [(piece.sequence, piece.text) for piece in second] == [(1, "ba"), (0, "")]
    b, aba = collector.results()
    assert (b.text, b.ids.tolist(), b.log_prob, b.finish_reason, b.seed) == ("b", [3], -1.5, "end", 7)
    assert (aba.text, aba.log_probs.tolist(), aba.finish_reason) == ("aba", [-0.5, -0.25, -2.0], "max_steps")
    assert second[0].finished.text == "aba"
    assert (collector.version, collector.digest) == (2, "d")


def test_hypotheses_are_behind_the_best():
    collector = Collector(NAMES)
    collector.take(started(1))
    answer = output([(0, 0, [2], [-1.0]), (0, 0, [3, 3], [-1.0, -1.0])], hypotheses=[0, 1])
    ends = answer.output.ends
    for rank, num, score in ((1, 2, -2.0), (0, 1, -1.5)):
        ends.sequences.append(0)
        ends.hypotheses.append(rank)
        ends.reasons.append(pb.FINISH_REASON_END)
        ends.num_outputs.append(num)
        ends.log_probs.append(score)
        ends.scores.append(score)
    [piece] = collector.take(answer)
    assert piece.finished.text == "a"
    [best] = collector.results()
    assert (best.text, best.score, [other.text for other in best.others]) == ("a", -1.5, ["bb"])


def test_outputs_of_a_curve_are_put_together():
    collector = Collector(CURVES)
    collector.take(started(1))
    for position, rows in ((0, [1.0, 2.0]), (2, [3.0])):
        answer = output([(0, position, [], [])])
        answer.output.lengths[0] = len(rows)
        answer.output.tensors.append(pb.Tensor(name="y", data=np.array(rows, "<f4").tobytes()))
        if position:
            answer.output.ends.CopyFrom(
                pb.GenerateEnds(sequences=[0], reasons=[pb.FINISH_REASON_MAX_STEPS], num_outputs=[3])
            )
        [piece] = collector.take(answer)
        np.testing.assert_array_equal(piece.outputs["y"][:, 0], rows)
    [curve] = collector.results()
    np.testing.assert_array_equal(curve.outputs["y"], [[1.0], [2.0], [3.0]])
    assert (curve.num_outputs, curve.text, curve.log_prob) == (3, "", 0.0)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (output([(0, 0, [2], [-1.0])], [(0, pb.FINISH_REASON_END, 2, -1.0)]), "ended with 2 outputs, but 1 came"),
        (pb.GenerateResponse(output=pb.GenerateOutput(sequences=[0], lengths=[1])), "columns .* different lengths"),
        (output([(0, 0, [2], [-1.0, -1.0])]), "the answer's generated outputs"),
    ],
)
def test_answers_that_break_the_protocol_are_seen(answer, said):
    collector = Collector(NAMES)
    collector.take(started(1))
    with pytest.raises(ProtocolError, match=said):
        collector.take(answer)


def test_a_sequence_that_never_ended_is_seen():
    collector = Collector(NAMES)
    collector.take(started(2))
    collector.take(output([(0, 0, [2], [-1.0])], [(0, pb.FINISH_REASON_END, 1, -1.0)]))
    with pytest.raises(ProtocolError, match=r"ended before sequences \[1\] did"):
        collector.results()


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=5), st.data())
def test_however_outputs_are_cut_they_come_out_whole(sequences, data):
    """Each response carries some entries, each of some outputs, of sequences in any order."""
    collector = Collector(NAMES)
    collector.take(started(len(sequences)))
    done = [0] * len(sequences)
    seen: dict[int, list[int]] = {number: [] for number in range(len(sequences))}
    going = set(range(len(sequences)))
    while going:
        entries, ends = [], []
        for number in data.draw(st.lists(st.sampled_from(sorted(going)), min_size=1, unique=True)):
            left = len(sequences[number]) - done[number]
            if left:
                count = data.draw(st.integers(1, left))
                part = sequences[number][done[number] : done[number] + count]
                entries.append((number, done[number], part, [-1.0] * count))
                done[number] += count
            if done[number] == len(sequences[number]):
                ends.append((number, pb.FINISH_REASON_END, done[number], -1.0 * done[number]))
                going.discard(number)
        for piece in collector.take(output(entries, ends)):
            assert piece.position == len(seen[piece.sequence])
            seen[piece.sequence] += piece.ids.tolist()
    assert [made.ids.tolist() for made in collector.results()] == sequences == list(seen.values())
