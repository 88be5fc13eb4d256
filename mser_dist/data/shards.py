"""A data set of WebDataset tar shards: opened by its indexes, read sample by sample at a known offset, verified.

The data contract: a sample is `<key>.flac` (or wav, ogg, opus, mp3) and `<key>.json` (`shard_index.META_FIELDS`) in a
plain tar of one split, `<split>-000000.tar`; beside it its index (`shard_index`); beside the shards `dataset.json`. Any
other folder of WebDataset tars with audio is read too, and indexed on first use.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from sys import intern
from typing import Any, Self

import numpy as np

from mser_dist.data import shard_index, tarsafe
from mser_dist.data.shard_index import REPACK
from mser_dist.data.shard_writer import DATASET_FILE, LOCK_FILE, DatasetWriter
from mser_dist.errors import UserError

__all__ = ["DatasetWriter", "Sample", "ShardSet", "list_shards"]

MAX_OPEN = 128  # shards held open by a thread: far below the usual limit of 1024 files a process
MAX_GAP = 1 << 16  # bytes between a sample's two files up to which both are fetched in one read


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample as it lies in its shard: the audio file's bytes (not decoded) and its json."""

    key: str
    audio: bytes
    ext: str
    meta: dict[str, Any]
    where: str  # the shard and the key, for messages


class ShardSet:
    """The samples of one or more data sets, as columns; audio is read by `read`.

    Columns of len(self): `keys` list of str; `duration` float64 seconds; `label` (str or None), `emotion`, `language`,
    `speaker`, `corpus`, `source_id`, `split` object arrays of str, so that `set.language == "de"` is a mask.
    It can be pickled and forked: files are opened on first use in each process and thread.
    """

    def __init__(self, shards: Sequence[Path], rows: Sequence[tuple[int, str, dict[str, Any]]]) -> None:
        """Use `open`. rows: (number of the shard, split, row of its index)."""
        self.shards = list(shards)
        self.keys: list[str] = [row["key"] for _, _, row in rows]
        self.duration = np.array([row["duration"] for _, _, row in rows], dtype=np.float64)
        self.label = _column(row["label"] for _, _, row in rows)
        self.emotion = _column(row["emotion"] for _, _, row in rows)
        self.language = _column(row["language"] for _, _, row in rows)
        self.speaker = _column(row["speaker"] for _, _, row in rows)
        self.corpus = _column(row["corpus"] for _, _, row in rows)
        self.source_id = _column(row["source_id"] for _, _, row in rows)
        self.split = _column(split for _, split, _ in rows)
        self.shard = np.array([number for number, _, _ in rows], dtype=np.int32)
        self._ext = _column(row["ext"] for _, _, row in rows)
        # [samples, 5]: audio's offset and size, json's offset and size, crc
        self._place = np.array(
            [(*row["audio"], *(row["json"] or (0, 0)), row["crc"]) for _, _, row in rows], dtype=np.int64
        ).reshape(-1, 5)
        self._members = {i: row["members"] for i, (_, _, row) in enumerate(rows) if "members" in row}
        self._local = threading.local()

    @classmethod
    def open(
        cls,
        paths: str | Path | Sequence[str | Path],
        *,
        split: str | None = None,
        languages: Collection[str] | None = None,
        corpora: Collection[str] | None = None,
        labels: Collection[str] | None = None,
    ) -> Self:
        """Open data sets (folders) or single tars by their indexes alone, in the order given; None keeps everything.

        Raises UserError for a missing or truncated shard, a key that comes twice, or a filter that leaves nothing.
        """
        wanted = {
            "split": None if split is None else {split},
            "language": languages,
            "corpus": corpora,
            "label": labels,
        }
        filters = {name: frozenset(values) for name, values in wanted.items() if values is not None}
        shards: list[Path] = []
        rows: list[tuple[int, str, dict[str, Any]]] = []
        found: dict[str, set[Any]] = {name: set() for name in filters}
        keys: dict[str, int] = {}
        for shard, index in _load_all(paths):
            for row in index["samples"]:
                if (first := keys.setdefault(row["key"], len(shards))) != len(shards):
                    raise UserError(
                        f"{shard}: the key {row['key']!r} is also in {[*shards, shard][first]}; open one of them"
                    )
                values = row | {"split": index["split"]}
                for name in filters:
                    found[name].add(values[name])
                if all(values[name] in allowed for name, allowed in filters.items()):
                    rows.append((len(shards), index["split"], row))
            shards.append(shard)
        if not rows:
            asked = "; ".join(f"{n} {sorted(v)} of {sorted(map(str, found[n]))}" for n, v in filters.items())
            raise UserError(
                f"{_names(paths)}: no sample is left{f' by the filter: {asked}' if asked else ', the set is empty'}"
            )
        return cls(shards, rows)

    def __len__(self) -> int:
        return len(self.keys)

    def where(self, i: int) -> str:
        """Names sample i and its shard, for messages."""
        return f"{self.shards[self.shard[i]]}: sample {self.keys[i]}"

    def read(self, i: int) -> Sample:
        """Sample i from its shard. UserError unless what lies there is, to the last bit, what was indexed."""
        audio_at, audio_size, json_at, json_size, crc = map(int, self._place[i])
        file = self._file(int(self.shard[i]))
        has_json = json_at > 0
        if has_json and 0 <= json_at - (audio_at + audio_size) <= MAX_GAP:  # as we write it: one read for both
            start = audio_at - tarsafe.BLOCK
            block = file.pread(json_at + json_size - start, start)
            audio_block, json_block = block[: audio_size + tarsafe.BLOCK], block[json_at - tarsafe.BLOCK - start :]
        else:
            audio_block = file.pread(audio_size + tarsafe.BLOCK, audio_at - tarsafe.BLOCK)
            json_block = file.pread(json_size + tarsafe.BLOCK, json_at - tarsafe.BLOCK) if has_json else b""
        key, ext = self.keys[i], self._ext[i]
        names = self._members.get(i, (f"{key}.{ext}", f"{key}.json"))
        audio, text = audio_block[tarsafe.BLOCK :], json_block[tarsafe.BLOCK :]
        if (
            not tarsafe.header_matches(audio_block[: tarsafe.BLOCK], names[0], audio_size)
            or (has_json and not tarsafe.header_matches(json_block[: tarsafe.BLOCK], names[1], json_size))
            or shard_index.crc(audio, text) != crc
        ):
            raise UserError(f"{self.where(i)}: what the shard holds is not what its index says (damaged?); {REPACK}")
        where = self.where(i)
        return Sample(key, audio, ext, shard_index.parse_meta(text, where) if has_json else {}, where)

    def _file(self, number: int) -> "_OpenFile":
        """The open shard: a small cache a thread, as one shared by threads could close a file under a reader."""
        files: OrderedDict[int, _OpenFile] | None = getattr(self._local, "files", None)
        if files is None:
            files = self._local.files = OrderedDict()
        if number in files:
            files.move_to_end(number)
            return files[number]
        try:
            file = _OpenFile(self.shards[number])
        except OSError as error:
            raise UserError(f"{self.shards[number]}: cannot be read ({error.strerror}); {REPACK}") from None
        files[number] = file
        if len(files) > MAX_OPEN:
            files.popitem(last=False)
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()


class _OpenFile:
    """A file opened for reading, closed when nothing refers to it any more."""

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def pread(self, size: int, offset: int) -> bytes:
        """Read without moving the file's position, which forked processes share."""
        return os.pread(self._descriptor, size, offset)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def list_shards(path: str | Path) -> tuple[list[Path], dict[str, Any] | None]:
    """The shards of a data set, and its dataset.json (None for a single tar or a folder of tars without one)."""
    path = Path(path)
    if path.is_file():
        return [path], None
    if not path.is_dir():
        raise UserError(f"{path}: no such data set; give a folder of shards or a .tar (mser pack makes one)")
    if (path / LOCK_FILE).exists():
        raise UserError(f"{path}: a data set that is still being written, or was left by a run that died; {REPACK}")
    if (path / DATASET_FILE).exists():
        description = shard_index.read_json(path / DATASET_FILE)
        try:
            listed = [shard for _, split in sorted(description["splits"].items()) for shard in split["shards"]]
            names = [shard["file"] for shard in listed if shard.keys() >= {"count", "bytes", "sha256"}]
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path / DATASET_FILE}: does not list its shards; {REPACK}") from None
        if any(Path(name).name != name for name in names) or len(names) < len(listed):
            raise UserError(f"{path / DATASET_FILE}: does not describe each of its shards; {REPACK}")
        return [path / name for name in names], description
    shards = sorted(path.glob("*.tar"))
    if not shards:
        raise UserError(f"{path}: holds no .tar shard; give a folder of shards (mser pack makes one)")
    return shards, None


def _load_all(paths: str | Path | Sequence[str | Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Every shard with its index, held against dataset.json where there is one."""
    loaded = []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        shards, description = list_shards(path)
        facts = (
            {s["file"]: s for split in description["splits"].values() for s in split["shards"]} if description else {}
        )
        for shard in shards:
            index = shard_index.load(shard)
            expected = facts.get(shard.name, index)
            if any(index[name] != expected[name] for name in ("count", "bytes", "sha256")):
                raise UserError(f"{shard}: not the shard that dataset.json beside it lists; {REPACK}")
            loaded.append((shard, index))
    return loaded


def _column(values: Any) -> np.ndarray:
    """Strings as an object array; equal ones share their memory, as millions of rows repeat a few words."""
    return np.array([intern(v) if isinstance(v, str) else v for v in values], dtype=object)


def _names(paths: str | Path | Sequence[str | Path]) -> str:
    return ", ".join(map(str, [paths] if isinstance(paths, (str, Path)) else paths))
