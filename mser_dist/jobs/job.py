"""A submitted job, as the submitting program sees it."""

import re
import subprocess
import time
from pathlib import Path
from typing import Any

from mser_dist.errors import UserError

_ASK_EVERY = 10.0  # seconds between two questions to SLURM about a job
_LATE = 10  # seconds that a shared file system may take to show another node's files
# SLURM's words for jobs that will not run again.
_ENDED = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT",
})  # fmt: skip
_OURS = re.compile(r"^mser_dist\.errors\.(?:User|Passing)Error: ", re.MULTILINE)  # in a traceback
_PRINTED = re.compile(r"^mser: error.*?: (.*)", re.MULTILINE)  # in a log
_GIVEN_UP = re.compile(r"^mser: (exit code \d+; .*)", re.MULTILINE)  # by `requeue.py`, in that of rank 0


class Job:
    """A submitted job. Unlike submitit's, it is one thing, however many ranks it has."""

    def __init__(self, job: Any, out: str) -> None:
        """`job` is submitit's; `out` the run folder that it writes."""
        self._job, self.out = job, out
        self._local = hasattr(job, "_process")
        self._asked = -_ASK_EVERY
        self._state, self._ended = "UNKNOWN", False

    def __repr__(self) -> str:
        return f"Job({self.job_id}, out={self.out!r}, state={self.state})"

    @property
    def job_id(self) -> str:
        """SLURM's id (``12``, or ``12_3`` in an array); of a local job, a process id."""
        return str(self._job.job_id)

    @property
    def state(self) -> str:
        """SLURM's word for it: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, …

        Without accounting, a job is GONE some minutes after its end.
        """
        if self._local:  # its end says nothing of its success
            if self._outcome(0)[0] == "success":
                return "COMPLETED"
            return "RUNNING" if self._job._process.poll() is None else "FAILED"
        if time.monotonic() - self._asked >= _ASK_EVERY:
            self._asked = time.monotonic()
            self._state = _in_queue(self.job_id)
            self._ended = self._state == "GONE" or self._state in _ENDED
            if self._state == "GONE" and (told := self._job.watcher.get_state(self.job_id, mode="force")) != "UNKNOWN":
                self._state = str(told)  # sacct's
        return self._state

    def done(self) -> bool:
        """Whether it has ended, well or not. A job that waits in the queue again has not."""
        if self._outcome(0)[0] == "success":
            return True
        if self._local:
            return self._job._process.poll() is not None
        # An error is not yet the end: SLURM starts a job of which a node has died again.
        return self.state != "UNKNOWN" and self._ended

    def result(self) -> dict[str, Any]:
        """Wait for the end; the summary of the training, or the report of the evaluation. `UserError` if it failed."""
        while not self.done():
            time.sleep(1)
        for _ in range(_LATE):
            outcomes = [self._outcome(rank) for rank in range(self._job.num_tasks)]
            if outcomes[0][0] == "success":
                return dict(outcomes[0][1])
            if self._local or any(kind for kind, _ in outcomes):
                break
            time.sleep(1)
        raise self._failure([str(text) for kind, text in outcomes if kind == "error"])

    def cancel(self) -> None:
        """End it and take it out of the queue. The run folder keeps its checkpoints."""
        self._job.cancel(check=False)

    def stdout(self, rank: int = 0) -> str:
        """What a rank has printed so far."""
        return self._job.task(rank).stdout() or ""

    def stderr(self, rank: int = 0) -> str:
        """A rank's warnings, progress bar and errors so far."""
        return self._job.task(rank).stderr() or ""

    @property
    def logs(self) -> tuple[Path, Path]:
        """The files behind `stdout` and `stderr` of rank 0."""
        paths = self._job.task(0).paths
        return paths.stdout, paths.stderr

    def _outcome(self, rank: int) -> tuple[str | None, Any]:
        """("success", value), ("error", traceback), or (None, None) as long as there is neither."""
        from submitit.core.utils import pickle_load

        try:
            kind, value = pickle_load(self._job.task(rank).paths.result_pickle)
        except (OSError, EOFError):
            return None, None
        return kind, value

    def _failure(self, traces: list[str]) -> UserError:
        """One line for a failed job: a rank's own `UserError` where there is one; the tracebacks are its cause."""
        from submitit.core.utils import FailedJobError

        logs = [self._job.task(rank).stderr() or "" for rank in range(self._job.num_tasks)]
        ours = [found[-1] for found in (_OURS.split(trace) for trace in traces) if len(found) > 1]
        ours += [found[-1] for found in (_PRINTED.findall(log) for log in logs) if found]
        if ours:
            said = " ".join(ours[0].split())
        elif traces:
            said = f"{traces[0].strip().splitlines()[-1]}: see {self.logs[1]}"
        elif given_up := _GIVEN_UP.findall(logs[0]):
            said = f"{given_up[-1]}, and {self.logs[1]}"
        else:
            said = f"ended as {self.state} without a result: see {self.logs[1]}"
        error = UserError(f"job {self.job_id}: {said}")
        error.__cause__ = FailedJobError("\n".join(traces)) if traces else None
        return error


def _in_queue(job_id: str) -> str:
    """squeue's word for a job, GONE where it has been forgotten, UNKNOWN where the cluster does not answer."""
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "UNKNOWN"
    if done.returncode == 0:
        return (done.stdout.split() or ["GONE"])[0]
    return "GONE" if "invalid job id" in done.stderr.lower() else "UNKNOWN"
