"""Processes that begin with the imports done: forks of one that has made them once.

A rank imports for 5 to 10 s of CPU, which the tests would pay some two hundred times. A command that is started here is
`mser_dist.cli.main.main` as ever, with its own environment, folder, output, signals and exit code; its ranks are forks
too. What is about a process' beginning, or needs variables that are read then, is started by `subprocess`.
"""

import atexit
import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn

from mser_dist.ranks import preempt

# What the commands of the tests import.
IMPORTED = ["mser_dist.training.loop", "mser_dist.evaluation.evaluate", "deepspeed.runtime.engine", "peft"]
IMPORTED += ["deepspeed.runtime.zero.muon.original_muon", "transformers.trainer_utils", "matplotlib.figure"]
IMPORTED += ["mlflow.store.tracking.sqlalchemy_store"]
# What does to a rank what a drill says: where processes begin with Python itself, it finds this by PYTHONPATH.
INJECTED = Path(__file__).parent / "faults/inject/sitecustomize.py"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_WITH_THREADS = ("demo", "folds")  # commands that compute and track themselves, and start ranks
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
CONTEXT = multiprocessing.get_context("forkserver")
multiprocessing.set_forkserver_preload(IMPORTED)


class Command:
    """``mser WORDS``, with what the tests use of a `subprocess.Popen`."""

    def __init__(self, words: Sequence[str], cwd: Path, env: Mapping[str, str]) -> None:
        self._said = [tempfile.NamedTemporaryFile(prefix="mser-said-") for _ in range(2)]  # noqa: SIM115  by `__del__`
        names = [file.name for file in self._said]
        self._process = CONTEXT.Process(target=_command, args=(list(words), str(cwd), dict(env), names))
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired("mser", timeout or 0.0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, error = (Path(file.name).read_text(encoding="utf-8", errors="replace") for file in self._said)
        return out, error

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Rank:
    """One rank, with what `local_ranks` uses of a `subprocess.Popen`."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        stdout: IO[bytes] | None,
        stderr: IO[bytes] | None,
        preexec_fn: Callable[[], None] | None,
    ) -> None:
        assert command[1:3] == ["-m", "mser_dist"] and stdout is stderr, "started otherwise than by local_ranks"
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        said = [stdout.fileno()] * 2 if stdout is not None else [1, 2]
        if _nursery is not None:
            socket.send_fds(_nursery, [pickle.dumps((command[3:], dict(env)))], said)
            self.pid = int(_nursery.recv(20))
            return
        self.pid = os.fork()
        if self.pid == 0:
            for number in _SIGNALS:  # the launcher's
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            preempt._listening = None
            if preexec_fn is not None:
                preexec_fn()
            _become(command[3:], env, said)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("mser", timeout or 0.0)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


_nursery: socket.socket | None = None


def _begin_nursery() -> socket.socket:
    """A process that forks the ranks of this one, and has none of the threads that this one will have.

    What is forked while another thread holds a lock, of MLflow's or of OpenMP's, waits for it for ever. The ranks are
    this process' children all the same.
    """
    system, launcher = ctypes.CDLL(None), os.getpid()
    system.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        return ours
    ours.close()
    for number in (signal.SIGINT, *_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    while True:
        asked, said, _, _ = socket.recv_fds(theirs, 1 << 20, 2)
        if not asked:
            os._exit(0)
        if between := os.fork():
            os.waitpid(between, 0)
            for file in said:
                os.close(file)
            continue
        if os.fork():
            os._exit(0)
        while os.getppid() != launcher:
            time.sleep(0.001)
        system.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # as `local_ranks` has it
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        theirs.send(str(os.getpid()).encode())
        theirs.close()
        words, env = pickle.loads(asked)
        _become(words, env, said)


def _command(words: list[str], cwd: str, env: dict[str, str], names: list[str]) -> NoReturn:
    global _nursery
    from mser_dist.jobs import local_ranks

    os.chdir(cwd)
    if words[0] in _WITH_THREADS:
        _nursery = _begin_nursery()
    forks: Any = SimpleNamespace(Popen=_Rank, TimeoutExpired=subprocess.TimeoutExpired)
    local_ranks.subprocess = forks  # in this process alone
    _become(words, env, [os.open(name, os.O_WRONLY) for name in names])


def _become(words: Sequence[str], env: Mapping[str, str], said: Sequence[int]) -> NoReturn:
    """What ``python -m mser_dist WORDS`` does, writing to the two files `said`, from its first line to its end."""
    import torch

    from mser_dist.cli.main import main

    os.environ.clear()
    os.environ.update(env)
    for number, file in zip((1, 2), said, strict=True):
        os.dup2(file, number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    faulthandler.enable()
    sys.argv = ["mser", *words]
    if "MSER_DRILL" in env:
        runpy.run_path(str(INJECTED))
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    try:
        code = main()
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = 1
    ending: Any = threading
    ending._shutdown()  # waits for other threads, as the interpreter does at its end
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
