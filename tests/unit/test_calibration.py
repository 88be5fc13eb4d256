"""Probabilities, calibration and the temperature, against scikit-learn and scipy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from mser_dist.evaluation.calibration import (
    LEAST,
    MOST,
    Likelihood,
    brier,
    ece,
    fit_temperature,
    probabilities,
    reliability,
)
from mser_dist.evaluation.soft_labels import distances, heard

LABELS = ["anger", "happy", "sad"]


def answers(
    seed: int, n: int = 400, classes: int = 4, sure: float = 1.0
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scores (n, classes) that know something of the labels (n,), and are `sure` times as sure as is right."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(n, classes)) * 2
    chance = softmax(logits, axis=1)
    reference = (chance.cumsum(1) > random.random((n, 1))).argmax(1)
    return logits * sure, reference


@given(st.integers(0, 1000), st.sampled_from([0.3, 1.0, 4.0]), st.integers(2, 7))
def test_equal_to_scikit_learn(seed: int, sure: float, classes: int) -> None:
    scores, reference = answers(seed, 60, classes, sure)
    found = probabilities(scores)
    np.testing.assert_allclose(found, softmax(scores, axis=1), atol=1e-15)
    theirs = brier_score_loss(reference, found, labels=range(classes), scale_by_half=False)
    assert brier(found, reference) == pytest.approx(theirs)
    bins = reliability(found, reference)
    right, confidence = calibration_curve(found.argmax(1) == reference, found.max(1), n_bins=15)
    assert [one["accuracy"] for one in bins] == pytest.approx(right)
    assert [one["confidence"] for one in bins] == pytest.approx(confidence)
    assert sum(one["n"] for one in bins) == 60
    loss = Likelihood(scores, reference)(np.array([1.0]))[0] / 60
    assert loss == pytest.approx(log_loss(reference, found, labels=range(classes)))


def test_ece_by_hand() -> None:
    found = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
    # In their bins: two clips of .9, of which one is right; one of .6, right; one of .5, wrong.
    assert ece(reliability(found, np.array([0, 1, 0, 1]))) == pytest.approx((2 * 0.4 + 0.4 + 0.5) / 4)


def test_who_is_as_sure_as_right_has_no_error_in_calibration() -> None:
    scores, reference = answers(0, 200_000)
    assert ece(reliability(probabilities(scores), reference)) < 0.005
    assert ece(reliability(probabilities(scores * 3), reference)) > 0.1


@pytest.mark.parametrize("sure", [0.05, 0.5, 1.0, 3.0, 20.0])
def test_the_temperature_is_where_scipy_finds_it(sure: float) -> None:
    scores, reference = answers(3, sure=sure)
    loss = Likelihood(scores, reference)
    found = fit_temperature(loss)
    theirs = minimize_scalar(
        lambda log: loss(np.exp(np.array([log])))[0], (np.log(LEAST), np.log(MOST)), method="brent", tol=1e-10
    )
    assert found == pytest.approx(np.exp(theirs.x), rel=1e-5)
    assert found == pytest.approx(sure, rel=0.15), "what made them too sure is undone"


def test_ranks_that_add_their_losses_find_the_same_temperature() -> None:
    scores, reference = answers(4)
    parts = [Likelihood(scores[rank::3], reference[rank::3]) for rank in range(3)]
    together = fit_temperature(lambda tried: np.sum([part(tried) for part in parts], axis=0))
    assert together == pytest.approx(fit_temperature(Likelihood(scores, reference)), rel=1e-9)


@pytest.mark.parametrize(
    ("scores", "reference"),
    [
        (np.eye(3) * 5, np.arange(3)),  # all right: the surer the better
        (np.eye(3) * 5, (np.arange(3) + 1) % 3),  # all wrong
        (np.zeros((4, 3)), np.array([0, 1, 2, 0])),  # scores that say nothing
        (np.ones((4, 1)), np.zeros(4, dtype=int)),  # one label
        (np.full((2, 2), np.nan), np.array([0, 1])),
    ],
)
def test_where_no_temperature_is_best_there_is_none(scores: NDArray[np.float64], reference: NDArray[np.int64]) -> None:
    assert fit_temperature(Likelihood(scores, reference)) is None


def test_labels_that_cannot_be_answered_have_no_probability() -> None:
    scores = np.array([[0.0, -np.inf, 0.0], [-np.inf, -np.inf, 2.0], [-np.inf] * 3], dtype=np.float32)
    found = probabilities(scores, scale=20.0, temperature=0.5)
    np.testing.assert_allclose(found, np.array([[0.5, 0, 0.5], [0, 0, 1], [1 / 3] * 3]))
    assert brier(found, np.array([1, 2, 0])) == pytest.approx((1.5 + 0 + 2 / 3) / 3)
    assert sum(one["n"] for one in reliability(found, np.array([1, 2, 0]))) == 3


def test_scale_and_temperature() -> None:
    scores, _ = answers(0, 5)
    np.testing.assert_allclose(probabilities(scores, 14.0, 2.0), softmax(scores * 7, axis=1))


def test_one_clip() -> None:
    found = probabilities(np.array([[1.0, 1.0]]))
    assert brier(found, np.array([1])) == 0.5
    assert reliability(found, np.array([1])) == [{"confidence": 0.5, "accuracy": 0.0, "n": 1}]


# ---- annotators' votes


def test_distances_are_scipys() -> None:
    random = np.random.default_rng(0)
    p, q = random.dirichlet(np.ones(4), 50), random.dirichlet(np.full(4, 0.3), 50)
    q[q < 0.05] = 0
    q /= q.sum(1, keepdims=True)
    found = distances(p, q)
    assert found is not None and found["n"] == 50
    assert found["jensen_shannon"] == pytest.approx(np.mean(jensenshannon(p, q, base=2, axis=1) ** 2))
    assert found["entropy"] == pytest.approx(np.mean(entropy(q, base=2, axis=1)))
    assert found["cross_entropy"] == pytest.approx(np.mean(entropy(q, base=2, axis=1) + entropy(q, p, base=2, axis=1)))
    assert found["total_variation"] == pytest.approx(np.abs(p - q).sum(1).mean() / 2)


def test_votes_count_by_label() -> None:
    shares = heard([{"joy": 2, "sad": 1, "calm": 5}, None, {"calm": 1}, {"Wut": 1.5, "anger": 0.5}], LABELS)
    np.testing.assert_allclose(shares, np.array([[0, 2 / 3, 1 / 3], [0, 0, 0], [0, 0, 0], [1, 0, 0]]))


def test_clips_without_votes_do_not_count() -> None:
    shares = heard([{"sad": 1}, None], LABELS)
    sure_and_wrong = np.array([[1.0, 0, 0], [0.2, 0.4, 0.4]])
    found = distances(sure_and_wrong, shares)
    assert found is not None and (found["n"], found["total_variation"], found["jensen_shannon"]) == (1, 1.0, 1.0)
    assert found["cross_entropy"] == pytest.approx(52), "52 bits of a double, and no infinity"
    assert distances(sure_and_wrong, heard([None, {}], LABELS)) is None
