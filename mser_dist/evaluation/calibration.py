"""Whether a model is as sure as it is right: probabilities of its scores, ECE, Brier score, the temperature.

A probability is a softmax over the labels' scores, times the scale that they were learned with and divided by a
temperature: 1 where none was fitted. The temperature (Guo et al., arXiv 1706.04599) is fitted on the validation split
of the training, and kept in the export's card: nothing of a language that is tested enters it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15
LEAST, MOST, GRID = 1 / 64, 64.0, 64  # temperatures that are tried, evenly in the logarithm


def probabilities(scores: NDArray[Any], scale: float = 1.0, temperature: float = 1.0) -> NDArray[np.float64]:
    """(n, K) softmax of scores (n, K) · scale / temperature: 0 where a score is -inf, 1/K where all of a clip's are."""
    logits = scores.astype(np.float64) * (scale / temperature)
    return np.exp(_log_softmax(np.where(np.isneginf(logits).all(1, keepdims=True), 0.0, logits)))


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    less = logits - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = less - np.log(np.exp(less).sum(-1, keepdims=True))
    return result


def brier(probability: NDArray[np.float64], reference: NDArray[np.int64]) -> float:
    """Mean over n clips of the squared distance of (n, K) probabilities from (n,) labels: 0 (sure and right) to 2."""
    own = probability[np.arange(len(reference)), reference]
    return float(np.mean((probability**2).sum(1) - 2 * own + 1))


def reliability(probability: NDArray[np.float64], reference: NDArray[np.int64], bins: int = BINS) -> list[Any]:
    """The clips by the probability of their likeliest label, in `bins` of equal width: of each that has clips, their
    mean probability, the share that is right, and how many they are."""
    sure, right = probability.max(1), probability.argmax(1) == reference
    place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], sure)  # in (0, 1/bins], (1/bins, 2/bins] …
    count = np.bincount(place, minlength=bins)
    sums = np.bincount(place, sure, bins), np.bincount(place, right, bins)
    return [
        {"confidence": float(sums[0][i] / count[i]), "accuracy": float(sums[1][i] / count[i]), "n": int(count[i])}
        for i in np.flatnonzero(count)
    ]


def ece(bins: list[Any]) -> float:
    """Expected calibration error of `reliability`: the mean over clips of |share that is right - probability| of their
    bin (Naeini et al., AAAI 2015)."""
    n = sum(one["n"] for one in bins)
    return float(sum(one["n"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / n)


@dataclass(frozen=True)
class Likelihood:
    """How well temperatures suit n clips, as sums that ranks can add: of logits (n, K) and labels (n,)."""

    logits: NDArray[Any]
    reference: NDArray[np.int64]

    def __call__(self, temperatures: NDArray[np.float64]) -> NDArray[np.float64]:
        """(T,) sums over clips of -log p(label) at each temperature (T,)."""
        rows, logits = np.arange(len(self.reference)), self.logits.astype(np.float64)
        return np.array([-_log_softmax(logits / t)[rows, self.reference].sum() for t in temperatures])


def fit_temperature(loss: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> float | None:
    """The temperature at which a loss, such as `Likelihood`, is least; None where that is at an end of what is tried:
    every clip is named right, say, and the surer the better.

    The log-likelihood is concave in 1/temperature, so that it has one maximum. Asks for the losses of `GRID`
    temperatures twice, the second time of those around the best: a sum over ranks, nothing gathered.
    """
    tried = np.geomspace(LEAST, MOST, GRID)
    for _ in range(2):
        losses = np.asarray(loss(tried))
        best = int(losses.argmin()) if np.isfinite(losses).all() else 0
        if best in (0, GRID - 1):
            return None
        around = tried[best - 1 : best + 2]
        tried = np.geomspace(around[0], around[-1], GRID)
    # The lowest point of the parabola through the best and its neighbours, which are evenly spaced in the logarithm.
    low, middle, high = losses[best - 1 : best + 2]
    bend = low - 2 * middle + high
    shift = 0.5 * (low - high) / bend if bend > 0 else 0.0
    return float(around[1] * (around[2] / around[1]) ** shift)
