"""Contrastive losses over all ranks, with exact gradients.

What each rank computes. Of a global batch of N rows, rank r of W owns B_r. Embeddings and ids are gathered from all
ranks; rank r takes the loss of *its own* rows against *all* N columns, in both directions. The gather's backward sums
over the ranks the gradients that each computed for a block, so that with

    loss_r = W / N · Σ_{i owned by r} ℓ_i

the mean over ranks that DDP and ZeRO take, 1/W · Σ_r ∂loss_r, equals ∂(1/N · Σ_i ℓ_i): the gradient of one process that
holds the whole batch, for the towers and for the scale alike.

ℓ_i is SupCon's mean over positives outside the logarithm (Khosla et al., arXiv 2004.11362, eq. 2):

    ℓ_i = −1/|P(i)| · Σ_{p∈P(i)} log( exp(s·x_i·y_p) / Σ_{a∈A(i)} exp(s·x_i·y_a) )

Its least value is not 0 but ln|P(i)|, as the probability is shared by |P(i)| positives: compare `excess`, not `loss`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ContrastiveOutput:
    """`loss` has the gradient and averages over ranks to the global loss; the others are detached local means."""

    loss: Tensor
    excess: Tensor  # loss minus its floor, mean ln|P(i)|
    accuracy: Tensor  # share of rows whose nearest column is a positive
    positives: Tensor  # mean |P(i)|


class _Gather(torch.autograd.Function):
    """All-gather along dim 0; backward sums each rank's gradient for a block and hands the block's owner its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        start = dist.get_rank() * ctx.rows
        return grad[start : start + ctx.rows]


def gather_rows(x: Tensor) -> Tensor:
    """(B, …) on each rank → (W·B, …) on every rank, in rank order, with gradient. B must be equal on all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    if x.requires_grad:
        return _Gather.apply(x)
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _supcon(logits: Tensor, positive: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-row SupCon. (b, N) logits, positives and candidates → summed loss, floor, hits, and rows with a positive."""
    logits = logits.masked_fill(~candidate, float("-inf"))
    count = positive.sum(1)  # (b,)
    has = count > 0
    log_p = logits - logits.logsumexp(1, keepdim=True)
    mean = log_p.masked_fill(~positive, 0.0).sum(1) / count.clamp(min=1)
    floor = count.clamp(min=1).log()
    hit = positive.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)
    return -mean[has].sum(), floor[has].sum(), hit[has].sum(), count.sum()


def _combine(parts: list[tuple[Tensor, Tensor, Tensor, Tensor]], rows: Tensor, size: int) -> ContrastiveOutput:
    """Average directions; `rows` is the number of rows with a positive over all ranks."""
    rows = rows.clamp(min=1)
    loss, floor, hits, count = (torch.stack([p[i] for p in parts]).float().mean() * size / rows for i in range(4))
    return ContrastiveOutput(loss, (loss - floor).detach(), hits.detach(), count.detach())


def speech_text_loss(speech: Tensor, text: Tensor, label: Tensor, scale: Tensor) -> ContrastiveOutput:
    """Symmetric speech ↔ text SupCon; positives are all pairs of one label, over all ranks.

    speech, text: (B, D) of unit length, row i a pair; label: (B,) int64 ids; scale: 1/temperature. fp32 throughout.
    """
    _, size = _rank_and_size()
    with torch.autocast(speech.device.type, enabled=False):
        speech, text, scale = speech.float(), text.float(), scale.float()
        all_speech, all_text, all_label = gather_rows(speech), gather_rows(text), gather_rows(label)
        positive = label[:, None] == all_label[None, :]  # (B, N)
        candidate = torch.ones_like(positive)
        parts = [
            _supcon(scale * speech @ all_text.T, positive, candidate),
            _supcon(scale * text @ all_speech.T, positive, candidate),
        ]
        rows = torch.tensor(len(label) * size, device=speech.device)
        return _combine(parts, rows, size)


def parallel_speech_loss(speech: Tensor, source: Tensor, label: Tensor, scale: Tensor) -> ContrastiveOutput:
    """The language-agnostic term: clips of one utterance in different languages attract each other.

    Positives of a clip are the other clips of its source; clips of the same label but another source are neither
    positive nor negative, for pushing them apart would undo the emotion term. Rows without a positive have no loss.

    speech: (B, D) of unit length; source, label: (B,) int64 ids; scale: 1/temperature.
    """
    rank, size = _rank_and_size()
    with torch.autocast(speech.device.type, enabled=False):
        speech, scale = speech.float(), scale.float()
        everything, all_source, all_label = gather_rows(speech), gather_rows(source), gather_rows(label)
        own = torch.arange(len(source), device=speech.device) + rank * len(source)
        itself = own[:, None] == torch.arange(len(all_source), device=speech.device)[None, :]  # (B, N)
        positive = (source[:, None] == all_source[None, :]) & ~itself
        candidate = positive | (label[:, None] != all_label[None, :])
        has = positive.any(1)
        rows = has.sum().float()
        if size > 1:
            dist.all_reduce(rows)
        # A row without candidates would be a logsumexp of nothing, whose gradient is NaN: drop such rows first.
        part = _supcon(scale * speech[has] @ everything.T, positive[has], candidate[has])
        return _combine([part], rows, size)
