"""`mser verify`: everything that can be wrong with a data set, found and named."""

import hashlib
from pathlib import Path
from typing import Any

from mser_dist.data import audio, shard_index, tarsafe
from mser_dist.data.shards import ShardSet, list_shards
from mser_dist.errors import UserError

MAX_DRIFT = 0.1  # seconds by which a lossy file's indexed and decoded lengths may differ (codec delay)


def verify(path: str | Path) -> list[str]:
    """Check a data set to the last byte and sample; returns the problems, one line each ([] = sound).

    Every shard: there, of the size and SHA-256 of its index and of dataset.json, a sound tar whose members are exactly
    the indexed ones, every sample read and decoded. No extra shard, no key twice.
    """
    try:
        shards, description = list_shards(path)
    except UserError as error:
        return [str(error)]
    problems: list[str] = []
    facts: dict[str, dict[str, Any]] = {}
    if description is not None:
        facts = {shard["file"]: shard for split in description["splits"].values() for shard in split["shards"]}
        extra = {shard.name for shard in Path(path).glob("*.tar")} - facts.keys()
        problems += [f"{Path(path) / name}: an extra shard that dataset.json does not list" for name in sorted(extra)]
        for name, split in description["splits"].items():
            if split["count"] != sum(shard["count"] for shard in split["shards"]):
                problems.append(f"{path}: dataset.json contradicts itself on the count of split {name}")
    first_seen: dict[str, Path] = {}
    for shard in shards:
        try:
            problems += _verify_shard(shard, facts.get(shard.name), first_seen)
        except UserError as error:
            problems.append(str(error))
    return problems


def _verify_shard(shard: Path, expected: dict[str, Any] | None, first_seen: dict[str, Path]) -> list[str]:
    if expected is not None and shard.is_file() and not shard.with_name(shard.name + shard_index.SUFFIX).exists():
        return [f"{shard}: its index is missing; {shard_index.REPACK}"]
    index = shard_index.load(shard)
    problems = []
    for name in ("count", "bytes", "sha256"):
        if expected is not None and expected[name] != index[name]:
            problems.append(f"{shard}: the {name} of its index is not that of dataset.json")
    with shard.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != index["sha256"]:
            problems.append(f"{shard}: its bytes are not those that were written (SHA-256 differs)")
    for row in index["samples"]:
        if (first := first_seen.setdefault(row["key"], shard)) is not shard:
            problems.append(f"{shard}: the key {row['key']!r} is also in {first}")
    if len({row["key"] for row in index["samples"]}) != index["count"]:
        problems.append(f"{shard}: its index has a key twice")
    problems += _verify_members(shard, index)
    return problems + _verify_samples(shard, index)


def _verify_members(shard: Path, index: dict[str, Any]) -> list[str]:
    """The tar's own listing against the index: nothing lost, added or moved."""
    indexed = {tuple(row[part]) for row in index["samples"] for part in ("audio", "json") if row[part]}
    try:
        members = list(tarsafe.scan(shard))
    except UserError as error:
        return [str(error)]
    there = {
        (m.offset, m.size) for m in members if m.name.rpartition(".")[2].lower() not in shard_index.IGNORED_EXTENSIONS
    }
    if there == indexed:
        return []
    return [
        f"{shard}: {len(indexed - there)} indexed files are not in the tar, "
        f"{len(there - indexed)} files are not indexed"
    ]


def _verify_samples(shard: Path, index: dict[str, Any]) -> list[str]:
    """Read and decode every sample, and hold its json against the index."""
    if not index["samples"]:
        return []
    problems = []
    samples = ShardSet([shard], [(0, index["split"], row) for row in index["samples"]])
    for i, row in enumerate(index["samples"]):
        where = samples.where(i)
        try:
            sample = samples.read(i)
            wave = audio.decode(sample.audio, where)
            if not index.get("foreign"):
                shard_index.check_meta(sample.meta, where)
        except UserError as error:
            problems.append(str(error))
            continue
        if abs(len(wave) / audio.SAMPLE_RATE - row["duration"]) > MAX_DRIFT:
            problems.append(
                f"{where}: {len(wave) / audio.SAMPLE_RATE:.2f} s of audio, its index says {row['duration']:.2f} s"
            )
        differing = [
            name for name in shard_index.ROW_FIELDS if not index.get("foreign") and sample.meta[name] != row[name]
        ]
        if differing:
            problems.append(f"{where}: its json and its index differ in {', '.join(differing)}")
    return problems
