"""What the Open Inference Protocol tells of models: metadata, and configurations in Triton's form.

States and `lengths` are not listed, though a request may give them: load testers make up values for all that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from models.spec import Layout, StepMode, TensorSpec
from service.lane import Lane
from service.pb.inference import inference_pb2 as pb
from service.policies import Priority
from service.rpc.oip.contents import DATATYPES
from service.rpc.oip.generate import Described, MakePlan

PLATFORM, BACKEND = "onnxruntime_onnx", "onnxruntime"
EXTENSIONS = ("sequence", "schedule_policy", "model_configuration", "statistics", "model_repository", "parameters")
"""Triton's, that are there."""
ANY = -1
"""A dimension of any size."""


def metadata_of(lane: Lane, versions: Sequence[int]) -> pb.ModelMetadataResponse:
    """Describe the tensors of a model version."""
    message = pb.ModelMetadataResponse(
        name=lane.name, versions=[str(version) for version in versions], platform=PLATFORM
    )
    inputs, outputs = _tensors(lane)
    for name, datatype, dims in inputs:
        message.inputs.add(name=name, datatype=datatype, shape=(ANY, *dims))
    for name, datatype, dims in outputs:
        message.outputs.add(name=name, datatype=datatype, shape=(ANY, *dims))
    return message


def config_of(lane: Lane) -> pb.ModelConfig:
    """Describe how a model version is served."""
    settings = lane.settings
    config = pb.ModelConfig(
        name=lane.name, platform=PLATFORM, backend=BACKEND, max_batch_size=lane.scheduler.config.max_rows
    )
    inputs, outputs = _tensors(lane)
    for name, datatype, dims in inputs:
        config.input.add(name=name, data_type=_data_type(datatype), dims=dims)
    for name, datatype, dims in outputs:
        config.output.add(name=name, data_type=_data_type(datatype), dims=dims)
    config.model_transaction_policy.decoupled = lane.step_mode is StepMode.GENERATIVE
    if lane.step_mode not in (StepMode.STEPPING, StepMode.CHUNKED):
        config.dynamic_batching.priority_levels = len(Priority)
        config.dynamic_batching.default_priority_level = Priority.NORMAL + 1  # they count from 1
    else:
        config.sequence_batching.max_sequence_idle_microseconds = int(settings.sequence_idle_s * 1e6)
        config.sequence_batching.oldest.max_candidate_sequences = settings.max_sessions
    return config


def index_of(entries: Iterable[tuple[str, int, str, str]]) -> pb.RepositoryIndexResponse:
    """List (model, version, state, reason)."""
    response = pb.RepositoryIndexResponse()
    for name, version, state, reason in entries:
        response.models.add(name=name, version=str(version or ""), state=state, reason=reason)
    return response


def _tensors(lane: Lane) -> tuple[list[Described], list[Described]]:
    """Inputs and outputs of a model, as a request and its answer have them."""
    if lane.step_mode is StepMode.GENERATIVE:
        return MakePlan(lane).describe()
    inputs, outputs = (
        [(t.name, DATATYPES[t.dtype], _dims(t)) for t in tensors] for tensors in (lane.graph.inputs, lane.graph.outputs)
    )
    return inputs, outputs


def _dims(tensor: TensorSpec) -> tuple[int, ...]:
    """Shape of a tensor without the batch."""
    return (*((ANY,) if tensor.layout is Layout.PER_STEP else ()), *tensor.row_shape) or (1,)


def _data_type(datatype: str) -> pb.DataType:
    name = "STRING" if datatype == "BYTES" else datatype
    return pb.DataType.Value(f"TYPE_{name}")  # type: ignore[return-value]  # values are ints
