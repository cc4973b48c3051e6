"""Flags of `rnnserve train` for a data file of one's own: one for every setting. Torch-free."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from models.tasks.settings import DataSettings, Names

P = ParamSpec("P")
R = TypeVar("R")

_FLAGS = {name: f"--{name.replace('_', '-')}" for name in DataSettings.model_fields if name != "sha256"}
_FLAGS["file"] = "--data"


class _NameList(click.ParamType[Names]):
    """Names of columns, with commas between."""

    name = "column,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Names:  # noqa: ARG002
        """Split the names."""
        return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value


class _Weights(click.ParamType[Any]):
    """A weight for each label, or a word."""

    name = "balanced|label=weight,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read the weights."""
        if not isinstance(value, str) or value == "balanced":
            return value
        weights = {}
        for each in value.split(","):
            label, mark, weight = each.rpartition("=")
            try:
                weights[label.strip()] = float(weight)
            except ValueError:
                mark = ""
            if not mark:
                self.fail(f"{each!r} is not LABEL=WEIGHT, such as rare=5", param, ctx)
        return weights


def data_options(command: Callable[..., R]) -> Callable[..., R]:
    """Add an option for every setting of a data file; the command gets `data`, those that were given by name."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> R:
        given = {name: kwargs.pop(f"data_{name}") for name in _FLAGS}
        return command(*args, data={name: value for name, value in given.items() if value is not None}, **kwargs)

    for name, flag in reversed(_FLAGS.items()):
        field = DataSettings.model_fields[name]
        default = "" if field.is_required() or field.default in (None, ()) else f"  [default: {field.default}]"
        metavar = "FILE" if name == "file" else None
        option = click.option(
            flag, f"data_{name}", type=_kind(name, field), metavar=metavar, help=f"{field.description}{default}"
        )
        run = option(run)
    return run


def _kind(name: str, field: FieldInfo) -> Any:
    """Find what click reads a setting as."""
    if name == "class_weights":
        return _Weights()
    if field.annotation == Names:
        return _NameList()
    # A setting that may be left out is a union with None.
    kind = next((each for each in get_args(field.annotation) if each is not type(None)), field.annotation)
    if get_origin(field.annotation) is Literal or get_origin(kind) is Literal:
        return click.Choice(get_args(kind if get_origin(kind) is Literal else field.annotation))
    kind = get_args(kind)[0] if get_args(kind) else kind  # Annotated
    return kind if kind in (int, float) else str
