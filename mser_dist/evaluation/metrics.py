"""Metrics of emotion recognition, spelled out because papers swap their names.

WA (weighted accuracy) is plain accuracy. UA (unweighted accuracy) is the mean of the classes' recalls, a.k.a. balanced
accuracy. macro-F1 is the mean of the classes' F1. Classes without clips in the reference do not count, not for chance
either: chance is the UA of one answer to all clips.
"""

from dataclasses import dataclass

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
    support, hits = confusion.sum(1), confusion.diagonal()
    present = support > 0
    recall = hits[present] / support[present]
    # F1 = 2·TP / (2·TP + FP + FN), and support + predictions = 2·TP + FN + FP
    f1 = 2 * hits[present] / (support + confusion.sum(0))[present]
    return Metrics(
        n=len(reference),
        k=int(present.sum()),
        ua=float(recall.mean()),
        wa=float(hits.sum() / support.sum()),
        macro_f1=float(f1.mean()),
        confusion=confusion,
    )
