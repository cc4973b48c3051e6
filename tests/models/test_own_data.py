"""Data files of one's own: what comes out of them, and what is said of those that are wrong."""

import dataclasses
import re

import numpy as np
import pyarrow
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from pyarrow import parquet

from models import tasks
from models.errors import DataError
from models.tasks.own import load
from models.tasks.settings import DataSettings
from tests.models import longform
from tests.models.longform import (
    NAMED,
    ROWS,
    assert_same_splits,
    changed,
    from_rows,
    from_text,
    own_task,
    shop_settings,
    shops,
)

# The same as the tasks that ship


@pytest.mark.parametrize("suffix", longform.FORMATS)
def test_vowels_in_long_format_are_the_task_that_ships(tmp_path, suffix):
    columns, settings = longform.vowels()
    own, ships = own_task(tmp_path, columns, settings, suffix), tasks.load("vowels")
    assert_same_splits(own, ships)
    assert (own.labels, own.kind, own.topology) == (ships.labels, ships.kind, ships.topology)
    assert own.input.element_names == ships.input.element_names
    for one, other in zip(dataclasses.astuple(own.scaling()), dataclasses.astuple(ships.scaling()), strict=True):
        np.testing.assert_array_equal(one, other)
    assert own.baseline(own.test) == ships.baseline(ships.test)


@pytest.mark.parametrize("suffix", longform.FORMATS)
def test_waterflow_in_long_format_is_the_task_that_ships(tmp_path, suffix):
    columns, settings = longform.waterflow()
    own, ships = own_task(tmp_path, columns, settings, suffix), tasks.load("waterflow")
    assert_same_splits(own, ships)
    assert (own.kind, own.topology, own.changes_of) == (ships.kind, ships.topology, (0,))
    assert own.looks_ahead == "what it is asked for is among the next steps' inputs"
    assert own.baselines(own.test).items() < ships.baselines(ships.test).items()


def test_order_of_the_rows_is_of_no_account(tmp_path):
    order = np.random.default_rng(0).permutation(9961)
    columns, settings = longform.vowels(order)
    assert_same_splits(own_task(tmp_path, columns, settings), tasks.load("vowels"))


def test_forms_of_text_files(tmp_path):
    expected = from_rows(tmp_path)
    semicolons = "\ufeff" + "\r\n".join(["id;t;a;y", *(row.replace(",", ";") for row in ROWS)])
    assert_same_splits(from_text(tmp_path, semicolons), expected)
    tabs = "\n\n".join(["id\tt\ta\ty", *(row.replace(",", "\t") for row in ROWS)])
    assert_same_splits(from_text(tmp_path, tabs, name="data.tsv"), expected)


def test_columns_of_every_type(tmp_path):
    """Dictionaries, dates, booleans, decimals and small integers, as Parquet has them."""
    shops_of = shops()
    table = pyarrow.table(
        {
            "shop": pyarrow.array([f"shop {each:02}" for each in shops_of["shop"]]).dictionary_encode(),
            "day": pyarrow.array(shops_of["day"].astype("datetime64[D]")),
            "temperature": pyarrow.array(shops_of["temperature"]).cast(pyarrow.decimal128(8, 2)),
            "weather": pyarrow.array(shops_of["weather"]).cast(pyarrow.large_string()),
            "promotion": pyarrow.array(shops_of["promotion"] == 1),
            "sold": shops_of["sold"].astype(np.float32),
            "notes": pyarrow.array([["a list"]] * len(shops_of["shop"])),
        }
    )
    parquet.write_table(table, tmp_path / "typed.parquet")
    settings = shop_settings("sold") | {"categorical": []}
    typed = load(DataSettings.of({"file": tmp_path / "typed.parquet", **settings}))
    assert typed.input.element_names == ("temperature", "promotion")
    assert_same_splits(typed, own_task(tmp_path, shops_of, settings))
    with pytest.raises(DataError, match=r"typed.parquet: column 'notes': holds list<.*>; numbers, text,"):
        load(DataSettings.of({"file": tmp_path / "typed.parquet", **settings, "features": ["notes"]}))


def test_arrays_of_several_columns_are_counted(tmp_path):
    path = tmp_path / "wide.npz"
    number = np.repeat(np.arange(10), 3)
    x = np.random.default_rng(0).normal(size=(30, 2))
    np.savez(path, id=number, t=np.tile(np.arange(3), 10), x=x, y=number % 2)
    assert load(DataSettings.of({"file": path, **NAMED})).input.element_names == ("x_0", "x_1")


# What is said


@pytest.mark.parametrize(
    ("target", "kind", "topology", "labels"),
    [
        ("sold", "regression", "many-to-many", ()),
        ("area", "regression", "many-to-one", ()),
        ("is_good", "classification", "many-to-many", ("bad", "good")),
        ("size", "classification", "many-to-one", ("large", "small")),
        ("promotion", "classification", "many-to-many", ("0", "1")),
        ("day", "classification", "many-to-many", tuple(map(str, range(8)))),
        ("shop", "regression", "many-to-one", ()),  # more than 20 whole numbers
    ],
)
def test_kind_and_shape_are_found_out(tmp_path, target, kind, topology, labels):
    columns = shops()
    columns["of"] = columns["shop"]
    settings = {"sequence_column": "of", "time_column": "day", "target": target, "features": ["temperature"]}
    task = own_task(tmp_path, columns, settings)
    assert (task.kind, task.topology, task.labels) == (kind, topology, labels)
    forced = (
        own_task(tmp_path, columns, settings | {"kind": "regression", "target_per": "step"}) if not labels else None
    )
    assert forced is None or forced.topology == "many-to-many"


def test_classes_of_numbers_are_in_the_order_of_their_values(tmp_path):
    rows = [row[:-1] + str(int(row[0]) % 3 * 5) for row in ROWS]
    assert from_rows(tmp_path, rows).labels == ("0", "5", "10")
    halves = [row[:-1] + str(int(row[0]) % 3 * 5 + 0.5) for row in ROWS]
    assert from_rows(tmp_path, halves, kind="classification").labels == ("0.5", "5.5", "10.5")


def test_categories_are_those_of_training_and_others_are_zero(tmp_path):
    columns = shops()
    columns["weather"] = np.where(columns["shop"] == 23, "hail", columns["weather"])
    columns["split"] = np.select([columns["shop"] < 15, columns["shop"] < 20], ["train", "validation"], "test")
    task = own_task(tmp_path, columns, shop_settings("sold", split_column="split"))
    [weather, promotion] = task.categorical
    assert (weather.spec.name, weather.spec.categories, weather.spec.num_ids) == (
        "weather",
        ("", "rain", "snow", "sun"),
        4,
    )
    assert (promotion.spec.categories, promotion.width) == (("", "0", "1"), 1)
    assert task.input.element_names == ("temperature",)
    assert task.test.ids[-1][:, 0].tolist() == [0] * len(task.test.ids[-1])
    in_order = [name for shop in range(15) for name in columns["weather"][columns["shop"] == shop]]
    assert [weather.spec.categories[number] for number in np.concatenate(task.train.ids)[:, 0]] == in_order
    one_hot = own_task(tmp_path, columns, shop_settings("sold", encoding="one-hot"))
    assert [each.width for each in one_hot.categorical] == [3, 2]
    assert one_hot.width == 6


def test_columns_named_as_the_graphs_own_inputs_get_other_names(tmp_path):
    columns = shops() | {"x": shops()["weather"]}
    task = own_task(tmp_path, columns, shop_settings("sold") | {"features": ["temperature", "x"], "categorical": []})
    assert [spec.name for spec in task.inputs] == ["x", "id_x"]


# Splits


def test_split_by_sequence_has_the_shares_of_every_class(tmp_path):
    def starts(split):
        return {float(x[0, 0]) for x in split.inputs}

    rows = [f"{n},{t},{n * 10 + t},{'rare' if n % 10 == 0 else 'usual'}" for n in range(100) for t in range(2)]
    task = from_rows(tmp_path, rows, validation_fraction=0.2, test_fraction=0.3)
    assert [len(split) for split in (task.train, task.validation, task.test)] == [50, 20, 30]
    counts = [sum(int(y) == 0 for y in split.targets) for split in (task.train, task.validation, task.test)]
    assert sum(counts) == 10
    assert counts[1] in (1, 2, 3)
    assert counts[2] in (2, 3, 4)
    found = [starts(split) for split in (task.train, task.validation, task.test)]
    assert len(set.union(*found)) == 100
    again = from_rows(tmp_path, rows, validation_fraction=0.2, test_fraction=0.3)
    assert_same_splits(task, again)
    other = from_rows(tmp_path, rows, validation_fraction=0.2, test_fraction=0.3, split_seed=1)
    assert starts(other.test) != starts(task.test)


def test_split_by_sequence_trains_on_every_class(tmp_path):
    rows = [f"{n},{t},{n},{'abcdefghijkl'[n // 2]}" for n in range(23) for t in range(2)]
    for seed in range(5):
        task = from_rows(tmp_path, rows, split_seed=seed, validation_fraction=0.2, test_fraction=0.2)
        assert {int(y) for y in task.train.targets} == set(range(12))
        assert (len(task.validation), len(task.test)) == (5, 5)


@given(
    lengths=st.lists(st.integers(1, 6), min_size=3, max_size=12),
    held_out=st.tuples(st.floats(0.05, 0.45), st.floats(0.05, 0.45)),
    per=st.sampled_from(["step", "sequence"]),
)
def test_split_by_time_never_trains_on_what_is_later(tmp_path_factory, lengths, held_out, per):
    rows, clock = [], 0
    for number, length in enumerate(lengths):
        # Sequences overlap in time: each begins before the last one ends.
        times = [clock + 2 * step + number % 2 for step in range(length)]
        rows += [f"{number},{time},1,{number + 0.5}" for time in times]
        clock += length
    folder = tmp_path_factory.mktemp("split")
    header = "id,t,a,y"
    shares = dict(zip(("validation_fraction", "test_fraction"), held_out, strict=True))
    (folder / "data.csv").write_text("\n".join([header, *rows]))
    settings = DataSettings.of(
        {"file": folder / "data.csv", **NAMED, "features": ["t"], "split": "time", "target_per": per, **shares}
    )
    try:
        task = load(settings)
    except DataError:
        reject()  # one sequence trains alone, or all end at once
    parts = [task.train, task.validation, task.test]
    moments = [
        np.array([x[-1, 0] for x in split.inputs]) if per == "sequence" else np.concatenate(split.inputs)[:, 0]
        for split in parts
    ]
    assert moments[0].max() < moments[1].min()
    assert moments[1].max() < moments[2].min()
    assert sum(int(split.lengths.sum()) for split in parts) == sum(lengths)


def test_nothing_that_is_fitted_sees_another_split(tmp_path):
    columns = shops()
    columns["split"] = np.select([columns["shop"] < 15, columns["shop"] < 20], ["train", "validation"], "test")
    columns["temperature"][3] = np.nan
    settings = shop_settings("is_good", split_column="split", missing="mean", class_weights="balanced")
    fitted = own_task(tmp_path, columns, settings)
    elsewhere = columns["shop"] >= 15
    columns["temperature"] = np.where(elsewhere, columns["temperature"] + 1000, columns["temperature"])
    columns["weather"] = np.where(elsewhere, "hail", columns["weather"])
    columns["is_good"] = np.where(elsewhere, "good", columns["is_good"])
    other = own_task(tmp_path, columns, settings)
    for one, two in zip(dataclasses.astuple(fitted.scaling()), dataclasses.astuple(other.scaling()), strict=True):
        np.testing.assert_array_equal(one, two)
    assert [each.spec for each in fitted.categorical] == [each.spec for each in other.categorical]
    assert fitted.class_weights == other.class_weights
    np.testing.assert_array_equal(fitted.train.inputs[0], other.train.inputs[0])


def test_training_of_one_class_is_refused(tmp_path):
    rows = [f"0,{t},{t},{'usual' if t < 80 else 'rare'}" for t in range(100)]
    with pytest.raises(DataError, match=r"data\.csv: training has one class alone, 'usual'; split otherwise"):
        from_rows(tmp_path, rows, split="time")


def test_constant_features_are_not_blown_up(tmp_path):
    columns = shops() | {"always": np.full(len(shops()["shop"]), 7.0), "tiny": 1e-9 * shops()["temperature"]}
    task = own_task(
        tmp_path, columns, shop_settings("sold") | {"features": ["always", "tiny"], "categorical": []}, ".npz"
    )
    scaling = task.scaling()
    assert scaling.input_mean[0] == 7.0
    assert scaling.input_scale[0] == 1.0
    assert scaling.input_scale[1] == pytest.approx(np.concatenate(task.train.inputs)[:, 1].std(), rel=1e-4)


def test_windows_cover_every_training_step(tmp_path):
    rows = [f"0,{t},{t},{t + 0.5}" for t in range(100)]
    task = from_rows(tmp_path, rows, split="time", window=10, stride=7)
    starts = [int(x[0, 0]) for x in task.train.inputs]
    assert starts == [0, 7, 14, 21, 28, 35, 42, 49, 56, 60]
    assert set(task.train.lengths.tolist()) == {10}
    assert (task.validation.lengths.tolist(), task.test.lengths.tolist()) == ([15], [15])


# What is missing


def test_missing_numbers(tmp_path):
    rows = changed(11, "3,1,,1")
    rows[0] = "0,0,,0"
    header = "id,t,a,y,part"
    rows = [f"{row},{'train' if n < 18 else 'validation' if n < 24 else 'test'}" for n, row in enumerate(rows)]
    by_mean = from_rows(tmp_path, rows, header, split_column="part", missing="mean").train.inputs
    mean = np.float32(np.mean([1, 2, 1, 2, 3, 2, 3, 4, 3, 5, 4, 5, 6, 5, 6, 7]))
    assert by_mean[0][:, 0].tolist() == [mean, 1, 2]
    assert by_mean[3][:, 0].tolist() == [3, mean, 5]
    forward = from_rows(tmp_path, rows, header, split_column="part", missing="forward").train.inputs
    assert forward[0][:, 0].tolist() == [mean, 1, 2]  # nothing to carry on yet
    assert forward[3][:, 0].tolist() == [3, 3, 5]
    with pytest.raises(DataError, match=r"column 'a': no training row has a value; leave the column out"):
        from_rows(tmp_path, [f"{n},0,,{n % 2}" for n in range(10)], missing="mean")


def test_numbers_written_otherwise_are_no_categories(tmp_path):
    for cell in ("1,5", "1 000", "20%", "1.000,5", "-3'000"):
        rows = [f"{n};{t};{cell};{n % 2}" for n in range(10) for t in range(3)]
        with pytest.raises(
            DataError, match=re.escape(f"column 'a', row 1: {cell!r} is not a number; mend the cell, name")
        ):
            from_rows(tmp_path, rows, "id;t;a;y")
        assert from_rows(tmp_path, rows, "id;t;a;y", categorical="a").categorical[0].spec.categories == ("", cell)


def test_missing_categories(tmp_path):
    rows = [f"{n},{t},{'ab'[(n + t) % 2]},{n % 2}" for n in range(10) for t in range(3)]
    with pytest.raises(DataError, match=r"column 'a', row 5: the cell is empty or NaN; mend the cell, or say what"):
        from_rows(tmp_path, [*rows[:4], "1,1,,1", *rows[5:]])
    for missing, expected in (("mean", [2, 0, 2]), ("forward", [2, 2, 2])):
        task = from_rows(tmp_path, [*rows[:4], "1,1,,1", *rows[5:]], missing=missing)
        ids = {tuple(each[:, 0].tolist()) for split in (task.train, task.validation, task.test) for each in split.ids}
        assert tuple(expected) in ids
        assert task.input is None


# Weights of classes


def test_class_weights(tmp_path):
    rows = [f"{n},{t},{n},{'abc'[0 if n % 10 else 1 + n // 10 % 2]}" for n in range(60) for t in range(2)]
    part = ["train" if n < 40 else "validation" if n < 50 else "test" for n in range(60) for _ in range(2)]
    rows = [f"{row},{each}" for row, each in zip(rows, part, strict=True)]

    def weights(**settings):
        return from_rows(tmp_path, rows, "id,t,a,y,part", split_column="part", **settings).class_weights

    assert weights() == ()
    assert weights(class_weights="balanced") == pytest.approx((40 / 36 / 3, 40 / 2 / 3, 40 / 2 / 3))
    assert weights(class_weights={"c": 7.0}) == (1.0, 1.0, 7.0)
