"""`tools/local_slurm.sh`: a cluster that schedules, accounts and preempts as a large one does, and leaves nothing."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SCRIPT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


def script(*words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([SCRIPT, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def processes_of(folder: Path) -> list[str]:
    """Living processes that hold a file of the folder open, or whose command or environment names it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            opened = [str(link.readlink()) for link in (process / "fd").iterdir()]
            words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if any(name.startswith(f"{folder}/") for name in opened) or str(folder).encode() in words:
            found.append(f"{process.name} {(process / 'comm').read_text().strip()}")
    return found


def test_a_second_up_changes_nothing_and_status_tells_who_is_there(cluster: Cluster) -> None:
    before = script("status", "--dir", cluster.folder).stdout
    assert script("up", "--dir", cluster.folder).stdout == f"export SLURM_CONF={cluster.folder}/slurm.conf\n"
    assert script("status", "--dir", cluster.folder).stdout == before
    assert re.search(r"^low\*\s+up\s+2\s+idle\s+node\[1-2\]$", before, re.MULTILINE)
    for daemon in ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd"):
        assert f" {daemon}" in before


def test_a_job_runs_on_two_nodes_and_accounting_knows_it(cluster: Cluster, tmp_path: Path) -> None:
    command = "srun --label bash -c 'echo $SLURMD_NODENAME; exit $((SLURM_PROCID * 7))'"
    job = cluster.sbatch("--nodes=2", "--ntasks=2", "--output=out", "--wrap", command, cwd=tmp_path)
    assert cluster.wait_state(job) == "FAILED"
    assert {"0: node1", "1: node2"} <= set((tmp_path / "out").read_text().splitlines())
    rows = {row["JobID"]: row for row in cluster.sacct(job, "NodeList")}
    assert rows[job]["State"] == "FAILED" and rows[job]["ExitCode"] == "7:0"
    assert rows[f"{job}.0"]["ExitCode"] == "7:0" and rows[f"{job}.0"]["NodeList"] == "node[1-2]"


def test_a_job_of_high_pushes_one_of_low_out_which_then_runs_again(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "low.sh").write_text("""#!/bin/bash
#SBATCH --nodes=2 --ntasks=2 --cpus-per-task=4 --requeue --signal=USR2@10 --time=10
#SBATCH --output=low.out --open-mode=append
echo "start ${SLURM_RESTART_COUNT:-0}"
[ -z "$SLURM_RESTART_COUNT" ] || exit 0
srun --label bash -c 'trap "echo signalled" USR2; echo ready; while :; do sleep 0.2; done'
""")
    low = cluster.sbatch("low.sh", cwd=tmp_path)
    out = tmp_path / "low.out"
    deadline = time.monotonic() + 60
    while not out.exists() or out.read_text().count("ready") < 2:
        assert time.monotonic() < deadline, "the steps did not start"
        time.sleep(0.2)
    assert "GraceTime=30 " in cluster.ask("scontrol", "show", "partition", "low").replace("\n", " ")
    cluster.ask("scontrol", "update", "PartitionName=low", "GraceTime=5")  # it will sit the time out
    try:
        words = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "true"]
        assert cluster.wait_state(cluster.sbatch(*words, cwd=tmp_path)) == "COMPLETED"
    finally:
        cluster.ask("scontrol", "update", "PartitionName=low", "GraceTime=30")
    assert cluster.wait_state(low) == "COMPLETED"
    lines = out.read_text().splitlines()
    assert {"start 0", "0: signalled", "1: signalled"} <= set(lines) and lines[-1] == "start 1"
    assert cluster.show(low)["Restarts"] == "1"


def test_down_ends_a_stubborn_job_and_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    """A cluster of its own, beside the other one; slurmctld is killed, so that nobody can cancel the job."""
    folder = tmp_path / "c"
    assert len(str(folder)) < 80, "pytest's folder is too deep for a socket"
    assert "1 nodes" in script("up", "--nodes", "1", "--dir", folder).stderr
    try:
        other = Cluster(folder, cluster.env | {"SLURM_CONF": str(folder / "slurm.conf")})
        job = other.sbatch("--output=/dev/null", "--wrap", 'trap "" TERM; touch started; sleep 1000', cwd=tmp_path)
        while not (tmp_path / "started").exists():
            time.sleep(0.2)
        assert other.state(job) == "RUNNING"
        subprocess.run(["pkill", "-KILL", "-f", f"slurmctld -f {folder}/"], check=True)
        assert "down, or only half up" in script("status", "--dir", folder, code=1).stdout
    finally:
        script("down", "--dir", folder)
    assert not folder.exists() and not processes_of(folder)
    assert script("status", "--dir", folder, code=1).stdout.startswith("down: ")
    script("down", "--dir", folder)
    assert cluster.ask("squeue", "-h") == ""  # the neighbour still answers


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["start"], "up, down or status"),
        (["up", "--nodes", "none"], "a number from 1 to 99"),
        (["up", "--dir"], "wants a value"),
        (["up", "--dir", "/tmp/with space"], "another --dir"),
        (["up", "--dir", "/tmp/" + "long" * 20], "a shorter --dir"),
        (["up", "--dir", "."], "a new --dir"),
        (["down", "--dir", "."], "nothing done"),
    ],
)
def test_a_mistake_is_one_line_with_its_remedy(words: list[str], remedy: str) -> None:
    done = subprocess.run([SCRIPT, *words], capture_output=True, text=True, timeout=60, cwd=SCRIPT.parent)
    assert done.returncode == 2 and remedy in done.stderr and len(done.stderr.splitlines()) == 1


def test_missing_packages_are_named(tmp_path: Path) -> None:
    for name in ("bash", "realpath", "timeout", "munged", "mariadbd", "mariadb-install-db"):
        (tmp_path / name).symlink_to(str(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")))
    done = subprocess.run(
        ["bash", SCRIPT, "up", "--dir", tmp_path / "c"], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "no sbatch sacctmgr: " in done.stderr and "apt-get install slurm-wlm" in done.stderr
    assert not (tmp_path / "c").exists()
