"""Makes docs/options.md from what the grid of options measures: `make options`."""

# ruff: noqa: E501 - lines of tables do not wrap

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

from models.options import LayerOptions
from models.spec import Cell
from tests.option_grid import TOLERANCE, Case, Measured, cells_of, measure, option_rows

PAGE = Path(__file__).resolve().parent.parent / "docs/options.md"

MEASURED: dict[str, tuple[Cell, ...]] = {"activation": ("lstm",), "recurrent_activation": ("gru",)}
"""Cells that stand for the others in rows of activations, of which there are many."""

Row = tuple[str, str, dict[str, Measured]]

_TORCH = {
    "activation": "tanh; relu of an RNN",
    "recurrent_activation": "sigmoid",
    "use_bias": "`bias`; two biases that are both trained",
    "reset_after": "always True",
    "go_backwards": "none",
    "unroll": "none",
    "merge_mode": "concat",
    "preset": "none",
}

_HEAD = """\
# Options beside Keras

[layers.md](layers.md) says how options are written, and what is different from Keras. This page is made by `make options`, which computes every row with the same
weights in Keras 3 (torch backend), in numpy from the formulas, by our layers in torch, and by the exported graph in
onnxruntime: three ragged rows with initial states, outputs and final states. Of an activation the table measures one cell; `make test`
runs a sample of all cells, and `make test-full` every one of them, two layers, both directions and zero states too.

## What changes answers

The two columns of differences are against Keras, the largest of the cells, absolute below 1 and relative above. The form is
that of the exported graph: the native *operator*, nodes *decomposed* within a Scan where ONNX has no such activation, or
the steps *unrolled*. CPU: every row runs there, as was measured. CUDA was not measured here: it is what is known of
onnxruntime's CUDA kernels, where activations other than the defaults and a GRU that resets before the product have none.

| option | value | cells | torch.nn has | eager | ONNX | ONNX form | CPU | CUDA |
|---|---|---|---|---|---|---|---|---|
"""

_TAIL = """
Defaults: {defaults}.

## What changes training alone

These leave the graph as it is (`tests/models/test_option_exports.py`); their numbers are compared with Keras' own functions,
or with what the formulas say, in `tests/models/test_option_grid.py` and `tests/models/test_layer_options.py`.

| option | Keras' default, and ours | torch.nn has |
|---|---|---|
| kernel_initializer, recurrent_initializer, bias_initializer | glorot_uniform, orthogonal, zeros | uniform within 1 / sqrt(hidden): `torch` |
| unit_forget_bias | True | no |
| kernel_, recurrent_, bias_, activity_regularizer | None | no |
| kernel_, recurrent_, bias_constraint | None | no |
| dropout, recurrent_dropout | 0.0, one mask for all steps of a sequence | between layers only, a mask for each step |

## Keras' other words

- **keras2**, the preset: `recurrent_activation=hard_sigmoid_v2` (0.2 x + 0.5; Keras 3's `hard_sigmoid` is x / 6 + 0.5) and
  `reset_after=False`, as older tutorials have it.
- **return_sequences** is `emit`: ALL steps, or the LAST. **return_state** is the final states that Predict is asked for;
  `initial_state` those that it is given.
- **stateful** is a session: the server keeps a sequence's state from one message to the next, under its name.
- **unroll**: whether it is faster stands in [performance.md](performance.md).
"""


def table_cases() -> Iterator[tuple[str, str, list[Case]]]:
    """What every row of the table measures: option, value, cases."""
    for option, value, settings, both in option_rows():
        cells = MEASURED.get(option, cells_of(option))
        yield option, value, [Case(cell, settings, bidirectional=both) for cell in cells]


def measured() -> list[Row]:
    """Measure every row of the table."""
    rows = []
    for option, value, cases in table_cases():
        rows.append((option, value, {case.cell: measure(case) for case in cases}))
        sys.stderr.write(f"{option}={value}\n")
    return rows


def page(rows: list[Row]) -> str:
    """Write the page."""
    lines = []
    for option, value, found in rows:
        forms = dict.fromkeys(each.form for each in found.values())
        eager, graph = (max(getattr(each, name) for each in found.values()) for name in ("eager_keras", "onnx_keras"))
        cells = ", ".join({"rnn": "SimpleRNN", "gru": "GRU", "lstm": "LSTM"}[cell] for cell in found)
        cuda = _cuda(option, value, set(forms))
        columns = (
            f"`{option}`",
            value,
            cells,
            _TORCH[option],
            _said(eager),
            _said(graph),
            ", ".join(forms),
            "yes",
            cuda,
        )
        lines.append(f"| {' | '.join(columns)} |\n")
    names = ("activation", "recurrent_activation", "use_bias", "reset_after", "go_backwards", "unroll", "merge_mode")
    defaults = ", ".join(f"`{name}={getattr(LayerOptions(), name)}`" for name in names)
    return _HEAD + "".join(lines) + _TAIL.format(defaults=defaults)


def _said(gap: float) -> str:
    return "<= 1e-5" if gap <= TOLERANCE else f"**{gap:.0e}**"


def _cuda(option: str, value: str, forms: set[str]) -> str:
    if forms & {"decomposed", "unrolled"}:
        return "node by node"
    is_default = getattr(LayerOptions(), option, None) == value
    if option in ("activation", "recurrent_activation", "preset") and not is_default:
        return "falls back"
    return "falls back" if (option, value) == ("reset_after", "False") else "yes"


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Every export builds torch's table of translations to ONNX anew, which takes longer than all else here.
    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
    PAGE.write_text(page(measured()))
