"""How much of a UA is the luck of who was recorded: the bootstrap over speakers.

Clips of one speaker are alike, so that it is speakers who are drawn anew, with replacement, each with all their clips
(the cluster bootstrap). Its plain percentiles are too narrow where speakers are few; here they are those of
Hesterberg's expanded percentile interval (The American Statistician 69(4), 2015): as far out as Student's t is wider
than the normal distribution, and as the standard deviation of n drawn values is too small by sqrt((n - 1) / n).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
_CHUNK = 2**22  # weights at a time


@dataclass(frozen=True)
class Drawn:
    """UAs of `draws` sets of clips that might have been recorded, and of how many clusters each is."""

    ua: NDArray[np.float64]  # (draws,)
    clusters: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The interval that has the true UA in `level` of all evaluations."""
        return expanded(self.ua, self.clusters, level)


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
    number, who = np.unique(cluster, return_inverse=True)
    tables = np.zeros((len(number), classes, classes), dtype=np.int64)
    np.add.at(tables, (who, reference, predicted), 1)
    random = np.random.default_rng(seed)
    # Clusters with the same table are drawn as one kind, which comes to the same, and is quick where each is a clip.
    flat = tables.reshape(len(number), -1)
    digest = flat @ random.integers(-(2**62), 2**62, flat.shape[1])
    _, first, many = np.unique(digest, return_index=True, return_counts=True)
    kinds = flat[first]
    found = []
    for start in range(0, draws, step := max(1, _CHUNK // len(kinds))):
        weights = random.multinomial(len(number), many / len(number), size=min(step, draws - start))
        drawn = (weights.astype(np.float64) @ kinds).reshape(-1, classes, classes)  # (draws, K, K)
        support, hits = drawn.sum(2), np.diagonal(drawn, axis1=1, axis2=2)
        recall = np.divide(hits, support, out=np.zeros_like(hits, dtype=np.float64), where=support > 0)
        found.append(recall.sum(1) / (support > 0).sum(1))
    return Drawn(np.concatenate(found), len(number))


def expanded(values: NDArray[np.float64], clusters: int, level: float = 0.95) -> tuple[float, float]:
    """Expanded percentile interval of bootstrapped `values`, drawn from so many clusters; two or more of them."""
    from scipy.special import ndtr, stdtrit

    if clusters < 2:
        raise ValueError("one cluster alone says nothing of others")
    wide = stdtrit(clusters - 1, 0.5 + level / 2) * np.sqrt(clusters / (clusters - 1))
    low, high = np.quantile(values, [ndtr(-wide), ndtr(wide)])
    return float(low), float(high)
