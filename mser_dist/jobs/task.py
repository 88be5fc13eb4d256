"""What every task of a submitted job runs: one rank of a training or an evaluation, put back in the queue when stopped.

submitit's own handler saves and requeues from within the signal, on rank 0 alone; a ZeRO save is a collective. So while
a training runs, the signal only raises a flag (`preempt.py`). Once all ranks have saved, rank 0 calls that handler.
"""

import atexit
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from mser_dist.config import Evaluation, Stage1, Stage2
from mser_dist.errors import Stopped, UserError
from mser_dist.quiet import hush
from mser_dist.ranks.preempt import SAVED, SIGNALS
from mser_dist.tables import show_what_can_be

_TRIES = 3  # starts without a step forward before the job leaves the queue
_PATIENCE = 5.0  # seconds that local peers of a failed rank get to end by themselves


class Task:
    """The callable that submitit pickles. Its state travels with the requeued job.

    stops: the step at which the first start began, and those at which each start was stopped.
    """

    def __init__(
        self,
        config: Stage1 | Stage2 | Evaluation,
        port: int = 0,
        threads: int = 1,
        *,
        then: Evaluation | None = None,
        sweep: str | None = None,
    ) -> None:
        """`port` and `threads` are for ranks on this machine: where they meet, and their share of its cores.

        then: an evaluation behind a training, by the same ranks. sweep: the folder of the sweep that it is a part of.
        """
        self.config, self.port, self.threads = config, port, threads
        self.then, self.sweep = then, sweep
        self.stops = [0]
        self._step: int | None = None  # at which this start was stopped

    def __call__(self) -> dict[str, Any] | None:
        """Run this rank to its end; rank 0 returns the summary of a training, or the report of an evaluation."""
        import submitit

        env = submitit.JobEnvironment()
        _clear_leftovers(env)
        if env.cluster == "local":
            self._place(env)
        hush()
        show_what_can_be()
        requeue = signal.getsignal(getattr(signal, f"SIG{env.USR_SIG}"))  # submitit's, from before the training's own
        try:
            try:
                result = self._run()
            except Stopped as stop:
                self._stopped(stop, env, requeue)
        except Exception as error:
            # submitit still has to write the error down. After it a normal exit would wait, in the process group's
            # destructor, for peers that are still at work.
            code = error.code if isinstance(error, UserError) else 1
            _keep_first(code, env)
            atexit.register(_fail, env, code)
            raise
        return result if env.global_rank == 0 else None

    def _place(self, env: Any) -> None:
        """What `torchrun` would set."""
        os.environ.update(
            RANK=str(env.global_rank),
            WORLD_SIZE=str(env.num_tasks),
            LOCAL_RANK=str(env.local_rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(self.port),
        )
        os.environ.setdefault("OMP_NUM_THREADS", str(self.threads))

    def _run(self) -> dict[str, Any]:
        from mser_dist.ranks import distributed

        result: dict[str, Any]
        if isinstance(self.config, Evaluation):
            from mser_dist.evaluation.evaluate import evaluate

            result = evaluate(self.config)
        else:
            from mser_dist.training.loop import train

            result = train(self.config)
            if self.then is not None:
                result = _evaluated(self.then, result)
        if self.sweep is not None and distributed.discover().is_main:
            _settle(Path(self.sweep))
        distributed.shutdown()
        return result

    def _stopped(self, stop: Stopped, env: Any, requeue: Any) -> NoReturn:
        """Every rank is here and has saved. Rank 0 puts the job back in the queue; no rank leaves a result behind."""
        for number in SIGNALS:  # submitit's own handler is back, and one more signal would requeue twice
            signal.signal(number, signal.SIG_IGN)
        self._step = stop.step
        print(f"mser: {stop}", flush=True)
        if env.global_rank:
            _leave(0)
        if env.cluster == "slurm" and (state := _queue_state(env.job_id)) != "RUNNING":
            # `scontrol requeue` would bring even a cancelled job back.
            print(f"mser: the job is {state}, so cancelled or over: it is not put back in the queue", flush=True)
            _leave(SAVED)
        if not callable(requeue):
            raise stop
        try:
            requeue(signal.SIGUSR2, None)  # which signal it was only shows in the log
        except SystemExit as end:  # locally with a code that submitit waits for, on SLURM with that of a crash
            _leave(SAVED if env.cluster == "slurm" or not isinstance(end.code, int) else end.code)
        raise RuntimeError("submitit's handler came back without having requeued the job")

    def checkpoint(self) -> Any:
        """What submitit asks for before it requeues; a signal during the start-up leads here without a save."""
        import submitit

        self.stops.append(self.stops[-1] if self._step is None else self._step)
        if len(self.stops) > _TRIES and len(set(self.stops[-_TRIES - 1 :])) == 1:
            raise UserError(
                f"{self.config.out}: {_TRIES} starts did not get beyond step {self.stops[-1]}, so the job ends: "
                "give it more time (--time), or a partition where it is left to run"
            )
        self._step = None
        return submitit.helpers.DelayedSubmission(self)


def _evaluated(config: Evaluation, summary: dict[str, Any]) -> dict[str, Any]:
    """Evaluate what has just been trained; the report, with the summary of the training. Collective."""
    import gc

    import torch

    from mser_dist.evaluation.evaluate import evaluate
    from mser_dist.files import read_json
    from mser_dist.ranks import distributed
    from mser_dist.runs import folder

    if distributed.agree(folder.evaluated(config, [Path(summary["out"])])):
        report: dict[str, Any] = read_json(Path(config.out) / "report.json")
    else:
        gc.collect()  # the engine, its optimizer and gradients, which refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        report = evaluate(config)
    return report | {"summary": summary}


def _settle(folder: Path) -> None:
    """Bring the table of the sweep up to date; whatever it does, the run is there."""
    from mser_dist.jobs.ranked import settle

    try:
        settle(folder)
    except Exception as error:
        print(f"mser: warning: the sweep in {folder} is not ranked yet: {error}", file=sys.stderr, flush=True)


def _clear_leftovers(env: Any) -> None:
    """What an earlier start of this job left: an old result, and half-written files, which block every later save."""
    paths = env.paths
    stale = [paths.result_pickle, paths.result_pickle.with_suffix(".pkl.save_tmp")]
    if env.global_rank == 0:
        stale.append(paths.submitted_pickle.with_suffix(".pkl.save_tmp"))
    for path in stale:
        path.unlink(missing_ok=True)


def _queue_state(job_id: str) -> str:
    """RUNNING, also in the grace time of a preemption; another word where the job was cancelled or is over."""
    command = ["squeue", "--noheader", f"--jobs={job_id}", "--states=all", "--format=%T"]
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=60, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "RUNNING"  # as far as this node can tell


def _keep_first(code: int, env: Any) -> None:
    """Leave the exit code of the first rank to fail for the job's script (`launch.py`), as slurm/task.sh does."""
    if env.cluster == "slurm":
        with suppress(OSError), (env.paths.folder / f"{env.raw_job_id}.code").open("x", encoding="ascii") as file:
            file.write(f"{code}\n")


def _fail(env: Any, code: int) -> NoReturn:
    """End a failed rank. SLURM then ends its peers; on one machine nobody else would."""
    if env.cluster == "local" and env.num_tasks > 1:
        import psutil

        peers = [child for child in psutil.Process(os.getppid()).children() if child.pid != os.getpid()]
        _, stuck = psutil.wait_procs(peers, timeout=_PATIENCE)
        for peer in stuck:
            peer.kill()
    _leave(code)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)
