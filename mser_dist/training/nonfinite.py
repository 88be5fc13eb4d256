"""Steps whose loss or gradient is not finite: no rank changes a byte, the clips are written down, N in a row end it.

DeepSpeed skips the update on every rank when the global gradient norm is not finite. What it leaves to us: a loss that
is infinite while its gradient is not, and buffers (BatchNorm's statistics) that the forward pass has changed already.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mser_dist.errors import UserError
from mser_dist.ranks import distributed
from mser_dist.shards.shard_set import ShardSet
from mser_dist.tables import count
from mser_dist.training.engine import Engine


def poison(loss: Tensor) -> Tensor:
    """The loss itself where it is finite; else one whose gradient is NaN, so that no rank takes the step."""
    # A factor and not a choice between two losses: the gradient of the one not chosen would be 0 · NaN.
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


class Buffers:
    """The model's buffers as of the last good step; masks, which no forward pass changes, are left out.

    All others are copied at every step: BatchNorm's kernels change theirs without raising the tensor's version.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [b.detach() for b in model.buffers() if b.dtype != torch.bool]
        self._kept = [b.clone() for b in self._buffers]

    def keep(self) -> None:
        """The step was good."""
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            kept.copy_(buffer)

    def restore(self) -> None:
        """The step was skipped."""
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            buffer.copy_(kept)


class NotFinite:
    """Settles each step: keeps what a good one changed, undoes what a skipped one did, and counts those in a row.

    Writes skipped steps to ``<run>/skipped_steps.jsonl``; more than `limit` in a row are a `UserError`.
    """

    def __init__(self, model: nn.Module, out: Path, shards: ShardSet, limit: int, dtype: str, is_main: bool) -> None:
        self._buffers = Buffers(model)
        self._file = out / "skipped_steps.jsonl"
        self._shards = shards
        self._limit = limit
        self._fp16 = dtype == "float16"
        self._is_main = is_main

    def settle(
        self, engine: Engine, step: int, in_a_row: int, losses: list[float], batches: list[dict[str, Any]]
    ) -> int:
        """After `step`, with this rank's losses and batches: how many in a row were skipped, up to it. Collective."""
        if engine.step_applied:
            self._buffers.keep()
            return 0
        self._buffers.restore()
        # Under fp16 a gradient overflows now and then, and DeepSpeed lowers its loss scale.
        odd = distributed.most([not all(map(math.isfinite, losses))])[0]
        if self._fp16 and not odd:
            return in_a_row
        return self._skipped(step, in_a_row + 1, losses, batches)

    def _skipped(self, step: int, in_a_row: int, losses: list[float], batches: list[dict[str, Any]]) -> int:
        mine = {
            "loss": [loss if math.isfinite(loss) else str(loss) for loss in losses],
            "finite_input": all(bool(batch["speech"].isfinite().all()) for batch in batches),
            "samples": [self._shards.key(index) for batch in batches for index in batch["index"]],
        }
        ranks = dict(enumerate(distributed.gather(mine)))
        if self._is_main:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "ranks": ranks}, ensure_ascii=False) + "\n")
        culprits = [r for r, part in ranks.items() if not part["finite_input"]]
        culprits = culprits or [r for r, part in ranks.items() if any(isinstance(x, str) for x in part["loss"])]
        where = f"rank{'s' * (len(culprits) > 1)} {', '.join(map(str, culprits))}" if culprits else "the gradient"
        said = f"step {step}: not finite at {where}; the step changes nothing, its clips are in {self._file}"
        if in_a_row > self._limit:
            raise UserError(
                f"{said}; {count(in_a_row, 'step')} in a row (train.max_skipped={self._limit}): "
                "lower train.lr or set train.grad_clip, and look at those clips"
            )
        if self._is_main:
            distributed.warn(said)
        return in_a_row
