"""Writing a data set: tar shards, an index beside each, and `dataset.json` last. Whole or not there at all."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from mser_dist.data import shard_index, tarsafe
from mser_dist.errors import UserError

DATASET_FILE = "dataset.json"
LOCK_FILE = ".lock"  # in a staging folder only: held by its writer, and the mark of a set that is not whole
_KEY = re.compile(r"[A-Za-z0-9_+=-]{1,90}")  # `<key>.flac` must fit the 100 bytes of a ustar name, and hold one dot
_SPLIT = re.compile(r"[a-z][a-z0-9_]{0,31}")
_OUR_FILE = re.compile(r"(.+\.tar(\.idx\.json)?|dataset\.json|\.lock|\..+\.partial)")


class DatasetWriter:
    """Write samples into `<out>.partial`, which becomes `out` only when the `with` block ends without an error.

    Args:
        out: the folder to make. One that is not empty is refused, or with `overwrite` replaced at the very end (only if
            it holds nothing but shards).
        name: of the data set.
        made_by: how it was made (command, seed, versions …); kept in dataset.json. No times or hosts, so that equal
            input gives equal bytes.
        shard_samples: samples a shard at most.
        labels: the labels that samples may have beside None; None allows any.

    Raises UserError for a bad key, a repeated key, a sample that breaks the data contract, a full disk.
    """

    def __init__(
        self,
        out: str | Path,
        name: str,
        made_by: Mapping[str, Any],
        *,
        shard_samples: int = 512,
        labels: Collection[str] | None = None,
        overwrite: bool = False,
    ) -> None:
        if shard_samples < 1:
            raise ValueError(f"shard_samples must be at least 1, got {shard_samples}")
        self.out = Path(out).absolute()
        self.name = name
        self.made_by = dict(made_by)
        self.shard_samples = shard_samples
        self.labels = None if labels is None else frozenset(labels)
        self.overwrite = overwrite
        self._staging = self.out.with_name(self.out.name + ".partial")
        self._keys: set[str] = set()
        self._open: dict[str, _Shard] = {}
        self._done: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._totals = _Totals()

    def __enter__(self) -> Self:
        if _has_files(self.out):
            if not self.overwrite:
                raise UserError(f"{self.out}: already exists and is not empty; choose another folder, or overwrite it")
            _refuse_strangers(self.out)
        with _disk_errors(self._staging):
            self._staging.mkdir(parents=True, exist_ok=True)
            _refuse_strangers(self._staging)
            self._lock = (self._staging / LOCK_FILE).open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                raise UserError(
                    f"{self._staging}: another process is writing this data set; wait for it to end"
                ) from None
            for leftover in self._staging.iterdir():  # of a run that was killed
                if leftover.name != LOCK_FILE:
                    leftover.unlink()
        return self

    def write(self, split: str, key: str, audio: bytes, ext: str, meta: Mapping[str, Any]) -> None:
        """Add a sample: `<key>.<ext>` holding `audio` and `<key>.json` holding `meta` (`id` and `split` are filled
        in).
        """
        where = f"sample {key!r} of {self.name}"
        if not _KEY.fullmatch(key):
            raise UserError(f"{where}: a key is 1 to 90 of the characters A-Z a-z 0-9 _ + = -; rename this sample")
        if key in self._keys:
            raise UserError(f"{where}: the key comes twice; give every sample its own id")
        if not _SPLIT.fullmatch(split):
            raise UserError(f"{where}: {split!r} is no split name; use train, val or test")
        if ext not in shard_index.AUDIO_EXTENSIONS or not audio:
            raise UserError(
                f"{where}: {len(audio)} bytes of {ext!r}; audio is {', '.join(sorted(shard_index.AUDIO_EXTENSIONS))}"
            )
        full = {"id": key, "split": split, **meta}
        if full["id"] != key or full["split"] != split:
            raise UserError(
                f"{where}: its id {full['id']!r} or split {full['split']!r} is not that of its key and shard"
            )
        shard_index.check_meta(full, where)
        if self.labels is not None and full["label"] is not None and full["label"] not in self.labels:
            raise UserError(
                f"{where}: the label {full['label']!r} is not of the label set {', '.join(sorted(self.labels))}"
            )
        text = json.dumps(full, ensure_ascii=False, sort_keys=True).encode()
        with _disk_errors(self._staging):
            shard = self._open.get(split)
            if shard is None:
                shard = self._open[split] = _Shard(self._staging, split, len(self._done[split]))
            shard.add(key, ext, audio, text, full)
            if len(shard.rows) == self.shard_samples:
                self._finish(split)
        self._keys.add(key)
        self._totals.add(full)

    def _finish(self, split: str) -> None:
        self._done[split].append(self._open[split].finish())
        del self._open[split]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with _disk_errors(self._staging):
                    self._publish()
        finally:
            for shard in self._open.values():
                with suppress(OSError):  # on a full disk, closing tries to write the rest once more
                    shard.file.close()
            self._lock.close()
            shutil.rmtree(self._staging, ignore_errors=True)

    def _publish(self) -> None:
        if not self._keys:
            raise UserError(f"{self.out}: there is not one sample to write; check the source")
        for split in sorted(self._open):
            self._finish(split)
        splits = {
            split: {"shards": shards, "count": sum(s["count"] for s in shards), "hours": self._totals.hours(split)}
            for split, shards in sorted(self._done.items())
        }
        description = {"version": shard_index.VERSION, "name": self.name, "splits": splits, "made_by": self.made_by}
        shard_index.write_json(self._staging / DATASET_FILE, description | self._totals.as_json())
        (self._staging / LOCK_FILE).unlink()
        _fsync_folder(self._staging)
        if _has_files(self.out):
            old = self.out.with_name(self.out.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
            self._staging.rename(self.out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            self._staging.rename(self.out)
        _fsync_folder(self.out.parent)


class _Shard:
    """One tar being written, hashed on the way."""

    def __init__(self, folder: Path, split: str, number: int) -> None:
        self.path = folder / f"{split}-{number:06d}.tar"
        self.split = split
        self.file: BinaryIO = self.path.open("wb")
        self.rows: list[dict[str, Any]] = []
        self._hash = hashlib.sha256()
        self._size = 0

    def add(self, key: str, ext: str, audio: bytes, text: bytes, meta: Mapping[str, Any]) -> None:
        row: dict[str, Any] = {"key": key, "ext": ext}
        row["audio"] = self._member(f"{key}.{ext}", audio)
        row["json"] = self._member(f"{key}.json", text)
        row["crc"] = shard_index.crc(audio, text)
        self.rows.append(row | {name: meta[name] for name in shard_index.ROW_FIELDS})

    def _member(self, name: str, data: bytes) -> list[int]:
        self._put(tarsafe.header(name, len(data)))
        offset = self._size
        self._put(data)
        self._put(tarsafe.padding(len(data)))
        return [offset, len(data)]

    def _put(self, data: bytes) -> None:
        self.file.write(data)
        self._hash.update(data)
        self._size += len(data)

    def finish(self) -> dict[str, Any]:
        """End the tar, write its index, and return the shard's entry for dataset.json."""
        self._put(tarsafe.END)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        facts = {"count": len(self.rows), "bytes": self._size, "sha256": self._hash.hexdigest()}
        index = {"version": shard_index.VERSION, "split": self.split, **facts, "samples": self.rows}
        shard_index.write_json(self.path.with_name(self.path.name + shard_index.SUFFIX), index)
        return {"file": self.path.name, **facts}


class _Totals:
    """What dataset.json tells of the whole set."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._speakers: dict[str, set[str]] = defaultdict(set)
        self._rates: Counter[int] = Counter()
        self._labels: set[str] = set()

    def add(self, meta: Mapping[str, Any]) -> None:
        self._seconds[meta["split"]] += meta["duration"]
        self._counts[meta["language"], meta["emotion"], meta["split"]] += 1
        self._speakers[meta["split"]].add(meta["speaker"])
        self._rates[meta["sample_rate"]] += 1
        if meta["label"] is not None:
            self._labels.add(meta["label"])

    def hours(self, split: str) -> float:
        return round(self._seconds[split] / 3600, 6)

    def as_json(self) -> dict[str, Any]:
        totals: dict[str, dict[str, dict[str, int]]] = {}
        for (language, emotion, split), count in sorted(self._counts.items()):
            totals.setdefault(language, {}).setdefault(emotion, {})[split] = count
        return {
            "totals": totals,
            "labels": sorted(self._labels),
            "speakers": {split: sorted(names) for split, names in sorted(self._speakers.items())},
            "sample_rates": {str(rate): count for rate, count in sorted(self._rates.items())},
        }


def _has_files(folder: Path) -> bool:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file, where the folder of a data set is to go; choose another folder")
    return folder.is_dir() and any(folder.iterdir())


def _refuse_strangers(folder: Path) -> None:
    """What will be deleted must be ours: a wrong path given with overwrite must not cost anyone their files."""
    strangers = _strangers(folder.iterdir())
    if strangers:
        raise UserError(
            f"{folder}: holds {strangers[0]!r}, which is not of a data set, so it is not replaced; choose another"
        )


def _strangers(entries: Iterable[Path]) -> list[str]:
    return sorted(entry.name for entry in entries if entry.is_dir() or not _OUR_FILE.fullmatch(entry.name))


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Say what a user can do about a full disk or a folder that cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            parent = next(path for path in [folder, *folder.parents] if path.exists())
            free = shutil.disk_usage(parent).free / 2**20
            raise UserError(
                f"{folder}: the disk is full ({free:.0f} MiB free); free some space or write elsewhere"
            ) from None
        raise UserError(f"{folder}: cannot write ({error.strerror}); choose another folder") from None
