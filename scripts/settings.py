"""Write the table of every setting into docs/configuration.md, between its two marks: `make settings`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le

from service.config import Settings
from service.versions import VersionPolicies

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
MARKS = re.compile(r"(<!-- settings -->\n).*?(<!-- end of settings -->)", re.DOTALL)


def table() -> str:
    """Make the table."""
    rows = ["| setting | values | default | |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "required" if field.is_required() else _shown(field.default)
        text = (field.description or "").replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")
        rows.append(f"| `{name}` | {_values(field.annotation, field.metadata)} | {default} | {text} |")
    return "\n".join(rows) + "\n"


def with_table(page: str) -> str:
    """Put the table into the text of the page."""
    return MARKS.sub(lambda match: match[1] + table() + match[2], page)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value != "" else "empty"


def _values(annotation: Any, limits: list[Any]) -> str:
    """What a setting takes, in words."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{word}`" for word in get_args(annotation))
    kinds = [each for each in get_args(annotation) or (annotation,) if each is not type(None)]
    kind = {
        bool: "`true`, `false`",
        int: "integer",
        float: "number",
        Path: "path",
        str: "text",
        VersionPolicies: "policies",
    }.get(kinds[0])
    bounds = []
    for limit in limits:
        if isinstance(limit, Ge):
            bounds.append(f">= {limit.ge}")
        elif isinstance(limit, Gt):
            bounds.append(f"> {limit.gt}")
        elif isinstance(limit, Le):
            bounds.append(f"<= {limit.le}")
    return " ".join([kind or str(annotation), ", ".join(bounds)]).strip()


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
