"""The loss of stage 2: cross-entropy of the answers' tokens, weighted and smoothed where a config asks for it."""

from torch import Tensor, nn

from mser_dist.models.packed import IGNORE


def answer_loss(logits: Tensor, target: Tensor, weights: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """The sum of the losses of the tokens.

    logits (n, V), target (n,), IGNORE where there is no loss. weights: (m,), of the m others in their order. smoothing:
    of the wanted distribution, so much is uniform over the vocabulary (arXiv 1512.00567), as torch's cross-entropy has
    it: a token that no answer holds is wanted too, a little.
    """
    if weights is None:
        return nn.functional.cross_entropy(
            logits, target, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
        )
    wanted = target != IGNORE
    each = nn.functional.cross_entropy(logits[wanted], target[wanted], reduction="none", label_smoothing=smoothing)
    return (each * weights.to(each.dtype)).sum()


def answers_right(logits: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """How many tokens are the likeliest, or their weights."""
    right = logits.argmax(-1) == target
    return right.sum() if weights is None else (right[target != IGNORE] * weights).sum()
