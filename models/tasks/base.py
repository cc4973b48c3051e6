"""What a task is: data with its splits, what goes in and comes out, and how answers are judged. Torch-free."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar

import numpy as np

from models.recipe import Recipe
from models.spec import Generation, Layout, TensorSpec, Topology

Array = np.ndarray[Any, Any]
S = TypeVar("S", bound=Sized)
"""A split: sequences, with what is asked of each."""
DATA = Path(__file__).parent / "data"
"""Where the data files ship; README.md there says whence they come."""


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Sequences with what is asked of each; lengths differ."""

    inputs: tuple[Array, ...]
    """Each [length, features] float32, in raw units."""
    targets: tuple[Array, ...]
    """Each a class, shape () int64 or [length]; or values in raw units, [outputs] float32 or [length, outputs]."""
    ids: tuple[Array, ...] = ()
    """Each [length, categorical features] int64; empty where the task has none."""
    rivals: Mapping[str, Sequence[Array]] = field(default_factory=dict)
    """What simple methods answer, by their names: one answer per sequence, as a net's is judged."""

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"{len(self.inputs)} inputs, but {len(self.targets)} targets")
        if self.ids and len(self.inputs) != len(self.ids):
            raise ValueError(f"{len(self.inputs)} inputs, but {len(self.ids)} of categories")
        for name, answers in self.rivals.items():
            if len(self.inputs) != len(answers):
                raise ValueError(f"{len(self.inputs)} inputs, but {len(answers)} answers of {name}")

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def lengths(self) -> Array:
        """Steps of each sequence, [num_sequences] int32."""
        return np.array([len(x) for x in self.inputs], dtype=np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Categorical:
    """A per-step input of category ids, which become vectors within the model."""

    spec: TensorSpec
    """The input."""
    encoding: Literal["embedding", "one-hot"]
    """Whether a vector is trained, or a one at the place of the category, and zeros for the id 0."""
    width: int
    """Elements of a vector."""


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """What takes raw units to numbers near one and back; measured on the training split alone.

    A net sees (x - input_mean) / input_scale and answers its head's output * output_scale + output_mean.
    """

    input_mean: Array
    """[width] float32; zeros for what was a category."""
    input_scale: Array
    """[width] float32, never 0; ones for what was a category."""
    output_mean: Array
    """[outputs] float32; zeros for a classifier."""
    output_scale: Array
    """[outputs] float32; ones for a classifier."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BaseTask(ABC, Generic[S]):
    """Real data and what it asks of a model: what every kind of task says, of splits of its own kind."""

    name: str
    """What the command line calls it."""
    summary: str
    """One line for people."""
    topology: Topology
    """Shape of input and output over time."""
    data_set: str
    """Name and source of the data."""
    license: str
    """Licence of the data."""
    output: TensorSpec
    """The output of the graph that answers, as a causal model gives it: one row per step."""
    labels: tuple[str, ...] = ()
    """Class labels, by class."""
    vocabulary: tuple[str, ...] = ()
    """What the ids that a model generates stand for, by id."""
    generation: Generation | None = None
    """How outputs are made one after another; None where inputs come step by step."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Settings that it was made by from a data file of one's own; empty for a task that ships."""
    train: S
    """What weights and statistics are fitted to."""
    validation: S
    """What chooses the epoch and every setting."""
    test: S
    """Evaluated once, when training is over."""
    recipe: Recipe
    """Default settings of a run."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs of the graph that answers, in the order that a net takes them."""

    @property
    @abstractmethod
    def described(self) -> str:
        """What it is, in a line for people."""

    @property
    @abstractmethod
    def metric(self) -> str:
        """The metric that counts most."""

    @property
    def is_more_better(self) -> bool:
        """Whether the metric is a score, or an error."""
        return False

    @abstractmethod
    def baselines(self, split: S) -> dict[str, dict[str, float]]:
        """Score what needs no recurrent net: the metrics that a net is judged by, by the name of each method."""

    def baseline(self, split: S) -> tuple[str, dict[str, float]]:
        """Score the best of `baselines`, as the validation split has it: its name and metrics."""
        of_validation = self.baselines(self.validation)
        best = max if self.is_more_better else min
        name = best(of_validation, key=lambda each: of_validation[each][self.metric])
        return name, (of_validation if split is self.validation else self.baselines(split))[name]

    @property
    def score_unit(self) -> str:
        """Unit of the metrics; empty where they have none."""
        return ""


AnyTask = BaseTask[Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task(BaseTask[Split]):
    """Sequences whose every step is given, and what is asked of each: one answer, or one at every step."""

    kind: Literal["classification", "regression"]
    """Classes with probabilities, or values in their units."""
    input: TensorSpec | None
    """The per-step input of numbers; None where every feature is a category."""
    categorical: tuple[Categorical, ...] = ()
    """Per-step inputs of category ids."""
    class_weights: tuple[float, ...] = ()
    """Weight of each class in the loss; empty: all the same."""
    changes_of: tuple[int, ...] = ()
    """Input features whose change the head predicts, so that answering "no change" costs nothing; empty: none."""
    looks_ahead: str = ""
    """Why a backward layer would read the answer off the input; empty where it would not."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The per-step inputs in the order that a net takes them."""
        return ((self.input,) if self.input else ()) + tuple(each.spec for each in self.categorical)

    @property
    def num_features(self) -> int:
        """Numbers in a step's input, without categories."""
        return self.input.row_shape[0] if self.input else 0

    @property
    def width(self) -> int:
        """Width of what the first layer reads: the numbers, and the vectors of the categories."""
        return self.num_features + sum(each.width for each in self.categorical)

    @property
    def one_answer(self) -> bool:
        """Whether the sequence as a whole has one answer, or every step its own."""
        return self.topology == "many-to-one"

    @property
    def described(self) -> str:
        """What it is, in a line for people."""
        of_splits = (self.train, self.validation, self.test)
        lengths = np.concatenate([split.lengths for split in of_splits])
        counts = ", ".join(str(len(split)) for split in of_splits)
        what = f"{self.num_outputs} classes" if self.is_classification else self.kind
        counted = (self.num_features, "number", "numbers"), (len(self.categorical), "category", "categories")
        inputs = [f"{count} {one if count == 1 else many}" for count, one, many in counted if count]
        return (
            f"{self.summary} ({what}) from {' and '.join(inputs)} a step; sequences of {lengths.min()} to "
            f"{lengths.max()} steps: {counts} to train, validate and test on"
        )

    @property
    def score_unit(self) -> str:
        """Unit of the metrics."""
        return "" if self.is_classification else self.output.unit

    @property
    def num_outputs(self) -> int:
        """Width of a row of output."""
        return self.output.row_shape[0]

    @property
    def is_classification(self) -> bool:
        """Whether answers are probabilities of classes."""
        return self.kind == "classification"

    def scaling(self) -> Scaling:
        """Measure the training split; no other split is looked at. Without its data, nothing is scaled."""
        mean, scale = np.zeros(self.num_outputs), np.ones(self.num_outputs)
        input_mean, input_scale = np.zeros(self.width), np.ones(self.width)
        if len(self.train):
            steps = np.concatenate(self.train.inputs).astype(np.float64)
            input_mean[: self.num_features] = steps.mean(axis=0)
            input_scale[: self.num_features] = spread(steps)
            if not self.is_classification:
                asked = np.stack(self.train.targets) if self.one_answer else np.concatenate(self.train.targets)
                asked = asked.astype(np.float64)
                if self.changes_of:
                    changes = asked - steps[:, list(self.changes_of)]
                    # Median, not standard deviation: rare outages would drown the hourly changes.
                    typical = np.median(np.abs(changes), axis=0)
                    scale = np.where(typical > 0, typical, spread(changes))
                else:
                    mean, scale = asked.mean(axis=0), spread(asked)
        return Scaling(*(each.astype(np.float32) for each in (input_mean, input_scale, mean, scale)))

    def judge(self, split: Split, answers: list[Array]) -> dict[str, float]:
        """Score final answers against a split's targets.

        answers  one per sequence: class probabilities [classes] or values [outputs] in raw units; or a row of them for
                 every step, [length, ...]
        Returns accuracy, with class weights also its mean over classes; or mae and rmse, in the output's unit.
        """
        given, asked = (
            np.stack(each) if self.one_answer else np.concatenate(each) for each in (answers, split.targets)
        )
        if self.is_classification:
            is_hit = given.argmax(axis=-1) == asked
            scores = {"accuracy": float(is_hit.mean())}
            if self.class_weights:
                scores["balanced_accuracy"] = float(np.mean([is_hit[asked == c].mean() for c in np.unique(asked)]))
            return scores
        errors = (given - asked).astype(np.float64)
        return {"mae": float(np.abs(errors).mean()), "rmse": float(np.sqrt((errors**2).mean()))}

    @property
    def metric(self) -> str:
        """The metric that counts most: the more accuracy, or the less mae, the better."""
        if not self.is_classification:
            return "mae"
        return "balanced_accuracy" if self.class_weights else "accuracy"

    @property
    def is_more_better(self) -> bool:
        """Whether the metric is an accuracy."""
        return self.is_classification

    def baselines(self, split: Split) -> dict[str, dict[str, float]]:
        """Score what needs no recurrent net: the metrics of `judge` by the name of each method."""
        name, scores = self._plain_baseline(split)
        return {name: scores} | {name: self.judge(split, list(each)) for name, each in split.rivals.items()}

    def _plain_baseline(self, split: Split) -> tuple[str, dict[str, float]]:
        if self.changes_of:
            return "persistence: no change", self.judge(split, [x[:, list(self.changes_of)] for x in split.inputs])
        if self.is_classification and self.one_answer and self.num_features:
            return "nearest class by the mean step", self.judge(split, self._by_mean_step(split))
        asked = np.stack(self.train.targets) if self.one_answer else np.concatenate(self.train.targets)
        if self.is_classification:
            name, answer = "the most frequent class", np.bincount(asked, minlength=self.num_outputs)
        else:
            name, answer = "the mean of training", asked.mean(axis=0)
        return name, self.judge(split, [answer if self.one_answer else np.tile(answer, (n, 1)) for n in split.lengths])

    def _by_mean_step(self, split: Split) -> list[Array]:
        """Answer by the class whose training sequences are nearest in their mean step."""
        means = np.stack([x.mean(axis=0) for x in self.train.inputs])
        classes = np.array([int(t) for t in self.train.targets])
        of_class = [means[classes == c] for c in range(len(self.labels))]
        # A class that no sequence trains is never the nearest.
        centroids = np.stack([each.mean(axis=0) if len(each) else np.full(means.shape[1], np.inf) for each in of_class])
        spread = np.maximum((means - centroids[classes]).std(axis=0), 1e-6)
        return [-np.abs((x.mean(axis=0) - centroids) / spread).sum(axis=1) for x in split.inputs]

    def outline(self) -> dict[str, Any]:
        """All but the data and the recipe, in plain values: what exporting a net needs to know."""
        tensors = {
            name: spec.model_dump(mode="json")
            for name, spec in (("input", self.input), ("output", self.output))
            if spec
        }
        plain = ("name", "summary", "topology", "kind", "data_set", "license", "looks_ahead")
        lists = ("labels", "class_weights", "changes_of")
        categorical = [
            {"spec": each.spec.model_dump(mode="json"), "encoding": each.encoding, "width": each.width}
            for each in self.categorical
        ]
        return (
            {name: getattr(self, name) for name in plain}
            | {name: list(getattr(self, name)) for name in lists}
            | {"categorical": categorical, "source": dict(self.source)}
            | tensors
        )

    @classmethod
    def of_outline(cls, outline: Mapping[str, Any]) -> Self:
        """The reverse of `outline`: the task without its data."""
        nothing = Split((), ())
        categorical = [each | {"spec": TensorSpec.model_validate(each["spec"])} for each in outline["categorical"]]
        return cls(
            **{
                **outline,
                **{name: tuple(outline[name]) for name in ("labels", "class_weights", "changes_of")},
                "input": TensorSpec.model_validate(outline["input"]) if "input" in outline else None,
                "output": TensorSpec.model_validate(outline["output"]),
                "categorical": tuple(Categorical(**each) for each in categorical),
                "train": nothing,
                "validation": nothing,
                "test": nothing,
                "recipe": Recipe(),
            }
        )


def spread(values: Array) -> Array:
    """Standard deviation of columns [n, width]; 1 for a constant one, so that what it may be later is not blown up."""
    is_constant = (values == values[0]).all(axis=0)
    return np.where(is_constant, 1.0, np.maximum(values.std(axis=0), np.finfo(np.float32).tiny))


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
    """Stack sequences [length, *row] into [num_sequences, longest, *row], with zeros at the ends."""
    stacked = np.zeros((len(sequences), max(map(len, sequences)), *sequences[0].shape[1:]), dtype=sequences[0].dtype)
    for row, sequence in zip(stacked, sequences, strict=True):
        row[: len(sequence)] = sequence
    return stacked
