"""How much a training clip counts in stage 2's loss, by its label."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mser_dist.stream.loader import Example


def class_weights(
    wanted: str | Mapping[str, float], labels: Sequence[str], counts: Sequence[int]
) -> list[float] | None:
    """A weight for each label, or None for none; counts: the training clips of each.

    Balanced: inverse to the count, and 1 on average over the clips, as scikit-learn's. The loss is a weighted mean, so
    only ratios matter.
    """
    if wanted == "none":
        return None
    if isinstance(wanted, str):
        there = [count for count in counts if count]
        return [sum(there) / (len(there) * count) if count else 1.0 for count in counts]
    return [float(wanted.get(label, 1.0)) for label in labels]


def weights_of(
    weights: Sequence[float] | None, clips: Sequence[Example], answers: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """``{"weights": (tokens,)}`` of the answers' tokens, clip by clip; nothing where all count the same.

    answers: of each clip.
    """
    if weights is None:
        return {}
    each = [weights[clip.label] for clip, answer in zip(clips, answers, strict=True) for _ in answer]
    return {"weights": torch.tensor(each)}
