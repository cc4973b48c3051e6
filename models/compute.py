"""Where a net is trained, and in which precision."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import RecipeError
from models.recipe import Recipe

_AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class Compute:
    """A recipe's device and precision, for one run."""

    def __init__(self, recipe: Recipe) -> None:
        """Find the device. Raises RecipeError where there is none, or it cannot do the precision."""
        if recipe.device == "cuda" and not torch.cuda.is_available():
            why = (
                f"this PyTorch ({torch.__version__}) was built without CUDA: install a build that has it"
                if torch.version.cuda is None
                else "PyTorch finds no NVIDIA GPU: look at what nvidia-smi says"
            )
            raise RecipeError(f"device cuda: {why}, or train with --device cpu")
        if recipe.precision == "bf16-mixed" and recipe.device == "cuda" and not torch.cuda.is_bf16_supported():
            raise RecipeError("precision bf16-mixed: this GPU cannot do bfloat16; use 16-mixed")
        self.device = torch.device(recipe.device)
        self._dtype = _AUTOCAST.get(recipe.precision)
        # float16 has so small a range that losses have to be scaled up, or gradients vanish.
        self._scaler = torch.amp.GradScaler(recipe.device, enabled=recipe.precision == "16-mixed")

    @property
    def devices(self) -> list[int]:
        """Numbers of the GPUs whose random state the run depends on."""
        return [torch.cuda.current_device()] if self.device.type == "cuda" else []

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the recipe's precision what may be."""
        return torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype is not None)

    def descend(
        self, loss: Tensor, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, clip_norm: float
    ) -> None:
        """Take one step of the optimiser down the loss, along a gradient no longer than clip_norm."""
        optimizer.zero_grad()
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, clip_norm)
        self._scaler.step(optimizer)
        self._scaler.update()

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, besides weights and optimiser."""
        state: dict[str, Any] = {"torch_rng": torch.get_rng_state(), "scaler": self._scaler.state_dict()}
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state()
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """The reverse of `state`."""
        torch.set_rng_state(state["torch_rng"])
        self._scaler.load_state_dict(state["scaler"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"])
