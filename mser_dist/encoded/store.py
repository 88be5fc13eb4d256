"""The features that a frozen speech encoder makes of clips, on a disk that many runs, jobs and ranks share.

`root/<address>/` holds one encoder's, in files that are whole from the moment they have their name and never change:
no reader or writer waits for another. `address.json` in it tells a person what it is; the time of `used` is that of
the last use. Two jobs that encode the same clips at once both keep them, which costs space and nothing else.
"""

import errno
import hashlib
import json
import os
import secrets
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mser_dist.encoded import layout
from mser_dist.errors import UserError
from mser_dist.files import fsync_tree, write_json

SUFFIX = ".features"
USED = "used"
MAX_OPEN = 64  # files held open by a process
ABANDONED = 86400.0  # seconds after which an unfinished file is one of a process that was killed
IN_USE = 3600.0  # seconds since its last use after which a folder counts as nobody's
MARK_EVERY = 600.0  # seconds between two marks of use: a long training reads for days what it looked up once


class Place(NamedTuple):
    """All that a worker needs to read a clip's features."""

    file: str  # its name in the store's folder
    at: int  # first byte
    frames: int
    crc: int


class Located(NamedTuple):
    """Where the features of n clips lie: 20 bytes a clip. File i is `files[i]`; -1: there are none yet."""

    files: list[str]
    file: NDArray[np.int32]  # (n,)
    at: NDArray[np.int64]  # (n,)
    frames: NDArray[np.int32]  # (n,)
    crc: NDArray[np.uint32]  # (n,)

    @property
    def missing(self) -> NDArray[np.bool_]:
        """(n,) which clips are yet to be encoded."""
        return self.file < 0

    def place(self, clip: int) -> Place:
        """Where the features of one of the n clips lie. KeyError: it has none yet."""
        file = self.file[clip]
        if file < 0:
            raise KeyError(f"clip {clip} has no features yet")
        return Place(self.files[file], int(self.at[clip]), int(self.frames[clip]), int(self.crc[clip]))


def warn(text: str) -> None:
    """One line for the person at the terminal, on standard error."""
    print(f"mser: warning: {text}", file=sys.stderr, flush=True)


class FeatureStore:
    """One encoder's features: tensors (T, L, D) of T frames, L layers and width D, each found by its clip's key.

    Args:
        root: the folder of all encoders' features; made, for this user alone, by the first writer.
        address: what the features depend on, as JSON: two addresses that differ anywhere share nothing.
        layers: L.
        width: D.
        dtype: float32, float16 or bfloat16.
        warn: told in one line of each file that is passed over.

    A key is a 64-bit number that stands for a clip's samples and how they were changed. A store can be pickled, forked
    and used by threads.
    """

    def __init__(
        self,
        root: Path,
        address: Mapping[str, Any],
        layers: int,
        width: int,
        dtype: torch.dtype,
        warn: Callable[[str], None] = warn,
    ) -> None:
        digest = _digest(address)
        self.address, self.layers, self.width, self.dtype = dict(address), layers, width, dtype
        self.folder = folder_of(root, address)
        self.frame_bytes = layers * width * dtype.itemsize
        form = {"dtype": str(dtype).removeprefix("torch."), "layers": layers, "width": width}
        self.head = layout.head({"address": digest, **form})
        self._warn = warn
        self._passed_over: set[str] = set()
        self._marked = -float("inf")
        # What is forgotten is closed once no thread reads from it. A forked worker has its own copies, and `pread`
        # leaves alone the position that they share.
        self._open = lru_cache(MAX_OPEN)(_OpenFile)

    def locate(self, keys: NDArray[np.uint64]) -> Located:
        """Where the features of the clips with these keys (n,) lie; a key may come twice.

        Of a clip that is in several files, those in the first by name, the oldest, count. A file that is damaged or
        of another address is passed over with a warning, the first time that it is met.
        """
        self.mark_used(now=True)
        wanted, back = np.unique(keys.astype(np.uint64, copy=False), return_inverse=True)
        n = len(wanted)
        file, at = np.full(n, -1, np.int32), np.zeros(n, np.int64)
        frames, crc = np.zeros(n, np.int32), np.zeros(n, np.uint32)
        files: list[str] = []
        for path in _shards(self.folder) if n else ():
            table = self._table(path)
            found = np.searchsorted(wanted, table["key"]).clip(max=n - 1)  # (rows,) of `wanted`
            rows = np.flatnonzero((wanted[found] == table["key"]) & (file[found] < 0))
            which, first = np.unique(found[rows], return_index=True)
            rows = rows[first]
            if len(rows):
                file[which] = len(files)
                at[which], frames[which], crc[which] = (table[name][rows] for name in ("at", "frames", "crc"))
                files.append(path.name)
        return Located(files, file[back], at[back], frames[back], crc[back])

    def read(self, place: Place) -> torch.Tensor:
        """The features (T, L, D) of one clip, in memory of their own. `UserError` where they are damaged or gone."""
        self.mark_used()
        path = self.folder / place.file
        size, done = place.frames * self.frame_bytes, 0
        data = torch.empty(size, dtype=torch.uint8)
        view = data.numpy().data
        try:
            file = self._open(path)
            while done < size and (got := file.pread_into(view[done:], place.at + done)):
                done += got
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):  # the latter: removed on another node, while open here
                raise UserError(f"{path}: removed since the start: start again; its clips are encoded anew") from None
            raise UserError(f"{path}: cannot be read ({error.strerror}): check the disk, or {_REMEDY}") from None
        if done < size or zlib.crc32(view) != place.crc:
            raise UserError(f"{path}: damaged (the features of a clip differ from their checksum): {_REMEDY}")
        return data.view(self.dtype).view(place.frames, self.layers, self.width)

    @contextmanager
    def writer(self, limit: int = 64 << 20) -> Iterator["FeatureWriter"]:
        """Keeps what the block adds, in a new file whenever one has `limit` bytes, and at the end.

        Where the block fails, the files so far stay and the unfinished one goes. `UserError` where it cannot be
        written.
        """
        with _disk(self.folder):
            for folder in (self.folder.parent, self.folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _remove_abandoned(self.folder)
            if not (self.folder / "address.json").exists():
                write_json(self.folder / "address.json", self.address)
        self.mark_used(now=True)
        writer = FeatureWriter(self, limit)
        try:
            yield writer
            writer.publish()
        finally:
            writer.discard()

    def mark_used(self, now: bool = False) -> None:
        """Tell `make_room` that a job uses these features; at most every `MARK_EVERY` seconds, except `now`."""
        if now or time.monotonic() - self._marked > MARK_EVERY:
            self._marked = time.monotonic()
            with suppress(OSError):  # not there yet, or another user's
                (self.folder / USED).touch()

    def _table(self, path: Path) -> NDArray[Any]:
        """A file's table; an empty one of a file that is passed over."""
        why = None
        try:
            return layout.read_table(path, self.head, self.frame_bytes)
        except FileNotFoundError:  # another job has made room
            pass
        except layout.UnusableError as error:
            why = str(error)
        except OSError as error:
            why = f"cannot be read ({error.strerror})"
        if why and path.name not in self._passed_over:
            self._passed_over.add(path.name)
            self._warn(f"{path}: {why}: passed over, and its clips are encoded anew; remove that file")
        return np.empty(0, layout.ROW)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = lru_cache(MAX_OPEN)(_OpenFile)


def folder_of(root: Path, address: Mapping[str, Any]) -> Path:
    """Where a store below `root` keeps the features of an address."""
    return root / _digest(address)[:24]


def _digest(address: Mapping[str, Any]) -> str:
    text = json.dumps(address, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class FeatureWriter:
    """Writes one file after the other, each under a hidden name until it is whole and on the disk."""

    def __init__(self, store: FeatureStore, limit: int) -> None:
        self._store, self._limit = store, limit
        self._rows: list[tuple[int, int, int, int]] = []
        self._file: FileIO | None = None
        self._path = store.folder

    def add(self, key: int, features: torch.Tensor) -> None:
        """Keep a clip's features (T, L, D), of the store's dtype, from any device."""
        store = self._store
        if features.dtype != store.dtype or features.shape[1:] != (store.layers, store.width):
            raise ValueError(
                f"features {tuple(features.shape)} {features.dtype}, not (T, {store.layers}, {store.width})"
            )
        data = features.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        with _disk(store.folder):
            if self._file is None:
                # The time first, so that the oldest file is the first by name.
                stem = f"{time.time_ns():019d}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
                self._path = store.folder / f".{stem}.partial"
                # Without a buffer: a process that is forked meanwhile would write what is in it a second time.
                self._file = self._path.open("xb", buffering=0)
                _write(self._file, store.head)
            at = _align(self._file)
            _write(self._file, data)
            self._rows.append((key, at, len(features), zlib.crc32(data)))
            if self._file.tell() >= self._limit:
                self.publish()
        store.mark_used()

    def publish(self) -> None:
        """Give what was added since the last time its name, for all to see."""
        if self._file is None:
            return
        with _disk(self._store.folder):
            table_at = _align(self._file)
            _write(self._file, layout.tail(self._store.head, np.array(self._rows, layout.ROW), table_at))
            os.fsync(self._file.fileno())
            self._path.rename(self._path.with_name(self._path.name[1:].removesuffix(".partial") + SUFFIX))
            self._file.close()
            self._file, self._rows = None, []
            fsync_tree(self._store.folder, below=False)

    def discard(self) -> None:
        """Remove the unfinished file, if there is one."""
        if self._file is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)
            self._file, self._rows = None, []


def make_room(root: Path, need_bytes: int, limit_bytes: int, in_use: Path) -> int:
    """Remove other encoders' features, those used longest ago first, until `need_bytes` more fit into `limit_bytes`.

    Never those in the folder `in_use`, nor in one used within the last hour.

    Returns the bytes that can then be written: less than `need_bytes` where nothing more may be removed.
    """
    folders = [path for path in root.glob("?" * 24) if path.is_dir() and not set(path.name) - set("0123456789abcdef")]
    for folder in folders:
        _remove_abandoned(folder)
    total = sum(_size(path) for folder in folders for path in folder.glob("*"))
    for folder in sorted(folders, key=_last_used):
        for path in _shards(folder) if folder.name != in_use.name else ():
            # Asked again before each file: a job may have started to use them.
            if total + need_bytes > limit_bytes and time.time() - _last_used(folder) > IN_USE:
                size = _size(path)
                with suppress(OSError):  # another user's
                    path.unlink(missing_ok=True)  # a process that has it open reads on
                    total -= size
    return max(0, limit_bytes - total)


_REMEDY = "remove that file, and its clips are encoded anew at the next start"


class _OpenFile:
    """A file opened for reading, closed when nothing refers to it any more."""

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def pread_into(self, view: memoryview, offset: int) -> int:
        return os.preadv(self._descriptor, [view], offset)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Says what a person can do about a failed write."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "the disk is full: free space, choose another disk with encoder.cache_dir"
        else:
            what = f"features cannot be written ({error.strerror}): choose another folder with encoder.cache_dir"
        raise UserError(f"{folder}: {what}, or set encoder.cache=off") from None


def _write(file: FileIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _align(file: FileIO) -> int:
    """Fill a file up to a multiple of `layout.ALIGN`, and say how long it is then."""
    _write(file, bytes(-file.tell() % layout.ALIGN))
    return file.tell()


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith("."))


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(".*.partial"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()


def _size(path: Path) -> int:
    """Bytes; 0 of a file that another job has removed."""
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _last_used(folder: Path) -> float:
    with suppress(OSError):
        return (folder / USED).stat().st_mtime
    with suppress(OSError):
        return folder.stat().st_mtime
    return 0.0
