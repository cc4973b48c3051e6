"""What a run is made from, as a TOML file: `rnnserve train --config FILE`. Torch-free.

task = "vowels"      a task that ships, or else

[data]               a data file of one's own: models/tasks/settings.py
file = "flow.csv"    from the folder of this file, unless it is a whole path
target = ["flow"]

[recipe]             models/recipe.py; what is left out is the task's own
cell = "lstm"

[versions]           of what made the run, which every run writes down; nothing reads it
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from models import tasks
from models.errors import RecipeError
from models.recipe import Recipe, faults
from models.tasks import AnyTask
from models.tasks.settings import DataSettings


class RunConfig(BaseModel):
    """A task, or data of one's own, and a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    task: str | None = None
    """Name of a task that ships."""
    data: DataSettings | None = None
    """Settings of a data file."""
    recipe: dict[str, Any] = {}
    """Settings of the recipe that are not the task's own."""
    versions: dict[str, str] = {}
    """Versions of what made the run."""

    @model_validator(mode="after")
    def _asks_for_one_thing(self) -> Self:
        if (self.task is None) == (self.data is None):
            raise ValueError("name either a task that ships, or a data file with [data]")
        return self

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a config file. Raises RecipeError that names the file and the setting."""
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise RecipeError(f"{path}: not TOML: {error}") from error
        data = content.get("data")
        if isinstance(data, dict) and isinstance(data.get("file"), str):
            data["file"] = path.parent / data["file"]
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise RecipeError(f"{path}: {faults(error)}") from error

    @classmethod
    def of(cls, task: AnyTask, recipe: Recipe, versions: Mapping[str, str]) -> Self:
        """Say what a run is made from."""
        what: dict[str, Any] = {"data": dict(task.source)} if task.source else {"task": task.name}
        return cls.model_validate(what | {"recipe": _without_none(recipe.to_dict()), "versions": dict(versions)})

    def to_toml(self) -> str:
        """The text of a config file."""
        import tomli_w

        content: dict[str, Any] = {"task": self.task, "data": self.data and self.data.saved()}
        content |= {"recipe": self.recipe, "versions": self.versions}
        return "# `rnnserve train --config FILE` runs this again.\n" + tomli_w.dumps(_without_none(content))

    @classmethod
    def choose(cls, base: RunConfig | None, task: str | None, data: Mapping[str, Any]) -> RunConfig:
        """Put together a config file, if there is one, and what was said beside it: a task, or settings of data.

        Raises RecipeError where they contradict, or name nothing to train.
        """
        if base is None and task is None and "file" not in data:
            known = ", ".join(tasks.NAMES)
            raise RecipeError(f"nothing to train: name a TASK ({known}), a --data FILE, or a --config FILE")
        if task is not None and (data or (base is not None and base.task != task)):
            raise RecipeError(f"TASK {task} comes with its data: leave it out beside a data file or another config")
        if base is None:
            return RunConfig(task=task) if task else RunConfig(data=DataSettings.of(dict(data)))
        if not data:
            return base
        if base.data is None:
            raise RecipeError(
                f"the config is of the task {base.task}, which comes with its data; {', '.join(data)} is not"
            )
        stored = base.data.model_dump(exclude_none=True)
        if "file" in data:
            stored.pop("sha256", None)
        return base.model_copy(update={"data": DataSettings.of(stored | dict(data))})

    def load(self, settings: Mapping[str, Any]) -> tuple[AnyTask, Recipe]:
        """Load the task with its data, and the recipe with other settings.

        Raises UnknownTask, DataError, RecipeError, MissingExtra.
        """
        task = tasks.load_own(self.data) if self.data is not None else tasks.load(self.task or "")
        return task, task.recipe.changed(**{**self.recipe, **settings})


def _without_none(value: Any) -> Any:
    """Leave out what TOML has no word for."""
    if isinstance(value, Mapping):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return value
