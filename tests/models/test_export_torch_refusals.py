"""Torch modules that a graph cannot be equal to are refused, with what to change."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from models.errors import ConversionError
from models.export import export
from tests.models.torch_modules import Careless, LastStep, Tagger

X = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(5))


class Around(nn.Module):
    """A GRU, and what a function makes of it."""

    def __init__(self, forward, **settings) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True, **settings)
        self.learned = nn.Parameter(torch.ones(1, 4, 4))
        self.table = nn.Embedding(7, 3)
        self.code = forward

    def forward(self, x, ends=None):
        return self.code(self, x, ends)


class Own(nn.GRU):
    """A subclass."""


def packed_by_numbers(self, x, ends):
    packed = pack_padded_sequence(x, ends.tolist(), batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(self.gru(packed)[0], batch_first=True)[0]


def sorted_by_hand(self, x, ends):
    ends, order = ends.sort(descending=True)
    packed = pack_padded_sequence(x[order], ends, batch_first=True)
    return self.gru(packed)[1][0][order.argsort()]


def from_list(self, x, ends):
    packed = pack_sequence([row[:end] for row, end in zip(x, ends.tolist(), strict=True)], enforce_sorted=False)
    return self.gru(packed)[1][0]


LENGTHS = torch.tensor([6, 2, 4, 1])
MODULES = {
    "projection": (lambda: nn.LSTM(3, 4, proj_size=2), X, r"the module \(LSTM\): proj_size=2 has no ONNX operator"),
    "cell": (lambda: nn.Sequential(nn.GRUCell(3, 4)), X[0], r"0 \(GRUCell\) takes one step at a time"),
    "subclass": (lambda: nn.Sequential(Own(3, 4)), X, r"0 \(Own\) is a class of its own"),
    "none": (lambda: nn.Linear(3, 2), X, "calls no nn.RNN, nn.LSTM or nn.GRU"),
    "unbatched": (
        lambda: Around(lambda self, x, _: self.gru(x)[0]),
        X[0],
        "gru takes one sequence without a batch axis",
    ),
    "twice": (lambda: Around(lambda self, x, _: self.gru(x)[0] + self.gru(x)[0]), X, "gru is called more than once"),
    "learned state": (
        lambda: Around(lambda self, x, _: self.gru(x, self.learned)[0]),
        X,
        "gru is called with a state that is not zero: leave it out",
    ),
    "square": (LastStep, X[:, :4].transpose(0, 1), "the example has 4 rows of 4 steps: make these two numbers differ"),
    "double": (lambda: Tagger().double(), X.double(), r"weights are float64.*call module.float\(\)"),
    "other name": (
        lambda: Around(lambda self, x, ends: self.gru(x)[0] * ends[:, None, None]),
        (X, LENGTHS),
        "argument 'ends' looks like each row's length: say lengths='ends'",
    ),
    "every other step": (
        lambda: Around(lambda self, x, _: self.gru(x[:, ::2])[0]),
        X,
        r"recurrent layers read 4 rows of 3 steps, and no argument is \[4, 3, ...\]: they have to read every step",
    ),
    "padding": (
        Careless,
        X,
        r"not as alone \('y' is off by .*\): rows of a batch are padded: let forward take lengths",
    ),
    "text": (
        lambda: Around(lambda self, x, _: [self.gru(x), "text"]),
        X,
        "the module returns str: return tensors, in a tuple or dict",
    ),
    "loss": (lambda: Around(lambda self, x, _: self.gru(x)[0].sum()), X, r"output 'y' is \[\] for 6 rows of 11 steps"),
    "ids": (
        lambda: Around(lambda self, x, _: self.gru(x[:, :, None].float().expand(-1, -1, 3))[0]),
        torch.ones(4, 6, dtype=torch.int64),
        "input 'x' is torch.int64, and no nn.Embedding looks it up",
    ),
    "arguments": (Careless, (X, X), r"the example does not fit forward\(x\)"),
    "flag": (lambda: Around(lambda self, x, _: self.gru(x)[0]), (X, True), "argument 'ends' is bool: give tensors"),
}


@pytest.mark.parametrize(("make", "example", "match"), [pytest.param(*each, id=name) for name, each in MODULES.items()])
def test_what_to_change_is_said(make, example, match):
    with pytest.raises(ConversionError, match=match) as caught:
        export(make(), example)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (packed_by_numbers, "lengths reach pack_padded_sequence as numbers"),
        (sorted_by_hand, "not as alone .* and sort no rows"),
        (from_list, "pack_sequence and unpack_sequence take lists"),
    ],
)
def test_packing_that_no_graph_can_hold_is_refused(forward, match):
    with pytest.raises(ConversionError, match=match):
        export(Around(forward), (X, LENGTHS), lengths="ends")


def cut(self, x, ends):
    return self.gru(pack_padded_sequence(x, ends, batch_first=True, enforce_sorted=False))[1][0]


def test_longest_row_fills_the_example():
    with pytest.raises(ConversionError, match=r"read 4 rows of 5 steps, .* the longest row of an example"):
        export(Around(cut), (X, LENGTHS.clamp(max=5)), lengths="ends")


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (
            lambda self, x, _: self.gru(x)[0] * (2 if x.mean() > 9 else 3),
            "Could not guard on data-dependent expression",
        ),
        (lambda self, x, ends: self.gru(x)[0][:, : ends.max()], "y: axis time came out as"),
    ],
)
def test_tensors_that_become_numbers_are_told_of(forward, match, capfd):
    with pytest.raises(ConversionError, match=f"{match}.*index and mask with tensors") as caught:
        export(Around(forward), (X, LENGTHS), lengths="ends")
    assert "\x1b" not in str(caught.value)


def test_labels_have_to_fit():
    with pytest.raises(ConversionError, match=r"2 labels, where the answers are \[\[3\]\]"):
        export(LastStep(), X.transpose(0, 1), labels=["a", "b"])
    with pytest.raises(ConversionError, match="2 output names for 1 outputs"):
        export(LastStep(), X.transpose(0, 1), output_names=["a", "b"])
