"""The losses with the whole matrix of scores, written out from their papers: what the tiled ones are held against."""

from typing import Any

import torch
from torch import Tensor

from mser_dist.contrastive import ContrastiveOutput, contrastive_loss, parallel_loss

# name → options of `contrastive_loss`; "parallel" is `parallel_loss`
CASES: dict[str, dict[str, Any]] = {
    "infonce": {"loss": "infonce"},
    "infonce, unique texts": {"loss": "infonce", "texts": True},
    "supcon": {"loss": "supcon"},
    "supcon, one direction": {"loss": "supcon", "symmetric": False},
    "supcon, unique texts": {"loss": "supcon", "texts": True},
    "sum": {"loss": "sum"},
    "masked": {"loss": "masked"},
    "masked, unique texts": {"loss": "masked", "texts": True},
    "siglip": {"loss": "siglip"},
    "parallel": {},
}


def ours(
    case: str,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    label: Tensor,
    text: Tensor,
    source: Tensor,
    **more: Any,
) -> ContrastiveOutput:
    """The same by this project's loss; `more` goes to it (tile, gather)."""
    if case == "parallel":
        return parallel_loss(x, source, label, scale, **more)
    options = dict(CASES[case])
    texts = text if options.pop("texts", False) else None
    given_bias = bias if options["loss"] == "siglip" else None
    return contrastive_loss(x, y, scale, labels=label, texts=texts, bias=given_bias, **options, **more)


def reference(
    case: str, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, label: Tensor, text: Tensor, source: Tensor
) -> Tensor:
    """The loss of a case on one process, on tensors of any dtype; (N, D) embeddings, (N,) ids."""
    n = len(x)
    options = CASES[case]
    same = label[:, None] == label[None, :]  # (N, N)
    own = torch.eye(n, dtype=torch.bool)
    if case == "parallel":
        positive = (source[:, None] == source[None, :]) & ~own
        return _supcon(scale * x @ x.T, positive, positive | ~same)
    scores = scale * x @ y.T
    positive, candidate = own, torch.ones_like(own)
    if "texts" in options:
        kept = torch.tensor([int(t) not in text[:j].tolist() for j, t in enumerate(text)])  # a text has one label
        scores, same = scores[:, kept], same[:, kept]
        positive = text[:, None] == text[kept][None, :]
        candidate = torch.ones_like(positive)
    loss = options["loss"]
    if loss == "siglip":  # arXiv 2303.15343, with positives by label
        sign = torch.where(same, 1.0, -1.0).to(x)
        return -torch.nn.functional.logsigmoid(sign * (scores + bias)).sum() / n
    if loss in ("supcon", "sum"):
        positive = same
    if loss == "masked":
        candidate = positive | ~same
    direction = _mil_nce if loss == "sum" else _supcon
    there = direction(scores, positive, candidate)
    return (there + direction(scores.T, positive.T, candidate.T)) / 2 if options.get("symmetric", True) else there


def _supcon(scores: Tensor, positive: Tensor, candidate: Tensor) -> Tensor:
    """arXiv 2004.11362, equation 2, in the mean over the rows that have a positive."""
    has = positive.any(1)
    scores, positive, candidate = scores[has], positive[has], candidate[has]
    log_p = scores - scores.masked_fill(~candidate, -torch.inf).logsumexp(1, keepdim=True)
    return -(log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1)).sum() / max(len(scores), 1)


def _mil_nce(scores: Tensor, positive: Tensor, candidate: Tensor) -> Tensor:
    """arXiv 1912.06430, equation 1."""
    numerator = scores.masked_fill(~positive, -torch.inf).logsumexp(1)
    return (scores.masked_fill(~candidate, -torch.inf).logsumexp(1) - numerator).mean()
