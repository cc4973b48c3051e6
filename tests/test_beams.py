"""The laws of beam search, on trees of any probabilities: beside all that there is if it is wide, else by itself."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.beams import BeamSearch

END = 0
IDS = 3


class Tree:
    """Log-probabilities of the id after every path; they depend on all of it."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def after(self, ids: tuple[int, ...]) -> np.ndarray:
        scores = np.random.default_rng([self._seed, len(ids), *ids]).normal(scale=2.0, size=IDS)
        return (scores - np.logaddexp.reduce(scores)).astype(np.float32)

    def total(self, ids: tuple[int, ...]) -> float:
        return sum(float(self.after(ids[:place])[each]) for place, each in enumerate(ids))


def search(tree, **terms):
    """Run a search to its end; every path is told by its parent and its last id."""
    beam = BeamSearch(end_id=END, **terms)
    while beam.live:
        before = beam.live
        parents = beam.advance(np.stack([tree.after(path.ids) for path in before]))
        assert len(parents) == len(beam.live) <= terms["width"]
        for parent, path in zip(parents, beam.live, strict=True):
            assert path.ids[:-1] == before[parent].ids
            assert path.total == pytest.approx(tree.total(path.ids), abs=1e-9)
    return beam.results


def everything(tree, max_steps, normalization):
    """Score every path there is: those that end, and those that are as long as they may be."""
    scored = []
    for length in range(max_steps + 1):
        for ids in itertools.product(range(1, IDS), repeat=length):
            ended = tree.total((*ids, END))
            if length < max_steps:
                scored.append((ended / (length + 1) ** normalization, ids))
            else:
                scored.append((tree.total(ids) / length**normalization, ids))
    return sorted(scored, reverse=True)


seeds, steps = st.integers(0, 2**32 - 1), st.integers(1, 4)
powers = st.sampled_from([0.0, 0.6, 1.0, 2.0])


@given(seed=seeds, max_steps=steps, wanted=st.integers(1, 4), normalization=powers)
def test_a_search_as_wide_as_the_tree_finds_the_best_there_are(seed, max_steps, wanted, normalization):
    tree = Tree(seed)
    width = 2**max_steps + wanted
    found = search(tree, width=width, num_wanted=wanted, max_steps=max_steps, normalization=normalization)
    best = everything(tree, max_steps, normalization)[:wanted]
    assert [hypothesis.path.ids for hypothesis in found] == [ids for _, ids in best]
    np.testing.assert_allclose([hypothesis.score for hypothesis in found], [score for score, _ in best], atol=1e-9)


@given(seed=seeds, max_steps=steps, width=st.integers(1, 4), normalization=powers, data=st.data())
def test_results_are_ranked_and_add_up_however_narrow_it_is(seed, max_steps, width, normalization, data):
    tree = Tree(seed)
    wanted = data.draw(st.integers(1, width))
    found = search(tree, width=width, num_wanted=wanted, max_steps=max_steps, normalization=normalization)
    assert 1 <= len(found) <= wanted
    scores = [hypothesis.score for hypothesis in found]
    assert scores == sorted(scores, reverse=True)
    for hypothesis in found:
        ids = hypothesis.path.ids + (END,) * hypothesis.is_ended
        assert hypothesis.is_ended or len(ids) == max_steps
        assert hypothesis.score == pytest.approx(tree.total(ids) / len(ids) ** normalization, abs=1e-9)
        assert len(hypothesis.path.log_probs) == len(hypothesis.path.ids)


@given(seed=seeds, max_steps=steps)
def test_a_width_of_one_is_the_likeliest_id_at_each_step(seed, max_steps):
    tree = Tree(seed)
    [found] = search(tree, width=1, num_wanted=1, max_steps=max_steps)
    ids: tuple[int, ...] = ()
    while len(ids) < max_steps and (chosen := int(tree.after(ids).argmax())) != END:
        ids = (*ids, chosen)
    assert found.path.ids[: len(ids)] == ids
