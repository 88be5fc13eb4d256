"""``mser check``: what would end a job after it has waited in the queue, told before it, with the remedy.

Each check is one that the job itself makes when it starts, or asks what only a machine can say (disk, SLURM). Nothing
is kept, and nothing is loaded but indexes and cards.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.jobs import check_weights, launch
from mser_dist.jobs.doctor import Check, folder, guarded, show, slurm
from mser_dist.jobs.doctor_checks import GIB, Finding, existing
from mser_dist.jobs.planned import Figures, figures
from mser_dist.planning.cluster import cluster_of
from mser_dist.runs import folder as run_folder
from mser_dist.tables import count

_PATIENCE = 600.0  # seconds for one: an index of thousands of shards on a network disk, sums of a large export
_BYTES = 16  # of a checkpoint for each trained weight, at most: fp32 and its average, Adam's two moments


def check(
    config: launch.Config, need: launch.Resources, after: str | None = None, gpu: str | None = None
) -> list[Check]:
    """Every check of a job, whatever the others found.

    gpu: plan memory and time for this one (`mser plan`), which takes a minute or two for a large LLM.
    after: jobs that this one waits for: what they may still bring is a warning, not a failure.
    """
    done = []
    cluster = cluster_of(need.nodes, need.tasks, gpu) if gpu else None
    for name, call in _checks(config, need, after, figures(config, cluster)):
        found = _remedied(guarded(name, call, _PATIENCE))
        if after and found.status == "fail" and name in ("sets", "validation", "stage 1", "stage 2"):
            found = Check(name, "warn", found.found, f"job {after} has to bring it. Else: {found.remedy}")
        done.append(found)
    return done


def tell(found: Sequence[Check], quiet: bool = False) -> None:
    """Print the table, the failures last. quiet: only where something is not as it should be."""
    rows = [row for row in found if not quiet or row.status != "ok"]
    for row in sorted(rows, key=lambda row: row.status == "fail"):
        show(row)
    failed = sum(row.status == "fail" for row in found)
    if rows:
        warned = sum(row.status == "warn" for row in found)
        print(f"{count(len(found), 'check')}: {failed} would fail, {count(warned, 'warning')}", flush=True)


def raise_if_failed(found: Sequence[Check]) -> None:
    """`UserError` with the first failure in one line."""
    failed = [row for row in found if row.status == "fail"]
    if failed:
        more = f" (and {count(len(failed) - 1, 'other failure')} above)" if len(failed) > 1 else ""
        raise UserError(": ".join(filter(None, (failed[0].found, failed[0].remedy))) + more)


def _remedied(found: Check) -> Check:
    """A `UserError` is "what: remedy" in one line: the two apart."""
    if found.status != "fail" or found.remedy != "mend what it names" or ": " not in found.found:
        return found
    what, _, remedy = found.found.rpartition(": ")
    return Check(found.name, found.status, what, remedy)


def _checks(
    config: launch.Config, need: launch.Resources, after: str | None, plan: Figures
) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """The checks by name, in the order of the report."""
    yield "config", lambda: _config(config)
    yield "ranks", lambda: _ranks(config, need)
    yield "out", lambda: _out(config)
    if isinstance(config, cfg.Evaluation):
        yield "sets", lambda: _evaluation_sets(config)
    else:
        yield "sets", lambda: _training_sets(config)
        if config.data.val_split:
            yield "validation", lambda: _validation(config.data)
    for name, run, stage in _runs(config):
        yield name, lambda run=run, stage=stage: _export(run, stage)  # type: ignore[misc]
    for name, pretrained in _pretrained(config):
        yield name, lambda pretrained=pretrained: check_weights.at_hand(pretrained)  # type: ignore[misc]
    if not isinstance(config, cfg.Evaluation):
        yield "disk", lambda: _disk(config, plan)
    yield "memory", lambda: _memory(plan)
    yield "time", lambda: _time(need, plan)
    if "SLURM_JOB_ID" not in os.environ:
        yield "script", lambda: _script(config, need, after)


def _config(config: launch.Config) -> Finding:
    config.check()
    what = "an evaluation" if isinstance(config, cfg.Evaluation) else f"stage {config.stage}"
    return "ok", f"{what}, every key known and in its bounds", ""


def _ranks(config: launch.Config, need: launch.Resources) -> Finding:
    ranks = count(need.world_size, "rank")
    if isinstance(config, cfg.Evaluation):
        return "ok", f"{ranks} share the clips", ""
    from mser_dist.training.engine import resolve_json

    micro, accumulation = cfg.batch_shape(config.train, need.world_size)
    zero = resolve_json(config, need.world_size)["zero_optimization"]["stage"]
    shape = f"{config.train.global_batch} = {ranks} × {micro} × {accumulation}"
    return "ok", f"global batch {shape}; {config.engine.deepspeed} is ZeRO-{zero}", ""


def _out(config: launch.Config) -> Finding:
    out = Path(config.out)
    if isinstance(config, cfg.Evaluation):
        run_folder.check_no_training(out)
    elif run_folder.finished(out, config) is not None:
        return "warn", f"{out} holds this run, and it has ended: nothing is left to do", "another out=, or a longer run"
    elif steps := run_folder.steps_done(out):
        return "ok", f"{out} holds this run: it goes on from step {steps}", ""
    return folder(out)


def _training_sets(config: cfg.Stage1 | cfg.Stage2) -> Finding:
    from mser_dist.stream.examples import open_training_clips
    from mser_dist.stream.steps import plan_of

    shards, data = open_training_clips(config.data), config.data
    batch = config.train.global_batch
    if data.batching != "tokens" and len(shards) < batch:
        return "fail", f"{count(len(shards), 'clip')}, fewer than train.global_batch={batch}", "set a smaller one"
    first = isinstance(config, cfg.Stage1)
    pad = config.encoder.pad_seconds if isinstance(config, cfg.Stage1) else None
    plan_of(shards, data, batch, data.parallel if first else 1, config.seed, pad)  # what no batch or cache can hold
    return "ok", f"{count(len(shards), 'clip')} of {data.split} in {', '.join(data.sets)}; every label occurs", ""


def _validation(data: cfg.TrainingDataConfig) -> Finding:
    from mser_dist.stream.examples import open_clips

    return "ok", f"{count(len(open_clips(data, str(data.val_split))), 'clip')} of {data.val_split}", ""


def _evaluation_sets(config: cfg.Evaluation) -> Finding:
    from mser_dist.models import exported
    from mser_dist.stream.examples import open_evaluation_clips

    trained: set[str] = set()
    for _, run, _ in _runs(config):
        card = Path(run) / "export"
        if (card / "card.json").is_file():  # else the line of that run says so
            trained |= set(exported.read_card(card)["labels"])
    shards = open_evaluation_clips(config.data, trained)
    return "ok", f"{count(len(shards), 'clip')} of {config.data.split} in {', '.join(config.data.sets)}", ""


def _runs(config: launch.Config) -> Iterator[tuple[str, str, int]]:
    """The runs that a job builds on: the check's name, the folder, the stage that it has to be of."""
    if not isinstance(config, cfg.Stage1) and config.stage1:
        yield "stage 1", config.stage1, 1
    if isinstance(config, cfg.Evaluation):
        if config.stage2:
            yield "stage 2", config.stage2, 2
    elif config.init_from and not (Path(config.init_from) / "adapter_config.json").is_file():
        yield "init_from", config.init_from, config.stage


def _export(run: str, stage: int) -> Finding:
    from mser_dist.models import exported

    export = exported.find(run, stage)
    card = exported.read_card(export)
    if (
        "SLURM_JOB_ID" not in os.environ
    ):  # in a job, GPUs would wait for the sums, which are checked again when it loads
        exported.check_files(export, card)
    files = [export / name for name in card["files"]]
    if missing := [file for file in files if not file.is_file()]:
        return "fail", f"{missing[0]} is missing: the export is damaged", "train or copy the run again"
    size = sum(file.stat().st_size for file in files) / GIB
    return "ok", f"{run}: trained to its end, {count(len(files), 'file')} whole ({size:.2f} GiB)", ""


def _pretrained(config: launch.Config) -> Iterator[tuple[str, str]]:
    """The weights that a config names: the check's name, and the source."""
    if isinstance(config, cfg.Stage1):
        if config.encoder.pretrained and not config.init_from:
            yield "encoder", config.encoder.pretrained
        yield "text tower", config.text.pretrained
    elif isinstance(config, cfg.Stage2) and config.llm.pretrained:
        yield "LLM", config.llm.pretrained


def _disk(config: cfg.Stage1 | cfg.Stage2, plan: Figures) -> Finding:
    """Free space where the run is written, against its checkpoints: those kept, the best, and one being written."""
    place = existing(Path(config.out))
    there = len([*Path(config.out).glob("checkpoints/step-*")])
    free, kept = shutil.disk_usage(place).free, max(1, config.train.keep + 2 - there)
    one, how = plan.checkpoint, "by the plan"
    if one is None and (weights := _trained(config)):
        one, how = _BYTES * weights, f"at most, for {weights / 1e6:.0f} M weights"
    found = f"{place}: {free / GIB:.1f} GiB free"
    remedy = "another out=, a smaller train.keep, or more room"
    if one is None:
        found += "; the size of a checkpoint is not planned"
        return ("ok", found, "") if free > 20 * GIB else ("warn", found, remedy)
    found += f"; {count(kept, 'more checkpoint')} of {one / GIB:.1f} GiB ({how})"
    if free > kept * one:
        return "ok", found, ""
    # An upper bound ends no job, nor what a training that ends early would not need.
    return "fail" if plan.checkpoint and free < one else "warn", found, remedy


def _trained(config: cfg.Stage1 | cfg.Stage2) -> int | None:
    """The pretrained weights that a run trains, those whole checkpoints are made of; None where that is not known."""
    if isinstance(config, cfg.Stage1):
        name = None if config.encoder.freeze or config.init_from else config.encoder.pretrained
    else:
        name = None if config.llm.freeze or config.llm.lora else config.llm.pretrained
    return check_weights.parameters(name) if name else None


def _memory(plan: Figures) -> Finding:
    if plan.memory is None or plan.room is None:
        return "ok", f"not planned: {plan.why}", ""
    found = f"{plan.memory / GIB:.1f} GiB on the fullest of the GPUs, which has {plan.room / GIB:.0f} for it"
    if plan.memory < plan.room:
        return "ok", found, ""
    return "fail", found, "mser plan says what would make it fit"


def _time(need: launch.Resources, plan: Figures) -> Finding:
    limit = 60 * launch.minutes(need.time)
    if plan.seconds is None:
        found = f"not planned; {limit / 3600:.1f} h are asked for, and the job saves and goes back in the queue"
        return "ok", found, ""
    starts = -(-plan.seconds // (limit - need.signal_seconds))
    found = f"{plan.seconds / 3600:.1f} h by the plan, {limit / 3600:.1f} h asked for"
    return ("ok", found, "") if starts <= 1 else ("warn", f"{found}: {starts:.0f} starts", "more --time, or more nodes")


def _script(config: launch.Config, need: launch.Resources, after: str | None) -> Finding:
    """The script of `mser submit`, and what sbatch says to it without submitting it."""
    text = launch.script([config], need, name=launch.job_name(config), after=after)
    lines = sum(line.startswith("#SBATCH") for line in text.splitlines())
    if shutil.which("sbatch") is None:
        return "ok", f"{lines} options; no sbatch here to try them", ""
    status, said, remedy = slurm()
    if status != "ok":
        return "warn", f"{lines} options, not tried: {said}", remedy
    asked = subprocess.run(
        ["sbatch", "--test-only"], input=text, capture_output=True, encoding="utf-8", errors="replace", timeout=60
    )
    said = " ".join(line.removeprefix("sbatch: ") for line in asked.stderr.splitlines())
    if asked.returncode:
        return "fail", f"sbatch refuses the job: {said}", "mser doctor looks at SLURM; a site file says what it wants"
    return "ok", f"sbatch would take it: {said}", ""
