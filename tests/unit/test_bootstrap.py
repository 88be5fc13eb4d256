"""The bootstrap over speakers: against scipy's where each clip is a speaker's only one, and its coverage elsewhere."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from mser_dist.evaluation import bootstrap
from mser_dist.evaluation.bootstrap import Drawn, draw_difference, draw_ua
from mser_dist.evaluation.metrics import score

Answers = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def answers(random: np.random.Generator, speakers: int, clips: int, classes: int, spread: float) -> Answers:
    """References, predictions and speakers of clips, each speaker named with an accuracy of their own."""
    who = np.repeat(np.arange(speakers), clips)
    reference = np.tile(np.arange(clips) % classes, speakers)
    accuracy = np.clip(random.normal(0.7, spread, speakers), 0.05, 0.98)
    right = random.random(len(who)) < accuracy[who]
    wrong = (reference + random.integers(1, classes, len(who))) % classes
    return reference, np.where(right, reference, wrong), who


def test_clips_as_clusters_are_as_scipy_draws_them() -> None:
    reference, predicted, _ = answers(np.random.default_rng(3), 60, 5, 4, 0.1)
    drawn = draw_ua(reference, predicted, np.arange(len(reference)), 4, draws=8000)
    theirs = stats.bootstrap(
        (reference, predicted),
        lambda ours, said: score(ours, said, 4).ua,
        paired=True,
        vectorized=False,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    # Both are estimates of the same spread; 8,000 and 4,000 draws give it to about 2 %.
    assert drawn.values.std() == pytest.approx(theirs.standard_error, rel=0.06)
    assert drawn.values.mean() == pytest.approx(score(reference, predicted, 4).ua, abs=0.003)


@pytest.mark.parametrize("speakers", [4, 6, 12])
def test_the_interval_covers_the_truth_as_often_as_it_says(speakers: int) -> None:
    """Speakers who differ: the nominal 95 % interval has the true UA in 93 to 97 % of 600 evaluations."""
    random, spread = np.random.default_rng(0), 0.15
    many = np.clip(random.normal(0.7, spread, 2_000_000), 0.05, 0.98)
    true, hits, by_clip = many.mean(), 0, 0
    for number in range(600):
        reference, predicted, who = answers(random, speakers, 24, 4, spread)
        low, high = draw_ua(reference, predicted, who, 4, draws=1000, seed=number).interval()
        hits += low <= true <= high
        low, high = draw_ua(reference, predicted, np.arange(len(who)), 4, draws=200, seed=number).interval()
        by_clip += low <= true <= high
    assert 0.93 <= hits / 600 <= 0.97
    assert by_clip / 600 < 0.85, "what a bootstrap over clips would claim"


def test_the_interval_of_a_difference_covers_the_true_one_as_often_as_it_says() -> None:
    """Of 20 speakers who differ for both systems alike, and for each by itself."""
    random, hits = np.random.default_rng(0), 0

    def accuracies(speakers: int) -> list[NDArray[np.float64]]:
        shared = random.normal(0.0, 0.15, speakers)
        return [np.clip(mean + shared + random.normal(0.0, 0.08, speakers), 0.05, 0.98) for mean in (0.7, 0.65)]

    one, other = accuracies(2_000_000)
    true = (one - other).mean()
    who = np.repeat(np.arange(20), 24)
    reference = np.tile(np.arange(24) % 4, 20)
    wrong = (reference + 1) % 4
    for number in range(600):
        ours, theirs = (np.where(random.random(len(who)) < own[who], reference, wrong) for own in accuracies(20))
        low, high = draw_difference(reference, ours[None], theirs[None], who, 4, seed=number).interval()
        hits += low <= true <= high
    assert 0.93 <= hits / 600 <= 0.97


def test_a_class_without_clips_in_a_draw_does_not_count_there() -> None:
    drawn = draw_ua(np.array([0, 1]), np.array([0, 1]), np.array([0, 1]), 3, draws=200)
    assert drawn.clusters == 2 and (drawn.values == 1).all()


def test_one_cluster_has_no_interval() -> None:
    with pytest.raises(ValueError, match="one cluster"):
        Drawn(1.0, np.ones(5), 1, 8).interval()


def test_the_same_seed_gives_the_same_draws() -> None:
    given = answers(np.random.default_rng(0), 5, 8, 3, 0.1)
    assert np.array_equal(draw_ua(*given, 3).values, draw_ua(*given, 3).values)
    assert not np.array_equal(draw_ua(*given, 3).values, draw_ua(*given, 3, seed=1).values)


def test_an_interval_holds_its_score_and_stays_between_0_and_1() -> None:
    for right in (0.0, 0.02, 0.97, 1.0):
        random = np.random.default_rng(7)
        reference, who = np.arange(96) % 3, np.arange(96) // 16
        predicted = np.where(random.random(96) < right, reference, (reference + 1) % 3)
        drawn = draw_ua(reference, predicted, who, 3)
        low, high = drawn.interval()
        assert drawn.estimate == score(reference, predicted, 3).ua
        assert 0 <= low <= drawn.estimate <= high <= 1 and (low < high or right in (0.0, 1.0))


def test_many_kinds_of_clusters_are_drawn_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, predicted, who = answers(np.random.default_rng(5), 700, 12, 4, 0.15)
    monkeypatch.setattr(bootstrap, "_KINDS", 1)
    quick = draw_ua(reference, predicted, who, 4)
    monkeypatch.setattr(bootstrap, "_KINDS", 10_000)
    plain = draw_ua(reference, predicted, who, 4)
    assert quick.estimate == plain.estimate and not np.array_equal(quick.values, plain.values)
    # 2,000 draws give the standard error to about 2 %, and the mean to 1/45 of it.
    assert quick.values.std() == pytest.approx(plain.values.std(), rel=0.07)
    assert quick.values.mean() == pytest.approx(plain.values.mean(), abs=0.1 * plain.values.std())
