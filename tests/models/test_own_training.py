"""Data of one's own, all the way: trained, run again, exported, served and streamed."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from models import cli, tasks
from models.config import RunConfig
from models.errors import DataError, RecipeError, RunError
from models.export import export_net, export_run
from models.losses import Losses, evaluate, final_losses, gather, running_losses, score
from models.mixed import MixedNet, build
from models.recipe import Recipe
from models.runs import Run
from models.runtime import Runtime
from models.spec import LENGTHS, MODEL_FILE, Layout, TensorSpec, Training
from models.tasks.base import Task
from models.tasks.own import load
from models.train import load_net, train
from service.client import Client, InvalidArgument
from service.client.cli import main
from tests.models import longform
from tests.models.longform import own_task, shop_settings, shops
from tests.models.test_train import assert_same_run, run_training, stop_after
from tests.serving import serving

CPU = torch.device("cpu")


def invoke(*arguments):
    return CliRunner().invoke(cli.train, [str(argument) for argument in arguments])


def whole(task):
    return range(len(task.train))


# The numbers of the tasks that ship


@pytest.mark.parametrize(
    ("name", "suffix", "settings"),
    [
        ("vowels", ".csv", {"hidden": 6, "epochs": 2}),
        ("vowels", ".parquet", {"hidden": 6, "epochs": 2, "bidirectional": True, "cell": "lstm"}),
        ("waterflow", ".npz", {"hidden": 4, "epochs": 2, "layers": 2}),
    ],
)
def test_a_file_trains_to_the_weights_of_the_task_that_ships(tmp_path, name, suffix, settings):
    ships = tasks.load(name)
    recipe = ships.recipe.changed(**settings)
    own = own_task(tmp_path, *getattr(longform, name)(), suffix)
    runs = [train(task, recipe, tmp_path / task.data_set[:4], show_progress=False) for task in (ships, own)]
    assert_same_run(*(outcome.run.path for outcome in runs))
    for split in ("validation", "test", "baseline"):
        assert runs[0].metrics[split] == runs[1].metrics[split]


# Run again


def test_run_made_again_from_its_own_file_is_the_same(tmp_path):
    file = longform.write(tmp_path / "shops.csv", shops())
    flags = ["--data", file, "--sequence-column", "shop", "--time-column", "day", "--target", "is_good"]
    flags += ["--features", "temperature,weather,promotion", "--categorical", "promotion", "--class-weights", "bad=2"]
    first = invoke(*flags, "--epochs", 3, "--hidden", 5, "--schedule", "cosine", "--out", tmp_path / "a")
    assert (first.exit_code, first.stderr) == (0, "")
    assert first.stdout.startswith(
        "shops: the class 'is_good' at every step (2 classes) from 1 number and 2 categories a step; sequences of 4 to "
        "8 steps: 16, 4, 4 to train, validate and test on\nshops: gru, 1 x 5 units, "
    )
    again = invoke("--config", tmp_path / "a" / "run.toml", "--out", tmp_path / "b")
    assert (again.exit_code, again.stderr) == (0, "")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "run.toml").read_text() == (tmp_path / "b" / "run.toml").read_text()

    # What is said beside the file goes before it.
    other = invoke("--config", tmp_path / "a" / "run.toml", "--target", "sold", "--kind", "regression", "--seed", 3)
    assert other.exit_code == 2
    assert "class_weights are for a classification" in other.stderr
    other = invoke(
        "--config", tmp_path / "a" / "run.toml", "--target-per", "step", "--seed", 3, "--out", tmp_path / "c"
    )
    assert other.exit_code == 0
    assert Run(tmp_path / "c").config().recipe["seed"] == 3

    with file.open("a") as end:
        end.write("30,0,20,sun,1,7,40,good,large,1\n")
    changed = invoke("--config", tmp_path / "a" / "run.toml", "--out", tmp_path / "d")
    assert changed.exit_code == 2
    assert "shops.csv: the file has changed since: its SHA-256 was " in changed.stderr
    assert invoke("--config", tmp_path / "a" / "run.toml", "--data", file, "--out", tmp_path / "d").exit_code == 0


def test_config_written_by_hand_finds_its_data_beside_it(tmp_path, monkeypatch):
    longform.write(tmp_path / "shops.npz", shops())
    (tmp_path / "mine.toml").write_text(
        '[data]\nfile = "shops.npz"\ntarget = "area"\nsequence_column = "shop"\nfeatures = "visits"\n'
        "[recipe]\ncell = 'lstm'\nepochs = 1\nhidden = 3\n"
    )
    monkeypatch.chdir("/")
    done = invoke("--config", tmp_path / "mine.toml", "--out", tmp_path / "a")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith("shops: 'area' of a sequence (regression) from 1 number a step; ")
    assert Run(tmp_path / "a").config().data.file == tmp_path / "shops.npz"
    assert Run(tmp_path / "a").config().recipe["cell"] == "lstm"


def test_config_of_a_task_that_ships(tmp_path):
    (tmp_path / "mine.toml").write_text('task = "vowels"\n[recipe]\nhidden = 3\n')
    task, recipe = RunConfig.read(tmp_path / "mine.toml").load({"epochs": 2})
    assert task is tasks.load("vowels")
    assert recipe == task.recipe.changed(hidden=3, epochs=2)
    config = RunConfig.of(task, recipe, {"torch": "2"})
    (tmp_path / "again.toml").write_text(config.to_toml())
    assert RunConfig.read(tmp_path / "again.toml") == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "task = 'vowels'\n[data]\nfile='a.csv'\ntarget='y'\nsequence_column='s'\n",
            "name either a task that ships, or a",
        ),
        ("", "name either a task that ships, or a data file with [data]"),
        ("task = vowels", "not TOML: "),
        ("[data]\nfile = 'a.csv'\ntarget = 'y'\nsplit = 'time'\n", "data: split time needs a time_column"),
        ("[data]\nfile = 'a.csv'\nsequence_column = 's'\n", "data.target: it has to be given"),
        ("task = 'vowels'\nhidden = 3\n", "hidden: Extra inputs are not permitted"),
    ],
)
def test_wrong_config_is_one_clear_line(tmp_path, text, said):
    (tmp_path / "mine.toml").write_text(text)
    done = invoke("--config", tmp_path / "mine.toml")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'mine.toml'}: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], f"nothing to train: name a TASK ({', '.join(tasks.NAMES)}), a --data FILE, or a --config FILE"),
        (["--target", "y"], "nothing to train: name a TASK"),
        (["vowels", "--data", "a.csv", "--target", "y"], "TASK vowels comes with its data: leave it out beside"),
        (["--data", "a.csv", "--sequence-column", "s"], "target: it has to be given"),
        (["--data", "a.csv", "--target", "y", "--sequence-column", "s"], "a.csv: cannot be read: No such file"),
        (["--config", "none.toml"], "none.toml: cannot be read: No such file"),
        (["vowels", "--resume"], "--resume goes on with the run in --out, by its own run.toml"),
        (["--data", "a.csv", "--class-weights", "rare"], "'rare' is not LABEL=WEIGHT, such as rare=5"),
    ],
)
def test_train_says_what_it_lacks(arguments, said):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stdout == ""


def test_task_that_ships_is_no_place_for_settings_of_data(tmp_path):
    (tmp_path / "mine.toml").write_text('task = "vowels"\n')
    done = invoke("--config", tmp_path / "mine.toml", "--target", "y")
    assert "the config is of the task vowels, which comes with its data; target is not" in done.stderr
    done = invoke("waterflow", "--config", tmp_path / "mine.toml")
    assert "TASK waterflow comes with its data: leave it out beside a data file or another config" in done.stderr


def test_resumed_run_is_as_one_never_interrupted(tmp_path):
    task = own_task(tmp_path, shops(), shop_settings("sold"))
    settings = {"epochs": 4, "hidden": 4, "batch_size": 8, "schedule": "plateau", "plateau_patience": 1}
    run_training(task, tmp_path / "whole", **settings)
    run_training(task, tmp_path / "parts", **settings, should_stop=stop_after(3))
    done = invoke("--out", tmp_path / "parts", "--resume")
    assert (done.exit_code, done.stderr) == (0, "")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    other = own_task(tmp_path, shops(seed=1), shop_settings("sold"))
    with pytest.raises(RunError, match=r"was made from another task or data; resume it with what is in its run\.toml"):
        run_training(other, tmp_path / "parts", **settings, resume=True)


# Every shape of an answer


@pytest.mark.parametrize(
    ("target", "bidirectional"),
    [("sold", True), ("area", False), ("area", True), ("is_good", False), ("is_good", True), ("size", False)],
)
def test_every_shape_of_answer_is_learnt(tmp_path, target, bidirectional):
    task = own_task(tmp_path, shops(num_shops=40), shop_settings(target))
    settings = {"hidden": 8, "lr": 0.03, "batch_size": 8, "step_loss": 0.3 * task.one_answer, "epochs": 25}
    outcome = run_training(task, tmp_path / "run", bidirectional=bidirectional, **settings)
    found, baseline = outcome.metrics["test"], outcome.metrics["baseline"]["test"]
    if task.is_classification:
        assert found["accuracy"] >= 0.8
    else:
        assert found["mae"] < 0.5 * baseline["mae"]


@pytest.mark.parametrize(("target", "layout"), [("area", Layout.PER_SEQUENCE), ("is_good", Layout.PER_STEP)])
def test_new_shapes_of_answers_pass_the_gate(tmp_path, target, layout):
    task = own_task(tmp_path, shops(), shop_settings(target))
    torch.manual_seed(0)
    net = build(task, Recipe(hidden=4, cell="lstm", bidirectional=layout is Layout.PER_SEQUENCE))
    _, spec = export_net(net, task, Training(task="data", data_set="made up"))
    assert spec.graph.outputs[0].layout is layout
    assert spec.graph.outputs[0].element_names == (("area",) if target == "area" else ("bad", "good"))


def test_several_targets_at_once(tmp_path):
    columns = shops() | {"twice": 2 * shops()["sold"]}
    task = own_task(tmp_path, columns, shop_settings("sold") | {"target": ["sold", "twice"]})
    assert task.output.element_names == ("sold", "twice")
    np.testing.assert_allclose(task.train.targets[0][:, 1], 2 * task.train.targets[0][:, 0], rtol=1e-6)
    assert run_training(task, tmp_path / "run", epochs=1, hidden=3).is_finished


def test_what_is_forecast_cannot_be_read_backwards(tmp_path):
    task = own_task(tmp_path, *longform.waterflow())
    with pytest.raises(
        RecipeError, match="data cannot be bidirectional: what it is asked for is among the next steps'"
    ):
        run_training(task, tmp_path / "run", bidirectional=True)


# Losses


def test_weighted_loss_is_the_formula(tmp_path):
    task = own_task(tmp_path, shops(), shop_settings("size", class_weights={"small": 3.0}))
    torch.manual_seed(0)
    net = build(task, Recipe(hidden=4)).eval()
    batch = gather(task, task.train, whole(task), CPU)
    scores = score(net, batch, batch.x).detach()
    ends = scores[torch.arange(len(batch.lengths)), batch.lengths.long() - 1]
    classes = batch.targets
    each = -ends.log_softmax(-1)[torch.arange(len(classes)), classes].numpy()
    weights = np.array([1.0, 3.0])[classes.numpy()]
    assert float(final_losses(net, task, scores, batch).mean()) == pytest.approx((each * weights).sum() / weights.sum())
    assert evaluate(net, task, task.train)["loss"] == pytest.approx((each * weights).sum() / weights.sum())
    plain = own_task(tmp_path, shops(), shop_settings("size"))
    assert evaluate(net, plain, plain.train)["loss"] == pytest.approx(each.mean())


def test_running_losses_ask_every_step_for_the_sequences_answer(tmp_path):
    task = own_task(tmp_path, shops(), shop_settings("area"))
    torch.manual_seed(0)
    net = build(task, Recipe(hidden=4)).eval()
    batch = gather(task, task.train, range(3), CPU)
    scores = score(net, batch, batch.x)
    running = running_losses(net, task, scores, batch)
    values = []
    for row, length, target in zip(scores, batch.lengths.tolist(), batch.targets, strict=True):
        errors = ((row[:length] - target) / net.output_scale).abs()[:, 0]
        values += torch.where(errors < 1, errors**2 / 2, errors - 0.5).tolist()
    assert running.values.tolist() == pytest.approx(values)
    both_ways = build(task, Recipe(hidden=4, bidirectional=True))
    assert running_losses(both_ways, task, score(both_ways, batch, batch.x), batch) is None


def test_balanced_accuracy_is_the_mean_over_classes(tmp_path):
    task = own_task(tmp_path, shops(), shop_settings("is_good", class_weights="balanced"))
    always_good = [np.tile([0.0, 1.0], (n, 1)) for n in task.test.lengths]
    is_good = np.concatenate(task.test.targets)
    assert task.judge(task.test, always_good) == {"accuracy": pytest.approx(is_good.mean()), "balanced_accuracy": 0.5}
    assert Losses(torch.ones(3), torch.tensor([1.0, 2.0, 3.0])).mean() == 1.0


# Categories within the graph


@pytest.mark.parametrize("encoding", ["embedding", "one-hot"])
def test_a_category_is_the_row_of_its_table_beside_the_numbers(tmp_path, encoding):
    task = own_task(tmp_path, shops(), shop_settings("sold", encoding=encoding, embedding_size=2))
    torch.manual_seed(0)
    net = build(task, Recipe(hidden=4)).eval()
    assert isinstance(net, MixedNet)
    tables = [table.weight.detach().numpy() for table in net.tables]
    assert all(not table[0].any() for table in tables)
    if encoding == "one-hot":
        np.testing.assert_array_equal(tables[0][1:], np.eye(3))
        assert net.num_parameters == sum(p.numel() for p in net.core.parameters())
    batch = gather(task, task.train, [0, 1], CPU)
    joined = np.concatenate(
        [batch.x.numpy(), *(table[batch.ids[..., n].numpy()] for n, table in enumerate(tables))], axis=2
    )
    with torch.no_grad():
        expected = net.core.scores(torch.from_numpy(joined), batch.lengths)
        assert torch.equal(score(net, batch, batch.x), expected)
    files, spec = export_net(net, task, Training(task="data", data_set="made up"))
    assert spec.graph.operators["Gather"] == 2
    lengths = batch.lengths.numpy()
    feeds = {"x": batch.x.numpy(), LENGTHS: lengths, "state.0.h": np.zeros((2, 1, 4), np.float32)}
    feeds |= {name: batch.ids[..., n].numpy() for n, name in enumerate(("weather", "promotion"))}
    y = Runtime(files[MODEL_FILE])(feeds)["y"]
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(y[row, :length], expected[row, :length], rtol=1e-5, atol=1e-5)


def test_a_category_that_training_never_saw_is_answered_as_any_other(tmp_path):
    columns = shops()
    columns["weather"] = np.where(columns["shop"] == 23, "hail", columns["weather"])
    columns["split"] = np.select([columns["shop"] < 15, columns["shop"] < 20], ["train", "validation"], "test")
    task = own_task(tmp_path, columns, shop_settings("sold", split_column="split"))
    outcome = run_training(task, tmp_path / "run", epochs=3, hidden=4, weight_decay=0.1)
    _, _, net, _ = load_net(outcome.run)
    assert not net.tables[0].weight[0].any()  # nothing moved it from where it began


def test_spec_refuses_categories_that_are_not_ids():
    for wrong in ({"num_ids": 3}, {"num_ids": 2, "categories": ("rain", "sun")}):
        with pytest.raises(ValueError, match="w: categories need a name for each of num_ids, the first one empty"):
            TensorSpec.model_validate(
                {"name": "w", "dtype": "int64", "layout": "per_step", "categories": ("", "rain"), **wrong}
            )


def test_export_needs_no_data(tmp_path):
    file = tmp_path / "data.csv"
    task = own_task(tmp_path, shops(), shop_settings("is_good", class_weights="balanced"))
    outcome = run_training(task, tmp_path / "run", epochs=1, hidden=3)
    file.unlink()
    without, *_ = load_net(outcome.run)
    assert without.outline() == task.outline()
    assert without.inputs == task.inputs
    spec = export_run(outcome.run, tmp_path / "repository", name="shops").spec
    assert spec.labels == ("bad", "good")
    assert spec.graph.inputs == task.inputs
    assert spec.training.data_set == f"data.csv, sha256 {task.source['sha256'][:16]}"
    assert str(tmp_path) not in spec.to_json()
    with pytest.raises(DataError, match=r"data\.csv: cannot be read"):
        load(RunConfig.read(outcome.run.path / "run.toml").data)
    assert Task.of_outline(json.loads(json.dumps(task.outline()))).categorical == task.categorical


# Served


@pytest.mark.parametrize("features", [["temperature", "weather", "promotion"], ["weather", "promotion"]])
def test_train_export_serve_and_stream(tmp_path, features):
    columns = shops()
    file = longform.write(tmp_path / "shops.parquet", columns)
    flags = ["--data", file, "--sequence-column", "shop", "--time-column", "day", "--target", "sold"]
    flags += ["--features", ",".join(features), "--categorical", "promotion", "--hidden", 5, "--epochs", 2]
    assert invoke(*flags, "--out", tmp_path / "run").exit_code == 0
    done = CliRunner().invoke(cli.export, [str(tmp_path / "run"), "--repository", str(tmp_path / "repository")])
    assert (done.exit_code, done.stderr) == (0, "")
    described = CliRunner().invoke(cli.describe, [str(tmp_path / "repository" / "shops" / "1" / "model.onnx")]).stdout
    assert "ids: 0 = any other, 1 = rain, 2 = snow, 3 = sun" in described
    _, _, net, _ = load_net(Run(tmp_path / "run"))
    task = load(RunConfig.read(tmp_path / "run" / "run.toml").data)
    batch = gather(task, task.test, range(3), CPU)
    with torch.no_grad():
        expected = score(net, batch, batch.x)
    names = [spec.name for spec in task.inputs]

    def sequence(number):
        arrays = [task.test.inputs[number]] * ("x" in names) + list(task.test.ids[number].T)
        return dict(zip(names, arrays, strict=True))

    with serving(tmp_path / "repository") as running, Client(running.address) as client:
        weather, promotion = client.model("shops").inputs[-2:]
        assert (weather.categories, promotion.categories) == (("", "rain", "snow", "sun"), ("", "0", "1"))
        whole = client.predict("shops", {name: [sequence(n)[name] for n in range(3)] for name in names})
        for number, length in enumerate(batch.lengths.tolist()):
            np.testing.assert_allclose(whole[number], expected[number, :length], rtol=1e-4, atol=1e-5)

        # As they are in the file: categories by their names, a shop's own rows as CSV.
        by_name = sequence(0)
        for categorical in task.categorical:
            spec = categorical.spec
            by_name[spec.name] = [spec.categories[number] for number in by_name[spec.name]]
        with client.stream("shops") as stream:
            steps = ({name: rows[step] for name, rows in by_name.items()} for step in range(batch.lengths[0]))
            np.testing.assert_array_equal(np.stack(list(stream.run(steps))), whole[0])
        elements = [name for spec in task.inputs for name in spec.element_names or (spec.name,)]
        values = [*task.test.inputs[0].T] + [by_name[each.spec.name] for each in task.categorical]
        longform.write(tmp_path / "shop.csv", dict(zip(elements, values, strict=True)) | {"sold": whole[0][:, 0]})
        told = CliRunner().invoke(main, ["predict", "shops", str(tmp_path / "shop.csv"), "--server", running.address])
        assert told.exit_code == 0, told.stderr
        printed = [float(line.split("\t")[2]) for line in told.stdout.splitlines()]
        assert printed == pytest.approx(whole[0][:, 0].tolist(), rel=1e-4)

        wrong = sequence(0) | {"weather": np.full(batch.lengths[0], 4)}
        with pytest.raises(InvalidArgument, match=r"weather: element 0 of step 0 is 4; token ids lie in 0\.\.3"):
            client.predict("shops", {name: [value] for name, value in wrong.items()})
