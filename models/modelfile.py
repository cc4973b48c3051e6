"""A model file on its own: read and checked with onnxruntime alone, no torch and no onnx."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.checks import MAX_TOLERANCE, TOLERANCE, differ, random_cuts, run_in_chunks, without_padding
from models.errors import ModelFileError
from models.runtime import Array, Runtime
from models.spec import LENGTHS, METADATA_KEY, Golden, Layout, Spec, SpecError, StepMode, parse_spec

NUM_CHUNKS = 4
"""Chunks that a sequence is cut into to check that states carry on."""

_TYPES = {
    "float32": "tensor(float)",
    "float64": "tensor(double)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
    "bool": "tensor(bool)",
}


@dataclass(frozen=True, slots=True)
class Check:
    """One check of a file and how it went."""

    name: str
    """What was compared."""
    error: float
    """Largest difference, see Difference.scaled."""
    tolerance: float
    """Largest allowed."""
    worst: str
    """Output with the largest difference, and where in it."""

    @property
    def is_passed(self) -> bool:
        """Whether the difference is allowed."""
        return self.error <= self.tolerance


class ModelFile:
    """A model file, opened: its spec, its digest, and the model ready to run.

    Raises ModelFileError when it cannot be read, is damaged, carries no spec, or has other inputs or outputs than its
    spec says; MissingExtra without onnxruntime.
    """

    def __init__(self, path: Path, *, optimize: bool = True) -> None:
        self.path = path
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ModelFileError(f"{path}: {error.strerror}") from error
        try:
            self.runtime = Runtime(content, optimize=optimize)
            self.spec: Spec = parse_spec(self.runtime.metadata.get(METADATA_KEY))
            _compare_names(self.runtime, self.spec)
        except (ModelFileError, SpecError) as error:
            raise ModelFileError(f"{path}: {error}") from error
        self.size = len(content)
        self.digest = hashlib.sha256(content).hexdigest()

    def verify(self) -> list[Check]:
        """Run the golden inputs, and a random sequence whole and in chunks; returns a check for each.

        Raises ModelFileError when there is nothing to check by, or onnxruntime cannot run the file.
        """
        if not self.spec.golden:
            raise ModelFileError(f"{self.path}: it carries no golden inputs to check it by")
        checks = [
            self._against(f"golden input {number}", golden) for number, golden in enumerate(self.spec.golden, start=1)
        ]
        if self.spec.step_mode[0] is StepMode.STEPPING:
            checks.append(self._in_chunks())
        return checks

    def _against(self, name: str, golden: Golden) -> Check:
        inputs = {key: value.array() for key, value in golden.inputs.items()}
        expected = {key: value.array() for key, value in golden.outputs.items()}
        return self._check(name, self.runtime(inputs), expected, inputs[LENGTHS])

    def _in_chunks(self) -> Check:
        """Repeat golden inputs in time, so that there is something to cut; compare with the same run whole."""
        golden = {key: value.array() for key, value in self.spec.golden[0].inputs.items()}
        graph = self.spec.graph
        lengths = golden[LENGTHS] + np.int32(2 * NUM_CHUNKS)
        inputs = golden | {LENGTHS: lengths}
        for tensor in graph.inputs:
            if tensor.layout is Layout.PER_STEP:
                steps = np.arange(lengths.max()) % golden[tensor.name].shape[1]
                inputs[tensor.name] = golden[tensor.name][:, steps]
        cuts = random_cuts(np.random.default_rng(0), lengths, NUM_CHUNKS)
        found = run_in_chunks(self.runtime, graph, inputs, cuts)
        return self._check(f"{NUM_CHUNKS} chunks against whole", found, self.runtime(inputs), lengths)

    def _check(self, name: str, found: Mapping[str, Array], expected: Mapping[str, Array], lengths: Array) -> Check:
        found = without_padding(self.spec.graph, found, lengths)
        gaps = {
            output: differ(found[output], array)
            for output, array in without_padding(self.spec.graph, expected, lengths).items()
        }
        worst = max(gaps, key=lambda output: gaps[output].scaled)
        tolerance = min(max(self.spec.parity.tolerance, TOLERANCE), MAX_TOLERANCE)
        return Check(name, gaps[worst].scaled, tolerance, f"{worst} at {list(gaps[worst].where)}")


def _compare_names(runtime: Runtime, spec: Spec) -> None:
    """Check that the graph has the inputs and outputs that the spec says, of those types."""
    graph = spec.graph
    takes = {tensor.name: tensor.dtype for tensor in graph.inputs} | {LENGTHS: "int32"}
    takes |= {state.name: state.dtype for state in graph.states}
    gives = {tensor.name: tensor.dtype for tensor in graph.outputs}
    gives |= {state.next_name: state.dtype for state in graph.states}
    for what, said, there in (("inputs", takes, runtime.inputs), ("outputs", gives, runtime.outputs)):
        found = {name: kind for name, (kind, _) in there.items()}
        if found != {name: _TYPES[dtype] for name, dtype in said.items()}:
            raise ModelFileError(
                f"its spec names other {what} than its graph has: {', '.join(sorted(said))} "
                f"against {', '.join(sorted(found))}, or of other types"
            )
    for golden in spec.golden:
        if golden.inputs.keys() != takes.keys() or golden.outputs.keys() != gives.keys():
            raise ModelFileError("its golden inputs or outputs are not those of its graph")
