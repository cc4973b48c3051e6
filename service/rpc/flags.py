"""One flag for every setting, made from the settings themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from click.shell_completion import CompletionItem

from service.config import PREFIX, Settings

DIRECTORIES = {"repository"}


def settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for every field of Settings; its help is the text under the field. What is wrong is told later."""
    for name, field in reversed(Settings.model_fields.items()):
        default = "" if field.is_required() or field.default is None else f"  [default: {field.default}]"
        command = click.option(
            f"--{name.replace('_', '-')}",
            name,
            metavar="VALUE",
            default=None,
            multiple=isinstance(field.json_schema_extra, dict) and "repeats" in field.json_schema_extra,
            callback=lambda _, __, value: " ".join(value) or None if isinstance(value, tuple) else value,
            help=f"{field.description}{default}  [env: {PREFIX}{name.upper()}]",
            shell_complete=_completion(name, field.annotation),
        )(command)
    return command


def _completion(name: str, annotation: Any) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """What may follow the flag: words for those that take few, files and directories."""
    words: tuple[str, ...] = ()
    if get_origin(annotation) is Literal:
        words = get_args(annotation)
    elif annotation is bool:
        words = ("true", "false")
    is_path = Path in (annotation, *get_args(annotation))
    kind = "dir" if name in DIRECTORIES else "file"

    def complete(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        if is_path:
            return [CompletionItem(incomplete, type=kind)]
        return [CompletionItem(word) for word in words if word.startswith(incomplete)]

    return complete
