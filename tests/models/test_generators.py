"""Nets that generate against the formulas: step by step, in numpy."""

import dataclasses

import numpy as np
import pytest
import torch

from models.errors import RecipeError
from models.export import export_net, write_version
from models.modelfile import ModelFile
from models.objective import build
from models.seq2seq import MEMORY, Attention
from models.spec import LENGTHS, SOURCE_LENGTHS, StepMode
from models.teaching import gather, score
from tests.models.exports import TRAINING
from tests.models.generating import BEGIN, END, TASKS, backwards, curves, words
from tests.models.test_layers import torch_weights
from tests.oracles import run_layers, softmax

CPU = torch.device("cpu")


def array(tensor):
    return tensor.detach().numpy().astype(np.float64)


def linear(layer, x):
    return x @ array(layer.weight).T + (array(layer.bias) if layer.bias is not None else 0.0)


def layers(stack):
    return [torch_weights(layer) for layer in stack.recurrent]


def zeros(stack, rows):
    return [np.zeros((rows, stack.directions, stack.hidden), np.float32)] * len(stack.kinds)


def make(task, **settings):
    """A net with weights as far from zero as trained ones."""
    torch.manual_seed(5)
    net = build(task, task.recipe.changed(**settings)).eval()
    with torch.no_grad():
        for weights in net.parameters():
            weights.mul_(2.0)
    return net


def log_softmax(x):
    return np.log(softmax(x))


def attend(attention, steps, memory):
    """Luong's attention of one sequence without padding, steps [time, width] over memory [source time, width]."""
    weights = softmax(linear(attention.query, steps) @ memory.T)
    return np.tanh(linear(attention.mix, np.concatenate([steps, weights @ memory], axis=1)))


def translate(net, source, token):
    """From the formulas, for one sequence: log-probabilities after each token, and what the encoder gave."""
    encoder, decoder = net.encoder, net.decoder
    memory, last = run_layers(
        encoder.stack.cell,
        array(encoder.table.weight)[source][None],
        [len(source)],
        layers(encoder.stack),
        zeros(encoder.stack, 1),
    )
    bridged = [linear(bridge, state.reshape(1, -1)) for bridge, state in zip(encoder.bridges, last, strict=True)]
    states = [
        (value if kind.endswith("c") else np.tanh(value))[:, None]
        for value, kind in zip(bridged, encoder.stack.kinds, strict=True)
    ]
    steps, _ = run_layers(
        decoder.stack.cell, array(decoder.table.weight)[token][None], [len(token)], layers(decoder.stack), states
    )
    found = attend(decoder.attention, steps[0], memory[0]) if decoder.attention else steps[0]
    return log_softmax(linear(decoder.head, found)), memory[0], states


def test_curve_is_the_formula_and_goes_on_from_its_states():
    net = make(curves(), layers=2)
    context = np.array([[1, 0], [0.25, 0.75]], np.float32)
    scaled = (context - array(net.context_mean)) / array(net.context_scale)
    steps, last = run_layers(
        "gru", np.repeat(scaled[:, None], 7, axis=1), [7, 4], layers(net.stack), zeros(net.stack, 2)
    )
    expected = linear(net.head, steps) * array(net.output_scale) + array(net.output_mean)
    states = tuple(map(torch.from_numpy, zeros(net.stack, 2)))
    with torch.no_grad():
        y, *after = net(torch.from_numpy(context), torch.tensor([7, 4], dtype=torch.int32), *states)
        first, *between = net(torch.from_numpy(context), torch.tensor([3, 1], dtype=torch.int32), *states)
        second, *end = net(torch.from_numpy(context), torch.tensor([4, 3], dtype=torch.int32), *between)
    assert y.shape == (2, 7, 1)
    np.testing.assert_allclose(y[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(y[1, :4], expected[1, :4], rtol=1e-5)
    for found, wanted, chunked in zip(after, last, end, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        np.testing.assert_allclose(chunked, wanted, atol=1e-5)
    np.testing.assert_allclose(torch.cat([first[1, :1], second[1, :3]]), expected[1, :4], rtol=1e-5)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_text_is_the_formula(cell):
    net = make(words(), cell=cell)
    token = np.array([1, 4, 5, 3])
    steps, last = run_layers(cell, array(net.table.weight)[token][None], [4], layers(net.stack), zeros(net.stack, 1))
    with torch.no_grad():
        log_probs, *states = net(
            torch.from_numpy(token)[None], torch.tensor([4]), *map(torch.from_numpy, zeros(net.stack, 1))
        )
    np.testing.assert_allclose(log_probs[0], log_softmax(linear(net.head, steps[0])), atol=1e-5)
    for found, expected in zip(states, last, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


NETS = [
    {"attention": True},
    {"attention": False},
    {"attention": True, "cell": "lstm", "layers": 2},
    {"attention": False, "cell": "lstm", "bidirectional": False},
    {"attention": True, "cell": "rnn", "bidirectional": False},
]


@pytest.fixture(params=NETS, ids=lambda settings: "-".join(f"{k}={v}" for k, v in settings.items()))
def translator(request):
    return make(backwards(), **request.param)


def run_decoder(net, token, lengths, memory, source_lengths, states):
    reads = (lengths,) if memory is None else (memory, lengths, source_lengths)
    with torch.no_grad():
        log_probs, *following = net.decoder(token, *reads, *states)
    return log_probs, following


def test_decoder_step_by_step_is_the_formula_and_teacher_forcing(translator):
    task = backwards()
    numbers = [3, 8, 21]
    lesson = gather(task, task.train, numbers, CPU)
    with torch.no_grad():
        taught = score(translator, lesson).log_softmax(-1).numpy()
        memory, states = translator.read(lesson.sources, lesson.source_lengths)
    expected = []
    for number in numbers:
        token = np.concatenate([[BEGIN], task.train.targets[number]])
        log_probs, of_source, initial = translate(translator, task.train.sources[number], token)
        expected.append(log_probs)
        row = numbers.index(number)
        for found, wanted in zip(states, initial, strict=True):
            np.testing.assert_allclose(found[row], wanted[0], atol=1e-5)
        if memory is not None:
            np.testing.assert_allclose(memory[row, : len(of_source)], of_source, atol=1e-5)
    np.testing.assert_allclose(taught, np.concatenate(expected), atol=1e-4)
    ones = torch.ones(3, dtype=torch.int32)
    for step in range(lesson.fed.shape[1]):
        log_probs, states = run_decoder(
            translator, lesson.fed[:, step : step + 1], ones, memory, lesson.source_lengths, states
        )
        for row, wanted in enumerate(expected):
            if step < len(wanted):
                np.testing.assert_allclose(log_probs[row, 0], wanted[step], atol=1e-4)


def test_padding_of_a_source_changes_nothing(translator):
    source, lengths = torch.tensor([[1, 2, 3, 0, 0]]), torch.tensor([3], dtype=torch.int32)
    token, steps = torch.tensor([[BEGIN, 3, 2]]), torch.tensor([3], dtype=torch.int32)
    found = []
    for padded in (source[:, :3], torch.cat([source[:, :3], torch.full((1, 4), 4)], dim=1)):
        with torch.no_grad():
            memory, states = translator.read(padded, lengths)
        if memory is not None:
            memory[:, 3:] = 1e4
        found.append(run_decoder(translator, token, steps, memory, lengths, states)[0])
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_attention_is_the_formula():
    torch.manual_seed(2)
    attention = Attention(5, 7)
    rng = np.random.default_rng(3)
    steps, memory = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 4, 5), (2, 6, 7)))
    lengths = np.array([6, 1], np.int32)
    with torch.no_grad():
        found = attention(*map(torch.from_numpy, (steps, memory, lengths))).numpy()
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(found[row], attend(attention, steps[row], memory[row, :length]), atol=1e-5)


def test_greedy_answers_are_the_formulas(translator):
    task = backwards()
    sources = [task.test.sources[n] for n in (0, 1, 2, 3)]
    lesson = gather(task, task.test, [0, 1, 2, 3], CPU)
    found = translator.greedy(lesson.sources, lesson.source_lengths, task)
    for source, answer in zip(sources, found, strict=True):
        token = [BEGIN]
        while len(token) <= task.generation.max_steps:
            chosen = int(translate(translator, source, np.array(token))[0][-1].argmax())
            if chosen == END:
                break
            token.append(chosen)
        assert answer.tolist() == token[1:]


def test_unknown_letters_are_zeros_and_stay_so():
    net = build(backwards(), backwards().recipe)
    assert torch.equal(net.encoder.table.weight[0], torch.zeros(8))
    scores = net.scores(
        torch.tensor([[0, 2]]), torch.tensor([2]), torch.tensor([[BEGIN, 2]]), torch.tensor([2], dtype=torch.int32)
    )
    scores.sum().backward()
    assert torch.equal(net.encoder.table.weight.grad[0], torch.zeros(8))


# Export


@pytest.mark.parametrize(
    ("name", "settings", "operators"),
    [
        ("curves", {"layers": 2}, [{"GRU": 2}]),
        ("words", {"cell": "rnn"}, [{"RNN": 1}]),
        ("backwards", {"attention": False}, [{"GRU": 1}, {"GRU": 1}]),
    ],
)
def test_every_net_passes_the_gate(name, settings, operators, tmp_path):
    task = TASKS[name]()
    net = make(task, **settings)
    files, spec = export_net(net, task, TRAINING)
    assert spec.step_mode[0] is StepMode.GENERATIVE
    assert (spec.generation, spec.vocabulary) == (task.generation, task.vocabulary)
    for graph, wanted in zip(spec.graphs, operators, strict=True):
        assert {each: graph.operators[each] for each in wanted} == wanted
    model = ModelFile(write_version(files, tmp_path, "m"))
    checks = model.verify()
    assert all(check.is_passed for check in checks)
    assert checks[-1].name == "4 chunks against whole"


@pytest.fixture(scope="module")
def exported_pair(tmp_path_factory):
    """An encoder and a decoder with attention, of two states: the task, the net and its files."""
    task = backwards()
    net = make(task, attention=True, cell="lstm")
    files, _ = export_net(net, task, TRAINING)
    return task, net, ModelFile(write_version(files, tmp_path_factory.mktemp("models"), "m"))


def test_encoder_gives_what_the_decoder_begins_with(exported_pair):
    task, _, model = exported_pair
    decoder, encoder = model.spec.graphs
    assert [tensor.name for tensor in encoder.outputs] == [MEMORY, "initial.0.h", "initial.0.c"]
    assert encoder.inputs[0].categories == task.source_input.categories
    assert [(state.name, state.initial) for state in decoder.states] == [
        ("state.0.h", "initial.0.h"),
        ("state.0.c", "initial.0.c"),
    ]
    assert decoder.input_names == ("token", MEMORY, LENGTHS, SOURCE_LENGTHS, "state.0.h", "state.0.c")
    assert encoder.input_names == ("x", LENGTHS, "state.0.h", "state.0.c")


def test_exported_pair_answers_as_the_net_does(exported_pair):
    """Decoded by onnxruntime alone, one sequence at a time."""
    task, net, model = exported_pair
    decode, encode = model.runtimes
    lesson = gather(task, task.test, range(6), CPU)
    states = [state.name for state in model.spec.graph.states]
    for source, expected in zip(
        task.test.sources, net.greedy(lesson.sources, lesson.source_lengths, task), strict=False
    ):
        length = np.array([len(source)], np.int32)
        nothing = dict.fromkeys(states, np.zeros((1, 2, 24), np.float32))
        encoded = encode({"x": source[None], LENGTHS: length, **nothing})
        feeds = {
            "token": np.array([[BEGIN]]),
            MEMORY: encoded[MEMORY],
            LENGTHS: np.array([1], np.int32),
            SOURCE_LENGTHS: length,
            **{state.name: encoded[state.initial] for state in model.spec.graph.states},
        }
        answer = []
        for _ in range(task.generation.max_steps):
            found = decode(feeds)
            chosen = int(found["log_probs"].argmax())
            if chosen == END:
                break
            answer.append(chosen)
            feeds |= {"token": np.array([[chosen]]), **{state: found[f"{state}.next"] for state in states}}
        assert answer == expected.tolist()


# Recipes


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("words", {"embedding": 0}, "embedding 0: words is made of ids, which need vectors"),
        ("curves", {"embedding": 8}, "embedding 8 is for tasks that generate ids, and curves does not"),
        ("words", {"attention": True}, "attention is for decoders that look back at a source, and words has none"),
        ("words", {"bidirectional": True}, "words cannot be bidirectional: its steps are made one after another"),
        ("curves", {"bidirectional": True}, "curves cannot be bidirectional"),
        ("backwards", {"noise": 0.1}, "noise is for tasks whose every step is given, and backwards generates"),
        ("backwards", {"step_loss": 0.1}, "step_loss is for tasks whose every step is given"),
    ],
)
def test_recipe_that_does_not_fit_is_refused(name, settings, said):
    task = TASKS[name]()
    with pytest.raises(RecipeError, match=said):
        build(task, task.recipe.changed(**settings))


def test_steps_that_are_asked_are_those_after_the_prompt():
    task = words()
    split = dataclasses.replace(task.train.take([0, 1]), prompts=(np.array([1]), np.array([2, 4, 5])))
    lesson = gather(task, split, [0, 1], CPU)
    first, second = split.targets
    assert lesson.fed[1, : 3 + len(second)].tolist() == [2, 4, 5, *second]
    assert lesson.lengths.tolist() == [1 + len(first), 3 + len(second)]
    assert lesson.is_asked[1].int().tolist() == [0, 0] + [1] * (len(second) + 1) + [0] * (
        lesson.fed.shape[1] - 3 - len(second)
    )
    assert lesson.targets.tolist() == [*first, 0, *second, 0]
