"""What a task is: data with its splits, what goes in and comes out, and how answers are judged. Torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from models.recipe import Recipe
from models.spec import Layout, TensorSpec, Topology

Array = np.ndarray[Any, Any]
DATA = Path(__file__).parent / "data"
"""Where the data files ship; README.md there says whence they come."""


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Sequences with what is asked of each; lengths differ."""

    inputs: tuple[Array, ...]
    """Each [length, features] float32, in raw units."""
    targets: tuple[Array, ...]
    """Each a class, shape () int64, or one row per step, [length, outputs] float32 in raw units."""

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"{len(self.inputs)} inputs, but {len(self.targets)} targets")

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def lengths(self) -> Array:
        """Steps of each sequence, [num_sequences] int32."""
        return np.array([len(x) for x in self.inputs], dtype=np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """What takes raw units to numbers near one and back; measured on the training split alone.

    A net sees (x - input_mean) / input_scale and answers its head's output * output_scale + output_mean.
    """

    input_mean: Array
    """[features] float32."""
    input_scale: Array
    """[features] float32, never 0."""
    output_mean: Array
    """[outputs] float32; zeros for a classifier."""
    output_scale: Array
    """[outputs] float32; ones for a classifier."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """Real data and what it asks of a model."""

    name: str
    """What the command line calls it."""
    summary: str
    """One line for people."""
    topology: Topology
    """Shape of input and output over time."""
    kind: Literal["classification", "regression"]
    """Classes with probabilities, or values in their units."""
    data_set: str
    """Name and source of the data."""
    license: str
    """Licence of the data."""
    input: TensorSpec
    """The per-step input."""
    output: TensorSpec
    """The output, as a causal model gives it: one row per step."""
    labels: tuple[str, ...] = ()
    """Class labels, by class."""
    changes_of: tuple[int, ...] = ()
    """Input features whose change the head predicts, so that answering "no change" costs nothing; empty: none."""
    looks_ahead: str = ""
    """Why a backward layer would read the answer off the input; empty where it would not."""
    train: Split
    """What weights and statistics are fitted to."""
    validation: Split
    """What chooses the epoch and every setting."""
    test: Split
    """Evaluated once, when training is over."""
    recipe: Recipe
    """Default settings of a run."""

    @property
    def num_features(self) -> int:
        """Width of a step's input."""
        return self.input.row_shape[0]

    @property
    def num_outputs(self) -> int:
        """Width of a row of output."""
        return self.output.row_shape[0]

    @property
    def is_classification(self) -> bool:
        """Whether answers are probabilities of classes."""
        return self.kind == "classification"

    def scaling(self) -> Scaling:
        """Measure the training split; no other split is looked at."""
        steps = np.concatenate(self.train.inputs).astype(np.float64)
        mean, scale = np.zeros(self.num_outputs), np.ones(self.num_outputs)
        if not self.is_classification:
            asked = np.concatenate(self.train.targets).astype(np.float64)
            if self.changes_of:
                # Median, not standard deviation: rare outages would drown the hourly changes.
                scale = np.maximum(np.median(np.abs(asked - steps[:, list(self.changes_of)]), axis=0), 1e-6)
            else:
                mean, scale = asked.mean(axis=0), np.maximum(asked.std(axis=0), 1e-6)
        return Scaling(
            steps.mean(axis=0).astype(np.float32),
            np.maximum(steps.std(axis=0), 1e-6).astype(np.float32),
            mean.astype(np.float32),
            scale.astype(np.float32),
        )

    def judge(self, split: Split, answers: list[Array]) -> dict[str, float]:
        """Score final answers against a split's targets.

        answers  one per sequence: class probabilities [classes], or values [length, outputs] in raw units
        Returns accuracy, or mae and rmse over every step, in the output's unit.
        """
        if self.is_classification:
            hits = [int(a.argmax()) == int(t) for a, t in zip(answers, split.targets, strict=True)]
            return {"accuracy": float(np.mean(hits))}
        errors = np.concatenate([a - t for a, t in zip(answers, split.targets, strict=True)]).astype(np.float64)
        return {"mae": float(np.abs(errors).mean()), "rmse": float(np.sqrt((errors**2).mean()))}

    def baseline(self, split: Split) -> tuple[str, dict[str, float]]:
        """Score what needs no recurrent net: its description, and the metrics of `judge`."""
        if not self.is_classification:
            return "persistence: no change", self.judge(split, [x[:, list(self.changes_of)] for x in split.inputs])
        means = np.stack([x.mean(axis=0) for x in self.train.inputs])
        classes = np.array([int(t) for t in self.train.targets])
        centroids = np.stack([means[classes == c].mean(axis=0) for c in range(len(self.labels))])
        spread = np.maximum((means - centroids[classes]).std(axis=0), 1e-6)
        answers = [-np.abs((x.mean(axis=0) - centroids) / spread).sum(axis=1) for x in split.inputs]
        return "nearest class by the mean step", self.judge(split, answers)


def per_step(name: str, names: tuple[str, ...], *, unit: str, description: str) -> TensorSpec:
    """Describe a per-step float32 tensor whose row has an element per name."""
    return TensorSpec(
        name=name,
        dtype="float32",
        row_shape=(len(names),),
        layout=Layout.PER_STEP,
        unit=unit,
        description=description,
        element_names=names,
    )


def read(name: str) -> dict[str, Array]:
    """Read the arrays of a data file that ships."""
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in sorted(archive.files)}


def digest(arrays: Mapping[str, Array]) -> str:
    """Hash arrays by name, type, shape and little-endian bytes: sha256, in hexadecimal."""
    sha = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        sha.update(f"{name} {little.dtype.name} {little.shape}\n".encode())
        sha.update(little.tobytes())
    return sha.hexdigest()


def pad(sequences: Sequence[Array]) -> Array:
    """Stack sequences [length, width] into [num_sequences, longest, width], with zeros at the ends."""
    stacked = np.zeros((len(sequences), max(map(len, sequences)), sequences[0].shape[1]), dtype=sequences[0].dtype)
    for row, sequence in zip(stacked, sequences, strict=True):
        row[: len(sequence)] = sequence
    return stacked
