"""Keras models that are saved, imported and asked both ways: by Keras itself, and by onnxruntime."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
from keras import layers

from models.export import write_version
from models.importers.keras_model import Names, import_keras
from models.modelfile import ModelFile
from models.spec import LENGTHS, Layout, StepMode

FEATURES = 3


def saved(model, folder: Path) -> Path:
    """Give every weight a value, zeros and ones of fresh layers too, and save the model."""
    rng = np.random.default_rng(7)
    for variable in model.variables:
        if "seed" in variable.path or "int" in variable.dtype:
            continue
        values = rng.normal(scale=0.4, size=variable.shape)
        variable.assign(np.abs(values) + 0.3 if "variance" in variable.path else values)
    path = folder / "model.keras"
    model.save(path)
    return path


def sequential(*stack, features=FEATURES):
    """A Sequential over [time, features]."""
    return keras.Sequential([layers.Input((None, features)), *stack])


def functional(first, *stack):
    """A functional chain."""
    x = first
    for layer in stack:
        x = layer(x)
    return keras.Model(first, x)


def imported(path: Path, folder: Path, names: Names | None = None) -> ModelFile:
    """Import a file into a repository, and check what `rnnserve verify` checks."""
    files, _ = import_keras(path, names or Names())
    model = ModelFile(write_version(files, folder / "repository", "m"))
    assert all(check.is_passed for check in model.verify())
    return model


def sequences(model: ModelFile, *, seed: int = 0):
    """Three ragged sequences of what the model takes."""
    rng = np.random.default_rng(seed)
    tensor = model.spec.graph.inputs[0]
    lengths = (7, 1, 4)
    if tensor.num_ids:
        return [rng.integers(1, tensor.num_ids, size=n) for n in lengths]
    return [rng.normal(size=(n, *tensor.row_shape)).astype(np.float32) for n in lengths]


def served(model: ModelFile, rows):
    """Answers of onnxruntime to a ragged batch, from zero states: for each row, [length, ...] or [...]."""
    graph = model.spec.graph
    tensor, answer = graph.inputs[0], graph.outputs[0]
    lengths = np.array([len(row) for row in rows], np.int32)
    # What padding holds must not matter.
    x = np.full((len(rows), lengths.max(), *tensor.row_shape), 1 if tensor.num_ids else 99, tensor.dtype)
    for padded, row in zip(x, rows, strict=True):
        padded[: len(row)] = row
    states = {state.name: np.zeros((len(rows), *state.row_shape), np.float32) for state in graph.states}
    y = model.runtime({tensor.name: x, LENGTHS: lengths} | states)[answer.name]
    return list(y) if answer.layout is Layout.PER_SEQUENCE else [each[:n] for each, n in zip(y, lengths, strict=True)]


def assert_equal_to_keras(model, file: ModelFile):
    """Each sequence alone in Keras, against all of them in one ragged batch here; running answers at every step."""
    rows = sequences(file)
    is_running = file.spec.topology == "many-to-one" and file.spec.graph.outputs[0].layout is Layout.PER_STEP
    assert is_running == (file.spec.topology == "many-to-one" and file.spec.step_mode[0] is StepMode.STEPPING)
    for row, answer in zip(rows, served(file, rows), strict=True):
        asked = [ask(model, row[: n + 1]) for n in range(len(row))] if is_running else ask(model, row)
        np.testing.assert_allclose(answer, np.asarray(asked), atol=1e-5, rtol=1e-5)


def ask(model, row):
    """Keras' answer to one sequence."""
    return np.asarray(model.predict(row[None], verbose=0))[0]
