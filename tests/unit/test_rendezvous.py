"""Ranks of one step find each other, whoever else sits on the ports."""

import multiprocessing
import os
import socket
import time
from multiprocessing.queues import Queue
from pathlib import Path

import pytest

from mser_dist.errors import UserError
from mser_dist.ranks import rendezvous
from mser_dist.ranks.distributed import free_port
from mser_dist.ranks.rendezvous import meet

# Torch is imported once, for all processes that these tests start.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mser_dist.ranks.rendezvous", "torch.distributed"])


def late(port: int) -> None:
    time.sleep(3)
    with meet(1, 2, "127.0.0.1", port, seconds=30):
        pass


def test_rank_0_waits_for_who_comes_late() -> None:
    """What is done within the block may return at once, as starting NCCL does."""
    port = free_port()
    process = CONTEXT.Process(target=late, args=(port,))
    process.start()
    with meet(0, 2, "127.0.0.1", port, seconds=60):
        pass
    process.join(60)
    assert process.exitcode == 0


def test_a_rank_that_never_comes_is_an_error() -> None:
    with pytest.raises(UserError, match="1 of 2 ranks did not come"), meet(0, 2, "127.0.0.1", free_port(), seconds=1):
        pass


def join(rank: int, job: str, port: int, found: "Queue[tuple[str, int, str]]") -> None:
    os.environ.update(SLURM_JOB_ID=job, SLURM_STEP_ID="0")
    with meet(rank, 2, "127.0.0.1", port, seconds=60) as store:
        store.set(f"rank {rank}", job)
        found.put((job, rank, store.get(f"rank {1 - rank}").decode()))
        if rank:
            store.set("done", "")  # is not answered
        else:
            store.wait(["done"])  # whose process holds the store goes last


def test_two_jobs_that_begin_at_one_port_do_not_meet() -> None:
    """The port itself is held by something that accepts and never says a word."""
    found: Queue[tuple[str, int, str]] = CONTEXT.Queue()
    with socket.create_server(("", 0)) as silent:
        port = silent.getsockname()[1]
        ranks = [CONTEXT.Process(target=join, args=(r, job, port, found)) for job in ("7", "8") for r in (1, 0)]
        for process in ranks:
            process.start()
        answers = sorted(found.get(timeout=90) for _ in ranks)
        for process in ranks:
            process.join(30)
    assert answers == [("7", 0, "7"), ("7", 1, "7"), ("8", 0, "8"), ("8", 1, "8")]
    assert [process.exitcode for process in ranks] == [0] * 4


def test_nobody_there_is_an_error_that_says_what_to_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"rank 1 did not find rank 0 at 127.0.0.1 in 1 s: .*MASTER_ADDR"),
        meet(1, 2, "127.0.0.1", free_port(), seconds=1),
    ):
        pass


def test_no_free_port_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_DOORS", 1)
    with (
        socket.create_server(("", 0)) as taken,
        pytest.raises(UserError, match="set MASTER_PORT"),
        meet(0, 2, "127.0.0.1", taken.getsockname()[1]),
    ):
        pass
