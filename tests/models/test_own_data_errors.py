"""Data files of one's own that are wrong, and settings that don't fit them: what is said."""

import re

import numpy as np
import pytest

from models.errors import DataError, RecipeError
from models.tasks.own import load
from models.tasks.settings import DataSettings
from tests.models.longform import (
    NAMED,
    ROWS,
    changed,
    from_rows,
    from_text,
)


@pytest.mark.parametrize(
    ("row", "line", "settings", "said"),
    [
        (11, "3,1,abc,1", {}, "column 'a', row 11: 'abc' is not a number; mend the cell, name the column in --cat"),
        (11, "3,1,,1", {}, "column 'a', row 11: the cell is empty or NaN; mend the cell, or say what it becomes with"),
        (11, "3,1,nan,1", {}, "column 'a', row 11: the cell is empty or NaN"),
        (11, "3,1,inf,1", {}, "column 'a', row 11: inf is too large"),
        (11, "3,1,1e39,1", {}, "column 'a', row 11: 1e+39 is too large"),
        (11, "3,1,4,", {}, "column 'y', row 11: the cell is empty or NaN; a target cannot be missing: leave such rows"),
        (11, ",1,4,1", {}, "column 'id', row 11: the cell is empty or NaN; every row needs its sequence"),
        (11, "3,,4,1", {}, "column 't', row 11: the cell is empty or NaN; every row needs its time"),
        (11, "3,0,4,1", {}, "column 't', row 11: sequence '3' has this time already in row 10; a sequence has one"),
        (11, "3,soon,4,1", {}, "column 't', row 11: 'soon' is not a number"),
        (11, "3,1,4", {}, "row 11: 3 cells, but the header names 4 columns"),
        (11, "3,1,4,1,5", {}, "row 11: 5 cells, but the header names 4 columns"),
        (11, "3,1,4,0", {"target_per": "sequence"}, "column 'y', row 11: differs from row 10 of the same sequence"),
        (11, "3,1,4,good", {"kind": "regression"}, "column 'y', row 11: 'good' is not a number; mend the cell, or"),
        (11, "3,1,4,7", {"split": "time"}, "row 11: class '7' is in validation, but nowhere in train"),
    ],
)
def test_wrong_cell_is_named(tmp_path, row, line, settings, said):
    with pytest.raises(DataError, match=re.escape(f"data.csv: {said}")):
        from_rows(tmp_path, changed(row, line), **settings)


@pytest.mark.parametrize(
    ("text", "settings", "said"),
    [
        ("", {}, "data.csv: the file is empty"),
        ("id,t,a,y\n", {}, "data.csv: it has no rows"),
        ("id,t,a,a\n1,2,3,4\n", {}, "data.csv: two columns are called 'a'; rename one"),
        (b"id,t,a,y\n0,1,\xff,1\n", {}, "data.csv: column 'a': holds bytes that are not UTF-8"),
        ("id,t,a,z\n0,0,1,2\n", {}, "data.csv: no column 'y'; there are id, t, a, z"),
        ("id,t,a,y\n0,0,1,2\n", {"features": ["b"]}, "data.csv: no column 'b'; there are id, t, a, y"),
        ("id,t,y\n0,0,1\n1,0,2\n", {}, "data.csv: there is no column left to be a feature"),
        ("id,t,a,y\n0,0,2024-05-31,1\n1,0,2024-06-01,2\n2,0,2024-06-01,2\n", {}, "column 'a': holds times, not"),
        ("id,t,a,y\n" + "0,0,1,b\n1,0,1,b\n2,0,1,b\n", {}, "column 'y': only one class, 'b', so there is nothing"),
        ("id,t,a,y\n" + "0,0,1,b\n1,0,1,c\n", {}, "data.csv: 2 sequences are too few to train, validate and test on"),
        ("id,t,a,y\n" + "0,0,1,1.5\n1,0,1,1.5\n2,0,1,1.5\n", {}, "the target is [1.5] in every training row"),
        ("id,t,a,y\n0,0,1,1.5\n0,1,1,2.5\n0,2,1,4.5\n", {"split": "time", "horizon": 1}, "no sequence longer than the"),
        ("id,t,a,y\n0,0,1,1.5\n0,1,1,2.5\n", {"split": "time"}, "column 't': 2 different times are too few to train"),
    ],
)
def test_wrong_file_is_one_clear_line(tmp_path, text, settings, said):
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        from_text(tmp_path, text, **settings)
    assert str(caught.value).startswith("data.csv: ")
    assert "\n" not in str(caught.value)


def test_file_that_is_not_what_its_name_says(tmp_path):
    for name, said in (
        ("data.txt", "expected a file that ends in .csv, "),
        ("data.parquet", "not a Parquet file that can be read"),
        ("data.npz", "not an .npz file that can be read"),
    ):
        with pytest.raises(DataError, match=f"{name}: {said}"):
            from_text(tmp_path, "id,t,a,y\n", name=name)
    with pytest.raises(DataError, match=r"none\.csv: cannot be read: No such file"):
        load(DataSettings.of({"file": tmp_path / "none.csv", **NAMED}))
    np.savez(tmp_path / "short.npz", id=np.arange(3), t=np.arange(3), y=np.arange(2))
    with pytest.raises(
        DataError, match=r"short\.npz: every array needs as many rows.*'id' has 3, 't' has 3, 'y' has 2"
    ):
        load(DataSettings.of({"file": tmp_path / "short.npz", **NAMED}))


def test_sequence_in_two_splits_is_named(tmp_path):
    rows = [
        f"{row},{split}" for row, split in zip(ROWS, ["train"] * 10 + ["test"] * 10 + ["validation"] * 10, strict=True)
    ]
    with pytest.raises(DataError, match=r"column 'part', row 11: sequence '3' is in test here, and in train in row 10"):
        from_rows(tmp_path, rows, "id,t,a,y,part", split_column="part")
    rows[4] = rows[4].replace("train", "dev")
    with pytest.raises(DataError, match=r"column 'part', row 5: 'dev' is no split: train, validation, test"):
        from_rows(tmp_path, rows, "id,t,a,y,part", split_column="part")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target": []}, "target: Tuple should have at least 1 item"),
        ({"sequence_column": None}, "a split by sequence needs a sequence_column"),
        ({"split": "time", "time_column": None}, "split time needs a time_column"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "validation_fraction and test_fraction leave nothing"),
        ({"stride": 3}, "stride needs a window"),
        ({"features": ["a", "y"]}, "'y' is the target, so it cannot be a feature, unless there is a horizon"),
        ({"features": ["a", "id"]}, "'id' is the sequence_column, so it can be neither a target nor a feature"),
        ({"features": ["a", "a"]}, "features names 'a' twice"),
        ({"features": ["a"], "categorical": ["b"]}, "categorical names 'b', which is not one of the features"),
        ({"horizon": 1, "changes_of": ["y", "a"]}, "changes_of names 2 features for 1 targets"),
        ({"horizon": 1, "target_per": "sequence"}, "a horizon asks at every step, so target_per cannot be sequence"),
        ({"window": 2, "target_per": "sequence"}, "a window cuts sequences, which have one target each"),
        ({"changes_of": ["a"]}, "changes_of is for targets that are numbers, and these are classes"),
        ({"changes_of": ["a"], "kind": "regression"}, "changes_of is for a target per step, and this is one per"),
        ({"changes_of": ["t"], "kind": "regression"}, "changes_of names 't', which is not a feature of numbers: a"),
        ({"class_weights": {"2": 5.0}}, "class_weights names '2', which is no class: 0, 1"),
        ({"class_weights": "balanced", "kind": "regression"}, "class_weights are for a classification"),
        ({"target": ["y", "t"], "kind": "classification"}, "a classification has one target, not 2: y, t"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, settings, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        from_rows(tmp_path, **settings)


# What is found out
