"""How a data file of one's own becomes a task: which columns are what, and how the rows are split. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from models.errors import RecipeError
from models.recipe import faults
from models.spec import Positive

Names = tuple[str, ...]
Share = Annotated[float, Field(gt=0, lt=1)]


class DataSettings(BaseModel):
    """A data file, and what of it is asked."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    file: Path
    """CSV (commas, semicolons or tabs), Parquet or NPZ in long format: a row per step, in any order."""
    sha256: str | None = None
    """What the file has to be, in hexadecimal; a run writes it down."""
    name: str | None = None
    """Name of the task, and of the model; the file's unless given."""
    target: Annotated[Names, Field(min_length=1)]
    """Column to predict, or columns of numbers."""
    sequence_column: str | None = None
    """Column that says which sequence a row belongs to; without it, the file is one sequence."""
    time_column: str | None = None
    """Column to sort a sequence by: numbers, or times in ISO 8601; without it, rows are in order."""
    features: Names = ()
    """Columns that the model reads; all others unless given."""
    categorical: Names = ()
    """Features that are categories although they look like numbers; columns of text are categories anyway."""
    encoding: Literal["embedding", "one-hot"] = "embedding"
    """How a category becomes numbers within the model: by a table that is trained, or by a one at its place."""
    embedding_size: Positive | None = None
    """Numbers that a category becomes; about half as many as there are categories, at most 16, unless given."""
    target_per: Literal["step", "sequence"] | None = None
    """Whether every step has its own answer; found out unless given: a target constant in each sequence is its one."""
    kind: Literal["classification", "regression"] | None = None
    """Found out unless given: text, true and false, and up to 20 different whole numbers are classes."""
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Weight of each class in the loss, by label (1 where left out), or balanced: rare classes weigh more."""
    horizon: Positive | None = None
    """Forecast: ask at every step for the target so many steps later. It is a feature too then."""
    changes_of: Names = ()
    """Features that the model's head predicts changes of, one for each target; "no change" is its first answer."""
    missing: Literal["error", "mean", "forward"] = "error"
    """What an empty feature becomes: the training rows' mean (a category: any other), or the sequence's last value."""
    split: Literal["sequence", "time"] = "sequence"
    """Split whole sequences at random, or everything by time: the past trains, the future tests."""
    split_column: str | None = None
    """Column that says train, validation or test, instead of a split made here."""
    validation_fraction: Share = 0.15
    """Share of the sequences, or of the time, that chooses the epoch."""
    test_fraction: Share = 0.15
    """Share that is looked at once, in the end."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of a split of sequences."""
    window: Positive | None = None
    """Cut training sequences into windows of so many steps; only with a target per step."""
    stride: Positive | None = None
    """Steps from the start of a window to the next one's; a window's length unless given."""

    @field_validator("target", "features", "categorical", "changes_of", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction and test_fraction leave nothing to train on: lower one")
        if self.split == "time" and not self.time_column:
            raise ValueError("split time needs a time_column")
        if self.split == "sequence" and not (self.sequence_column or self.split_column):
            raise ValueError("a split by sequence needs a sequence_column; a file that is one sequence, split time")
        if self.changes_of and len(self.changes_of) != len(self.target):
            raise ValueError(f"changes_of names {len(self.changes_of)} features for {len(self.target)} targets")
        if self.stride and not self.window:
            raise ValueError("stride needs a window")
        for field, names in (("target", self.target), ("features", self.features), ("categorical", self.categorical)):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{field} names {twice[0]!r} twice")
        answers = () if self.horizon else self.target
        for role, name in (("sequence_column", self.sequence_column), ("split_column", self.split_column)):
            if name in self.target or name in self.features:
                raise ValueError(f"{name!r} is the {role}, so it can be neither a target nor a feature")
        if given_away := [name for name in answers if name in self.features]:
            raise ValueError(f"{given_away[0]!r} is the target, so it cannot be a feature, unless there is a horizon")
        if self.features and (others := [name for name in self.categorical if name not in self.features]):
            raise ValueError(f"categorical names {others[0]!r}, which is not one of the features")
        return self

    def saved(self) -> dict[str, Any]:
        """The settings by name as a config file keeps them, with the file's whole path."""
        return self.model_dump(mode="json", exclude_none=True) | {"file": str(self.file.absolute())}

    @classmethod
    def of(cls, settings: object) -> Self:
        """Read settings by name. Raises RecipeError for one that makes no sense."""
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise RecipeError(faults(error)) from error
