"""service.sampling and service.constants: choices and rows depend on their own sequence alone."""

from __future__ import annotations

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st

from models.spec import METADATA_KEY, SOURCE_LENGTHS, parse_spec
from service.constants import Constants
from service.sampling import BLOCK, Choice, Draws, choose
from tests.generating import HIDDEN, tokens


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 9),
    ids=st.integers(1, 12),
    temperature=st.floats(0.05, 9),
    top_k=st.integers(0, 14),
    top_p=st.floats(0, 1),
)
def test_what_is_drawn_may_be_drawn_and_is_drawn_alone_too(seed, rows, ids, temperature, top_k, top_p):
    rng = np.random.default_rng(seed)
    log_probs = np.round(rng.standard_normal((rows, ids)), 1).astype(np.float32)  # with ties
    draws = rng.random(rows)
    choice = Choice(temperature=temperature, top_k=top_k, top_p=top_p)
    chosen = choose(log_probs, choice, draws)
    for row in range(rows):
        assert choose(log_probs[row : row + 1], choice, draws[row : row + 1])[0] == chosen[row]
        ranked = sorted(range(ids), key=lambda i, row=row: (-log_probs[row, i], i))
        if top_k:
            ranked = ranked[:top_k]
        weights = np.exp(log_probs[row, ranked].astype(np.float64) / temperature)
        before = np.cumsum(weights) - weights
        if top_p:
            ranked = [i for i, sum_ in zip(ranked, before, strict=True) if sum_ < top_p * weights.sum() + 1e-9]
        assert chosen[row] in ranked


def test_draws_follow_the_probabilities():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    draws = (np.arange(10_000) + 0.5) / 10_000
    chosen = choose(np.log(np.tile(p, (10_000, 1))).astype(np.float32), Choice(temperature=1.0), draws)
    np.testing.assert_allclose(np.bincount(chosen) / 10_000, p, atol=2e-4)
    cut = choose(np.log(np.tile(p, (10_000, 1))).astype(np.float32), Choice(temperature=1.0, top_k=2), draws)
    np.testing.assert_allclose(np.bincount(cut) / 10_000, [0.625, 0.375], atol=2e-4)


def test_the_likeliest_is_the_lowest_of_equals():
    assert choose(np.array([[0, 2, 2], [1, 0, 1]], np.float32), Choice(), None).tolist() == [1, 0]


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=5))
def test_a_draw_is_of_its_seed_and_position(seed, positions):
    in_order = Draws(seed)
    all_ = [in_order.at(position) for position in range(3 * BLOCK + 1)]
    assert len(set(all_)) == len(all_)
    draws = Draws(seed)
    assert [draws.at(position) for position in positions] == [all_[position] for position in positions]
    assert all(0 <= draw < 1 for draw in all_)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_sources_are_padded_to_the_longest_of_the_run(seed, lengths):
    content = tokens(encoder=True, attention=True)["model.onnx"]
    props = {p.key: p.value for p in onnx.load_from_string(content).metadata_props}
    constants = Constants(parse_spec(props[METADATA_KEY]).graph, 8)
    rng = np.random.default_rng(seed)
    sources = [rng.standard_normal((n, HIDDEN)).astype(np.float32) for n in lengths]
    slots = rng.permutation(8)[: len(lengths)]
    constants.put(slots.tolist(), [sources])
    picked = rng.permutation(len(lengths))[: max(1, len(lengths) - 1)]
    inputs = {}
    constants.gather(slots[picked], inputs)
    assert inputs[SOURCE_LENGTHS].tolist() == [lengths[i] for i in picked]
    for row, i in zip(inputs["memory"], picked, strict=True):
        np.testing.assert_array_equal(row[: lengths[i]], sources[i])
        assert not row[lengths[i] :].any()
    assert inputs["memory"].shape[1] == max(lengths[i] for i in picked)
