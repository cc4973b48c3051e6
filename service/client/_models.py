"""Model messages -> plain values. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType

from service.client._codec import DTYPE_BY_ENUM, LAYOUT_BY_ENUM, STEP_MODE_BY_ENUM
from service.client.info import BrokenModelInfo, GenerationInfo, ModelInfo, ModelList, StateInfo, TensorInfo
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb

_EXACTNESS_BY_ENUM = MappingProxyType(
    {pb.EXACTNESS_EXACT: "exact", pb.EXACTNESS_ROUNDING: "rounding", pb.EXACTNESS_COUPLED: "coupled"}
)


def model_info(model: pb.Model) -> ModelInfo:
    """Read one model version."""
    return ModelInfo(
        name=model.name,
        version=model.version,
        digest=model.digest,
        cell=model.cell,
        topology=model.topology,
        step_mode=STEP_MODE_BY_ENUM.get(model.step_mode, ""),
        step_mode_reason=model.step_mode_reason,
        inputs=_tensor_infos(model.inputs),
        outputs=_tensor_infos(model.outputs),
        states=tuple(StateInfo(s.name, DTYPE_BY_ENUM.get(s.dtype, ""), tuple(s.row_shape)) for s in model.states),
        labels=tuple(model.labels),
        vocabulary=tuple(model.vocabulary),
        task=model.task,
        metrics=dict(model.metrics),
        num_parameters=model.num_parameters,
        exactness=_EXACTNESS_BY_ENUM.get(model.exactness, ""),
        exactness_detail=model.exactness_detail,
        provider=model.provider,
        max_inflight_steps=model.max_inflight_steps,
        spec_json=model.spec_json,
        generation=_generation_info(model.generation) if model.HasField("generation") else None,
    )


def model_list(response: pb.ListModelsResponse) -> ModelList:
    """Read all model versions."""
    return ModelList(
        models=tuple(model_info(model) for model in response.models),
        broken=tuple(BrokenModelInfo(b.name, b.version, b.error) for b in response.broken),
    )


def _generation_info(message: pb.Generation) -> GenerationInfo:
    return GenerationInfo(
        max_steps=message.max_steps,
        token_input=message.token_input,
        source_inputs=tuple(message.source_inputs),
        begin_id=message.begin_id if message.HasField("begin_id") else None,
        end_id=message.end_id if message.HasField("end_id") else None,
        separator=message.separator,
    )


def _tensor_infos(specs: Iterable[pb.TensorSpec]) -> tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo(
            name=spec.name,
            dtype=DTYPE_BY_ENUM.get(spec.dtype, ""),
            row_shape=tuple(spec.row_shape),
            layout=LAYOUT_BY_ENUM.get(spec.layout, "per_step"),
            unit=spec.unit,
            description=spec.description,
            element_names=tuple(spec.element_names),
            categories=tuple(spec.categories),
        )
        for spec in specs
    )
