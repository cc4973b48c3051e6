"""What a model.toml says of a model that was made elsewhere: which axes, states and constants its graph has.

It lies beside the file, as <repository>/<model>/<version>/model.toml. `rnnserve adopt` writes a first one.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.spec import DESCRIPTION_FILE as DESCRIPTION_FILE
from service.errors import ModelBroken

Positive = Annotated[int, Field(gt=0)]
Axis = Annotated[int, Field(ge=0)] | Literal["none"]


def _numbers(given: Any) -> Any:
    try:
        is_of_numbers = np.array(given).dtype.kind in "biuf" and np.array(given).size
    except ValueError:  # lists of different lengths
        is_of_numbers = False
    if not is_of_numbers:
        raise ValueError("expected a number of 64 bits, true, false, or lists of them, all of one length")
    return given


Constant = Annotated[Any, AfterValidator(_numbers)]
"""A number or truth value, or lists of them as a tensor has them."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class _Axes(_Frozen):
    """Where a tensor of the graph has its batch and its time."""

    batch_axis: Axis = 0
    """Axis of sequences; "none" where the graph takes one sequence alone."""
    time_axis: Axis = "none"
    """Axis of time; "none" where a call of the model is one step."""
    shape: tuple[Positive, ...] | None = None
    """Sizes of all other axes, in their order; needed where the graph does not know them."""

    @model_validator(mode="after")
    def _axes_differ(self) -> Self:
        if self.batch_axis == self.time_axis != "none":
            raise ValueError(f"batch_axis and time_axis are both {self.batch_axis}")
        return self


class InputEntry(_Axes):
    """An input that clients give."""

    per: Literal["step", "sequence"] = "step"
    """Whether it is given with every step, or once a sequence."""
    chunk: Positive | None = None
    """Entries of the time axis that clients send as one step; without it, one entry is a step."""
    context: Annotated[int, Field(ge=0)] = 0
    """Last entries of the time axis that the model is given again before the new ones; zeros at the beginning."""
    unit: str = ""
    """Physical unit of the values."""
    description: str = ""
    """What the values are."""
    element_names: tuple[str, ...] = ()
    """Names of the elements of a row."""
    num_ids: Positive | None = None
    """Of ids: they lie in [0, num_ids)."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.time_axis == "none" and (self.chunk or self.context):
            raise ValueError("chunk and context are entries of a time axis: give time_axis")
        if self.per == "sequence" and self.time_axis != "none":
            raise ValueError("what is given once a sequence has no time axis")
        return self


class OutputEntry(_Axes):
    """An output that is answered."""

    per: Literal["step", "sequence"] = "step"
    """Whether every step has one, or the last step's is the sequence's."""
    name: str = ""
    """Name that clients see; the graph's by default."""
    unit: str = ""
    """Physical unit of the values."""
    description: str = ""
    """What the values are."""
    element_names: tuple[str, ...] = ()
    """Names of the elements of a row."""


class StateEntry(_Frozen):
    """A state: a graph input, and the output that is its next value."""

    next: str
    """The graph's output."""
    batch_axis: Axis = 0
    """Axis of sequences, of both; "none" where the graph takes one sequence alone."""
    shape: tuple[Positive, ...] | None = None
    """Sizes of all other axes, in their order; needed where the graph does not know them."""
    initial: str = "zeros"
    """What a sequence begins with: "zeros", or a .npy file beside this one, of the state's shape without batch."""


class Description(_Frozen):
    """All of a model.toml."""

    max_batch: Positive | None = None
    """Most sequences in one run; 1 where neighbours would change each other's numbers. None: the server's setting."""
    lengths: str = ""
    """The graph's own input [batch] of steps, if it has one; then it is given many steps in one call."""
    labels: tuple[str, ...] = ()
    """Class labels, in the order of the first output's elements."""
    inputs: dict[str, InputEntry]
    """What clients give, by the graph's names."""
    outputs: dict[str, OutputEntry]
    """What is answered, by the graph's names."""
    states: dict[str, StateEntry] = {}
    """States, by the graph's names of their inputs."""
    constants: dict[str, Constant] = {}
    """Inputs that are always the same, such as a sample rate."""

    @model_validator(mode="after")
    def _has_steps(self) -> Self:
        if not any(each.per == "step" for each in self.inputs.values()):
            raise ValueError("inputs: none is given with every step")
        if not self.outputs:
            raise ValueError("outputs: none is answered")
        return self

    def answered(self, output: str) -> str:
        """Name that clients see of an output."""
        return self.outputs[output].name or output

    def next_of(self, state: str) -> str:
        """Name that clients see of a state's next value: the graph's, unless something else has it."""
        name = self.states[state].next
        others = {*map(self.answered, self.outputs), *self.inputs, *self.states}
        return f"{state}.next" if name in others else name


def read_description(path: Path) -> Description:
    """Read a model.toml. Raises ModelBroken, which names the key at fault."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelBroken(f"{path}: can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not its own alone: of text, of numbers' lengths
        raise ModelBroken(f"{path} is not TOML: {error}") from error
    return describe(values, str(path))


def describe(values: dict[str, Any], source: str) -> Description:
    """Check what a model.toml says. Raises ModelBroken, which names the key at fault."""
    try:
        return Description.model_validate(values)
    except ValidationError as error:
        raise ModelBroken(f"{source}: {faults_of(error)}") from error


def faults_of(error: ValidationError) -> str:
    """Say what is wrong, and with which keys."""
    faults = []
    for each in error.errors()[:5]:
        # A union's members are named behind the key; they are no part of it.
        key = ".".join(
            str(part) for part in each["loc"] if not str(part).startswith(("constrained", "literal", "list["))
        )
        what = "is no key here" if each["type"] == "extra_forbidden" else each["msg"].removeprefix("Value error, ")
        faults.append(f"{key or 'the file'}: {what}")
    return "; ".join(faults)
