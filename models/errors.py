"""What goes wrong on the training side; every message is one line and says what to do next.

ModelsError
├── MissingExtra      a package of an optional extra is not installed
├── UnknownTask       no task of that name
├── RecipeError       settings of a run that make no sense, alone or for its task
├── DataError         data that cannot be used, or could not be made again
├── RunError          a run's directory is missing, taken or damaged
├── ExportError       a file could not be made
│   ├── ParityError   the file would answer differently from the model it came from
│   └── DropError     the quantized file would lose more of a metric than is allowed
├── ConversionError   a model from elsewhere that cannot become one of ours
│   └── ForeignFileError  its file cannot be read, or is damaged
└── ModelFileError    a file that is not a model of ours, or is damaged
"""

from __future__ import annotations


class ModelsError(Exception):
    """Base of all errors that a person is shown."""


class MissingExtra(ModelsError):
    """A package of an optional extra is not installed; install the extra."""

    def __init__(self, what: str, *, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{what} needs the {purpose} extra ({package} is missing): pip install 'rnnserve[{extra}]'")
        self.extra = extra


class UnknownTask(ModelsError):
    """No task has that name; choose one of those listed."""

    def __init__(self, name: str, *, known: tuple[str, ...]) -> None:
        super().__init__(f"no task {name!r}: there are {', '.join(known)}")


class RecipeError(ModelsError):
    """Settings of a run make no sense, alone or for its task; change the one that is named."""


class DataError(ModelsError):
    """Data cannot be used, or could not be made again from its package; mend what is named, by column and row."""


class RunError(ModelsError):
    """A run's directory is missing, taken or damaged; name another, or go on with --resume."""


class ExportError(ModelsError):
    """A model file could not be made; nothing was written."""


class ParityError(ExportError):
    """onnxruntime's answers differ from torch's; nothing was written. Report it with the numbers."""

    def __init__(self, case: str, output: str, *, error: float, tolerance: float, where: tuple[int, ...]) -> None:
        at = ", ".join(map(str, where))
        super().__init__(
            f"not written: torch and onnxruntime differ by {error:.3g} in {output!r} at [{at}] ({case}); "
            f"allowed is {tolerance:.0e}, absolute and relative to the value"
        )
        self.case = case
        self.output = output
        self.error = error


class DropError(ExportError):
    """A quantized file loses more of a metric than is allowed; nothing was written."""

    def __init__(self, form: str, metric: str, *, before: float, after: float, max_drop: float) -> None:
        others = {"weights": "export without --int8", "static": "try --int8 weights", "dynamic": "try --int8 static"}
        super().__init__(
            f"not written: over the test split, --int8 {form} takes {metric} from {before:.4g} to {after:.4g}, more "
            f"than --max-drop {max_drop:g} allows; {others[form]}, or allow more"
        )
        self.metric, self.before, self.after = metric, before, after


class ConversionError(ModelsError):
    """A model from elsewhere has a part that ours cannot have; change the layer and option that are named."""


class ForeignFileError(ConversionError):
    """The file of a model from elsewhere cannot be read, is damaged or of another format; save it again."""


class ModelFileError(ModelsError):
    """A file is not a model of ours, or is damaged; export it again."""
