"""A task of one's own: a data file in long format, and settings that say what is asked of it. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from models.errors import RecipeError
from models.recipe import Recipe
from models.spec import LENGTHS, Layout, TensorSpec
from models.tasks.base import Categorical, Split, Task, per_step
from models.tasks.rows import SPLITS, TRAIN, Piece, Rows, arrange, cut, deal
from models.tasks.settings import DataSettings
from models.tasks.table import Table, read

Array = np.ndarray[Any, Any]

MAX_CLASSES = 20
"""Most different whole numbers of a target that are taken for classes."""
MAX_EMBEDDING = 16
"""Widest vector of a category unless the settings say so."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What is to be predicted, in the file's order."""

    kind: Literal["classification", "regression"]
    values: Array
    """[rows] int64 classes, or [rows, targets] float32."""
    labels: tuple[str, ...]
    """By class; empty for a regression."""


def load(settings: DataSettings) -> Task:
    """Read a data file and make its task. Raises DataError, RecipeError and MissingExtra."""
    table = read(settings.file)
    if settings.sha256 not in (None, table.digest):
        raise table.fault(
            f"the file has changed since: its SHA-256 was {settings.sha256} and is {table.digest}; bring the old one "
            "back, or take sha256 out of the config file"
        )
    numeric, categorical = _features(table, settings)
    rows = arrange(table, settings)
    asked = _asked(table, settings)
    one_answer = _is_per_sequence(table, settings, rows, asked)
    is_classes = asked.kind == "classification"
    classes = asked.values[rows.order[rows.starts]] if is_classes and one_answer else None
    parts = deal(table, settings, rows, one_answer=one_answer, classes=classes)
    pieces = cut(table, settings, rows, parts)
    _check_training(table, rows, asked, pieces)
    x = _filled(table, settings, rows, parts, numeric)
    ids, kinds = _categories(table, settings, rows, parts, categorical)
    splits = [_split(part, rows, pieces, x, ids, asked, one_answer=one_answer) for part in range(len(SPLITS))]
    return _task(table, settings, asked, list(numeric), kinds, splits, one_answer=one_answer)


def _features(table: Table, settings: DataSettings) -> tuple[dict[str, Array], list[str]]:
    """Tell features that are numbers from those that are categories. Raises DataError and RecipeError.

    Returns the former with their values, [rows] in the file's order with NaN where a cell is empty, and the latter.
    """
    roles = {settings.sequence_column, settings.time_column, settings.split_column}
    roles |= set() if settings.horizon else set(settings.target)
    names = list(settings.features) or [name for name in table.columns if name not in roles]
    if not names:
        raise table.fault("there is no column left to be a feature")
    for name in (*names, *settings.categorical):
        table[name]
    categorical = [
        name
        for name in names
        if name in settings.categorical or (table[name].kind == "text" and not table.holds_numbers_as_text(name))
    ]
    advice = "mend the cell, name the column in --categorical, or leave it out of --features"
    numeric = {name: table.numbers(name, advice) for name in names if name not in categorical}
    for name in settings.changes_of:
        if name not in numeric:
            raise RecipeError(f"changes_of names {name!r}, which is not a feature of numbers: {', '.join(numeric)}")
    return numeric, categorical


def _asked(table: Table, settings: DataSettings) -> Asked:
    """Read the targets. Raises DataError for cells that are missing or no numbers, and for one class alone."""
    columns = [table.complete(name, "a target cannot be missing: leave such rows out") for name in settings.target]
    kind = settings.kind
    if kind is None:
        is_classes = [
            column.kind in {"text", "truth"}
            or (column.kind == "whole" and len(np.unique(column.values)) <= MAX_CLASSES)
            for column in columns
        ]
        kind = "classification" if is_classes == [True] else "regression"
    if kind == "regression":
        advice = "mend the cell, or make it a classification with --kind"
        values = [table.numbers(name, advice).astype(np.float32) for name in settings.target]
        return Asked(kind, np.stack(values, axis=1), ())
    if len(columns) > 1:
        raise RecipeError(f"a classification has one target, not {len(columns)}: {', '.join(settings.target)}")
    [name] = settings.target
    texts = table.texts(name)
    # By value, so that class 10 does not come before class 2.
    _, first, classes = np.unique(columns[0].values, return_index=True, return_inverse=True)
    labels = tuple(texts[first].tolist())
    if len(labels) < 2:
        raise table.fault(f"only one class, {labels[0]!r}, so there is nothing to tell apart", column=name)
    return Asked(kind, classes.astype(np.int64), labels)


def _is_per_sequence(table: Table, settings: DataSettings, rows: Rows, asked: Asked) -> bool:
    """Find out whether a sequence has one answer. Raises DataError where it should, and has several."""
    values = asked.values[rows.order].reshape(len(rows.order), -1)
    strays = (values != values[rows.starts][rows.sequence]).any(axis=1)
    if settings.horizon and settings.target_per == "sequence":
        raise RecipeError("a horizon asks at every step, so target_per cannot be sequence")
    if settings.changes_of and asked.labels:
        raise RecipeError("changes_of is for targets that are numbers, and these are classes")
    if settings.window and settings.target_per == "sequence":
        raise RecipeError("a window cuts sequences, which have one target each: leave window or target_per out")
    if settings.target_per == "sequence" and strays.any():
        at = int(np.argmax(strays))
        start = int(rows.order[rows.starts[rows.sequence[at]]])
        raise table.fault(
            f"differs from row {start + 1} of the same sequence, so that is not one target per sequence; leave "
            "target_per out, or make it step",
            column=settings.target[0],
            row=int(rows.order[at]),
        )
    is_one = settings.target_per == "sequence"
    if settings.target_per is None:
        is_one = not (settings.horizon or settings.window or strays.any() or len(rows.names) == 1)
    if is_one and settings.changes_of:
        raise RecipeError("changes_of is for a target per step, and this is one per sequence")
    return is_one


def _check_training(table: Table, rows: Rows, asked: Asked, pieces: list[Piece]) -> None:
    """Check that training shows what is to be learnt. Raises DataError."""
    trained = np.concatenate([asked.values[rows.order[piece.targets]] for piece in pieces if piece.part == TRAIN])
    if asked.kind == "regression":
        if (trained == trained[0]).all():
            raise table.fault(f"the target is {trained[0].tolist()} in every training row: there is nothing to learn")
        return
    known = np.unique(trained)
    if len(known) < 2:
        raise table.fault(f"training has one class alone, {asked.labels[known[0]]!r}; split otherwise")
    for piece in pieces:
        file_rows = rows.order[piece.targets]
        unknown = ~np.isin(asked.values[file_rows], known)
        if unknown.any():
            row = int(file_rows[np.argmax(unknown)])
            label = asked.labels[asked.values[row]]
            raise table.fault(
                f"class {label!r} is in {SPLITS[piece.part]}, but nowhere in train; split otherwise, or leave it out",
                row=row,
            )


def _filled(table: Table, settings: DataSettings, rows: Rows, parts: Array, numeric: dict[str, Array]) -> Array:
    """Fill empty cells of numbers: [rows, features] float32 in the order of `rows`."""
    x = np.zeros((len(rows.order), len(numeric)), dtype=np.float32)
    for number, (name, in_file) in enumerate(numeric.items()):
        values = in_file[rows.order]
        missing = np.isnan(values)
        if missing.any():
            if settings.missing == "error":
                table.complete(name, "mend the cell, or say what it becomes with --missing mean or forward")
            trained = values[(parts == TRAIN) & ~missing]
            if not len(trained):
                raise table.fault("no training row has a value; leave the column out of --features", column=name)
            if settings.missing == "forward":
                values = _carried_on(values, rows)
            values = np.where(np.isnan(values), trained.mean(), values)
        x[:, number] = values
    return x


def _carried_on(values: Array, rows: Rows) -> Array:
    """Fill NaN with the last value before it in the same sequence; those before the first stay."""
    places = np.where(np.isnan(values), rows.starts[rows.sequence], np.arange(len(values)))
    filled: Array = values[np.maximum.accumulate(places)]
    return filled


def _categories(
    table: Table, settings: DataSettings, rows: Rows, parts: Array, names: list[str]
) -> tuple[Array, list[Categorical]]:
    """Read features that are categories: (ids [rows, features] int64, what they are).

    Ids are given to what training rows hold; 0 is any other value, and an empty cell unless it is an error.
    """
    ids = np.zeros((len(rows.order), len(names)), dtype=np.int64)
    kinds = []
    taken = {"x", "y", LENGTHS}
    for number, name in enumerate(names):
        if settings.missing == "error":
            table.complete(name, "mend the cell, or say what it becomes with --missing mean or forward")
        texts = table.texts(name)[rows.order]
        if settings.missing == "forward":
            places = np.where(texts == "", rows.starts[rows.sequence], np.arange(len(texts)))
            texts = texts[np.maximum.accumulate(places)]
        known = sorted({*texts[parts == TRAIN].tolist()} - {""})
        if not known:
            raise table.fault("no training row has a value; leave the column out of --features", column=name)
        by_name = {text: each for each, text in enumerate(known, start=1)}
        ids[:, number] = [by_name.get(text, 0) for text in texts.tolist()]
        wire = name
        while wire in taken or wire.startswith("state."):
            wire = f"id_{wire}"
        taken.add(wire)
        spec = TensorSpec(
            name=wire,
            dtype="int64",
            layout=Layout.PER_STEP,
            description=f"category of {name!r}, by id; 0 is any that was not trained on",
            num_ids=len(known) + 1,
            categories=("", *known),
        )
        size = settings.embedding_size or min(MAX_EMBEDDING, (len(known) + 1) // 2)
        width = size if settings.encoding == "embedding" else len(known)
        kinds.append(Categorical(spec=spec, encoding=settings.encoding, width=width))
    return ids, kinds


def _split(
    part: int, rows: Rows, pieces: list[Piece], x: Array, ids: Array, asked: Asked, *, one_answer: bool
) -> Split:
    chosen = [piece for piece in pieces if piece.part == part]
    targets = [asked.values[rows.order[piece.targets]] for piece in chosen]
    return Split(
        inputs=tuple(x[piece.inputs] for piece in chosen),
        targets=tuple(np.asarray(each[0]) if one_answer else each for each in targets),
        ids=tuple(ids[piece.inputs] for piece in chosen) if ids.shape[1] else (),
    )


def _task(
    table: Table,
    settings: DataSettings,
    asked: Asked,
    numeric: list[str],
    categorical: list[Categorical],
    splits: list[Split],
    *,
    one_answer: bool,
) -> Task:
    target = ", ".join(map(repr, settings.target))
    later = f" {settings.horizon} step{'s' * (settings.horizon > 1)} later" if settings.horizon else ""
    what = f"the class {target}" if asked.labels else target
    per = "of a sequence" if one_answer else "at every step"
    probability = f"probability of each class of {target}{later}"
    train, validation, test = splits
    stem = settings.file.name.partition(".")[0]
    source = settings.saved() | {"sha256": table.digest}
    return Task(
        name=settings.name or re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-") or "data",
        summary=f"{what}{later} {per}",
        topology="many-to-one" if one_answer else "many-to-many",
        kind=asked.kind,
        data_set=f"{settings.file.name}, sha256 {table.digest[:16]}",
        license="",
        input=per_step("x", tuple(numeric), unit="", description="columns of the data file") if numeric else None,
        categorical=tuple(categorical),
        output=per_step(
            "y", asked.labels or settings.target, unit="", description=probability if asked.labels else what + later
        ),
        labels=asked.labels,
        class_weights=_class_weights(settings, asked, train),
        changes_of=tuple(numeric.index(name) for name in settings.changes_of),
        looks_ahead="what it is asked for is among the next steps' inputs"
        if settings.horizon and {*settings.target} & {*numeric, *(each.spec.name for each in categorical)}
        else "",
        source=source,
        train=train,
        validation=validation,
        test=test,
        recipe=Recipe(),
    )


def _class_weights(settings: DataSettings, asked: Asked, train: Split) -> tuple[float, ...]:
    """Weigh every class by the settings. Raises RecipeError."""
    if settings.class_weights is None:
        return ()
    if not asked.labels:
        raise RecipeError("class_weights are for a classification, and this is a regression")
    if settings.class_weights == "balanced":
        counts = np.bincount(np.concatenate([each.reshape(-1) for each in train.targets]), minlength=len(asked.labels))
        # A class that is nowhere has no weight to give.
        return tuple((counts.sum() / (len(counts) * np.maximum(counts, 1))).tolist())
    if unknown := sorted({*settings.class_weights} - {*asked.labels}):
        raise RecipeError(f"class_weights names {unknown[0]!r}, which is no class: {', '.join(asked.labels)}")
    return tuple(settings.class_weights.get(label, 1.0) for label in asked.labels)
