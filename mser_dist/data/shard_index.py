"""The index beside each shard: what it holds and where, so that a set is opened without reading one tar.

`<shard>.tar.idx.json`: {version, split, count, bytes, sha256, foreign, samples}; a sample's row is {key, ext, audio:
[offset, size], json: [offset, size] or null, crc: crc32 of audio then json, duration (s), label, emotion, language,
speaker, corpus, source_id}, and for a tar not written here where the raw header's name differs from `<key>.<ext>`:
members: [audio's, json's].
"""

import hashlib
import json
import os
import re
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from mser_dist.data import tarsafe
from mser_dist.errors import UserError

VERSION = 1
SUFFIX = ".idx.json"
AUDIO_EXTENSIONS = frozenset({"wav", "flac", "ogg", "opus", "mp3"})
IGNORED_EXTENSIONS = frozenset({"txt", "cls"})  # common beside audio in WebDataset shards; what they say is not used
MAX_JSON = 1 << 20  # bytes of one sample's json
REPACK = "run mser pack again, or copy the shard again"

META_FIELDS: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "emotion": str,
    "label": (str, type(None)),
    "language": str,
    "speaker": str,
    "gender": (str, type(None)),
    "corpus": str,
    "split": str,
    "text": (str, type(None)),
    "source_id": str,
    "synthetic": bool,
    "duration": (float, int),
    "sample_rate": int,
}
"""The fields of a sample's json and their types: the data contract."""

ROW_FIELDS = ("duration", "label", "emotion", "language", "speaker", "corpus", "source_id")
"""The fields of the json that the index repeats, to filter and plan by."""

_ROW_KEYS = frozenset({"key", "ext", "audio", "json", "crc", *ROW_FIELDS})


def check_meta(meta: dict[str, Any], where: str) -> None:
    """UserError naming `where` unless `meta` has every field of the contract with its type."""
    for name, kinds in META_FIELDS.items():
        if name not in meta:
            raise UserError(f"{where}: the sample has no {name!r}; every sample needs {', '.join(META_FIELDS)}")
        if not isinstance(meta[name], kinds) or (isinstance(meta[name], bool) and kinds is not bool):
            raise UserError(
                f"{where}: {name!r} is {meta[name]!r}, of the wrong type; see the data contract in shard_index.py"
            )
    for name in ("emotion", "language", "speaker", "corpus", "source_id"):
        if not meta[name]:
            raise UserError(f"{where}: {name!r} is empty; every sample needs one")
    if not 0 < meta["duration"] < float("inf") or meta["sample_rate"] <= 0:
        raise UserError(f"{where}: duration {meta['duration']} s at {meta['sample_rate']} Hz; both must be above 0")


def crc(audio: bytes, text: bytes) -> int:
    """The checksum of a sample's two files; cheap enough for every read (1 GB/s and more)."""
    return zlib.crc32(text, zlib.crc32(audio))


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that `path` is either the old file or the whole new one, also after a crash."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with staging.open("w", encoding="utf-8") as file:
            json.dump(value, file, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError naming the file where it is not there or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path, or {REPACK}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); {REPACK}") from None
    if not isinstance(value, dict) or value.get("version") != VERSION:
        raise UserError(f"{path}: not a file of version {VERSION} of this format; {REPACK}")
    return value


def load(shard: Path) -> dict[str, Any]:
    """A shard's index, made by a scan (and cached beside the shard where that can be written) when it has none.

    UserError where the shard is missing, or of another size than its index says.
    """
    if not shard.is_file():
        raise UserError(f"{shard}: the shard is missing; {REPACK}")
    path = shard.with_name(shard.name + SUFFIX)
    size = shard.stat().st_size
    if path.exists():
        index = read_json(path)
        if index.get("bytes") == size:
            _check_index(index, path)
            return index
        if not index.get("foreign"):
            raise UserError(f"{shard}: {size} bytes where its index says {index.get('bytes')} (truncated?); {REPACK}")
    index = from_tar(shard)
    with suppress(OSError):  # a read-only folder: the scan is done anew by the next run
        write_json(path, index)
    return index


def _check_index(index: dict[str, Any], path: Path) -> None:
    rows = index.get("samples")
    if (
        not isinstance(rows, list)
        or index.get("count") != len(rows)
        or not isinstance(index.get("split"), str)
        or not all(isinstance(row, dict) and row.keys() >= _ROW_KEYS for row in rows)
    ):
        raise UserError(f"{path}: the index contradicts itself; {REPACK}")


def from_tar(shard: Path) -> dict[str, Any]:
    """Index any WebDataset tar of audio by one scan of it; UserError for a tar or sample that cannot be read safely."""
    rows: dict[str, dict[str, Any]] = {}
    texts: dict[str, tarsafe.Member] = {}
    audios: dict[str, tarsafe.Member] = {}
    for member in tarsafe.scan(shard):
        # WebDataset's rule: the key is the path up to the first dot of the file name, the rest is the extension.
        folder, slash, name = member.name.rpartition("/")
        stem, _, ext = name.partition(".")
        key, ext = folder + slash + stem, ext.lower()
        if ext in IGNORED_EXTENSIONS:
            continue
        if ext != "json" and ext not in AUDIO_EXTENSIONS:
            raise UserError(
                f"{shard}: member {member.name!r} is neither audio ({', '.join(sorted(AUDIO_EXTENSIONS))}) nor json"
            )
        if key in (texts if ext == "json" else audios):
            raise UserError(
                f"{shard}: two {'json' if ext == 'json' else 'audio'} members of the key {key!r}; keys must be unique"
            )
        if ext == "json" and member.size > MAX_JSON:
            raise UserError(f"{shard}: {member.name!r} has {member.size} bytes; at most {MAX_JSON} are read")
        if ext == "json":
            texts[key] = member
        else:
            audios[key] = member
            rows[key] = {"key": key, "ext": ext}
    if orphans := texts.keys() - audios.keys():
        raise UserError(f"{shard}: the key {min(orphans)!r} has a json and no audio; {REPACK}")
    with shard.open("rb") as file:
        splits = {_fill_row(rows[key], audios[key], texts.get(key), file, shard) for key in rows}
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    split = splits.pop() if len(splits) == 1 else None
    if split is None:
        split = match[1] if (match := re.match(r"(train|val|test)\b", shard.name)) else ""
    samples = list(rows.values())
    return {
        "version": VERSION,
        "split": split,
        "count": len(samples),
        "bytes": shard.stat().st_size,
        "sha256": digest,
        "foreign": True,
        "samples": samples,
    }


def _fill_row(
    row: dict[str, Any], audio: tarsafe.Member, text: tarsafe.Member | None, file: Any, shard: Path
) -> str | None:
    """Complete a foreign sample's row from its files; returns the split its json names."""
    where = f"{shard}: sample {row['key']}"
    file.seek(audio.offset)
    data = file.read(audio.size)
    raw = b""
    if text is not None:
        file.seek(text.offset)
        raw = file.read(text.size)
    meta = parse_meta(raw, where) if raw else {}
    row["audio"] = [audio.offset, audio.size]
    row["json"] = None if text is None else [text.offset, text.size]
    row["crc"] = crc(data, raw)
    if (names := [audio.header_name, text.header_name if text else ""]) != [
        f"{row['key']}.{row['ext']}",
        f"{row['key']}.json",
    ]:
        row["members"] = names
    duration = meta.get("duration")
    if not isinstance(duration, (int, float)) or isinstance(duration, bool) or not 0 < duration < float("inf"):
        from mser_dist.data.audio import seconds

        duration = seconds(data, where)
    fallback = {"language": "und", "speaker": "", "corpus": shard.parent.name, "source_id": row["key"], "emotion": ""}
    for name in ROW_FIELDS:
        value = meta.get(name)
        row[name] = value if isinstance(value, str) else fallback.get(name)
    row["duration"] = float(duration)
    split = meta.get("split")
    return split if isinstance(split, str) else None


def parse_meta(raw: bytes, where: str) -> dict[str, Any]:
    """A sample's json; UserError naming `where` unless it is an object."""
    try:
        meta = json.loads(raw)
    except ValueError:
        meta = None
    if not isinstance(meta, dict):
        raise UserError(f"{where}: its json cannot be read; {REPACK}")
    return meta
