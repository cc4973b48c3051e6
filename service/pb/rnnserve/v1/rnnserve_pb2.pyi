from google.protobuf import duration_pb2 as _duration_pb2
from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_INT64: _ClassVar[DataType]
    DATA_TYPE_INT32: _ClassVar[DataType]
    DATA_TYPE_FLOAT64: _ClassVar[DataType]
    DATA_TYPE_BOOL: _ClassVar[DataType]

class Layout(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAYOUT_UNSPECIFIED: _ClassVar[Layout]
    LAYOUT_PER_STEP: _ClassVar[Layout]
    LAYOUT_PER_SEQUENCE: _ClassVar[Layout]
    LAYOUT_SHARED: _ClassVar[Layout]

class Emit(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EMIT_UNSPECIFIED: _ClassVar[Emit]
    EMIT_ALL: _ClassVar[Emit]
    EMIT_LAST: _ClassVar[Emit]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_HIGH: _ClassVar[Priority]
    PRIORITY_NORMAL: _ClassVar[Priority]
    PRIORITY_LOW: _ClassVar[Priority]

class StepMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STEP_MODE_UNSPECIFIED: _ClassVar[StepMode]
    STEP_MODE_STEPPING: _ClassVar[StepMode]
    STEP_MODE_CHUNKED: _ClassVar[StepMode]
    STEP_MODE_BUFFERED: _ClassVar[StepMode]
    STEP_MODE_GENERATIVE: _ClassVar[StepMode]

class Exactness(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXACTNESS_UNSPECIFIED: _ClassVar[Exactness]
    EXACTNESS_EXACT: _ClassVar[Exactness]
    EXACTNESS_ROUNDING: _ClassVar[Exactness]
    EXACTNESS_COUPLED: _ClassVar[Exactness]

class CloseReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CLOSE_REASON_UNSPECIFIED: _ClassVar[CloseReason]
    CLOSE_REASON_CLIENT: _ClassVar[CloseReason]
    CLOSE_REASON_EXPIRED: _ClassVar[CloseReason]
    CLOSE_REASON_TAKEN_OVER: _ClassVar[CloseReason]
    CLOSE_REASON_FAILED: _ClassVar[CloseReason]

class StepErrorKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STEP_ERROR_KIND_UNSPECIFIED: _ClassVar[StepErrorKind]
    STEP_ERROR_KIND_STEP_REJECTED: _ClassVar[StepErrorKind]
    STEP_ERROR_KIND_SESSION_FAILED: _ClassVar[StepErrorKind]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_END: _ClassVar[FinishReason]
    FINISH_REASON_MAX_STEPS: _ClassVar[FinishReason]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_INT64: DataType
DATA_TYPE_INT32: DataType
DATA_TYPE_FLOAT64: DataType
DATA_TYPE_BOOL: DataType
LAYOUT_UNSPECIFIED: Layout
LAYOUT_PER_STEP: Layout
LAYOUT_PER_SEQUENCE: Layout
LAYOUT_SHARED: Layout
EMIT_UNSPECIFIED: Emit
EMIT_ALL: Emit
EMIT_LAST: Emit
PRIORITY_UNSPECIFIED: Priority
PRIORITY_HIGH: Priority
PRIORITY_NORMAL: Priority
PRIORITY_LOW: Priority
STEP_MODE_UNSPECIFIED: StepMode
STEP_MODE_STEPPING: StepMode
STEP_MODE_CHUNKED: StepMode
STEP_MODE_BUFFERED: StepMode
STEP_MODE_GENERATIVE: StepMode
EXACTNESS_UNSPECIFIED: Exactness
EXACTNESS_EXACT: Exactness
EXACTNESS_ROUNDING: Exactness
EXACTNESS_COUPLED: Exactness
CLOSE_REASON_UNSPECIFIED: CloseReason
CLOSE_REASON_CLIENT: CloseReason
CLOSE_REASON_EXPIRED: CloseReason
CLOSE_REASON_TAKEN_OVER: CloseReason
CLOSE_REASON_FAILED: CloseReason
STEP_ERROR_KIND_UNSPECIFIED: StepErrorKind
STEP_ERROR_KIND_STEP_REJECTED: StepErrorKind
STEP_ERROR_KIND_SESSION_FAILED: StepErrorKind
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_END: FinishReason
FINISH_REASON_MAX_STEPS: FinishReason

class Tensor(_message.Message):
    __slots__ = ("name", "dtype", "shape", "layout", "lengths", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    layout: Layout
    lengths: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., layout: _Optional[_Union[Layout, str]] = ..., lengths: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "broken")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    BROKEN_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    broken: _containers.RepeatedCompositeFieldContainer[BrokenModel]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., broken: _Optional[_Iterable[_Union[BrokenModel, _Mapping]]] = ...) -> None: ...

class BrokenModel(_message.Message):
    __slots__ = ("name", "version", "error")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    error: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: Model
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("name", "dtype", "row_shape", "layout", "unit", "description", "element_names", "categories")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ROW_SHAPE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_NAMES_FIELD_NUMBER: _ClassVar[int]
    CATEGORIES_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: DataType
    row_shape: _containers.RepeatedScalarFieldContainer[int]
    layout: Layout
    unit: str
    description: str
    element_names: _containers.RepeatedScalarFieldContainer[str]
    categories: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[DataType, str]] = ..., row_shape: _Optional[_Iterable[int]] = ..., layout: _Optional[_Union[Layout, str]] = ..., unit: _Optional[str] = ..., description: _Optional[str] = ..., element_names: _Optional[_Iterable[str]] = ..., categories: _Optional[_Iterable[str]] = ...) -> None: ...

class StateSpec(_message.Message):
    __slots__ = ("name", "dtype", "row_shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ROW_SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: DataType
    row_shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[DataType, str]] = ..., row_shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "version", "digest", "cell", "topology", "step_mode", "step_mode_reason", "inputs", "outputs", "states", "labels", "vocabulary", "task", "metrics", "num_parameters", "exactness", "exactness_detail", "provider", "max_inflight_steps", "spec_json", "placement", "generation")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CELL_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    STEP_MODE_FIELD_NUMBER: _ClassVar[int]
    STEP_MODE_REASON_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    EXACTNESS_FIELD_NUMBER: _ClassVar[int]
    EXACTNESS_DETAIL_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    MAX_INFLIGHT_STEPS_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    digest: str
    cell: str
    topology: str
    step_mode: StepMode
    step_mode_reason: str
    inputs: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    outputs: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    states: _containers.RepeatedCompositeFieldContainer[StateSpec]
    labels: _containers.RepeatedScalarFieldContainer[str]
    vocabulary: _containers.RepeatedScalarFieldContainer[str]
    task: str
    metrics: _containers.ScalarMap[str, float]
    num_parameters: int
    exactness: Exactness
    exactness_detail: str
    provider: str
    max_inflight_steps: int
    spec_json: str
    placement: _containers.RepeatedCompositeFieldContainer[PlacedNodes]
    generation: Generation
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., cell: _Optional[str] = ..., topology: _Optional[str] = ..., step_mode: _Optional[_Union[StepMode, str]] = ..., step_mode_reason: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., outputs: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., states: _Optional[_Iterable[_Union[StateSpec, _Mapping]]] = ..., labels: _Optional[_Iterable[str]] = ..., vocabulary: _Optional[_Iterable[str]] = ..., task: _Optional[str] = ..., metrics: _Optional[_Mapping[str, float]] = ..., num_parameters: _Optional[int] = ..., exactness: _Optional[_Union[Exactness, str]] = ..., exactness_detail: _Optional[str] = ..., provider: _Optional[str] = ..., max_inflight_steps: _Optional[int] = ..., spec_json: _Optional[str] = ..., placement: _Optional[_Iterable[_Union[PlacedNodes, _Mapping]]] = ..., generation: _Optional[_Union[Generation, _Mapping]] = ...) -> None: ...

class Generation(_message.Message):
    __slots__ = ("max_steps", "token_input", "source_inputs", "begin_id", "end_id", "separator")
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_INPUT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_INPUTS_FIELD_NUMBER: _ClassVar[int]
    BEGIN_ID_FIELD_NUMBER: _ClassVar[int]
    END_ID_FIELD_NUMBER: _ClassVar[int]
    SEPARATOR_FIELD_NUMBER: _ClassVar[int]
    max_steps: int
    token_input: str
    source_inputs: _containers.RepeatedScalarFieldContainer[str]
    begin_id: int
    end_id: int
    separator: str
    def __init__(self, max_steps: _Optional[int] = ..., token_input: _Optional[str] = ..., source_inputs: _Optional[_Iterable[str]] = ..., begin_id: _Optional[int] = ..., end_id: _Optional[int] = ..., separator: _Optional[str] = ...) -> None: ...

class PlacedNodes(_message.Message):
    __slots__ = ("op_type", "provider", "count", "fallback_names")
    OP_TYPE_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_NAMES_FIELD_NUMBER: _ClassVar[int]
    op_type: str
    provider: str
    count: int
    fallback_names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, op_type: _Optional[str] = ..., provider: _Optional[str] = ..., count: _Optional[int] = ..., fallback_names: _Optional[_Iterable[str]] = ...) -> None: ...

class PredictRequest(_message.Message):
    __slots__ = ("model", "version", "inputs", "outputs", "emit", "return_state", "priority")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    EMIT_FIELD_NUMBER: _ClassVar[int]
    RETURN_STATE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    inputs: _containers.RepeatedCompositeFieldContainer[Tensor]
    outputs: _containers.RepeatedScalarFieldContainer[str]
    emit: Emit
    return_state: bool
    priority: Priority
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ..., inputs: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., outputs: _Optional[_Iterable[str]] = ..., emit: _Optional[_Union[Emit, str]] = ..., return_state: bool = ..., priority: _Optional[_Union[Priority, str]] = ...) -> None: ...

class PredictResponse(_message.Message):
    __slots__ = ("model", "version", "digest", "outputs")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    digest: str
    outputs: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., outputs: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class StreamPredictRequest(_message.Message):
    __slots__ = ("open", "frame")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    open: StreamOpen
    frame: StreamFrame
    def __init__(self, open: _Optional[_Union[StreamOpen, _Mapping]] = ..., frame: _Optional[_Union[StreamFrame, _Mapping]] = ...) -> None: ...

class StreamOpen(_message.Message):
    __slots__ = ("model", "version", "outputs", "emit", "step_mode", "sessions")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    EMIT_FIELD_NUMBER: _ClassVar[int]
    STEP_MODE_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    outputs: _containers.RepeatedScalarFieldContainer[str]
    emit: Emit
    step_mode: StepMode
    sessions: _containers.RepeatedCompositeFieldContainer[SessionOpen]
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ..., outputs: _Optional[_Iterable[str]] = ..., emit: _Optional[_Union[Emit, str]] = ..., step_mode: _Optional[_Union[StepMode, str]] = ..., sessions: _Optional[_Iterable[_Union[SessionOpen, _Mapping]]] = ...) -> None: ...

class SessionOpen(_message.Message):
    __slots__ = ("session_id", "linger", "replay_window", "resume_only", "priority")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LINGER_FIELD_NUMBER: _ClassVar[int]
    REPLAY_WINDOW_FIELD_NUMBER: _ClassVar[int]
    RESUME_ONLY_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    linger: _duration_pb2.Duration
    replay_window: int
    resume_only: bool
    priority: Priority
    def __init__(self, session_id: _Optional[str] = ..., linger: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., replay_window: _Optional[int] = ..., resume_only: bool = ..., priority: _Optional[_Union[Priority, str]] = ...) -> None: ...

class StreamFrame(_message.Message):
    __slots__ = ("handles", "positions", "lengths", "tensors", "opens", "closes", "timeout", "acked_positions")
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    OPENS_FIELD_NUMBER: _ClassVar[int]
    CLOSES_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    ACKED_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    handles: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    opens: _containers.RepeatedCompositeFieldContainer[SessionOpen]
    closes: _containers.RepeatedScalarFieldContainer[int]
    timeout: _duration_pb2.Duration
    acked_positions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, handles: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., opens: _Optional[_Iterable[_Union[SessionOpen, _Mapping]]] = ..., closes: _Optional[_Iterable[int]] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., acked_positions: _Optional[_Iterable[int]] = ...) -> None: ...

class StreamPredictResponse(_message.Message):
    __slots__ = ("opened", "answer", "drain")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    opened: StreamOpened
    answer: StreamAnswer
    drain: StreamDrain
    def __init__(self, opened: _Optional[_Union[StreamOpened, _Mapping]] = ..., answer: _Optional[_Union[StreamAnswer, _Mapping]] = ..., drain: _Optional[_Union[StreamDrain, _Mapping]] = ...) -> None: ...

class StreamOpened(_message.Message):
    __slots__ = ("model", "version", "digest", "step_mode", "max_inflight_steps", "sessions")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STEP_MODE_FIELD_NUMBER: _ClassVar[int]
    MAX_INFLIGHT_STEPS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    digest: str
    step_mode: StepMode
    max_inflight_steps: int
    sessions: _containers.RepeatedCompositeFieldContainer[SessionOpened]
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., step_mode: _Optional[_Union[StepMode, str]] = ..., max_inflight_steps: _Optional[int] = ..., sessions: _Optional[_Iterable[_Union[SessionOpened, _Mapping]]] = ...) -> None: ...

class StreamAnswer(_message.Message):
    __slots__ = ("handles", "positions", "lengths", "tensors", "opened", "closed", "errors")
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    handles: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    opened: _containers.RepeatedCompositeFieldContainer[SessionOpened]
    closed: _containers.RepeatedCompositeFieldContainer[SessionClosed]
    errors: _containers.RepeatedCompositeFieldContainer[StepError]
    def __init__(self, handles: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., opened: _Optional[_Iterable[_Union[SessionOpened, _Mapping]]] = ..., closed: _Optional[_Iterable[_Union[SessionClosed, _Mapping]]] = ..., errors: _Optional[_Iterable[_Union[StepError, _Mapping]]] = ...) -> None: ...

class SessionOpened(_message.Message):
    __slots__ = ("handle", "session_id", "position", "resumed", "status")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    session_id: str
    position: int
    resumed: bool
    status: _status_pb2.Status
    def __init__(self, handle: _Optional[int] = ..., session_id: _Optional[str] = ..., position: _Optional[int] = ..., resumed: bool = ..., status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class SessionClosed(_message.Message):
    __slots__ = ("handle", "position", "reason")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    handle: int
    position: int
    reason: CloseReason
    def __init__(self, handle: _Optional[int] = ..., position: _Optional[int] = ..., reason: _Optional[_Union[CloseReason, str]] = ...) -> None: ...

class StepError(_message.Message):
    __slots__ = ("handle", "position", "length", "kind", "status", "expected_position")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_POSITION_FIELD_NUMBER: _ClassVar[int]
    handle: int
    position: int
    length: int
    kind: StepErrorKind
    status: _status_pb2.Status
    expected_position: int
    def __init__(self, handle: _Optional[int] = ..., position: _Optional[int] = ..., length: _Optional[int] = ..., kind: _Optional[_Union[StepErrorKind, str]] = ..., status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., expected_position: _Optional[int] = ...) -> None: ...

class StreamDrain(_message.Message):
    __slots__ = ("grace",)
    GRACE_FIELD_NUMBER: _ClassVar[int]
    grace: _duration_pb2.Duration
    def __init__(self, grace: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("model", "version", "inputs", "seeds", "max_steps", "temperature", "top_k", "top_p", "beams", "num_hypotheses", "length_normalization", "outputs", "priority", "timeout")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    BEAMS_FIELD_NUMBER: _ClassVar[int]
    NUM_HYPOTHESES_FIELD_NUMBER: _ClassVar[int]
    LENGTH_NORMALIZATION_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    inputs: _containers.RepeatedCompositeFieldContainer[Tensor]
    seeds: _containers.RepeatedScalarFieldContainer[int]
    max_steps: int
    temperature: float
    top_k: int
    top_p: float
    beams: int
    num_hypotheses: int
    length_normalization: float
    outputs: _containers.RepeatedScalarFieldContainer[str]
    priority: Priority
    timeout: _duration_pb2.Duration
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ..., inputs: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., seeds: _Optional[_Iterable[int]] = ..., max_steps: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., beams: _Optional[int] = ..., num_hypotheses: _Optional[int] = ..., length_normalization: _Optional[float] = ..., outputs: _Optional[_Iterable[str]] = ..., priority: _Optional[_Union[Priority, str]] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("started", "output")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    started: GenerateStarted
    output: GenerateOutput
    def __init__(self, started: _Optional[_Union[GenerateStarted, _Mapping]] = ..., output: _Optional[_Union[GenerateOutput, _Mapping]] = ...) -> None: ...

class GenerateStarted(_message.Message):
    __slots__ = ("model", "version", "digest", "num_sequences", "seeds")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    digest: str
    num_sequences: int
    seeds: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., num_sequences: _Optional[int] = ..., seeds: _Optional[_Iterable[int]] = ...) -> None: ...

class GenerateOutput(_message.Message):
    __slots__ = ("sequences", "hypotheses", "positions", "lengths", "ids", "log_probs", "tensors", "ends")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    HYPOTHESES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedScalarFieldContainer[int]
    hypotheses: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    log_probs: _containers.RepeatedScalarFieldContainer[float]
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    ends: GenerateEnds
    def __init__(self, sequences: _Optional[_Iterable[int]] = ..., hypotheses: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ..., ids: _Optional[_Iterable[int]] = ..., log_probs: _Optional[_Iterable[float]] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., ends: _Optional[_Union[GenerateEnds, _Mapping]] = ...) -> None: ...

class GenerateEnds(_message.Message):
    __slots__ = ("sequences", "hypotheses", "reasons", "num_outputs", "log_probs", "scores")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    HYPOTHESES_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedScalarFieldContainer[int]
    hypotheses: _containers.RepeatedScalarFieldContainer[int]
    reasons: _containers.RepeatedScalarFieldContainer[FinishReason]
    num_outputs: _containers.RepeatedScalarFieldContainer[int]
    log_probs: _containers.RepeatedScalarFieldContainer[float]
    scores: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, sequences: _Optional[_Iterable[int]] = ..., hypotheses: _Optional[_Iterable[int]] = ..., reasons: _Optional[_Iterable[_Union[FinishReason, str]]] = ..., num_outputs: _Optional[_Iterable[int]] = ..., log_probs: _Optional[_Iterable[float]] = ..., scores: _Optional[_Iterable[float]] = ...) -> None: ...
