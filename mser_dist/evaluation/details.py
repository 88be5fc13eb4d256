"""What a row of the report tells beside UA, WA and macro-F1: each class, calibration, annotators' votes, and the UA by
clip length and by gender.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.evaluation import soft_labels
from mser_dist.evaluation.bootstrap import clusters_of, draw_ua
from mser_dist.evaluation.calibration import brier, ece, probabilities, reliability
from mser_dist.evaluation.metrics import score

LENGTHS = (0.0, 2.0, 4.0, 8.0, float("inf"))  # seconds: a clip of 2 s is of the second group


@dataclass(frozen=True)
class Clips:
    """What is known of n clips beside the answers to them; "" or None is not named."""

    speaker: NDArray[Any]  # (n,), and so are the others
    gender: NDArray[Any]
    duration: NDArray[Any]  # seconds
    votes: Sequence[Mapping[str, float] | None]


def details(
    labels: Sequence[str],
    reference: NDArray[np.int64],
    scores: NDArray[Any],
    scale: float | None,
    temperature: float | None,
    clips: Clips,
) -> dict[str, Any]:
    """The row's further entries, ready for JSON, of n clips with their (n,) label numbers and (n, K) scores.

    scale: that makes the scores log-probabilities up to a constant; None: they are no such thing. temperature: that was
    fitted; None: none was.
    """
    predicted = scores.argmax(1)
    return {
        **_classes(labels, reference, predicted),
        **_calibration(labels, reference, scores, scale, temperature, clips.votes),
        "by_length": _by_length(reference, predicted, len(labels), clips),
        "by_gender": _by_gender(reference, predicted, len(labels), clips),
    }


def _classes(labels: Sequence[str], reference: NDArray[np.int64], predicted: NDArray[np.int64]) -> dict[str, Any]:
    """Support, recall, precision and F1 of each class; None where a class has no clip, or no clip is taken for it."""
    found = score(reference, predicted, len(labels))
    table = found.confusion
    hits, support, answered = table.diagonal(), table.sum(1), table.sum(0)
    classes = {}
    for i, label in enumerate(labels):
        n, said, right = int(support[i]), int(answered[i]), int(hits[i])
        classes[label] = {
            "n": n,
            "recall": right / n if n else None,
            "precision": right / said if said else None,
            "f1": 2 * right / (n + said) if n else None,
        }
    return {"majority": found.majority, "classes": classes, "confusion": table.tolist()}


def _calibration(
    labels: Sequence[str],
    reference: NDArray[np.int64],
    scores: NDArray[Any],
    scale: float | None,
    temperature: float | None,
    votes: Sequence[Mapping[str, float] | None],
) -> dict[str, Any]:
    """ECE, Brier score and reliability, as the probabilities are and with the temperature; distances from votes."""
    if scale is None:
        return {}
    result: dict[str, Any] = {"temperature": temperature}
    probability = probabilities(scores, scale)
    for ending, flattened in (("", 1.0), ("_calibrated", temperature)):
        if flattened is not None:
            probability = probabilities(scores, scale, flattened)
            bins = reliability(probability, reference)
            result |= {f"ece{ending}": ece(bins), f"brier{ending}": brier(probability, reference)}
            result |= {f"reliability{ending}": bins}
    if soft := soft_labels.distances(probability, soft_labels.heard(votes, labels)):
        result["soft"] = {**soft, "calibrated": temperature is not None}
    return result


def _by_length(
    reference: NDArray[np.int64], predicted: NDArray[np.int64], classes: int, clips: Clips
) -> list[dict[str, Any]]:
    rows = []
    for low, high in pairwise(LENGTHS):
        mine = (low <= clips.duration) & (clips.duration < high)
        if mine.any():
            to = None if high == float("inf") else high
            rows.append({"from": low, "to": to, **_ua(reference, predicted, classes, clips.speaker, mine)})
    return rows


def _by_gender(
    reference: NDArray[np.int64], predicted: NDArray[np.int64], classes: int, clips: Clips
) -> dict[str, dict[str, Any]]:
    """By the gender that the set names; empty where it names none."""
    gender = np.array([name or "" for name in clips.gender], dtype=object)
    named = sorted(set(gender) - {""})
    groups = {name: gender == name for name in named}
    if named and (gender == "").any():
        groups["not named"] = gender == ""
    return {name: _ua(reference, predicted, classes, clips.speaker, mine) for name, mine in groups.items()}


def _ua(
    reference: NDArray[np.int64],
    predicted: NDArray[np.int64],
    classes: int,
    speaker: NDArray[Any],
    mine: NDArray[np.bool_],
) -> dict[str, Any]:
    """UA of the clips `mine`, and its interval where they are of two speakers or more."""
    found = score(reference[mine], predicted[mine], classes)
    cluster, by_speaker = clusters_of(np.array([name or "" for name in speaker[mine]], dtype=object))
    row: dict[str, Any] = {"n": found.n, "k": found.k, "ua": found.ua, "ua_low": None, "ua_high": None}
    row["speakers"] = int(cluster.max()) + 1 if by_speaker else None
    if by_speaker:
        drawn = draw_ua(reference[mine], predicted[mine], cluster, classes)
        row["ua_low"], row["ua_high"] = drawn.interval()
    return row
