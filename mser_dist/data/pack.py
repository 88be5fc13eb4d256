"""`mser pack`: a corpus to a data set of shards, decoded and checked clip by clip, in parallel and byte for byte
repeatable.
"""

import multiprocessing
import os
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any

from mser_dist.data import audio
from mser_dist.data.clip import SPLITS, Clip
from mser_dist.data.corpora import CORPORA
from mser_dist.data.shards import DatasetWriter
from mser_dist.data.splits import split_by_speaker
from mser_dist.errors import UserError
from mser_dist.progress import bar

CHUNK = 16  # clips a task: long enough that handing it to a process costs little, short enough to keep all busy


def pack(
    corpus: str,
    src: str | Path,
    out: str | Path,
    *,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    test_speakers: Collection[str] = (),
    folds: int | None = None,
    fold: int = 0,
    seed: int = 0,
    audio_format: str = "flac",
    max_seconds: float = 40.0,
    shard_samples: int = 512,
    workers: int | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Make the data set `out` of 16 kHz mono shards from a corpus (a name of `corpora.CORPORA`) at `src`.

    For the splits see `splits.split_by_speaker`. Clips in which annotators named no emotion are left out and counted.
    workers: processes that decode (default: the cores this process may use); a script that calls this with more than
    one needs the usual `if __name__ == "__main__"`.

    Returns:
        {name, out, clips, hours, dropped: {native emotion: clips}, splits: {split: {clips, speakers}}, emotions:
        {label: clips}, languages: {language: clips}, shared_speakers: speakers in more than one split (only a
        prescribed split can do that), seconds: of packing}.

    Raises UserError, and leaves no `out`, for anything wrong with the corpus, a clip that cannot be decoded or a full
    disk.
    """
    started = time.monotonic()
    if corpus not in CORPORA:
        raise UserError(f"unknown corpus {corpus!r}; known are {', '.join(CORPORA)} (manifest takes any list of files)")
    if audio_format not in ("flac", "wav"):
        raise UserError(f"unknown audio format {audio_format!r}; use flac or wav")
    parsed = list(CORPORA[corpus](Path(src)))
    dropped = Counter(clip.emotion for clip in parsed if clip.label is None)
    labelled = [clip for clip in parsed if clip.label is not None]
    if not labelled:
        raise UserError(f"{src}: not one of {len(parsed)} clips has a label; check the emotion column")
    split = {"val_fraction": val_fraction, "test_fraction": test_fraction, "folds": folds, "fold": fold, "seed": seed}
    clips = split_by_speaker(
        labelled,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        test_speakers=test_speakers,
        folds=folds,
        fold=fold,
        seed=seed,
    )
    clips.sort(key=lambda clip: (clip.split or "", clip.id))
    name = corpus if corpus != "manifest" else Path(src).stem
    made_by = {
        "command": "mser pack",
        "corpus": corpus,
        "max_seconds": max_seconds,
        "test_speakers": sorted(test_speakers),
    } | split
    seconds = 0.0
    with DatasetWriter(out, name, made_by, shard_samples=shard_samples, overwrite=overwrite) as writer:
        encoded = _encode_all(clips, audio_format, max_seconds, workers)
        shown = bar(encoded, title=f"pack {name}", unit="clip", total=len(clips), disable=not progress)
        for clip, (data, duration) in zip(clips, shown, strict=True):
            assert clip.split is not None
            writer.write(clip.split, clip.id, data, audio_format, _meta(clip, duration))
            seconds += duration
    return {
        "name": name,
        "out": str(out),
        "clips": len(clips),
        "hours": round(seconds / 3600, 4),
        "dropped": dict(sorted(dropped.items())),
        "splits": {part: _part(clips, part) for part in SPLITS},
        "emotions": dict(sorted(Counter(str(clip.label) for clip in clips).items())),
        "languages": dict(sorted(Counter(clip.language for clip in clips).items())),
        "shared_speakers": _shared_speakers(clips),
        "seconds": round(time.monotonic() - started, 2),
    }


def _meta(clip: Clip, duration: float) -> dict[str, Any]:
    return {
        "emotion": clip.emotion,
        "label": clip.label,
        "language": clip.language,
        "speaker": clip.speaker,
        "gender": clip.gender,
        "corpus": clip.corpus,
        "text": clip.text,
        "source_id": clip.source_id,
        "synthetic": False,
        "duration": duration,
        "sample_rate": audio.SAMPLE_RATE,
    }


def _part(clips: Iterable[Clip], split: str) -> dict[str, int]:
    own = [clip for clip in clips if clip.split == split]
    return {"clips": len(own), "speakers": len({(clip.corpus, clip.speaker) for clip in own})}


def _shared_speakers(clips: Iterable[Clip]) -> int:
    pairs = {(clip.corpus, clip.speaker, clip.split) for clip in clips}
    return sum(count > 1 for count in Counter((corpus, speaker) for corpus, speaker, _ in pairs).values())


def _encode_all(
    clips: Iterable[Clip], audio_format: str, max_seconds: float, workers: int | None
) -> Iterator[tuple[bytes, float]]:
    """(bytes, duration in s) of every clip, in order; only a few chunks a process are under way at any time."""
    processes = workers if workers is not None else len(os.sched_getaffinity(0))
    paths = iter([clip.path for clip in clips])
    if processes <= 1:
        for path in paths:
            yield _encode(path, audio_format, max_seconds)
        return
    # spawn: a fork of a process that runs threads (torch, MLflow) can deadlock
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    try:
        under_way: deque[Future[list[tuple[bytes, float]]]] = deque()
        while True:
            while len(under_way) < 4 * processes and (chunk := list(islice(paths, CHUNK))):
                under_way.append(pool.submit(_encode_chunk, chunk, audio_format, max_seconds))
            if not under_way:
                return
            yield from under_way.popleft().result()
    except BrokenProcessPool:
        raise UserError("a packing process died (out of memory?); give fewer workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_chunk(paths: list[Path], audio_format: str, max_seconds: float) -> list[tuple[bytes, float]]:
    return [_encode(path, audio_format, max_seconds) for path in paths]


def _encode(path: Path, audio_format: str, max_seconds: float) -> tuple[bytes, float]:
    """A recording as 16 kHz mono 16-bit, and its duration in seconds."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend or remove this file") from None
    pcm = audio.to_pcm16(audio.decode(data, str(path), max_seconds=max_seconds))
    return audio.encode(pcm, audio.SAMPLE_RATE, audio_format), len(pcm) / audio.SAMPLE_RATE
