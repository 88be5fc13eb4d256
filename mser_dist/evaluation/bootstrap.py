"""How much of a score is the luck of who was recorded: the bootstrap over speakers.

Clips of one speaker are alike, so that it is speakers who are drawn anew, with replacement, each with all their clips
(the cluster bootstrap). Its plain percentiles are too narrow where speakers are few; here they are those of
Hesterberg's expanded percentile interval (The American Statistician 69(4), 2015): as far out as Student's t is wider
than the normal distribution, and as the standard deviation of n drawn values is too small by sqrt((n - 1) / n).

Two systems that answered to the same clips are compared on the same draws: what a speaker does to both cancels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.evaluation.metrics import SCORES

DRAWS = 2000
_CHUNK = 2**22  # weights at a time


@dataclass(frozen=True)
class Drawn:
    """A score, or a difference of scores, of `draws` sets of clips that might have been recorded, and of how many
    clusters each is."""

    values: NDArray[np.float64]  # (draws,)
    clusters: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The interval that has the true value in `level` of all evaluations."""
        return expanded(self.values, self.clusters, level)


def clusters_of(speaker: NDArray[Any]) -> tuple[NDArray[np.int64], bool]:
    """(n,) the cluster of each clip by its speaker, "" for one without, and whether clusters are speakers: where one
    is not named, or all are one, each clip is a cluster."""
    names, cluster = np.unique(speaker, return_inverse=True)
    if len(names) > 1 and bool((speaker != "").all()):
        return cluster, True
    return np.arange(len(speaker)), False


def draw_ua(
    reference: NDArray[np.int64],
    predicted: NDArray[np.int64],
    cluster: NDArray[np.int64],
    classes: int,
    draws: int = DRAWS,
    seed: int = 0,
) -> Drawn:
    """UA of each draw of clusters, which are numbers (n,) beside the references and predictions (n,) of the clips.

    A class that a draw has no clip of does not count there, as in `metrics.score`.
    """
    return draw_mean(reference, predicted[None], cluster, classes, "ua", draws, seed)


def draw_mean(
    reference: NDArray[np.int64],
    predicted: NDArray[np.int64],
    cluster: NDArray[np.int64],
    classes: int,
    score: str = "ua",
    draws: int = DRAWS,
    seed: int = 0,
) -> Drawn:
    """`draw_ua` for a score of `metrics.SCORES` and for several runs, predicted (m, n): the mean of their scores."""
    found, clusters = _draw(reference, predicted, cluster, classes, score, draws, seed)
    return Drawn(found.mean(0), clusters)


def draw_difference(
    reference: NDArray[np.int64],
    ours: NDArray[np.int64],
    theirs: NDArray[np.int64],
    cluster: NDArray[np.int64],
    classes: int,
    score: str = "ua",
    draws: int = DRAWS,
    seed: int = 0,
) -> Drawn:
    """The mean score of our runs less that of theirs, predicted (a, n) and (b, n), on the same draws of clusters."""
    both = np.concatenate([ours, theirs])
    found, clusters = _draw(reference, both, cluster, classes, score, draws, seed)
    return Drawn(found[: len(ours)].mean(0) - found[len(ours) :].mean(0), clusters)


def draw_values(values: NDArray[Any], cluster: NDArray[np.int64], draws: int = DRAWS, seed: int = 0) -> Drawn:
    """The mean of values of the clips (n,) in each draw of clusters (n,)."""
    _, who = np.unique(cluster, return_inverse=True)
    number = int(who.max()) + 1
    sums = np.stack([np.bincount(who, values, number), np.bincount(who, minlength=number)], 1)  # (clusters, 2)
    random, found = np.random.default_rng(seed), []
    for start in range(0, draws, step := max(1, _CHUNK // number)):
        weights = random.multinomial(number, np.full(number, 1 / number), size=min(step, draws - start))
        drawn = weights.astype(np.float64) @ sums
        found.append(drawn[:, 0] / drawn[:, 1])
    return Drawn(np.concatenate(found), number)


def _draw(
    reference: NDArray[np.int64],
    predicted: NDArray[np.int64],
    cluster: NDArray[np.int64],
    classes: int,
    score: str,
    draws: int,
    seed: int,
) -> tuple[NDArray[np.float64], int]:
    """(m, draws) the score of each of m runs, predicted (m, n), in each draw, and how many clusters there are."""
    number, who = np.unique(cluster, return_inverse=True)
    tables = np.zeros((len(number), len(predicted), classes, classes), dtype=np.int64)
    for run, answers in enumerate(predicted):
        place = (who * classes + reference) * classes + answers
        tables[:, run] = np.bincount(place, minlength=tables[:, run].size).reshape(-1, classes, classes)
    random = np.random.default_rng(seed)
    flat = tables.reshape(len(number), -1)
    first, many = kinds_of(flat, random)
    kinds = flat[first].astype(np.float64)
    found = []
    for start in range(0, draws, step := max(1, _CHUNK // len(kinds))):
        weights = random.multinomial(len(number), many / len(number), size=min(step, draws - start))
        drawn = (weights.astype(np.float64) @ kinds).reshape(-1, *tables.shape[1:])  # (draws, m, K, K)
        found.append(SCORES[score](drawn).T)
    return np.concatenate(found, axis=1), len(number)


def kinds_of(tables: NDArray[np.int64], random: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of clusters (C, …) with the same table one, and how many there are: they are drawn as one kind, which comes to
    the same, and is quick where each is a clip."""
    digest = tables @ random.integers(-(2**62), 2**62, tables.shape[1])
    _, first, many = np.unique(digest, return_index=True, return_counts=True)
    return first, many


def mean_interval(
    values: Sequence[float], intervals: Sequence[tuple[float, float] | None]
) -> tuple[float, float] | None:
    """95 % interval of the mean of values that are independent, each with its own; None if one has none.

    By MOVER (Zou and Donner, Statistics in Medicine 27(10), 2008), which keeps them lopsided.
    """
    known = [one for one in intervals if one is not None]
    if not values or len(known) < len(values):
        return None
    low, high = (np.array(ends) for ends in zip(*known, strict=True))
    mean, n = float(np.mean(values)), len(values)
    return mean - float(np.linalg.norm(values - low)) / n, mean + float(np.linalg.norm(high - values)) / n


def expanded(values: NDArray[np.float64], clusters: int, level: float = 0.95) -> tuple[float, float]:
    """Expanded percentile interval of bootstrapped `values`, drawn from so many clusters; two or more of them."""
    from scipy.special import ndtr, stdtrit

    if clusters < 2:
        raise ValueError("one cluster alone says nothing of others")
    wide = stdtrit(clusters - 1, 0.5 + level / 2) * np.sqrt(clusters / (clusters - 1))
    low, high = np.quantile(values, [ndtr(-wide), ndtr(wide)])
    return float(low), float(high)
