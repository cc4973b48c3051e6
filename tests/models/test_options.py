"""Options of layers as text: what is read, and what a mistake is told."""

import re

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from models import cli
from models.options import (
    PRESETS,
    LayerOptions,
    Term,
    parse_bias_initializer,
    parse_constraint,
    parse_initializer,
    parse_regularizer,
)
from models.recipe import Recipe
from models.runs import Run


@pytest.mark.parametrize(
    ("parse", "text", "read"),
    [
        (parse_initializer, "glorot_uniform", Term("glorot_uniform")),
        (parse_initializer, "random_normal", Term("random_normal", {"mean": 0.0, "stddev": 0.05})),
        (parse_initializer, "random_normal=stddev=0.1", Term("random_normal", {"mean": 0.0, "stddev": 0.1})),
        (parse_initializer, "random_uniform=-0.1:0.2", Term("random_uniform", {"minval": -0.1, "maxval": 0.2})),
        (parse_initializer, "constant=0.1", Term("constant", {"value": 0.1})),
        (
            parse_initializer,
            "variance_scaling=2:mode=fan_out:distribution=uniform",
            Term("variance_scaling", {"scale": 2.0, "mode": "fan_out", "distribution": "uniform"}),
        ),
        (parse_regularizer, "l2=0.01", {"l1": 0.0, "l2": 0.01}),
        (parse_regularizer, "l1=1e-4,l2=1e-3", {"l1": 1e-4, "l2": 1e-3}),
        (parse_regularizer, "l1", {"l1": 0.01, "l2": 0.0}),
        (parse_regularizer, "l1_l2", {"l1": 0.01, "l2": 0.01}),
        (parse_constraint, "max_norm=3", Term("max_norm", {"max_value": 3.0, "axis": 0.0})),
        (parse_constraint, "non_neg", Term("non_neg")),
        (
            parse_constraint,
            "min_max_norm=0.5:1.5:rate=0.9",
            Term("min_max_norm", {"min_value": 0.5, "max_value": 1.5, "rate": 0.9, "axis": 0.0}),
        ),
    ],
)
def test_text_is_read(parse, text, read):
    assert parse(text) == read


@pytest.mark.parametrize(
    ("parse", "text", "said"),
    [
        (parse_initializer, "xavier", "no initializer 'xavier': there are zeros, ones, constant"),
        (parse_initializer, "zeros=1", "'zeros=1' says too much: it takes nothing"),
        (
            parse_initializer,
            "random_normal=sd=1",
            "random_normal has no 'sd'; write it as in random_normal=mean=0:stddev",
        ),
        (parse_initializer, "random_normal=0:-1", "stddev cannot be negative"),
        (parse_initializer, "constant=nan", "value cannot be 'nan'"),
        (parse_initializer, "variance_scaling=0", "scale cannot be 0 or less"),
        (parse_initializer, "variance_scaling=mode=all", "mode is one of fan_in, fan_out, fan_avg"),
        (parse_initializer, "random_uniform=1:0", "minval is above maxval"),
        (parse_bias_initializer, "orthogonal", "orthogonal is for matrices; a bias can begin with zeros"),
        (parse_regularizer, "l3=1", "no regularizer 'l3': there are l1, l2"),
        (parse_regularizer, "l1=-1", "l1 cannot be negative"),
        (parse_constraint, "max_norm=two", "max_value cannot be 'two'; write it as in max_norm=max_value=2:axis=0"),
        (parse_constraint, "max_norm=-1", "a norm cannot be negative"),
        (parse_constraint, "max_norm=1:2", "axis is 0 (over a unit's inputs) or 1"),
        (parse_constraint, "min_max_norm=2:1", "min_value is above max_value"),
        (parse_constraint, "min_max_norm=0:1:2", "rate is from 0 to 1"),
    ],
)
def test_a_mistake_is_told(parse, text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse(text)


def test_unroll_is_a_number_of_steps():
    assert LayerOptions(unroll=False).unroll == 0
    with pytest.raises(ValidationError, match="say how many steps the graph is to have"):
        LayerOptions(unroll=True)


def test_a_recipe_hands_its_options_on():
    recipe = Recipe(cell="lstm", activation="gelu", kernel_constraint="max_norm=2", dropout=0.1)
    assert recipe.options == LayerOptions(activation="gelu", kernel_constraint="max_norm=2", dropout=0.1)
    assert Recipe.of(recipe.to_dict()) == recipe


def test_keras2_is_a_preset():
    options = LayerOptions.model_validate(PRESETS["keras2"])
    assert (options.recurrent_activation, options.reset_after) == ("hard_sigmoid_v2", False)


def test_a_flag_goes_before_the_preset(tmp_path):
    settings = ["--preset", "keras2", "--reset-after", "--epochs", 1, "--hidden", 2, "--kernel-regularizer", "l2=0.01"]
    done = CliRunner().invoke(cli.train, ["vowels", "--out", str(tmp_path / "run"), *map(str, settings)])
    assert done.exit_code == 0, done.output
    recipe = Recipe.of(Run(tmp_path / "run").config().recipe)
    assert (recipe.recurrent_activation, recipe.reset_after) == ("hard_sigmoid_v2", True)
    assert recipe.kernel_regularizer == "l2=0.01"
