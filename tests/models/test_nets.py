"""Nets: the contract of forward, scaling, and what a running answer may know."""

import dataclasses

import numpy as np
import pytest
import torch

from models.errors import RecipeError
from models.nets import FOLD_LIMIT, NetConfig, RecurrentNet, build
from models.recipe import Recipe
from models.tasks.base import Scaling
from tests.models.conftest import make_task
from tests.models.test_layers import torch_weights
from tests.oracles import run_layers, softmax

MEAN, SCALE = np.array([40.0, -100.0], np.float32), np.array([3.0, 20.0], np.float32)
LENGTHS = np.array([6, 2, 1], dtype=np.int32)


def make_net(*, cell="lstm", bidirectional=False, is_classifier=True, layers=2, mean=MEAN, seed=0):
    outputs = 3 if is_classifier else 1
    config = NetConfig(
        cell=cell,
        inputs=2,
        outputs=outputs,
        hidden=5,
        layers=layers,
        bidirectional=bidirectional,
        is_classifier=is_classifier,
        one_answer=is_classifier,
        changes_of=() if is_classifier else (1,),
    )
    torch.manual_seed(seed)
    output_scale = np.ones(3, np.float32) if is_classifier else np.array([0.25], np.float32)
    output_mean = np.zeros(outputs, np.float32) if is_classifier else np.array([0.5], np.float32)
    return RecurrentNet(config, Scaling(mean, SCALE, output_mean, output_scale)).eval()


def random_inputs(net, *, time=6, mean=MEAN):
    rng = np.random.default_rng(1)
    x = (mean + SCALE * rng.standard_normal((3, time, 2))).astype(np.float32)
    states = [rng.uniform(-1, 1, (3, *net.state_shape)).astype(np.float32) for _ in net.state_names]
    return x, states


def run(net, x, lengths, states):
    with torch.no_grad():
        return [y.numpy() for y in net(*(torch.from_numpy(array) for array in (x, lengths, *states)))]


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("is_classifier", [False, True])
def test_forward_is_the_formula(cell, bidirectional, is_classifier):
    net = make_net(cell=cell, bidirectional=bidirectional, is_classifier=is_classifier)
    x, states = random_inputs(net)
    y, *following = run(net, x, LENGTHS, states)

    layers = [torch_weights(layer) for layer in net.recurrent]
    hidden, last = run_layers(cell, (x - MEAN) / SCALE, LENGTHS, layers, states)
    weight, bias = net.head.weight.detach().numpy(), net.head.bias.detach().numpy()
    if is_classifier and bidirectional:
        of_last_layer = last[-2] if cell == "lstm" else last[-1]
        expected = softmax(of_last_layer.reshape(3, -1) @ weight.T + bias)
        np.testing.assert_allclose(y, expected, atol=1e-6)
    else:
        expected = hidden @ weight.T + bias
        expected = softmax(expected) if is_classifier else expected * 0.25 + 0.5 + x[..., 1:]
        for row, length in enumerate(LENGTHS):
            np.testing.assert_allclose(y[row, :length], expected[row, :length], rtol=1e-6, atol=1e-6)
    for found, wanted in zip(following, last, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("is_classifier", [False, True])
def test_scores_are_what_forward_answers_from_zero_states(bidirectional, is_classifier):
    net = make_net(cell="gru", bidirectional=bidirectional, is_classifier=is_classifier)
    x, states = random_inputs(net)
    y = run(net, x, LENGTHS, [np.zeros_like(state) for state in states])[0]
    with torch.no_grad():
        scores = net.scores(torch.from_numpy(x), torch.from_numpy(LENGTHS)).numpy()
    scores = softmax(scores) if is_classifier else scores
    if net.config.is_per_sequence:
        np.testing.assert_allclose(scores, y, atol=1e-6)
    else:
        for row, length in enumerate(LENGTHS):
            np.testing.assert_allclose(scores[row, :length], y[row, :length], rtol=1e-6, atol=1e-6)


def test_running_answer_of_a_prefix_is_its_final_one():
    net = make_net(cell="gru")
    x, states = random_inputs(net)
    whole = run(net, x, np.full(3, 6, np.int32), states)[0]
    for length in range(1, 6):
        prefix = run(net, x[:, :length], np.full(3, length, np.int32), states)[0]
        np.testing.assert_allclose(prefix[:, -1], whole[:, length - 1], atol=1e-6)


def test_state_names_count_layers_and_kinds():
    assert make_net(cell="lstm").state_names == ("state.0.h", "state.0.c", "state.1.h", "state.1.c")
    assert make_net(cell="rnn", layers=1).state_names == ("state.0.h",)
    assert make_net(cell="gru", bidirectional=True).state_shape == (2, 5)


@pytest.mark.parametrize(("mean", "folds"), [(MEAN, True), (MEAN + SCALE * (FOLD_LIMIT + 1), False)])
@pytest.mark.parametrize("is_classifier", [False, True])
def test_export_folds_the_scaling_unless_it_would_cancel(mean, folds, is_classifier):
    net = make_net(cell="gru", is_classifier=is_classifier, mean=mean.astype(np.float32))
    x, states = random_inputs(net, mean=mean)
    ready = net.for_export()
    assert ready.scales_input != folds
    assert not ready.scales_output
    for found, expected in zip(run(ready, x, LENGTHS, states), run(net, x, LENGTHS, states), strict=True):
        for row, length in enumerate(LENGTHS):
            np.testing.assert_allclose(found[row, :length], expected[row, :length], rtol=1e-5, atol=1e-5)


def test_for_export_leaves_the_net_as_it_was():
    net = make_net()
    before = {name: weights.clone() for name, weights in net.state_dict().items()}
    net.for_export()
    for name, weights in net.state_dict().items():
        assert torch.equal(weights, before[name]), name


def test_build_measures_the_training_split_alone():
    task = make_task(kind="regression")
    steps = np.concatenate(task.train.inputs).astype(np.float64)
    changes = np.concatenate([t - x[:, :1] for x, t in zip(task.train.inputs, task.train.targets, strict=True)])
    net = build(task, task.recipe)
    np.testing.assert_allclose(net.input_mean.numpy(), steps.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(net.input_scale.numpy(), steps.std(axis=0), rtol=1e-6)
    np.testing.assert_allclose(net.output_scale.numpy(), np.median(np.abs(changes)), rtol=1e-6)
    assert net.output_mean.tolist() == [0.0]

    moved = dataclasses.replace(task, validation=_moved(task.validation), test=_moved(task.test))
    again = build(moved, task.recipe)
    for name in ("input_mean", "input_scale", "output_mean", "output_scale"):
        assert torch.equal(getattr(again, name), getattr(net, name)), name


def _moved(split):
    return dataclasses.replace(split, inputs=tuple(x + 1000 for x in split.inputs))


def test_a_task_that_asks_for_the_next_input_refuses_backward_layers():
    task = dataclasses.replace(make_task(kind="regression"), looks_ahead="the answer is the next input")
    with pytest.raises(RecipeError, match="sines cannot be bidirectional: the answer is the next input"):
        build(task, Recipe(bidirectional=True))
