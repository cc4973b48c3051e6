"""The data that ships, its splits, and how answers are judged."""

import dataclasses
import io
import subprocess
import sys
import tarfile
import zipfile
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
from click.testing import CliRunner

from models import tasks
from models.errors import DataError, RecipeError, UnknownTask
from models.recipe import Recipe
from models.tasks import make
from models.tasks.base import Split, digest, pad, read
from tests.models.conftest import make_task


@pytest.fixture(scope="module")
def vowels():
    return tasks.load("vowels")


@pytest.fixture(scope="module")
def waterflow():
    return tasks.load("waterflow")


def test_loading_needs_no_torch():
    code = "import sys; from models import tasks; tasks.load('vowels'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_unknown_task_names_the_known_ones():
    with pytest.raises(UnknownTask, match="no task 'vowel': there are vowels, waterflow, names, prices"):
        tasks.load("vowel")


# The files that ship


@pytest.mark.parametrize("name", make.SOURCES)
def test_data_is_what_the_package_held(name):
    assert digest(read(name)) == make.SOURCES[name].sha256


def vowels_wheel(path):
    """Write the data as aeon's wheel holds them."""
    arrays = read("vowels")
    with zipfile.ZipFile(path, "w") as wheel:
        for split in ("train", "test"):
            lines = ["#comment", "@problemName JapaneseVowels", "@data"]
            utterances = np.split(arrays[f"{split}_frames"], np.cumsum(arrays[f"{split}_lengths"])[:-1])
            for frames, speaker in zip(utterances, arrays[f"{split}_speakers"], strict=True):
                channels = (",".join(f"{value:.6f}" for value in channel) for channel in frames.T)
                lines.append(":".join([*channels, str(speaker + 1)]))
            wheel.writestr(
                f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{split.upper()}.ts", "\n".join(lines) + "\n"
            )


def waterflow_wheel(path, *, louder=0.0):
    """Write the data as river's wheel holds them."""
    arrays = read("waterflow")
    lines = ["Time,Water flow [l/s]"]
    for utc_s, offset_s, flow in zip(*(arrays[key] for key in ("utc_s", "utc_offset_s", "flow")), strict=True):
        local = datetime.fromtimestamp(int(utc_s), UTC).astimezone(timezone(timedelta(seconds=int(offset_s))))
        lines.append(f"{local.isoformat()},{flow + louder:.3f}")
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("river/datasets/water-flow.csv", "\n".join(lines) + "\n")


def names_source(path):
    """Write the data as the source of the package `names` holds them."""
    arrays = read("names")
    with tarfile.open(path, "w:gz") as source:
        for label in ("female", "male"):
            pairs = zip(arrays[f"{label}_names"], arrays[f"{label}_percent"], strict=True)
            lines = [f"{name.decode():14} {percent:.3f} {0:6.3f} {i:6}" for i, (name, percent) in enumerate(pairs, 1)]
            content = ("\n".join(lines) + "\n").encode()
            member = tarfile.TarInfo(f"names-0.3.0/names/dist.{label}.first")
            member.size = len(content)
            source.addfile(member, io.BytesIO(content))


def prices_wheel(path):
    """Write the data as river's wheel holds them."""
    arrays = read("prices")
    days = (datetime.fromtimestamp(int(utc_s), UTC) for utc_s in arrays["utc_s"])
    lines = [f"{day:%m/%d/%Y},{price:g}" for day, price in zip(days, arrays["price"], strict=True)]
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("river/drift/datasets/brent_crude_oil.csv", "\n".join(["day,DPB", *lines]) + "\n")


@pytest.mark.parametrize(
    ("name", "write", "suffix"),
    [
        ("vowels", vowels_wheel, ".whl"),
        ("waterflow", waterflow_wheel, ".whl"),
        ("names", names_source, ".tar.gz"),
        ("prices", prices_wheel, ".whl"),
    ],
)
def test_script_makes_the_same_data_again(tmp_path, name, write, suffix):
    package = tmp_path / f"package{suffix}"
    write(package)
    done = CliRunner().invoke(make.main, [name, "--check", "--package", str(package)])
    assert done.exit_code == 0, done.output
    assert done.output.startswith(f"{name}: {make.SOURCES[name].package}")


def test_script_refuses_other_data(tmp_path):
    waterflow_wheel(tmp_path / "louder.whl", louder=1.0)
    with pytest.raises(DataError, match=r"waterflow: louder\.whl holds other data"):
        make.make("waterflow", tmp_path / "louder.whl")
    (tmp_path / "broken.whl").write_text("no archive")
    with pytest.raises(DataError, match=r"waterflow: cannot read it from broken\.whl"):
        make.make("waterflow", tmp_path / "broken.whl")


# Splits


def test_vowels_keep_the_official_split(vowels):
    assert (len(vowels.train), len(vowels.validation), len(vowels.test)) == (216, 54, 370)
    counts = np.bincount([int(t) for t in vowels.test.targets]).tolist()
    assert counts == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    lengths = np.concatenate([vowels.train.lengths, vowels.validation.lengths, vowels.test.lengths])
    assert (lengths.min(), lengths.max()) == (7, 29)
    # The first frame of the first utterance, as printed in the source.
    np.testing.assert_allclose(vowels.train.inputs[0][0, :3], [1.860936, -0.207383, 0.261557], rtol=1e-7)


def test_vowels_validate_on_training_utterances_held_out(vowels):
    for split, per_speaker in ((vowels.train, 24), (vowels.validation, 6)):
        assert np.bincount([int(t) for t in split.targets]).tolist() == [per_speaker] * 9
    seen = {x.tobytes() for x in vowels.train.inputs}
    assert not seen & {x.tobytes() for split in (vowels.validation, vowels.test) for x in split.inputs}


def test_waterflow_is_cut_at_missing_hours_and_split_by_time(waterflow):
    arrays = read("waterflow")
    num_gaps = int((np.diff(arrays["utc_s"]) != 3600).sum())
    assert num_gaps == 10
    for split in (waterflow.train, waterflow.validation, waterflow.test):
        for x, y in zip(split.inputs, split.targets, strict=True):
            passed = np.diff(x[:, 1]) % 24
            # One night the clock went from 1:00 to 3:00 within the hour.
            assert set(x[:-1, 1][passed != 1]) <= {1.0}
            # What is asked for at an hour is the flow that comes in at the next.
            np.testing.assert_array_equal(y[:-1, 0], x[1:, 0])
    assert waterflow.validation.lengths.tolist() == [68, 10, 173]
    assert waterflow.test.lengths.tolist() == [168, 3, 2, 1, 71, 2]
    assert waterflow.train.lengths.max() == 48
    flow = arrays["flow"]
    assert waterflow.validation.inputs[0][0, 0] == flow[760]
    assert waterflow.test.inputs[0][0, 0] == flow[1014]
    # Windows cover every training hour up to the last that asks, and none that validates.
    assert {x.tobytes() for x in np.concatenate(waterflow.train.inputs)} == {
        np.array([flow[i], (arrays["utc_s"][i] + arrays["utc_offset_s"][i]) / 3600 % 24], np.float32).tobytes()
        for i in range(759)
        if arrays["utc_s"][i + 1] - arrays["utc_s"][i] == 3600
    }


def test_waterflow_hours_are_local(waterflow):
    # The series begins on 20 March 2022 at 11:00, and summer time began on the 27th: 12:00 was 11:00 the day before.
    assert waterflow.train.inputs[0][0].tolist() == pytest.approx([100.59, 11.0])
    arrays = read("waterflow")
    assert sorted(set(arrays["utc_offset_s"].tolist())) == [3600, 7200]


# Judging


def test_accuracy_counts_final_answers():
    task = make_task()
    right = [np.eye(3)[int(t)] for t in task.test.targets]
    assert task.judge(task.test, right) == {"accuracy": 1.0}
    wrong_once = [np.roll(right[0], 1), *right[1:]]
    assert task.judge(task.test, wrong_once)["accuracy"] == pytest.approx(8 / 9)


def test_errors_are_averaged_over_steps_not_sequences():
    task = make_task(kind="regression")
    off = [t + 3.0 for t in task.test.targets[:1]] + [t - 1.0 for t in task.test.targets[1:]]
    first, steps = task.test.lengths[0], task.test.lengths.sum()
    scores = task.judge(task.test, off)
    assert scores["mae"] == pytest.approx((3 * first + (steps - first)) / steps, rel=1e-5)
    assert scores["rmse"] == pytest.approx(np.sqrt((9 * first + (steps - first)) / steps), rel=1e-5)


def test_baselines(vowels, waterflow):
    name, scores = waterflow.baseline(waterflow.test)
    pairs = zip(waterflow.test.inputs, waterflow.test.targets, strict=True)
    changes = np.concatenate([y[:, 0] - x[:, 0] for x, y in pairs])
    assert name.startswith("persistence")
    assert scores["mae"] == pytest.approx(np.abs(changes).mean(), rel=1e-5)
    assert vowels.baseline(vowels.test)[1]["accuracy"] == pytest.approx(335 / 370)


def test_waterflow_is_judged_beside_forecasts_that_know_yesterday(waterflow):
    arrays = read("waterflow")
    at = {int(second) // 3600: float(flow) for second, flow in zip(arrays["utc_s"], arrays["flow"], strict=True)}
    first = int(arrays["utc_s"][1014]) // 3600
    errors = {
        "persistence: no change": [],
        "the same hour yesterday": [],
        "the present flow and yesterday's change": [],
    }
    for hour in sorted(at):
        if hour < first or hour + 1 not in at:
            continue
        yesterday, before = at.get(hour - 23), at.get(hour - 24)
        both = yesterday is not None and before is not None
        forecasts = (at[hour], yesterday or at[hour], at[hour] + (yesterday - before if both else 0.0))
        for each, forecast in zip(errors.values(), forecasts, strict=True):
            each.append(abs(forecast - at[hour + 1]))
    found = waterflow.baselines(waterflow.test)
    assert list(found) == list(errors)
    for name, each in errors.items():
        assert len(each) == 247
        assert found[name]["mae"] == pytest.approx(np.mean(each), rel=1e-4), name
    assert [round(each["mae"], 3) for each in found.values()] == [0.209, 0.373, 0.164]


def test_the_baseline_is_the_one_that_does_best_on_the_validation_split(waterflow):
    task = make_task()
    right = tuple(np.eye(3)[int(t)] for t in task.validation.targets)
    wrong = tuple(np.roll(each, 1) for each in right)
    split = dataclasses.replace(task.validation, rivals={"wrong": wrong, "right": right})
    knowing = dataclasses.replace(task, validation=split, test=split)
    assert knowing.baseline(knowing.test) == ("right", {"accuracy": 1.0})
    assert list(knowing.baselines(knowing.test)) == ["nearest class by the mean step", "wrong", "right"]
    # Less is better there: an outage in the validation hours is worst for those who expect it again.
    assert waterflow.baseline(waterflow.test)[0] == "persistence: no change"


def test_every_sequence_needs_an_answer_of_a_rival():
    with pytest.raises(ValueError, match="1 inputs, but 0 answers of guess"):
        Split((np.zeros((2, 1), np.float32),), (np.zeros(1, np.float32),), rivals={"guess": ()})


def test_pad_puts_zeros_at_the_ends():
    padded = pad([np.ones((2, 1), np.float32), np.full((3, 1), 2, np.float32)])
    assert padded[..., 0].tolist() == [[1, 1, 0], [2, 2, 2]]


# Recipes


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"hidden": 0}, "hidden: Input should be greater than 0"),
        ({"dropout": 1.0}, "dropout: Input should be less than 1"),
        ({"lr": float("nan")}, "lr: Input should be a finite number"),
        ({"bidirectional": True, "go_backwards": True}, "a bidirectional layer goes backwards too"),
        ({"kernel_initializer": "xavier"}, "kernel_initializer: no initializer 'xavier': there are zeros, ones"),
        ({"units": 3}, "units: Extra inputs are not permitted"),
    ],
)
def test_recipe_refuses_what_makes_no_sense(settings, fault):
    with pytest.raises(RecipeError, match=fault):
        Recipe().changed(**settings)
