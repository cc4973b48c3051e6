"""Curves for TensorBoard, beside those that every run keeps."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from models.errors import MissingExtra
from models.runs import Row


class Board:
    """A log that TensorBoard shows; without a directory, it does nothing."""

    def __init__(self, path: Path | None) -> None:
        """Prepare a log; nothing is written before the first epoch is done. Raises MissingExtra."""
        self._path = path
        self._writer: Any = None
        if path is not None:
            try:
                import torch.utils.tensorboard  # noqa: F401
            except ModuleNotFoundError as error:
                raise MissingExtra(
                    "--tensorboard", package="tensorboard", extra="tensorboard", purpose="tensorboard"
                ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the log."""
        if self._writer:
            self._writer.close()

    def epoch(self, row: Row) -> None:
        """Log an epoch: losses and metrics by split, so that training and validation share a picture."""
        if self._path is None:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # What a killed run logged of the epoch that is done again is shown no more.
            self._writer = SummaryWriter(str(self._path), purge_step=int(row["epoch"]))
        for name, value in row.items():
            split, _, of = name.partition("_")
            if name != "epoch":
                tag = f"{of}/{split}" if split in {"train", "validation"} else f"run/{name}"
                self._writer.add_scalar(tag, value, int(row["epoch"]))
        self._writer.flush()

    def end(self, metrics: dict[str, Any]) -> None:
        """Log the metrics of a run that is over, of the epoch that is kept."""
        if self._writer:
            for name, value in metrics.get("test", {}).items():
                self._writer.add_scalar(f"{name}/test", value, int(metrics["best_epoch"]))
