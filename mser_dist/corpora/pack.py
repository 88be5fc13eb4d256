"""`mser pack`: a corpus to a data set of shards, decoded and checked clip by clip, in parallel and byte for byte
repeatable. Stopped at any point, it goes on from its last finished shards.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import soundfile
import soxr

from mser_dist import __version__, audio
from mser_dist.corpora.parsers import CORPORA
from mser_dist.corpora.recording import Recording
from mser_dist.corpora.splits import split_by_speaker
from mser_dist.errors import UserError
from mser_dist.progress import bar
from mser_dist.shards import index as shard_index
from mser_dist.shards import repeats
from mser_dist.shards.index import SPLITS
from mser_dist.shards.inspect import full_scale
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.writer import DATASET_FILE, DatasetWriter, shard_name

CHUNK = 16  # clips a task: long enough that handing it to a process costs little, short enough to keep all busy


def pack(
    corpus: str,
    src: str | Path,
    out: str | Path,
    *,
    val_fraction: float | None = None,
    test_fraction: float = 0.2,
    test_speakers: Collection[str] = (),
    folds: int | None = None,
    fold: int = 0,
    seed: int = 0,
    audio_format: str = "flac",
    max_seconds: float = 40.0,
    scale: bool = False,
    drop_duplicates: bool = False,
    shard_samples: int = 512,
    workers: int | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Make the data set `out` of 16 kHz mono shards from a corpus (a name of `corpora.CORPORA`) at `src`.

    For the splits see `splits.split_by_speaker`. Clips in which annotators named no emotion are left out and counted.
    workers: processes that decode (default: the cores this process may use); a script that calls this with more than
    one needs the usual `if __name__ == "__main__"`. scale: divide clips beyond full scale, as `audio.decode`
    does, which are refused else; without it, what a codec or resampling takes beyond is clipped and counted.
    drop_duplicates: of clips of identical audio keep the first in the order of the source, before the splits are made;
    every recording is decoded once more for that.

    However it is stopped, the finished shards stay in `<out>.partial`, and the same call keeps each of them whose clips
    (path, size, time of change, labels), audio format, max_seconds and scale are as they were.

    Returns:
        {name, out, clips, hours, dropped: {native emotion: clips}, splits: {split: {clips, speakers}}, emotions:
        {label: clips}, languages: {language: clips}, shared_speakers: speakers in more than one split (only a
        prescribed split can do that), identical: audio that is in the set more than once (`repeats.describe`),
        duplicates: {clips, other_labels, other_splits}: those that were dropped, and how many of these had another
        label, or another prescribed split, than the one that stays; full_scale: clips that touch it or were
        clipped there (`inspect.full_scale`); scaled: clips that `scale` divided, in this call; seconds: of packing}.

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
    decoding = _Decoding(max_seconds, scale)
    duplicates = {"clips": 0, "other_labels": 0, "other_splits": 0}
    if drop_duplicates:
        labelled, duplicates = _without_duplicates(labelled, decoding, workers, progress)
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
        "scale": scale,
        "drop_duplicates": drop_duplicates,
        "test_speakers": sorted(test_speakers),
    } | split
    shards = _shards(clips, shard_samples)
    recipes = {file: _recipe(own, audio_format, decoding) for file, own in shards.items()}
    options: dict[str, Any] = {"shard_samples": shard_samples, "overwrite": overwrite, "progress": progress}
    with DatasetWriter(out, name, made_by, recipes=recipes, **options) as writer:
        todo = [clip for file, own in shards.items() if file not in writer.kept for clip in own]
        there = len(clips) - len(todo)
        if progress:
            _tell(writer, there, len(clips))
        with closing(_encode_all(todo, audio_format, decoding, workers)) as encoded:
            title = f"pack {name}"
            shown = bar(encoded, title=title, unit="clip", total=len(clips), initial=there, disable=not progress)
            scaled = 0
            for clip, one in zip(todo, shown, strict=True):
                meta = _meta(clip, one.duration)
                writer.write(str(clip.split), clip.id, one.data, audio_format, meta, one.sound, one.peak)
                scaled += one.scaled
    packed = ShardSet.open(out, sound=True)
    described = shard_index.read_facts(Path(out) / DATASET_FILE)["splits"].values()
    return {
        "name": name,
        "out": str(out),
        "clips": len(clips),
        "hours": round(sum(split["hours"] for split in described), 4),
        "dropped": dict(sorted(dropped.items())),
        "splits": {part: _part(clips, part) for part in SPLITS},
        "emotions": dict(sorted(Counter(str(clip.label) for clip in clips).items())),
        "languages": dict(sorted(Counter(clip.language for clip in clips).items())),
        "shared_speakers": _shared_speakers(clips),
        "identical": repeats.describe(packed),
        "duplicates": duplicates,
        "full_scale": full_scale(packed),
        "scaled": scaled,
        "seconds": round(time.monotonic() - started, 2),
    }


def _shards(clips: Iterable[Recording], shard_samples: int) -> dict[str, list[Recording]]:
    """The clips of each shard, by its file."""
    by_split: dict[str, list[Recording]] = {}
    for clip in clips:
        by_split.setdefault(str(clip.split), []).append(clip)
    return {
        shard_name(split, start // shard_samples): own[start : start + shard_samples]
        for split, own in by_split.items()
        for start in range(0, len(own), shard_samples)
    }


def _recipe(clips: Iterable[Recording], audio_format: str, decoding: "_Decoding") -> str:
    """A hash of all that decides a shard's bytes. A recording stands in it by its path, size and time of change."""
    code = [__version__, shard_index.VERSION, soundfile.__libsndfile_version__, soxr.__libsoxr_version__]
    digest = hashlib.sha256(json.dumps([code, audio_format, decoding]).encode())
    for clip in clips:
        try:
            status = clip.path.stat()
        except OSError as error:
            raise _unreadable(clip.path, error) from None
        recording = [str(clip.path.absolute()), status.st_size, status.st_mtime_ns]
        digest.update(json.dumps([clip.id, clip.split, recording, _meta(clip, 0.0)]).encode())
    return digest.hexdigest()


def _tell(writer: DatasetWriter, there: int, total: int) -> None:
    if writer.discarded:
        why = "damaged, or of another source or other options"
        shards = f"{writer.discarded} of {writer.discarded + len(writer.kept)} shards"
        print(f"mser: not kept from an earlier pack ({why}): {shards}", file=sys.stderr)
    if there:
        print(f"mser: continuing: {there} of {total} clips are packed", file=sys.stderr)


def _meta(clip: Recording, duration: float) -> dict[str, Any]:
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


def _part(clips: Iterable[Recording], split: str) -> dict[str, int]:
    own = [clip for clip in clips if clip.split == split]
    return {"clips": len(own), "speakers": len({(clip.corpus, clip.speaker) for clip in own})}


def _shared_speakers(clips: Iterable[Recording]) -> int:
    pairs = {(clip.corpus, clip.speaker, clip.split) for clip in clips}
    return sum(count > 1 for count in Counter((corpus, speaker) for corpus, speaker, _ in pairs).values())


def _without_duplicates(
    clips: list[Recording], decoding: "_Decoding", workers: int | None, progress: bool
) -> tuple[list[Recording], dict[str, int]]:
    """The clips without those whose audio an earlier one has; and what was dropped, as `pack` returns it."""
    first: dict[int, Recording] = {}
    dropped = {"clips": 0, "other_labels": 0, "other_splits": 0}
    with closing(_encode_all(clips, None, decoding, workers)) as encoded:
        shown = bar(encoded, title="look for duplicates", unit="clip", total=len(clips), disable=not progress)
        for clip, one in zip(clips, shown, strict=True):
            if (kept := first.setdefault(one.sound, clip)) is not clip:
                dropped["clips"] += 1
                dropped["other_labels"] += clip.label != kept.label
                dropped["other_splits"] += clip.split != kept.split
    return list(first.values()), dropped


class _Decoding(NamedTuple):
    """How recordings are decoded: the arguments of `audio.decode`."""

    max_seconds: float
    scale: bool


class _Encoded(NamedTuple):
    data: bytes
    duration: float  # seconds
    sound: int  # `shard_index.sound`
    peak: int  # `audio.peak`
    scaled: bool


def _encode_all(
    clips: Iterable[Recording], audio_format: str | None, decoding: _Decoding, workers: int | None
) -> Generator[_Encoded, None, None]:
    """Every clip, in order, without bytes where no format is given; only a few chunks a process are under way at any
    time.
    """
    processes = workers if workers is not None else len(os.sched_getaffinity(0))
    paths = iter([clip.path for clip in clips])
    if processes <= 1:
        for path in paths:
            yield _encode(path, audio_format, decoding)
        return
    # spawn: a fork of a process that runs threads (torch, MLflow) can deadlock
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_follow_parent)
    try:
        under_way: deque[Future[list[_Encoded]]] = deque()
        while True:
            while len(under_way) < 4 * processes and (chunk := list(islice(paths, CHUNK))):
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


def _follow_parent() -> None:
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


def _encode_chunk(paths: list[Path], audio_format: str | None, decoding: _Decoding) -> list[_Encoded]:
    return [_encode(path, audio_format, decoding) for path in paths]


def _encode(path: Path, audio_format: str | None, decoding: _Decoding) -> _Encoded:
    """A recording as 16 kHz mono 16-bit."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None
    limit, scaled = decoding.max_seconds, False
    try:
        wave = audio.decode(data, str(path), max_seconds=limit)
        scaled = decoding.scale and audio.peak(wave) > 32768
    except audio.BeyondFullScaleError:
        if not decoding.scale:
            raise
        scaled = True
    if scaled:
        wave = audio.decode(data, str(path), max_seconds=limit, scale=True)
    pcm = audio.to_pcm16(wave)
    encoded = audio.encode(pcm, audio.SAMPLE_RATE, audio_format) if audio_format else b""
    return _Encoded(encoded, len(pcm) / audio.SAMPLE_RATE, shard_index.sound(pcm), audio.peak(wave), scaled)


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); mend or remove this file")
