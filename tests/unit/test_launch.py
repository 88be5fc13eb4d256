"""Submission: what sbatch would get, what is refused at once, and submitit's local executor for real."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import submitit

from mser_dist.config import Stage1
from mser_dist.config.file import load_training, to_yaml
from mser_dist.errors import Stopped, UserError
from mser_dist.jobs import job as job_module
from mser_dist.jobs import launch, task
from mser_dist.jobs.job import Job
from mser_dist.jobs.task import Task
from mser_dist.ranks.distributed import free_port

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["data.sets=shards", "train.global_batch=8", "tracking.enabled=false"]


def config(*words: str) -> Stage1:
    loaded = load_training("demo_stage1", [*WORDS, *words])
    assert isinstance(loaded, Stage1)
    return loaded


def script(after: Any = None, parallel: int | None = None, copies: int = 1, **resources: Any) -> str:
    need = launch.Resources(**resources)
    return launch.script([config()] * copies, need, name="mser-stage1", after=after, parallel=parallel)


# ---- resources and the text for sbatch


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30", 30), (30, 30), ("30:01", 31), ("1:30:00", 90), ("1-0", 1440), ("2-1:30", 2970), ("1-00:00:30", 1441)],
)
def test_wall_times_are_read_as_slurm_reads_them(text: str | int, expected: int) -> None:
    assert launch.minutes(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-5", "0", "1h"])
def test_what_is_no_wall_time_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="wall time"):
        launch.minutes(text)


@pytest.mark.parametrize(
    ("resources", "says"),
    [
        ({"nodes": 0}, r"nodes \(--nodes\) must be 1 or more"),
        ({"gpus_per_node": -1}, r"gpus_per_node \(--gpus-per-node\) must not be negative"),
        ({"gpus_per_node": 8, "tasks_per_node": 1}, "one task is one rank is one GPU"),
        ({"time": 3, "signal_seconds": 180}, "ask for more time"),
    ],
)
def test_impossible_resources_are_refused(resources: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        launch.Resources(**resources)


def test_one_task_is_one_gpu() -> None:
    assert launch.Resources(nodes=2, gpus_per_node=4).world_size == 8
    assert launch.Resources(nodes=2, tasks_per_node=4).world_size == 8
    assert launch.Resources(nodes=2).world_size == 2


def test_the_text_for_sbatch() -> None:
    text = script(
        after="12:13", nodes=2, gpus_per_node=4, cpus_per_task=6, time="1-00:00:00", partition="gpu", account="us",
        signal_seconds=240, setup=["module load cuda"], slurm={"mem": "64G", "exclusive": True},
    )  # fmt: skip
    options = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    expected = {"nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=6", "time=1440", "partition=gpu"}
    expected |= {"account=us", "signal=USR2@240", "requeue", "mem=64G", "exclusive", "dependency=afterok:12:13"}
    assert options >= expected | {"kill-on-invalid-dep=yes", "job-name=mser-stage1"}
    (srun,) = (line for line in text.splitlines() if line.startswith("srun"))
    assert "--kill-on-bad-exit=1" in srun and "--cpus-per-task=6" in srun
    assert text.index("module load cuda") < text.index("unset RANK") < text.index("srun")
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_without_gpus_and_dependencies_sbatch_is_told_of_none() -> None:
    text = script()
    assert "gpus" not in text and "dependency" not in text and "wckey" not in text and "open-mode=append" in text
    assert "--array=0-4%2" in script(copies=5, parallel=2)


@pytest.mark.parametrize(
    ("srun", "first", "ends", "asks"),
    [(0, None, 0, None), (3, None, 3, "3"), (137, 2, 2, None), (143, 75, 75, "75")],
    ids=["well", "a crash", "a mistake that ended its peers", "a stop"],
)
def test_the_lines_around_srun(srun: int, first: int | None, ends: int, asks: str | None, tmp_path: Path) -> None:
    """Run by bash: no rank of a torchrun reaches the job, its cache goes, and its end is told to `mser requeue`."""
    requeue = tmp_path / "python"
    requeue.write_text('#!/bin/sh\necho "asked: $@"\n')
    requeue.chmod(0o755)
    (tmp_path / "x.code").write_text("1")  # of an earlier start
    runs = [config(f"out={tmp_path}/{name}") for name in ("one", "the other")]
    lines = [*launch._SETUP, *launch._end(runs, tmp_path)]
    text = "\n".join(lines).replace(sys.executable, str(requeue))
    text += '\nmkdir -p "$cache"; env\n' + (f'echo {first} >"$first_code"\n' if first else "") + f"(exit {srun})\n"
    shell = {**os.environ, "RANK": "1", "SLURM_JOB_ID": "x", "SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=shell)
    assert done.returncode == ends, done.stderr
    environment = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert "RANK" not in environment and environment["OMP_NUM_THREADS"] == "1"
    assert not Path(environment["TRITON_CACHE_DIR"]).parent.exists()
    asked = [line for line in done.stdout.splitlines() if line.startswith("asked")]
    assert asked == ([f"asked: -m mser_dist.jobs.requeue {asks} {tmp_path}/the other"] if asks else [])


# ---- what is refused before a job exists


@pytest.mark.parametrize(
    ("name", "words", "how", "says"),
    [
        ("demo_stage1", ["train.lrr=1"], {}, "did you mean train.lr?"),
        ("demo_stage1", WORDS, {"nodes": 3, "cluster": "slurm"}, "does not divide by the world size 3"),
        ("demo_stage1", WORDS, {"nodes": 2, "cluster": "local"}, "2 nodes need SLURM"),
        ("demo_stage1", WORDS, {"cluster": "moon"}, "use slurm or local"),
        ("demo_stage1", WORDS, {"cluster": "local", "after": "12"}, "needs SLURM"),
        ("no_such", [], {}, "no config file or preset"),
    ],
)
def test_mistakes_are_told_before_anything_is_submitted(
    name: str, words: list[str], how: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        launch.submit(name, words, folder=tmp_path / "jobs", **how)
    assert says in str(refused.value)
    assert not (tmp_path / "jobs").exists()


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    other = config(f"out={tmp_path}", "seed=7")
    (tmp_path / "config.yaml").write_text(to_yaml(other))
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UserError, match=r"another config \(seed=7, now 0\)"):
        launch.submit(config(f"out={tmp_path}"), cluster="local", folder=tmp_path / "jobs")


def test_a_config_object_takes_no_overrides() -> None:
    with pytest.raises(UserError, match="change the config object"):
        launch.submit(config(), ["seed=1"], cluster="local")


@pytest.mark.parametrize("after", ["x", "12:", "afterok:12"])
def test_what_is_no_job_cannot_be_waited_for(after: str) -> None:
    with pytest.raises(UserError, match="is no SLURM job"):
        script(after=after)


def test_without_sbatch_jobs_run_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch.where() == "local"
    with pytest.raises(UserError, match="there is no sbatch here"):
        launch.submit(config(), cluster="slurm", folder=tmp_path / "jobs")


# ---- real jobs on this machine


class Quick(Task):
    """A task whose work takes no training; each of the ways in which a rank can end."""

    def __init__(self, way: str, folder: Path) -> None:
        super().__init__(config(f"out={folder}/run"), free_port(), 1)
        self.way, self.folder = way, folder

    def _run(self) -> dict[str, Any]:
        rank = int(os.environ["RANK"])
        (self.folder / f"pid{rank}").write_text(str(os.getpid()))
        (self.folder / f"start{len(self.stops)}-{rank}").write_text(str(os.getpid()))
        if (
            rank == 0 and os.environ["WORLD_SIZE"] != "1" and self.way in ("well", "goes on")
        ):  # ranks are in step; a late one would be ended with its job
            self._wait_for(1)
        if self.way == "goes on" and len(self.stops) < 5:  # more often than submitit's own limit of three
            raise Stopped("SIGUSR2", len(self.stops))
        if self.way == "never goes on":
            raise Stopped("SIGUSR2", 5)
        if self.way == "one fails" and rank == 1:
            raise UserError("rank 1 has\nno data: give it some")
        if self.way == "one fails":
            time.sleep(600)  # in a collective, waiting for rank 1
        if self.way == "crashes":
            raise ZeroDivisionError("of all things")
        return {"rank": rank, "stops": self.stops, "world": os.environ["WORLD_SIZE"]}

    def _wait_for(self, rank: int) -> None:
        """Until that rank of this start has ended; its log is whole then."""
        began, note = time.monotonic(), self.folder / f"start{len(self.stops)}-{rank}"
        while time.monotonic() < began + 60:
            with suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
                if psutil.Process(int(note.read_text())).status() != psutil.STATUS_ZOMBIE:
                    time.sleep(0.02)
                    continue
            if note.exists() and note.read_text():
                return
            time.sleep(0.02)


def quick(way: str, folder: Path, monkeypatch: pytest.MonkeyPatch, ranks: int = 2) -> Job:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    executor = submitit.LocalExecutor(folder=folder / "jobs", max_num_timeout=launch._TIMEOUTS)
    executor.update_parameters(timeout_min=10, tasks_per_node=ranks, gpus_per_node=0, signal_delay_s=30)
    return Job(executor.submit(Quick(way, folder)), f"{folder}/run")


def test_the_result_is_that_of_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = quick("well", tmp_path, monkeypatch)
    assert job.result() == {"rank": 0, "stops": [0], "world": "2"}
    assert job.done() and job.state == "COMPLETED"
    assert "Job completed" in job.stdout(1) and job.logs[0].read_text() == job.stdout()


def test_a_stopped_job_is_started_again_as_long_as_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = quick("goes on", tmp_path, monkeypatch)
    assert job.result()["stops"] == [0, 1, 2, 3, 4]
    for rank in (0, 1):
        assert job.stdout(rank).count("the same command continues from there") == 4
        assert "Traceback" not in job.stderr(rank)


def test_a_job_that_does_not_go_on_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = quick("never goes on", tmp_path, monkeypatch)
    with pytest.raises(UserError, match="3 starts did not get beyond step 5"):
        job.result()
    assert job.state == "FAILED" and job.stdout().count("Starting with") == 4


def test_a_failed_rank_says_why_in_one_line_and_ends_its_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = quick("one fails", tmp_path, monkeypatch)
    with pytest.raises(UserError) as failed:
        job.result()
    assert str(failed.value) == f"job {job.job_id}: rank 1 has no data: give it some"
    assert "Traceback" in str(failed.value.__cause__)
    for rank in (0, 1):
        assert not psutil.pid_exists(int((tmp_path / f"pid{rank}").read_text()))


def test_a_crash_names_the_error_and_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = quick("crashes", tmp_path, monkeypatch, ranks=1)
    with pytest.raises(UserError, match=rf"ZeroDivisionError: of all things: see {job.logs[1]}"):
        job.result()


def test_the_exit_code_tells_a_mistake_from_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's script reads it: the largest code of all ranks is that of one that was ended because of another."""
    env = SimpleNamespace(cluster="slurm", raw_job_id="7", paths=SimpleNamespace(folder=tmp_path))
    task._keep_first(2, env)
    task._keep_first(1, env)
    assert (tmp_path / "7.code").read_text() == "2\n"


class Remote:
    """A job of submitit on a cluster, with what its sacct says; UNKNOWN where it does not answer."""

    job_id, num_tasks = "5", 1

    def __init__(self, folder: Path, sacct: str = "UNKNOWN") -> None:
        self.watcher = SimpleNamespace(get_state=lambda job_id, mode: sacct)
        log = folder / "log"
        log.write_text("mser: error: no data\n")
        paths = SimpleNamespace(result_pickle=folder / "result.pkl", stderr=log, stdout=log)
        self._task = SimpleNamespace(paths=paths, stderr=log.read_text)

    def task(self, rank: int) -> Any:
        return self._task


@pytest.mark.parametrize(
    ("squeue", "sacct", "state", "done"),
    [
        ("echo PENDING", "UNKNOWN", "PENDING", False),
        ("echo SUSPENDED", "SUSPENDED", "SUSPENDED", False),
        ("echo FAILED", "UNKNOWN", "FAILED", True),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", "UNKNOWN", "GONE", True),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", "PREEMPTED", "PREEMPTED", True),
        ("echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", "FAILED", "UNKNOWN", False),
    ],
)
def test_with_and_without_accounting_it_is_known_whether_a_job_has_ended(
    squeue: str, sacct: str, state: str, done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    job = Job(Remote(tmp_path, sacct), "run")
    assert job.state == state and job.done() is done
    if done:
        monkeypatch.setattr(job_module, "_LATE", 1)
        with pytest.raises(UserError, match="job 5: no data"):
            job.result()


def test_a_job_that_has_crashed_too_often_says_so(tmp_path: Path) -> None:
    """No rank has left an error: each was killed."""
    job = Job(Remote(tmp_path), "run")
    job.logs[1].write_text(
        "mser: exit code 137; failed 3 times at step 4, so it is not started again: see ends.jsonl\n"
    )
    assert "job 5: exit code 137; failed 3 times at step 4" in str(job._failure([]))


def test_a_cancelled_job_ends_without_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = quick("one fails", tmp_path, monkeypatch, ranks=1)
    while not (tmp_path / "pid0").exists():
        time.sleep(0.1)
    job.cancel()
    with pytest.raises(UserError, match="without a result: see"):
        job.result()


def test_halves_of_an_earlier_start_are_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit refuses to write a file whose ``.save_tmp`` a kill has left behind."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path))
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "5")
    names = [
        "5_submitted.pkl",
        "5_submitted.pkl.save_tmp",
        "5_0_result.pkl",
        "5_0_result.pkl.save_tmp",
        "5_1_result.pkl",
    ]
    for name in names:
        (tmp_path / name).touch()
    task._clear_leftovers(submitit.JobEnvironment())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5_1_result.pkl", "5_submitted.pkl"]
