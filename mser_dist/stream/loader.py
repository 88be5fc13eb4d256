"""What a data worker makes of a request, one a step: clips read, decoded, augmented and collated.

A worker holds no part of the data set: what to read comes with each request. One that dies (out of memory, a decoder
that crashes) is named with the clip it had in hand. The processes themselves are `stream.workers`.
"""

import mmap
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mser_dist.audio import SAMPLE_RATE, decode
from mser_dist.config import AugmentConfig
from mser_dist.errors import UserError
from mser_dist.shards.reader import Ref, ShardReader, VanishedError
from mser_dist.stream.augment import augment_wave, spec_augment
from mser_dist.stream.features import Features
from mser_dist.stream.workers import DeadWorkerError, answers_ahead
from mser_dist.tables import count

AHEAD = 2  # steps that each worker has under way
MAX_RESTARTS = 3  # of workers that died with no clip to blame


@dataclass(frozen=True)
class Example:
    """A decoded sample on its way to a collate function. `draw` is seeded by sample and step: a resume repeats it."""

    speech: Any  # (n_mels, frames) or (samples,) float32 array; or an encoder's features, (T, L, D) tensor
    length: int  # of `speech`, without padding: frames, samples
    label: int
    source: int
    index: int  # in the ShardSet
    draw: np.random.Generator
    wording: int = 0  # of its prompt, by language or corpus
    text: str = ""  # what is said in it, where prompts are to hold it


Collate = Callable[[list[Example]], dict[str, Any]]


class ClipRequest(NamedTuple):
    ref: Ref
    label: int
    source: int
    key: int  # of its audio: seeds its variants, so that they are the same in every set and run
    variant: int | None = None  # None: drawn
    wording: int = 0


class Request(NamedTuple):
    """A rank's part of a step: its micro-batches of clips. (epoch, step) seeds the draws of each clip."""

    epoch: int
    step: int  # of the epoch: a clip that comes twice in an epoch is augmented in two ways
    batches: list[list[ClipRequest]]


class EncodedClips(Protocol):
    """What a frozen encoder has made of the clips."""

    def read(self, index: int, variant: int) -> Any:
        """(T, L, D) tensor of a clip; KeyError where there is none, `UserError` where it is damaged."""

    def silence(self) -> Any:
        """(1, L, D) tensor in place of a clip."""


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
    encoded: EncodedClips | None = None  # is read in place of the audio
    transcript: Callable[[bytes], str] | None = None  # what is said in a clip, by its json; None: nobody asks
    or_silence: bool = False
    in_hand: NDArray[np.int64] | None = None  # shared memory: the index of the clip that each worker is decoding, or -1
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
            silence, size = self.features(np.zeros(SAMPLE_RATE, dtype=np.float32)), self.features.own(SAMPLE_RATE)
            if self.encoded:
                silence, size = self.encoded.silence(), 1
            clips = [[Example(silence, size, 0, 0, -1, np.random.default_rng(0)) for _ in batch] for batch in clips]
        elif bad:
            clips = _filled(clips, bad)
        return Answer([self.collate([clip for clip in batch if clip]) for batch in clips], bad)

    def clip(self, asked: ClipRequest, epoch: int, step: int) -> Example:
        """Read and decode one clip. Raises `UserError` without the clip's name."""
        if self.in_hand is None:
            return self._clip(asked, epoch, step)
        self.in_hand[self.worker] = asked.ref.sample
        try:
            return self._clip(asked, epoch, step)
        finally:
            self.in_hand[self.worker] = -1

    def _clip(self, asked: ClipRequest, epoch: int, step: int) -> Example:
        index = asked.ref.sample
        if index in self.skip:
            raise UserError("it kills the process that decodes it")
        changes = np.random.default_rng([self.seed, epoch, step, index, 1])  # captions are the same with and without
        variant = 0
        if self.augment and self.augment.variants:
            drawn = int(changes.integers(self.augment.variants))
            variant = drawn if asked.variant is None else asked.variant
            changes = np.random.default_rng([asked.key, variant, 1])
        draw = np.random.default_rng([self.seed, epoch, step, index])
        if self.encoded:
            with suppress(KeyError):
                speech = self.encoded.read(index, variant)
                said = self.transcript(self.reader.read(asked.ref)[1]) if self.transcript else ""
                return Example(speech, len(speech), asked.label, asked.source, index, draw, asked.wording, said)
        audio, meta = self.reader.read(asked.ref)
        wave = decode(audio, where="", max_seconds=self.max_seconds)
        if self.encoded:
            raise UserError("it could not be read when the others were encoded, and now it can: start again")
        if self.augment:
            wave = augment_wave(wave, changes, self.augment, max_samples=round(self.max_seconds * SAMPLE_RATE))
        speech = self.features(wave)
        if self.augment and self.features.n_mels:
            speech = spec_augment(speech, changes, self.augment)
        said = self.transcript(meta) if self.transcript else ""
        size = self.features.own(len(wave))
        return Example(speech, size, asked.label, asked.source, index, draw, asked.wording, said)


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

    known: those found before, by this rank or another. tell: name each on standard error.
    """

    def __init__(self, allowed: int, where: Callable[[int], str], known: Iterable[int] = (), tell: bool = True) -> None:
        self.allowed = allowed
        self.where = where
        self.found = set(known)
        self.tell = tell

    def add(self, bad: dict[int, str]) -> None:
        for index, problem in bad.items():
            if index in self.found:
                continue
            self.found.add(index)
            if len(self.found) > self.allowed:
                budget = f"bad clip number {len(self.found)}, data.max_bad={self.allowed}"
                more = "" if self.allowed else ": a higher one lets so many pass"
                raise UserError(f"{self.where(index)}: {problem} ({budget}{more})")
            if self.tell:
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
        decoder.in_hand = np.frombuffer(mmap.mmap(-1, 8 * workers), dtype=np.int64)  # the processes share it
        decoder.in_hand[:] = -1
        again = list(under_way)
        under_way.clear()
        jobs = [replace(decoder, worker=number) for number in range(workers)]
        try:
            with closing(answers_ahead(jobs, _chained(again, source, under_way), AHEAD)) as ahead:
                for answer in ahead:
                    under_way.popleft()
                    bad.add(answer.bad)
                    yield answer
            return
        except _AllBadError as error:
            raise UserError(f"{bad.where(error.index)}: {error}") from None
        except DeadWorkerError as death:
            blamed = _blamed(death, decoder.in_hand, bad)
            decoder.skip |= blamed
            unblamed += not blamed
            if unblamed > MAX_RESTARTS:
                raise UserError(
                    f"data workers died {count(unblamed, 'time')} ({death}): out of memory? lower data.workers"
                ) from None


def _chained(again: list[Request], source: Iterator[Request], under_way: deque[Request]) -> Iterator[Request]:
    for requests in (again, source):
        for request in requests:
            under_way.append(request)
            yield request


def _blamed(death: DeadWorkerError, in_hand: NDArray[np.int64], bad: BadClips) -> frozenset[int]:
    """The clip that a dead worker had in hand, if any; it counts as a bad one."""
    index = int(in_hand[death.number])
    if index < 0:
        print(f"mser: warning: a data worker died ({death}); another takes its place", file=sys.stderr, flush=True)
        return frozenset()
    hint = "out of memory, or a file that its decoder cannot bear: lower data.workers, or leave the clip out"
    bad.add({index: f"the worker that decoded it died ({death}): {hint} by data.drop={{key: …}}"})
    return frozenset([index])
