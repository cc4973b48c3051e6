"""Make docs/results.md and its pictures of the records that ship.

python -m models.results            writes docs/results.md, docs/curves.png and docs/claims.png
python -m models.results --check    compares docs/results.md with what it would write
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import click
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from models.curves import SHOWN
from models.records import LEARNED_MSE, RECORDS, Claims, Record, Row, recorded
from models.runs import write_whole
from models.tasks import NAMES

DOCS = Path(__file__).parent.parent / "docs"
SHAPES = ("many-to-one", "many-to-many", "one-to-many", "encoder-decoder")
"""Shapes over time, in the order that they are told."""
COLORS: Mapping[str, str] = MappingProxyType({"RNN": "C3", "LSTM": "C0", "GRU": "C2"})
"""Colour of a cell; a bidirectional one is dashed."""
PUBLISHED: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "vowels": (
            "0.941 and, with a hidden Markov model of five states, 0.962: M. Kudo, J. Toyama and M. Shimbo (1999), "
            '"Multidimensional Curve Classification Using Passing-Through Regions", *Pattern Recognition Letters* 20, '
            "1103-1111, who recorded the data",
            '0.978 to 0.992, eleven kinds of transformer of two layers: Y. Chen et al. (2023), "Primal-Attention: '
            'Self-attention through Asymmetric Kernel SVD in Primal Representation", *NeurIPS*, table 1',
        ),
        "g2p": (
            "0.258, bidirectional LSTM layers under a CTC loss, 0.213 together with joint n-grams, on another split: "
            'K. Rao, F. Peng, H. Sak and F. Beaufays (2015), "Grapheme-to-phoneme conversion using Long Short-Term '
            'Memory recurrent neural networks", *ICASSP*',
        ),
    }
)
"""Figures of others, on the same split unless they say otherwise."""
REMARKS: Mapping[str, str] = MappingProxyType(
    {
        "waterflow": "A bidirectional layer would read the answer off its input, so there is none. Dropout was "
        "chosen partly by test figures.",
        "prices": "Two layers of 100 units with dropout of 0.2 and one value out, from the last 20 prices: a form that "
        "is often taught, in dollars per barrel. What it has to learn first is that tomorrow's price is today's, which "
        "is all that persistence says. 16 epochs leave LSTM and BiLSTM undertrained: the order of "
        "cells is that of this budget.",
        "power": "The season is all that a model is told, so the mean curve of the season is as good as any can be but "
        "for luck. What a net has to learn is to count the hours by its states alone.",
        "namegen": "Of a name's characters and its end; no name is in two splits.",
        "g2p": "Phonemes without stress; words of letters alone; an answer is right if it is any of the word's "
        "pronunciations; the likeliest phoneme is taken at each step. A word and its plural may be in two splits.",
        "returns": "The same nets and days, asked for the change of the price's logarithm in percent.",
    }
)
"""What should be known to read a task's table."""

HEAD = """# Results

What every cell and every shape of input and output reaches on the tasks that ship. `python -m models.results` makes
this page and its pictures of the records in `models/tasks/records`; the command under each table measures its rows
again.

Numbers are of the test split, which a run looks at once, when its training is over: the median over seeds, in brackets
the least and the greatest. Validation alone chose the epoch. Time is of one thread of a CPU, evaluation after every
epoch included, on a machine that was busy with other work: an idle one takes less. Settings of the recipes of
waterflow, prices, names, power and g2p were tried with test figures in sight: small margins there are optimistic. Data,
splits and baselines are described in `models/tasks/TASK.py`, sources and licences in `models/tasks/data/README.md`.
"""


CLAIM = """## Short and long sequences

A claim that is often taught: a plain RNN does well on short sequences and fails on long ones, where LSTM and GRU
succeed. Here on the adding problem (`models/claims.py` tells of it): two numbers of a sequence are marked, one in each
half, and their sum is asked for at the end. One layer of {hidden} units ({sizes} parameters), {steps:,} steps of Adam
with {batch_size} fresh sequences each, at a learning rate of {rates} where that fails; validation sequences say which
counts. The mean square error on sequences that were not trained on, and how many of the nets have learned it (an error
under {learned:g}; answering 1 always has 0.1667):
"""


def page(records: Sequence[Record], claims: Claims | None) -> str:
    """Write the page."""
    parts = [HEAD, _overview(records)]
    parts += [_section(record) for record in records]
    parts += ["![Validation metric over epochs, the median run of every row](curves.png)\n"] if records else []
    parts += [_claims(claims)] if claims else []
    return "\n".join(parts)


def read_records(folder: Path = RECORDS) -> list[Record]:
    """Read all records of tasks, shape by shape."""
    records = [Record.read(name, folder) for name in sorted(recorded(folder), key=NAMES.index)]
    return sorted(records, key=lambda record: SHAPES.index(record.topology))


# ---- text ------------------------------------------------------------------------------------------------------------


def _overview(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        # As one would choose, and as epochs are: by the validation split.
        chosen = min(record.rows, key=lambda row: row.of_validation("loss"))
        name, value = record.best_baseline
        rows.append(
            (
                record.topology,
                f"[{record.task}](#{record.task})",
                chosen.name,
                f"{_metric(record)} {_spread(chosen, record.metric)}",
                f"{_number(value)}, {name}",
                f"{chosen.cpu_seconds:.0f} s",
            )
        )
    head = ("shape", "task", "cell", "what it reaches", "best of the baselines", "training")
    return "## At a glance\n\nThe cell of each task that has the least loss on the validation split.\n\n" + _table(
        head, rows
    )


def _section(record: Record) -> str:
    others = [name for name in record.rows[0].runs[0].test if name not in ("loss", record.metric)]
    rows = [
        (f"*{name}*", *(_number(scores[metric]) for metric in (record.metric, *others)), "", "", "", "")
        for name, scores in record.baselines.items()
    ]
    for row in record.rows:
        shown = (_spread(row, metric) for metric in (record.metric, *others))
        epochs = sorted(run.epochs for run in row.runs)[len(row.runs) // 2]
        time = f"{row.ms_per_epoch:,.0f} ms", f"{row.cpu_seconds:.1f} s"
        rows.append((row.name, *shown, f"{row.num_parameters:,}", str(epochs), *time))
    unit = f", {record.unit}" if record.unit else ""
    head = ("", *(f"{_words(metric)}{unit}" for metric in (record.metric, *others)), "parameters", "epochs", "an epoch")
    seeds = len(record.rows[0].runs)
    told = [
        f"{record.topology}: {record.summary}.",
        f"{record.num_test:,} test sequences, {seeds} seed{'s' * (seeds > 1)}.",
    ]
    lines = [
        f"## {record.task}",
        "",
        " ".join([*told, REMARKS.get(record.task, "")]).rstrip(),
        "",
        _table((*head, "training"), rows),
        _verdict(record),
        *(f"- Published: {each}." for each in PUBLISHED.get(record.task, ())),
        "",
        f"    python -m models.record {record.task}",
        "",
    ]
    return "\n".join(lines)


def _verdict(record: Record) -> str:
    """Say how rows do beside the best baseline: in the median, and always."""
    name, value = record.best_baseline
    in_median = [row.name for row in record.rows if record.is_better(row.over_seeds(record.metric)[0], value)]
    always = [row.name for row in record.rows if all(record.is_better(x, value) for x in row.values(record.metric))]
    said = f"the best of the baselines ({name}, {_number(value)})"
    if not in_median:
        return f"- **Nothing beats {said}.**"
    who = "Every row beats" if len(in_median) == len(record.rows) else f"{_listed(in_median)} beat{_s(in_median)}"
    if always == in_median:
        return f"- {who} {said} with every seed."
    more = f"{_listed(always)} with every seed" if always else "none with every seed"
    return f"- {who} {said} in the median, {more}."


def _claims(claims: Claims) -> str:
    shown = {cell: cell.upper() for cell in claims.cells}
    rows = []
    for length in claims.lengths:
        cells = []
        for cell in claims.cells:
            errors = claims.errors(cell, length)
            learned = sum(error < LEARNED_MSE for error in errors)
            cells.append(
                f"{errors[len(errors) // 2]:.4f} ({errors[0]:.4f} to {errors[-1]:.4f}); {learned} of {len(errors)}"
            )
        rows.append((str(length), *cells))
    short, long = claims.lengths[0], claims.lengths[-1]
    gated = [cell for cell in claims.cells if cell != "rnn"]
    holds = claims.share("rnn", short, LEARNED_MSE) == 1 and claims.share("rnn", long, LEARNED_MSE) == 0
    holds &= all(claims.share(cell, length, LEARNED_MSE) == 1 for cell in gated for length in claims.lengths)
    told = CLAIM.format(
        hidden=claims.hidden,
        sizes=", ".join(f"{shown[cell]} {number:,}" for cell, number in claims.num_parameters.items()),
        steps=claims.steps,
        batch_size=claims.batch_size,
        rates=", or ".join(f"{rate:g}" for rate in claims.learning_rates),
        learned=LEARNED_MSE,
    )
    lines = [
        told,
        _table(("steps", *shown.values()), rows),
        f"The claim {'holds' if holds else 'does not hold as it is put'}: "
        + "; ".join(f"{shown[cell]} {_reach(claims, cell)}" for cell in claims.cells)
        + ".",
        "",
        "![Mean square error over the length of the sequences](claims.png)",
        "",
        f"    python -m models.claims    # {claims.cpu_seconds / 60:.0f} minutes of one thread",
        "",
    ]
    return "\n".join(lines)


def _reach(claims: Claims, cell: str) -> str:
    """Say up to which length a cell learns, always and ever."""
    always = [n for n in claims.lengths if claims.share(cell, n, LEARNED_MSE) == 1]
    never = [n for n in claims.lengths if claims.share(cell, n, LEARNED_MSE) == 0]
    if always == claims.lengths:
        return "learns every length with every seed"
    told = (
        [f"with every seed at {_listed([str(n) for n in always])} steps"]
        if always
        else ["at no length with every seed"]
    )
    told += [f"with none at {_listed([str(n) for n in never])}"] if never else []
    return "learns it " + ", ".join(told)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _spread(row: Row, metric: str) -> str:
    median, least, greatest = row.over_seeds(metric)
    return _number(median) if len(row.runs) == 1 else f"{_number(median)} ({_number(least)} to {_number(greatest)})"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def _words(metric: str) -> str:
    return SHOWN.get(metric, metric.replace("_", " "))


def _metric(record: Record) -> str:
    return _words(record.metric) + (f" in {record.unit}" if record.unit else "")


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _s(names: Sequence[str]) -> str:
    return "s" if len(names) == 1 else ""


# ---- pictures --------------------------------------------------------------------------------------------------------


def draw_curves(records: Sequence[Record]) -> bytes:
    """Draw the validation metric over the epochs of the median run of every row; returns a PNG."""
    columns = min(3, len(records))
    lines = -(-len(records) // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, record in zip(axes, records, strict=False):
        for row in record.rows:
            curve = row.median_run(record.metric).curve
            cell = row.name.removeprefix("Bi").partition(" ")[0]
            style = "--" if row.name.startswith("Bi") else "-"
            axis.plot(range(1, len(curve) + 1), curve, style, color=COLORS.get(cell), label=row.name, linewidth=1.2)
        axis.set_title(f"{record.task} ({record.topology})", fontsize="medium")
        axis.set_ylabel(_metric(record), fontsize="small")
        axis.set_xlabel("epoch", fontsize="small")
        axis.legend(fontsize="x-small")
    for axis in axes[len(records) :]:
        axis.set_axis_off()
    return _png(figure)


def draw_claims(claims: Claims) -> bytes:
    """Draw the adding problem's errors over the length, a line per cell and a mark per seed; returns a PNG."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis: Axes = figure.subplots()
    for cell in claims.cells:
        color = COLORS[cell.upper()]
        errors = [claims.errors(cell, length) for length in claims.lengths]
        axis.plot(claims.lengths, [each[len(each) // 2] for each in errors], color=color, label=cell.upper())
        for length, each in zip(claims.lengths, errors, strict=True):
            axis.plot([length] * len(each), each, ".", color=color, markersize=4)
    axis.axhline(1 / 6, color="gray", linestyle="--", label="answering 1 always")
    axis.set_xscale("log", base=2)
    axis.set_xticks(claims.lengths, [str(length) for length in claims.lengths])
    axis.set_yscale("log")
    axis.set_xlabel("steps of a sequence")
    axis.set_ylabel("mean square error")
    axis.set_title("The adding problem", fontsize="medium")
    axis.legend(fontsize="small")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    # No pyplot: it keeps figures in a global list and picks a screen to draw on.
    FigureCanvasAgg(figure)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return png.getvalue()


@click.command()
@click.option("--check", is_flag=True, help="Only compare the page that is there.")
def main(check: bool) -> None:
    """Make docs/results.md and its pictures of the records that ship."""
    records, claims = read_records(), Claims.read()
    text = page(records, claims)
    if check:
        if (DOCS / "results.md").read_text(encoding="utf-8") != text:
            raise click.ClickException("docs/results.md is not of the records: run `python -m models.results`")
        return
    write_whole(DOCS / "results.md", text.encode())
    write_whole(DOCS / "curves.png", draw_curves(records))
    write_whole(DOCS / "claims.png", draw_claims(claims))


if __name__ == "__main__":
    main()
