"""From a config to the parts of a training: what can be wrong is looked for before the minutes of loading."""

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mser_dist import config as cfg
from mser_dist import deepspeed_parts
from mser_dist.config.file import to_yaml
from mser_dist.encoded.encode import STOPPED, encode_once
from mser_dist.encoded.measure import bind, describe, statistics_of
from mser_dist.errors import Stopped, UserError
from mser_dist.evaluation.asking import ask
from mser_dist.models import bases, exported, initial
from mser_dist.models.attention import Attention, choose
from mser_dist.ranks import distributed, preempt
from mser_dist.ranks.boundary import Boundary
from mser_dist.ranks.watchdog import Watchdog
from mser_dist.runs import folder
from mser_dist.shards.shard_set import ShardSet
from mser_dist.state import fork
from mser_dist.state.checkpoint import Checkpoints
from mser_dist.stream import steps
from mser_dist.stream.examples import Examples, open_clips, open_training_clips
from mser_dist.stream.features import Features
from mser_dist.stream.plan import START, Plan, Position
from mser_dist.tables import Table
from mser_dist.training import stages
from mser_dist.training.announce import announce
from mser_dist.training.engine import Engine, resolve_json
from mser_dist.training.groups import describe as describe_groups
from mser_dist.training.nonfinite import NotFinite
from mser_dist.training.resume import check_length, forked, lengthened


@dataclass(frozen=True)
class Setup:
    """What is known of a training before anything is loaded."""

    config: cfg.Stage1 | cfg.Stage2
    world: distributed.World
    device: str
    ds_json: dict[str, Any]
    attention: Attention
    micro: int  # clips (or packs) per rank and forward pass
    accumulation: int  # forward passes per rank and step
    shards: ShardSet
    held_out: ShardSet | None  # for validation
    order: Plan  # of the clips
    total: int  # optimizer steps
    ends: float | None  # `time.monotonic` at which the scheduler ends the job, on rank 0
    watchdog: Watchdog
    began: float = field(default_factory=time.monotonic)

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    def datasets(self) -> list[dict[str, Any]]:
        """The clips that are trained on and those of the validation, as MLflow's data sets."""
        data = self.config.data
        sets = {"training": (self.shards, data.split), "validation": (self.held_out, data.val_split)}
        return [
            {
                "name": f"{', '.join(Path(one).name for one in data.sets)} ({split})",
                "digest": shards.fingerprint(),
                "source": data.sets,
                "context": context,
                "clips": len(shards),
            }
            for context, (shards, split) in sets.items()
            if shards is not None
        ]

    @property
    def links(self) -> dict[str, Path]:
        """Tags whose value is the MLflow run id of a run that this one builds on."""
        config = self.config
        links = {"mser.stage1_run_id": Path(config.stage1)} if isinstance(config, cfg.Stage2) else {}
        links |= {"mser.init_from_run_id": Path(config.init_from)} if config.init_from else {}
        return links | ({"mser.fork_run_id": fork.run_of(config.train.fork)} if config.train.fork else {})


def look_ahead(config: cfg.Stage1 | cfg.Stage2, world: distributed.World) -> Setup:
    """Choose, open and plan all that needs no process group. Raises `UserError` for what a user can mend."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ds_json = resolve_json(config, world.world_size)
    micro, accumulation = cfg.batch_shape(config.train, world.world_size)
    if device == "cpu" and config.engine.dtype == "float16":
        raise UserError("engine.dtype=float16 needs a GPU: set engine.dtype=float32")
    attention = choose(config.engine.attention, getattr(torch, config.engine.dtype), device)
    if isinstance(config, cfg.Stage2):
        if config.llm.lora and config.llm.lora.dora and ds_json["zero_optimization"]["stage"] == 3:
            raise UserError(
                f"llm.lora.dora needs whole weights, and engine.deepspeed={config.engine.deepspeed} is ZeRO-3, which "
                "partitions them: set engine.deepspeed=zero2, or llm.lora.dora=false"
            )
        pad_seconds = exported.features_of(exported.read_card(initial.find(config).speech)).pad_seconds
        parallel, wish = 1, []
    else:  # its loss is of pairs of clips, so the plan keeps parallel ones together and all emotions in each batch
        if config.init_from:
            exported.find(config.init_from, 1, "init_from")
        pad_seconds, parallel = config.encoder.pad_seconds, config.data.parallel
        wish = [] if config.contrastive.loss == "infonce" else ["label", "language"]
    shards = open_training_clips(config.data)
    order = steps.plan_of(shards, config.data, config.train.global_batch, parallel, config.seed, pad_seconds, wish)
    total = config.train.steps or max(1, round(config.train.epochs * order.steps()))
    if config.train.profile_steps and config.train.profile_steps[0] > total:
        traced = config.train.profile_steps
        raise UserError(f"train.profile_steps={traced}: the training has {total} steps: name some of them")
    check_length(config, total)
    left = distributed.job_seconds_left() if world.is_main else None
    return Setup(
        config,
        world,
        device,
        ds_json,
        attention,
        micro,
        accumulation,
        shards,
        _held_out(config.data),
        order,
        total,
        ends=None if left is None else time.monotonic() + left,
        watchdog=Watchdog(world, config.engine.peer_seconds, config.engine.timeout_minutes * 60),
    )


def _held_out(data: cfg.TrainingDataConfig) -> ShardSet | None:
    if not data.val_split:
        return None
    try:
        return open_clips(data, data.val_split)
    except UserError as error:
        raise UserError(f"{error} (for validation: or set data.val_split=null)") from None


@contextmanager
def started(setup: Setup) -> Iterator[None]:
    """Around all that ranks do together: the run folder is taken, the process group is up, the watchdog watches."""
    config, world = setup.config, setup.world
    with ExitStack() as held:
        if world.is_main:
            held.enter_context(folder.forgotten_if_refused(setup.out))
            held.enter_context(folder.claimed(setup.out, config.engine.peer_seconds))
            folder.prepare(setup.out, to_yaml(config))
        distributed.init(world, config.engine.timeout_minutes, setup.device)
        with setup.watchdog.watch():
            folder.seen_by_all(setup.out)
            yield


@dataclass
class Run:
    """The parts of a training that runs. What it has come to is `loop.RunState`, not here."""

    setup: Setup
    stage: stages.Align | stages.Instruct
    engine: Engine
    examples: Examples
    validation: Examples | None
    checkpoints: Checkpoints
    boundary: Boundary
    not_finite: NotFinite
    order: dict[str, Any]  # what set, seed and batch a position of the stream counts in
    bases: dict[str, Any]  # of what the frozen parameters are loaded from that no checkpoint holds, see `models.bases`
    resumed: dict[str, Any] | None  # the state that the newest checkpoint holds
    saved: int = 0  # step of the last save
    ended: dict[str, Any] = field(default_factory=dict)  # how, see `best.settle`

    @property
    def config(self) -> cfg.Stage1 | cfg.Stage2:
        return self.setup.config

    @property
    def world(self) -> distributed.World:
        return self.setup.world

    @property
    def device(self) -> str:
        return self.setup.device

    @property
    def micro(self) -> int:
        return self.setup.micro

    @property
    def total(self) -> int:
        return self.setup.total

    @property
    def watchdog(self) -> Watchdog:
        return self.setup.watchdog

    def batches(self, done: int, position: Position, bad: set[int]) -> Iterator[steps.Step]:
        """This rank's part of every step after `done`, from `position` on; `bad` clips are not tried again."""
        found = steps.training_steps(
            self.examples,
            self.setup.order,
            position,
            self.total - done,
            self.micro,
            self.world.rank,
            self.world.world_size,
            self.stage.collate,
            self.config.data.workers,
            known_bad=bad,
        )
        with closing(found):  # type: ignore[type-var]
            for step in found:
                yield steps.Step(list(map(self.examples.grouped, step.batches)), step.clips, step.after, step.bad)

    def groups(self) -> Table:
        """What trains how."""
        return describe_groups(self.stage.model, self.config.train, self.engine.assigned)

    def facts(self) -> dict[str, str]:
        """What the tracker records of a run beside its config."""
        parameters = list(self.stage.model.parameters())
        attention, encoder = self.setup.attention, self.stage.model.speech.frozen
        frozen = sum(p.numel() for p in encoder.encoder.parameters()) if encoder else 0
        return {
            "world_size": str(self.world.world_size),
            "zero_stage": str(self.engine.zero_stage),
            "attention.kernel": attention.kernel,
            "attention.reason": attention.reason,
            "steps": str(self.total),
            "clips": str(len(self.examples)),
            "parameters.trained": str(sum(deepspeed_parts.numel(p) for p in parameters if p.requires_grad)),
            "parameters.all": str(sum(map(deepspeed_parts.numel, parameters)) + frozen),
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            **self.stage.facts(),
        }


_CHANGED = "no checkpoint holds them: put the former ones back, or train anew with another out="


def load(setup: Setup, flag: preempt.Flag) -> Run:
    """Build the model and its engine, and go back to the newest checkpoint. Collective."""
    config, world = setup.config, setup.world
    torch.manual_seed(config.seed)  # the same weights on every rank …
    stage = stages.build(config, setup.attention, setup.device, setup.ds_json)
    examples, validation = clips_of(setup, stage.features)
    if isinstance(stage, stages.Instruct):
        without = {line: None for clips in (examples, validation) if clips for line in ask(clips, stage.prompt)}
        for line in without if world.is_main else ():
            distributed.warn(line)
    told = _hear(setup, stage, examples, validation, flag)
    if weights := stage.weigh(np.bincount(examples.label, minlength=len(stage.labels)).tolist()):
        told.append(weights)
    setup.watchdog.tick("starting DeepSpeed")
    engine = Engine(stage.model, config, world, setup.total, setup.device)
    stage.model.train()  # a pretrained LLM comes in eval mode, without gradient checkpointing
    setup.watchdog.tick("loading a checkpoint")
    checkpoints = Checkpoints(setup.out, world, config.train.keep, config.train.background_save)
    engine.reloaded = bases.reloaded(stage.model, stage.bases)
    sums = bases.digests(stage.bases) if engine.reloaded or config.train.fork else {}

    def same_bases(state: dict[str, Any]) -> None:
        bases.check_same(state.get("bases", {}), sums, _CHANGED)

    bases.check_same(stage.began_with if sums else {}, sums, "the adapters of init_from are of the former ones")

    resumed = checkpoints.resume(engine, config.train.trust_checkpoints, same_bases)
    order = steps.identity(examples, setup.order)
    if (frozen := stage.model.speech.frozen) is not None:
        order["frozen_encoder"] = frozen.sha256()
    step = 0
    if resumed:
        steps.check_identity(resumed["order"], order)
        told += lengthened(setup, stage, resumed)
    elif config.train.fork:
        resumed, line = forked(setup, engine, order, same_bases)
        told.append(line)
    if resumed:
        step = int(resumed["step"])
        checkpoints.seconds = float(resumed["save_seconds"])
    setup.watchdog.tick("the self-check")
    checked = stage.check()
    if not resumed or resumed["world_size"] != world.world_size:  # no random state of its own to go on with
        torch.manual_seed(config.seed * 100_003 + step * 4_099 + world.rank)  # … and different dropout
    run = Run(
        setup,
        stage,
        engine,
        examples,
        validation,
        checkpoints,
        Boundary(flag, checkpoints, config.train.save_minutes, setup.ends, world.is_main),
        NotFinite(stage.model, setup.out, setup.shards, config.train.max_skipped, config.engine.dtype, world.is_main),
        order,
        sums,
        resumed,
        saved=step,
    )
    announce(run, step, "\n".join([*told, *([checked] if checked else [])]))
    return run


def _hear(
    setup: Setup,
    stage: stages.Align | stages.Instruct,
    examples: Examples,
    validation: Examples | None,
    flag: preempt.Flag,
) -> list[str]:
    """Let a frozen encoder hear the clips before the first step; what to tell of it. Collective."""
    config, world, workers, speech = setup.config, setup.world, setup.config.data.workers, stage.model.speech
    frozen = speech.frozen
    if frozen is None:
        return []
    frozen.to(setup.device, getattr(torch, config.engine.dtype))

    def go_on() -> None:
        setup.watchdog.tick("encoding the clips")
        if number := distributed.most([flag.number])[0]:
            raise Stopped(signal.Signals(number).name, None, STOPPED)

    told: list[str] = []
    sets = [(examples, wanted(setup)), *([(validation, None)] if validation else [])]
    for clips, read in sets:
        line = encode_once(clips, frozen, config.encoder, world, workers=workers, wanted=read, go_on=go_on)
        told += [line] if line not in told else []
    if speech.normalize != "none":
        speech.statistics = statistics_of(
            examples, frozen, speech.normalize, world, workers=workers, wanted=sets[0][1], go_on=go_on
        )
        for clips, _ in sets:
            bind(clips, speech.statistics)
        told.append(describe(speech.statistics))
    if all(clips.encoded for clips, _ in sets):
        frozen.to("cpu")  # it has heard all
    return told


def clips_of(setup: Setup, features: Features) -> tuple[Examples, Examples | None]:
    """The clips that are trained on and those of the validation, as an encoder is fed them."""
    config, data = setup.config, setup.config.data
    examples = Examples(
        setup.shards,
        data.labels,
        features,
        data.max_seconds,
        config.seed,
        shuffle_labels=data.shuffle_labels,
        augment=data.augment,
        max_bad=data.max_bad,
    )
    if setup.held_out is None:
        return examples, None
    return examples, Examples(setup.held_out, data.labels, features, data.max_seconds, max_bad=data.max_bad)


def wanted(setup: Setup) -> np.ndarray | None:
    """(k,) the clips that a training reads, where it is shorter than one pass over them; None: all."""
    config = setup.config
    if setup.total * config.train.global_batch >= len(setup.shards) or config.data.batching == "tokens":
        return None
    read = [setup.order.batch(position) for position in setup.order.walk(START, setup.total)]
    return np.unique(np.concatenate(read)).astype(np.int64)
