"""Several light processes at one store: what they decide between two steps, and who is missed when clocks differ."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytest

from mser_dist.errors import UserError
from mser_dist.ranks import boundary, distributed
from mser_dist.ranks.boundary import Boundary
from mser_dist.ranks.distributed import World, free_port
from mser_dist.ranks.limits import check_files
from mser_dist.ranks.preempt import Flag
from mser_dist.ranks.watchdog import LOST, Watchdog

ROOT = Path(__file__).parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mser_dist.ranks.boundary", "mser_dist.ranks.watchdog", "torch.distributed"])


class Saves:
    """Saves whose parts are written by hand."""

    def __init__(self) -> None:
        self.seconds, self.written, self.failed = 0.0, True, False
        self.settled: list[bool] = []

    def settle(self, ready: bool) -> None:
        self.settled.append(ready)

    def finish(self) -> None:
        raise UserError("a part could not be written")


def decide(rank: int, ranks: int, port: int, spacing: float, step_together: Any, found: "Queue[Any]") -> None:
    boundary.SPACING = spacing
    distributed.join_store(World(rank, ranks, rank, "127.0.0.1", port, "torchrun"), 60)
    saves, flag = Saves(), Flag()
    one = Boundary(flag, saves, save_minutes=0.0, ends=None, is_main=rank == 0)
    stopped = seen = failed = None
    for step in range(100):
        time.sleep(0.01)
        step_together.wait(30)  # as a training's collectives make them
        if step == 5:
            saves.written = False
            one.saved()
        if step == 7 + rank:  # one after the other
            saves.written = True
        if step == 40 and rank == ranks - 1:
            flag.number = signal.SIGUSR2
        if step == 75 and rank == 1:
            saves.failed = True
        before = len(saves.settled)
        try:
            one.poll()
        except UserError:
            failed = step
            break
        if seen is None and step > 5 and any(saves.settled[before:]):
            seen = step
        stopped = stopped or (one.stop and (step, one.stop))
    found.put((rank, seen, stopped, failed))
    distributed.store().to_main(None)


@pytest.mark.parametrize("spacing", [0.0, 0.005])
def test_what_one_rank_is_told_all_do_behind_the_same_step(spacing: float) -> None:
    ranks, port = 4, free_port()
    found: Queue[Any] = CONTEXT.Queue()
    together = CONTEXT.Barrier(ranks)
    processes = [CONTEXT.Process(target=decide, args=(r, ranks, port, spacing, together, found)) for r in range(ranks)]
    for process in processes:
        process.start()
    answers = sorted(found.get(timeout=100) for _ in processes)
    for process in processes:
        process.join(30)
    assert len({answer[1:] for answer in answers}) == 1, "all at the same step"
    _, written, (step, name), failed = answers[0]
    assert 10 <= written < 40, "not before the last has written its part"
    assert 40 <= step < 75 and name == "SIGUSR2" and failed >= 75
    if not spacing:
        assert step <= 41 and failed <= 76, "at most one step late where every step is asked about"


def watched(rank: int, ranks: int, port: int, ahead: float, said: str, found: "Queue[Any]") -> None:
    sys.stderr = Path(said).open("a", encoding="utf-8")  # noqa: SIM115  the process ends without closing it
    if rank == 1:  # this node's clock is off, and is set back and forth while the job runs
        plain, began = time.time, time.monotonic()
        time.time = lambda: plain() + (ahead if int(time.monotonic() - began) % 2 else -ahead)
    distributed.join_store(World(rank, ranks, rank, "127.0.0.1", port, "torchrun"), 60)
    dog = Watchdog(World(rank, ranks, rank, "127.0.0.1", port, "torchrun"), silence=3.0, stall=600.0)
    with dog.watch():
        for step in range(6):
            time.sleep(1)
            dog.tick(f"step {step}")
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        found.put(rank)
        time.sleep(60)


def test_a_clock_that_is_off_by_a_minute_names_nobody_and_a_dead_rank_is_named(
    tmp_path: Path,
) -> None:
    port = free_port()
    found: Queue[Any] = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=watched, args=(rank, 3, port, 60.0, str(tmp_path / "said"), found)) for rank in range(3)
    ]
    for process in processes:
        process.start()
    assert sorted(found.get(timeout=90) for _ in range(2)) == [0, 1], "twice as long as its silence may be"
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [LOST, LOST, -signal.SIGKILL]
    assert (tmp_path / "said").read_text(encoding="utf-8").count("rank 2 on ") == 2


def test_a_limit_on_files_is_raised_and_one_that_is_too_low_is_said_before_it_breaks() -> None:
    code = (
        "import resource, sys\n"
        "from mser_dist.ranks.limits import check_files, raise_limit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[1])))\n"
        "check_files(12, serves=True, mesh=False)\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    run = lambda limit: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code, str(limit)], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert run(1024).stdout.strip() == "(1024, 1024)"
    refused = run(48 + 16).stderr.splitlines()[-1]
    assert "12 ranks need up to 216 open files in one process, and 64 are allowed" in refused
    assert "LimitNOFILE" in refused and "start 1 rank at most" in refused
    check_files(1024, serves=True, mesh=False, limit=4096)
    check_files(1, serves=True, mesh=True, limit=64)
    with pytest.raises(UserError, match="start 416 ranks at most"):
        check_files(1024, serves=True, mesh=False, limit=1024)
