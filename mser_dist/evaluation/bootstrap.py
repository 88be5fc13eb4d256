"""How much of a score is the luck of who was recorded: the bootstrap over speakers.

Clips of one speaker are alike, so that it is speakers who are drawn anew, with replacement, each with all their clips
(the cluster bootstrap). The draws' percentiles are too narrow where speakers are few (of four they held the truth in
86 % of evaluations). So the draws give the standard error alone, times sqrt(n / (n - 1)) as n drawn values spread too
little, and the interval is Student's with n - 1 degrees of freedom (Cameron, Gelbach and Miller, Review of Economics
and Statistics 90(3), 2008); that of a score on the scale of its log odds, where it is near to symmetric and does not
leave 0 to 1.

Two systems that answered to the same clips are compared on the same draws: what a speaker does to both cancels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.evaluation.metrics import SCORES

DRAWS = 2000
_CHUNK = 2**22  # weights at a time
_KINDS = 512  # of clusters: more are drawn one by one, which is quicker than a binomial for each


@dataclass(frozen=True)
class Drawn:
    """A score, or a difference of scores, and what it is in sets of clips that might have been recorded instead."""

    estimate: float
    values: NDArray[np.float64]  # (draws,)
    clusters: int
    clips: int | None
    """A score of so many; None for what is not between 0 and 1."""

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The interval that has the true value in `level` of all evaluations."""
        from scipy.special import expit, logit, stdtrit

        if self.clusters < 2:
            raise ValueError("one cluster alone says nothing of others")
        if np.ptp(self.values) == 0:
            return self.estimate, self.estimate
        far = stdtrit(self.clusters - 1, 0.5 + level / 2) * np.sqrt(self.clusters / (self.clusters - 1))
        if self.clips is None:
            error = far * self.values.std()
            return self.estimate - error, self.estimate + error
        half = 0.5 / self.clips  # 0 and 1 have no log odds: half a clip stands beside them
        middle, odds = (logit(np.clip(value, half, 1 - half)) for value in (self.estimate, self.values))
        error = far * odds.std()
        return min(self.estimate, float(expit(middle - error))), max(self.estimate, float(expit(middle + error)))


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
    return Drawn(*_whole(found.mean(0)), clusters, len(reference))


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
    return Drawn(*_whole(found[: len(ours)].mean(0) - found[len(ours) :].mean(0)), clusters, None)


def draw_values(values: NDArray[Any], cluster: NDArray[np.int64], draws: int = DRAWS, seed: int = 0) -> Drawn:
    """The mean of values between 0 and 1 of the clips (n,) in each draw of clusters (n,)."""
    _, who = np.unique(cluster, return_inverse=True)
    number = int(who.max()) + 1
    sums = np.stack([np.bincount(who, values, number), np.bincount(who, minlength=number)], 1)  # (clusters, 2)
    drawn = np.concatenate([weights @ sums for weights in weights_of(np.ones(number, np.int64), draws, seed)])
    return Drawn(*_whole(drawn[:, 0] / drawn[:, 1]), number, len(values))


def _draw(
    reference: NDArray[np.int64],
    predicted: NDArray[np.int64],
    cluster: NDArray[np.int64],
    classes: int,
    score: str,
    draws: int,
    seed: int,
) -> tuple[NDArray[np.float64], int]:
    """(m, 1 + draws) the score of each of m runs, predicted (m, n), of all clips and in each draw, and how many
    clusters there are."""
    number, who = np.unique(cluster, return_inverse=True)
    tables = np.zeros((len(number), len(predicted), classes, classes), dtype=np.int64)
    for run, answers in enumerate(predicted):
        place = (who * classes + reference) * classes + answers
        tables[:, run] = np.bincount(place, minlength=tables[:, run].size).reshape(-1, classes, classes)
    flat = tables.reshape(len(number), -1)
    first, many = kinds_of(flat, np.random.default_rng(seed))
    kinds = flat[first].astype(np.float64)
    found = []
    for weights in weights_of(many, draws, seed):
        drawn = (weights @ kinds).reshape(-1, *tables.shape[1:])  # (draws, m, K, K)
        found.append(SCORES[score](drawn).T)
    return np.concatenate(found, axis=1), len(number)


def weights_of(many: NDArray[np.int64], draws: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """(1 + draws, kinds) in pieces: how often each kind of cluster stands in all clips, and in each draw of as many
    clusters; of each kind there are `many`."""
    yield many[None].astype(np.float64)
    random, number, kinds = np.random.default_rng(seed), int(many.sum()), len(many)
    kind = np.repeat(np.arange(kinds), many)
    for start in range(0, draws, step := max(1, _CHUNK // kinds)):
        size = min(step, draws - start)
        if kinds <= _KINDS or number > 4 * kinds:
            yield random.multinomial(number, many / number, size=size).astype(np.float64)
        else:
            drawn = kind[random.integers(0, number, (size, number), np.int32)] + kinds * np.arange(size)[:, None]
            yield np.bincount(drawn.ravel(), minlength=size * kinds).reshape(size, kinds).astype(np.float64)


def _whole(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """The value of all clips, which is the first, and those of the draws."""
    return float(values[0]), values[1:]


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
    if len(known) == 1:
        return known[0]
    low, high = (np.array(ends) for ends in zip(*known, strict=True))
    mean, n = float(np.mean(values)), len(values)
    return mean - float(np.linalg.norm(values - low)) / n, mean + float(np.linalg.norm(high - values)) / n
