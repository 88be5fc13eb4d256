"""Metrics of emotion recognition, spelled out because papers swap their names.

WA (weighted accuracy) is plain accuracy. UA (unweighted accuracy) is the mean of the classes' recalls, a.k.a. balanced
accuracy. macro-F1 is the mean of the classes' F1. Classes without clips in the reference do not count, not for chance
either: chance is the UA of one answer to all clips.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Metrics:
    """n clips of k classes, and how well they were named. `confusion` is (K, K): reference by prediction; of the K
    classes that could be predicted, k have clips.
    """

    n: int
    k: int
    ua: float
    wa: float
    macro_f1: float
    confusion: NDArray[np.int64]

    @property
    def chance(self) -> float:
        """UA of an answer that does not look at the clip."""
        return 1 / self.k

    @property
    def majority(self) -> float:
        """WA of the one answer to all clips that most of them have."""
        return float(self.confusion.sum(1).max() / self.n)

    @property
    def constant(self) -> int | None:
        """The class that all clips, of several classes, are taken for; None where predictions differ."""
        answered = np.flatnonzero(self.confusion.sum(0))
        return int(answered[0]) if len(answered) == 1 < self.k else None


def score(reference: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> Metrics:
    """Metrics of (n,) predicted class numbers against (n,) references, out of `classes` that could be predicted."""
    if len(reference) == 0 or len(reference) != len(predicted):
        raise ValueError(f"{len(reference)} references and {len(predicted)} predictions")
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (reference, predicted), 1)
    return of_confusion(confusion)


def of_confusion(confusion: NDArray[np.int64]) -> Metrics:
    """Metrics of a confusion matrix (K, K), reference by prediction, of a clip or more."""
    return Metrics(
        n=int(confusion.sum()),
        k=int((confusion.sum(1) > 0).sum()),
        ua=float(ua(confusion)),
        wa=float(wa(confusion)),
        macro_f1=float(macro_f1(confusion)),
        confusion=confusion,
    )


def ua(confusion: NDArray[Any]) -> NDArray[np.float64]:
    """UA (…) of confusion matrices (…, K, K), each with a clip or more."""
    support, hits = confusion.sum(-1), confusion.diagonal(axis1=-2, axis2=-1)
    return _over_classes(hits, support, support)


def wa(confusion: NDArray[Any]) -> NDArray[np.float64]:
    """WA (…) of confusion matrices (…, K, K)."""
    hits: NDArray[np.float64] = confusion.trace(axis1=-2, axis2=-1) / confusion.sum((-2, -1))
    return hits


def macro_f1(confusion: NDArray[Any]) -> NDArray[np.float64]:
    """macro-F1 (…) of confusion matrices (…, K, K)."""
    support, hits = confusion.sum(-1), confusion.diagonal(axis1=-2, axis2=-1)
    # F1 = 2·TP / (2·TP + FP + FN), and support + predictions = 2·TP + FN + FP
    return _over_classes(2 * hits, support + confusion.sum(-2), support)


SCORES: dict[str, Callable[[NDArray[Any]], NDArray[np.float64]]] = {"ua": ua, "wa": wa, "macro_f1": macro_f1}


def _over_classes(part: NDArray[Any], whole: NDArray[Any], support: NDArray[Any]) -> NDArray[np.float64]:
    """The mean (…) of part / whole, (…, K) each, over the classes that have clips."""
    present = support > 0
    share = np.divide(part, whole, out=np.zeros(part.shape), where=present)
    mean: NDArray[np.float64] = share.sum(-1) / present.sum(-1)
    return mean
