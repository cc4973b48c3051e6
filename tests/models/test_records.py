"""Records of what was measured, and docs/results.md that is made of them."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from models import claims, record, results, tasks
from models.recipe import Recipe
from models.records import Claims, Record, Row, RunRecord, Trial, recorded
from models.tasks.base import read
from tests.models.conftest import make_task


@pytest.fixture
def sines(monkeypatch):
    """A small task in the place of `vowels`, with a plan of two cells."""
    task = dataclasses.replace(make_task(), name="vowels")
    monkeypatch.setattr("models.tasks.load", {"vowels": task}.get)
    plan = record.Plan(variants={"GRU": {}, "RNN": {"cell": "rnn"}}, seeds=3)
    monkeypatch.setattr(record, "PLANS", {"vowels": plan})
    return task


def test_runs_are_kept_where_asked_to(sines, tmp_path):
    run_record(tmp_path / "records", "vowels", "--seeds", "1", "--runs", str(tmp_path / "runs"))
    kept = [path.relative_to(tmp_path / "runs").as_posix() for path in (tmp_path / "runs").glob("*/*/*/best.pt")]
    assert sorted(kept) == ["vowels/gru/0/best.pt", "vowels/rnn/0/best.pt"]


def run_record(tmp_path, *arguments):
    done = CliRunner().invoke(record.main, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    return Record.read("vowels", tmp_path)


def made_row(name, *values, metric="mae"):
    runs = [
        RunRecord(
            seed=seed,
            epochs=4 + seed,
            best_epoch=3,
            cpu_seconds=2.0,
            validation={"loss": 5.0 + value, metric: 9.0 - value},
            test={"loss": 0.5, metric: value, "rmse": 2 * value},
            curve=[3.0, value],
        )
        for seed, value in enumerate(values)
    ]
    return Row(name=name, recipe={}, num_parameters=1234, versions={}, runs=runs)


def made_record(*rows, is_more_better=False, task="prices"):
    return Record(
        task=task,
        summary="a forecast",
        topology="many-to-one",
        metric="mae",
        is_more_better=is_more_better,
        unit="USD",
        num_test=7,
        baselines={"guess": {"mae": 9.0, "rmse": 9.5}, "persistence": {"mae": 2.0, "rmse": 2.5}},
        rows=list(rows),
    )


# Recording


def test_record_holds_every_seed_of_every_variant(sines, tmp_path):
    found = run_record(tmp_path, "vowels")
    assert [row.name for row in found.rows] == ["GRU", "RNN"]
    assert [[run.seed for run in row.runs] for row in found.rows] == [[0, 1, 2]] * 2
    assert (found.metric, found.is_more_better, found.num_test) == ("accuracy", True, 9)
    assert found.baselines == sines.baselines(sines.test)
    gru, rnn = found.rows
    assert gru.recipe == {name: value for name, value in sines.recipe.to_dict().items() if name != "seed"}
    assert (rnn.recipe["cell"], rnn.num_parameters) == ("rnn", 5 * (2 + 5 + 1) + 3 * 6)
    assert len({run.test["loss"] for run in gru.runs}) == 3
    for run in gru.runs:
        assert len(run.curve) == run.epochs == 4
        assert run.curve[run.best_epoch - 1] == pytest.approx(run.validation["accuracy"], rel=1e-4)
        assert 0 < run.cpu_seconds < 60


def test_one_variant_is_recorded_again_in_its_place(sines, tmp_path):
    before = run_record(tmp_path, "vowels", "--seeds", "1")
    after = run_record(tmp_path, "vowels", "--variant", "GRU", "--seeds", "2")
    assert [row.name for row in after.rows] == ["GRU", "RNN"]
    assert (len(after.rows[0].runs), after.rows[1]) == (2, before.rows[1])
    assert after.rows[0].runs[0].test == before.rows[0].runs[0].test


def test_unknown_variant_names_the_known_ones(sines, tmp_path):
    done = CliRunner().invoke(record.main, ["vowels", "--variant", "CNN", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "vowels has no variant 'CNN': it has GRU, RNN" in done.stderr


def test_plans_name_tasks_and_recipes_that_there_are():
    assert {*record.PLANS} == {*tasks.NAMES}
    for plan in record.PLANS.values():
        for settings in plan.variants.values():
            Recipe().changed(**settings)
    for name in ("vowels", "prices"):
        assert list(record.PLANS[name].variants) == ["RNN", "LSTM", "GRU", "BiRNN", "BiLSTM", "BiGRU"]
    assert record.PLANS["prices"].seeds == 5


# What ships


@pytest.mark.parametrize("name", recorded())
def test_record_is_of_the_recipe_that_ships(name):
    found, plan, task = Record.read(name), record.PLANS[name], tasks.load(name)
    assert [row.name for row in found.rows] == list(plan.variants)
    for row in found.rows:
        recipe = task.recipe.changed(**plan.variants[row.name]).to_dict()
        del recipe["seed"]
        assert row.recipe == recipe, row.name
        assert [run.seed for run in row.runs] == list(range(plan.seeds))
    assert (found.metric, found.topology, found.summary) == (task.metric, task.topology, task.summary)


def test_budgets_of_accuracy_and_error():
    vowels, waterflow, names = (Record.read(name) for name in ("vowels", "waterflow", "names"))
    assert {row.name: row.over_seeds("accuracy")[0] for row in vowels.rows}["GRU"] >= 0.97
    assert list(waterflow.baselines) == [
        "persistence: no change",
        "the same hour yesterday",
        "the present flow and yesterday's change",
    ]
    [gru] = [row for row in waterflow.rows if row.name == "GRU"]
    assert gru.over_seeds("mae")[2] < waterflow.best_baseline[1]
    assert names.best_baseline[1] < max(row.over_seeds("balanced_accuracy")[0] for row in names.rows)


def test_results_page_is_what_the_records_say():
    done = CliRunner().invoke(results.main, ["--check"])
    assert done.exit_code == 0, done.output
    page = (results.DOCS / "results.md").read_text()
    for name in re.findall(r"!\[.*\]\((.*)\)", page):
        assert (results.DOCS / name).read_bytes().startswith(b"\x89PNG")


# The page


def test_page_tells_medians_spread_and_who_beats_the_best_baseline():
    text = results.page([made_record(made_row("LSTM", 1.5, 1.0, 3.0), made_row("BiGRU", 1.75, 1.8, 1.9))], None)
    assert "| LSTM | 1.500 (1.000 to 3.000) | 3.000 (2.000 to 6.000) | 1,234 | 5 | 400 ms | 2.0 s |" in text
    assert "| *persistence* | 2.000 | 2.500 |" in text
    assert (
        "- Every row beats the best of the baselines (persistence, 2.000) in the median, BiGRU with every seed." in text
    )
    assert "many-to-one: a forecast. 7 test sequences, 3 seeds. Two layers of 100 units" in text
    assert "| many-to-one | [prices](#prices) | LSTM | mean absolute error in USD 1.500 (1.000 to 3.000) |" in text
    assert "    python -m models.record prices" in text


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([made_row("GRU", 2.0, 2.5), made_row("RNN", 3.0)], "- **Nothing beats the best of the baselines (persistence"),
        (
            [made_row("GRU", 1.0), made_row("RNN", 3.0)],
            "- GRU beats the best of the baselines (persistence, 2.000) with",
        ),
        ([made_row("GRU", 1.0, 1.5, 2.5), made_row("RNN", 3.0)], "2.000) in the median, none with every seed."),
        ([made_row("A", 1.0), made_row("B", 1.0), made_row("C", 3.0)], "- A and B beat the best"),
    ],
)
def test_verdict(rows, said):
    assert said in results.page([made_record(*rows)], None)


def test_more_is_better_for_scores():
    scored = made_record(made_row("GRU", 9.5, 8.5), made_row("RNN", 10.0), is_more_better=True)
    assert scored.best_baseline == ("guess", 9.0)
    assert "- RNN beats the best of the baselines (guess, 9.000) with every seed." in results.page([scored], None)
    as_good = made_record(made_row("GRU", 9.0), is_more_better=True)
    assert "- **Nothing beats the best of the baselines (guess, 9.000).**" in results.page([as_good], None)


def test_check_finds_a_page_that_is_old(tmp_path, monkeypatch):
    (tmp_path / "results.md").write_text("old")
    monkeypatch.setattr(results, "DOCS", tmp_path)
    done = CliRunner().invoke(results.main, ["--check"])
    assert (done.exit_code, "run `python -m models.results`" in done.stderr) == (1, True)
    assert CliRunner().invoke(results.main, []).exit_code == 0
    assert CliRunner().invoke(results.main, ["--check"]).exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"results.md", "curves.png", "claims.png"}


# Claims


def made_claims(rnn, gru):
    trials = [
        Trial(cell=cell, length=length, seed=seed, lr=0.01, mse=mse)
        for cell, of_length in (("rnn", rnn), ("gru", gru))
        for length, errors in of_length.items()
        for seed, mse in enumerate(errors)
    ]
    return Claims(
        hidden=8,
        steps=10,
        batch_size=4,
        learning_rates=[0.1, 0.01],
        num_parameters={"rnn": 50, "gru": 1500},
        cpu_seconds=90,
        versions={},
        trials=trials,
    )


def test_claim_holds_where_the_rnn_fails_on_long_sequences_alone():
    text = results.page([], made_claims({10: [0.001, 0.003], 80: [0.2, 0.17]}, {10: [0.001] * 2, 80: [0.002] * 2}))
    assert "The claim holds: RNN learns it with every seed at 10 steps, with none at 80; GRU learns every" in text
    assert "| 10 | 0.003 (0.001 to 0.003); 2 of 2 |" in text.replace("0.0010", "0.001").replace("0.0030", "0.003")
    assert "(RNN 50, GRU 1,500 parameters), 10 steps" in text


@pytest.mark.parametrize(
    ("rnn", "gru"),
    [
        ({10: [0.1], 80: [0.2]}, {10: [0.001], 80: [0.002]}),
        ({10: [0.001], 80: [0.001]}, {10: [0.001], 80: [0.002]}),
        ({10: [0.001], 80: [0.2]}, {10: [0.001], 80: [0.02]}),
    ],
)
def test_claim_does_not_hold_otherwise(rnn, gru):
    assert "The claim does not hold as it is put: RNN" in results.page([], made_claims(rnn, gru))


def test_the_adding_problem_asks_for_the_sum_of_the_marked_numbers():
    x, sums = claims.draw_sequences(torch.Generator().manual_seed(3), 50, 11)
    numbers, marks = x[..., 0].numpy(), x[..., 1].numpy()
    assert x.shape == (11, 50, 2)
    assert (marks[:5].sum(axis=0) == 1).all()
    assert (marks[5:].sum(axis=0) == 1).all()
    np.testing.assert_allclose((numbers * marks).sum(axis=0), sums, rtol=1e-6)
    assert numbers.min() >= 0
    assert numbers.max() < 1


def test_nets_learn_to_add_in_short_sequences():
    with torch.random.fork_rng():
        found = claims.compare(lengths=(4,), seeds=1, steps=150)
    assert {trial.cell for trial in found.trials} == {"rnn", "lstm", "gru"}
    assert all(trial.mse < 1 / 6 for trial in found.trials)
    assert found.num_parameters["gru"] == 3 * 32 * (2 + 32 + 2) + 33
    again = json.loads(found.to_json())
    assert Claims.model_validate(again) == found


# Forecasts of prices


def test_prices_are_asked_for_by_what_was_known_before():
    price = read("prices")["price"]
    task = tasks.load("prices")
    borders = (20, 5736, 6965, 8195)
    for split, start, end, stride in zip(
        (task.train, task.validation, task.test), borders, borders[1:], (5, 1, 1), strict=False
    ):
        asked = range(start, end, stride)
        assert len(split) == len(asked)
        for n in (0, len(asked) // 2, len(asked) - 1):
            np.testing.assert_array_equal(split.inputs[n][:, 0], price[asked[n] - 20 : asked[n]])
            assert split.targets[n] == price[asked[n]]
    changes = np.abs(np.diff(price[6964:].astype(np.float64)))
    assert task.baselines(task.test)["persistence: today's price"]["mae"] == pytest.approx(changes.mean(), rel=1e-5)
    assert task.baseline(task.test)[0] == "persistence: today's price"
    np.testing.assert_allclose(task.scaling().input_mean, np.mean([x.mean() for x in task.train.inputs]), rtol=1e-5)


def test_returns_are_changes_of_the_logarithm_in_percent():
    price = read("prices")["price"].astype(np.float64)
    task = tasks.load("returns")
    last = task.test.inputs[-1][:, 0].astype(np.float64), float(task.test.targets[-1][0])
    assert last[1] == pytest.approx(100 * np.log(price[-1] / price[-2]), abs=1e-5)
    np.testing.assert_allclose(last[0], 100 * np.log(price[-21:-1] / price[-22:-2]), rtol=1e-4, atol=1e-5)
    told = task.baselines(task.test)["persistence: no change"]["mae"]
    assert told == pytest.approx(np.mean([abs(float(t[0])) for t in task.test.targets]))
    assert task.recipe == tasks.load("prices").recipe.changed(epochs=8, patience=8)
    assert (task.recipe.layers, task.recipe.hidden) == (2, 100)
