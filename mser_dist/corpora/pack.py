"""`mser pack`: a corpus to a data set of shards, decoded and checked clip by clip, in parallel and byte for byte
repeatable. Stopped at any point, it goes on from its last finished shards.
"""

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import soundfile
import soxr

from mser_dist import __version__, audio
from mser_dist.corpora.encode import Decoding, encode_all, unreadable
from mser_dist.corpora.left_out import LeftOut
from mser_dist.corpora.manifest import Reading, parse_manifest
from mser_dist.corpora.parsers import CORPORA
from mser_dist.corpora.recording import Recording, why_no_file
from mser_dist.corpora.splits import split_by_speaker, without
from mser_dist.errors import UserError
from mser_dist.progress import bar
from mser_dist.shards import index as shard_index
from mser_dist.shards import repeats
from mser_dist.shards.emotions import LABELS, normal, to_label
from mser_dist.shards.inspect import full_scale
from mser_dist.shards.metadata import SPLITS
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.writer import DATASET_FILE, DatasetWriter, shard_name


def pack(
    corpus: str,
    src: str | Path,
    out: str | Path,
    *,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    test_speakers: Collection[str] = (),
    folds: int | None = None,
    fold: int = 0,
    seed: int = 0,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    constants: Mapping[str, str] | None = None,
    words: Mapping[str, str] | None = None,
    skip_bad: int = 0,
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

    For the splits see `splits.split_by_speaker`; `split` puts all clips into one. Clips in which annotators named no
    emotion are left out and counted. workers: processes that decode (default: the cores this process may use); a script
    that calls this with more than one needs the usual `if __name__ == "__main__"`. drop_duplicates: of clips of
    identical audio keep the first in the order of the source, before the splits are made; every recording is decoded
    once more for that. scale: divide clips beyond full scale, as `audio.decode` does, which are refused else; without
    it, what a codec or resampling takes beyond is clipped and counted. columns, constants: of a manifest
    (`manifest.Reading`). words: emotion word → the label, or a known word for it, of its clips; "other" drops them.
    skip_bad: so many recordings that cannot be read are left out, and listed in `<out>.left_out.csv`.

    However it is stopped, the finished shards stay in `<out>.partial`, and the same call keeps each of them whose clips
    (path, size, time of change, labels), audio format, max_seconds and scale are as they were.

    Returns:
        {name, out, clips, hours, dropped: {native emotion: clips}, splits: {split: {clips, speakers}}, emotions:
        {label: clips}, languages: {language: clips}, shared_speakers: speakers in more than one split (only a
        prescribed split can do that), identical: audio that is in the set more than once (`repeats.describe`),
        duplicates: {clips, other_labels, other_splits}: those that were dropped, and how many of these had another
        label, or another prescribed split, than the one that stays; full_scale: clips that touch it or were
        clipped there (`inspect.full_scale`); scaled: clips that `scale` divided, in this call; without: {"corpus
        (language)": splits of which it has no clip}; left_out: {clips, list: the file that names them, or None};
        seconds: of packing}.

    Raises UserError, and leaves no `out`, for anything wrong with the corpus, a clip that cannot be decoded or a full
    disk.
    """
    started = time.monotonic()
    if corpus not in CORPORA:
        raise UserError(f"unknown corpus {corpus!r}; known are {', '.join(CORPORA)} (manifest takes any list of files)")
    if audio_format not in ("flac", "wav"):
        raise UserError(f"unknown audio format {audio_format!r}; use flac or wav")
    left_out = LeftOut(skip_bad)
    reading = Reading(columns or {}, constants or {}, _labels_of(words or {}), files_there=not skip_bad)
    parsed = _parse(corpus, Path(src), reading)
    dropped = Counter(clip.emotion for clip in parsed if clip.label is None)
    labelled = [clip for clip in parsed if clip.label is not None]
    if not labelled:
        raise UserError(f"{src}: not one of {len(parsed)} clips has a label; check the emotion column")
    decoding = Decoding(max_seconds, scale)
    if skip_bad:
        labelled = _that_are_there(labelled, left_out)
    duplicates = {"clips": 0, "other_labels": 0, "other_splits": 0}
    if drop_duplicates:
        labelled, duplicates = _without_duplicates(labelled, left_out, decoding, workers, progress)
    fractions = {"val_fraction": val_fraction, "test_fraction": test_fraction}
    by_speaker: dict[str, Any] = fractions | {"folds": folds, "fold": fold, "seed": seed}
    if split is None:
        clips = split_by_speaker(labelled, test_speakers=test_speakers, **by_speaker)
    else:
        others = [f"--{name.replace('_', '-')}" for name, value in fractions.items() if value is not None]
        others += ["--test-speakers"] * bool(test_speakers) + ["--folds"] * (folds is not None)
        clips = _all_in(labelled, split, others)
    clips.sort(key=lambda clip: (clip.split or "", clip.id))
    name = corpus if corpus != "manifest" else Path(src).stem
    made_by = {
        "command": "mser pack",
        "corpus": corpus,
        "max_seconds": max_seconds,
        "scale": scale,
        "drop_duplicates": drop_duplicates,
        "test_speakers": sorted(test_speakers),
        "split": split,
        "columns": dict(reading.columns),
        "constants": dict(reading.constants),
        "words": dict(words or {}),
        "skip_bad": skip_bad,
    } | by_speaker
    shards = _shards(clips, shard_samples)
    recipes = {file: _recipe(own, audio_format, decoding) for file, own in shards.items()}
    options: dict[str, Any] = {"shard_samples": shard_samples, "overwrite": overwrite, "progress": progress}
    with DatasetWriter(out, name, made_by, recipes=recipes, **options) as writer:
        # of a shard that is kept, those that could not be read: once more, for what to say of them
        todo = [(file, clip) for file, own in shards.items() for clip in own if clip.id not in writer]
        there = len(clips) - len(todo)
        if progress:
            _tell(writer, there, len(clips))
        with closing(encode_all([clip for _, clip in todo], audio_format, decoding, workers)) as encoded:
            title = f"pack {name}"
            shown = bar(encoded, title=title, unit="clip", total=len(clips), initial=there, disable=not progress)
            scaled = 0
            for file, own in groupby(zip(todo, shown, strict=True), key=lambda pair: pair[0][0]):
                whole = True
                for (_, clip), got in own:
                    if file in writer.kept and not isinstance(got, str):
                        got = f"{clip.path}: could not be read when {file} was packed; pack into a new folder"
                    if isinstance(got, str):
                        left_out.add(clip, got)
                        whole = False
                    else:
                        meta = _meta(clip, got.duration)
                        writer.write(str(clip.split), clip.id, got.data, audio_format, meta, got.sound, got.peak)
                        scaled += got.scaled
                if not whole and file not in writer.kept:
                    writer.end_shard(shards[file][0].split or "")
    listed = left_out.write(Path(out))
    gone = {clip.id for clip, _ in left_out.found}
    clips = [clip for clip in clips if clip.id not in gone]
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
        "without": without(clips) if split is None else {},
        "left_out": {"clips": len(left_out.found), "list": str(listed) if listed else None},
        "seconds": round(time.monotonic() - started, 2),
    }


def _parse(corpus: str, src: Path, reading: Reading) -> list[Recording]:
    if corpus == "manifest":
        clips = list(parse_manifest(src, reading))
    else:
        if reading.columns or reading.constants:
            raise UserError(f"--column, --language and --corpus are of mser pack manifest; {corpus} has its own")
        words = reading.words
        clips = [
            replace(clip, label=words[normal(clip.emotion)]) if normal(clip.emotion) in words else clip
            for clip in CORPORA[corpus].parse(src)
        ]
        if (whole := CORPORA[corpus].clips) and len(clips) != whole:
            print(f"mser: warning: {corpus}: {len(clips)} of the {whole} clips that it has", file=sys.stderr)
    there = {normal(clip.emotion) for clip in clips}
    if strange := [word for word in reading.words if word not in there]:
        raise UserError(f"--map {strange[0]}=…: no clip has this emotion; there are {', '.join(sorted(there)[:20])}")
    return clips


def _labels_of(words: Mapping[str, str]) -> dict[str, str | None]:
    result = {}
    for word, meant in words.items():
        try:
            result[normal(word)] = to_label(meant)
        except KeyError:
            raise UserError(
                f"--map {word}={meant}: no label {meant!r}; use {', '.join(LABELS)}, or other to drop such clips (a "
                "manifest's column label takes any name)"
            ) from None
    return result


def _that_are_there(clips: Iterable[Recording], left_out: LeftOut) -> list[Recording]:
    found = []
    for clip in clips:
        if why := why_no_file(clip.path):
            left_out.add(clip, f"{why}; mend or remove it")
        else:
            found.append(clip)
    return found


def _all_in(clips: Iterable[Recording], split: str, others: Collection[str]) -> list[Recording]:
    if split not in SPLITS:
        raise UserError(f"--split {split}: no split; use {', '.join(SPLITS)}")
    if others:
        raise UserError(f"--split {split} puts all clips into one split: leave out {', '.join(others)}")
    return [replace(clip, split=split) for clip in clips]


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


def _recipe(clips: Iterable[Recording], audio_format: str, decoding: Decoding) -> str:
    """A hash of all that decides a shard's bytes. A recording stands in it by its path, size and time of change."""
    code = [__version__, shard_index.VERSION, soundfile.__libsndfile_version__, soxr.__libsoxr_version__]
    digest = hashlib.sha256(json.dumps([code, audio_format, decoding]).encode())
    for clip in clips:
        try:
            status = clip.path.stat()
        except OSError as error:
            raise unreadable(clip.path, error) from None
        recording = [str(clip.path.absolute()), clip.inside, status.st_size, status.st_mtime_ns]
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
        **({"votes": clip.votes} if clip.votes else {}),
    }


def _part(clips: Iterable[Recording], split: str) -> dict[str, int]:
    own = [clip for clip in clips if clip.split == split]
    return {"clips": len(own), "speakers": len({(clip.corpus, clip.speaker) for clip in own})}


def _shared_speakers(clips: Iterable[Recording]) -> int:
    pairs = {(clip.corpus, clip.speaker, clip.split) for clip in clips}
    return sum(count > 1 for count in Counter((corpus, speaker) for corpus, speaker, _ in pairs).values())


def _without_duplicates(
    clips: list[Recording], left_out: LeftOut, decoding: Decoding, workers: int | None, progress: bool
) -> tuple[list[Recording], dict[str, int]]:
    """The clips without those whose audio an earlier one has; and what was dropped, as `pack` returns it."""
    first: dict[int, Recording] = {}
    dropped = {"clips": 0, "other_labels": 0, "other_splits": 0}
    with closing(encode_all(clips, None, decoding, workers)) as encoded:
        shown = bar(encoded, title="look for duplicates", unit="clip", total=len(clips), disable=not progress)
        for clip, got in zip(clips, shown, strict=True):
            if isinstance(got, str):
                left_out.add(clip, got)
            elif (kept := first.setdefault(got.sound, clip)) is not clip:
                dropped["clips"] += 1
                dropped["other_labels"] += clip.label != kept.label
                dropped["other_splits"] += clip.split != kept.split
    return list(first.values()), dropped
