"""The one training loop of both stages."""

import math
import shutil
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mser_dist import __version__
from mser_dist import config as cfg
from mser_dist.config.file import flatten, to_yaml
from mser_dist.errors import Stopped, UserError
from mser_dist.evaluation.evaluate import validate
from mser_dist.files import write_json
from mser_dist.models import exported
from mser_dist.models.attention import choose
from mser_dist.progress import Clock, bar
from mser_dist.ranks import distributed, preempt
from mser_dist.ranks.boundary import Boundary, time_to_save
from mser_dist.ranks.watchdog import Watchdog
from mser_dist.runs import folder as run_folder
from mser_dist.runs.plots import curves
from mser_dist.runs.tracking import Tracker, run_id_of, tracked
from mser_dist.shards.shard_set import ShardSet
from mser_dist.state.checkpoint import Checkpoints
from mser_dist.stream import examples, steps
from mser_dist.stream.plan import Position
from mser_dist.training import stages
from mser_dist.training.engine import Engine, resolve_json
from mser_dist.training.nonfinite import Buffers, SkippedSteps


def train(config: cfg.Stage1 | cfg.Stage2) -> dict[str, Any]:
    """Train a run to its end, from its newest checkpoint if it has one, and return its summary.

    Collective: every rank of the job calls it. Writes ``<out>/``: config.yaml, log.jsonl, curves.png, checkpoints/,
    export/ (the model) and summary.json. Raises `UserError` for what a user can mend, and `Stopped` when a
    signal or the end of the job's time stopped it and every rank has saved.
    """
    distributed.check_gpus()
    world = distributed.discover()
    summary = run_folder.finished(Path(config.out), config)
    if summary:
        return summary
    with preempt.listen() as flag:
        return _Training(config, world, flag).run()


class _Training:
    """One start of a run: what can be wrong is looked for in `__init__`, before the minutes of loading."""

    def __init__(self, config: cfg.Stage1 | cfg.Stage2, world: distributed.World, flag: preempt.Flag) -> None:
        self.began = time.monotonic()
        self.config, self.world, self.flag = config, world, flag
        self.device = device = "cuda" if torch.cuda.is_available() else "cpu"
        self.out = Path(config.out)
        self.ds_json = resolve_json(config, world.world_size)
        self.micro, self.accumulation = cfg.batch_shape(config.train, world.world_size)
        if device == "cpu" and config.engine.dtype == "float16":
            raise UserError("engine.dtype=float16 needs a GPU: set engine.dtype=float32")
        self.attention = choose(config.engine.attention, getattr(torch, config.engine.dtype), device)
        if isinstance(config, cfg.Stage2):
            pad_seconds = exported.features_of(exported.read_card(exported.find(config.stage1, stage=1))).pad_seconds
            parallel, wish = 1, []
        else:  # its loss is of pairs of clips, so the plan keeps parallel ones together and all emotions in each batch
            pad_seconds, parallel = config.encoder.pad_seconds, config.data.parallel
            wish = [] if config.contrastive.loss == "infonce" else ["label", "language"]
        self.shards = examples.open_training_clips(config.data)
        self.plan = steps.plan_of(
            self.shards, config.data, config.train.global_batch, parallel, config.seed, pad_seconds, wish
        )
        self.held_out = _held_out(config.data)
        self.total = config.train.steps or max(1, round(config.train.epochs * self.plan.steps()))
        self.ends = distributed.job_end() if world.is_main else None
        self.watchdog = Watchdog(world, config.engine.peer_seconds, config.engine.timeout_minutes * 60)

    def run(self) -> dict[str, Any]:
        with ExitStack() as held:
            if self.world.is_main:
                held.enter_context(run_folder.claimed(self.out, self.config.engine.peer_seconds))
                run_folder.prepare(self.out, to_yaml(self.config))
            distributed.init(self.world, self.config.engine.timeout_minutes, self.device)
            return self._run()

    def _run(self) -> dict[str, Any]:
        with self.watchdog.watch():
            run_folder.seen_by_all(self.out)
            self._load()
            with tracked(
                self.config.tracking,
                self.out,
                {"mser.stage": str(self.config.stage)},
                flatten(self.config) | self._facts(),
                self.world.is_main,
                links={"mser.stage1_run_id": Path(self.config.stage1)} if isinstance(self.config, cfg.Stage2) else None,
            ) as tracker:
                if tracker:
                    self.watchdog.at_end = lambda: tracker.close("FAILED")
                self._steps(tracker)
                summary = self._finish(tracker)
            distributed.barrier()
        return summary

    def _load(self) -> None:
        """Build the model and its engine, and go back to the newest checkpoint."""
        config, world, data = self.config, self.world, self.config.data
        torch.manual_seed(config.seed)  # the same weights on every rank …
        self.stage = stages.build(config, self.attention, self.device, self.ds_json)
        self.clips = examples.Examples(
            self.shards,
            data.labels,
            self.stage.features,
            data.max_seconds,
            config.seed,
            shuffle_labels=data.shuffle_labels,
            augment=data.augment,
            max_bad=data.max_bad,
        )
        self.validation = None
        if self.held_out is not None:
            self.validation = examples.Examples(
                self.held_out, data.labels, self.stage.features, data.max_seconds, max_bad=data.max_bad
            )
        self.watchdog.tick("starting DeepSpeed")
        self.engine = Engine(self.stage.model, config, world, self.total, self.device)
        self.stage.model.train()  # a pretrained LLM comes in eval mode, without gradient checkpointing
        self.watchdog.tick("loading a checkpoint")
        self.checkpoints = Checkpoints(self.out, world, config.train.keep, config.train.background_save)
        state = self.checkpoints.resume(self.engine, config.train.trust_checkpoints) or {"step": 0, "world_size": 0}
        self.first = int(state["step"])
        if state["world_size"] != world.world_size:  # no random state of its own to go on with
            torch.manual_seed(config.seed * 100_003 + self.first * 4_099 + world.rank)  # … and different dropout
        self.position = steps.position_in(state["data"], self.clips, self.plan) if self.first else Position()
        self.bad: set[int] = set(state["data"]["bad"]) if self.first else set()  # clips that no rank could read
        self.val: dict[str, float] = state.get("validation", {})
        self.val_step = int(state.get("validated", 0))
        self.best_ua = float(state.get("best_ua", -1))  # of the checkpoints so far
        self.buffers = Buffers(self.stage.model)
        self.skipped = SkippedSteps(self.out, self.shards, config.train.max_skipped, world.is_main)
        self.skipped.in_a_row = int(state.get("skipped_in_a_row", 0))
        self.boundary = Boundary(self.flag, self.checkpoints, config.train.save_minutes, self.ends, world.is_main)
        self.checkpoints.seconds = float(state.get("save_seconds", 0))
        self._announce()

    def _announce(self) -> None:
        """Say what runs; refuse a job too short to save, warn of a disk too small."""
        config, world = self.config, self.world
        size = sum(distributed.gather(self.engine.state_bytes()))
        problem = None
        if world.is_main:
            unit = "packs" if config.data.batching == "tokens" else "clips"
            shape = f"{world.world_size} ranks × {self.micro} × {self.accumulation}"
            print(
                f"{len(self.clips)} clips, {self.total} steps, {config.train.global_batch} {unit} a step ({shape}), "
                f"ZeRO-{self.engine.zero_stage}, {config.engine.dtype}"
            )
            if isinstance(self.stage, stages.Align):
                print(self.stage.describe(world.world_size))
            if self.plan.balance:
                print(f"each batch is balanced over {', '.join(self.plan.balance.names)}")
            print(f"attention: {self.attention.kernel} ({self.attention.reason})")
            if self.first:
                print(f"continuing from step {self.first}")
            sys.stdout.flush()
            free = shutil.disk_usage(self.out).free
            if free < 2 * size:
                distributed.warn(
                    f"a checkpoint takes about {size / 2**30:.2f} GiB, and {self.out} has {free / 2**30:.2f} GiB free: "
                    "free space, or choose another disk with out="
                )
            needed = time_to_save(self.checkpoints.seconds)
            left = max(0.0, self.ends - time.time()) if self.ends else math.inf
            if left < needed:
                problem = (
                    f"the job ends in {left:.0f} s, and a save alone may take {needed:.0f} s: "
                    "ask for more time (sbatch --time=…)"
                )
        if problem := distributed.agree(problem):
            raise UserError(problem)

    def _steps(self, tracker: Tracker | None) -> None:
        """From the first step that is not done yet to the last. Raises `Stopped` between two of them."""
        config, first, total, every = self.config, self.first, self.total, self.config.train
        loader = steps.training_steps(
            self.clips,
            self.plan,
            self.position,
            total - first,
            self.micro,
            self.world.rank,
            self.world.world_size,
            self.stage.collate,
            config.data.workers,
            known_bad=self.bad,
        )
        title = f"stage {config.stage}"
        shown = bar(title=title, unit="step", total=total, initial=first, disable=not self.world.is_main)
        clock = Clock()
        self._validate_if_due(first, tracker)  # the last start was stopped in the middle of it
        self.boundary.poll()
        self._stop_if_asked(first, shown)
        for step in range(first + 1, total + 1):
            self.watchdog.tick(f"step {step}, data")
            with clock.waiting():
                data = next(loader)
            self.watchdog.tick(f"step {step}")
            self.position = data.after
            clock.clips += data.clips
            stats, losses = self.stage.step(self.engine, data.batches, (step - 1) / max(1, total - 1))
            if self.engine.step_applied:
                self.buffers.keep()
                self.skipped.in_a_row = 0
            else:
                self.buffers.restore()
                # Under fp16 a gradient overflows now and then, and DeepSpeed lowers its loss scale.
                odd = distributed.most([not all(map(math.isfinite, losses))])[0]
                if config.engine.dtype != "float16" or odd:
                    self.skipped.add(step, losses, data.batches)

            # Once in a while: log.
            if step % every.log_every == 0 or step == total:
                numbers = _mean_over_ranks(stats, self.device)
                numbers |= {"lr": self.engine.lr, "grad_norm": self.engine.grad_norm, **clock.read()}
                self.bad = _bad_everywhere(data.bad, self.bad, self.clips, self.world.is_main)
                numbers |= {"bad_clips": float(len(self.bad)), "skipped_steps": float(self.engine.skipped_steps)}
                finite = {f"train/{name}": value for name, value in numbers.items() if math.isfinite(value)}
                if tracker:
                    tracker.metrics(step, finite)
                shown.set_postfix(loss=f"{numbers['loss']:.3f}", refresh=False)
            shown.update()

            # Once in a while: validate, save; and stop where a rank was asked to.
            self.boundary.poll()
            self._validate_if_due(step, tracker)
            if (
                step == total
                or (every.save_every and step % every.save_every == 0)
                or self.boundary.save_due
                or self.boundary.stop
                or (every.save_best and self.val_step == step and self.val["ua"] > self.best_ua)
            ):
                self.bad = _bad_everywhere(data.bad, self.bad, self.clips, self.world.is_main)
                self._save(step)
            if step < total or self._to_validate(step):
                self._stop_if_asked(step, shown)
        shown.close()
        self.watchdog.tick("the last save")
        self.checkpoints.finish()

    def _save(self, step: int) -> None:
        self.watchdog.tick(f"step {step}, saving")
        if self.val_step == step:
            self.best_ua = max(self.best_ua, self.val["ua"])
        state = {
            "version": __version__,
            "data": steps.state_of(self.clips, self.plan, self.position, self.bad),
            "mlflow_run_id": run_id_of(self.out),
            "validated": self.val_step,
            "best_ua": self.best_ua,
            "skipped_in_a_row": self.skipped.in_a_row,
            "save_seconds": self.checkpoints.seconds,
        }
        if self.val_step == step:  # the best checkpoint is found by it
            state["validation"] = self.val
        self.checkpoints.save(step, self.engine, state)
        self.boundary.saved()

    def _stop_if_asked(self, step: int, shown: Any) -> None:
        if self.boundary.stop:
            shown.close()
            self.checkpoints.finish()
            raise Stopped(self.boundary.stop, step)

    def _validate_if_due(self, step: int, tracker: Tracker | None) -> None:
        """Validate where the config asks for it at this step and it was not done; give up when asked to stop."""
        if self.boundary.stop or not self._to_validate(step):
            return
        assert self.validation is not None
        batch, workers = max(self.micro, 8), self.config.data.workers
        val = validate(self.stage, self.validation, batch, workers, self.world, self.device, self._go_on)
        if val is not None:
            self.val, self.val_step = val, step
            if tracker:
                tracker.metrics(step, {f"val/{name}": value for name, value in val.items()})

    def _to_validate(self, step: int) -> bool:
        every = self.config.train.val_every
        due = step == self.total or (every and step and step % every == 0)
        return self.validation is not None and bool(due) and self.val_step != step

    def _go_on(self) -> bool:
        """Between two batches of a validation: whether to go on. Collective."""
        self.watchdog.tick("validating")
        self.boundary.poll()
        return self.boundary.stop is None

    def _finish(self, tracker: Tracker | None) -> dict[str, Any]:
        """Export the model and write the summary. Collective."""
        self.watchdog.tick("exporting")
        weights = self.engine.full_state()
        summary = {
            "stage": self.config.stage,
            "out": str(self.out),
            "steps": self.total,
            "seconds": round(time.monotonic() - self.began, 1),
            "world_size": self.world.world_size,
            "zero_stage": self.engine.zero_stage,
            "attention": asdict(self.attention),
            "validation": self.val,
            "skipped_steps": self.engine.skipped_steps,
        }
        if tracker:
            exported.write(
                self.out / "export", self.stage.model, weights, self._card(), getattr(self.stage, "tokenizer", None)
            )
            curves(tracker.rows(), self.out / "curves.png")
            tracker.artifact(self.out / "curves.png")
            tracker.artifact(self.out / "export" / "card.json")
            summary |= {"mlflow_run_id": tracker.run_id, "tracking_uri": tracker.uri}
            write_json(self.out / "summary.json", summary)
        return distributed.agree(summary)

    def _card(self) -> dict[str, Any]:
        """What the exported model is."""
        data, source = self.config.data, self.stage.source or {}
        return {
            "stage": self.config.stage,
            "labels": data.labels,
            # What was heard in training: here, and in the run that this one builds on.
            "languages": sorted({*self.shards.coded["language"].names, *source.get("languages", [])}),
            "corpora": sorted({*self.shards.coded["corpus"].names, *source.get("corpora", [])}),
            "clips": len(self.clips),
            "shuffled_labels": data.shuffle_labels,
            **self.stage.card(),
        }

    def _facts(self) -> dict[str, str]:
        parameters = list(self.stage.model.parameters())
        return {
            "world_size": str(self.world.world_size),
            "zero_stage": str(self.engine.zero_stage),
            "attention.kernel": self.attention.kernel,
            "attention.reason": self.attention.reason,
            "steps": str(self.total),
            "clips": str(len(self.clips)),
            "parameters.trained": str(sum(_size(p) for p in parameters if p.requires_grad)),
            "parameters.all": str(sum(map(_size, parameters))),
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
        }


def _held_out(data: cfg.TrainingDataConfig) -> ShardSet | None:
    if not data.val_split:
        return None
    try:
        return examples.open_clips(data, data.val_split)
    except UserError as error:
        raise UserError(f"{error} (for validation: or set data.val_split=null)") from None


def _bad_everywhere(own: frozenset[int], known: set[int], clips: examples.Examples, is_main: bool) -> set[int]:
    """The clips that some rank could not read; rank 0 names those of other ranks, whose output may be hidden.

    Collective. Raises `UserError` where they are more than data.max_bad; a rank stops by itself at so many of its own.
    """
    everywhere = known.union(*distributed.gather(own))
    if is_main:
        for index in sorted(everywhere - known - own):
            distributed.warn(f"{clips.shards.where(index)}: could not be read by another rank")
    if len(everywhere) > clips.max_bad:
        raise UserError(
            f"{len(everywhere)} clips could not be read on all ranks together, more than data.max_bad={clips.max_bad}: "
            f"the last is {clips.shards.where(max(everywhere - known, default=max(everywhere)))}; mser verify lists all"
        )
    return everywhere


def _mean_over_ranks(stats: dict[str, torch.Tensor], device: str) -> dict[str, float]:
    names = sorted(stats)
    *sums, ranks = distributed.all_sum([float(stats[name]) for name in names] + [1.0], device)
    return {name: value / ranks for name, value in zip(names, sums, strict=True)}


def _size(parameter: torch.nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves an empty tensor behind
