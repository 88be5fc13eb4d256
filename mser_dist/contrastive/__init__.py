"""Contrastive losses over all ranks: exact gradients, no matrix of all pairs, positives by label.

Usable on its own: it needs two tensors and, with several processes, a process group.

    import torch
    from mser_dist.contrastive import LogitScale, contrastive_loss

    scale = LogitScale(1, start=14.0, highest=100.0)
    x, y = (torch.nn.functional.normalize(torch.randn(8, 16), dim=-1) for _ in range(2))  # (B, D) on each rank
    [s], _ = scale()
    out = contrastive_loss(x, y, s, loss="supcon", labels=torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))
    out.loss.backward()  # equals one process with the whole batch, once DDP or ZeRO has taken the mean over ranks
    print(float(out.excess))  # the loss above the least that these labels allow

`contrastive_loss` has infonce, supcon, sum, masked and siglip; `parallel_loss` the language-agnostic term;
`cached_backward` a batch larger than memory. README.md beside this file has the maths, and what each costs.
"""

from mser_dist.contrastive.cached import Embedded, cached_backward
from mser_dist.contrastive.exchange import Gather
from mser_dist.contrastive.losses import ContrastiveOutput, Loss, contrastive_loss, parallel_loss, uniformity
from mser_dist.contrastive.memory import peak_bytes
from mser_dist.contrastive.scale import LogitScale, bounds

__all__ = [
    "ContrastiveOutput",
    "Embedded",
    "Gather",
    "LogitScale",
    "Loss",
    "bounds",
    "cached_backward",
    "contrastive_loss",
    "parallel_loss",
    "peak_bytes",
    "uniformity",
]
