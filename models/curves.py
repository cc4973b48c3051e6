"""The picture of a run's learning curves."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from models.runs import Row

SHOWN = {
    "accuracy": "accuracy",
    "balanced_accuracy": "accuracy, mean over classes",
    "mae": "mean absolute error",
    "rmse": "root mean square error",
    "bits_per_character": "bits per character",
}


def draw(rows: Sequence[Row], *, title: str, best_epoch: int, baseline: tuple[str, dict[str, float]]) -> bytes:
    """Draw losses, and validation metrics against the baseline's, over epochs; returns a PNG."""
    epochs = [row["epoch"] for row in rows]
    metrics = [name for name in baseline[1] if f"validation_{name}" in rows[0]]
    # No pyplot: it keeps figures in a global list and picks a screen to draw on.
    figure = Figure(figsize=(4.5 * (1 + len(metrics)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(1, 1 + len(metrics), squeeze=False)[0]
    axes[0].plot(epochs, [row["train_loss"] for row in rows], label="training")
    axes[0].plot(epochs, [row["validation_loss"] for row in rows], label="validation")
    axes[0].set_ylabel("loss")
    axes[0].set_yscale("log")
    for axis, name in zip(axes[1:], metrics, strict=True):
        axis.plot(epochs, [row[f"validation_{name}"] for row in rows], label="validation")
        axis.axhline(baseline[1][name], color="gray", linestyle="--", label=baseline[0])
        axis.set_ylabel(SHOWN.get(name, name.replace("_", " ")))
    for axis in axes:
        axis.axvline(best_epoch, color="black", linewidth=0.8, linestyle=":", label=f"kept: epoch {best_epoch}")
        axis.set_xlabel("epoch")
        axis.legend(fontsize="small")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()
