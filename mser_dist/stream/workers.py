"""Processes that work ahead of a loop: requests go out to them in turn, the answers come back in that order.

A message is a nameless file in memory, whose descriptor goes through a socket with one byte. So sending waits for
nobody, a process that is killed while it sends leaves nothing half-sent, and who receives an answer maps its arrays
instead of copying them; the memory is given back with the last of them.

A worker ignores signals, which the process that started it alone answers to, and dies with the thread that did.

A process that has threads is forked here, of which the new one has a copy of each lock, held or not, and none of their
holders: it may stand still before it has begun. (Measured: one of about a thousand forks behind a collective, in
CPython's own part of `fork`, whose lock gloo's threads take to let go of a tensor.) So a worker says that it is there,
and one that does not is killed and forked anew.
"""

import atexit
import ctypes
import errno
import gc
import io
import itertools
import mmap
import multiprocessing
import os
import pickle
import select
import signal
import socket
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mser_dist.errors import UserError

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # prctl(2): a signal for this process when its parent dies
_PR_SET_NAME = 15  # what ps and top show: at most 15 bytes
_NAME = b"mser_worker"
_ALIGN = 64  # bytes: no vector instruction asks for more
_PATIENCE = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds for a worker to be there, try after try; it takes milliseconds
_SMALL = 4096  # bytes: a smaller array is copied, for who keeps a batch's labels should not keep its speech with them

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class DeadWorkerError(Exception):
    """A worker is gone: its number, and its exit code (a signal's number, negative; None where nobody can tell)."""

    def __init__(self, number: int, code: int | None) -> None:
        killed = code is not None and code < 0
        super().__init__(f"signal {signal.Signals(-code).name}" if killed and code else f"exit code {code}")
        self.number = number
        self.code = code


def answers_ahead(
    jobs: Sequence[Callable[[Request], Answer]], requests: Iterable[Request], ahead: int
) -> Generator[Answer, None, None]:
    """The answers to `requests`, in order, from a process for each job: request n goes to job n % len(jobs).

    At most `ahead` requests a job are under way. To close the generator kills the processes, whatever they are at.
    Draws nothing from any global random generator, and a job should not: each process has a copy of the same.

    Raises the `UserError` that a job raised, `RuntimeError` with the traceback of any other exception, and
    `DeadWorkerError`, each when it is the turn of that request.
    """
    import torch  # noqa: F401  # once, here, and not in each process

    workers: list[_Worker] = []
    stop = partial(_kill, workers)
    atexit.register(stop)  # before multiprocessing's own, which asks them to end by a signal that they ignore
    try:
        for job in jobs:
            workers.append(_Worker(job, workers))
        under_way: deque[_Worker] = deque()
        for request, worker in zip(requests, itertools.cycle(workers), strict=False):
            full = len(under_way) == ahead * len(workers)
            ready = [under_way.popleft().answer()] if full else []
            worker.ask(request)  # before the answer is used, which may take its time
            under_way.append(worker)
            yield from ready
        for worker in under_way:
            yield worker.answer()
    finally:
        stop()
        atexit.unregister(stop)


def _kill(workers: "list[_Worker]") -> None:
    for worker in workers:
        worker.process.kill()  # all, before one is waited for
    for worker in workers:
        worker.end()


class _Worker:
    """A process that answers the requests of this one with `job`."""

    def __init__(self, job: Callable[[Any], Any], others: "Sequence[_Worker]") -> None:
        self.number = len(others)
        for seconds in _PATIENCE:
            self._fork(job, others)
            if select.select([self.channel], [], [], seconds)[0]:
                self.channel.recv(1)  # nothing, where it has died already: the first request finds that out
                return
            self.end()
        raise RuntimeError(f"no data worker starts: {len(_PATIENCE)} forked processes stood still at once")

    def _fork(self, job: Callable[[Any], Any], others: "Sequence[_Worker]") -> None:
        self.channel, theirs = socket.socketpair()
        ours = [self.channel, *(other.channel for other in others)]
        context = multiprocessing.get_context("fork")  # nothing of a job is copied
        self.process = context.Process(target=_work, args=(job, theirs, ours, os.getpid()), daemon=True)
        with theirs, _blocked_signals():
            self.process.start()

    def end(self) -> None:
        """Kill the process, whatever it is at."""
        self.process.kill()
        self.process.join()
        self.channel.close()

    def ask(self, request: Any) -> None:
        try:
            _send(self.channel, _message(request))
        except ConnectionError:
            raise self._death() from None

    def answer(self) -> Any:
        try:
            answer = _receive(self.channel)
        except (EOFError, ConnectionError):
            raise self._death() from None
        if isinstance(answer, _Failure):
            raise answer.error
        return answer

    def _death(self) -> DeadWorkerError:
        self.process.join(10.0)  # its end of the socket is closed a moment before it can be waited for
        return DeadWorkerError(self.number, self.process.exitcode)


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """A process started in here inherits that, so none of these signals reaches it before it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- in the worker


@dataclass(frozen=True)
class _Failure:
    error: Exception


def _work(job: Callable[[Any], Any], channel: socket.socket, foreign: Sequence[socket.socket], parent: int) -> None:
    """Answer requests until nobody can ask. Ends the process: what the parent does at its own end is not done here."""
    try:
        _settle(foreign, parent)
        channel.send(b"\0")
        while True:
            _send(channel, _answer(job, _receive(channel)))
    except (EOFError, ConnectionError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _settle(foreign: Sequence[socket.socket], parent: int) -> None:
    import torch

    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
    if sys.platform == "linux":
        process = ctypes.CDLL(None)
        process.prctl(_PR_SET_NAME, _NAME)
        process.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
    for channel in foreign:
        channel.close()  # the parent's ends: while one is open here, its other side would not see that the parent died
    gc.freeze()  # what came from the parent is not looked through: that would copy its memory, page by page
    torch.set_num_threads(1)


def _answer(job: Callable[[Any], Any], request: Any) -> IO[bytes]:
    try:
        return _message(job(request))
    except UserError as error:
        return _message(_Failure(error))
    except Exception:
        return _message(_Failure(RuntimeError(f"a worker process failed:\n{traceback.format_exc()}")))


# ---- messages: the sizes of the parts (their count first), the pickle, the arrays that it refers to


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        """A tensor goes as the array of its bytes, for numpy does not know every dtype of torch's."""
        import torch

        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        flat = obj.detach().contiguous().reshape(-1).view(torch.uint8)
        return _tensor, (flat.numpy(), obj.dtype, tuple(obj.shape))


def _tensor(data: NDArray[np.uint8], dtype: Any, shape: tuple[int, ...]) -> Any:
    import torch

    return torch.from_numpy(data).view(dtype).reshape(shape)


def _message(value: Any) -> IO[bytes]:
    arrays: list[memoryview] = []

    def is_small(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes >= _SMALL:
            arrays.append(raw)
        return raw.nbytes < _SMALL

    pickled = io.BytesIO()
    _Pickler(pickled, protocol=5, buffer_callback=is_small).dump(value)
    parts = [pickled.getbuffer(), *arrays]
    sizes = [part.nbytes for part in parts]
    file = _nameless_file()
    file.write(np.array([len(sizes), *sizes], dtype=np.int64).tobytes())
    for part, place in zip(parts, _places(sizes), strict=True):
        file.seek(place.start)
        file.write(part)
    file.flush()
    return file


def _nameless_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):  # not bounded by the size of /dev/shm, which is 64 MB in many a container
        return os.fdopen(os.memfd_create("mser_message"), "w+b")
    return tempfile.TemporaryFile()


def _places(sizes: Iterable[int]) -> list[slice]:
    """Where in a message its parts lie."""
    sizes = list(sizes)
    places = []
    end = 8 * (1 + len(sizes))
    for size in sizes:
        start = -(-end // _ALIGN) * _ALIGN
        end = start + size
        places.append(slice(start, end))
    return places


def _send(channel: socket.socket, message: IO[bytes]) -> None:
    with message:
        socket.send_fds(channel, [b"\0"], [message.fileno()])


def _receive(channel: socket.socket) -> Any:
    """Raises `EOFError` or `ConnectionError` when there is no other side any more."""
    byte, files, _, _ = socket.recv_fds(channel, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not byte:
        raise EOFError
    if not files:  # the system drops what does not fit
        raise OSError(errno.EMFILE, f"{os.strerror(errno.EMFILE)}: each answer that is kept has one")
    try:
        content = memoryview(mmap.mmap(files[0], 0))  # shared with nobody: who sent it has closed it
    finally:
        os.close(files[0])
    [count] = np.frombuffer(content, np.int64, 1)
    sizes = np.frombuffer(content, np.int64, count, 8).tolist()
    pickled, *arrays = (content[place] for place in _places(sizes))
    # From this process' own child or parent, over a nameless socket pair: nobody else can have written it.
    return pickle.loads(pickled, buffers=arrays)
