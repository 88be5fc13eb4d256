"""Data workers that are forked where CUDA has been used, a rank that is killed, and two ranks that find one GPU."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from mser_dist.config import SIX_EMOTIONS, TrainingDataConfig
from mser_dist.ranks import distributed
from mser_dist.ranks.watchdog import LOST
from mser_dist.shards.shard_set import ShardSet
from mser_dist.stream.examples import Examples, pad_speech
from mser_dist.stream.features import Features
from mser_dist.stream.plan import START
from mser_dist.stream.steps import plan_of, training_steps
from tests.gpu.registry import Check, Outcome, Result
from tests.gpu.runner import environment
from tests.gpu.trainings import prepared
from tests.tiny_runs import losses, stage1

STEPS = 6


def workers(device: str, folder: Path) -> Result:
    """Batches of forked workers are those without, and the GPU computes on beside and behind them."""
    prepared(folder)
    clips = Examples(ShardSet.open([folder / "shards"], split="train"), SIX_EMOTIONS, Features())
    plan = plan_of(clips.shards, TrainingDataConfig(), 16)
    square = torch.randn(512, 512, device=device)
    expected = (square @ square).cpu()
    alike, right = 0, True
    plain, forked = (training_steps(clips, plan, START, STEPS, 8, 0, 1, pad_speech, number) for number in (0, 2))
    for one, other in zip(plain, forked, strict=True):
        for mine, theirs in zip(one.batches, other.batches, strict=True):
            sent = theirs["speech"].pin_memory() if device == "cuda" else theirs["speech"]
            alike += torch.equal(sent.to(device, non_blocking=True).cpu(), mine["speech"])
        right = right and torch.equal((square @ square).cpu(), expected)
    return {"alike": alike, "of": 2 * STEPS, "right": right}


def judge_workers(results: list[Result]) -> Outcome:
    [found] = results
    line = f"{found['alike']} of {found['of']} batches of two forked workers are those without"
    line += "" if found["right"] else "; a product on the device changed meanwhile"
    return Outcome(found["alike"] == found["of"] and found["right"], found["alike"], line)


PEER = 10.0  # engine.peer_seconds
BOUND = PEER + 5 + 15 + 30  # the watchdog's guard, its last words, and what the machine needs to end processes


def killed(device: str, folder: Path) -> Result:
    """A rank without a launcher is killed in a long training: how the others end, and when."""
    ranks = max(2, torch.cuda.device_count()) if device == "cuda" else 2
    prepared(folder)
    words = stage1("runs/killed", f"train.global_batch={8 * ranks}", "train.steps=100000", "tracking.enabled=false")
    words += [f"engine.peer_seconds={PEER}", "engine.timeout_minutes=2"]
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(distributed.free_port())}
    logs = [Path(f"killed-{rank}.log") for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        env = {**environment(device), **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("wb") as file:
            command = [sys.executable, "-m", "mser_dist", *words]
            processes.append(subprocess.Popen(command, env=env, stdout=file, stderr=file))
    try:
        deadline = time.monotonic() + 120
        while not (Path("runs/killed/log.jsonl").exists() and len(losses(Path("runs/killed"))) >= 3):
            if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
                raise RuntimeError(f"Error: it did not train: {logs[0].read_text(errors='replace')[-300:]}")
            time.sleep(0.2)
        processes[1].kill()
        began = time.monotonic()
        for process in processes:
            process.wait(BOUND)
        seconds = time.monotonic() - began
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = [line for log in logs for line in log.read_text(errors="replace").splitlines() if "rank 1 on" in line]
    codes = [process.returncode for process in processes]
    return {"codes": codes, "seconds": round(seconds, 1), "said": said[:1], "peer_seconds": PEER}


def judge_killed(results: list[Result]) -> Outcome:
    """The others end by the watchdog, or by NCCL's own, which aborts: neither goes on nor waits for ever."""
    [found] = results
    others = [code for rank, code in enumerate(found["codes"]) if rank != 1]
    line = f"{len(others)} other ranks ended {found['seconds']} s later with {', '.join(map(str, others))}"
    line += f" (peer_seconds={found['peer_seconds']:g}): {(found['said'] or ['and nobody named rank 1'])[0][:160]}"
    return Outcome(bool(found["said"]) and all(code in (LOST, 1, -6) for code in others), found["seconds"], line)


def one_gpu(device: str, folder: Path) -> Result:
    """What two ranks are told that see the same single GPU."""
    ids = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(distributed.free_port())}
    code = "from mser_dist.ranks import distributed as d; from mser_dist.errors import UserError\n"
    code += "try: d.init(d.discover(), 1, 'cuda')\nexcept UserError as error: print(error, flush=True)\n"
    code += "import os; os._exit(0)"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**environment(device), **place, "CUDA_VISIBLE_DEVICES": ids, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    return {"said": [process.communicate(timeout=90)[0].strip() for process in processes]}


def judge_one_gpu(results: list[Result]) -> Outcome:
    [found] = results
    told = all("ranks 0 and 1 have one GPU" in said for said in found["said"])
    return Outcome(told, None, "both are told so" if told else f"they are told {found['said']}")


CHECKS = [
    Check(
        "data workers",
        "forked where CUDA has been used",
        workers,
        judge_workers,
        cpu=True,
        tests="tests/unit/test_workers.py",
        single=True,
    ),
    Check(
        "two ranks, one GPU",
        "a line on each, and no error of NCCL's",
        one_gpu,
        judge_one_gpu,
        cpu=False,
        tests="tests/unit/test_own_gpu.py",
        alone=True,
    ),
    Check(
        "killed rank",
        "the others end in bounded time",
        killed,
        judge_killed,
        cpu=True,
        tests="tests/faults/test_drills.py",
        alone=True,
        gpus=2,
        seconds=240,
    ),
]
