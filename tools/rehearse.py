"""A job of many ranks on one machine, with nothing computed: what it opens and holds, and what first breaks.

    python tools/rehearse.py CONFIG [key=value …] [--ranks 64]

N light processes meet at the real store, under the real watchdog; they open the config's sets (the first one reads the
indexes, the others map them), plan its order, deal out its first steps, walk over the boundary between two steps, save
and resume a checkpoint by its manifest. Nothing is decoded and there is no model: the checkpoint is of a made-up one,
cut as ZeRO-3 cuts. What NCCL, CUDA and imports take comes on top; see `mser doctor`.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import psutil

from mser_dist import config as cfg
from mser_dist.config.file import load_training
from mser_dist.errors import UserError
from mser_dist.ranks import limits
from mser_dist.ranks.distributed import World
from mser_dist.stream.examples import open_training_clips
from mser_dist.stream.plan import START
from mser_dist.stream.steps import plan_of
from tools.bench_scale import at_1024, job

STEPS = 4  # that are dealt out
SHOWN = (1024, 4096)  # ranks that are reckoned


def planned(config: cfg.Stage1 | cfg.Stage2, world: World) -> dict[str, float]:
    """A rank's look ahead, as a training's: its sets and its share of the first steps."""
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.world_size), LOCAL_RANK=str(world.local_rank))
    os.environ.update(MASTER_ADDR=world.master_addr, MASTER_PORT=str(world.master_port))
    began = time.perf_counter()
    shards = open_training_clips(config.data)
    index = time.perf_counter() - began
    parallel = config.data.parallel if isinstance(config, cfg.Stage1) else 1
    order = plan_of(shards, config.data, config.train.global_batch, parallel, config.seed)
    for position in order.walk(START, STEPS):
        order.share(position, world.rank, world.world_size)
    return {"index": index, "plan": time.perf_counter() - began - index}


def memory() -> float:
    """MiB of this process that are its own, in the share of what it has together with others."""
    return float(psutil.Process().memory_full_info().pss) / 2**20


def breaks(ranks: int, limit: int) -> list[str]:
    """What would not go with so many ranks, as far as a machine with such a limit on open files can tell."""
    try:
        limits.check_files(ranks, serves=True, mesh=False, limit=limit)
    except UserError as error:
        return [str(error)]
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a training's, as `mser train` takes it")
    parser.add_argument("words", nargs="*", metavar="key=value", help="to change it")
    parser.add_argument("--ranks", type=int, default=64, help="light processes (default: %(default)s)")
    given = parser.parse_args()
    try:
        config = load_training(given.config, given.words)
        cfg.batch_shape(config.train, given.ranks)
        limit = limits.raise_limit()
        limits.check_files(given.ranks, serves=True, mesh=False, limit=limit)
        open_training_clips(config.data)  # a mistake is told once
    except UserError as error:
        print(f"rehearse: error: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None

    def more(world: World) -> dict[str, float]:
        return planned(config, world) | {"memory": memory()}

    with tempfile.TemporaryDirectory(prefix="rehearse-") as folder:
        rows = job(given.ranks, Path(folder), more)
    found: dict[str, Any] = {row["name"]: row for row in rows}
    extra = found["rank"]
    sockets, opens = found["sockets"], found["resume-opens"]
    print(f"{given.ranks} ranks, on {os.cpu_count()} cores; of the rank with most:")
    print(f"  start-up       {extra['start']:.2f} s to meet, {extra['index']:.2f} s for the sets")
    print(f"  plan           {extra['plan']:.2f} s")
    print(f"  sockets        {sockets['value']}; {sockets['server']} in the process that serves the store")
    print(f"  memory         {extra['memory']:.0f} MiB, without CUDA, a model and its libraries")
    print(f"  resume         {opens['value']} files, {found['resume-seconds']['value']:.3f} s of its own")
    print(f"  between steps  {found['boundary-ms']['value']:.3f} ms")
    print(at_1024(rows))
    for ranks in SHOWN:
        needs = limits.OWN + limits.PER_RANK * ranks
        told = breaks(ranks, limit) or [f"nothing: {needs} of {limit} open files in the process that serves the store"]
        print(f"at {ranks} ranks breaks: {told[0]}")


if __name__ == "__main__":
    main()
