"""Learning rates, precision, devices and TensorBoard."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import models.train
from models import cli
from models.compute import Compute
from models.errors import RecipeError
from models.mixed import build
from models.recipe import Recipe
from models.schedules import learning_rate
from models.train import train
from tests.models.conftest import make_task
from tests.models.test_train import _curves, assert_same_run, run_training, stop_after, weights_of

ROOT = Path(__file__).resolve().parents[2]
has_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this PyTorch finds no GPU")


def rates(recipe, steps_per_epoch, losses=()):
    return [
        learning_rate(recipe, step, steps_per_epoch, losses[: step // steps_per_epoch])
        for step in range(recipe.epochs * steps_per_epoch)
    ]


def torch_rates(make, recipe, steps, step_by=lambda scheduler, _: scheduler.step()):
    """What a scheduler of torch's sets, step by step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    scheduler, found = make(optimizer), []
    for step in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        step_by(scheduler, step)
    return found


# Learning rates


def test_one_cycle_is_that_of_torch():
    recipe = Recipe(schedule="onecycle", epochs=10, lr=0.1)
    expected = torch_rates(
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=70, cycle_momentum=False),
        recipe,
        70,
    )
    assert rates(recipe, 7) == pytest.approx(expected)
    longer = Recipe(schedule="onecycle", epochs=10, lr=0.1, warmup=6)
    assert int(np.argmax(rates(longer, 7))) == 6 * 7 - 1


def test_cosine_is_that_of_torch():
    recipe = Recipe(schedule="cosine", epochs=10, lr=0.1)
    expected = torch_rates(lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 70), recipe, 70)
    assert rates(recipe, 7) == pytest.approx(expected)


def test_plateau_is_that_of_torch():
    recipe = Recipe(schedule="plateau", epochs=16, lr=0.1, plateau_patience=2)
    losses = [5, 4, 4, 4, 4, 3, float("nan"), 3, 3, 3, 3, 3, 2, 2, 2, 2]
    expected = torch_rates(
        lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, threshold=0),
        recipe,
        16,
        lambda scheduler, step: scheduler.step(losses[step]),
    )
    assert rates(recipe, 1, losses) == pytest.approx(expected)
    assert len(set(expected)) == 4


def test_warm_up_rises_in_a_line_and_then_the_schedule_begins():
    constant = rates(Recipe(epochs=4, lr=0.1, warmup=2), 5)
    assert constant == pytest.approx([0.01 * (step + 1) for step in range(10)] + [0.1] * 10)
    cosine = rates(Recipe(epochs=4, lr=0.1, warmup=2, schedule="cosine"), 5)
    assert cosine[:10] == constant[:10]
    assert cosine[10:] == pytest.approx([0.05 * (1 + np.cos(np.pi * step / 10)) for step in range(10)])


def test_the_optimiser_gets_the_rate_of_every_step(sines, tmp_path, monkeypatch):
    used = []
    step = torch.optim.AdamW.step

    def noting(self, *args, **kwargs):
        used.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    run_training(sines, tmp_path / "a", schedule="onecycle", lr=0.01)
    assert used == pytest.approx(rates(sines.recipe.changed(schedule="onecycle", lr=0.01), 3))
    assert [float(row["lr"]) for row in _curves(tmp_path / "a")] == pytest.approx(used[2::3])


@pytest.mark.parametrize("schedule", ["plateau", "onecycle"])
def test_resumed_run_goes_on_with_its_schedule(sines, tmp_path, schedule):
    settings = {"schedule": schedule, "warmup": 1, "plateau_patience": 1, "lr": 0.2, "epochs": 5}
    run_training(sines, tmp_path / "whole", **settings)
    run_training(sines, tmp_path / "parts", **settings, should_stop=stop_after(7))
    run_training(sines, tmp_path / "parts", **settings, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


# Precision


def test_bfloat16_trains_weights_of_float32(sines, tmp_path):
    for name, precision in (("a", "32"), ("b", "bf16-mixed"), ("c", "bf16-mixed")):
        run_training(sines, tmp_path / name, precision=precision, lr=0.05, epochs=8)
    assert_same_run(tmp_path / "b", tmp_path / "c")
    full, half = weights_of(tmp_path / "a" / "last.pt"), weights_of(tmp_path / "b" / "last.pt")
    assert all(weights.dtype == torch.float32 for weights in half.values())
    assert not torch.equal(full["head.weight"], half["head.weight"])
    losses = [float(_curves(tmp_path / name)[-1]["validation_loss"]) for name in "ab"]
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


def test_what_is_judged_is_computed_in_full(sines, tmp_path, monkeypatch):
    seen = []
    evaluate = models.train.evaluate

    def noting(net, task, split):
        seen.append(torch.is_autocast_enabled("cpu"))
        return evaluate(net, task, split)

    monkeypatch.setattr(models.train, "evaluate", noting)
    run_training(sines, tmp_path / "a", precision="bf16-mixed", epochs=1)
    assert seen == [False] * 3


# Devices


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there_is_said_before_anything_is_made(tmp_path):
    done = CliRunner().invoke(cli.train, ["vowels", "--device", "cuda", "--out", str(tmp_path / "a")])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: device cuda: ")
    assert "or train with --device cpu" in done.stderr
    assert not (tmp_path / "a").exists()


def test_half_precision_needs_a_gpu():
    with pytest.raises(RecipeError, match="precision 16-mixed needs device cuda; on a CPU there is bf16-mixed"):
        Recipe().changed(precision="16-mixed")
    with pytest.raises(RecipeError, match="warmup of 3 epochs leaves nothing of 3"):
        Recipe().changed(warmup=3, epochs=3)


@has_gpu
@pytest.mark.parametrize("precision", ["32", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gpu_trains_to_about_the_weights_of_a_cpu(sines, tmp_path, precision, bidirectional):
    settings = {"output_dropout": 0.0, "noise": 0.0, "shift": 0.0, "bidirectional": bidirectional}
    on_cpu = run_training(sines, tmp_path / "cpu", **settings).metrics
    on_gpu = run_training(sines, tmp_path / "gpu", **settings, device="cuda", precision=precision).metrics
    assert on_gpu["test"]["loss"] == pytest.approx(on_cpu["test"]["loss"], rel=1e-3 if precision == "32" else 0.05)
    parts = tmp_path / "parts"
    run_training(sines, parts, **settings, device="cuda", precision=precision, should_stop=stop_after(4))
    resumed = run_training(sines, parts, **settings, device="cuda", precision=precision, resume=True).metrics
    assert resumed["test"]["loss"] == pytest.approx(on_gpu["test"]["loss"], rel=1e-3)


def test_gradient_is_clipped_whatever_it_was_scaled_by():
    recipe = Recipe(hidden=4)
    compute, net = Compute(recipe), build(make_task(), recipe)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    before = {name: weights.clone() for name, weights in net.named_parameters()}
    loss = 1e3 * sum(weights.square().sum() for weights in net.parameters())
    compute.descend(loss, net.parameters(), optimizer, 0.5)
    moved = torch.cat([(weights - before[name]).flatten() for name, weights in net.named_parameters()]).detach()
    assert float(torch.linalg.vector_norm(moved)) == pytest.approx(0.5, rel=1e-4)


# TensorBoard


def test_tensorboard_shows_what_the_curves_hold(sines, tmp_path):
    metrics = train(sines, sines.recipe, tmp_path / "a", show_progress=False, tensorboard=tmp_path / "logs").metrics
    shown = EventAccumulator(str(tmp_path / "logs" / "a")).Reload()
    rows = _curves(tmp_path / "a")
    assert set(shown.Tags()["scalars"]) == {
        *("loss/train", "loss/validation", "accuracy/validation", "run/lr", "run/seconds", "loss/test", "accuracy/test")
    }
    for tag, column in (("loss/train", "train_loss"), ("loss/validation", "validation_loss"), ("run/lr", "lr")):
        events = shown.Scalars(tag)
        assert [event.step for event in events] == [1, 2, 3, 4]
        assert [event.value for event in events] == pytest.approx([float(row[column]) for row in rows])
    [test] = shown.Scalars("loss/test")
    assert (test.step, test.value) == (metrics["best_epoch"], pytest.approx(metrics["test"]["loss"]))


def test_tensorboard_that_is_not_installed_is_said_before_anything_is_made(tmp_path):
    code = (
        "import sys; sys.modules['tensorboard'] = None\n"
        "from models import cli\n"
        f"cli.train(['vowels', '--tensorboard', {str(tmp_path / 'logs')!r}, '--out', {str(tmp_path / 'a')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    said = "--tensorboard needs the tensorboard extra (tensorboard is missing): pip install 'rnnserve[tensorboard]'"
    assert done.stderr == f"error: {said}\n"
    assert not list(tmp_path.iterdir())
