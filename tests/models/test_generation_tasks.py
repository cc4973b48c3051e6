"""Tasks of sequences to generate: their data and splits, how answers are judged, what has to be beaten."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import tasks
from models.tasks import g2p, namegen
from models.tasks.alignment import Rules, align
from models.tasks.base import read
from models.tasks.examples import Examples
from models.tasks.generating import edit_distance
from models.tasks.ngrams import NGrams
from tests.models.generating import backwards, curves

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def pronunciations():
    return tasks.load("g2p")


def ids(*numbers):
    return np.array(numbers, dtype=np.int64)


# What ships


def test_no_word_is_in_two_splits_and_all_of_letters_are_in_one(pronunciations):
    task = pronunciations
    words = [{"".join(g2p.LETTERS[i] for i in x) for x in getattr(task, split).sources} for split in SPLITS]
    assert not words[0] & words[1] | words[0] & words[2] | words[1] & words[2]
    listed = {word.decode() for word in read("g2p")["words"].tolist()}
    assert set.union(*words) == {word for word in listed if word.isascii() and word.isalpha()}
    assert [len(each) for each in words] == [103265, 2404, 11824]


def test_phonemes_have_no_stress_and_answers_may_be_any_of_a_words(pronunciations):
    task = pronunciations
    assert len(task.vocabulary) == 2 + 39
    assert not any(symbol[-1].isdigit() for symbol in task.vocabulary)
    word = next(word for word in ("data", "either", "route", "tomato") if _number(task.test, word) is not None)
    number = _number(task.test, word)
    said = {task.text(each) for each in task.test.references[number]}
    assert len(said) > 1
    for each in task.test.references[number]:
        assert task.judge(task.test.take([number]), [each])["word_error_rate"] == 0.0
    # Entries that differ in stress alone were two, and are one.
    assert all(len({task.text(r) for r in each}) == len(each) for each in task.test.references)


def _number(split, word):
    asked = g2p.letters(word)
    return next((n for n, source in enumerate(split.sources) if np.array_equal(source, asked)), None)


def test_letters_that_are_none_are_unknown():
    assert g2p.letters("Hé").tolist() == [8, 0]
    assert g2p.LETTERS[8] == "h"


def test_a_word_is_trained_with_each_of_its_pronunciations(pronunciations):
    train = pronunciations.train
    assert len(train) > 103265
    assert all(prompt.tolist() == [g2p.BEGIN] for prompt in train.prompts)
    assert max(map(len, train.targets)) <= pronunciations.generation.max_steps


def test_names_are_kept_apart_by_their_letters():
    task = tasks.load("namegen")
    written = [{task.text(x) for x in getattr(task, split).targets} for split in SPLITS]
    assert not written[0] & written[1] | written[0] & written[2] | written[1] & written[2]
    arrays = read("names")
    known = {name.decode().lower() for which in namegen.LABELS for name in arrays[f"{which}_names"].tolist()}
    assert set.union(*written) == known
    labels = {task.text(prompt) for prompt in task.train.prompts}
    assert labels == {"<girl>", "<boy>"}
    pairs = [
        (task.text(prompt), task.text(target))
        for split in map(task.__getattribute__, SPLITS)
        for prompt, target in zip(split.prompts, split.targets, strict=True)
    ]
    assert len(pairs) == len(set(pairs)) == 4275 + 1219
    assert ("<girl>", "elizabeth") in pairs


def test_power_keeps_the_official_test_split_and_both_seasons():
    task = tasks.load("power")
    assert [len(getattr(task, split)) for split in SPLITS] == [53, 14, 1029]
    arrays = read("power")
    np.testing.assert_array_equal(np.stack(task.test.targets)[:, :, 0], arrays["test_load"])
    assert np.stack(task.test.contexts).sum(axis=0).tolist() == [513, 516]
    found = task.baselines(task.test)
    chosen = np.stack(task.train.targets)[:, :, 0]
    seasons = np.stack(task.train.contexts)[:, 1].astype(int)
    of_season = np.stack([chosen[seasons == season].mean(axis=0) for season in (0, 1)])
    for name, errors in (
        ("the mean curve", arrays["test_load"] - chosen.mean(axis=0)),
        ("the mean curve of the season", arrays["test_load"] - of_season[arrays["test_season"]]),
    ):
        assert found[name]["rmse"] == pytest.approx(np.sqrt((errors.astype(float) ** 2).mean()), rel=1e-5)
        assert found[name]["mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-5)
    assert task.baseline(task.test)[0] == "the mean curve of the season"


@pytest.mark.parametrize("name", ["power", "namegen", "g2p"])
def test_a_line_says_what_it_is(name):
    task = tasks.load(name)
    assert str(len(task.test)) in task.described
    assert task.described.startswith(task.summary)


# Examples


def test_examples_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="2 targets, but 1 prompts"):
        Examples(targets=(ids(1), ids(2)), prompts=(ids(0),))


def test_taken_examples_keep_what_belongs_to_them():
    whole = backwards().train
    some = whole.take([5, 2])
    assert some.targets == (whole.targets[5], whole.targets[2])
    assert some.sources == (whole.sources[5], whole.sources[2])
    assert some.references == ()
    assert some.source_lengths.tolist() == [len(whole.sources[5]), len(whole.sources[2])]


# Judging


def slow_distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    keep = slow_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(keep, slow_distance(a[1:], b) + 1, slow_distance(a, b[1:]) + 1)


@given(st.lists(st.integers(0, 2), max_size=5), st.lists(st.integers(0, 2), max_size=5))
def test_edit_distance_is_the_recursion(a, b):
    assert edit_distance(a, b) == slow_distance(a, b)


def test_nearest_right_answer_counts():
    task = backwards()
    split = Examples(
        targets=(ids(2, 3, 4), ids(5)),
        sources=(ids(1), ids(2)),
        references=((ids(2, 3, 4), ids(2, 2)), (ids(5),)),
    )
    # One edit from the second of two right answers, which has two letters; none from the other word's.
    scores = task.judge(split, [ids(2), ids(5)])
    assert scores == {"letter_error_rate": 1 / 3, "word_error_rate": 1 / 2}


def test_curves_are_judged_in_their_unit():
    task = curves()
    split = task.test.take([0, 1])
    off = [target + offset for target, offset in zip(split.targets, (1.0, -3.0), strict=True)]
    assert task.judge(split, off) == pytest.approx({"mae": 2.0, "rmse": math.sqrt(5.0)}, rel=1e-5)
    assert task.score_unit == "m"


# Baselines


def test_ngrams_are_witten_bells():
    """Written "aab" and "ab" after the prompt 9, ended by 0; a = 1, b = 2."""
    examples = Examples(targets=(ids(1, 1, 2), ids(1, 2)), prompts=(ids(9), ids(9)))
    model = NGrams(examples, order=2, num_ids=10, end_id=0)
    # After a: a once, b twice. Alone: a three times, b twice, the end twice.
    alone = (2 + 3 / 10) / (7 + 3)
    assert model.probability((), 2) == pytest.approx(alone)
    assert model.probability((1,), 2) == pytest.approx((2 + 2 * alone) / (3 + 2))
    for before in ((), (1,), (2,), (9,), (5,)):
        assert sum(model.probability(before, number) for number in range(10)) == pytest.approx(1.0)
    once = Examples(targets=(ids(1),), prompts=(ids(9),))
    chances = [model.probability((9,), 1), model.probability((1,), 0)]
    assert model.loss(once) == pytest.approx(-np.mean(np.log(chances)))


def test_alignment_finds_what_letters_stand_for():
    """Of made-up words: 1 is silent, 2 stands for 7 and 8, every other letter for one sound."""
    sounds = {1: (), 2: (7, 8), 3: (3,), 4: (4,), 5: (5,)}
    rng = np.random.default_rng(0)
    sources = [rng.integers(1, 6, size=rng.integers(1, 7)) for _ in range(400)]
    targets = [ids(*(sound for letter in source.tolist() for sound in sounds[letter])) for source in sources]
    examples = Examples(targets=tuple(targets), sources=tuple(sources))
    wanted = [[len(sounds[letter]) for letter in source.tolist()] for source in sources]
    aligned = align(examples)
    assert aligned.keys() == {number for number, target in enumerate(targets) if len(target)}
    right = [sizes.tolist() == wanted[number] for number, sizes in aligned.items()]
    assert np.mean(right) > 0.95
    rules = Rules(examples)
    assert rules(ids(2, 1, 4, 1)).tolist() == [7, 8, 4]
    assert rules(ids(2, 1, 4, 1), 0).tolist() == [7, 8, 4]


def test_words_with_too_many_sounds_are_not_aligned():
    examples = Examples(targets=(ids(1, 2, 3), ids(1)), sources=(ids(1), ids(1)))
    assert list(align(examples)) == [1]
