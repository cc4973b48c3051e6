"""Which versions of each model are to be served: the policy, and the choice that it makes. Pure.

    all            every version
    latest:N       the N highest that can be served: one that can't be gives its place to the next lower one
    1,3            these, as far as they are there

A text of several entries, parted by blanks, gives models policies of their own: `latest:1 vowels=all names=1,3`. The
entry without a model is for all others.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_VERSION = 2**63 - 1
_LATEST = re.compile(r"latest:([0-9]{1,18})")
_NUMBERS = re.compile(r"[1-9][0-9]{0,18}(,[1-9][0-9]{0,18})*")
_FORMS = "all, latest:N, or version numbers such as 1,3"


@dataclass(frozen=True, slots=True)
class VersionPolicy:
    """Which versions of one model are to be served."""

    num_latest: int = 0
    """How many of the highest; 0 where it is not about the highest."""
    named: tuple[int, ...] = ()
    """These alone, in order; neither is all of them."""

    @classmethod
    def parse(cls, text: str) -> VersionPolicy:
        """Read one policy. Raises ValueError, which says what would do."""
        if text == "all":
            return cls()
        if (latest := _LATEST.fullmatch(text)) and int(latest[1]):
            return cls(num_latest=int(latest[1]))
        if _NUMBERS.fullmatch(text) and max(numbers := {int(each) for each in text.split(",")}) <= MAX_VERSION:
            return cls(named=tuple(sorted(numbers)))
        raise ValueError(f"{text!r} is no version policy: expected {_FORMS}")

    def pick(self, versions: Collection[int]) -> list[int]:
        """Choose, in order, from the versions that can be served."""
        ordered = sorted(versions)
        if self.num_latest:
            return ordered[-self.num_latest :]
        return [each for each in ordered if not self.named or each in self.named]

    def __str__(self) -> str:
        if self.num_latest:
            return f"latest:{self.num_latest}"
        return ",".join(map(str, self.named)) or "all"


LATEST = VersionPolicy(num_latest=1)


@dataclass(frozen=True)
class VersionPolicies:
    """The policy of every model."""

    default: VersionPolicy = LATEST
    by_model: Mapping[str, VersionPolicy] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: Any) -> VersionPolicies:
        """Read a text, or a table of {model: policy} in which "*" is every other model. Raises ValueError."""
        if isinstance(given, VersionPolicies):
            return given
        if isinstance(given, str):
            given = _table(given)
        if not isinstance(given, Mapping):
            raise ValueError(f"expected a text such as 'latest:2 vowels=1,3', or a table; got {given!r}")
        if strange := [model for model in given if str(model).split() != [str(model)]]:
            raise ValueError(f"a model whose name has blanks can't have a policy of its own: {strange[0]!r}")
        policies = {str(model): VersionPolicy.parse(_text(policy)) for model, policy in given.items()}
        default = policies.pop("*", LATEST)
        return cls(default, policies)

    def of(self, model: str) -> VersionPolicy:
        """Find a model's policy."""
        return self.by_model.get(model, self.default)

    def __str__(self) -> str:
        """Write the text that `parse` reads."""
        return " ".join([str(self.default), *(f"{model}={policy}" for model, policy in self.by_model.items())])


def _table(text: str) -> dict[str, str]:
    table: dict[str, str] = {}
    for entry in text.split():
        model, is_own, policy = entry.rpartition("=")
        if not (model if is_own else "*"):
            raise ValueError(f"{entry!r} names no model before the =")
        if (key := model if is_own else "*") in table:
            raise ValueError(f"two policies for {'every model' if key == '*' else key}: {text!r}")
        table[key] = policy
    return table


def _text(policy: Any) -> str:
    """A policy in a TOML table may be a number, or a list of them."""
    if isinstance(policy, list):
        return ",".join(map(str, policy))
    return str(policy)
