"""Data files in long format, as users have them."""

import numpy as np
import pyarrow
from pyarrow import csv, parquet

from models.tasks.base import read
from models.tasks.own import load
from models.tasks.settings import DataSettings

FORMATS = (".csv", ".parquet", ".npz")


def write(path, columns):
    """Write columns of one length as the path's suffix says."""
    table = pyarrow.table({name: pyarrow.array(np.asarray(values)) for name, values in columns.items()})
    match path.suffix:
        case ".csv":
            csv.write_csv(table, path)
        case ".parquet":
            parquet.write_table(table, path)
        case ".npz":
            np.savez(path, allow_pickle=False, **{name: np.asarray(values) for name, values in columns.items()})
    return path


def vowels(order=None):
    """The utterances that ship, with the task's own split: (columns, settings)."""
    arrays = read("vowels")
    frames = np.concatenate([arrays[f"{split}_frames"] for split in ("train", "test")])
    lengths = np.concatenate([arrays[f"{split}_lengths"] for split in ("train", "test")])
    speakers = np.concatenate([arrays[f"{split}_speakers"] for split in ("train", "test")])
    split = np.array(["train"] * 270 + ["test"] * 370, dtype="<U10")
    for speaker in range(9):
        split[np.flatnonzero(speakers[:270] == speaker)[-6:]] = "validation"
    columns = {
        "utterance": np.repeat(np.arange(640), lengths),
        "frame": np.concatenate([np.arange(length) for length in lengths]),
        **{f"lpc_{number + 1}": frames[:, number] for number in range(12)},
        "speaker": np.repeat([f"speaker {speaker + 1}" for speaker in speakers], lengths),
        "split": np.repeat(split, lengths),
    }
    if order is not None:
        columns = {name: values[order] for name, values in columns.items()}
    return columns, {
        "sequence_column": "utterance",
        "time_column": "frame",
        "target": "speaker",
        "split_column": "split",
    }


def waterflow():
    """The hours that ship, unbroken runs of them as sequences: (columns, settings)."""
    arrays = read("waterflow")
    columns = {
        "run": np.cumsum(np.diff(arrays["utc_s"], prepend=arrays["utc_s"][0]) > 3600),
        "time": arrays["utc_s"].astype("datetime64[s]"),
        "flow": arrays["flow"],
        "hour": ((arrays["utc_s"] + arrays["utc_offset_s"]) / 3600 % 24).astype(np.float32),
    }
    return columns, {
        "sequence_column": "run",
        "time_column": "time",
        "target": "flow",
        "changes_of": "flow",
        "horizon": 1,
        "split": "time",
        "validation_fraction": 0.2,
        "test_fraction": 0.2,
        "window": 48,
        "stride": 12,
    }


def shops(num_shops=24, seed=0):
    """Days of shops, with numbers and categories, sales that depend on both, and a class per day and per shop."""
    rng = np.random.default_rng(seed)
    days = rng.integers(4, 9, num_shops)
    shop = np.repeat(np.arange(num_shops), days)
    weather = rng.choice(["rain", "snow", "sun"], len(shop))
    promotion = rng.integers(0, 2, len(shop))
    temperature = rng.normal(15, 5, len(shop)).round(2)
    effect = np.select([weather == "rain", weather == "sun"], [1.0, 3.0], -2.0) + 2.0 * promotion
    size = rng.integers(0, 2, num_shops)[shop]
    return {
        "shop": shop,
        "day": np.concatenate([np.arange(each) for each in days]),
        "temperature": temperature,
        "weather": weather,
        "promotion": promotion,
        "sold": (effect + 0.1 * temperature + rng.normal(0, 0.1, len(shop))).round(3),
        "visits": (20.0 * size + rng.normal(30, 10, len(shop))).round(1),
        "is_good": np.where(effect > 1, "good", "bad"),
        "size": np.where(size == 1, "large", "small"),
        "area": 100.5 + 50.0 * size,
    }


def shop_settings(target, **more):
    """Settings for `shops` with one of its targets."""
    features = ["temperature", "weather", "promotion"] + ["visits"] * (target in {"size", "area"})
    named = {"sequence_column": "shop", "time_column": "day", "target": target, "features": features}
    return {**named, "categorical": ["promotion"], **more}


def own_task(folder, columns, settings, suffix=".csv"):
    """Write a file and make its task."""
    return load(DataSettings.of({"file": write(folder / f"data{suffix}", columns), **settings}))


def assert_same_splits(task, other):
    for name in ("train", "validation", "test"):
        one, two = getattr(task, name), getattr(other, name)
        assert len(one) == len(two) > 0, name
        for x, y in zip((*one.inputs, *one.targets, *one.ids), (*two.inputs, *two.targets, *two.ids), strict=True):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            np.testing.assert_array_equal(x, y)


NAMED = {"sequence_column": "id", "time_column": "t", "target": "y"}
ROWS = [f"{number},{time},{number + time},{number % 2}" for number in range(10) for time in range(3)]
"""Ten sequences of three steps: id, t, a, y."""


def from_text(folder, text, name="data.csv", **settings):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(DataSettings.of({"file": folder / name, **NAMED, **settings}))


def from_rows(folder, rows=ROWS, header="id,t,a,y", **settings):
    return from_text(folder, "\n".join([header, *rows]) + "\n", **settings)


def changed(row, line):
    """The rows with another line in one place, counted from 1."""
    return [*ROWS[: row - 1], line, *ROWS[row:]]
