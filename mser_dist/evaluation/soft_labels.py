"""How far a model's probabilities are from what annotators heard, where each clip has the votes of several."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.shards.emotions import to_label

_LEAST = np.finfo(np.float64).eps  # of a probability in a logarithm, as scikit-learn's log_loss has it


def heard(votes: Sequence[Mapping[str, float] | None], labels: Sequence[str]) -> NDArray[np.float64]:
    """(n, K) shares of the annotators' votes for each label, of clips' {emotion: votes}.

    An emotion is a label, or a word that `emotions` knows for one; votes for others do not count. All 0 where none is
    left.
    """
    number = {label: i for i, label in enumerate(labels)}
    shares = np.zeros((len(votes), len(labels)))
    for row, given in enumerate(votes):
        for word, count in (given or {}).items():
            label: str | None = word
            if word not in number:
                label = None
                with suppress(KeyError):
                    label = to_label(word)
            if label in number:
                shares[row, number[label]] += count
    total = shares.sum(1, keepdims=True)
    return np.divide(shares, total, out=shares, where=total > 0)


def distances(probability: NDArray[np.float64], shares: NDArray[np.float64]) -> dict[str, Any] | None:
    """Means over the n clips that have votes, of (n, K) probabilities and shares of votes; None where none has.

    total_variation: half the sum of the differences. jensen_shannon: the divergence in bits, 0 to 1. cross_entropy: in
    bits, of the votes relative to the probabilities; no less than `entropy`, the votes' own.
    """
    some = shares.sum(1) > 0
    if not some.any():
        return None
    p, q = probability[some], shares[some]
    middle = (p + q) / 2
    return {
        "n": int(some.sum()),
        "total_variation": float(np.abs(p - q).sum(1).mean() / 2),
        "jensen_shannon": float(((_relative(p, middle) + _relative(q, middle)) / 2).mean()),
        "cross_entropy": float(-(q * np.log2(np.maximum(p, _LEAST))).sum(1).mean()),
        "entropy": float(-(q * np.log2(np.where(q > 0, q, 1.0))).sum(1).mean()),
    }


def _relative(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) Kullback-Leibler divergence of p from q in bits; q is above 0 where p is."""
    ratio = np.divide(p, q, out=np.ones_like(p), where=p > 0)
    result: NDArray[np.float64] = (p * np.log2(ratio)).sum(1)
    return result
