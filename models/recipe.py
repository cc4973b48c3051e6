"""Settings of a training run. Torch-free."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from models.errors import RecipeError
from models.spec import Cell

Activation = Literal["tanh", "relu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that a run depends on besides its data: the same recipe gives the same weights.

    Raises RecipeError where a setting makes no sense.
    """

    cell: Cell = "gru"
    """Recurrent cell."""
    hidden: int = 64
    """Hidden units of each layer, per direction."""
    layers: int = 1
    """Recurrent layers, one on the other."""
    bidirectional: bool = False
    """Whether layers also read the sequence from its end; such a model cannot answer before it."""
    activation: Activation = "tanh"
    """Activation of an rnn cell; gru and lstm have tanh inside."""
    dropout: float = 0.0
    """Probability that an output of a recurrent layer is dropped on its way to the next layer or the head."""
    noise: float = 0.0
    """Noise added to every step of a training input, in standard deviations of the feature."""
    shift: float = 0.0
    """Offset added to a training sequence as a whole, in the same unit; makes up for drift between recordings."""
    step_loss: float = 0.0
    """Weight of the loss of the running answers beside the final one's; for one answer per sequence, causal only."""
    epochs: int = 100
    """Most passes over the training data."""
    patience: int = 20
    """Epochs without a better validation loss after which training stops."""
    lr: float = 3e-3
    """Learning rate of AdamW."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    batch_size: int = 32
    """Sequences per step of the optimiser."""
    clip_norm: float = 1.0
    """Longest gradient; longer ones are scaled down to it."""
    seed: int = 0
    """Seeds the weights, the order of sequences, the noise and dropout."""
    threads: int = 1
    """Threads of torch; small nets gain nothing from more, and another number may round differently."""

    def __post_init__(self) -> None:
        for name, allowed in (("cell", get_args(Cell)), ("activation", get_args(Activation))):
            if getattr(self, name) not in allowed:
                raise RecipeError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.activation != "tanh" and self.cell != "rnn":
            raise RecipeError(f"activation {self.activation} is for the rnn cell; a {self.cell} has tanh inside")
        for name in ("hidden", "layers", "epochs", "patience", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("noise", "shift", "step_loss", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise RecipeError(f"{name} must not be negative, but is {getattr(self, name)}")
        for name in ("lr", "clip_norm"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"dropout must be from 0 to below 1, not {self.dropout}")
        if not 0 <= self.seed < 2**63:
            raise RecipeError(f"seed must be from 0 to 2**63 - 1, not {self.seed}")

    def to_dict(self) -> dict[str, str | int | float | bool | None]:
        """The settings by name, for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Self:
        """The reverse of `to_dict`. Raises RecipeError for a setting that does not exist."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(settings.keys() - known):
            raise RecipeError(f"no such settings of a run: {', '.join(unknown)}")
        return cls(**settings)
