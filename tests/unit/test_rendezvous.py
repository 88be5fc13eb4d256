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
from mser_dist.ranks.rendezvous import meet, meet_at
from mser_dist.ranks.store import Server, Store

# Torch is imported once, for all processes that these tests start.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mser_dist.ranks.rendezvous", "torch.distributed"])


def late(port: int) -> None:
    time.sleep(3)
    meet(1, 2, "127.0.0.1", port, seconds=30)


def test_rank_0_waits_for_who_comes_late() -> None:
    """What is done within the block may return at once, as starting NCCL does."""
    port = free_port()
    process = CONTEXT.Process(target=late, args=(port,))
    process.start()
    _, server = meet(0, 2, "127.0.0.1", port, seconds=60)
    process.join(60)
    assert server and process.exitcode == 0
    server.stop()


def hear(rank: int, ranks: int, port: int, seconds: float, found: "Queue[str]") -> None:
    try:
        meet_at(rank, ranks, "127.0.0.1", port, seconds)
    except UserError as error:
        found.put(f"{error.code} {error}")


def test_ranks_that_never_come_are_named_to_all_that_have() -> None:
    found: Queue[str] = CONTEXT.Queue()
    port = free_port()
    other = CONTEXT.Process(target=hear, args=(2, 4, port, 30, found))
    other.start()
    with pytest.raises(
        UserError, match=r"^ranks 1, 3 of 4 did not come to 127.0.0.1:\d+ in 8 s: see their log$"
    ) as error:
        meet_at(0, 4, "127.0.0.1", port, seconds=8)
    assert found.get(timeout=30) == f"1 {error.value}"
    other.join()
    with pytest.raises(UserError, match=r"rank 1 of 2 did not come to 127.0.0.1 in 1 s"):
        meet(0, 2, "127.0.0.1", free_port(), seconds=1)


def test_a_port_that_is_taken_is_said() -> None:
    with (
        socket.create_server(("", 0)) as taken,
        pytest.raises(UserError, match=r"no store can be served at port \d+ of .*another MASTER_PORT"),
    ):
        Server(taken.getsockname()[1])


def talk(rank: int, port: int, found: "Queue[tuple[int, object, object, object]]") -> None:
    store = Store(meet_at(rank, 3, "127.0.0.1", port, 30)[0], rank, 3)
    gathered = store.to_main({"rank": rank})
    own = store.from_main([["zero"], ["one"], None] if rank == 0 else None)
    found.put((rank, gathered, own, store.agree([rank])))
    store.to_main(None)  # rank 0, which serves it, goes last


def test_values_go_to_rank_0_and_from_it_alone() -> None:
    found: Queue[tuple[int, object, object, object]] = CONTEXT.Queue()
    port = free_port()
    ranks = [CONTEXT.Process(target=talk, args=(rank, port, found)) for rank in range(3)]
    for process in ranks:
        process.start()
    answers = sorted((found.get(timeout=60) for _ in ranks), key=lambda one: one[0])
    for process in ranks:
        process.join(30)
    everyone = [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert answers == [(0, everyone, ["zero"], [0]), (1, None, ["one"], [0]), (2, None, None, [0])]


def join(rank: int, job: str, port: int, found: "Queue[tuple[str, int, str]]") -> None:
    os.environ.update(SLURM_JOB_ID=job, SLURM_STEP_ID="0")
    store, _ = meet(rank, 2, "127.0.0.1", port, seconds=60)
    store.set(f"rank {rank}", job)
    found.put((job, rank, store.get(f"rank {1 - rank}").decode()))
    if rank:
        store.set("done", "")  # is not answered
    else:
        store.wait(["done"])  # whose process serves the store goes last


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
    with pytest.raises(UserError, match=r"rank 1 did not find rank 0 at 127.0.0.1 in 1 s: .*MASTER_ADDR"):
        meet(1, 2, "127.0.0.1", free_port(), seconds=1)


def test_no_free_port_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_DOORS", 1)
    with (
        socket.create_server(("", 0)) as taken,
        pytest.raises(UserError, match="set MASTER_PORT"),
    ):
        meet(0, 2, "127.0.0.1", taken.getsockname()[1])
