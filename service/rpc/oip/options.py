"""Parameters of requests of the Open Inference Protocol, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from service.errors import InvalidInput
from service.events import NEVER
from service.policies import Priority
from service.rpc.requests import priority_of

MAX_ID_BYTES = 256


@dataclass(slots=True)
class Options:
    """What a request asks for beside its tensors."""

    sequence_id: int | str = 0
    """0 or an empty text: none."""
    is_start: bool = False
    is_end: bool = False
    priority: Priority = Priority.NORMAL
    timeout_s: float = NEVER
    """Time until its work must have begun."""
    wants_final: bool = False
    """Whether the response is to say that it is the last of its request: it always is."""


_KINDS = {
    "sequence_id": ("int64_param", "uint64_param", "string_param"),
    "sequence_start": ("bool_param",),
    "sequence_end": ("bool_param",),
    "priority": ("int64_param", "uint64_param"),
    "timeout": ("int64_param", "uint64_param"),
    "triton_enable_empty_final_response": ("bool_param",),
}
"""Which of its fields a parameter may have set."""


def read_options(parameters: Any) -> Options:
    """Read a request's parameters; those that are not known are ignored. Raises InvalidInput."""
    options = Options()
    for name in parameters:
        if name not in _KINDS:
            continue
        parameter = parameters[name]
        kind = parameter.WhichOneof("parameter_choice")
        if kind not in _KINDS[name]:
            raise InvalidInput(
                f"parameter {name}: expected {' or '.join(_KINDS[name])}, got {kind or 'no value'}",
                field=f"parameters.{name}",
            )
        value = getattr(parameter, kind)
        if name == "sequence_id":
            options.sequence_id = value
        elif name == "sequence_start":
            options.is_start = value
        elif name == "sequence_end":
            options.is_end = value
        elif name == "priority":
            options.priority = priority_of(value)
        elif name == "timeout":
            if value < 0:
                raise InvalidInput(f"timeout {value}: expected microseconds, 0 for none", field="parameters.timeout")
            options.timeout_s = value / 1e6 if value else NEVER
        else:
            options.wants_final = value
    _check(options)
    return options


def _check(options: Options) -> None:
    sequence_id = options.sequence_id
    if not sequence_id and (options.is_start or options.is_end):
        raise InvalidInput(
            "sequence_start and sequence_end need a sequence_id that is neither 0 nor empty",
            field="parameters.sequence_id",
        )
    if isinstance(sequence_id, str):
        if len(sequence_id.encode()) > MAX_ID_BYTES:
            raise InvalidInput(f"a sequence_id has at most {MAX_ID_BYTES} bytes", field="parameters.sequence_id")
    elif sequence_id < 0:
        raise InvalidInput(f"sequence_id {sequence_id} is negative", field="parameters.sequence_id")
