"""Layers with every option against Keras and the formulas, eager and as ONNX, with the same weights."""

import keras
import numpy as np
import pytest
import torch

from models.constraints import constrained, penalty_of
from models.options import parse_constraint, parse_regularizer
from tests.option_grid import IS_NATIVE, TOLERANCE, Case, Measured, crossed_cases, measure, option_cases
from tests.options_table import PAGE, page, table_cases

SAMPLE = [
    Case("rnn"),
    Case("gru", {"reset_after": False, "recurrent_activation": "hard_sigmoid_v2"}, layers=2),
    Case("lstm", {"go_backwards": True}),
    Case("lstm", {"recurrent_activation": "hard_sigmoid", "use_bias": False}, bidirectional=True, layers=2),
    Case("gru", {"merge_mode": "mul"}, bidirectional=True, has_state=False),
    Case("lstm", {"activation": "gelu", "merge_mode": "ave"}, bidirectional=True),
    Case("gru", {"unroll": 6}),
]


def expected_form(case):
    if case.options.unroll:
        return "unrolled"
    used = {case.options.activation} | ({case.options.recurrent_activation} if case.cell != "rnn" else set())
    return "operator" if used <= IS_NATIVE else "decomposed"


def check(case):
    found = measure(case)
    assert found.form == expected_form(case)
    assert found.worst <= TOLERANCE, found


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_sample_equals_keras_and_the_formulas(case):
    check(case)


@pytest.mark.full
@pytest.mark.parametrize("case", option_cases() + crossed_cases(), ids=str)
def test_grid_equals_keras_and_the_formulas(case):
    check(case)


@pytest.mark.parametrize(
    ("text", "theirs"),
    [
        ("l1=0.3", keras.regularizers.L1(0.3)),
        ("l2=0.2", keras.regularizers.L2(0.2)),
        ("l1_l2=0.3:0.2", keras.regularizers.L1L2(0.3, 0.2)),
        ("l1=0.3,l2=0.2", keras.regularizers.L1L2(0.3, 0.2)),
    ],
)
def test_regularizers_are_keras(text, theirs):
    weights = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert float(penalty_of(parse_regularizer(text), weights)) == pytest.approx(float(theirs(weights)), rel=1e-6)


@pytest.mark.parametrize(
    ("text", "theirs"),
    [
        ("max_norm=1.5", keras.constraints.MaxNorm(1.5)),
        ("max_norm=1.5:1", keras.constraints.MaxNorm(1.5, axis=1)),
        ("non_neg", keras.constraints.NonNeg()),
        ("unit_norm", keras.constraints.UnitNorm()),
        ("min_max_norm=3:5:rate=0.25", keras.constraints.MinMaxNorm(3, 5, rate=0.25)),
    ],
)
def test_constraints_are_keras(text, theirs):
    weights = 2 * torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    wanted = keras.ops.convert_to_numpy(theirs(weights))
    np.testing.assert_allclose(constrained(parse_constraint(text), weights).numpy(), wanted, atol=1e-6)


def test_page_has_every_option_in_its_form():
    """docs/options.md is what `make options` would write, if every difference is as small as it says."""
    fine = {form: Measured(form, 0.0, 0.0, 0.0, 0.0) for form in ("operator", "decomposed", "unrolled")}
    rows = [
        (option, value, {case.cell: fine[expected_form(case)] for case in cases})
        for option, value, cases in table_cases()
    ]
    assert PAGE.read_text() == page(rows)
