"""Start several ranks of one command on this machine, as `torchrun` does, with the command's own exit code and errors.

A rank's error line reaches the terminal once, the others are ended, and nothing is left behind. Where this process is
killed itself, its ranks are asked to save and stop.
"""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import IO

from mser_dist.ranks.distributed import free_port
from mser_dist.ranks.preempt import SAVED

_GRACE = 5.0  # seconds between TERM and KILL, once a rank has failed
_PR_SET_PDEATHSIG = 1  # prctl(2): a signal for this process when its parent dies
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def local(ranks: int, arguments: Sequence[str]) -> int:
    """Run ``mser ARGUMENTS`` as `ranks` processes that know each other; returns 0, or the first failure's exit code.

    Rank 0 writes to this terminal; of the other ranks, what they wrote is shown only if one of them fails first.
    TERM, INT, USR1 and USR2 are handed on to the ranks, which save and stop by themselves, and are waited for.
    """
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared = {**place, "PYTHONUNBUFFERED": "1"}
    # Threads of all ranks together should not outnumber the cores.
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // ranks))
    processes: list[subprocess.Popen[bytes]] = []
    quiet: list[IO[bytes]] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        # The ranks have a Ctrl-C of the terminal already, and a second one would end them without a save.
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    following = _stop_with_parent()
    before = {number: signal.signal(number, hand_on) for number in _FORWARDED}
    try:
        for rank in range(ranks):
            env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            log: IO[bytes] | None = None
            if rank:
                log = tempfile.TemporaryFile()  # noqa: SIM115  closed in `finally`
                quiet.append(log)
            command = [sys.executable, "-m", "mser_dist", *arguments]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, preexec_fn=following))
        code, failed = _wait(processes)
        if code == SAVED:  # so do the others, a moment later
            _wait_for_all(processes, 30.0)
        _end(processes)
        # Rank 0 speaks for itself; with code 2 it has said, a moment later, what is wrong on every rank.
        if failed and code != SAVED and processes[0].returncode != 2:
            sys.stderr.write(_tail(quiet[failed - 1]))
        if code > 128:
            with suppress(ValueError):  # an exit code of its own
                sys.stderr.write(f"mser: rank {failed} was ended by {signal.Signals(code - 128).name}\n")
        return code
    finally:
        _end(processes)
        for file in quiet:
            file.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_with_parent() -> Callable[[], None] | None:
    """What a rank does before it begins, so that it has TERM when this process dies. Linux alone has that."""
    if sys.platform != "linux":
        return None
    system, parent = ctypes.CDLL(None), os.getpid()

    def ask() -> None:
        system.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return ask


def _wait(processes: list[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """(exit code, rank) of the first rank to fail, or (0, 0) when all have ended well."""
    running = dict(enumerate(processes))
    while running:
        for rank, process in list(running.items()):
            code = process.poll()
            if code:
                return (128 - code if code < 0 else code), rank  # killed by signal n: 128 + n, as shells say
            if code == 0:
                del running[rank]
        time.sleep(0.1)
    return 0, 0


def _wait_for_all(processes: list[subprocess.Popen[bytes]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + _GRACE
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _tail(log: IO[bytes], size: int = 8000) -> str:
    """The last of what a quiet rank wrote: its error line, if it has one, else all of the tail."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - size))
    text = log.read().decode("utf-8", "replace")
    errors = [line for line in text.splitlines() if line.startswith("mser: error")]
    return (errors[-1] + "\n") if errors and "Traceback" not in text else text
