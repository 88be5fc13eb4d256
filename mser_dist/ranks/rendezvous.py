"""Where the ranks of a job meet: at one store, and in a SLURM step at a port that no two jobs can share.

A launcher such as torchrun names the store's port, or serves it itself. In a SLURM step every rank knows the address of
rank 0, but a port that they compute from the job's number may be taken there, by another job or any program. So the
store takes whatever port is free, and rank 0 tells it at a door: the first free port of a list that follows from the
job and step. The others try the list, again and again, until a door names their own job.
"""

import itertools
import json
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from mser_dist.errors import PassingError, UserError
from mser_dist.ranks.store import Server, all_here

_DOORS = 32  # ports in the list
_MEETINGS = itertools.count()  # of this process, which are the same on every rank


def served_by_agent() -> bool:
    """Whether the launcher serves the store itself, as torchrun does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def meet(
    rank: int, ranks: int, host: str, port: int, seconds: float = 600.0, patience: float = 1800.0
) -> tuple[Any, Server | None]:
    """The job's `TCPStore` once every rank of the SLURM step has come, and on rank 0 what serves it.

    `host` is where rank 0 is, `port` where the list of doors begins. patience: seconds that a request to the store may
    take later, one that waits for rank 0 among them. Raises `UserError` after `seconds`, which names
    who did not come, or when every port of the list is taken.
    """
    from torch.distributed import TCPStore

    # A requeued job has the same id, while ranks of its last start may still be about.
    job = "/".join(os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    doors = [1024 + (port - 1024 + 97 * i) % (65536 - 1024) for i in range(_DOORS)]
    limit = timedelta(seconds=patience)
    if rank:
        client = TCPStore(host, _ask(rank, host, doors, job, seconds), is_master=False, timeout=limit)
        all_here(client, rank, ranks, seconds, host)
        return client, None
    server = Server()
    try:
        with _open(doors) as door:
            sign = json.dumps({"mser": job, "port": server.port}).encode()
            threading.Thread(target=_answer, args=(door, sign), daemon=True).start()
            client = TCPStore("127.0.0.1", server.port, is_master=False, timeout=limit)
            all_here(client, rank, ranks, seconds, host)  # the door stays open until all have come
            door.shutdown(socket.SHUT_RDWR)  # wakes the thread
    except BaseException:
        server.stop()
        raise
    return client, server


def meet_at(rank: int, ranks: int, host: str, port: int, seconds: float) -> tuple[Any, Server | None]:
    """The same where the launcher has named a port of rank 0's machine; or, as torchrun does, serves the store."""
    from torch.distributed import PrefixStore, TCPStore

    limit = timedelta(seconds=seconds)
    if served_by_agent():
        client = TCPStore(host, port, is_master=False, timeout=limit)
        # It outlives a start of the ranks, and a training in them: what those have left there is not for this one.
        start = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_MEETINGS)}"
        return PrefixStore(f"mser/{start}", client), None
    server = None if rank else Server(port)
    try:
        client = TCPStore(host if rank else "127.0.0.1", port, is_master=False, timeout=limit)
        all_here(client, rank, ranks, seconds, f"{host}:{port}")
    except BaseException:
        if server:
            server.stop()
        raise
    return client, server


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
