"""The one training loop of both stages."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mser_dist import __version__, distributed, exported, run_folder, stages
from mser_dist import config as cfg
from mser_dist.checkpoint import Checkpoints
from mser_dist.config_file import flatten, to_yaml
from mser_dist.data import stream
from mser_dist.data.shards import ShardSet
from mser_dist.engine import DTYPES, Engine, resolve_json
from mser_dist.errors import UserError
from mser_dist.evaluate import predict
from mser_dist.files import write_json
from mser_dist.metrics import score
from mser_dist.models.attention import choose
from mser_dist.plots import curves
from mser_dist.progress import bar
from mser_dist.tracking import run_id_of, tracked


def train(config: cfg.Stage1 | cfg.Stage2) -> dict[str, Any]:
    """Train a run to its end, from its newest checkpoint if it has one, and return its summary.

    Collective: every rank of the job calls it. Writes ``<out>/``: config.yaml, log.jsonl, curves.png, checkpoints/,
    export/ (the model) and summary.json. Raises `UserError` for what a user can mend.
    """
    began = time.monotonic()
    world = distributed.discover()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = Path(config.out)
    summary = run_folder.finished(out, config)
    if summary:
        return summary
    # What can be wrong is looked for before the minutes of loading.
    ds_json = resolve_json(config, world.world_size)
    micro, accumulation = cfg.batch_shape(config.train, world.world_size)
    if config.stage == 1 and accumulation > 1:
        raise UserError(
            f"train.micro_batch={micro}: stage 1 contrasts the whole global batch in one forward pass, so that its "
            f"loss is the same on any cluster: unset it, and if memory is short lower train.global_batch"
        )
    if device == "cpu" and config.engine.dtype == "float16":
        raise UserError("engine.dtype=float16 needs a GPU: set engine.dtype=float32")
    attention = choose(config.engine.attention, DTYPES[config.engine.dtype], device)
    if isinstance(config, cfg.Stage2):
        pad_seconds = exported.features_of(exported.read_card(exported.find(config.stage1, stage=1))).pad_seconds
        parallel = 1
    else:  # its loss is of pairs of clips, so the plan keeps parallel ones together
        pad_seconds, parallel = config.encoder.pad_seconds, config.data.parallel
    shards = stream.open_training_clips(config.data)
    plan = stream.plan_of(shards, config.data, config.train.global_batch, parallel, config.seed, pad_seconds)
    held_out = _held_out(config.data)

    if world.is_main:
        run_folder.prepare(out, to_yaml(config))

    distributed.init(world, config.engine.timeout_minutes, device)
    torch.manual_seed(config.seed)  # the same weights on every rank …
    stage = stages.build(config, attention, device, ds_json)
    clips = stream.Clips(
        shards,
        config.data.labels,
        stage.features,
        config.data.max_seconds,
        config.seed,
        shuffle_labels=config.data.shuffle_labels,
        augment=config.data.augment,
        max_bad=config.data.max_bad,
    )
    validation = None
    if held_out is not None:
        validation = stream.Clips(
            held_out, config.data.labels, stage.features, config.data.max_seconds, max_bad=config.data.max_bad
        )
    total = config.train.steps or max(1, round(config.train.epochs * plan.steps()))
    engine = Engine(stage.model, config, world, total, device)
    stage.model.train()  # a pretrained LLM comes in eval mode, without gradient checkpointing
    torch.manual_seed(config.seed * 100_003 + world.rank)  # … and different dropout
    checkpoints = Checkpoints(out, world, config.train.keep)
    state = checkpoints.resume(engine) or {"step": 0}
    first = int(state["step"])
    position = stream.position_in(state["data"], clips, plan) if first else stream.Position()
    bad: set[int] = set(state["data"]["bad"]) if first else set()  # clips that no rank could read

    if world.is_main:
        unit = "packs" if config.data.batching == "tokens" else "clips"
        batch = f"{config.train.global_batch} {unit} a step ({world.world_size} ranks × {micro} × {accumulation})"
        print(f"{len(clips)} clips, {total} steps, {batch}, ZeRO-{engine.zero_stage}, {config.engine.dtype}")
        print(f"attention: {attention.kernel} ({attention.reason})", flush=True)
    card = {
        "stage": config.stage,
        "labels": config.data.labels,
        # What was heard in training: here, and in the run that this one builds on.
        "languages": sorted({*shards.coded["language"].names, *(stage.source or {}).get("languages", [])}),
        "corpora": sorted({*shards.coded["corpus"].names, *(stage.source or {}).get("corpora", [])}),
        "clips": len(clips),
        "shuffled_labels": config.data.shuffle_labels,
        **stage.card(),
    }
    facts = {
        "world_size": str(world.world_size),
        "zero_stage": str(engine.zero_stage),
        "attention.kernel": attention.kernel,
        "attention.reason": attention.reason,
        "steps": str(total),
        "clips": str(len(clips)),
        "parameters.trained": str(sum(_size(p) for p in stage.model.parameters() if p.requires_grad)),
        "parameters.all": str(sum(_size(p) for p in stage.model.parameters())),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    tags = {"mser.stage": str(config.stage)}
    if isinstance(config, cfg.Stage2):
        tags["mser.stage1_run_id"] = run_id_of(config.stage1) or ""
    with tracked(config.tracking, out, tags, {**flatten(config), **facts}, world.is_main) as tracker:
        loader = stream.training_steps(
            clips,
            plan,
            position,
            total - first,
            micro,
            world.rank,
            world.world_size,
            stage.collate,
            config.data.workers,
            known_bad=bad,
        )
        shown = bar(title=f"stage {config.stage}", unit="step", total=total, initial=first, disable=not world.is_main)
        clock = _Clock()
        val: dict[str, float] = {}
        for step in range(first + 1, total + 1):
            with clock.waiting():
                data = next(loader)
            clock.clips += data.clips
            batches = [stages.to_device(batch, device) for batch in data.batches]
            stage.prepare(batches, lambda values: distributed.all_sum(values, device))
            stats = _optimize(engine, batches)

            # Once in a while: log.
            if step % config.train.log_every == 0 or step == total:
                numbers = _mean_over_ranks(stats, device)
                numbers |= {"lr": engine.lr, "grad_norm": engine.grad_norm, **clock.read()}
                bad = _bad_everywhere(data.bad, bad, clips, world.is_main)
                numbers["bad_clips"] = float(len(bad))
                # Under fp16 a gradient overflows now and then, and DeepSpeed skips the step and lowers its loss scale.
                watched = [numbers["loss"]] + [numbers["grad_norm"]] * (config.engine.dtype != "float16")
                if not all(map(math.isfinite, watched)):
                    raise UserError(
                        f"{out}: the loss or its gradient is not finite at step {step} "
                        f"(loss {numbers['loss']}, gradient norm {numbers['grad_norm']}): "
                        "lower train.lr or set train.grad_clip"
                    )
                if tracker:
                    tracker.metrics(step, {f"train/{k}": v for k, v in numbers.items()})
                shown.set_postfix(loss=f"{numbers['loss']:.3f}", refresh=False)
            shown.update()

            # Once in a while: validate, save.
            due = config.train.val_every and step % config.train.val_every == 0
            if validation is not None and (due or step == total):
                val = _validate(stage, validation, max(micro, 8), world, config, device)
                if tracker:
                    tracker.metrics(step, {f"val/{k}": v for k, v in val.items()})
            if step == total or (config.train.save_every and step % config.train.save_every == 0):
                bad = _bad_everywhere(data.bad, bad, clips, world.is_main)
                progress = {"data": stream.state_of(clips, plan, data.after, bad), "mlflow_run_id": run_id_of(out)}
                checkpoints.save(step, engine, {"version": __version__, **progress})
        shown.close()
        if validation is not None and not val:  # the last start ended between its last checkpoint and the export
            val = _validate(stage, validation, max(micro, 8), world, config, device)

        weights = engine.full_state()
        summary = {
            "stage": config.stage,
            "out": str(out),
            "steps": total,
            "seconds": round(time.monotonic() - began, 1),
            "world_size": world.world_size,
            "zero_stage": engine.zero_stage,
            "attention": asdict(attention),
            "validation": val,
        }
        if tracker:
            exported.write(out / "export", stage.model, weights, card, getattr(stage, "tokenizer", None))
            curves(tracker.rows(), out / "curves.png")
            tracker.artifact(out / "curves.png")
            tracker.artifact(out / "export" / "card.json")
            summary |= {"mlflow_run_id": tracker.run_id, "tracking_uri": tracker.uri}
            write_json(out / "summary.json", summary)
    distributed.barrier()
    return summary


def _held_out(data: cfg.TrainingClips) -> ShardSet | None:
    if not data.val_split:
        return None
    try:
        return stream.open_clips(data, data.val_split)
    except UserError as error:
        raise UserError(f"{error} (for validation: or set data.val_split=null)") from None


def _bad_everywhere(own: frozenset[int], known: set[int], clips: stream.Clips, is_main: bool) -> set[int]:
    """The clips that some rank could not read; rank 0 names those of other ranks, whose output may be hidden.

    Collective. Raises `UserError` where they are more than data.max_bad; a rank stops by itself at so many of its own.
    """
    everywhere = known.union(*distributed.gather(own))
    if is_main:
        for index in sorted(everywhere - known - own):
            print(f"mser: warning: {clips.shards.where(index)}: could not be read by another rank", file=sys.stderr)
    if len(everywhere) > clips.max_bad:
        raise UserError(
            f"{len(everywhere)} clips could not be read on all ranks together, more than data.max_bad={clips.max_bad}: "
            f"the last is {clips.shards.where(max(everywhere - known, default=max(everywhere)))}; mser verify lists all"
        )
    return everywhere


def _optimize(engine: Engine, batches: list[stages.Batch]) -> dict[str, torch.Tensor]:
    """One optimizer step over its micro-batches; returns their mean telemetry, still on the device."""
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        loss, stats = engine.forward(batch)
        engine.backward(loss)
        engine.step()
        for name, value in stats.items():
            sums[name] = sums.get(name, 0) + value.float() / len(batches)
    return sums


def _mean_over_ranks(stats: dict[str, torch.Tensor], device: str) -> dict[str, float]:
    names = sorted(stats)
    *sums, ranks = distributed.all_sum([float(stats[name]) for name in names] + [1.0], device)
    return {name: value / ranks for name, value in zip(names, sums, strict=True)}


def _validate(
    stage: Any, clips: stream.Clips, batch: int, world: distributed.World, config: cfg.Common, device: str
) -> dict[str, float]:
    """UA, WA and macro-F1 on the validation split. Collective."""
    stage.model.eval()
    numbers, scores = predict(
        stage.scorer(), clips, batch, stage.collate, config.data.workers, world, device, "validate", leave=False
    )
    stage.model.train()
    result = score(clips.label[numbers], scores.argmax(1), len(config.data.labels))
    return {"ua": result.ua, "wa": result.wa, "macro_f1": result.macro_f1}


class _Clock:
    """Clips per second, and the share of time spent waiting for data, since the last reading."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.start, self.waited, self.clips = time.monotonic(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    def read(self) -> dict[str, float]:
        passed = max(time.monotonic() - self.start, 1e-9)
        rates = {"clips_per_second": self.clips / passed, "data_wait": self.waited / passed}
        self._reset()
        return rates


def _size(parameter: torch.nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves an empty tensor behind
