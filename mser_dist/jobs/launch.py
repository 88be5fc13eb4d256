"""Submit trainings and evaluations as jobs, from Python or by ``mser submit``: on SLURM, or on this machine without it.

    from mser_dist.launch import submit

    one = submit("my_stage1.yaml", ["train.lr=3e-4"], nodes=4, gpus_per_node=8, time="24:00:00")
    two = submit("my_stage2.yaml", nodes=4, gpus_per_node=8, after=one)
    print(two.result()["validation"])

A job that is preempted, or whose wall time ends, saves, goes back in the queue and continues (`task.py`). One that
crashes goes back too, from its last checkpoint, unless it has failed three times at one step (`requeue.py`).
"""

import os
import re
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mser_dist.config import Evaluation, Stage1, Stage2, batch_shape
from mser_dist.config.file import load_any
from mser_dist.errors import UserError
from mser_dist.jobs import site
from mser_dist.jobs.job import Job
from mser_dist.jobs.task import Task
from mser_dist.ranks.distributed import free_port
from mser_dist.runs import folder as run_folder

Config = Stage1 | Stage2 | Evaluation

# submitit counts a preemption of a short job as a time-out, and would give up at the third. `task.py` gives up instead,
# when the steps do not go on.
_TIMEOUTS = 10_000

# Ranks that a torchrun left in the submitting shell would contradict SLURM's. Compiled kernels are cached on the node
# and per job: jobs that share one cache, mostly on NFS, corrupt each other's.
_SETUP = [
    "unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE",
    "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}",
    "cache=${TMPDIR:-/tmp}/mser-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}",
    "export TRITON_CACHE_DIR=$cache/triton TORCH_EXTENSIONS_DIR=$cache/torch_extensions",
]
# A job that a task of an array submits inherits these, and would be taken for that task.
_NO_ARRAY = "unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID"
# What happens behind srun. Its own exit code is the largest of all ranks, those included that it ended because of the
# first to fail: `task.py` keeps that one's.
_AT_END = """\
at_end() {
  local code=$?
  rm -rf "$cache"
  [ ! -f "$first_code" ] || code=$(<"$first_code")
  ((code == 0 || code == 2)) || %s -m mser_dist.jobs.requeue "$code" "${runs[${SLURM_ARRAY_TASK_ID:-0}]}" || true
  exit "$code"
}
trap at_end EXIT"""
_ELSEWHERE = "name another one for the logs with folder (--folder)"


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a job asks for. One task is one rank, and where there are GPUs, one GPU."""

    nodes: int = 1
    tasks_per_node: int | None = None
    """None: one for each GPU, or a single one without GPUs."""
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    time: str | int = "24:00:00"
    """Wall time as SLURM writes it: minutes, or [D-]HH:MM:SS."""
    partition: str | None = None
    account: str | None = None
    signal_seconds: int = 180
    """So long before the wall time ends, the ranks are told to save. It must be enough for a step and a save."""
    setup: Sequence[str] = ()
    """Shell lines before the start on SLURM, e.g. ``module load cuda``."""
    slurm: dict[str, str | bool] = field(default_factory=dict)
    """Any other option of sbatch, e.g. {"mem": "64G", "exclusive": True}."""
    site: str | Path | None = None
    """A site file (slurm/sites): what is the same in all jobs of a cluster. None: that of ``MSER_SITE``, or none."""

    def __post_init__(self) -> None:
        for name in ("nodes", "tasks_per_node", "cpus_per_task", "signal_seconds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} ({_flag(name)}) must be 1 or more, not {value}")
        if self.gpus_per_node < 0:
            raise UserError(f"gpus_per_node (--gpus-per-node) must not be negative: it is {self.gpus_per_node}")
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise UserError(
                f"tasks_per_node={self.tasks_per_node} and gpus_per_node={self.gpus_per_node}: one task is one rank is "
                "one GPU, so leave tasks_per_node (--tasks-per-node) away, or ask for as many GPUs"
            )
        if 60 * minutes(self.time) <= self.signal_seconds:
            raise UserError(
                f"a wall time of {self.time} leaves nothing before the signal to save, {self.signal_seconds} s before "
                "its end: ask for more time, or set signal_seconds (--signal) to what a step and a save take"
            )

    @property
    def tasks(self) -> int:
        """Tasks on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks


def _flag(field: str) -> str:
    """How the command line calls a field."""
    return "--signal" if field == "signal_seconds" else f"--{field.replace('_', '-')}"


def minutes(time: str | int) -> int:
    """Whole minutes, rounded up, of a wall time as SLURM writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(time).strip())
    if found is None:
        raise UserError(f"{time!r} is no wall time: write minutes, HH:MM:SS or D-HH:MM:SS")
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:
        numbers.insert(0, 0)  # minutes first, where there are no days and no hours
    hours, mins, seconds = (*numbers, 0, 0)[:3]
    total = (int(days or 0) * 24 + hours) * 60 + mins + -(-seconds // 60)
    if total < 1:
        raise UserError(f"a wall time of {time} is too short: write minutes, HH:MM:SS or D-HH:MM:SS")
    return total


def submit(
    config: str | Config,
    overrides: Sequence[str] = (),
    *,
    after: Job | str | None = None,
    cluster: str | None = None,
    folder: str | Path = "runs/jobs",
    **resources: Any,
) -> Job:
    """Submit a training or an evaluation; ``.result()`` of the job is its summary.

    `config` is a preset's name or a YAML file, with ``key=value`` words in `overrides`, or a config object. `resources`
    are the fields of `Resources`. `after` is a job, or SLURM ids (``12:13``): this one starts only when they ended well
    (locally, this call waits). `cluster` is "slurm", "local", or None for SLURM where there is an sbatch. `folder` is
    for logs and submitit's files; all nodes must see it. Raises `UserError` for what can be known before the job runs.
    """
    config = resolve(config, overrides)
    need = Resources(**resources)
    return start([config], need, name=job_name(config), after=after, cluster=cluster, folder=folder)[0]


def resolve(config: str | Config, overrides: Sequence[str]) -> Config:
    """The checked config of a submission."""
    if isinstance(config, str):
        return load_any(config, list(overrides))
    if overrides:
        raise UserError("overrides go with a preset's name or a YAML file: change the config object itself")
    config.check()
    return config


def start(
    configs: Sequence[Config],
    need: Resources,
    *,
    name: str,
    after: Job | str | None = None,
    cluster: str | None = None,
    folder: str | Path = "runs/jobs",
    parallel: int | None = None,
    then: Sequence[Evaluation | None] = (),
    sweep: Path | None = None,
) -> list[Job]:
    """One job for each config: an array on SLURM, with at most `parallel` of them at once.

    Locally, `parallel` (default 1) at once, and the call returns when the last one has been started. then: what each
    evaluates behind its training. sweep: the folder of the sweep that they are.
    """
    within = {"sweep": None if sweep is None else str(sweep)}
    more: list[dict[str, Any]] = [{"then": one, **within} for one in then or [None] * len(configs)]
    cluster = cluster or where()
    for config in configs:
        check(config, need, cluster)
    if cluster == "local":
        return _start_here(configs, more, need, name, after, Path(folder), parallel or 1)
    import submitit

    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: submit from a login node, or run on this machine (--local)")
    place = _place(Path(folder), name)
    here = site.read(need.site)
    executor = submitit.SlurmExecutor(folder=place, max_num_timeout=_TIMEOUTS, python=here.python)
    executor.update_parameters(**_parameters(configs, need, here, name, after, parallel or len(configs), place))
    make_folder(place, _ELSEWHERE)  # here, since SLURM could not open a log in a folder that is made later
    try:
        jobs = executor.submit_array([Task(config, **own) for config, own in zip(configs, more, strict=True)])
    except submitit.core.utils.FailedJobError as error:
        shutil.rmtree(place)
        said = "; ".join(line.removeprefix("sbatch: error: ") for line in str(error).splitlines())
        raise UserError(f"sbatch refused the job: {said} (mser doctor looks at SLURM; --local runs it here)") from error
    return [Job(job, config.out) for job, config in zip(jobs, configs, strict=True)]


def make_folder(folder: Path, how: str) -> None:
    """Make a folder, or raise `UserError` with what to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}: {how}") from error


def _place(folder: Path, name: str) -> Path:
    """A folder for one submission: submitit names what it writes by job ids, and those of local jobs come back."""
    return folder.absolute() / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"


def script(
    configs: Sequence[Config],
    need: Resources,
    *,
    name: str,
    after: Job | str | None = None,
    folder: str | Path = "runs/jobs",
    parallel: int | None = None,
) -> str:
    """The text that `start` gives to sbatch. Needs no SLURM."""
    from submitit.slurm import slurm

    for config in configs:
        check(config, need, "slurm")
    place, here = _place(Path(folder), name), site.read(need.site)
    parameters = _parameters(configs, need, here, name, after, parallel or len(configs), place)
    if len(configs) > 1:
        parameters["map_count"] = len(configs)
    command = f"{here.python or sys.executable} -u -m submitit.core._submit {place}"
    return str(slurm._make_sbatch_string(command=command, folder=place, **parameters))


def where() -> str:
    """The cluster that jobs go to: "slurm" where there is an sbatch, else "local"."""
    return "slurm" if shutil.which("sbatch") else "local"


def check(config: Config, need: Resources, cluster: str) -> None:
    """Raise `UserError` for what would end the job as soon as it starts."""
    if cluster not in ("slurm", "local"):
        raise UserError(f"cluster is {cluster!r}: use slurm or local")
    if cluster == "local" and need.nodes > 1:
        raise UserError(
            f"{need.nodes} nodes need SLURM, and this machine is one: use tasks_per_node "
            "(--tasks-per-node) for several ranks"
        )
    if not isinstance(config, Evaluation):
        batch_shape(config.train, need.world_size)
        run_folder.finished(Path(config.out), config)


def job_name(config: Config) -> str:
    """What `squeue` shows."""
    return "mser-eval" if isinstance(config, Evaluation) else f"mser-stage{config.stage}"


def _parameters(
    configs: Sequence[Config],
    need: Resources,
    here: site.Site,
    name: str,
    after: Job | str | None,
    parallel: int,
    place: Path,
) -> dict[str, Any]:
    """What submitit's SlurmExecutor is given: the site's options, and those of the submission, which win."""
    asked = here.options(need.gpus_per_node)
    cpus = asked.pop("cpus_per_task", None) if need.cpus_per_task is None else need.cpus_per_task
    srun = ["--kill-on-bad-exit=1"]  # the peers of a dead rank would wait for it in a collective
    if cpus:
        srun.append(f"--cpus-per-task={cpus}")  # from SLURM 22.05 to 23.02 srun does not inherit it
    ours = {"partition": need.partition, "account": need.account, "nodes": 1, "time": 1, "ntasks_per_node": 1}
    extra = {"requeue": True} | {key: value for key, value in asked.items() if not ours.get(key)}
    dependency = None
    if after is not None:
        dependency = f"afterok:{_ids(after)}"
        extra["kill_on_invalid_dep"] = "yes"  # else it waits in the queue for ever
    extra |= {key.replace("-", "_"): value for key, value in need.slurm.items()}
    return {
        "job_name": name,
        "nodes": need.nodes,
        "ntasks_per_node": need.tasks,
        "cpus_per_task": cpus,
        "time": minutes(need.time),
        "partition": need.partition,
        "account": need.account,
        "dependency": dependency,
        "signal_delay_s": need.signal_seconds,
        "array_parallelism": parallel,
        "wckey": None,  # a site that keeps wckeys refuses one that it does not know
        "setup": [*here.setup, *need.setup, *_SETUP, *([] if len(configs) > 1 else [_NO_ARRAY]), *_end(configs, place)],
        "srun_args": [*srun, *here.srun],
        "additional_parameters": extra,
    }


def _end(configs: Sequence[Config], place: Path) -> list[str]:
    """Shell lines that clean up when srun has ended, and ask for another start after a crash."""
    runs = " ".join(shlex.quote(config.out) for config in configs)  # by the task's number in the array
    first_code = f"{shlex.quote(str(place))}/$SLURM_JOB_ID.code"
    return [f"runs=({runs}) first_code={first_code}", 'rm -f "$first_code"', _AT_END % shlex.quote(sys.executable)]


def _ids(after: Job | str) -> str:
    text = after.job_id if isinstance(after, Job) else str(after).replace(",", ":")
    if not re.fullmatch(r"\d+(_\d+)?(:\d+(_\d+)?)*", text):
        raise UserError(f"{text!r} is no SLURM job: give its number, or several as 12:13")
    return text


def _start_here(
    configs: Sequence[Config],
    more: Sequence[dict[str, Any]],
    need: Resources,
    name: str,
    after: Job | str | None,
    folder: Path,
    parallel: int,
) -> list[Job]:
    import submitit

    if isinstance(after, Job):
        after.result()  # raises where it failed, as a dependency would never hold
    elif after is not None:
        raise UserError("waiting for a job by its number needs SLURM: here, start the second when the first has ended")
    make_folder(folder, _ELSEWHERE)
    threads = max(1, len(os.sched_getaffinity(0)) // (need.tasks * parallel))
    jobs: list[Job] = []
    for config, own in zip(configs, more, strict=True):
        while sum(not job.done() for job in jobs) >= parallel:
            time.sleep(0.5)
        executor = submitit.LocalExecutor(folder=_place(folder, name), max_num_timeout=_TIMEOUTS)
        executor.update_parameters(
            timeout_min=minutes(need.time),
            tasks_per_node=need.tasks,
            gpus_per_node=need.gpus_per_node,
            signal_delay_s=need.signal_seconds,
        )
        jobs.append(Job(executor.submit(Task(config, free_port(), threads, **own)), config.out))
    return jobs
