"""Serves models that were made elsewhere: what a model.toml says, checked against the graph, becomes a spec.

The graph itself is put into one that meets the contract of models/spec.py, in memory (service/wrapping.py).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from models.spec import GoldenArray, GraphSpec, Layout, Parity, Spec, StateSpec, TensorSpec, Training
from service.errors import ModelBroken
from service.fitting import Fit
from service.layouts import DTYPES, Lie, dtype_of
from service.modelfile import (
    DESCRIPTION_FILE,
    Description,
    InputEntry,
    faults_of,
    read_description,
)
from service.wrapping import CONTEXT, Wrapper

if TYPE_CHECKING:
    import onnx

_IR = 4
"""The first version of ONNX's format where initializers need not be inputs too."""


@dataclass(frozen=True)
class Adapted:
    """A model that was made elsewhere, as it is served."""

    content: bytes
    """The ONNX file that is run."""
    spec: Spec
    """What it is, as the file of an exported model would say."""
    digest: str
    """SHA-256 over the files that it was made of."""
    suspect: Description | None = None
    """What it is described by, where only a run tells whether an answer depends on steps to come."""


def adapt(path: Path, description: Description | None = None) -> Adapted:
    """Make what is run of a model file and what its model.toml says, or `description` instead of it.

    Raises ModelBroken, with what to change.
    """
    onnx = import_onnx()
    files = [path]
    if description is None:
        files.insert(0, path.with_name(DESCRIPTION_FILE))
        description = read_description(files[0])
    try:
        model = onnx.load(path, load_external_data=False)
        files += weight_files(model, path.parent)
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # of the file system, of protobuf, of the checker
        raise ModelBroken(f"{path}: onnx can't read it: {error}") from error
    try:
        builder = _Builder(model, description, path.parent)
        content, spec = builder.build()
        digest = _digest_of([*files, *sorted(builder.files)])
    except ModelBroken as error:
        raise ModelBroken(f"{path.parent}: {error}") from error
    except Exception as error:  # whatever is wrong with this file, the others are served
        raise ModelBroken(f"{path.parent}: it can't be adapted: {type(error).__name__}: {error}") from error
    return Adapted(content, spec, digest, description if builder.may_look_ahead else None)


def weight_files(model: onnx.ModelProto, folder: Path) -> list[Path]:
    """List the files that a model's weights lie in, beside its own; the model is loaded without them."""
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    tensors = (each for each in _get_all_tensors(model) if uses_external_data(each))
    return sorted(
        {folder / each.value for tensor in tensors for each in tensor.external_data if each.key == "location"}
    )


def _digest_of(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for each in files:
        with each.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def import_onnx() -> Any:
    """Import onnx. Raises ModelBroken that says what to install where it is absent."""
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ModelBroken(
            f"a model with a {DESCRIPTION_FILE} needs the package onnx: pip install onnx, or 'rnnserve[cpu]'"
        ) from error
    return onnx


class _Builder:
    def __init__(self, model: onnx.ModelProto, description: Description, folder: Path) -> None:
        import onnx

        self._onnx = onnx
        self._model = model
        self._graph = model.graph
        self._says = description
        self._folder = folder
        self.files: set[Path] = set()
        """Files that it was made of beside the model's."""
        self._fit = Fit(model, description)
        self._takes, self._gives = self._fit.takes, self._fit.gives
        self.may_look_ahead = False
        """Whether only a run tells that steps are answered by what was before."""

    def build(self) -> tuple[bytes, Spec]:
        """Make (the file, its spec). Raises ModelBroken."""
        inputs, outputs, states = self._fit.tensors()
        self.may_look_ahead = self._fit.may_look_ahead
        try:
            spec = self._spec(inputs, outputs, states)
        except ValidationError as error:
            raise ModelBroken(f"{DESCRIPTION_FILE}: {faults_of(error)}") from error
        wrapper = Wrapper(self._onnx, self._graph, self._says, self._takes, self._gives)
        model = self._onnx.ModelProto(
            ir_version=max(self._model.ir_version, _IR),
            opset_import=self._model.opset_import,
            functions=self._model.functions,
        )
        wrapper.wrap(inputs, outputs, states, model.graph)
        try:
            return model.SerializeToString(), spec
        except Exception as error:  # protobuf's, past 2 GiB
            raise ModelBroken(f"with its weights in one file it is too large: {error}") from error

    def _spec(self, inputs: Mapping[str, Lie], outputs: Mapping[str, Lie], states: Mapping[str, Lie]) -> Spec:
        says = self._says
        chunks = {says.inputs[name].chunk or each.entries for name, each in inputs.items()} - {None}
        kept = tuple(
            StateSpec(
                name=f"{CONTEXT}{name}",
                next_name=f"{CONTEXT}{name}.next",
                dtype=dtype_of(self._takes[name], f"inputs.{name}"),
                row_shape=(entry.context, *inputs[name].rest),
            )
            for name, entry in says.inputs.items()
            if entry.context
        )
        graph = GraphSpec(
            chunk=min((each for each in chunks if each is not None), default=None),
            inputs=tuple(
                TensorSpec(
                    name=name,
                    dtype=dtype_of(self._takes[name], f"inputs.{name}"),
                    row_shape=each.row,
                    layout=_layout_of(says.inputs[name].per),
                    **_facts(says.inputs[name]),
                )
                for name, each in inputs.items()
            ),
            outputs=tuple(
                TensorSpec(
                    name=says.answered(name),
                    dtype=dtype_of(self._gives[name], f"outputs.{name}"),
                    row_shape=each.row,
                    layout=_layout_of(says.outputs[name].per),
                    **_facts(says.outputs[name]),
                )
                for name, each in outputs.items()
            ),
            states=tuple(self._state_spec(name, each) for name, each in states.items()) + kept,
            looks_ahead=self._fit.looks_ahead,
            operators=dict(Counter(node.op_type for node in self._graph.node)),
        )
        is_last = all(each.layout is Layout.PER_SEQUENCE for each in graph.outputs)
        return Spec(
            topology="many-to-one" if is_last or says.labels else "many-to-many",
            num_parameters=_num_parameters(self._model),
            graphs=(graph,),
            max_batch=says.max_batch,
            labels=says.labels,
            training=Training(task="adopted", data_set="unknown: the model was made elsewhere"),
            versions={"producer": " ".join((self._model.producer_name, self._model.producer_version)).strip()},
            parity=Parity(max_abs_error=0.0, tolerance=0.0, num_cases=0),
        )

    def _state_spec(self, name: str, layout: Lie) -> StateSpec:
        entry = self._says.states[name]
        dtype = dtype_of(self._takes[name], f"states.{name}")
        begins = None
        if entry.initial != "zeros":
            path = self._folder / entry.initial
            if path.name != entry.initial or path.suffix != ".npy":
                raise ModelBroken(
                    f'states.{name}.initial: expected "zeros" or the name of a .npy file beside {DESCRIPTION_FILE}'
                )
            try:
                with path.open("rb") as file:
                    row = np.lib.format.read_array(file, allow_pickle=False)
            except Exception as error:  # numpy's have no common base
                raise ModelBroken(f"states.{name}.initial: {path.name} can't be read: {error}") from error
            if row.shape != layout.rest or row.dtype != dtype:
                raise ModelBroken(
                    f"states.{name}.initial: {path.name} is {row.dtype} {list(row.shape)}, the state {dtype} "
                    f"{list(layout.rest)}"
                )
            self.files.add(path)
            begins = GoldenArray.of(row)
        return StateSpec(
            name=name, next_name=self._says.next_of(name), dtype=dtype, row_shape=layout.rest, begins=begins
        )


def _num_parameters(model: onnx.ModelProto) -> int:
    """Count the numbers of a model's weights: those of its branches and its constants too, but no sizes and axes."""
    from onnx.external_data_helper import _get_all_tensors

    tensors = (each for each in _get_all_tensors(model) if DTYPES.get(each.data_type) not in ("int64", "int32", "bool"))
    return sum(int(np.prod(each.dims)) for each in tensors)


def _layout_of(per: str) -> Layout:
    return Layout.PER_STEP if per == "step" else Layout.PER_SEQUENCE


def _facts(entry: Any) -> dict[str, Any]:
    facts = {"unit": entry.unit, "description": entry.description, "element_names": entry.element_names}
    return facts | ({"num_ids": entry.num_ids} if isinstance(entry, InputEntry) else {})
