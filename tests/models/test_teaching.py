"""Training nets that generate: the one loop, teacher forcing, exact resume, from the command line to a model file."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from models import cli, tasks, teaching
from models.modelfile import ModelFile
from models.objective import build, epoch_batches, evaluate
from models.train import train
from tests.models.generating import TASKS, backwards, curves, words
from tests.models.test_train import assert_same_run, stop_after


def run(task, out, **settings):
    settings, recipe = _split(settings)
    return train(task, task.recipe.changed(**recipe), out, show_progress=False, **settings)


def _split(settings):
    own = {name: settings.pop(name) for name in ("resume", "should_stop") if name in settings}
    return own, settings


@pytest.mark.parametrize(
    ("name", "settings", "metric"),
    [
        ("curves", {}, "rmse"),
        ("words", {}, "perplexity"),
        ("backwards", {"attention": True}, "word_error_rate"),
        ("backwards", {"attention": False, "cell": "lstm"}, "word_error_rate"),
    ],
)
def test_training_beats_the_mean_the_trigrams_and_the_rules(name, settings, metric, tmp_path):
    task = TASKS[name]()
    metrics = run(task, tmp_path / "a", **settings).metrics
    assert task.metric == metric
    rival = "the mean curve" if name == "curves" else task.baseline(task.test)[0]
    assert metrics["test"][metric] < 0.8 * task.baselines(task.test)[rival][metric]
    with (tmp_path / "a" / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1][f"validation_{metric}"]) < float(rows[0][f"validation_{metric}"])
    assert (tmp_path / "a" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", TASKS)
def test_resumed_run_has_the_weights_of_one_never_interrupted(name, tmp_path):
    task = TASKS[name](epochs=3, dropout=0.2, attention=name == "backwards")
    steps = len(epoch_batches(task, task.recipe.batch_size))
    run(task, tmp_path / "whole")
    outcome = run(task, tmp_path / "parts", should_stop=stop_after(steps + 2))
    assert (outcome.is_finished, outcome.metrics["epochs"]) == (False, 1)
    run(task, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_batches_hold_every_sequence_once_and_like_lengths():
    task = backwards()
    torch.manual_seed(0)
    batches = epoch_batches(task, 16)
    assert sorted(number for batch in batches for number in batch) == list(range(len(task.train)))
    assert {len(batch) for batch in batches} == {16, len(task.train) % 16}
    spans = [np.ptp(task.train.source_lengths[batch]) for batch in batches]
    assert max(spans) <= 1
    torch.manual_seed(0)
    assert epoch_batches(task, 16) == batches
    assert epoch_batches(task, 16) != batches


def test_loss_is_of_the_answer_and_its_end_alone():
    """As cross-entropies one sequence at a time, from log-probabilities of the net's forward."""
    task = words()
    torch.manual_seed(1)
    net = build(task, task.recipe).eval()
    each = []
    for prompt, target in zip(task.test.prompts, task.test.targets, strict=True):
        fed = np.concatenate([prompt, target])
        zero = torch.zeros(1, 1, task.recipe.hidden)
        with torch.no_grad():
            log_probs, _ = net(torch.from_numpy(fed)[None], torch.tensor([len(fed)]), zero)
        asked = [*target.tolist(), task.end_id]
        each += [-float(log_probs[0, len(prompt) - 1 + step, number]) for step, number in enumerate(asked)]
    found = evaluate(net, task, task.test)
    assert found["loss"] == pytest.approx(np.mean(each), rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(each)), rel=1e-5)
    assert found["bits_per_character"] == pytest.approx(np.mean(each) / np.log(2), rel=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_evaluation_does_not_depend_on_its_batches(name, monkeypatch):
    task = TASKS[name]()
    torch.manual_seed(2)
    net = build(task, task.recipe)
    whole = evaluate(net, task, task.test)
    monkeypatch.setattr(teaching, "EVALUATION_BATCH", 7)
    assert evaluate(net, task, task.test) == pytest.approx(whole, rel=1e-5)


def test_curves_are_scored_as_the_rest_is():
    """The Huber loss of errors in units of the training curves' spread."""
    task = curves()
    torch.manual_seed(3)
    net = build(task, task.recipe)
    found = evaluate(net, task, task.test)
    with torch.no_grad():
        made = net.scores(torch.from_numpy(np.stack(task.test.contexts)), torch.full((20,), 6)).numpy()
    errors = (made - np.stack(task.test.targets)) / np.concatenate(task.train.targets).std()
    huber = np.where(np.abs(errors) < 1, errors**2 / 2, np.abs(errors) - 0.5)
    assert found["loss"] == pytest.approx(huber.mean(), rel=1e-4)


def test_names_are_drawn_by_their_probabilities():
    """As often as the net says, from the distribution that its forward gives."""
    task = words(output_dropout=0.0)
    torch.manual_seed(4)
    net = build(task, task.recipe).eval()
    with torch.no_grad():
        for weights in net.parameters():
            weights.mul_(2.0)
        log_probs, _ = net(torch.tensor([[1]]), torch.tensor([1]), torch.zeros(1, 1, task.recipe.hidden))
    generator = torch.Generator().manual_seed(6)
    made = [net.sample(torch.tensor([1]), task, generator).tolist() for _ in range(600)]
    assert max(map(len, made)) <= task.generation.max_steps
    assert all(task.end_id not in each for each in made)
    firsts = np.bincount([each[0] if each else task.end_id for each in made], minlength=len(task.vocabulary))
    np.testing.assert_allclose(firsts / 600, log_probs[0, 0].exp(), atol=0.06)
    again = net.sample(torch.tensor([1]), task, torch.Generator().manual_seed(6)).tolist()
    assert again == made[0]


# From the command line


def invoke(command, *arguments):
    return CliRunner().invoke(command, [str(each) for each in arguments], catch_exceptions=False)


SMALL = ["--hidden", "8", "--epochs", "2", "--batch-size", "32"]


@pytest.mark.parametrize("name", ["power", "namegen", "g2p"])
def test_what_ships_is_trained_exported_verified_and_described(name, tmp_path, monkeypatch):
    task = tasks.load(name)
    few = {
        split: getattr(task, split).take(range(min(len(getattr(task, split)), 40)))
        for split in ("train", "validation", "test")
    }
    monkeypatch.setattr(tasks, "load", {name: dataclasses.replace(task, **few)}.get)
    done = invoke(cli.train, name, *SMALL, "--precision", "32", "--out", tmp_path / "run")
    assert done.exit_code == 0
    assert f"test        {task.metric}" in done.stdout
    shown = [line for line in done.stdout.splitlines() if line.startswith(("  <girl> ", "  <boy> ", "  abco: "))]
    assert len(shown) == {"power": 0, "namegen": 5, "g2p": 1}[name]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["task"] == name
    assert invoke(cli.export, tmp_path / "run", "--repository", tmp_path / "models").exit_code == 0
    file = tmp_path / "models" / name / "1" / "model.onnx"
    assert ModelFile(file).spec.topology == task.topology
    assert invoke(cli.verify, file).exit_code == 0
    said = invoke(cli.describe, file).stdout
    assert f"  generation  {task.generation.max_steps} steps" in said
    if name == "g2p":
        assert "  encoder     the graph in encoder.onnx" in said
        assert "begins with the id 0 = <begin>" in said
        assert "memory  [batch, source, 16] float32: what was read" in said
    if name == "namegen":
        assert "begins with the ids that the caller gives" in said
        assert "vocabulary  29 entries: <end>, <girl>, <boy>, a, b," in said
    if name == "power":
        assert "24 steps, every one from the same input" in said
