"""Where the ranks of a SLURM step meet: a port that no two jobs can share.

Every rank knows the address of rank 0, but a port that they compute from the job's number may be taken there, by
another job or any program. So rank 0's store takes whatever port is free, and rank 0 tells it at a door: the first free
port of a list that follows from the job and step. The others try the list, again and again, until a door names their
own job.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mser_dist.errors import PassingError, UserError

_DOORS = 32  # ports in the list


@contextmanager
def meet(rank: int, ranks: int, host: str, port: int, seconds: float = 600.0) -> Iterator[Any]:
    """Rank 0's `TCPStore`, for `torch.distributed.init_process_group` within the block.

    `host` is where rank 0 is, `port` where the list of doors begins. Raises `UserError` after `seconds`, or when every
    port of the list is taken.
    """
    from torch.distributed import TCPStore

    # A requeued job has the same id, while ranks of its last start may still be about.
    job = "/".join(os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    doors = [1024 + (port - 1024 + 97 * i) % (65536 - 1024) for i in range(_DOORS)]
    if rank:
        store = TCPStore(host, _ask(rank, host, doors, job, seconds), is_master=False)
        store.add("arrived", 1)
        yield store
        return
    store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
    with _open(doors) as door:
        sign = json.dumps({"mser": job, "port": store.port}).encode()
        threading.Thread(target=_answer, args=(door, sign), daemon=True).start()
        # Starting a process group does not wait for the others under NCCL: the door stays open until all have come.
        deadline = time.monotonic() + seconds
        while (missing := ranks - 1 - store.add("arrived", 0)) > 0:
            if time.monotonic() > deadline:
                raise UserError(f"{missing} of {ranks} ranks did not come to {host} in {seconds:.0f} s: see their log")
            time.sleep(0.05)
        door.shutdown(socket.SHUT_RDWR)  # wakes the thread
    yield store


def _open(doors: list[int]) -> socket.socket:
    for port in doors:
        with suppress(OSError):  # taken
            return socket.create_server(("", port), backlog=1024)
    raise UserError(f"none of {_DOORS} ports from {doors[0]} on is free on {socket.gethostname()}: set MASTER_PORT")


def _answer(door: socket.socket, sign: bytes) -> None:
    with suppress(OSError):  # the door was closed
        while True:
            guest, _ = door.accept()
            with guest, suppress(OSError):
                guest.sendall(sign)


def _ask(rank: int, host: str, doors: list[int], job: str, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for port in doors:
            # What is no door of ours refuses, says something else, or says nothing.
            with (
                suppress(OSError, ValueError, TypeError, KeyError),
                socket.create_connection((host, port), timeout=2) as door,
            ):
                sign = json.loads(door.makefile("rb").read(4096))
                if sign["mser"] == job:
                    return int(sign["port"])
        time.sleep(0.5)
    raise PassingError(
        f"rank {rank} did not find rank 0 at {host} in {seconds:.0f} s: check "
        "that every rank started, and that the address is reachable; if it is not, set MASTER_ADDR"
    )
