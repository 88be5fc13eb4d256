"""Starts a function in several real processes that share a gloo group."""

import os
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """Call ``function(rank, *arguments)`` in `ranks` processes; returns their results (tensors and plain values) by rank."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        mp.spawn(_entry, (function, ranks, port, folder, arguments), nprocs=ranks)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def _entry(rank: int, function: Callable[..., Any], ranks: int, port: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in env.items()}, DS_ACCELERATOR="cpu")
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    result = function(rank, *arguments)
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
