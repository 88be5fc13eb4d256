"""One measurement of `bench_contrastive.py`, in a process of its own: JSON in as an argument, JSON out.

It runs in the environment that has open_clip, whose `loss.py` is loaded by its path: the package wants torchvision.
"""

import ctypes
import gc
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mser_dist.contrastive import Embedded, cached_backward, contrastive_loss, parallel_loss

CLASSES = 6


def embeddings(n: int, width: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's (n, width) twice, of unit length, pairs alike, and its labels."""
    x, more = torch.randn(2, n, width, generator=torch.Generator().manual_seed(rank))
    x, y = (nn.functional.normalize(part, dim=-1) for part in (x, x + more))
    return x, y, torch.arange(rank * n, (rank + 1) * n) % CLASSES


def open_clip_loss(ranks: int, rank: int) -> Callable[..., Tensor]:
    """ClipLoss as open_clip's README advises for large batches: local loss, gather with gradient."""
    spec = importlib.util.find_spec("open_clip")
    assert spec and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "loss.py"
    file = importlib.util.spec_from_file_location("open_clip_loss", path)
    assert file and file.loader
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    many = ranks > 1
    loss = module.ClipLoss(local_loss=many, gather_with_grad=many, rank=rank, world_size=ranks)
    return lambda x, y, scale, labels: loss(x, y, scale)


def full_matrix(name: str) -> Callable[..., Tensor]:
    """The losses with the whole matrix of scores and autograd's own backward pass."""

    def supcon(x: Tensor, y: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
        positive = labels[:, None] == labels[None]  # (N, N)
        scores = scale * x @ y.T
        parts = [
            -(s.log_softmax(1).masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean() for s in (scores, scores.T)
        ]
        return (parts[0] + parts[1]) / 2

    def siglip(x: Tensor, y: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
        sign = torch.where(labels[:, None] == labels[None], 1.0, -1.0)
        return -nn.functional.logsigmoid(sign * (scale * x @ y.T - 1.6)).sum() / len(x)

    return {"supcon": supcon, "siglip": siglip}[name]


def ours(name: str, gather: Any, tile: int) -> Callable[..., Tensor]:
    def loss(x: Tensor, y: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
        if name == "parallel":
            return parallel_loss(x, labels, labels, scale, gather=gather, tile=tile).loss
        bias = torch.tensor(-1.6) if name == "siglip" else None
        return contrastive_loss(
            x, y, scale, loss=name, labels=labels, bias=bias, gather=gather, tile=tile  # type: ignore[arg-type]
        ).loss  # fmt: skip

    return loss


def loss_of(task: dict[str, Any], rank: int = 0) -> Callable[..., Tensor]:
    if task["who"] == "open_clip":
        return open_clip_loss(task["ranks"], rank)
    if task["who"] == "full matrix":
        return full_matrix(task["loss"])
    return ours(task["loss"], task.get("gather", "all_gather"), task.get("tile", 1024))


class Peak:
    """MiB of memory that came on top while the block ran, the most at any moment, by the kernel's own count.

    Pages of libraries that were read from disk meanwhile are no one's allocation: they are left out.
    """

    def __enter__(self) -> "Peak":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.before, self.files = self._status("VmRSS"), self._status("RssFile")
        return self

    def __exit__(self, *_: object) -> None:
        read = self._status("RssFile") - self.files
        self.mib = (self._status("VmHWM") - self.before - read) / 1024

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(task: dict[str, Any], rank: int = 0) -> dict[str, Any]:
    """CPU seconds and MiB of a forward and backward pass of a loss; its gradients to the file `keep`."""
    local = task["n"] // task["ranks"]
    x, y, labels = embeddings(local, task["width"], rank)
    scale = torch.tensor(14.0, requires_grad=True)
    loss = loss_of(task, rank)

    def once(rows: int) -> tuple[Tensor, Tensor]:
        a, b = (part[:rows].detach().requires_grad_() for part in (x, y))
        loss(a, b, scale, labels[:rows]).backward()
        assert a.grad is not None and b.grad is not None
        return a.grad, b.grad

    once(64)  # what is set up at first use
    scale.grad = None
    with Peak() as peak:
        began = time.process_time()
        grads = once(local)
        seconds = time.process_time() - began
    if "keep" in task:
        torch.save([*grads, scale.grad], f"{task['keep']}.{rank}")
    return {"seconds": seconds, "mib": peak.mib}


def in_group(rank: int, task: dict[str, Any], port: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=task["ranks"])
    result = measure(task, rank)
    Path(folder, f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    dist.destroy_process_group()


def real_group(task: dict[str, Any]) -> dict[str, Any]:
    """The same in as many real processes over gloo; the largest figures of all."""
    import tempfile

    import torch.multiprocessing as mp

    from mser_dist.ranks.distributed import free_port

    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(in_group, (task, free_port(), folder), nprocs=task["ranks"])
        parts = [json.loads(Path(folder, f"{r}.json").read_text(encoding="utf-8")) for r in range(task["ranks"])]
    return {key: max(part[key] for part in parts) for key in parts[0]}


def one_of_many(task: dict[str, Any]) -> dict[str, Any]:
    """One rank of many, the others imagined: collectives give back this rank's own rows (torch's "fake" group)."""
    if task["ranks"] > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=task["ranks"], store=FakeStore())
    return measure(task)


class Tower(nn.Module):
    """A Whisper-tiny encoder over 3-second clips, and a linear text tower."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        from mser_dist.models.whisper import SpeechEncoder

        torch.manual_seed(0)
        # Whisper-tiny's shape (arXiv 2212.04356, table 1)
        arch = {"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536}
        self.speech = SpeechEncoder(WhisperEncoder(WhisperConfig(**arch, attn_implementation="sdpa")))
        self.head, self.text = nn.Linear(384, 128), nn.Linear(384, 128)

    def forward(self, clips: range) -> Embedded:
        generator = torch.Generator().manual_seed(clips.start)
        mel = torch.randn(len(clips), 80, 300, generator=generator)  # made here, so that inputs take no memory
        text = torch.randn(len(clips), 384, generator=generator)
        features, _ = self.speech(mel, torch.full((len(clips),), 300))
        rows = (self.head(features[:, :, 0].mean(1)), self.text(text))
        return Embedded(tuple(nn.functional.normalize(row, dim=-1) for row in rows))


def caching(task: dict[str, Any]) -> dict[str, Any]:
    """CPU seconds and MiB of a step of `n` clips, in chunks of `micro`."""
    model, n, micro = Tower(), task["n"], task["micro"]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # which both ways have between steps

    def loss(embedded: Embedded) -> tuple[Tensor, None]:
        x, y = embedded.rows
        return contrastive_loss(x, y, torch.tensor(14.0), labels=torch.arange(len(x)) % CLASSES).loss, None

    def step(count: int) -> None:
        cached_backward([range(i, i + micro) for i in range(0, count, micro)], model, loss)

    step(2 * micro)
    with Peak() as peak:
        began = time.process_time()
        step(n)
        seconds = time.process_time() - began
    return {"seconds": seconds, "mib": peak.mib}


def main() -> None:
    task = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    work = {"loss": one_of_many, "group": real_group, "caching": caching}[task["what"]]
    print(json.dumps(work(task)))


if __name__ == "__main__":
    main()
