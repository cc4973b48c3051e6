"""What options do to a layer in training: first weights, penalties, constraints, masks, and the ways to compute it."""

import numpy as np
import pytest
import torch

from models.constraints import constrained
from models.initializers import initial
from models.layers import STATES, Recurrent, constrain, penalty
from models.options import LayerOptions, parse_constraint, parse_initializer

CELLS = ["rnn", "gru", "lstm"]
LENGTHS = torch.tensor([7, 1, 4], dtype=torch.int32)


def layer_of(cell, *, bidirectional=False, hidden=6, **options):
    torch.manual_seed(3)
    return Recurrent(cell, 4, hidden, bidirectional=bidirectional, options=LayerOptions(**options))


# First weights


@pytest.mark.parametrize(
    ("text", "spread", "largest"),
    [
        ("glorot_uniform", np.sqrt(2 / 800), np.sqrt(6 / 800)),
        ("glorot_normal", np.sqrt(2 / 800), 2 * np.sqrt(2 / 800) / 0.8796),
        ("he_uniform", np.sqrt(2 / 200), np.sqrt(6 / 200)),
        ("he_normal", np.sqrt(2 / 200), 2 * np.sqrt(2 / 200) / 0.8796),
        ("lecun_uniform", np.sqrt(1 / 200), np.sqrt(3 / 200)),
        ("lecun_normal", np.sqrt(1 / 200), 2 * np.sqrt(1 / 200) / 0.8796),
        ("variance_scaling=3:fan_out:untruncated_normal", np.sqrt(3 / 600), 1.0),
        ("random_normal=stddev=0.3", 0.3, 3.0),
        ("truncated_normal=stddev=0.3", 0.3 * 0.8796, 0.6),
        ("random_uniform=-0.2:0.2", 0.4 / np.sqrt(12), 0.2),
        ("torch", 0.1 / np.sqrt(3), 0.1),
    ],
)
def test_weights_begin_with_the_spread_of_their_initializer(text, spread, largest):
    torch.manual_seed(0)
    weights = initial(parse_initializer(text), (200, 600), hidden=100)
    assert float(weights.mean()) == pytest.approx(0.0, abs=0.01 * spread)
    assert float(weights.std()) == pytest.approx(spread, rel=0.01)
    assert float(weights.abs().max()) <= largest * 1.001


def test_orthogonal_and_identity_are_what_they_say():
    rows = initial(parse_initializer("orthogonal=2"), (6, 18), hidden=6)
    torch.testing.assert_close(rows @ rows.T, 4 * torch.eye(6))
    torch.testing.assert_close(initial(parse_initializer("identity=3"), (2, 4), hidden=2), 3 * torch.eye(2, 4))


def test_gates_have_keras_order_in_an_initializer():
    """Keras puts the identity into its first gate, z of a gru, which is the second of torch."""
    weight = layer_of("gru", recurrent_initializer="identity").rnn.weight_hh_l0.detach()
    torch.testing.assert_close(weight, torch.cat([torch.zeros(6, 6), torch.eye(6), torch.zeros(6, 6)]))


@pytest.mark.parametrize("cell", CELLS)
def test_biases_are_as_many_as_keras_has(cell):
    layer = layer_of(cell, bias_initializer="constant=0.5")
    of_input, of_hidden = layer.rnn.bias_ih_l0.detach(), layer.rnn.bias_hh_l0
    assert of_hidden.requires_grad == (cell == "gru")
    assert float(of_hidden.detach().max()) == (0.5 if cell == "gru" else 0.0)
    expected = torch.full_like(of_input, 0.5)
    if cell == "lstm":
        expected[6:12] = 1.0
    torch.testing.assert_close(of_input, expected)
    assert not hasattr(layer_of(cell, use_bias=False).rnn, "bias_ih_l0")


def test_torch_biases_are_both_trained():
    assert layer_of("lstm", bias_initializer="torch").rnn.bias_hh_l0.requires_grad


@pytest.mark.parametrize("cell", CELLS)
def test_torch_initializers_begin_with_the_weights_of_torch_itself(cell):
    layer = layer_of(cell, **{f"{name}_initializer": "torch" for name in ("kernel", "recurrent", "bias")})
    torch.manual_seed(3)
    plain = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell](4, 6)
    for name, weights in plain.named_parameters():
        assert torch.equal(layer.rnn.get_parameter(name), weights)


# Penalties and constraints


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_penalty_is_the_formula(cell, bidirectional):
    regularizers = {"kernel_regularizer": "l2=0.1", "recurrent_regularizer": "l1=0.2", "bias_regularizer": "l1=1,l2=2"}
    layer = layer_of(cell, bidirectional=bidirectional, bias_initializer="random_normal=stddev=1", **regularizers)
    expected = 0.0
    for suffix in ("", "_reverse")[: layer.directions]:
        w, r, b, d = (getattr(layer.rnn, f"{name}_l0{suffix}").detach() for name in NAMES)
        expected += 0.1 * (w**2).sum() + 0.2 * r.abs().sum()
        biases = [b, d] if cell == "gru" else [b + d]
        expected += sum(each.abs().sum() + 2 * (each**2).sum() for each in biases)
    torch.testing.assert_close(layer.penalty(), expected)
    torch.testing.assert_close(penalty(torch.nn.Sequential(layer)), expected)


NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def test_activity_is_summed_over_real_steps_and_divided_by_the_batch():
    layer = layer_of("gru", activity_regularizer="l2=0.5").train()
    y = layer.outputs(torch.randn(8, 3, 4), LENGTHS)
    real = torch.cat([y[:length, row] for row, length in enumerate(LENGTHS.tolist())])
    torch.testing.assert_close(layer.penalty(), 0.5 * (real**2).sum() / 3)
    assert float(layer.penalty()) == 0.0  # told once
    layer.eval().outputs(torch.randn(8, 3, 4), LENGTHS)
    assert float(layer.penalty()) == 0.0


@pytest.mark.parametrize("axis", [0, 1])
def test_norms_are_along_an_axis_of_keras_weights(axis):
    weights = 2 * torch.randn(5, 12)
    norms = weights.norm(dim=axis, keepdim=True)
    cases = {
        f"max_norm=1.5:{axis}": norms.clamp(max=1.5),
        f"unit_norm={axis}": torch.ones_like(norms),
        f"min_max_norm=3:5:0.25:{axis}": 0.25 * norms.clamp(3, 5) + 0.75 * norms,
    }
    for text, wanted in cases.items():
        torch.testing.assert_close(constrained(parse_constraint(text), weights), weights * wanted / (norms + 1e-7))


def test_constraints_hold_for_every_weight_of_a_layer():
    limits = {"kernel_constraint": "max_norm=0.5", "recurrent_constraint": "unit_norm", "bias_constraint": "non_neg"}
    layer = layer_of("lstm", bidirectional=True, bias_initializer="random_normal=stddev=1", **limits)
    constrain(torch.nn.ModuleList([layer]))
    for suffix in ("", "_reverse"):
        w, r, b, _ = (getattr(layer.rnn, f"{name}_l0{suffix}").detach() for name in NAMES)
        assert (
            float(w.norm(dim=1).max()) <= 0.5 + 1e-6
        )  # torch's rows are Keras' columns: all inputs of a unit of a gate
        torch.testing.assert_close(r.norm(dim=1), torch.ones(24))
        assert float(b.min()) == 0.0
    assert layer.rnn.weight_ih_l0.requires_grad


# Masks


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_mask_is_the_same_at_every_step(recurrent):
    """With weights of one, a linear rnn's output tells which inputs and units were kept."""
    ones = {f"{name}_initializer": "ones" for name in ("kernel",)}
    rate = {"recurrent_dropout": 0.5} if recurrent else {"dropout": 0.5}
    layer = layer_of("rnn", activation="linear", recurrent_initializer="identity", **ones, **rate).train()
    torch.manual_seed(1)
    y = layer.outputs(torch.ones(5, 64, 4), torch.full((64,), 5)).detach()
    if recurrent:
        kept = (y[1] - 4) / y[0]  # 2 where a unit is kept, 0 where not
        assert set(kept.unique().tolist()) == {0.0, 2.0}
        for step in range(2, 5):
            torch.testing.assert_close(y[step], 4 + kept * y[step - 1])
        assert len(kept.unique(dim=0)) > 32  # sequences have masks of their own
    else:
        gained = y[0]
        assert set(gained.unique().tolist()) <= {0.0, 2.0, 4.0, 6.0, 8.0}
        for step in range(1, 5):
            torch.testing.assert_close(y[step] - y[step - 1], gained)
        assert len(gained.unique()) > 2


def test_nothing_drops_in_evaluation():
    layer = layer_of("lstm", dropout=0.5, recurrent_dropout=0.5).eval()
    x = torch.randn(8, 3, 4)
    torch.testing.assert_close(layer.outputs(x, LENGTHS), layer_of("lstm").eval().outputs(x, LENGTHS))


# Ways to compute the same


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bidirectional": True},
        {"go_backwards": True},
        {"use_bias": False},
        {"bidirectional": True, "merge_mode": "mul"},
    ],
)
def test_steps_and_torch_s_own_layer_give_the_same_numbers_and_gradients(cell, settings):
    layer = layer_of(cell, bias_initializer="random_uniform=-0.5:0.5", **settings)
    x = torch.randn(8, 3, 4)
    states = tuple(torch.rand(3, layer.directions, 6) for _ in STATES[cell])
    within = torch.arange(8)[:, None] < LENGTHS
    found = []
    for way in (layer._packed, layer._by_steps):
        assert layer.is_fast
        layer.zero_grad()
        y, last = way(x, LENGTHS, states)
        y = layer.merged(y)[within]
        (y.square().sum() + sum(state.sum() for state in last)).backward()
        found.append([y, *last, *(weights.grad for weights in layer.parameters() if weights.grad is not None)])
    assert len(found[0]) > 2
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(slow, fast, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_going_backwards_is_reading_each_row_from_its_own_end(cell):
    layer = layer_of(cell, go_backwards=True)
    forward = layer_of(cell)
    x = torch.randn(8, 3, 4)
    y = layer.outputs(x, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        turned = x[:length, row : row + 1].flip(0)
        alone = forward.outputs(turned, torch.tensor([length]))
        torch.testing.assert_close(y[:length, row], alone[:, 0].flip(0))


def test_a_layer_without_biases_absorbs_nothing():
    layer = layer_of("gru", use_bias=False)
    assert not layer.can_absorb
    with pytest.raises(ValueError, match="a layer without biases"):
        layer.absorb(np.zeros(4), np.ones(4))
