"""What a training says of itself before its first step; a job that is too short to save is refused there."""

import math
import shutil
import socket
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from mser_dist.config.without_effect import Facts, unused_keys
from mser_dist.errors import UserError
from mser_dist.ranks import distributed
from mser_dist.ranks.boundary import time_to_save
from mser_dist.tables import show
from mser_dist.training import stages
from mser_dist.training.budget import budget, sentence
from mser_dist.training.peaks import peak

if TYPE_CHECKING:
    from mser_dist.training.setup import Run


def _facts(run: "Run") -> Facts:
    source = run.setup.shards.source
    parallel = run.config.stage == 1 and len(np.unique(source)) < len(source)
    log_mel = run.stage.features.n_mels is not None
    return Facts(run.world.world_size, len(run.setup.shards.shards), parallel, log_mel)


def _cost(run: "Run", stage: stages.Instruct, node: int) -> str:
    """What a step computes and sends, by clips of the mean length that are asked in turn; node: ranks of one."""
    setup, encoder = run.setup, stage.model.speech.any_encoder
    length = encoder.features.size(float(setup.shards.duration.mean()))
    frames = -(-int(encoder.frames(torch.tensor([length]))) // encoder.stride)
    dtype = getattr(torch, run.config.engine.dtype)
    found = budget(
        stage.model,
        stage.collate.typical(setup.micro),
        frames,
        stage.collate.packing,
        setup.accumulation,
        run.engine.json,
        run.world.world_size,
        node,
        dtype,
    )
    engine = run.config.engine
    return sentence(found, peak(setup.device, engine.dtype, engine.peak_tflops) if setup.device == "cuda" else None)


def announce(run: "Run", step: int, checked: str) -> None:
    """Say what runs; refuse a job too short to save, warn of a disk too small. Collective."""
    setup, config, world = run.setup, run.config, run.world
    size = int(distributed.all_sum([float(run.engine.state_bytes())])[0])
    hosts = distributed.store().to_main(socket.gethostname()) or []
    problem = None
    if world.is_main:
        unit = "packs" if config.data.batching == "tokens" else "clips"
        shape = f"{world.world_size} ranks × {setup.micro} × {setup.accumulation}"
        print(
            f"{len(run.examples)} clips, {run.total} steps, {config.train.global_batch} {unit} a step ({shape}), "
            f"ZeRO-{run.engine.zero_stage}, {config.engine.dtype}"
        )
        if isinstance(run.stage, stages.Align):
            print(run.stage.describe(world.world_size))
        elif config.data.batching != "tokens":  # of packs nobody knows the clips ahead
            print(_cost(run, run.stage, hosts.count(hosts[0])))
        if setup.order.automatic:
            print(f"clips are shuffled within {setup.order.shuffle_shards} shards at a time (data.shuffle_shards)")
        if setup.order.balance:
            print(f"each batch is balanced over {', '.join(setup.order.balance.names)}")
        print(f"attention: {setup.attention.kernel} ({setup.attention.reason})")
        if checked:
            print(checked)
        show(run.groups())
        if step:
            print(f"continuing from step {step}")
        sys.stdout.flush()
        for line in unused_keys(config, _facts(run)):
            distributed.warn(line)
        free = shutil.disk_usage(setup.out).free
        if free < 2 * size:
            distributed.warn(
                f"a checkpoint takes about {size / 2**30:.2f} GiB, and {setup.out} has {free / 2**30:.2f} GiB free: "
                "free space, or choose another disk with out="
            )
        needed = time_to_save(run.checkpoints.seconds)
        left = max(0.0, setup.ends - time.monotonic()) if setup.ends else math.inf
        if left < needed:
            problem = (
                f"the job ends in {left:.0f} s, and a save alone may take {needed:.0f} s: "
                "ask for more time (sbatch --time=…)"
            )
    if problem := distributed.agree(problem):
        raise UserError(problem)
