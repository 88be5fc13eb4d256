"""Writing a data set: tar shards, an index beside each, and `dataset.json` last. Whole or not there at all."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from mser_dist.errors import UserError
from mser_dist.files import file_sha256, write_json
from mser_dist.shards import index as shard_index
from mser_dist.shards import tarsafe
from mser_dist.shards.journal import JOURNAL_FILE, Journal
from mser_dist.shards.votes import check_votes

DATASET_FILE = "dataset.json"
LOCK_FILE = ".lock"  # in a staging folder only: held by its writer, and the mark of a set that is not whole
_KEY = re.compile(r"[A-Za-z0-9_+=-]{1,90}")  # `<key>.flac` must fit the 100 bytes of a ustar name, and hold one dot
_SPLIT = re.compile(r"[a-z][a-z0-9_]{0,31}")
_OUR_FILE = re.compile(
    r"(.+\.tar(\.idx\.json)?|dataset\.json|README\.md|selection(_\w+)?\.(csv|svg)|\.lock|\.packed|\..+\.partial)"
)


def shard_name(split: str, number: int) -> str:
    """The file of a split's shard, counted from 0."""
    return f"{split}-{number:06d}.tar"


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
        overwrite: see `out`.
        recipes: the file of every shard (`shard_name`) → a word that stands for all that decides its bytes. With them,
            a writer that is stopped leaves its finished shards in `<out>.partial`, and the next one keeps those that
            are whole and of the same recipe: `kept` names them, and their samples must not be written again. Without
            recipes, an error leaves nothing.
        progress: show a bar while the shards that are there are checked.

    Inside the block, `kept` is the set of shards that were there and `discarded` the number of those that were finished
    once, but are damaged or have another recipe.

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
        recipes: Mapping[str, str] | None = None,
        progress: bool = False,
    ) -> None:
        if shard_samples < 1:
            raise ValueError(f"shard_samples must be at least 1, got {shard_samples}")
        self.out = Path(out).absolute()
        self.name = name
        self.made_by = dict(made_by)
        self.shard_samples = shard_samples
        self.labels = None if labels is None else frozenset(labels)
        self.overwrite = overwrite
        self.kept: frozenset[str] = frozenset()
        self.discarded = 0
        self._recipes = recipes
        self._progress = progress
        self._staging = self.out.with_name(self.out.name + ".partial")
        self._journal: Journal | None = None
        self._keys: set[str] = set()
        self._open: dict[str, _Shard] = {}
        self._next: Counter[str] = Counter()  # split → the number to look at for its next shard
        self._done: set[str] = set()  # the files of the finished shards
        self._empty: set[str] = set()  # the files of those that hold nothing, and so are not there

    def __enter__(self) -> Self:
        if _has_files(self.out):
            if not self.overwrite:
                raise UserError(f"{self.out}: already exists and is not empty; choose another, or --overwrite it")
            _refuse_strangers(self.out)
        with _disk_errors(self._staging):
            self._staging.mkdir(parents=True, exist_ok=True)
            _refuse_strangers(self._staging)
            self._lock = (self._staging / LOCK_FILE).open("wb")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                raise UserError(
                    f"{self._staging}: another process is writing this data set; wait for it to end"
                ) from None
            if self._recipes is not None:
                self._journal = Journal(self._staging, self._recipes, self._progress)
                self._keys.update(*self._journal.kept.values())
                self.kept, self.discarded = frozenset(self._journal.kept), self._journal.discarded
                self._done.update(self.kept)
            self._remove_unfinished()  # first of all: on a full disk it makes room
            if self._journal:
                self._journal.start()
        return self

    def _remove_unfinished(self) -> None:
        """Leave nothing in the staging folder but the finished shards."""
        whole = {LOCK_FILE, *self._done, *(file + shard_index.SUFFIX for file in self._done)}
        if self._journal:
            whole.add(JOURNAL_FILE)
        for path in list(self._staging.iterdir()):
            if path.name not in whole:
                path.unlink()

    def write(
        self, split: str, key: str, audio: bytes, ext: str, meta: Mapping[str, Any], sound: int = 0, peak: int = 0
    ) -> None:
        """Add a sample: `<key>.<ext>` holding `audio` and `<key>.json` holding `meta` (`id` and `split` are filled
        in). sound: `shard_index.sound` of what `audio` decodes to, peak: `audio.peak` of what it was made of; 0 where
        that is not known.
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
                shard = self._open[split] = _Shard(self._staging / self._new_shard(split), split)
            shard.add(key, ext, audio, text, full, sound, peak)
            if len(shard.rows) == self.shard_samples:
                self._finish(split)
        self._keys.add(key)

    def beside(self, name: str, data: bytes) -> None:
        """Put a file beside the shards that tells of them: README.md, selection.csv, selection_….svg."""
        if not _OUR_FILE.fullmatch(name):
            raise ValueError(f"{name} would not be known for a file of a set")
        with _disk_errors(self._staging):
            (self._staging / name).write_bytes(data)

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def end_shard(self, split: str) -> None:
        """The split's shard is all that there is of it: fewer than `shard_samples`, or none, and then it is left
        out."""
        if split in self._open:
            with _disk_errors(self._staging):
                self._finish(split)
        else:
            self._empty.add(self._new_shard(split))

    def _new_shard(self, split: str) -> str:
        """The split's first shard that is not there yet."""
        while (file := shard_name(split, self._next[split])) in self._done | self._empty:
            self._next[split] += 1
        return file

    def _finish(self, split: str) -> None:
        shard = self._open[split]
        shard.finish()
        self._done.add(shard.path.name)  # before the journal: Ctrl-C while that waits for the disk costs no shard
        if self._journal:
            self._journal.add(shard.path.name)
        del self._open[split]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        published = False
        try:
            if kind is None:
                with _disk_errors(self._staging):
                    self._publish()
                published = True
        finally:
            for file in (*(shard.file for shard in self._open.values()), self._journal):
                with suppress(OSError):  # on a full disk, closing tries to write the rest once more
                    if file:
                        file.close()
            if not published:
                self._clean_up()
            self._lock.close()  # last: until here no other writer comes in

    def _clean_up(self) -> None:
        """After an error: room on the disk for others, but finished shards stay for the next writer."""
        if self._journal and self._done:
            with suppress(OSError):
                self._remove_unfinished()
        else:
            shutil.rmtree(self._staging, ignore_errors=True)

    def _publish(self) -> None:
        if not self._keys:
            raise UserError(f"{self.out}: there is not one sample to write; check the source")
        for split in sorted(self._open):
            self._finish(split)
        if self._recipes is not None and self._done | self._empty != self._recipes.keys():
            raise ValueError("the shards that were written are not those that recipes were given of")
        description = {"version": shard_index.VERSION, "name": self.name, "made_by": self.made_by}
        write_json(self._staging / DATASET_FILE, description | describe(self._staging, self._done), compact=True)
        (self._staging / LOCK_FILE).unlink()
        _fsync_folder(self._staging)
        replaced = self.out.with_name(f".{self.out.name}.replaced")
        if _has_files(self.out):
            shutil.rmtree(replaced, ignore_errors=True)
            self.out.rename(replaced)
        self._staging.rename(self.out)
        shutil.rmtree(replaced, ignore_errors=True)
        (self.out / JOURNAL_FILE).unlink(missing_ok=True)  # last: a run that is killed before still finds its shards
        _fsync_folder(self.out.parent)


class _Shard:
    """One tar being written, hashed on the way."""

    def __init__(self, path: Path, split: str) -> None:
        self.path = path
        self.split = split
        self.file: BinaryIO = self.path.open("wb")
        self.rows: list[dict[str, Any]] = []
        self._hash = hashlib.sha256()
        self._size = 0

    def add(
        self, key: str, ext: str, audio: bytes, text: bytes, meta: Mapping[str, Any], sound: int, peak: int
    ) -> None:
        row: dict[str, Any] = {name: meta[name] for name in ("duration", *shard_index.CODED)}
        row["key"], row["sound"], row["peak"] = key, sound, peak
        row["votes"] = check_votes(meta.get("votes"), key)
        row["source"] = shard_index.source(meta["corpus"], meta["source_id"])
        row["audio_at"], row["audio_size"], crc = self._member(f"{key}.{ext}", audio, 0)
        row["json_at"], row["json_size"], row["crc"] = self._member(f"{key}.json", text, crc)
        self.rows.append(row)

    def _member(self, name: str, data: bytes, crc: int) -> tuple[int, int, int]:
        """(offset, size, crc so far) of a file put into the tar."""
        header = tarsafe.header(name, len(data))
        self._put(header)
        offset = self._size
        self._put(data)
        self._put(tarsafe.padding(len(data)))
        return offset, len(data), zlib.crc32(data, zlib.crc32(header, crc))

    def _put(self, data: bytes) -> None:
        self.file.write(data)
        self._hash.update(data)
        self._size += len(data)

    def finish(self) -> None:
        """End the tar and write its index."""
        self._put(tarsafe.END)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        facts = {"count": len(self.rows), "bytes": self._size, "sha256": self._hash.hexdigest()}
        columns = shard_index.columns(self.rows)
        index = {"version": shard_index.VERSION, "split": self.split, **facts, "columns": columns}
        write_json(self.path.with_name(self.path.name + shard_index.SUFFIX), index, compact=True)


def describe(folder: Path, files: Iterable[str]) -> dict[str, Any]:
    """What dataset.json tells of finished shards, by their indexes, so that it is the same however they came about."""
    splits: dict[str, Any] = {}
    seconds: dict[str, float] = defaultdict(float)
    counts: Counter[tuple[str, str, str]] = Counter()
    speakers: dict[str, set[str]] = defaultdict(set)
    rates: Counter[int] = Counter()
    labels: set[str] = set()
    for file in sorted(files):
        index = shard_index.load(folder / file)
        split, columns = index["split"], index["columns"]
        values = {name: [columns[name]["names"][code] for code in columns[name]["codes"]] for name in shard_index.CODED}
        entry = {"file": file} | {name: index[name] for name in ("count", "bytes", "sha256")}
        entry["index"] = file_sha256(folder / (file + shard_index.SUFFIX))
        splits.setdefault(split, {"shards": []})["shards"].append(entry)
        seconds[split] += sum(columns["duration"])
        counts.update(zip(values["language"], values["emotion"], repeat(split), strict=False))
        speakers[split].update(values["speaker"])
        rates.update(values["sample_rate"])
        labels.update(set(values["label"]) - {None})
    for split, described in splits.items():
        described["count"] = sum(shard["count"] for shard in described["shards"])
        described["hours"] = round(seconds[split] / 3600, 6)
    totals: dict[str, dict[str, dict[str, int]]] = {}
    for (language, emotion, split), count in sorted(counts.items()):
        totals.setdefault(language, {}).setdefault(emotion, {})[split] = count
    return {
        "splits": splits,
        "totals": totals,
        "labels": sorted(labels),
        "speakers": {split: sorted(names) for split, names in sorted(speakers.items())},
        "sample_rates": {str(rate): count for rate, count in sorted(rates.items())},
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
