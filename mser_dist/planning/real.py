"""Two real ranks of a small training over gloo, to hold a plan against what they say."""

import json
import multiprocessing
import os
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from mser_dist import config as cfg
from mser_dist.config.file import load_training
from mser_dist.errors import PassingError
from mser_dist.planning import rehearsal, shapes
from mser_dist.planning.collectives import Log, Traffic
from mser_dist.quiet import hush
from mser_dist.ranks import distributed
from mser_dist.training.engine import Engine

RANKS = 2


def bytes_error(preset: str = "demo_stage2", micro: int = 2) -> float:
    """How far planned bytes are off those of two real ranks, as a share: `plan-bytes-error` of tools/bench_scale.py.

    Summed over the kinds of collectives, without sign. Raises `PassingError` where the ranks do not come to their end.
    """
    config = load_training(preset, ["data.workers=0", "tracking.enabled=false"])
    really = {(one.kind, one.ranks): one.bytes for one in said(config, micro)}
    planned = {(one.kind, one.ranks): one.bytes for one in rehearsal.rehearse(config, RANKS, micro).said}
    off = sum(abs(really.get(key, 0) - planned.get(key, 0)) for key in {*really, *planned})
    return off / sum(really.values())


def said(config: cfg.Stage1 | cfg.Stage2, micro: int) -> list[Traffic]:
    """What rank 0 of two says in a step of `micro` micro-batches."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        port = distributed.free_port()
        ranks = [context.Process(target=_rank, args=(rank, port, folder, config, micro)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise PassingError("the two ranks that a plan is compared with ended with an error: it is above")
        found = json.loads((Path(folder) / "said.json").read_text(encoding="utf-8"))
    return [Traffic(**one) for one in found]


def _rank(rank: int, port: int, folder: str, config: cfg.Stage1 | cfg.Stage2, micro: int) -> None:
    hush()
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    world = distributed.World(rank, RANKS, rank, "127.0.0.1", port, "torchrun")
    distributed.init(world, timeout_minutes=2, device="cpu")
    config = replace(config, train=replace(config.train, global_batch=RANKS * micro, micro_batch=1))
    model = shapes.build(config)
    engine = Engine(model, config, world, rehearsal.STEPS, "cpu")
    with Log() as log:
        rehearsal.steps(engine, model, rehearsal.batch(model), micro, log)
    if rank == 0:
        found = [asdict(one) for one in log.said()]
        (Path(folder) / "said.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    distributed.shutdown()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed keeps the group, whose threads may let go of tensors while the interpreter ends
