"""Training: what a run leaves behind, that seeds reproduce it, and that interruptions leave no trace."""

import csv
import dataclasses
import fcntl
import io
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import models.train
from models import tasks
from models.errors import RecipeError, RunError
from models.recipe import Recipe
from models.runs import Run
from models.train import load_net, train
from tests.models.conftest import make_task

ROOT = Path(__file__).resolve().parents[2]


def run_training(task, out, **settings):
    options = {name: settings.pop(name) for name in ("resume", "should_stop") if name in settings}
    return train(task, task.recipe.changed(**settings), out, show_progress=False, **options)


def stop_after(batches):
    """Say stop after so many batches."""
    left = iter(range(batches))
    return lambda: next(left, None) is None


def weights_of(path):
    return torch.load(path, weights_only=True)["net"]


def assert_same_run(a, b):
    for name in ("best.pt", "last.pt"):
        one, other = weights_of(a / name), weights_of(b / name)
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), (name, key)
    rows = [_curves(path) for path in (a, b)]
    for row, other in zip(*rows, strict=True):
        assert {k: v for k, v in row.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


def _curves(path):
    with (path / "curves.csv").open() as file:
        return list(csv.DictReader(file))


def _metrics(path):
    return json.loads((path / "metrics.json").read_text())


def test_run_directory(sines, tmp_path):
    out = tmp_path / "runs" / "a"
    outcome = run_training(sines, out)
    assert outcome.is_finished
    assert sorted(entry.name for entry in out.iterdir()) == [
        *("best.pt", "curves.csv", "curves.png", "last.pt", "metrics.json", "run.toml")
    ]
    metrics = _metrics(out)
    assert metrics == outcome.metrics
    assert (metrics["status"], metrics["task"], metrics["epochs"]) == ("finished", "sines", 4)
    assert metrics["sequences"] == {"train": 24, "validation": 9, "test": 9}
    assert metrics["num_parameters"] == 3 * 5 * (2 + 5 + 2) + 3 * 6
    assert metrics["recipe"] == sines.recipe.to_dict()
    assert Recipe.of(outcome.run.config().recipe) == sines.recipe
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["test"].keys() == {"loss", "accuracy"}
    rows = _curves(out)
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    best = min(rows, key=lambda row: float(row["validation_loss"]))
    assert metrics["best_epoch"] == int(best["epoch"])
    assert metrics["validation"]["loss"] == float(best["validation_loss"])
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize(
    ("kind", "bidirectional"), [("classification", False), ("classification", True), ("regression", False)]
)
def test_training_learns(tmp_path, cell, kind, bidirectional):
    task = make_task(kind=kind)
    settings = {"cell": cell, "bidirectional": bidirectional, "epochs": 80, "patience": 80, "lr": 0.06}
    metrics = run_training(task, tmp_path / "a", hidden=8, output_dropout=0.0, noise=0.0, shift=0.0, **settings).metrics
    if kind == "classification":
        assert metrics["test"]["accuracy"] >= 8 / 9 > metrics["baseline"]["test"]["accuracy"]
    else:
        assert metrics["test"]["mae"] < 0.8 * metrics["baseline"]["test"]["mae"]


def test_same_seed_same_weights_other_seed_others(sines, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(hash(name) % 1000)  # what the caller did before must not matter
        run_training(sines, tmp_path / name, seed=seed)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    a, c = weights_of(tmp_path / "a" / "last.pt"), weights_of(tmp_path / "c" / "last.pt")
    assert not torch.equal(a["head.weight"], c["head.weight"])


def test_training_leaves_the_callers_random_state_and_threads(sines, tmp_path):
    torch.manual_seed(11)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    run_training(sines, tmp_path / "a", threads=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("batches", [1, 4, 8])
def test_resumed_run_has_the_weights_of_one_never_interrupted(sines, tmp_path, batches):
    """Three batches an epoch: stopped in the first epoch, in the second, and in the third."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_training(sines, whole)
    if batches < 3:
        with pytest.raises(RunError, match="nothing to keep, stopped in the first epoch"):
            run_training(sines, parts, should_stop=stop_after(batches))
    else:
        outcome = run_training(sines, parts, should_stop=stop_after(batches))
        assert not outcome.is_finished
        assert outcome.metrics["epochs"] == batches // 3
    # And once more on the way.
    with pytest.MonkeyPatch.context():
        run_training(sines, parts, resume=True, should_stop=stop_after(4))
    outcome = run_training(sines, parts, resume=True)
    assert outcome.is_finished
    assert_same_run(whole, parts)
    assert outcome.metrics["test"] == _metrics(whole)["test"]


def test_run_killed_between_its_two_checkpoints_resumes_exactly(sines, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_training(sines, whole)
    run_training(sines, killed, should_stop=stop_after(5))
    # best.pt of an epoch that last.pt knows nothing of
    (killed / "best.pt").write_bytes((whole / "best.pt").read_bytes())
    (killed / "metrics.json").unlink()
    run_training(sines, killed, resume=True)
    assert_same_run(whole, killed)


def test_interrupted_run_keeps_the_best_and_is_not_tested(sines, tmp_path, monkeypatch):
    tested = count_evaluations(monkeypatch, sines)
    outcome = run_training(sines, tmp_path / "a", should_stop=stop_after(7))
    metrics = _metrics(tmp_path / "a")
    assert (metrics["status"], metrics["epochs"]) == ("interrupted", 2)
    assert "test" not in metrics
    assert "test" not in metrics["baseline"]
    assert tested["test"] == 0
    best = weights_of(outcome.run.best)
    assert torch.load(outcome.run.best, weights_only=True)["epoch"] == metrics["best_epoch"]
    assert best["head.weight"].shape == (3, 5)


def count_evaluations(monkeypatch, task):
    counts = {"validation": 0, "test": 0}
    evaluate = models.train.evaluate

    def counting(net, of, split):
        counts["test" if split is task.test else "validation"] += 1
        return evaluate(net, of, split)

    monkeypatch.setattr(models.train, "evaluate", counting)
    return counts


def test_test_split_is_evaluated_once_with_the_best_weights(sines, tmp_path, monkeypatch):
    counts = count_evaluations(monkeypatch, sines)
    outcome = run_training(sines, tmp_path / "a", epochs=6, lr=0.5)  # so large that the last epoch is not the best
    assert counts == {"validation": 6 + 1, "test": 1}
    assert outcome.metrics["best_epoch"] < 6
    _, recipe, net, _ = load_net_of(sines, outcome.run, monkeypatch)
    assert recipe.lr == 0.5
    assert models.train.evaluate(net, sines, sines.test) == outcome.metrics["test"]


def load_net_of(task, run, monkeypatch):
    monkeypatch.setattr(tasks, "load", lambda name: {"sines": task}[name])
    return load_net(run)


def test_test_split_changes_nothing_that_is_chosen(sines, tmp_path):
    spoiled = dataclasses.replace(
        sines.test, inputs=tuple(x * 100 for x in sines.test.inputs), targets=sines.test.targets[::-1]
    )
    run_training(sines, tmp_path / "a")
    run_training(dataclasses.replace(sines, test=spoiled), tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert _metrics(tmp_path / "a")["test"] != _metrics(tmp_path / "b")["test"]


def test_early_stopping_waits_out_its_patience(sines, tmp_path, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 3.5, 2.0, 2.5, 2.1, 2.0, 1.0])
    evaluate = models.train.evaluate

    def scripted(net, task, split):
        found = evaluate(net, task, split)
        return found | {"loss": next(losses)} if split is task.validation and net.training is False else found

    monkeypatch.setattr(models.train, "evaluate", scripted)
    metrics = run_training(sines, tmp_path / "a", epochs=50, patience=3).metrics
    # Epoch 5 is the best; 2.0 again in epoch 8 is no better.
    assert (metrics["epochs"], metrics["best_epoch"]) == (8, 5)


def test_gradients_are_clipped(sines, tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def noting(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    run_training(sines, tmp_path / "a", clip_norm=0.01)
    assert len(norms) == 12
    assert max(norms) <= 0.01 * (1 + 1e-4)
    assert np.mean(norms) > 0.0099


def test_loss_that_is_not_finite_is_said(sines, tmp_path):
    broken = dataclasses.replace(sines.train, inputs=tuple(x * np.float32("nan") for x in sines.train.inputs))
    with pytest.raises(RunError, match="no epoch had a finite validation loss"):
        run_training(dataclasses.replace(sines, train=broken), tmp_path / "a")


def test_directory_that_is_taken(sines, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is taken: go on with it with --resume"):
        run_training(sines, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_disk_that_is_full_is_said(sines, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Run, "save", full)
    with pytest.raises(RunError, match=r"cannot write to .*: No space left on device"):
        run_training(sines, tmp_path / "a")


def test_resume_refuses_what_it_cannot_continue(sines, tmp_path):
    with pytest.raises(RunError, match=r"is not a run: it has no run\.toml"):
        run_training(sines, tmp_path / "none", resume=True)
    run_training(sines, tmp_path / "a")
    with pytest.raises(RunError, match="was made with another recipe"):
        run_training(sines, tmp_path / "a", resume=True, hidden=6)
    with pytest.raises(RunError, match="is finished, and was tested"):
        run_training(sines, tmp_path / "a", resume=True)
    (tmp_path / "a" / "metrics.json").unlink()
    (tmp_path / "a" / "last.pt").write_bytes(b"half")
    with pytest.raises(RunError, match=r"last\.pt is damaged"):
        run_training(sines, tmp_path / "a", resume=True)


def test_backward_layers_that_would_read_the_answer_are_refused(tmp_path):
    task = tasks.load("waterflow")
    with pytest.raises(RecipeError, match="waterflow cannot be bidirectional"):
        run_training(task, tmp_path / "a", bidirectional=True)
    assert not (tmp_path / "a").exists()


def test_training_in_another_thread_needs_no_signals(sines, tmp_path):
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(run_training(sines, tmp_path / "a", epochs=1)))
    thread.start()
    thread.join()
    assert outcomes[0].is_finished


# In a process of its own


def rnnserve(*arguments, **kwargs):
    command = [sys.executable, "-c", "from models.cli import train; train()", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def test_ctrl_c_keeps_the_best_and_resume_ends_as_if_never_interrupted(tmp_path):
    small = ["vowels", "--hidden", 6, "--epochs", 8, "--batch-size", 16]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = rnnserve(*small, "--out", parts)
    deadline = time.monotonic() + 60
    while not (parts / "last.pt").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err.startswith("interrupted after epoch ")
    assert f"is kept in {parts}" in err
    assert "Traceback" not in err
    assert _metrics(parts)["status"] == "interrupted"
    assert (parts / "curves.png").exists()

    process = rnnserve("vowels", "--out", parts, "--resume")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    task = tasks.load("vowels")
    run_training(task, whole, hidden=6, epochs=8, batch_size=16)
    assert_same_run(whole, parts)
    assert f"accuracy {_metrics(whole)['test']['accuracy']:.4f}" in out


def test_progress_bar_is_shown_to_a_person_only(tmp_path):
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    code = "from models.cli import train; train()"
    command = [sys.executable, "-c", code, "vowels", "--hidden", "4", "--epochs", "2", "--out", str(tmp_path / "a")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=end, text=True) as process:
        os.close(end)
        out, _ = process.communicate(timeout=60)
        shown = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert process.returncode == 0
    assert "2/2" in shown
    assert "loss=" in shown
    assert "accuracy=" in shown
    assert "2/2" not in out


def test_long_epoch_shows_its_batches(sines, tmp_path, monkeypatch):
    shown = []

    class Bar(models.train.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": False, "file": io.StringIO(), "mininterval": 0})
            shown.append((self.desc, self.total, self.unit, kwargs.get("delay")))

    monkeypatch.setattr(models.train, "tqdm", Bar)
    run_training(sines, tmp_path / "a", epochs=2)
    delay = models.train.EPOCH_BAR_DELAY_S
    assert shown == [("sines", 2, "epoch", None), ("epoch 1", 3, "batch", delay), ("epoch 2", 3, "batch", delay)]


def test_module_trains_as_the_command_does(tmp_path):
    command = [sys.executable, "-m", "models.train", "vowels", "--hidden", "4", "--epochs", "1", "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""  # no progress bar: nobody watches
    assert done.stdout.splitlines()[-1] == "next: rnnserve export run --repository repository"
    assert Run(tmp_path / "run").read_json("metrics.json")["epochs"] == 1
