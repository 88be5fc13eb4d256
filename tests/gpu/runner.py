"""Runs a check in processes of its own, so that one that crashes, hangs or is killed stops no other."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mser_dist.ranks.distributed import free_port
from tests.gpu.registry import Check, Machine, Outcome

ROOT = Path(__file__).parents[2]
LATE = "was not done after"
GPUS = "MSER_TEST_GPUS"  # tests/conftest.py hides the GPUs from the tests of the CPU, and keeps here which there were


def run(check: Check, machine: Machine, folder: Path, seconds: float | None = None) -> dict[str, Any]:
    """A row of the report: name, status (ok, FAILED, skipped), value, seconds, line."""
    began = time.monotonic()
    if reason := check.missing(machine, folder):
        return _row(check, "skipped", None, 0.0, reason)
    if seconds is not None and seconds <= 0:
        return _row(check, "skipped", None, 0.0, "the time of all checks was over")
    limit = min(check.seconds, seconds) if seconds is not None else check.seconds
    results, problem = _on_ranks(check, machine, folder, limit)
    if skipped := next((one["skipped"] for one in results if "skipped" in one), None):
        return _row(check, "skipped", None, time.monotonic() - began, skipped)
    if problem and limit < check.seconds and LATE in problem:
        return _row(check, "skipped", None, time.monotonic() - began, "the time of all checks was over, in the middle")
    if problem:
        outcome = Outcome(False, None, problem)
    else:
        try:
            outcome = check.judge(results)
        except Exception as error:  # a rank that told something else than it should: no other check suffers
            outcome = Outcome(False, None, f"{type(error).__name__}: {error}")
    return _row(check, "ok" if outcome.ok else "FAILED", outcome.value, time.monotonic() - began, outcome.line)


def _row(check: Check, status: str, value: Any, seconds: float, line: str) -> dict[str, Any]:
    return {"name": check.name, "status": status, "value": value, "seconds": round(seconds, 1), "line": line}


def environment(device: str) -> dict[str, str]:
    """Of a process that computes on `device`: no launcher's variables, no hub, and on the CPU no GPU."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MLFLOW_TRACKING_URI", GPUS)
    env = {name: text for name, text in os.environ.items() if name not in dropped and not name.startswith("SLURM_")}
    env |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    beside = str(Path(sys.executable).parent)  # ninja's place, by which DeepSpeed compiles, where nothing is activated
    env["PATH"] = f"{beside}{os.pathsep}{env.get('PATH', os.defpath)}"
    env.setdefault("HF_HUB_OFFLINE", "1")
    if device == "cpu":
        return env | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if (hidden := os.environ.get(GPUS)) is not None:
        env["CUDA_VISIBLE_DEVICES"] = hidden
        if hidden == "all":
            del env["CUDA_VISIBLE_DEVICES"]
    return env


def _on_ranks(check: Check, machine: Machine, folder: Path, seconds: float) -> tuple[list[dict[str, Any]], str]:
    """What the ranks found, by rank; and what went wrong with one of them, if so."""
    ranks, place = check.ranks(machine), folder / check.name.replace(" ", "-")
    place.mkdir(exist_ok=True)
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes: list[subprocess.Popen[bytes]] = []
    for rank in range(ranks):
        own = {} if check.alone else {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        env = environment(machine.device) | own | {"MSER_FEATURES": str(folder / "features")}
        command = [sys.executable, "-m", "tests.gpu.rank", check.judge.__module__, check.name, machine.device]
        command += [str(folder), str(place)]
        with (place / f"{rank}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True)
            )
    try:
        problem = _wait(processes, seconds)
        if problem is not None and LATE in problem[1]:
            for process in processes:
                process.send_signal(signal.SIGABRT)  # whose handler writes where it stands
            time.sleep(2.0)
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the data workers, which else hold its GPU
            process.wait()
    if problem is not None:
        rank, what = problem
        return [], f"rank {rank} {what}: {_said(place / f'{rank}.log')}"
    found = [json.loads((place / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
    return found, ""


def _wait(processes: list[subprocess.Popen[bytes]], seconds: float) -> tuple[int, str] | None:
    """The first rank that failed, and how; a rank whose peer failed first fails a moment later."""
    deadline = time.monotonic() + seconds
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                name = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                return rank, name
        if None not in codes:
            return None
        if time.monotonic() > deadline:
            return codes.index(None), f"{LATE} {seconds:.0f} s"
        time.sleep(0.05)


def _said(log: Path) -> str:
    """The line of a log that says most: an error's, else the last one."""
    said = log.read_text(encoding="utf-8", errors="replace")
    if "Fatal Python error: Aborted" in said:
        stack = said.partition("Current thread")[2].partition("\n\n")[0].splitlines()[1:]
        ours = [line for line in stack if "/mser_dist/" in line or "/tests/" in line]
        where = [" ".join(line.split()) for line in [*stack[:1], *ours[:2]]]
        return f"it stands at {' < '.join(dict.fromkeys(where))}"[:400]
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or line.startswith("mser: error")]
    return re.sub(r"^\[rank\d+\]: ", "", " ".join((errors or lines or ["it said nothing"])[-1].split()))[:300]
