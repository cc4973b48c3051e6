"""Runs one model file with onnxruntime, and measures at load what batching does to its numbers.

The only importer of onnxruntime within the service.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from models.spec import (
    LENGTHS,
    METADATA_KEY,
    SOURCE_LENGTHS,
    GraphSpec,
    Layout,
    Spec,
    SpecError,
    parse_spec,
)
from service.errors import ConfigError, ModelBroken, RunFailed
from service.placement import CPU, Node, Placement

if TYPE_CHECKING:
    from service.adapter import Adapted

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about GPUs that can't be listed: the providers are checked below
    import onnxruntime as ort

Array = npt.NDArray[Any]

CUDA = "CUDAExecutionProvider"
PROVIDERS = {"cpu": [CPU], "cuda": [CUDA], "cuda,cpu": [CUDA, CPU]}
_ORT_TYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


def check_provider(provider: str) -> str:
    """Name the execution provider that will run. Raises ConfigError, saying what to install, where it is absent."""
    if present := _present(provider):
        return present[0]
    available = ", ".join(ort.get_available_providers())
    raise ConfigError(
        f"provider {provider!r} needs {PROVIDERS[provider][0]}, but this onnxruntime ({ort.__version__}) has only "
        f"{available}: pip uninstall onnxruntime, then pip install 'rnnserve[gpu]' on a machine with an NVIDIA driver; "
        "or serve with --provider cpu, or cuda,cpu to fall back",
        field="provider",
    )


class Backend:
    """One loaded model file."""

    def __init__(
        self,
        path: Path,
        *,
        provider: str = "cpu",
        device_id: int = 0,
        keeps_states: bool | None = None,
        encoder_of: Spec | None = None,
        adapted: Adapted | None = None,
    ) -> None:
        """Load a file and check that its graph is what its spec says.

        adapted       what is run in place of a file that was made elsewhere
        encoder_of    spec of the decoder whose encoder this file is; other files carry theirs
        device_id     number of the GPU
        keeps_states  whether states stay on the device; by default they do on a GPU, which a test has not
        Raises ModelBroken, with what is wrong, and ConfigError for an absent provider.
        """
        if check_provider(provider) == CUDA:
            ort.preload_dlls()  # the CUDA libraries that pip installed, which the loader does not look for by itself
        # TF32 rounds float32 to 10 bits before it multiplies: the numbers would not be the CPU's.
        cuda = {"device_id": device_id, "use_tf32": 0}
        self._providers = [(name, cuda if name == CUDA else {}) for name in _present(provider)]
        try:
            content = path.read_bytes() if adapted is None else adapted.content
        except OSError as error:
            raise ModelBroken(f"{path}: can't be read: {error.strerror}") from error
        try:
            self._session = self.open(content)
        except ModelBroken as error:
            raise ModelBroken(f"{path}: {error}") from error
        self.provider: str = self._session.get_providers()[0]
        if provider == "cuda" and self.provider != CUDA:
            raise ConfigError(
                "CUDA was asked for but did not start (see onnxruntime's message above): check the NVIDIA driver, the "
                "CUDA libraries and --device-id, or serve with --provider cuda,cpu to fall back",
                field="provider",
            )
        self.device = ("cuda", device_id) if self.provider == CUDA else ("cpu", 0)
        """Type and number of the device, as onnxruntime names them."""
        self.keeps_states = self.provider == CUDA if keeps_states is None else keeps_states
        """Whether the states of live sequences stay on the device from run to run."""
        self.placement = self.place(self._session)
        """Where the model's nodes run."""
        self.content = content
        """The file, which the session holds anyway."""
        self.digest = hashlib.sha256(content).hexdigest() if adapted is None else adapted.digest
        self.num_bytes = len(content)
        self.spec: Spec
        if adapted is not None:
            self.spec = adapted.spec
        elif encoder_of is None:
            try:
                self.spec = parse_spec(self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY))
            except SpecError as error:
                raise ModelBroken(f"{path}: {error}") from error
        else:
            self.spec = encoder_of
        self.graph: GraphSpec = self.spec.graph if encoder_of is None else self.spec.graphs[1]
        self.is_whole = not self.graph.is_causal or self.graph.fixed_steps is not None
        """Whether a sequence must not be cut."""
        if fault := self._mismatch():
            raise ModelBroken(f"{path}: the graph is not what its spec says: {fault}")
        self._output_names = [t.name for t in self.graph.outputs] + [s.next_name for s in self.graph.states]
        self._num_outputs = len(self.graph.outputs)
        self._per_step = {t.name for t in (*self.graph.inputs, *self.graph.outputs) if t.layout is Layout.PER_STEP}

    def run(
        self, inputs: Mapping[str, Array], lengths: Array, states: Sequence[Array]
    ) -> tuple[list[Array], list[Array]]:
        """Advance a batch.

        inputs   per-step ones [batch, time, *row shape], others as the spec says; those of a graph of fixed steps are
                 padded to them here, and its outputs cut again
        lengths  [batch] int32, each in 1..time
        states   [batch, directions, hidden] in the spec's order
        Returns (outputs in the spec's order, next states). Raises RunFailed.
        """
        fixed = self.graph.fixed_steps
        if fixed is not None:
            num_steps = max(inputs[name].shape[1] for name in inputs if name in self._per_step)
            inputs = {name: _padded(x, fixed) if name in self._per_step else x for name, x in inputs.items()}
        feeds: dict[str, Array] = {**inputs, LENGTHS: lengths}
        for state, value in zip(self.graph.states, states, strict=True):
            feeds[state.name] = value
        try:
            results = self._session.run(self._output_names, feeds)
        except Exception as error:
            raise run_failed(error) from error
        if fixed is not None:
            named = zip(self._output_names, results, strict=True)
            results = [y[:, :num_steps] if name in self._per_step else y for name, y in named]
        return results[: self._num_outputs], results[self._num_outputs :]

    def open(self, content: bytes) -> ort.InferenceSession:
        """Load a graph on this backend's provider. Raises ModelBroken."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1  # the runner splits a batch where that pays
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            return ort.InferenceSession(content, options, providers=self._providers)
        except Exception as error:  # its errors have no common base
            raise ModelBroken(f"onnxruntime can't load it: {_one_line(error)}") from error

    def place(self, session: ort.InferenceSession) -> Placement:
        """Say where the nodes of a graph that was opened here run."""
        nodes = [
            Node(node.name, f"{node.domain}.{node.op_type}" if node.domain else node.op_type, part.ep_name)
            for part in session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        ]
        return Placement(self.provider, nodes)

    def on_device(self, array: Array) -> ort.OrtValue:
        """Copy an array to the device; on the CPU, share its memory. Raises MemoryError."""
        try:
            return ort.OrtValue.ortvalue_from_numpy(array, *self.device)
        except Exception as error:
            raise MemoryError(f"{array.nbytes} bytes on {self.device}: {_one_line(error)}") from error

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Bound:
        """Bind buffers to every input, `lengths` and states included, and every output of a run of one shape.

        They must be contiguous and of the spec's dtypes, and stay where they are.
        """
        return Bound(self._session, inputs, outputs)

    def _mismatch(self) -> str | None:
        """Say how the graph differs from the spec, or None."""
        takes = {value.name: value for value in self._session.get_inputs()}
        gives = {value.name: value for value in self._session.get_outputs()}
        time = self.graph.fixed_steps or "time"
        declared = {t.name: (t.dtype, _shape(t.layout, t.row_shape, time)) for t in self.graph.inputs}
        declared |= {s.name: (s.dtype, _shape(Layout.PER_SEQUENCE, s.row_shape)) for s in self.graph.states}
        declared |= {n: ("int32", _shape(Layout.PER_SEQUENCE, ())) for n in (LENGTHS, SOURCE_LENGTHS)}
        if not self.graph.reads_source:
            del declared[SOURCE_LENGTHS]
        if takes.keys() != declared.keys():
            return f"inputs {sorted(takes)}, spec {sorted(declared)}"
        answered = {t.name: (t.dtype, _shape(t.layout, t.row_shape, time)) for t in self.graph.outputs}
        answered |= {s.next_name: (s.dtype, _shape(Layout.PER_SEQUENCE, s.row_shape)) for s in self.graph.states}
        if missing := answered.keys() - gives.keys():
            return f"outputs {sorted(missing)} are missing"
        for values, specs in ((takes, declared), (gives, answered)):
            for name, (dtype, shape) in specs.items():
                value = values[name]
                found = value.shape
                if found and self.spec.max_batch == 1 and found[0] == 1:
                    found = ["batch", *found[1:]]
                if _ORT_TYPES.get(value.type) != dtype or not _fits(found, shape):
                    return f"{name} is {value.type} {value.shape}, spec {dtype} {list(shape)}"
        return None


def run_once(path: Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Run a file as it is, once, on the CPU. Returns its outputs by name. Raises RunFailed."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(path, options, providers=[CPU])
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))
    except Exception as error:
        raise run_failed(error) from error


class Bound:
    """A run whose inputs and outputs are buffers known beforehand: no array is made, and no name looked up.

    It costs about half of Backend.run where the batch is small (I/O binding of onnxruntime).
    """

    def __init__(
        self, session: ort.InferenceSession, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._buffers = [*inputs.values(), *outputs.values()]  # only their addresses are known to onnxruntime
        for name, x in inputs.items():
            self._binding.bind_input(name, "cpu", 0, x.dtype.type, x.shape, x.ctypes.data)
        for name, y in outputs.items():
            self._binding.bind_output(name, "cpu", 0, y.dtype.type, y.shape, y.ctypes.data)

    def run(self) -> None:
        """Read the inputs and fill the outputs. Raises RunFailed."""
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise run_failed(error) from error


def _padded(x: Array, steps: int) -> Array:
    """Put zeros behind the steps of [batch, time, ...] until there are as many as a graph takes."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, steps - x.shape[1])
    return np.pad(x, padding)


def run_failed(error: Exception) -> RunFailed:
    """Say that onnxruntime failed, and how: its errors have no common base."""
    return RunFailed(f"onnxruntime failed: {_one_line(error)}")


def _present(provider: str) -> list[str]:
    """Execution providers of a setting that this onnxruntime has."""
    available = ort.get_available_providers()
    return [name for name in PROVIDERS[provider] if name in available]


def _shape(layout: Layout, row_shape: tuple[int, ...], time: str | int = "time") -> tuple[str | int, ...]:
    """Dimensions in the graph; those with a name must be dynamic."""
    leading: dict[Layout, tuple[str | int, ...]] = {
        Layout.PER_STEP: ("batch", time),
        Layout.PER_SEQUENCE: ("batch",),
        Layout.SHARED: (),
        Layout.PER_SOURCE_STEP: ("batch", "source time"),
    }
    return (*leading[layout], *row_shape)


def _fits(found: Sequence[str | int | None], wanted: tuple[str | int, ...]) -> bool:
    """Whether a graph's dimensions, as far as it knows them, are the wanted ones."""
    if not found:  # it does not know them
        return True
    return len(found) == len(wanted) and all(
        not isinstance(a, int) or a == b for a, b in zip(found, wanted, strict=True)
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
