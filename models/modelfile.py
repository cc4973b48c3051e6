"""A model file on its own: read and checked with onnxruntime alone, no torch and no onnx."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.checks import TOLERANCE, differ, random_cuts, run_in_chunks, widest_tolerance, without_padding
from models.errors import ModelFileError
from models.runtime import Array, Runtime
from models.spec import LENGTHS, METADATA_KEY, Golden, GraphSpec, Layout, Spec, SpecError, parse_spec

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
    """A model, opened from its MODEL_FILE: its spec, its digest, and every graph ready to run.

    Raises ModelFileError when a file cannot be read, is damaged, carries no spec, or has other inputs or outputs than
    its spec says; MissingExtra without onnxruntime.
    """

    def __init__(self, path: Path, *, optimize: bool = True) -> None:
        self.path = path
        content = _read(path)
        try:
            self.runtime = Runtime(content, optimize=optimize)
            self.spec: Spec = parse_spec(self.runtime.metadata.get(METADATA_KEY))
        except (ModelFileError, SpecError) as error:
            if isinstance(error, SpecError) and path.with_name("model.toml").is_file():
                raise ModelFileError(
                    f"{path}: the model.toml beside it says what it is, to a server: `rnnserve doctor --repository "
                    "REPOSITORY` tries it, and `rnnserve models NAME` describes it once it is served"
                ) from error
            raise ModelFileError(f"{path}: {error}") from error
        self.size = len(content)
        """Bytes of all its files."""
        self.digest = hashlib.sha256(content).hexdigest()
        """Of MODEL_FILE, which names the digests of the others."""
        self.runtimes = [self.runtime]
        for graph in self.spec.graphs[1:]:
            beside = path.parent / graph.file
            content = _read(beside)
            self.size += len(content)
            if hashlib.sha256(content).hexdigest() != graph.sha256:
                raise ModelFileError(f"{beside} is not the {graph.role} that {path} was exported with: export it again")
            self.runtimes.append(Runtime(content, optimize=optimize))
        for runtime, graph in zip(self.runtimes, self.spec.graphs, strict=True):
            _compare_names(runtime, graph, path.parent / graph.file if graph.sha256 else path)
        for golden in self.spec.golden:
            if golden.graph >= len(self.spec.graphs) or not _is_of(golden, self.spec.graphs[golden.graph]):
                raise ModelFileError(f"{path}: its golden inputs or outputs are not those of its graph")

    def verify(self) -> list[Check]:
        """Run the golden inputs, and causal graphs whole and in chunks; returns a check for each.

        Raises ModelFileError when there is nothing to check by, or onnxruntime cannot run the file.
        """
        if not self.spec.golden:
            raise ModelFileError(f"{self.path}: it carries no golden inputs to check it by")
        checks = [self._against(number, golden) for number, golden in enumerate(self.spec.golden, start=1)]
        # What scales are measured over is a whole run: cutting it changes the answers, as such a file says.
        is_cut = self.spec.quantization is None or self.spec.quantization.is_exact
        for number, graph in enumerate(self.spec.graphs if is_cut else ()):
            if graph.is_causal and graph.fixed_steps is None and graph.role != "encoder":
                checks += [self._in_chunks(golden) for golden in self.spec.golden if golden.graph == number][:1]
        return checks

    def _against(self, number: int, golden: Golden) -> Check:
        inputs = {key: value.array() for key, value in golden.inputs.items()}
        expected = {key: value.array() for key, value in golden.outputs.items()}
        of = "" if len(self.spec.graphs) == 1 else f" of the {self.spec.graphs[golden.graph].role}"
        found = self.runtimes[golden.graph](inputs)
        return self._check(f"golden input {number}{of}", golden.graph, found, expected, inputs[LENGTHS])

    def _in_chunks(self, of: Golden) -> Check:
        """Repeat golden inputs in time, so that there is something to cut; compare with the same run whole."""
        golden = {key: value.array() for key, value in of.inputs.items()}
        graph, runtime = self.spec.graphs[of.graph], self.runtimes[of.graph]
        lengths = golden[LENGTHS] + np.int32(2 * NUM_CHUNKS)
        inputs = golden | {LENGTHS: lengths}
        for tensor in graph.inputs:
            if tensor.layout is Layout.PER_STEP:
                steps = np.arange(lengths.max()) % golden[tensor.name].shape[1]
                inputs[tensor.name] = golden[tensor.name][:, steps]
        cuts = random_cuts(np.random.default_rng(0), lengths, NUM_CHUNKS)
        found = run_in_chunks(runtime, graph, inputs, cuts)
        return self._check(f"{NUM_CHUNKS} chunks against whole", of.graph, found, runtime(inputs), lengths)

    def _check(
        self, name: str, number: int, found: Mapping[str, Array], expected: Mapping[str, Array], lengths: Array
    ) -> Check:
        graph = self.spec.graphs[number]
        found = without_padding(graph, found, lengths)
        gaps = {
            output: differ(found[output], array) for output, array in without_padding(graph, expected, lengths).items()
        }
        worst = max(gaps, key=lambda output: gaps[output].scaled)
        tolerance = min(max(self.spec.parity.tolerance, TOLERANCE), widest_tolerance(self.spec.quantization))
        return Check(name, gaps[worst].scaled, tolerance, f"{worst} at {list(gaps[worst].where)}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror}") from error


def _compare_names(runtime: Runtime, graph: GraphSpec, path: Path) -> None:
    """Check that a graph has the inputs and outputs that the spec says, of those types."""
    takes = dict.fromkeys(graph.input_names, "int32") | {tensor.name: tensor.dtype for tensor in graph.inputs}
    takes |= {state.name: state.dtype for state in graph.states}
    gives = {tensor.name: tensor.dtype for tensor in graph.outputs}
    gives |= {state.next_name: state.dtype for state in graph.states}
    for what, said, there in (("inputs", takes, runtime.inputs), ("outputs", gives, runtime.outputs)):
        found = {name: kind for name, (kind, _) in there.items()}
        if found != {name: _TYPES[dtype] for name, dtype in said.items()}:
            raise ModelFileError(
                f"{path}: its spec names other {what} than its graph has: {', '.join(sorted(said))} "
                f"against {', '.join(sorted(found))}, or of other types"
            )


def _is_of(golden: Golden, graph: GraphSpec) -> bool:
    return golden.inputs.keys() == set(graph.input_names) and golden.outputs.keys() == set(graph.output_names)
