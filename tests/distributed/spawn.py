"""Starts a function in several real processes that share a gloo group."""

import faulthandler
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from mser_dist.quiet import hush
from mser_dist.ranks import distributed
from tests.warm import CONTEXT


def run(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """Call ``function(rank, *arguments)`` in `ranks` processes; their results (tensors, plain values) by rank."""
    with tempfile.TemporaryDirectory() as folder:
        words = (function, ranks, distributed.free_port(), folder, arguments)
        mp.start_processes(_entry, words, nprocs=ranks, start_method=CONTEXT.get_start_method())
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def whole_state(engine: Any) -> dict[str, torch.Tensor]:
    """An engine's weights by name on rank 0, nothing elsewhere. Collective."""
    found: dict[str, torch.Tensor] = engine.weights().all(distributed.discover().is_main)
    return found


def _entry(
    rank: int, function: Callable[..., Any], ranks: int, port: int, folder: str, arguments: tuple[Any, ...]
) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    hush()
    distributed.init(
        distributed.World(rank, ranks, rank, "127.0.0.1", port, "torchrun"), timeout_minutes=2, device="cpu"
    )
    result = function(rank, *arguments)
    torch.save(result, Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # A process once aborted in the interpreter's exit, all work done ("terminate called without an active exception"):
    # DeepSpeed keeps the group, whose threads may then still let go of tensors.
    os._exit(0)
