"""The verbs of the ``mser`` command that have to do with a cluster: check, submit, sweep, requeue, sync, doctor."""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from mser_dist import tables
from mser_dist.errors import UserError

_SUBMIT_HELP = """\
Submit a training or an evaluation as a job: to SLURM, or to this machine where there is no SLURM. One task is one rank.

  mser submit my_stage1.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00 train.lr=3e-4
  mser submit my_stage2.yaml --nodes 4 --gpus-per-node 8 --after JOBID      starts when that job has ended well
  mser submit demo_stage1 --local --tasks-per-node 2 --wait                 two ranks on this machine
  mser submit my_stage1.yaml --nodes 4 --dry-run                            shows what sbatch would get, and mser check

Before the wall time ends, and when the job is preempted, all ranks save; the job goes back in the queue and continues.
"""
_SWEEP_HELP = """\
Submit one job for each combination of values, as an array; each has its own folder in `out`, and all are children of
one MLflow run.

  mser sweep my_stage1.yaml train.lr=1e-4,3e-4 seed=0,1 out=runs/lr --nodes 2 --gpus-per-node 8 --parallel 2

runs in runs/lr/lr=1e-4_seed=0 and three more. A key's last part is enough where it is unambiguous: lr=1e-4,3e-4.
A key with a single value is the same for all. A comma in brackets or quotes does not separate: encoder.arch={…},{…}.
A key that is a list takes bracketed lists: data.sets=[a],[a,b] are two values, data.sets=a,b is one.

  mser sweep my_stage1.yaml lr=1e-4,3e-4 out=runs/lr --evaluate my_eval.yaml eval.data.sets=shards/nemo

evaluates each run behind its training, in runs/lr/lr=1e-4-eval and so on; words that begin with eval. are for that.
Runs are ranked by the mean UA over unseen languages (without --evaluate by validation), the best first, and the command
that repeats the best is shown: at the end of --wait, and of every sweep with --evaluate on this machine; on SLURM, the
same command shows it when all jobs have ended. The same command goes on: what is done is not done again. runs/lr/sweep
has the table, and a comparison with its plot; so has the sweep's MLflow run.
"""
_SYNC_HELP = """\
Send to MLflow what is missing there of a run: the server was down, or tracking was off. Nothing is sent twice.

  mser sync runs/stage1 runs/stage2
"""
_DOCTOR_HELP = """\
What this machine or allocation can do: Python, torch, GPUs, attention kernels, DeepSpeed, SLURM, MLflow, disks, and an
all-reduce between real processes; a remedy beside each thing that is missing. `srun mser doctor` checks an allocation.
"""

_CHECK_HELP = """\
What would end a job after it has waited in the queue, told before it: sets and labels, the runs it builds on, weights
and the access to them, the disk, the ranks, what sbatch says to the script. A remedy stands beside each; exit code 2 if
anything would fail.

  mser check my_stage1.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00 --gpu h100
  mser check my_stage2.yaml --nodes 4 --gpus-per-node 8 --after JOBID      what that job has to bring is no failure yet
  mser submit my_stage1.yaml --nodes 4 --gpus-per-node 8 --dry-run         the same, below the script

Nothing is written, loaded or submitted. A job script asks it before its ranks start. --gpu takes a minute or two more
where the LLM is large, and what the plan assumes is said by mser plan.
"""

Verb = Callable[..., argparse.ArgumentParser]


def add_verbs(verb: Verb, config_words: Callable[[argparse.ArgumentParser], None]) -> None:
    """Register the verbs; the two functions are those that ``cli/main.py`` makes all verbs with."""
    submit = verb("submit", _submit, "submit a training or an evaluation as a job", _SUBMIT_HELP)
    config_words(submit)
    _job_options(submit).add_argument("--parsable", action="store_true", help="print the id alone, for --after")

    check = verb("check", _check, "what would end a job, told before it", _CHECK_HELP)
    config_words(check)
    _resource_options(check)
    check.add_argument("--after", metavar="JOBID", help="it starts when this job, or these (12:13), ended well")
    check.add_argument("--gpu", metavar="NAME", help="plan memory and time for it, as mser plan does: h100, a100, …")
    check.add_argument("--quiet", action="store_true", help="only what is not as it should be")

    sweep = verb("sweep", _sweep, "submit a job for each combination of values", _SWEEP_HELP)
    sweep.add_argument("config", metavar="CONFIG", help="YAML file or preset name")
    sweep.add_argument(
        "words", metavar="key=A,B", nargs="*", default=[], help="values to combine, and overrides of one value"
    )
    sweep.add_argument("--evaluate", metavar="EVAL", help="evaluate each run by this config, and rank them by that")
    _job_options(sweep).add_argument("--parallel", type=int, metavar="N", help="at once (default: all; locally 1)")

    sync = verb("sync", _sync, "send to MLflow what is missing there", _SYNC_HELP)
    sync.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders")
    sync.add_argument("--uri", help="to this MLflow (default: the run's own)")

    doctor = verb("doctor", _doctor, "what this machine or allocation can do", _DOCTOR_HELP)
    doctor.add_argument("--out", type=Path, default=Path("runs"), metavar="FOLDER", help="check the disk where runs go")
    doctor.add_argument("--no-ranks", action="store_true", help="without the all-reduce between two processes")
    doctor.add_argument("--json", type=Path, metavar="FILE", help="write the findings to a file")

    requeue = verb("requeue", _requeue, "put the SLURM job that this runs in back in the queue, if that can help")
    requeue.add_argument("code", type=int, metavar="CODE", help="exit code of `srun mser train`")
    requeue.add_argument("--state", metavar="WORD", help="squeue's word for the job: only decide (exit code 75: yes)")
    config_words(requeue)


def _resource_options(sub: argparse.ArgumentParser) -> None:
    ask = sub.add_argument_group("resources")
    ask.add_argument("--nodes", type=int, default=1, metavar="N", help="default: %(default)s")
    ask.add_argument("--tasks-per-node", type=int, metavar="N", help="ranks (default: the GPUs per node, or 1)")
    ask.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="default: none")
    ask.add_argument("--cpus-per-task", type=int, metavar="N", help="a node's cores by its ranks: they decode audio")
    ask.add_argument("--time", default="24:00:00", help="wall time, as for sbatch (default: %(default)s)")
    ask.add_argument("--partition", metavar="NAME")
    ask.add_argument("--account", metavar="NAME")
    ask.add_argument("--signal", type=int, default=180, metavar="S", help="save S seconds before the time is over")
    ask.add_argument(
        "--setup", action="append", default=[], metavar="LINE", help="first run this, e.g. 'module load cuda'"
    )
    ask.add_argument(
        "--site", type=Path, metavar="FILE", help="a site file, e.g. slurm/sites/bare.sh (default: $MSER_SITE)"
    )
    ask.add_argument("--slurm", action="append", default=[], metavar="KEY[=VALUE]", help="other options, e.g. mem=64G")


def _job_options(sub: argparse.ArgumentParser) -> Any:
    _resource_options(sub)
    how = sub.add_argument_group("submission")
    how.add_argument("--after", metavar="JOBID", help="start when this job, or these (12:13), ended well")
    how.add_argument("--local", action="store_true", help="run on this machine, also where there is SLURM")
    how.add_argument("--folder", type=Path, default=Path("runs/jobs"), help="of logs (default: %(default)s)")
    how.add_argument("--wait", action="store_true", help="wait for the end and show the result")
    how.add_argument("--dry-run", action="store_true", help="print what sbatch would get, check it, and submit nothing")
    return how


def _resources(options: argparse.Namespace) -> dict[str, Any]:
    slurm: dict[str, str | bool] = {}
    for word in options.slurm:
        key, equals, value = word.lstrip("-").partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", key):
            raise UserError(f"--slurm {word!r} is no option of sbatch: write --slurm KEY=VALUE, e.g. --slurm mem=64G")
        slurm[key] = value if equals else True
    return {
        "nodes": options.nodes,
        "tasks_per_node": options.tasks_per_node,
        "gpus_per_node": options.gpus_per_node,
        "cpus_per_task": options.cpus_per_task,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "signal_seconds": options.signal,
        "setup": options.setup,
        "slurm": slurm,
        "site": options.site,
    }


def _check(options: argparse.Namespace) -> None:
    from mser_dist.config.file import to_yaml
    from mser_dist.jobs import check, launch

    need = launch.Resources(**_resources(options))
    config = launch.resolve(options.config, options.words)
    if not options.quiet:
        print(to_yaml(config), flush=True)
    found = check.check(config, need, options.after, options.gpu)
    check.tell(found, options.quiet)
    check.raise_if_failed(found)


def _submit(options: argparse.Namespace) -> None:
    from mser_dist.jobs import launch

    need = launch.Resources(**_resources(options))
    config = launch.resolve(options.config, options.words)
    name = launch.job_name(config)
    if options.dry_run:
        from mser_dist.jobs import check

        print(launch.script([config], need, name=name, after=options.after, folder=options.folder), flush=True)
        with redirect_stdout(sys.stderr):  # the script alone can be kept
            found = check.check(config, need, options.after)
            check.tell(found)
        check.raise_if_failed(found)
        return
    cluster = "local" if options.local else launch.where()
    (job,) = launch.start([config], need, name=name, after=options.after, cluster=cluster, folder=options.folder)
    if options.parsable:
        print(job.job_id, flush=True)
    else:
        _announce([job], need, cluster)
    if options.wait:
        _show(_wait([job], cluster)[0])
        say_page(Path(config.out))


def _sweep(options: argparse.Namespace) -> int:
    from mser_dist.jobs import launch, ranked, sweep
    from mser_dist.runs.page import sweep_page

    planned = sweep.trials(options.config, options.words, options.evaluate)
    need = launch.Resources(**_resources(options))
    if options.parallel is not None and options.parallel < 1:
        raise UserError(f"--parallel must be 1 or more, not {options.parallel}")
    shared: dict[str, Any] = {"after": options.after, "folder": options.folder, "parallel": options.parallel}
    if options.dry_run:
        print(launch.script([trial.config for trial in planned], need, name="mser-sweep", **shared))
        print("\n".join(f"# {trial.config.out}" for trial in planned))
        return 0
    cluster = "local" if options.local else launch.where()
    for trial in planned:
        launch.check(trial.config, need, cluster)
    left = [trial for trial in planned if not sweep.is_done(trial)]
    if len(left) < len(planned):
        print(f"{len(planned) - len(left)} of {tables.count(len(planned), 'run')} done before", flush=True)
    if cluster == "local" and left:
        print(f"{tables.count(len(left), 'run')} on this machine, {options.parallel or 1} at once", flush=True)
    jobs = sweep.submit_trials(planned, need, left=left, cluster=cluster, command=_sweep_command(options), **shared)
    if jobs:
        _announce(jobs, need, cluster)
    if left and not (options.wait or (options.evaluate and cluster == "local")):
        return 0
    ended = zip(left, _wait(jobs, cluster), strict=True)
    failed = {trial.name: str(result) for trial, result in ended if isinstance(result, UserError)}
    out = Path(planned[0].config.out).parent
    ranking = ranked.settle(out, failed)
    below = ranking.winner()
    tables.show(ranking.table(), *(["\n".join(below)] if below else []))
    print(f"{'table, comparison and plot' if ranking.best else 'table'}: {out / ranked.PLACE}")
    if line := sweep_page(out / ranked.PLACE, getattr(planned[0].config, "stage", None)):
        print(line, flush=True)
    return 1 if failed else 0


def _sweep_command(options: argparse.Namespace) -> str:
    """The command as it was typed, without where it runs."""
    more = ["--evaluate", options.evaluate] if options.evaluate else []
    return shlex.join(["mser", "sweep", options.config, *options.words, *more])


def say_page(run: Path) -> None:
    """Print how to open MLflow's page of a run, where it has one."""
    from mser_dist.runs.page import page

    if line := page(run):
        print(line, flush=True)


def _announce(jobs: Sequence[Any], need: Any, cluster: str) -> None:
    for job in jobs:
        print(f"job {job.job_id}: {need.nodes} × {need.tasks} ranks → {job.out}")
    out, err = jobs[-1].logs
    if cluster == "slurm":
        print(f"  queue:  squeue -j {jobs[0].job_id.split('_')[0]}")
    print(f"  output: tail -F {out}\n  errors: {err}", flush=True)


def _wait(jobs: Sequence[Any], cluster: str) -> "list[dict[str, Any] | UserError]":
    """The results in order; Ctrl-C leaves jobs on SLURM alone, and ends those on this machine."""
    results: list[dict[str, Any] | UserError] = []
    try:
        for job in jobs:
            try:
                results.append(job.result())
            except UserError as error:
                results.append(error)
    except KeyboardInterrupt:
        if cluster == "slurm":
            raise UserError("no longer waiting; the jobs go on (scancel ends them)") from None
        for job in jobs:
            job.cancel()
        raise
    return results


def _show(result: "dict[str, Any] | UserError") -> None:
    if isinstance(result, UserError):
        raise result
    if "zero_shot" in result:
        from mser_dist.evaluation.report import zero_shot_table

        tables.show(zero_shot_table(result["zero_shot"]))
        return
    val = ", ".join(f"{name} {value:.3f}" for name, value in result["validation"].items()) or "none"
    steps = tables.count(result["steps"], "step")
    print(f"stage {result['stage']}: {steps} in {result['seconds']:.0f} s; validation: {val}")
    print(f"  model: {result['out']}/export")


def _sync(options: argparse.Namespace) -> None:
    from mser_dist.runs.sync import sync

    for run in options.runs:
        print(sync(run, options.uri), flush=True)


def _doctor(options: argparse.Namespace) -> int:
    from mser_dist.jobs.doctor import run

    return int(run(options.out, not options.no_ranks, options.json))


def _requeue(options: argparse.Namespace) -> int:
    from mser_dist.config.file import load_any
    from mser_dist.jobs.requeue import requeue

    return int(requeue(options.code, Path(load_any(options.config, options.words).out), options.state))
