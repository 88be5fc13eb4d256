"""Tiny real runs of the command, on two ranks over gloo, for the tests that start it."""

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

from mser_dist.synth.speech import SynthConfig
from tests.warm import Command

ROOT = Path(__file__).parents[1]
# Four sentences in two languages, and Greek to be evaluated on.
SMALL_SET = SynthConfig(
    languages=("en", "de"), unseen_languages=("el",), train_sentences=4, val_sentences=1, test_sentences=1,
    train_takes=1, val_takes=1, test_takes=1, val_voices=2, test_voices=2,
)  # fmt: skip
ENCODER = "encoder.arch={d_model: 32, encoder_layers: 1, encoder_attention_heads: 2, encoder_ffn_dim: 64}"
QFORMER = ["qformer.width=32", "qformer.heads=2", "qformer.layers=1", "qformer.queries=2", "contrastive.width=16"]
LLM = "llm.arch={hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}"
TWO = ["--nproc", "2"]


def start(*words: str | Path, cwd: Path, **env: str) -> Command:
    """Start ``mser WORDS`` with its output captured, and its imports done."""
    plain = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return Command(list(map(str, words)), cwd, {**plain, "PYTHONPATH": str(ROOT), **env})


def mser(*words: str | Path, cwd: Path, code: int = 0, **env: str) -> str:
    """Run ``mser WORDS`` for real; returns its standard error if `code` is not 0, else its standard output."""
    process = start(*words, cwd=cwd, **env)
    try:
        output, error = process.communicate(timeout=600)
    except BaseException:
        print(*_ended(process), sep="\n")
        raise
    assert process.returncode == code, f"exit code {process.returncode}\n{output}\n{error[-3000:]}"
    return error if code else output


def _ended(process: Command) -> tuple[str, str]:
    """End a command that stands still, its ranks and workers first; their stacks are in what it wrote."""
    for one in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGABRT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)  # it shows what a rank has written
    process.kill()
    return process.communicate()


def lines(run: Path) -> list[dict[str, float]]:
    """The log of a run."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Training loss by step; a step that was logged twice must have been the same."""
    found: dict[int, float] = {}
    for row in lines(run):
        if "train/loss" in row:
            step = int(row["step"])
            assert found.get(step, row["train/loss"]) == row["train/loss"], f"step {step} was another one the 2nd time"
            found[step] = row["train/loss"]
    return found


def stage1(out: str, *more: str) -> list[str]:
    """Six steps of a tiny stage 1, with dropout and cached gradients, validated every two."""
    words = ["data.sets=shards", "data.workers=1", ENCODER, *QFORMER, f"out={out}", "train.global_batch=8"]
    words += ["train.micro_batch=2", "train.steps=6", "train.log_every=1", "train.val_every=2"]
    return ["train", "demo_stage1", *words, *more]


def stage2(out: str, *more: str) -> list[str]:
    """Three steps of a stage 2 on the stage 1 in ``runs/whole``."""
    words = ["data.sets=shards", "data.workers=1", f"out={out}", "stage1=runs/whole", "train.global_batch=8"]
    return ["train", "demo_stage2", *words, "train.steps=3", "train.log_every=1", "train.val_every=0", *more]
