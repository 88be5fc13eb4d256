"""The index beside each shard: what it holds and where, so that a set is opened without reading one tar.

`<shard>.tar.idx.json`: {version, split, count, bytes, sha256, columns}; of a tar not written here also {foreign,
changed_ns, scan}: it is made anew when that tar changes. A column has one value a sample, in
the order of the tar: `key`; `audio_at`, `audio_size`, `json_at`, `json_size` (bytes; 0, 0 where there is no json);
`crc`, the crc32 of the audio with its 512-byte tar header before it, then of the json with its own; `duration` (s);
`source`, a hash of corpus and source_id, equal for parallel clips; `sound`, a hash of the decoded samples, equal for
identical audio, 0 where nobody has decoded it (a tar that is not ours, before `mser verify`) or the index is an older
one. The fields that repeat (`CODED`) are {"names": [...], "codes": [...]}: it is columns so that millions of samples
are opened in seconds. `peak` is the largest absolute sample in steps of 16 bits (`audio.peak`), before it was stored;
0 where `sound` is. `votes` (`votes.py`) is there only where some sample has them.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mser_dist.errors import UserError
from mser_dist.files import write_json
from mser_dist.shards import tarsafe
from mser_dist.shards.emotions import to_label
from mser_dist.shards.metadata import as_text
from mser_dist.shards.votes import are_sound, check_votes

VERSION = 2
SCAN = 3  # of what a scan of a tar that is not ours notes: an index of an earlier one is made anew
SUFFIX = ".idx.json"
AUDIO_EXTENSIONS = frozenset({"wav", "flac", "ogg", "opus", "mp3"})
IGNORED_EXTENSIONS = frozenset({"txt", "cls"})  # common beside audio in WebDataset shards; what they say is not used
MAX_JSON = 1 << 20  # bytes of one sample's json
MAX_DURATION = 1e9  # seconds: 30 years, no clip's
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
"""The fields of a sample's json and their types: the data contract. It may have `votes` too (`votes.py`)."""

CODED = ("label", "emotion", "language", "speaker", "gender", "corpus", "synthetic", "sample_rate")
"""The fields of the json that the index repeats, to filter and balance by."""

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]")
"""What no text of a sample may hold: it would break a message's one line, drive a terminal, or be no UTF-8."""

PLAIN = ("key", "audio_at", "audio_size", "json_at", "json_size", "crc", "duration", "source", "sound", "peak")


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
    for name in CODED:
        if isinstance(meta[name], str) and CONTROL.search(meta[name]):
            raise UserError(f"{where}: {name!r} is {meta[name]!r}, with control characters; take them out")
    if meta["label"] == "":
        raise UserError(f"{where}: 'label' is empty; it is null where annotators named no emotion")
    check_votes(meta.get("votes"), where)
    if not 0 < meta["duration"] < float("inf") or meta["sample_rate"] <= 0:
        raise UserError(f"{where}: duration {meta['duration']} s at {meta['sample_rate']} Hz; both must be above 0")


def crc(audio: bytes | memoryview, text: bytes | memoryview = b"") -> int:
    """The checksum of a sample's two files, each with its tar header; cheap enough for every read (1 GB/s and more)."""
    return zlib.crc32(text, zlib.crc32(audio))


def source(corpus: str, source_id: str) -> int:
    """The number that parallel clips share, 63 bits: equal ids in two corpora are not one utterance."""
    digest = hashlib.blake2b(f"{corpus}/{source_id}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sound(pcm: NDArray[np.int16]) -> int:
    """The number that clips of identical audio share, 63 bits and never 0, of the int16 [samples] that they decode to.

    Of ten million different clips, two have the same one by chance in 5 of a million sets.
    """
    digest = hashlib.blake2b(pcm.astype("<i2", copy=False).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1 or 1


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of the fields `PLAIN` and `CODED` as the columns of an index."""
    result: dict[str, Any] = {name: [row[name] for row in rows] for name in PLAIN}
    for name in CODED:
        number: dict[Any, int] = {}
        codes = [number.setdefault(row[name], len(number)) for row in rows]
        result[name] = {"names": list(number), "codes": codes}
    if any(row.get("votes") for row in rows):
        result["votes"] = [row.get("votes") for row in rows]
    return result


def rows(index: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The samples of an index, one dict each: the reverse of `columns`."""
    listed = index["columns"]
    for i in range(index["count"]):
        row = {name: listed[name][i] for name in PLAIN}
        row["votes"] = listed["votes"][i] if "votes" in listed else None
        yield row | {name: listed[name]["names"][listed[name]["codes"][i]] for name in CODED}


def read_facts(path: Path) -> dict[str, Any]:
    """A JSON object of this version; UserError naming the file where it is not there or not one."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path, or {REPACK}") from None
    return parse_json(raw, str(path))


def parse_json(raw: bytes, name: str) -> dict[str, Any]:
    """A JSON object of this version; UserError with `name` where it is not one."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON ({error}); {REPACK}") from None
    if not isinstance(value, dict) or value.get("version") != VERSION:
        raise UserError(f"{name}: not a file of version {VERSION} of this format; {REPACK}")
    return value


def parse(raw: bytes, name: str) -> dict[str, Any]:
    """An index; UserError with `name` unless it is whole."""
    index = parse_json(raw, name)
    with suppress(KeyError, TypeError, AttributeError, MemoryError, OverflowError):  # `_check` says what is wrong
        for column in ("sound", "peak"):  # an earlier version's has none
            index["columns"].setdefault(column, [0] * len(index["columns"]["key"]))
    _check(index, name)
    return index


def load(shard: Path) -> dict[str, Any]:
    """A shard's index, made by a scan (and cached beside the shard where that can be written) when it has none.

    UserError where the shard is missing, or of another size than its index says.
    """
    if not shard.is_file():
        raise UserError(f"{shard}: the shard is missing; {REPACK}")
    path = shard.with_name(shard.name + SUFFIX)
    size = shard.stat().st_size
    if path.exists():
        raw = path.read_bytes()
        # An index that was made here of a foreign tar that has changed since, or by an older version: made anew.
        made_of = b'"changed_ns":%d,' % shard.stat().st_mtime_ns in raw
        if (made_of and is_of_this_scan(raw)) or b'"foreign":true' not in raw:
            index = parse(raw, str(path))
            if index["bytes"] != size:
                raise UserError(f"{shard}: {size} bytes where its index says {index['bytes']} (truncated?); {REPACK}")
            return index
    index = from_tar(shard)
    with suppress(OSError):  # a read-only folder: the scan is done anew by the next run
        write_json(path, index, compact=True)
    return index


def is_of_this_scan(raw: bytes) -> bool:
    """Whether the index of a tar that is not ours was made by a scan as `from_tar` does it now."""
    return b'"scan":%d,' % SCAN in raw and b'"version":%d' % VERSION in raw


def _check(index: dict[str, Any], name: str) -> None:
    """An index may be anyone's: what it says is printed, and memory is taken for it, before a checksum can tell."""
    try:
        sound = (
            isinstance(index["split"], str)
            and not CONTROL.search(index["split"])
            and isinstance(index["sha256"], str)
            and all(type(index[number]) is int for number in ("bytes", "count"))
            and _places_fit(index["columns"], index["count"], index["bytes"])
            and all(map(str.isprintable, index["columns"]["key"]))
            and all(_names_fit(column, index["columns"][column], index["count"]) for column in CODED)
            and ("votes" not in index["columns"] or are_sound(index["columns"]["votes"], index["count"]))
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        sound = False
    if not sound:
        raise UserError(f"{name}: the index contradicts itself or its tar; {REPACK}")


def _places_fit(listed: Mapping[str, Any], count: int, size: int) -> bool:
    """Whether the columns of numbers have `count` rows, whose files lie within the `size` bytes of the tar."""
    if any(len(listed[column]) != count for column in PLAIN):
        return False
    if not count:
        return True
    column = {of: np.array(listed[of]) for of in PLAIN if of != "key"}  # (count,) each
    seconds = column.pop("duration")
    if seconds.dtype.kind not in "if" or not ((seconds >= 0) & (seconds < MAX_DURATION)).all():
        return False
    if any(values.dtype.kind != "i" or values.ndim != 1 or values.min() < 0 for values in column.values()):
        return False

    def within(at: Any, length: Any) -> bool:
        return bool(((at >= tarsafe.BLOCK) & (at <= size) & (length <= size - at)).all())

    text = column["json_at"] > 0  # (count,) whether a sample has one
    return within(column["audio_at"], column["audio_size"]) and within(
        column["json_at"][text], column["json_size"][text]
    )


def _names_fit(column: str, coded: Mapping[str, Any], count: int) -> bool:
    """Whether a coded column has `count` codes of values of the field's type."""
    codes, names = coded["codes"], coded["names"]
    return (
        len(codes) == count
        and all(type(code) is int and 0 <= code < len(names) for code in set(codes))
        and all(isinstance(value, META_FIELDS[column]) for value in names)
        and not any(isinstance(value, str) and CONTROL.search(value) for value in names)
    )


def from_tar(shard: Path) -> dict[str, Any]:
    """Index any WebDataset tar of audio by one scan of it; UserError for a tar or sample that cannot be read safely."""
    texts: dict[str, tarsafe.Member] = {}
    audios: dict[str, tarsafe.Member] = {}
    ended: set[str] = set()  # keys that other members have followed
    last = None
    for member in tarsafe.scan(shard):
        key, ext = split_name(member.name)
        if key != last:
            if key in ended:
                raise UserError(
                    f"{shard}: the members of the key {key!r} are not side by side, so that WebDataset readers would "
                    "take them for two samples; write the tar again in the order of its keys"
                )
            if last is not None:
                ended.add(last)
            last = key
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
    if orphans := texts.keys() - audios.keys():
        raise UserError(f"{shard}: the key {min(orphans)!r} has a json and no audio; {REPACK}")
    with shard.open("rb") as file:
        samples, splits = [], set()
        for key, audio in audios.items():
            row, split = _foreign_row(key, audio, texts.get(key), file, shard)
            samples.append(row)
            splits.add(split)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    only = splits.pop() if len(splits) == 1 else None
    if only is None:
        only = match[1] if (match := re.match(r"(train|val|test)\b", shard.name)) else ""
    return {
        "version": VERSION,
        "split": only,
        "count": len(samples),
        "bytes": shard.stat().st_size,
        "sha256": digest,
        "foreign": True,
        "changed_ns": shard.stat().st_mtime_ns,
        "scan": SCAN,
        "columns": columns(samples),
    }


def split_name(member: str) -> tuple[str, str]:
    """(key, extension) by WebDataset's rule: the key is the path up to the first dot of the file name."""
    folder, slash, name = member.rpartition("/")
    stem, _, ext = name.partition(".")
    return folder + slash + stem, ext.lower()


def _foreign_row(
    key: str, audio: tarsafe.Member, text: tarsafe.Member | None, file: BinaryIO, shard: Path
) -> tuple[dict[str, Any], str | None]:
    """A foreign sample's row, from its files; and the split that its json names."""
    where = f"{shard}: sample {key}"
    file.seek(audio.offset - tarsafe.BLOCK)
    data = file.read(tarsafe.BLOCK + audio.size)
    raw = b""
    if text is not None:
        file.seek(text.offset - tarsafe.BLOCK)
        raw = file.read(tarsafe.BLOCK + text.size)
    meta = parse_meta(raw[tarsafe.BLOCK :], where) if raw else {}
    duration = _number(meta.get("duration"), MAX_DURATION)
    rate = _number(meta.get("sample_rate"), float(1 << 31))
    if duration is None:
        from mser_dist.audio import seconds

        duration = seconds(data[tarsafe.BLOCK :], where)

    def word(name: str, fallback: str | None) -> str | None:
        value = as_text(meta.get(name))
        if value is not None and CONTROL.search(value):
            raise UserError(f"{where}: its json has a {name!r} that cannot be printed, {value[:40]!r}; mend that json")
        return fallback if value is None else value

    corpus = word("corpus", shard.parent.name)
    row = {
        "key": key,
        "audio_at": audio.offset,
        "audio_size": audio.size,
        "json_at": text.offset if text else 0,
        "json_size": text.size if text else 0,
        "crc": crc(data, raw),
        "duration": duration,
        "source": source(str(corpus), str(word("source_id", key))),
        "sound": 0,
        "peak": 0,
        "label": word("label", None) or _label(word("emotion", "")),
        "emotion": word("emotion", ""),
        "language": word("language", "und"),
        "speaker": word("speaker", ""),
        "gender": word("gender", None),
        "corpus": corpus,
        "synthetic": (as_text(meta.get("synthetic")) or "").lower() in ("true", "1"),
        "sample_rate": int(rate or 0),
        # Elsewhere the word may mean anything; only what looks like ours is held to be.
        "votes": check_votes(votes, where) if isinstance(votes := meta.get("votes"), dict) else None,
    }
    return row, word("split", None)


def _number(value: Any, limit: float) -> float | None:
    """A number above 0 and below `limit`, which may stand there as a text; None where it is none."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else 0.0
    except (ValueError, OverflowError):
        return None
    return number if 0 < number < limit else None


def _label(emotion: str | None) -> str | None:
    try:
        return to_label(emotion or "")
    except KeyError:
        return None


def parse_meta(raw: bytes, where: str) -> dict[str, Any]:
    """A sample's json; UserError naming `where` unless it is an object."""
    try:
        meta = json.loads(raw)
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        raise UserError(f"{where}: its json cannot be read; {REPACK}")
    return meta
