"""Draw what a stream answers over time, from a server and a model that `make demo` made.

picture.py REPOSITORY PNG
"""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np

from models import tasks
from scripts.demo import MODEL, choose, served
from service.client import Client

TRUE, OTHER = "#1f6fb4", "#c9c9c9"


def main(repository: Path, picture: Path) -> None:
    """Stream test utterances of three speakers, and plot the probability of every speaker after each frame."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    task = tasks.load(MODEL)
    chosen = choose(task)
    figure, panels = plt.subplots(1, len(chosen), figsize=(11, 3.2), sharey=True, layout="constrained")
    with served(repository) as address, Client(address) as client:
        for panel, utterance in zip(panels, chosen, strict=True):
            with client.stream(MODEL) as stream:
                scores = np.array(list(stream.run(task.test.inputs[utterance])))
            frames = np.arange(1, len(scores) + 1)
            truth = int(task.test.targets[utterance])
            for speaker in range(scores.shape[1]):
                if speaker != truth:
                    panel.plot(frames, scores[:, speaker], color=OTHER, linewidth=1)
            panel.plot(frames, scores[:, truth], color=TRUE, linewidth=2.5)
            panel.annotate(
                task.labels[truth],
                (frames[-1], scores[-1, truth]),
                xytext=(0, -14),
                textcoords="offset points",
                ha="right",
                color=TRUE,
            )
            panel.set(title=f"test utterance {utterance}", xlabel="frame", ylim=(0, 1.02))
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("probability of each speaker")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    print(f"wrote {picture}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
