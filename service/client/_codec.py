"""Messages of the protocol <-> numpy and plain values. Pure: no I/O, no clock, no state.

Both shells, sync and async, send what is made here and read what comes with it, so they can't disagree.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from service import tensors
from service.client.errors import FailedPrecondition, InvalidArgument, ProtocolError
from service.client.info import Emit, Layout, ModelInfo, Prediction, Priority, StateInfo, TensorInfo
from service.errors import ServiceError
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.tensors import Array

Sequences = Sequence[npt.ArrayLike] | Mapping[str, Sequence[npt.ArrayLike]] | Array
"""Input of predict: sequences of any lengths, of the only per-step input or by name of input; a text may be a str."""
Steps = npt.ArrayLike | Mapping[str, npt.ArrayLike]
"""Input of a stream: one step or a chunk of them, of the only per-step input or by name of input."""

ENUM_BY_DTYPE: Mapping[str, pb.DataType] = MappingProxyType(
    {
        "float32": pb.DATA_TYPE_FLOAT32,
        "int64": pb.DATA_TYPE_INT64,
        "int32": pb.DATA_TYPE_INT32,
        "float64": pb.DATA_TYPE_FLOAT64,
        "bool": pb.DATA_TYPE_BOOL,
    }
)
DTYPE_BY_ENUM: Mapping[int, str] = MappingProxyType({enum: name for name, enum in ENUM_BY_DTYPE.items()})
ENUM_BY_LAYOUT: Mapping[Layout, pb.Layout] = MappingProxyType(
    {"per_step": pb.LAYOUT_PER_STEP, "per_sequence": pb.LAYOUT_PER_SEQUENCE, "shared": pb.LAYOUT_SHARED}
)
LAYOUT_BY_ENUM: Mapping[int, Layout] = MappingProxyType({enum: name for name, enum in ENUM_BY_LAYOUT.items()})
ENUM_BY_EMIT: Mapping[Emit, pb.Emit] = MappingProxyType({"all": pb.EMIT_ALL, "last": pb.EMIT_LAST})
ENUM_BY_PRIORITY: Mapping[Priority, pb.Priority] = MappingProxyType(
    {"high": pb.PRIORITY_HIGH, "normal": pb.PRIORITY_NORMAL, "low": pb.PRIORITY_LOW}
)
ENUM_BY_STEP_MODE: Mapping[str, pb.StepMode] = MappingProxyType(
    {
        "stepping": pb.STEP_MODE_STEPPING,
        "chunked": pb.STEP_MODE_CHUNKED,
        "buffered": pb.STEP_MODE_BUFFERED,
        "generative": pb.STEP_MODE_GENERATIVE,
    }
)
STEP_MODE_BY_ENUM: Mapping[int, str] = MappingProxyType({enum: name for name, enum in ENUM_BY_STEP_MODE.items()})


def emit_enum(emit: Emit) -> pb.Emit:
    """Translate `emit`. Raises InvalidArgument for a word that is neither "all" nor "last"."""
    if emit not in ENUM_BY_EMIT:
        raise InvalidArgument(f'emit: expected "all" or "last", got {emit!r}')
    return ENUM_BY_EMIT[emit]


def priority_enum(priority: Priority) -> pb.Priority:
    """Translate `priority`. Raises InvalidArgument for a word that is not "high", "normal" or "low"."""
    if priority not in ENUM_BY_PRIORITY:
        raise InvalidArgument(f'priority: expected "high", "normal" or "low", got {priority!r}')
    return ENUM_BY_PRIORITY[priority]


def cast(value: npt.ArrayLike, info: TensorInfo | StateInfo, where: str) -> Array:
    """Make an array of the dtype that the model declares, which the server takes and no other.

    float64 becomes float32 and any integer a float; integers keep their value; a float never becomes an integer. Names
    of categories become their ids, and any other text 0; a letter that is known in one case alone is known in both.
    Raises InvalidArgument, naming `where`.
    """
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InvalidArgument(f"{where}: expected an array of {info.dtype}: {error}") from error
    if isinstance(info, TensorInfo) and info.categories and array.dtype.kind in "UO":
        ids = _ids(info.categories)
        array = np.array([ids.get(str(name), 0) for name in array.flat], dtype=np.int64).reshape(array.shape)
    want = tensors.DTYPES.get(info.dtype)
    if want is None:
        raise InvalidArgument(f"{where}: this client does not know the dtype that the model takes")
    if array.dtype == want:
        return array
    if not np.can_cast(array.dtype, want, "same_kind"):
        raise InvalidArgument(f"{where}: expected {info.dtype}, got {array.dtype}, which does not convert to it")
    try:
        with np.errstate(over="raise"):
            converted = array.astype(want)
    except FloatingPointError:
        raise InvalidArgument(f"{where}: a value of {array.dtype} does not fit into {info.dtype}") from None
    if array.dtype.kind in "iu" and want.kind in "iu" and not np.array_equal(converted, array):
        raise InvalidArgument(f"{where}: a value of {array.dtype} does not fit into {info.dtype}")
    return converted


@functools.cache
def _ids(categories: tuple[str, ...]) -> Mapping[str, int]:
    ids = {name: number for number, name in enumerate(categories)}
    return {name.swapcase(): number for name, number in ids.items() if len(name) == 1} | ids


def rows_of(value: npt.ArrayLike, info: TensorInfo | StateInfo, where: str, axis: str) -> Array:
    """Cast and check an array [axis, *row_shape], where `axis` is what its rows are called in messages.

    A str is a row for each of its characters, where the model takes text.
    """
    if isinstance(value, str) and isinstance(info, TensorInfo) and info.is_text:
        value = np.array(list(value), dtype=np.str_)
    array = cast(value, info, where)
    if array.ndim != 1 + len(info.row_shape) or array.shape[1:] != info.row_shape:
        expected = ", ".join([axis, *map(str, info.row_shape)])
        raise InvalidArgument(f"{where}: expected shape [{expected}], got {list(array.shape)}")
    return array


def tensor(name: str, array: Array, layout: Layout, lengths: Iterable[int] = ()) -> pb.Tensor:
    """Pack one array of a dtype that travels."""
    return pb.Tensor(
        name=name,
        dtype=ENUM_BY_DTYPE[tensors.dtype_name(array)],
        shape=array.shape,
        layout=ENUM_BY_LAYOUT[layout],
        lengths=lengths,
        data=tensors.encode(array),
    )


def array_of(message: pb.Tensor, info: TensorInfo | StateInfo | None) -> Array:
    """Read one tensor of an answer; what it leaves out is as the model declares.

    Returns a read-only array. Raises ProtocolError when it does not fit.
    """
    data = message.data
    dtype = DTYPE_BY_ENUM.get(message.dtype) or (info.dtype if info else "")
    shape: Sequence[int] = message.shape
    try:
        if not shape:
            if info is None:
                raise ProtocolError(f"the answer has a tensor {message.name!r} that the model does not declare")
            row_bytes = tensors.num_elements(info.row_shape) * tensors.wire_dtype(dtype).itemsize
            shape = (len(data) // row_bytes if row_bytes else 0, *info.row_shape)
        return tensors.decode(data, dtype, shape)
    except ServiceError as error:
        raise ProtocolError(f"the answer's tensor {message.name!r}: {error}") from error


def check_predicts(info: ModelInfo) -> None:
    """Raise FailedPrecondition for a model that takes no steps of a caller's own, or none without a source."""
    generation = info.generation
    if generation is not None and (generation.source_inputs or not generation.token_input):
        raise FailedPrecondition(f"model {info.name} makes its outputs by itself: call generate (rnnserve generate)")


def predict_request(
    info: ModelInfo,
    xs: Sequences,
    *,
    version: int = 0,
    outputs: Sequence[str] | None = None,
    emit: Emit = "all",
    states: Mapping[str, npt.ArrayLike] | None = None,
    return_state: bool = False,
    priority: Priority = "normal",
) -> tuple[pb.PredictRequest, list[int]]:
    """Pack whole sequences.

    xs      per sequence [time, *row_shape] of the only input; or by name: per-step inputs as before, per-sequence ones
            [sequences, *row_shape], shared ones as they are
    states  [sequences, directions, hidden] by name; zeros where absent
    Returns the request and the steps of each sequence. Raises InvalidArgument.
    """
    check_predicts(info)
    request = pb.PredictRequest(
        model=info.name,
        version=version,
        outputs=outputs or (),
        emit=emit_enum(emit),
        return_state=return_state,
        priority=priority_enum(priority),
    )
    lengths: list[int] = []
    for spec, value in by_input(info, info.inputs, xs):
        if spec.layout == "shared":
            request.inputs.append(tensor(spec.name, cast(value, spec, spec.name), "shared"))
        elif spec.layout == "per_sequence":
            request.inputs.append(tensor(spec.name, rows_of(value, spec, spec.name, "sequences"), "per_sequence"))
        else:
            packed, steps = pack(value, spec)
            lengths = lengths or steps
            request.inputs.append(tensor(spec.name, packed, "per_step", steps))
    known = {state.name: state for state in info.states}
    for name, value in (states or {}).items():
        if name not in known:
            raise InvalidArgument(f"model {info.name} has no state {name!r}: it has {', '.join(known) or 'none'}")
        request.inputs.append(tensor(name, rows_of(value, known[name], name, "sequences"), "per_sequence"))
    return request, lengths


def prediction(info: ModelInfo, response: pb.PredictResponse, lengths: Sequence[int], emit: Emit) -> Prediction:
    """Unpack the answer to whole sequences. Raises ProtocolError when it does not fit what was sent."""
    state_infos = {state.name: state for state in info.states}
    outputs: dict[str, list[Array]] = {}
    states: dict[str, Array] = {}
    for message in response.outputs:
        if message.name in state_infos:
            states[message.name] = array_of(message, state_infos[message.name])
            continue
        spec = info.output(message.name)
        array = array_of(message, spec)
        layout = LAYOUT_BY_ENUM.get(message.layout) or (spec.layout if spec else "per_step")
        outputs[message.name] = _unpack(message, array, layout, lengths, emit)
    return Prediction(outputs=outputs, states=states, version=response.version, digest=response.digest)


def _unpack(message: pb.Tensor, array: Array, layout: Layout, lengths: Sequence[int], emit: Emit) -> list[Array]:
    """Cut one output into its sequences."""
    if layout == "shared":
        return [array] * len(lengths)
    if layout == "per_step" and emit == "all":
        try:
            rows = tensors.split_rows(array, message.lengths or lengths)
        except ServiceError as error:
            raise ProtocolError(f"the answer's output {message.name!r}: {error}") from error
    else:
        rows = list(array)
    if len(rows) != len(lengths):
        raise ProtocolError(f"the answer's output {message.name!r} is of {len(rows)} sequences, not {len(lengths)}")
    return rows


def chunk_of(info: ModelInfo, steps: Steps) -> dict[str, Array]:
    """Read steps for a stream: every per-step input [time, *row_shape] by name. Raises InvalidArgument."""
    chunk = {
        spec.name: rows_of(value, spec, spec.name, "time") for spec, value in by_input(info, info.step_inputs, steps)
    }
    if len({len(array) for array in chunk.values()}) > 1:
        counts = ", ".join(f"{name} has {len(array)}" for name, array in chunk.items())
        raise InvalidArgument(f"every input must have as many steps: {counts}")
    if not len(next(iter(chunk.values()))):
        raise InvalidArgument("expected at least one step, got none")
    return chunk


def step_of(info: ModelInfo, step: Steps) -> dict[str, Array]:
    """Read one step for a stream: every per-step input [1, *row_shape] by name. Raises InvalidArgument."""
    chunk: dict[str, Array] = {}
    for spec, value in by_input(info, info.step_inputs, step):
        array = cast(value, spec, spec.name)
        if array.shape != spec.row_shape:
            raise InvalidArgument(
                f"{spec.name}: expected one step of shape {list(spec.row_shape)}, got {list(array.shape)}"
            )
        chunk[spec.name] = array[None]
    return chunk


def step_or_chunk_of(info: ModelInfo, steps: Steps) -> dict[str, Array]:
    """Read one step or several for a stream, told apart by the number of axes. Raises InvalidArgument."""
    arrays = {spec.name: cast(value, spec, spec.name) for spec, value in by_input(info, info.step_inputs, steps)}
    is_step = all(arrays[spec.name].ndim == len(spec.row_shape) for spec in info.step_inputs)
    return step_of(info, arrays) if is_step else chunk_of(info, arrays)


def by_input(info: ModelInfo, specs: tuple[TensorInfo, ...], value: Any) -> list[tuple[TensorInfo, Any]]:
    """Match what a caller gave to the inputs of a model: by name, or the only one there is."""
    names = ", ".join(spec.name for spec in specs)
    if not isinstance(value, Mapping):
        if len(specs) != 1:
            raise InvalidArgument(f"model {info.name} takes several inputs: give a dict of {names}")
        return [(specs[0], value)]
    unknown = [str(name) for name in value if name not in {spec.name for spec in specs}]
    if unknown:
        raise InvalidArgument(f"model {info.name} takes no {', '.join(unknown)} here: it takes {names}")
    missing = [spec.name for spec in specs if spec.name not in value]
    if missing:
        raise InvalidArgument(f"model {info.name} needs {', '.join(missing)} too: it takes {names}")
    return [(spec, value[spec.name]) for spec in specs]


def pack(value: Any, spec: TensorInfo) -> tuple[Array, list[int]]:
    """Lay sequences end to end; returns [sum(lengths), *row_shape] and lengths."""
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str | bytes):
        raise InvalidArgument(f"{spec.name}: expected a list of sequences, got {type(value).__name__}")
    if isinstance(value, np.ndarray) and value.ndim == 1 + len(spec.row_shape):
        raise InvalidArgument(f"{spec.name}: expected a list of sequences, got one array; for one sequence give [x]")
    if not len(value):
        raise InvalidArgument(f"{spec.name}: expected at least one sequence, got none")
    rows = [rows_of(x, spec, f"{spec.name}[{i}]", "time") for i, x in enumerate(value)]
    return np.concatenate(rows), [len(x) for x in rows]
