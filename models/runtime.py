"""onnxruntime, as far as checking a model needs it; torch-free, and onnx-free too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from models.errors import MissingExtra, ModelFileError

Array = np.ndarray[Any, Any]
Named = Mapping[str, Array]


class Runtime:
    """A model in onnxruntime on the CPU, on one thread."""

    def __init__(self, model: bytes, *, optimize: bool = True) -> None:
        """Load a model from the bytes of its file.

        Without optimize, onnxruntime leaves the graph as it is, which is enough to read it.
        Raises MissingExtra, and ModelFileError when onnxruntime cannot load it.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtra("this", package="onnxruntime", extra="cpu", purpose="runtime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # onnxruntime's exceptions have no base of their own; the first line is the one for people.
            raise ModelFileError(f"onnxruntime cannot load it: {str(error).splitlines()[0]}") from error
        self.version: str = onnxruntime.__version__
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.inputs = {v.name: (v.type, tuple(v.shape)) for v in self._session.get_inputs()}
        self.outputs = {v.name: (v.type, tuple(v.shape)) for v in self._session.get_outputs()}

    def __call__(self, inputs: Named) -> dict[str, Array]:
        """Run it once; returns every output by name. Raises ModelFileError when the run fails."""
        try:
            answers = self._session.run(list(self.outputs), dict(inputs))
        except Exception as error:
            raise ModelFileError(f"onnxruntime cannot run it: {str(error).splitlines()[0]}") from error
        return dict(zip(self.outputs, answers, strict=True))
