"""How long a checkpoint holds up training, and until it is on the disk: python tools/bench_checkpoint.py --json FILE

One process under ZeRO-3 trains a stack of square matrices; between steps the same state is saved by this project
(in the background), by torch.save and by DeepSpeed, in turn, so that all meet the same noise. Rows of {name, gib,
stall_s_per_gib, durable_s_per_gib, step_ratio}, medians over the rounds; the first save of each, which makes its
buffers and files, is not counted. durable: until the files are synced to the disk (for ours: sealed and published).
step_ratio: a training step while ours is being written, against one that has the machine for itself.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mser_dist import config as cfg
from mser_dist.files import fsync_tree
from mser_dist.quiet import hush
from mser_dist.ranks import distributed
from mser_dist.state.checkpoint import Checkpoints
from mser_dist.training.engine import Engine


class Stack(nn.Module):
    """`depth` matrices of width², a loss of their product with a batch."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.layers(batch).square().mean(), {}  # (B, width) → ()


def timed(call: Callable[..., object], *arguments: object, **options: object) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    call(*arguments, **options)
    return time.perf_counter() - began


def measure(width: int, depth: int, rounds: int, folder: Path) -> list[dict[str, float | str]]:
    """The rows."""
    hush()
    world = distributed.World()
    distributed.init(world, timeout_minutes=5, device="cpu")
    config = cfg.Stage1(train=cfg.TrainConfig(global_batch=4), engine=cfg.EngineConfig(deepspeed="cpu"))
    engine = Engine(Stack(width, depth), config, world, total=10**6, device="cpu")
    batch = torch.randn(4, width)

    def step() -> None:
        loss, _ = engine.forward(batch)  # type: ignore[arg-type]
        engine.backward(loss)
        engine.step()

    ours = Checkpoints(folder / "ours", world, keep=1)
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "torch.save": [], "deepspeed": []}
    ratios: list[float] = []
    for number in range(1, rounds + 2):
        step()
        alone = timed(step)

        began = time.perf_counter()
        stall = timed(ours.save, number, engine, {})
        beside = timed(step)
        ours.finish()
        found["ours"].append((stall, time.perf_counter() - began))
        ratios.append(beside / alone)

        path = folder / "plain.pt"
        state = engine.collect()[0]
        stall = timed(torch.save, state, path)
        found["torch.save"].append((stall, stall + timed(fsync_tree, path)))

        there = folder / "deepspeed"
        stall = timed(engine._engine.save_checkpoint, str(there), tag="all", save_latest=False)
        found["deepspeed"].append((stall, stall + timed(fsync_tree, there)))
    gib = engine.state_bytes() / 2**30
    return [
        {
            "name": name,
            "gib": round(gib, 3),
            "stall_s_per_gib": round(statistics.median(stall for stall, _ in pairs[1:]) / gib, 3),
            "durable_s_per_gib": round(statistics.median(durable for _, durable in pairs[1:]) / gib, 3),
            **({"step_ratio": round(statistics.median(ratios[1:]), 2)} if name == "ours" else {}),
        }
        for name, pairs in found.items()
    ]


def main() -> int:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--width", type=int, default=4096, help="of a matrix (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=6, help="matrices (default: %(default)s: 1.1 GiB of state)")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each that count (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        (Path(folder) / "ours").mkdir()
        rows = measure(options.width, options.depth, options.rounds, Path(folder))
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's destructors have nothing left to do


if __name__ == "__main__":
    main()
