"""After a job has ended: whether SLURM should start it again.

Called with srun's exit code by slurm/common.sh (`mser requeue`), and by the script of a submitted job (`launch.py`) as
``python -m mser_dist.jobs.requeue CODE OUT``. In a container, from which SLURM is out of reach, it only decides.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from mser_dist.ranks.preempt import SAVED

_FAILURES, _STARTS = 3, 10  # failures, and starts of any kind, without a step forward
# What a run that saved ends with, and one that was not listening yet to USR1, USR2 and TERM (128 + n).
_NO_FAULT = (SAVED, 128 + 10, 128 + 12, 128 + 15)


def requeue(code: int, out: Path, told: str | None = None) -> int:
    """Ask SLURM to start this job, of the run folder `out`, again if that is of use; the exit code to end with.

    It is of use after a preemption or a crash; not after a mistake that the user must mend (2), not where the job was
    cancelled, and not when it has failed three times, or was stopped ten times, at one step. told: squeue's word for
    the job, where the caller asks SLURM: then it is only decided, and 75 is the answer yes, 1 no.
    """
    job = os.environ.get("SLURM_JOB_ID") if told is not None else _job()
    if told is not None:
        return SAVED if _again(code, out, job, told) else 1
    if _again(code, out, job, None if job is None else _ask("squeue", "--noheader", "--job", job, "--format=%T")):
        if _ask("scontrol", "requeue", str(job)) is None:
            _say(f"`scontrol requeue {job}` failed: start it again by hand; the same command continues")
            return code
        _say(f"exit code {code}: job {job} is queued again")
        time.sleep(60)  # SLURM ends this process; were it to return first, the job would count as failed
    return code


def _again(code: int, out: Path, job: str | None, state: str | None) -> bool:
    """Whether another start is of use, by squeue's word for the job, None where it gave none; why not is said."""
    if code in (0, 2) or job is None:
        return False
    if state not in ("RUNNING", None):  # cancelled, out of time, or put back into the queue by SLURM or submitit
        _say(f"exit code {code}; job {job} is {state or 'over'}: not started again from here")
        return False
    why = _no_step_forward(out, code, job)
    if why:
        _say(f"exit code {code}; {why}, so the job is not started again: see {out / 'ends.jsonl'}")
    elif state is None:
        _say(f"exit code {code}; squeue does not know job {job}, or does not answer: not started again from here")
    return not why and state is not None


def _job() -> str | None:
    """The job's id; of one task of an array ARRAY_TASK, for the last task's own id is that of the whole array."""
    job = os.environ.get("SLURM_JOB_ID")
    if job and "SLURM_ARRAY_TASK_ID" in os.environ:  # a job that a task of an array has submitted inherits them, too
        for line in (_ask("squeue", "--noheader", "--array", "--job", job, "--format=%A %i") or "").splitlines():
            own, name = line.split()
            if own == job:
                return name
    return job


def _no_step_forward(out: Path, code: int, job: str) -> str | None:
    """Write the end of this start down; why there should be no other one, if the last ones were all at one step."""
    found = [p.name[5:] for p in (out / "checkpoints").glob("step-*") if p.name[5:].isdecimal()]
    # Of an evaluation: the files of clips that are scored.
    step = max(map(int, found), default=sum(1 for _ in out.glob("parts/*/*.npz")))
    end = {"step": step, "code": code, "job": job, "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0))}
    file = out / "ends.jsonl"
    ends = [end]
    with suppress(OSError):  # a full disk, say: then there is nothing to count by
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
        with file.open("a", encoding="utf-8") as log:
            log.write(json.dumps({**end, "time": round(time.time())}) + "\n")
        ends = list(_ends(file, job))  # who submits it anew has perhaps mended something
    here = list(takewhile(lambda row: row["step"] == step, reversed(ends)))
    failures = sum(row["code"] not in _NO_FAULT for row in here)
    if failures >= _FAILURES:
        return f"failed {failures} times at step {step}"
    return f"{len(here)} starts did not get beyond step {step}" if len(here) >= _STARTS else None


def _ends(file: Path, job: str) -> Iterator[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, TypeError, KeyError):  # a line that was cut
            row = json.loads(line)
            if row["job"] == job:
                yield {"step": row["step"], "code": row["code"]}


def _ask(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _say(text: str) -> None:
    print(f"mser: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(requeue(int(sys.argv[1]), Path(sys.argv[2])))
