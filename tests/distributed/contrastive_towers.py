"""Two towers under every wrapper, and the batch that the distributed contrastive tests give them."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mser_dist import config as cfg
from mser_dist.contrastive import ContrastiveOutput, Embedded, LogitScale, cached_backward
from mser_dist.ranks.distributed import World
from mser_dist.training.engine import Engine
from tests.contrastive_reference import ours

N, D, SCALE = 12, 16, 7.4
RELATIVE = 1e-5  # fp32, another order of summation
LABEL = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 3, 0, 2, 2])  # one of them stands alone
SOURCE = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 2, 6])  # of one to three clips
TEXT = torch.tensor([0, 10, 20, 1, 10, 21, 0, 11, 30, 2, 20, 20])


def inputs() -> tuple[Tensor, Tensor]:
    """Speech, and its text: the same where the text is."""
    g = torch.Generator().manual_seed(3)
    return torch.randn(N, D, generator=g), torch.randn(int(TEXT.max()) + 1, D, generator=g)[TEXT]


class Towers(nn.Module):
    """Two towers, a scale and a bias: every kind of parameter that a contrastive loss reaches."""

    def __init__(self, highest: float = 100.0) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.x = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 8))
        self.y = nn.Linear(D, 8)
        self.scale = LogitScale(1, start=SCALE, highest=highest, bias=-2.0)

    def forward(self, chunk: dict[str, Tensor]) -> Embedded:
        rows = [nn.functional.normalize(tower(chunk[name]), dim=-1) for name, tower in (("x", self.x), ("y", self.y))]
        scale, bias = self.scale()
        assert bias is not None
        return Embedded(tuple(rows), (scale, bias))


def loss_of(case: str, ids: dict[str, Tensor], options: dict[str, Any]) -> Callable[[Embedded], tuple[Tensor, Tensor]]:
    def loss(embedded: Embedded) -> tuple[Tensor, Tensor]:
        (x, y), (scale, bias) = embedded
        out = ours(case, x, y, scale[0], bias[0], ids["label"], ids["text"], ids["source"], **options)
        return out.loss, telemetry(out)

    return loss


ACCURACY = 1


def telemetry(out: ContrastiveOutput) -> Tensor:
    return torch.stack([out.excess, out.accuracy, out.positives, out.alignment, out.false_negatives, out.rows])


class Wrapped:
    """A model under DDP, one of the ZeRO stages, or nothing but the mean over ranks that they take."""

    def __init__(self, kind: str, rank: int, ranks: int, folder: str, device: str = "cpu") -> None:
        model = (Towers(SCALE) if "bound" in kind else Towers()).to(device)
        self.ranks = ranks
        self.ddp = DistributedDataParallel(model) if kind == "ddp" else None
        self.engine = None
        if kind.startswith("zero"):
            path = Path(folder) / f"{kind}-{ranks}-{rank}.json"
            small = {"stage3_param_persistence_threshold": 0} if kind == "zero3" else {}
            path.write_text(json.dumps({"zero_optimization": {"stage": int(kind[-1]), **small}}))
            train = cfg.TrainConfig(global_batch=4 * ranks, lr=0.0, grad_clip=0.0)  # steps that change nothing
            config = cfg.Stage1(train=train, engine=cfg.EngineConfig(deepspeed=str(path)))
            self.engine = Engine(model, config, World(rank, ranks), total=10**6, device=device)
        self.model = model

    def gradients(self, chunks: list[dict[str, Tensor]], loss: Any) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Of all parameters, and the loss and its telemetry, after one step."""
        if self.engine is None:
            embed = self.ddp or self.model
            no_sync = self.ddp.no_sync if self.ddp else nullcontext
            value, told = cached_backward(chunks, embed, loss, no_sync=no_sync)
            found = {}
            for name, parameter in self.model.named_parameters():
                assert parameter.grad is not None
                found[name] = parameter.grad.clone()
                if self.ddp is None and self.ranks > 1:
                    torch.distributed.all_reduce(found[name])
                    found[name] /= self.ranks
            self.model.zero_grad()
            return found, value, told
        from deepspeed.utils import safe_get_full_grad

        engine = self.engine
        with engine.one_reduction():
            value, told = cached_backward(
                chunks, engine.forward, loss, backward=engine.backward, no_sync=engine.no_sync
            )
        found = {name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()}
        engine.step()
        return found, value, told
