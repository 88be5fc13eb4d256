"""What tests ask of a local SLURM cluster: submit, wait, look up. Every question has a time limit."""

import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"})


class Cluster:
    """A running `tools/local_slurm.sh` with two nodes, node1 and node2, of 4 CPUs."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder = folder  # what `--dir` was
        self.env = env  # for clients: SLURM_CONF, and MSER, the `mser` of this checkout

    def ask(self, *command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """Run a SLURM client; returns what it prints. An error fails the test with what the client said."""
        done = subprocess.run(
            [*map(str, command)],
            cwd=cwd,
            env=self.env | (env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def sbatch(self, *words: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
        """Submit from the folder `cwd`; returns the job's id. Its output: `cwd`/slurm-*.out, or what --output says."""
        return self.ask("sbatch", "--parsable", *words, cwd=cwd, env=env)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, TIMEOUT, … or '' for an unknown job."""
        return self.ask("squeue", "-h", "--states=all", "-j", job, "-o", "%T").partition("\n")[0]

    def wait_state(self, job: str, states: Iterable[str] = ENDED, timeout: float = 120) -> str:
        """The state of `job` once it is one of `states`; fails after `timeout` seconds with what is known of it."""
        deadline, wanted = time.monotonic() + timeout, set(states)
        while (state := self.state(job)) not in wanted:
            if time.monotonic() > deadline:
                raise AssertionError(f"{state}, not {sorted(wanted)}, after {timeout:.0f} s: {self.show(job)}")
            time.sleep(0.3)
        return state

    def show(self, job: str) -> dict[str, str]:
        """`scontrol show job`: JobState, ExitCode, Restarts, Reason, StdOut, …"""
        words = self.ask("scontrol", "--oneliner", "show", "job", job).split(" ")
        return dict(word.split("=", 1) for word in words if "=" in word)

    def sacct(self, job: str, *columns: str, timeout: float = 30) -> list[dict[str, str]]:
        """Accounting's rows of the job, its batch script and its steps; waits until it has heard of the job's end."""
        names = ["JobID", "State", "ExitCode", *columns]
        deadline = time.monotonic() + timeout
        while True:
            text = self.ask("sacct", "-n", "-P", "-j", job, "-o", ",".join(names))
            rows = [dict(zip(names, line.split("|"), strict=True)) for line in text.splitlines()]
            if rows and all(row["State"].split()[0] in ENDED for row in rows):
                return rows
            assert time.monotonic() < deadline, f"accounting still says {rows} after {timeout:.0f} s"
            time.sleep(0.5)
