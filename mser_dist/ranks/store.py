"""The one key-value store of a job: who serves it, and small values that go between rank 0 and each other rank.

A `TCPStore` is one server with a connection to each client. Every rank needs one (the process group meets over it) and
a second, for a thread beside a main thread that waits (`clone`): 2 N sockets at the server, which cannot be fewer as
long as torch's store is one server. They are in a process of their own beside rank 0, so that no rank has more sockets
than another, at any N. Values go from rank 0 and to rank 0 alone: no rank's messages or memory grow with N but rank
0's, which has to know what all have written.
"""

import gc
import json
import os
import select
import signal
import socket
import time
import warnings
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from mser_dist.errors import PassingError
from mser_dist.ranks.preempt import SIGNALS

_PATIENCE = (5.0, 10.0, 20.0)  # seconds for a forked process to begin, see `stream.workers`
_SHOWN = 8  # ranks that an error names


class Server:
    """A `TCPStore`'s server at `port` (0: any that is free) of this machine, until `stop` or this process' end."""

    def __init__(self, port: int = 0) -> None:
        for seconds in _PATIENCE:
            reading, writing = os.pipe()
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until it ignores them
            parent = os.getpid()
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # Python 3.12 warns of threads
                self._process = os.fork()  # another import of torch would take seconds
            if not self._process:
                _serve(writing, port, parent)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(writing)
            there = select.select([reading], [], [], seconds)[0]
            answer = os.read(reading, 4096).decode() if there else ""
            os.close(reading)
            if answer.isdecimal():
                self.port = int(answer)
                return
            self.stop()
            if answer:
                break
        raise PassingError(
            f"no store can be served at port {port or 'any'} of {socket.gethostname()} ({answer or 'no answer'}): "
            "start again, with another MASTER_PORT where the launcher sets it"
        )

    def stop(self) -> None:
        with suppress(ChildProcessError, ProcessLookupError):  # somebody has waited for all children
            os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)


def _serve(channel: int, port: int, parent: int) -> NoReturn:
    try:
        for number in SIGNALS:  # a scheduler sends them to every process of a step
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        _let_go(channel)
        from torch.distributed import TCPStore

        server = TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False)
        os.write(channel, str(server.port).encode())
        while os.getppid() == parent:
            time.sleep(0.2)
    except Exception as error:
        os.write(channel, (str(error).splitlines() or [type(error).__name__])[0].encode()[:4096])
    finally:
        os._exit(0)  # what the parent does at its own end is not done here


def _let_go(channel: int) -> None:
    """Of all that the rank has open but `channel`: for a moment this process outlives the rank, and its log, sockets
    and devices shall be free when the rank has ended.
    """
    gc.freeze()  # what would close a number that is given to another by then
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    for number in [int(path.name) for path in Path("/dev/fd").iterdir()]:
        if number > 2 and number != channel:
            with suppress(OSError):  # the listing's own
                os.close(number)


class Store:
    """This rank's connection. Every rank makes the same calls in the same order; values are JSON."""

    def __init__(self, client: Any, rank: int, ranks: int) -> None:
        self.client = client
        self.rank, self.ranks = rank, ranks
        self._calls = 0

    def clone(self, seconds: float) -> Any:
        """A second connection, for a thread: one that waits in the first holds it. seconds: of its time-out."""
        client = self.client.clone()
        client.set_timeout(timedelta(seconds=seconds))
        return client

    def to_main(self, value: Any) -> list[Any] | None:
        """Every rank's value in rank order, on rank 0; None elsewhere, which do not wait."""
        name = self._name()
        if self.rank:
            self.client.set(f"{name}/{self.rank}", json.dumps(value))
            return None
        keys = [f"{name}/{rank}" for rank in range(1, self.ranks)]
        found = [value, *map(json.loads, self.client.multi_get(keys) if keys else [])]
        for key in keys:
            self.client.delete_key(key)
        return found

    def from_main(self, values: list[Any] | None) -> Any:
        """Rank 0's `values[rank]`, on each rank."""
        name = self._name()
        if self.rank == 0:
            assert values is not None and len(values) == self.ranks
            keys = [f"{name}/{rank}" for rank in range(1, self.ranks)]
            if keys:
                self.client.multi_set(keys, list(map(json.dumps, values[1:])))
            return values[0]
        key = f"{name}/{self.rank}"
        value = json.loads(self.client.get(key))
        self.client.delete_key(key)
        return value

    def agree(self, value: Any) -> Any:
        """Rank 0's value on every rank: one request each, where there is no process group to hand it on."""
        name = self._name()
        if self.ranks == 1:
            return value
        if self.rank == 0:
            self.client.set(name, json.dumps(value))
            return value
        return json.loads(self.client.get(name))

    def _name(self) -> str:
        self._calls += 1
        return f"mser/{self._calls}"


def all_here(client: Any, rank: int, ranks: int, seconds: float, where: str) -> None:
    """Wait until every rank has come. Raises `PassingError`, on those that have, with the ranks that did not.

    where: the address that they were to come to.
    """
    client.set(f"here/{rank}", socket.gethostname())
    client.add("here", 1)
    if rank:
        client.wait(["all here"], timedelta(seconds=seconds + 60))  # rank 0 may have begun to wait later
        problem = client.get("all here").decode()
        client.add("heard", 1)
    else:
        deadline = time.monotonic() + seconds  # of this machine: no two nodes' clocks are compared
        while client.add("here", 0) < ranks and time.monotonic() < deadline:
            time.sleep(0.02)
        problem, away = "", list[int]()
        if client.add("here", 0) < ranks:
            away = [one for one in range(ranks) if not client.check([f"here/{one}"])]
            problem = f"{named(away)} of {ranks} did not come to {where} in {seconds:.0f} s: see their log"
        client.set("all here", problem)
        deadline = time.monotonic() + 5  # what serves the store ends with this rank
        while problem and client.add("heard", 0) < ranks - 1 - len(away) and time.monotonic() < deadline:
            time.sleep(0.02)
    if problem:
        raise PassingError(problem)


def named(ranks: list[int]) -> str:
    """Some ranks, for a message."""
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:_SHOWN]))}{more}"
