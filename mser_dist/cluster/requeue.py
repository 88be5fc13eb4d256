"""After a job has ended: whether SLURM should start it again. Called by slurm/common.sh with srun's exit code."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from mser_dist.cluster.preempt import SAVED
from mser_dist.config import Evaluation, Stage1, Stage2

_TRIES = 3
# What a run that saved ends with, and one that USR1 or USR2 ended before it listened to them (128 + their number).
_NO_FAULT = (SAVED, 128 + 10, 128 + 12)


def requeue(code: int, config: Stage1 | Stage2 | Evaluation) -> int:
    """Ask SLURM to start this job again if that is of use, and return the exit code to end with.

    It is of use after a preemption or a crash; not after a mistake that the user must mend (2), not where the job was
    cancelled, and not when it has failed three times at one step.
    """
    out, job = Path(config.out), os.environ.get("SLURM_JOB_ID")
    if code in (0, 2) or job is None:
        return code
    if code not in _NO_FAULT:
        step = _note_failure(out, code, job)
        if step is not None:
            _say(
                f"failed {_TRIES} times at step {step} (exit code {code}), so it is not started again: see "
                f"{out / 'failures.jsonl'}"
            )
            return code
    state = _ask("squeue", "--noheader", "--job", job, "--format=%T")
    if state != "RUNNING":  # cancelled, out of time, or put back into the queue by SLURM itself
        _say(f"exit code {code}; job {job} is {state or 'unknown to squeue'}: not started again from here")
        return code
    if _ask("scontrol", "requeue", job) is None:
        _say(f"`scontrol requeue {job}` failed: start it again by hand; the same command continues")
        return code
    _say(f"exit code {code}: job {job} is queued again")
    time.sleep(60)  # SLURM ends this process; were it to return first, the job would count as failed
    return code


def _note_failure(out: Path, code: int, job: str) -> int | None:
    """Write the failure down; the step, if the last three were all there."""
    found = [p.name[5:] for p in (out / "checkpoints").glob("step-*") if p.name[5:].isdecimal()]
    step = max(map(int, found), default=0)
    line = {"step": step, "code": code, "job": job, "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0))}
    out.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = out / "failures.jsonl"
    with file.open("a", encoding="utf-8") as log:
        log.write(json.dumps({**line, "time": round(time.time())}) + "\n")
    rows = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
    steps = [row["step"] for row in rows if row["job"] == job]  # who submits it anew has perhaps mended something
    return step if steps[-_TRIES:] == [step] * _TRIES else None


def _ask(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _say(text: str) -> None:
    print(f"mser: {text}", file=sys.stderr, flush=True)
