"""Recordings decoded, checked and encoded anew for the shards, in parallel and in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mser_dist import audio
from mser_dist.corpora.recording import Recording, read_bytes, where
from mser_dist.errors import UserError
from mser_dist.shards import index as shard_index

CHUNK = 16  # clips a task: long enough that handing it to a process costs little, short enough to keep all busy


class Decoding(NamedTuple):
    """How recordings are decoded: the arguments of `audio.decode`."""

    max_seconds: float
    scale: bool


class Encoded(NamedTuple):
    data: bytes
    duration: float  # seconds
    sound: int  # `shard_index.sound`
    peak: int  # `audio.peak`
    scaled: bool


def encode_all(
    clips: Iterable[Recording], audio_format: str | None, decoding: Decoding, workers: int | None
) -> Generator[Encoded | str, None, None]:
    """Every clip, in order, or why it cannot be had; without bytes where no format is given. Only a few chunks a
    process are under way at any time. workers: processes; None: the cores this process may use.
    """
    processes = workers if workers is not None else len(os.sched_getaffinity(0))
    places = iter([(clip.path, clip.inside) for clip in clips])
    if processes <= 1:
        for place in places:
            yield _encode(place, audio_format, decoding)
        return
    # spawn: a fork of a process that runs threads (torch, MLflow) can deadlock
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=follow_parent)
    try:
        under_way: deque[Future[list[Encoded | str]]] = deque()
        while True:
            while len(under_way) < 4 * processes and (chunk := list(islice(places, CHUNK))):
                under_way.append(pool.submit(_encode_chunk, chunk, audio_format, decoding))
            if not under_way:
                return
            yield from under_way.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a packing process died (out of memory?); free memory, and the same command continues"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def follow_parent() -> None:
    """End with the parent, however it ends: Ctrl-C, which reaches every process, is its to handle, and when it is
    killed, nobody else would end its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


_Place = tuple[Path, tuple[str, int] | None]  # Recording.path and .inside


def _encode_chunk(places: list[_Place], audio_format: str | None, decoding: Decoding) -> list[Encoded | str]:
    return [_encode(place, audio_format, decoding) for place in places]


def _encode(place: _Place, audio_format: str | None, decoding: Decoding) -> Encoded | str:
    """A recording as 16 kHz mono 16-bit; or why that cannot be had."""
    path, inside = place
    try:
        data = read_bytes(path, inside)
        wave, scaled = _decode(data, where(path, inside), decoding)
    except OSError as error:
        return str(unreadable(path, error))
    except UserError as error:
        return str(error)
    pcm = audio.to_pcm16(wave)
    encoded = audio.encode(pcm, audio.SAMPLE_RATE, audio_format) if audio_format else b""
    return Encoded(encoded, len(pcm) / audio.SAMPLE_RATE, shard_index.sound(pcm), audio.peak(wave), scaled)


def _decode(data: bytes, name: str, decoding: Decoding) -> tuple[NDArray[np.float32], bool]:
    """The samples, and whether they were scaled."""
    limit, scaled = decoding.max_seconds, False
    try:
        wave = audio.decode(data, name, max_seconds=limit)
        scaled = decoding.scale and audio.peak(wave) > 32768
    except audio.BeyondFullScaleError:
        if not decoding.scale:
            raise
        scaled = True
    if scaled:
        wave = audio.decode(data, name, max_seconds=limit, scale=True)
    return wave, scaled


def unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); mend or remove this file")
