"""Settings of a training run. Torch-free."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from models.errors import RecipeError
from models.options import Activation, LayerOptions
from models.spec import Cell, Positive

Schedule = Literal["constant", "cosine", "plateau", "onecycle"]
Device = Literal["cpu", "cuda"]
Precision = Literal["32", "16-mixed", "bf16-mixed"]


class Recipe(LayerOptions):
    """All that a run depends on besides its data: the same recipe gives the same weights."""

    cell: Cell = "gru"
    """Recurrent cell."""
    hidden: Positive = 64
    """Hidden units of each layer, per direction."""
    layers: Positive = 1
    """Recurrent layers, one on the other."""
    bidirectional: bool = False
    """Layers also read the sequence from its end; such a model cannot answer before it."""
    conv_filters: int = Field(0, ge=0)
    """Features of a causal convolution before the recurrent layers, over each step and those before it; 0: none."""
    conv_kernel_size: int = Field(3, ge=2)
    """Steps that the convolution sees, the present one among them."""
    conv_dilation: Positive = 1
    """Distance between the steps that the convolution sees."""
    conv_activation: Activation = "relu"
    """Activation of the convolution."""
    embedding: int = Field(0, ge=0)
    """Width of the vectors that ids become, where a task is made of them; 0 where it is not."""
    attention: bool = False
    """Whether a decoder looks back at every step of its source, or has but the state that the encoder ends in."""
    output_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that an output of a recurrent layer is dropped on its way to the next layer or the head."""
    noise: float = Field(0.0, ge=0)
    """Noise added to every step of a training input, in standard deviations of the feature."""
    shift: float = Field(0.0, ge=0)
    """Offset added to a training sequence as a whole, in the same unit; makes up for drift between recordings."""
    step_loss: float = Field(0.0, ge=0)
    """Weight of the running answers' loss beside the final one's, where a sequence has one answer and is causal."""
    epochs: Positive = 100
    """Most passes over the training data."""
    patience: Positive = 20
    """Epochs without a better validation loss after which training stops."""
    lr: float = Field(3e-3, gt=0)
    """Learning rate of AdamW; the highest, where it changes."""
    schedule: Schedule = "constant"
    """How the learning rate goes on: down a cosine to 0, halved on a plateau, or up and down once."""
    warmup: int = Field(0, ge=0)
    """Epochs in which the learning rate rises from 0."""
    plateau_patience: Positive = 5
    """Epochs without a better validation loss that the plateau schedule waits."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    batch_size: Positive = 32
    """Sequences per step of the optimiser."""
    clip_norm: float = Field(1.0, gt=0)
    """Longest gradient; longer ones are scaled down to it."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the weights, the order of sequences, the noise and dropout."""
    threads: Positive = 1
    """Threads of torch; small nets gain nothing from more, and another number may round differently."""
    device: Device = "cpu"
    """Where to train. On a GPU the same seed gives the same weights only up to rounding."""
    precision: Precision = "32"
    """Bits of the numbers that most is computed with in training; 16-mixed needs a GPU. Weights have 32 always."""

    @model_validator(mode="after")
    def _directions_fit(self) -> Self:
        if self.bidirectional and self.go_backwards:
            raise ValueError("a bidirectional layer goes backwards too: leave go_backwards out")
        return self

    @model_validator(mode="after")
    def _schedule_and_precision_fit(self) -> Self:
        if self.warmup >= self.epochs:
            raise ValueError(f"warmup of {self.warmup} epochs leaves nothing of {self.epochs}: lower it")
        if self.precision == "16-mixed" and self.device == "cpu":
            raise ValueError("precision 16-mixed needs device cuda; on a CPU there is bf16-mixed")
        return self

    @property
    def options(self) -> LayerOptions:
        """The options of every recurrent layer."""
        return LayerOptions.model_validate(self.model_dump(include=set(LayerOptions.model_fields)))

    def to_dict(self) -> dict[str, str | int | float | bool | None]:
        """The settings by name, for JSON."""
        return self.model_dump()

    def changed(self, **settings: Any) -> Recipe:
        """A copy with other settings. Raises RecipeError."""
        return self.of(self.to_dict() | settings)

    @classmethod
    def of(cls, settings: object) -> Self:
        """The reverse of `to_dict`. Raises RecipeError for a setting that makes no sense."""
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise RecipeError(faults(error)) from error


def faults(error: ValidationError) -> str:
    """Say what is wrong with settings, by name, in one line."""
    found = [
        (
            ".".join(map(str, each["loc"])),
            "it has to be given" if each["type"] == "missing" else each["msg"].removeprefix("Value error, "),
        )
        for each in error.errors()
    ]
    return "; ".join(f"{name}: {what}" if name else what for name, what in found)
