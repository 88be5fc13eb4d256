"""`mser verify`: everything that can be wrong with a data set, found and named."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from mser_dist import audio
from mser_dist.errors import UserError
from mser_dist.files import file_sha256, write_json
from mser_dist.progress import bar
from mser_dist.shards import index as shard_index
from mser_dist.shards import tarsafe
from mser_dist.shards.columns import Gathered
from mser_dist.shards.index import SUFFIX
from mser_dist.shards.reader import Ref, Shard, ShardReader
from mser_dist.shards.remote import is_remote
from mser_dist.shards.source import check_there, extra_shards, facts, list_shards
from mser_dist.shards.votes import check_votes
from mser_dist.shards.writer import DATASET_FILE, describe
from mser_dist.tables import count

MAX_DRIFT = 0.1  # seconds by which a lossy file's indexed and decoded lengths may differ (codec delay)


def verify(path: str | Path, progress: bool = False, into: Gathered | None = None) -> list[str]:
    """Check a local data set to the last byte and sample; returns the problems, one line each ([] = sound).

    into: takes the columns, with the hashes of the samples as they were decoded here, for `repeats`. Those of a tar
    that is not ours are kept in its index.

    Every shard: there, of the size and SHA-256 of its index and of dataset.json, a sound tar whose members are exactly
    the indexed ones, every sample read and decoded. No extra shard, no key twice. Raises `UserError` where there is no
    set at all.
    """
    if is_remote(path):
        raise UserError(f"{path}: only a local data set can be verified; copy it to this machine first")
    check_there(path)  # no set at all is not the damage of one
    try:
        shards, description = list_shards(path)
        expected = facts(description, str(path)) if description else {}
    except UserError as error:
        return [str(error)]
    problems: list[str] = []
    if description is not None:
        extra = extra_shards(path, expected)
        problems += [f"{shard}: an extra shard that dataset.json does not list" for shard in extra]
        stray = {file.name.removesuffix(SUFFIX) for file in Path(path).glob(f"*{SUFFIX}")} - expected.keys()
        problems += [f"{Path(path) / name}{SUFFIX}: an index that dataset.json does not list" for name in sorted(stray)]
    first_seen: dict[str, Path] = {}
    number = 1 + max(into.sets, default=-1) if into else 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # decoding and hashing let other threads run
        results = pool.map(partial(_verify_shard, expected=expected), shards)
        for shard, (index, found) in zip(
            shards, bar(results, title="verify", unit="shard", total=len(shards), disable=not progress), strict=True
        ):
            problems += found
            if index and into:
                into.add(number, Shard(str(shard), index["bytes"], index["sha256"]), index)
            for key in index["columns"]["key"] if index else ():
                if (first := first_seen.setdefault(key, shard)) is not shard:
                    problems.append(f"{shard}: the key {key!r} is also in {first}")
    if not first_seen and not problems:
        problems.append(f"{path}: no sample is in it, the set is empty")
    if description is not None and not problems:
        for name, value in describe(Path(path), expected).items():
            if description.get(name) != value:
                problems.append(f"{Path(path) / DATASET_FILE}: its {name!r} is not what the shards hold")
    return problems


def _verify_shard(shard: Path, expected: Mapping[str, dict[str, Any]]) -> tuple[dict[str, Any] | None, list[str]]:
    """(index, if there is one, with the hashes of all samples that could be decoded; problems) of one shard."""
    fact = expected.get(shard.name)
    if fact is not None and shard.is_file() and not shard.with_name(shard.name + SUFFIX).exists():
        return None, [f"{shard}: its index is missing; {shard_index.REPACK}"]
    try:
        index = shard_index.load(shard)
    except UserError as error:
        return None, [str(error)]
    problems = []
    index_path = shard.with_name(shard.name + SUFFIX)
    if fact is not None and file_sha256(index_path) != fact["index"]:
        problems.append(f"{index_path}: its bytes are not those that were written (SHA-256 differs)")
    for name in ("count", "bytes", "sha256"):
        if fact is not None and fact[name] != index[name]:
            problems.append(f"{shard}: the {name} of its index is not that of dataset.json")
    if index.get("foreign"):
        try:
            unheard = {"sound": None, "peak": None}  # a scan decodes nothing
            if shard_index.from_tar(shard)["columns"] | unheard != index["columns"] | unheard:
                problems.append(f"{index_path}: not what a new scan of the tar gives; delete this index")
        except UserError as error:
            problems.append(str(error))
    with shard.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != index["sha256"]:
            problems.append(f"{shard}: its bytes are not those that were written (SHA-256 differs)")
    keys = index["columns"]["key"]
    problems += [f"{shard}: its index has the key {key!r} {n} times" for key, n in Counter(keys).items() if n > 1]
    problems += _verify_members(shard, index)
    heard, found = _verify_samples(shard, index)
    if not index.get("foreign"):
        heard["peak"] = index["columns"]["peak"]  # that of before it was stored
    if index["columns"] != index["columns"] | heard:
        index["columns"] |= heard
        if index.get("foreign") and not problems:
            with suppress(OSError):  # a read-only folder: they are found anew by the next run
                write_json(index_path, index, compact=True)
    return index, problems + found


def _verify_members(shard: Path, index: dict[str, Any]) -> list[str]:
    """The tar's own listing against the index: nothing lost, added, moved or renamed."""
    indexed = set()
    for row in shard_index.rows(index):
        indexed.add((row["key"], row["audio_at"], row["audio_size"]))
        if row["json_at"]:
            indexed.add((row["key"], row["json_at"], row["json_size"]))
    try:
        members = list(tarsafe.scan(shard))
    except UserError as error:
        return [str(error)]
    there = set()
    for member in members:
        key, ext = shard_index.split_name(member.name)
        if ext not in shard_index.IGNORED_EXTENSIONS:
            there.add((key, member.offset, member.size))
    if there == indexed:
        return []
    return [
        f"{shard}: {count(len(indexed - there), 'indexed file')} not in the tar, "
        f"{count(len(there - indexed), 'file')} not indexed"
    ]


def _verify_samples(shard: Path, index: dict[str, Any]) -> tuple[dict[str, list[int]], list[str]]:
    """Read and decode every sample, and hold its json against the index: hashes and peaks of the samples, problems."""
    problems = []
    sounds, peaks = [0] * index["count"], [0] * index["count"]
    reader = ShardReader([Shard(str(shard), index["bytes"], index["sha256"])], None)
    for i, row in enumerate(shard_index.rows(index)):
        where = f"{shard}: sample {row['key']}"
        place = (row[name] for name in ("audio_at", "audio_size", "json_at", "json_size", "crc"))
        try:
            data, text = reader.read(Ref(i, 0, *place))
        except UserError as error:
            problems.append(f"{where}: {error}")
            continue
        try:
            wave = audio.decode(data, where)
            sounds[i], peaks[i] = shard_index.sound(audio.to_pcm16(wave)), audio.peak(wave)
            meta = {} if index.get("foreign") else shard_index.parse_meta(text, where)
            if meta:
                shard_index.check_meta(meta, where)
        except UserError as error:
            problems.append(str(error))
            continue
        if abs(len(wave) / audio.SAMPLE_RATE - row["duration"]) > MAX_DRIFT:
            problems.append(
                f"{where}: {len(wave) / audio.SAMPLE_RATE:.2f} s of audio, its index says {row['duration']:.2f} s"
            )
        if meta:
            differing = [name for name in (*shard_index.CODED, "duration") if meta[name] != row[name]]
            if check_votes(meta.get("votes"), where) != row["votes"]:
                differing.append("votes")
            if row["sound"] not in (0, sounds[i]):
                differing.append("sound")
            if row["peak"] and min(row["peak"], 32767) != min(peaks[i], 32767):  # 16 bits end there
                differing.append("peak")
            if meta["split"] != index["split"]:
                differing.append("split")
            if shard_index.source(meta["corpus"], meta["source_id"]) != row["source"]:
                differing.append("source_id")
            if differing:
                problems.append(f"{where}: its files and its index differ in {', '.join(differing)}")
    return {"sound": sounds, "peak": peaks}, problems
