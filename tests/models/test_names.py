"""The task `names`: its labels, splits and rivals, and a served model that is sent texts."""

from collections import Counter

import numpy as np
import pytest
from click.testing import CliRunner

from models import tasks
from models.export import export_run
from models.tasks.base import read
from models.tasks.names import Endings, labelled
from models.train import load_net, train
from service.client import Client
from service.client.cli import main
from tests.serving import serving


@pytest.fixture(scope="module")
def task():
    return tasks.load("names")


def spelled(split):
    return ["".join(" ABCDEFGHIJKLMNOPQRSTUVWXYZ"[number] for number in ids[:, 0]) for ids in split.ids]


def test_a_name_has_the_label_of_the_list_where_it_is_more_frequent(task):
    arrays = read("names")
    women, men = (
        dict(zip(arrays[f"{label}_names"].astype(str), arrays[f"{label}_percent"], strict=True))
        for label in task.labels
    )
    assert len(women.keys() & men.keys()) == 331
    as_frequent = {name for name in women.keys() & men.keys() if women[name] == men[name]}
    told = {}
    for split in (task.train, task.validation, task.test):
        told |= {name: task.labels[int(label)] for name, label in zip(spelled(split), split.targets, strict=True)}
    assert told.keys() == (women.keys() | men.keys()) - as_frequent
    assert len(as_frequent) == 3
    for name, label in told.items():
        assert (label == "male") == (men.get(name, 0) > women.get(name, 0)), name
    assert (told["JAMES"], told["LESLIE"], told["MARY"]) == ("male", "female", "female")


def test_labels_of_a_list_by_hand():
    arrays = {
        "female_names": np.array([b"ANN", b"LEE", b"KIM"]),
        "female_percent": np.array([1.0, 0.2, 0.5], np.float32),
        "male_names": np.array([b"BOB", b"LEE", b"KIM"]),
        "male_percent": np.array([2.0, 0.3, 0.5], np.float32),
    }
    names, classes = labelled(arrays)
    assert dict(zip(names.tolist(), classes.tolist(), strict=True)) == {"ANN": 0, "BOB": 1, "LEE": 1}


def test_every_name_is_in_one_split_and_every_split_has_its_share_of_each_label(task):
    found = [spelled(split) for split in (task.train, task.validation, task.test)]
    assert [len(names) for names in found] == [3612, 774, 774]
    assert max(Counter(name for names in found for name in names).values()) == 1
    counts = [np.bincount(split.targets).tolist() for split in (task.train, task.validation, task.test)]
    assert counts == [[2810, 802], [602, 172], [602, 172]]
    assert task.class_weights == pytest.approx((3612 / 2 / 2810, 3612 / 2 / 802))


def test_rivals_go_by_the_ending(task):
    found = task.baselines(task.test)
    assert list(found) == ["the most frequent class", "the last letter", "the last 3 letters"]
    assert found["the most frequent class"]["balanced_accuracy"] == 0.5
    last = {letter: [0, 0] for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    for name, label in zip(spelled(task.train), task.train.targets, strict=True):
        last[name[-1]][int(label)] += 1
    # A letter says male where its share of the men is greater than its share of the women.
    says = np.array([int(last[name[-1]][1] / 802 > last[name[-1]][0] / 2810) for name in spelled(task.test)])
    truth = np.array(task.test.targets)
    expected = np.mean([(says[truth == label] == label).mean() for label in (0, 1)])
    assert found["the last letter"]["balanced_accuracy"] == pytest.approx(expected)
    assert found["the last letter"]["accuracy"] == pytest.approx((says == truth).mean())


def test_an_ending_that_training_never_saw_gives_way_to_a_shorter_one():
    names, classes = np.array(["ANNA", "HANNA", "OTTO", "BO"]), np.array([0, 0, 1, 0])
    endings = Endings(names, classes, np.array([1.0, 2.0]), longest=3)
    scores = endings.scores(["JOANNA", "COTTO", "LIBO", "HUGO", "MAX", "BO"])
    assert [each.tolist() for each in scores] == [[2, 0], [0, 2], [1, 0], [1, 2], [3, 2], [1, 0]]


def test_a_name_is_sent_as_text(task, tmp_path):
    outcome = train(task, task.recipe.changed(hidden=12, epochs=1), tmp_path / "run", show_progress=False)
    assert outcome.metrics["test"]["balanced_accuracy"] > 0.6
    export_run(outcome.run, tmp_path / "repository")
    _, _, net, _ = load_net(outcome.run)
    assert net.num_parameters == sum(p.numel() for p in net.core.parameters())
    with serving(tmp_path / "repository") as running, Client(running.address) as client:
        assert client.model("names").inputs[0].is_text
        mary, unknown = client.predict("names", ["Mary", "M4ry"])
        as_ids = client.predict("names", [np.array([13, 1, 18, 25]), np.array([13, 0, 18, 25])])
        np.testing.assert_array_equal(mary, as_ids[0])
        np.testing.assert_array_equal(unknown, as_ids[1])
        with client.stream("names") as stream:
            np.testing.assert_array_equal(np.stack(list(stream.run("Mary"))), mary)
        label = task.labels[int(mary[-1].argmax())]
        told = CliRunner().invoke(main, ["predict", "names", "--text", "Mary", "M4ry", "--server", running.address])
        assert told.exit_code == 0, told.stderr
        assert told.stdout.splitlines()[0] == f"Mary\t{label}\t{mary[-1].max():.4f}"
        steps = CliRunner().invoke(main, ["stream", "names", "Mary", "--text", "--server", running.address])
        assert steps.exit_code == 0, steps.stderr
        assert [line.split("\t")[0] for line in steps.stdout.splitlines()] == ["0", "1", "2", "3"]
        assert steps.stdout.splitlines()[-1] == f"3\t{label}\t{mary[-1].max():.4f}"
