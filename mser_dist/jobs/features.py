"""`mser features`: what frozen encoders make of the clips, computed ahead of the run that reads it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mser_dist import config as cfg
from mser_dist.encoded.encode import STOPPED, Outlook, encode_once, in_bytes, outlook
from mser_dist.encoded.place import Node, disk_folder
from mser_dist.errors import Stopped, UserError
from mser_dist.evaluation import evaluate
from mser_dist.models import exported, initial
from mser_dist.models.attention import choose
from mser_dist.models.frozen import FrozenEncoder
from mser_dist.ranks import distributed, preempt
from mser_dist.ranks.watchdog import Watchdog
from mser_dist.stream.examples import Examples
from mser_dist.tables import count
from mser_dist.training import setup, stages

AnyConfig = cfg.Stage1 | cfg.Stage2 | cfg.Evaluation
_SILENCE = 120.0  # seconds after which a rank that says nothing counts as dead


class Read(NamedTuple):
    """Clips that a training or an evaluation reads, and the encoder that hears them."""

    name: str
    clips: Examples
    frozen: FrozenEncoder
    wanted: NDArray[np.int64] | None  # (k,) numbers of the clips; None: all of them


def encode_ahead(config: AnyConfig, part: tuple[int, int] = (0, 1), dry_run: bool = False) -> None:
    """Encode what is missing of the clips that `config` would have read; says before how much that is.

    Collective. part: (i, n) encodes the i-th of n parts, from 0. dry_run: only says it.

    Raises `UserError` for a config that keeps no features on a disk, and what `encode_once` raises; `Stopped` when a
    signal came to any rank, which has kept what is encoded.
    """
    distributed.check_gpus()
    world = distributed.discover()
    _check_cache(config)
    read = list(_of_evaluation(config) if isinstance(config, cfg.Evaluation) else _of_training(config))
    cache = replace(config.encoder, cache="disk")  # where auto would go on without them, here it is an error
    if world.world_size > 1:
        distributed.init(world, 30.0, "cuda" if torch.cuda.is_available() else "cpu")
    with _watched(world) as go_on:
        node = Node(world.rank, world.world_size, True)
        missing = 0
        for one in read:
            found = outlook(one.clips, one.frozen, disk_folder(cache), node, one.wanted)
            missing += len(found.jobs)
            if world.is_main:
                print(_line(one.name, found, part), flush=True)
        if dry_run:
            return
        for one in read if missing else ():
            encode_once(
                one.clips,
                one.frozen,
                cache,
                world,
                workers=config.data.workers,
                wanted=one.wanted,
                part=part,
                go_on=go_on,
                title=f"encode {one.name}",
            )
        if world.is_main:
            folder = disk_folder(cache)
            print(f"all of part {part[0]} of {part[1]} is there: {folder}" if part != (0, 1) else f"features: {folder}")
        distributed.barrier()


def _check_cache(config: AnyConfig) -> None:
    """Raise `UserError` where features would be of no use to the run, or gone before it."""
    cache = config.encoder.cache
    if cache in ("off", "memory"):
        why = "keeps no features" if cache == "off" else "keeps them until this command ends"
        raise UserError(f"encoder.cache={cache} {why}: set encoder.cache=disk here and in the run that reads them")
    if not isinstance(config, cfg.Evaluation):
        key = "freeze_encoder" if isinstance(config, cfg.Stage2) else "encoder.freeze"
        if not (config.freeze_encoder if isinstance(config, cfg.Stage2) else config.encoder.freeze):
            raise UserError(f"the encoder is trained, so that its features change at each step: set {key}=true")
        if config.data.augment.on and not config.data.augment.variants:
            raise UserError(
                "data.augment changes the clips anew at each step: set data.augment.variants, so many versions of each"
            )


def _of_training(config: cfg.Stage1 | cfg.Stage2) -> Iterator[Read]:
    plan = setup.look_ahead(config, distributed.World())
    torch.manual_seed(config.seed)  # an encoder from scratch has the weights that the training will give it
    if isinstance(config, cfg.Stage1):
        frozen = stages.Align(config, plan.attention, plan.device).model.speech.frozen
        assert frozen is not None
    else:
        frozen = exported.load_frozen(initial.find(config).speech, plan.attention)
    frozen.to(plan.device, getattr(torch, config.engine.dtype))
    examples, validation = setup.clips_of(plan, frozen.encoder.features)
    yield Read("training", examples, frozen, setup.wanted(plan))
    if validation is not None:
        yield Read("validation", validation, frozen, None)


def _of_evaluation(config: cfg.Evaluation) -> Iterator[Read]:
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, config.dtype)
    exports = evaluate.exports_of(config)
    shards = evaluate.open_shards(config, exports)
    heard: set[str] = set()
    for stage, export in exports.items():
        card = exported.read_card(export)
        if not card["speech"].get("frozen"):
            continue
        frozen = exported.load_frozen(export, choose(config.attention, dtype, device)).to(device, dtype)
        if frozen.sha256() not in heard:  # most often a stage 2 hears by the encoder of its stage 1
            heard.add(frozen.sha256())
            yield Read(f"evaluation of stage {stage}", evaluate.clips_of(config, shards, card), frozen, None)
    if not heard:
        raise UserError("the encoders of these runs were trained, so that no features are kept: evaluate as it is")


@contextmanager
def _watched(world: distributed.World) -> Iterator[Callable[[], None]]:
    """Gives what is asked between two rounds: it stops all ranks where one was asked to."""
    watchdog = Watchdog(world, silence=_SILENCE, stall=30 * 60.0)
    with preempt.listen() as flag, watchdog.watch():

        def go_on() -> None:
            watchdog.tick("encoding the clips")
            if number := distributed.most([flag.number])[0]:
                raise Stopped(signal.Signals(number).name, None, STOPPED)

        yield go_on


def _line(name: str, found: Outlook, part: tuple[int, int]) -> str:
    there = found.recordings - len(found.jobs)
    own = f", {len(found.share(part))} of them in part {part[0]} of {part[1]}" if part != (0, 1) else ""
    clips = count(found.recordings, "clip")
    return f"{name}: {clips}, {in_bytes(found.need)}: {there} are there, {len(found.jobs)} to encode{own}"
