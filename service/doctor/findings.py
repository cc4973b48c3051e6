"""What is found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"
    """Something that nobody asked for is missing."""
    WARNING = "warning"
    """It works, but not as well as it could, or not for long."""
    PROBLEM = "problem"
    """Something that was asked for does not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    area: str
    """What it belongs to: installed, providers, machine, settings, repository."""
    name: str
    """For programs, such as "onnxruntime"."""
    level: Level
    text: str
    """What is so."""
    advice: str = ""
    """What to do; only where all is well there is nothing."""

    def __post_init__(self) -> None:
        if not self.advice and self.level is not Level.OK:
            raise ValueError(f"{self.name}: say what to do")


def fault(is_asked: bool) -> Level:
    """Level of what does not work."""
    return Level.PROBLEM if is_asked else Level.NOTE
