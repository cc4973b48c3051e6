"""torch.onnx.export, quietly and with errors of ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from models.errors import ExportError

OPSET = 18
"""All that the graphs need; above 21, recurrent operators have no CUDA kernels."""


def trace(
    module: nn.Module,
    arguments: Sequence[Tensor],
    *,
    axes: tuple[Any, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> onnx.ModelProto:
    """Trace a module; axes are the dynamic ones of its arguments. Raises ExportError."""
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                tuple(arguments),
                dynamo=True,
                dynamic_shapes=axes,
                input_names=list(input_names),
                output_names=list(output_names),
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"torch.onnx.export failed: {_why(error)}") from error
    if program is None:
        raise ExportError("torch.onnx.export made nothing")
    return program.model_proto


def strip(graph: onnx.GraphProto) -> None:
    """Leave out what only its maker needs of a graph, stack traces with paths among it."""
    graph.ClearField("value_info")
    for message in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        message.ClearField("metadata_props")
        message.ClearField("doc_string")


def _why(error: BaseException) -> str:
    """Say in a line what went wrong: the exporter's own errors are lists of advice around what caused them."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter says of its own insides, for as long as it runs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
