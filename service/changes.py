"""What is to be loaded, and what is to be retired, of what lies in a repository and what is served. Pure.

Laws:

    what is wanted is what the version policy picks of the versions that can be served
    a version that is served stays wanted while its new files can't be loaded: a broken change replaces nothing
    files that could not be loaded are not tried again until they change
    a model that was unloaded by a call has nothing wanted, whatever happens to its files
    once all that was to be loaded is served or known to be broken, a second look finds nothing more to load
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from service.versions import VersionPolicies

Key = tuple[str, int]
"""Model and version."""
Prints = Mapping[Key, str]
"""What the files of each version are known by: another text, other files."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What is to happen, in the order of name and version."""

    load: list[Key]
    retire: list[Key]
    """To be done when nothing is left to load, so that no model is without a version in between."""


def wanted(
    found: Prints, served: Prints, broken: Prints, policies: VersionPolicies, unloaded: Collection[str] = ()
) -> set[Key]:
    """Choose the versions to serve: arguments as `changes` has them."""
    able: dict[str, list[int]] = {}
    for key, fingerprint in found.items():
        if key[0] not in unloaded and (key in served or broken.get(key) != fingerprint):
            able.setdefault(key[0], []).append(key[1])
    return {(model, version) for model, versions in able.items() for version in policies.of(model).pick(versions)}


def changes(
    found: Prints, served: Prints, broken: Prints, policies: VersionPolicies, unloaded: Collection[str] = ()
) -> Changes:
    """Compare.

    found     versions in the repository
    served    those that are served, with the files that they were loaded from
    broken    those whose files could not be loaded
    unloaded  models that a call has unloaded
    """
    chosen = wanted(found, served, broken, policies, unloaded)
    load = [key for key in chosen if found[key] not in (served.get(key), broken.get(key))]
    return Changes(sorted(load), sorted(served.keys() - chosen))


def of_model(prints: Prints, model: str) -> dict[Key, str]:
    """Leave out other models."""
    return {key: each for key, each in prints.items() if key[0] == model}


class Settling:
    """Believes of a repository what it has shown twice in a row: nothing half-written, nothing gone for a moment."""

    def __init__(self, found: Prints) -> None:
        """Begin with what is believed already."""
        self.believed = dict(found)
        self._last = dict(found)

    def look(self, found: Prints) -> dict[Key, str]:
        """Take a look at the repository. Returns what is believed of it now."""
        for key in found.keys() | self.believed.keys():
            if found.get(key) == self._last.get(key):
                if key in found:
                    self.believed[key] = found[key]
                else:
                    self.believed.pop(key, None)
        self._last = dict(found)
        return self.believed

    def believe(self, found: Prints, model: str) -> None:
        """Believe what a model's folder shows now."""
        for prints in (self.believed, self._last):
            for key in of_model(prints, model):
                del prints[key]
            prints.update(of_model(found, model))

    def see(self, found: Prints) -> None:
        """Note what is there, and believe no more for it."""
        self._last = dict(found)

    @property
    def last(self) -> Prints:
        """What the last look has found."""
        return self._last
