"""Write the real sequences that the page offers to try a model with: service/web/examples/TASK.json, from models/tasks.

python -m scripts.page_examples [--check]: with it, compare only.
"""

import json
import sys
from pathlib import Path

import numpy as np

from models import tasks
from models.spec import GoldenArray
from models.tasks import Examples

FOLDER = Path(__file__).parent.parent / "service" / "web" / "examples"
MAX_STEPS = 168
"""Longest example: a week of hours."""
SHOWN = {"names": ("MARY", "JAMES", "ROBIN"), "g2p": ("recurrent", "serving", "neural")}
"""Words that are chosen by what they are; they need not be of the test split."""


def examples_of(name: str) -> dict:
    """Choose a few sequences of a task's test split; where a label is known, of different ones."""
    task = tasks.load(name)
    if name in SHOWN:
        spec = task.source_input if name == "g2p" else task.inputs[0]
        chosen = [spelled(spec, word) for word in SHOWN[name]]
    elif isinstance(task.test, Examples):
        spec = task.inputs[0]
        firsts = task.test.contexts or [prompt[:1] for prompt in task.test.prompts]
        unlike = {first.tobytes(): first for first in firsts}
        names = spec.element_names if task.test.contexts else task.vocabulary
        chosen = [
            (names[int(np.argmax(each)) if task.test.contexts else int(each[0])], {spec.name: each})
            for each in unlike.values()
        ]
    else:
        split, spec = task.test, task.inputs[0]
        if task.labels:
            labels = [int(target) for target in split.targets]
            numbers = [labels.index(label) for label in np.linspace(0, len(task.labels) - 1, 3).astype(int)]
        else:
            numbers = sorted(range(len(split)), key=lambda n: -len(split.inputs[n]))[:1]
            numbers += [len(split) // 2, len(split) - 1] if len(split) > 100 else []
        chosen = []
        for number in numbers:
            about = f", {task.labels[int(split.targets[number])]}" if task.labels else ""
            chosen.append((f"Test sequence {number}{about}", {spec.name: split.inputs[number][:MAX_STEPS]}))
    examples = [
        {"name": title, "inputs": {key: GoldenArray.of(value).model_dump(mode="json") for key, value in inputs.items()}}
        for title, inputs in chosen
    ]
    return {"source": task.data_set, "license": task.license, "examples": examples}


def spelled(spec, word: str) -> tuple[str, dict]:
    """A word as the ids of its letters."""
    ids = [spec.categories.index(letter) for letter in word]
    return word, {spec.name: np.array(ids, dtype=np.int64)}


def main(is_check: bool) -> int:
    """Write or compare every file. Returns the exit code."""
    wrong = []
    for name in tasks.NAMES:
        path = FOLDER / f"{name}.json"
        text = json.dumps(examples_of(name), indent=1) + "\n"
        if is_check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            wrong.append(str(path))
        elif not is_check:
            path.write_text(text, encoding="utf-8")
    if wrong:
        print(f"differ from the data: {', '.join(wrong)}; run `python -m scripts.page_examples`")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
