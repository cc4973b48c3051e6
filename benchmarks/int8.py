"""What 8-bit forms of a model cost and bring: metrics and sizes, onnxruntime alone, and what a client is served.

python -m benchmarks.int8 [--quick]     prints tables, and puts them into docs/quantization.md
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
import torch

from benchmarks.measure import FEATURES, OUTPUTS, Loaded, Raw, put_load
from benchmarks.processes import rnnserve
from benchmarks.report import machine
from models import tasks
from models.errors import ExportError
from models.export import export_run
from models.quantize import quantize
from models.train import train
from service.backend import Backend
from service.client.load import Load
from tests.onnx_models import build

PAGE = Path(__file__).parent.parent / "docs" / "quantization.md"
MARK = "<!-- below: written by python -m benchmarks.int8 -->\n"
FLOAT = "float32"
FORMS = (FLOAT, "weights", "static", "dynamic")
TRAINED = (
    ("vowels", {"cell": "gru", "hidden": 64}),
    ("vowels", {"cell": "lstm", "hidden": 64}),
    ("vowels", {"cell": "rnn", "hidden": 64}),
    ("vowels", {"cell": "gru", "hidden": 64, "bidirectional": True}),
    ("vowels", {"cell": "lstm", "hidden": 512, "epochs": 12}),
    ("waterflow", {"cell": "gru", "hidden": 64}),
    ("waterflow", {"cell": "lstm", "hidden": 256, "epochs": 20}),
)
KERNELS = [(cell, hidden) for cell in ("lstm", "gru", "rnn") for hidden in (64, 128, 256, 512)]
BATCHES = (1, 16, 64, 256)
SERVED = (("lstm", 128), ("lstm", 512), ("gru", 512))
LOADS = {
    "1 stream": Load(),
    "64 streams": Load(streams=64),
    "frames of 256 sessions": Load(kind="frames", sessions=256),
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def metrics(is_quick: bool) -> Iterator[list[str]]:
    """Train, export in every form however much it loses, and say what it loses."""
    for name, settings in TRAINED[:2] if is_quick else TRAINED:
        task = tasks.load(name)
        settings = {"epochs": 40} | settings
        recipe = task.recipe.changed(**(settings | {"epochs": 2} if is_quick else settings))
        words = " ".join(str(settings[key]) for key in ("cell", "hidden"))
        title = f"{name} {words}" + (" both ways" if settings.get("bidirectional") else "")
        with tempfile.TemporaryDirectory() as folder:
            run = train(task, recipe, Path(folder) / "run", show_progress=False).run
            for form in FORMS[1:]:
                try:
                    made = export_run(run, Path(folder), name=form, int8=form, max_drop=1.0)
                except ExportError as error:
                    yield [title, form, str(error).split(": ", 2)[-1].split(";")[0], "", "", ""]
                    continue
                told = made.spec.quantization
                scores = [
                    ", ".join(f"{key} {value:.4f}" for key, value in each.items()) for each in (told.before, told.after)
                ]
                sizes = f"{told.size_before / 1024:,.0f} -> {made.size / 1024:,.0f} KiB"
                verdict = Backend(made.path).probe(64).verdict
                yield [title, form, *scores, f"{told.max_abs_error:.3f}", sizes, verdict]


def save(root: Path, cell: str, hidden: int) -> list[str]:
    """Put a model's forms into a repository; returns those that it has."""
    built = build(cell, features=FEATURES, hidden=hidden, outputs=OUTPUTS)
    built.save(root, f"{cell}-{hidden}-{FLOAT}")
    forms = [FLOAT]
    for form in FORMS[1:]:
        with contextlib.suppress(ExportError):
            model = quantize(onnx.load_from_string(built.content), form).model
            path = root / f"{cell}-{hidden}-{form}" / "1" / "model.onnx"
            path.parent.mkdir(parents=True)
            path.write_bytes(model.SerializeToString())
            forms.append(form)
    return forms


def kernels(root: Path, seconds: float) -> Iterator[list[str]]:
    """Measure onnxruntime alone: CPU time of a step."""
    for cell, hidden in KERNELS:
        for form in save(root, cell, hidden):
            raw = Raw(root, f"{cell}-{hidden}-{form}")
            # The least of several: other work on the machine only ever adds.
            costs = [min(raw.step_us(batch, seconds / 4) for _ in range(4)) for batch in BATCHES]
            yield [f"{cell} {hidden}", form, *(f"{cost:.2f}" for cost in costs)]


def served(seconds: float) -> Iterator[list[str]]:
    """Measure what a client is served: CPU of the server for a step, and rates and latencies of each load."""
    for cell, hidden in SERVED:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            forms = save(root, cell, hidden)
            with rnnserve(root) as process:
                for form in forms:
                    name = f"{cell}-{hidden}-{form}"
                    figures = [_figures(process, load, seconds, name) for load in LOADS.values()]
                    yield [f"{cell} {hidden}", form, *figures]


def _figures(process: object, load: Load, seconds: float, model: str) -> str:
    runs: list[Loaded] = [put_load(process, load, seconds / 2, model=model) for _ in range(2)]
    best = min(runs, key=lambda run: run.cpu_us_per_step)
    return f"{best.cpu_us_per_step:.1f} us, {best.measured.percentile_ms(50):.2f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short and rough, and the page is left as it is")
    is_quick = parser.parse_args().quick
    torch.set_num_threads(1)
    seconds = 0.05 if is_quick else 0.6
    parts = ["Measured on: " + ", ".join(f"{name} {value}" for name, value in machine().items()) + ".\n"]

    def show(part: str) -> None:
        parts.append(part)
        print(part, flush=True)

    show("### Metrics of the test split, and sizes\n")
    head = ["model", "form", "before", "after", "largest difference", "size", "the server's probe"]
    show(table(head, [row + [""] * (len(head) - len(row)) for row in metrics(is_quick)]))
    with tempfile.TemporaryDirectory() as folder:
        show("### onnxruntime alone: CPU time of a step, in microseconds\n")
        show(table(["model", "form", *(f"batch {batch}" for batch in BATCHES)], list(kernels(Path(folder), seconds))))
    show("### Served: CPU time of the server for a step, and median latency of a message\n")
    show(table(["model", "form", *LOADS], list(served(0.5 if is_quick else 5.0))))
    if not is_quick:
        text, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
        PAGE.write_text(text + mark + "\n" + "\n".join(parts), encoding="utf-8")
        print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
