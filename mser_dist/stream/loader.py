"""Worker processes that read, decode and collate ahead of the training, one request a step.

A worker holds no part of the data set: what to read comes with each request. It ignores signals, which the training
process alone answers to, and dies with that process. One that dies alone (out of memory, a decoder that crashes) is
named with the clip it had in hand.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mser_dist.audio import SAMPLE_RATE, decode
from mser_dist.config import AugmentConfig
from mser_dist.errors import UserError
from mser_dist.shards.reader import Ref, ShardReader, VanishedError
from mser_dist.stream.augment import augment_wave, spec_augment
from mser_dist.stream.features import Features

AHEAD = 2  # steps that each worker has under way
MAX_RESTARTS = 3  # of workers that died with no clip to blame
_START = "fork"  # nothing of the set is copied; the file systems of remote shards are made anew in each process
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # prctl(2): a signal for this process when its parent dies


@dataclass(frozen=True)
class Example:
    """A decoded sample on its way to a collate function. `draw` is seeded by sample and step: a resume repeats it."""

    speech: NDArray[np.float32]  # (n_mels, frames) or (samples,)
    label: int
    source: int
    index: int  # in the ShardSet
    draw: np.random.Generator


Collate = Callable[[list[Example]], dict[str, Any]]


class ClipRequest(NamedTuple):
    ref: Ref
    label: int
    source: int


class Request(NamedTuple):
    """A rank's part of a step: its micro-batches of clips. (epoch, step) seeds the draws of each clip."""

    epoch: int
    step: int  # of the epoch: a clip that comes twice in an epoch is augmented in two ways
    batches: list[list[ClipRequest]]


class Answer(NamedTuple):
    """The collated micro-batches, and the clips that could not be read: index → what is wrong."""

    batches: list[dict[str, Any]]
    bad: dict[int, str]


@dataclass
class Decoder:
    """Turns a request into its answer. A bad clip's place is taken by the next good one of the request.

    So a step has its shape on every rank, whatever is damaged. A request without one good clip is a `UserError`; with
    `or_silence` (an evaluation, which drops what was bad) it is answered with silence.
    """

    reader: ShardReader
    features: Features
    seed: int
    max_seconds: float
    augment: AugmentConfig | None
    collate: Collate
    or_silence: bool = False
    in_hand: Any = None  # shared memory: the index of the clip that each worker is decoding, or -1
    worker: int = 0
    skip: frozenset[int] = frozenset()  # clips that killed a worker

    def __call__(self, request: Request) -> Answer:
        clips: list[list[Example | None]] = []
        bad: dict[int, str] = {}
        for batch in request.batches:
            clips.append([])
            for asked in batch:
                try:
                    clips[-1].append(self.clip(asked, request.epoch, request.step))
                except VanishedError:
                    raise
                except UserError as error:
                    bad[asked.ref.sample] = str(error).removeprefix(": ")
                    clips[-1].append(None)
        if bad and self.or_silence and not any(clip for batch in clips for clip in batch):
            silence = self.features(np.zeros(SAMPLE_RATE, dtype=np.float32))
            clips = [[Example(silence, 0, 0, -1, np.random.default_rng(0)) for _ in batch] for batch in clips]
        elif bad:
            clips = _filled(clips, bad)
        return Answer([self.collate([clip for clip in batch if clip]) for batch in clips], bad)

    def clip(self, asked: ClipRequest, epoch: int, step: int) -> Example:
        """Read and decode one clip. Raises `UserError` without the clip's name."""
        index = asked.ref.sample
        if self.in_hand is not None:
            self.in_hand[self.worker] = index
        if index in self.skip:
            raise UserError("it kills the process that decodes it")
        audio, _ = self.reader.read(asked.ref)
        wave = decode(audio, where="", max_seconds=self.max_seconds)
        if self.augment:  # draws of its own, so that captions stay the same with and without it
            draw = np.random.default_rng([self.seed, epoch, step, index, 1])
            wave = augment_wave(wave, draw, self.augment, max_samples=round(self.max_seconds * SAMPLE_RATE))
        speech = self.features(wave)
        if self.augment and self.features.n_mels:
            speech = spec_augment(speech, draw, self.augment)
        if self.in_hand is not None:
            self.in_hand[self.worker] = -1
        draw = np.random.default_rng([self.seed, epoch, step, index])
        return Example(speech, asked.label, asked.source, index, draw)


def _filled(clips: list[list[Example | None]], bad: dict[int, str]) -> list[list[Example | None]]:
    flat = [clip for batch in clips for clip in batch]
    good = [i for i, clip in enumerate(flat) if clip is not None]
    if not good:
        index, problem = next(iter(bad.items()))
        raise _AllBadError(index, f"{problem}, and so is every other clip of its step")
    places = np.searchsorted(good, np.arange(len(flat))) % len(good)
    filled = iter(flat[good[place]] for place in places)
    return [[next(filled) for _ in batch] for batch in clips]


class _AllBadError(UserError):
    def __init__(self, index: int, problem: str) -> None:
        super().__init__(problem)
        self.index = index

    def __reduce__(self) -> Any:
        return type(self), (self.index, str(self))


class BadClips:
    """The clips that cannot be read, each named once; raises `UserError` for one more than `allowed`.

    known: those found before, by this rank or another.
    """

    def __init__(self, allowed: int, where: Callable[[int], str], known: Iterable[int] = ()) -> None:
        self.allowed = allowed
        self.where = where
        self.found = set(known)

    def add(self, bad: dict[int, str]) -> None:
        for index, problem in bad.items():
            if index in self.found:
                continue
            self.found.add(index)
            if len(self.found) > self.allowed:
                budget = f" (bad clip number {len(self.found)}, data.max_bad={self.allowed})" if self.allowed else ""
                raise UserError(f"{self.where(index)}: {problem}{budget}")
            print(
                f"mser: warning: {self.where(index)}: {problem}; another clip takes its place "
                f"({len(self.found)} of data.max_bad={self.allowed})",
                file=sys.stderr,
                flush=True,
            )


def answers(decoder: Decoder, requests: Iterable[Request], workers: int, bad: BadClips) -> Iterator[Answer]:
    """The answers to `requests`, in order, made ahead by `workers` processes (0: here, when asked for).

    Raises `UserError` for more bad clips than allowed, a shard that is gone, or a worker that died of a clip.
    """
    if not workers:
        for request in requests:
            try:
                answer = decoder(request)
            except _AllBadError as error:
                raise UserError(f"{bad.where(error.index)}: {error}") from None
            bad.add(answer.bad)
            yield answer
        return
    under_way: deque[Request] = deque()  # asked for, not answered: what a new set of workers would do again
    source = iter(requests)
    unblamed = 0
    while True:
        decoder.in_hand = multiprocessing.get_context(_START).RawArray("q", [-1] * workers)
        again = list(under_way)
        under_way.clear()
        loader = _loader(decoder, _chained(again, source, under_way), workers)
        try:
            for answer in loader:
                under_way.popleft()
                if isinstance(answer, _AllBadError):
                    raise UserError(f"{bad.where(answer.index)}: {answer}")
                if isinstance(answer, UserError):
                    raise answer
                bad.add(answer.bad)
                yield answer
            return
        except _DeadWorker as death:
            blamed = _blamed(death, decoder.in_hand, bad)
            decoder.skip |= blamed
            unblamed += not blamed
            if unblamed > MAX_RESTARTS:
                raise UserError(
                    f"data workers died {unblamed} times ({death}): out of memory? lower data.workers"
                ) from None
        finally:
            loader.close()


def _chained(again: list[Request], source: Iterator[Request], under_way: deque[Request]) -> Iterator[Request]:
    for requests in (again, source):
        for request in requests:
            under_way.append(request)
            yield request


class _DeadWorker(Exception):
    def __init__(self, dead: list[tuple[int, int | None]]) -> None:
        super().__init__(", ".join(_how(code) for _, code in dead))
        self.dead = dead  # (number, exit code) of each


def _how(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


def _blamed(death: _DeadWorker, in_hand: Any, bad: BadClips) -> frozenset[int]:
    """The clips that dead workers had in hand; each counts as a bad one."""
    clips = []
    for worker, code in death.dead:
        hint = "out of memory, or a file that its decoder cannot bear: lower data.workers, or leave the clip out"
        index = int(in_hand[worker])
        if index < 0:
            print(
                f"mser: warning: a data worker died ({_how(code)}); another takes its place",
                file=sys.stderr,
                flush=True,
            )
            continue
        bad.add({index: f"the worker that decoded it died ({_how(code)}): {hint} by data.drop={{key: …}}"})
        clips.append(index)
    return frozenset(clips)


def _loader(decoder: Decoder, requests: Iterable[Request], workers: int) -> Generator[Any, None, None]:
    """torch's DataLoader over whole requests. Raises `_DeadWorker` when a worker is gone."""
    import torch
    from torch.utils.data import DataLoader

    loader: DataLoader[Any] = DataLoader(
        _Guarded(decoder),  # type: ignore[arg-type]
        sampler=requests,
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=AHEAD,
        multiprocessing_context=_START,
        worker_init_fn=partial(_start, os.getpid()),
        # Its own generator: a loader takes its workers' seed from the global one, and a resumed training, which makes
        # a new loader, would then draw other dropout than one that went on.
        generator=torch.Generator(),
    )
    before = signal.getsignal(signal.SIGCHLD)
    # Inherited by the workers, so that none of these reaches one before it ignores them.
    before_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        iterator: Any = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before_mask)
    if threading.current_thread() is threading.main_thread():  # elsewhere torch sets no handler either
        # It would raise from this signal wherever the training is just then; without it a dead worker is noticed here.
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)
    processes = iterator._workers
    try:
        yield from iterator
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError):  # what torch meets when a worker is gone
        for _ in range(100):
            if dead := [(i, process.exitcode) for i, process in enumerate(processes) if not process.is_alive()]:
                raise _DeadWorker(dead) from None
            time.sleep(0.01)
        raise
    finally:
        for process in processes:  # torch would wait for what each is at, and then send the signal that they ignore
            process.kill()
        for process in processes:
            process.join()
        # A worker killed in the wrong microsecond keeps the lock that torch's own clean-up needs: it is given back.
        done = iterator._workers_done_event._cond
        done.acquire(True, 1.0)
        done.release()
        iterator = None  # now, and not when the last traceback that shows this frame is forgotten


class _Guarded:
    """Hands a `UserError` over as an item: raised in a worker, torch would wrap it in that worker's traceback."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def __getitem__(self, request: Request) -> Any:
        try:
            return self.decoder(request)
        except UserError as error:
            return error


def _as_is(item: Any) -> Any:
    return item


def _start(parent: int, worker: int) -> None:
    """Set up a worker process."""
    import torch
    from torch.utils.data import get_worker_info

    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
    torch.set_num_threads(1)
    info = get_worker_info()
    assert info is not None
    info.dataset.decoder.worker = worker  # type: ignore[attr-defined]
