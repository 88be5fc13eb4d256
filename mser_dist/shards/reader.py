"""Reading one sample at a known place of a shard, and noticing damage."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mser_dist.errors import UserError
from mser_dist.shards import index as shard_index
from mser_dist.shards import tarsafe
from mser_dist.shards.index import REPACK
from mser_dist.shards.remote import RemoteCache, is_remote

MAX_OPEN = 128  # shards held open by a thread: far below the usual limit of 1024 files a process
MAX_OPEN_REMOTE = 8  # of a cache: a removed file takes up its space until it is closed
MAX_GAP = 1 << 16  # bytes between a sample's two files up to which both are fetched in one read


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar: its path or URL, its size, and the hash of its content."""

    name: str
    bytes: int
    sha256: str
    own_hash: bool = True  # False: of a remote foreign tar, whose `sha256` is of its change marks alone

    @property
    def is_remote(self) -> bool:
        return is_remote(self.name)


class Ref(NamedTuple):
    """All that a worker needs to read a sample, so that it holds no part of the set's columns."""

    sample: int  # its number in the ShardSet, for messages
    shard: int
    audio_at: int
    audio_size: int
    json_at: int
    json_size: int
    crc: int


class ShardReader:
    """Reads samples by their `Ref`. It can be pickled and forked: files are opened on first use in each thread."""

    def __init__(self, shards: Sequence[Shard], cache: RemoteCache | None) -> None:
        self.shards = list(shards)
        self.cache = cache
        self._local = threading.local()

    def read(self, ref: Ref) -> tuple[bytes, bytes]:
        """(audio file, json) of a sample. `UserError`, without the sample's name, unless they are what was indexed."""
        _, shard, audio_at, audio_size, json_at, json_size, crc = ref
        file = self._file(shard)
        start = audio_at - tarsafe.BLOCK
        near = 0 <= json_at - (audio_at + audio_size) <= MAX_GAP  # as we write it: one read for both
        try:
            block = memoryview(file.pread(json_at + json_size - start if near else audio_size + tarsafe.BLOCK, start))
            if near:
                text = block[json_at - tarsafe.BLOCK - start :]
            else:
                text = memoryview(file.pread(json_size + tarsafe.BLOCK, json_at - tarsafe.BLOCK) if json_at else b"")
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror}); check the disk, or {REPACK}") from None
        audio = block[: tarsafe.BLOCK + audio_size]
        if shard_index.crc(audio, text) != crc or len(audio) < tarsafe.BLOCK + audio_size:
            if self._dropped(shard):
                return self.read(ref)
            raise UserError(f"what the shard holds is not what its index says (damaged?); {REPACK}")
        return bytes(audio[tarsafe.BLOCK :]), bytes(text[tarsafe.BLOCK :])

    def _file(self, number: int) -> "_OpenFile":
        """The open shard: a small cache a thread, as one shared by threads could close a file under a reader."""
        files: OrderedDict[int, _OpenFile] | None = getattr(self._local, "files", None)
        if files is None:
            files = self._local.files = OrderedDict()
        if number in files:
            files.move_to_end(number)
            return files[number]
        files[number] = file = self._open(self.shards[number])
        if len(files) > (MAX_OPEN_REMOTE if self.shards[number].is_remote else MAX_OPEN):
            files.popitem(last=False)
        return file

    def _dropped(self, number: int) -> bool:
        """Whether a shard's local copy was damaged and is removed or replaced, so that the next read finds another."""
        shard = self.shards[number]
        if not (shard.is_remote and shard.own_hash and self.cache):
            return False
        file = self._local.files.pop(number, None)
        if file is not None and not file.is_at(self.cache.path_of(shard.name, shard.sha256)):
            return True  # another reader has noticed first
        return self.cache.drop_if_damaged(shard.name, shard.sha256)

    def _open(self, shard: Shard) -> "_OpenFile":
        attempts = 3 if shard.is_remote else 1  # another process may make room in the cache between the two calls
        for attempt in range(attempts):
            try:
                return _OpenFile(self._local_path(shard))
            except OSError as error:
                if attempt == attempts - 1:
                    raise VanishedError(f"{shard.name}: cannot be read ({error.strerror}); {REPACK}") from None
        raise AssertionError("unreachable")

    def _local_path(self, shard: Shard) -> Path:
        if not shard.is_remote:
            return Path(shard.name.removeprefix("file://"))
        assert self.cache is not None
        try:
            return self.cache.get(shard.name, shard.sha256, shard.bytes, check=shard.own_hash)
        except UserError as error:
            raise VanishedError(str(error)) from None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()


class VanishedError(UserError):
    """A whole shard that cannot be read any more: no budget of bad samples covers that."""


class _OpenFile:
    """A file opened for reading, closed when nothing refers to it any more."""

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def pread(self, size: int, offset: int) -> bytes:
        """Read without moving the file's position, which forked processes share."""
        return os.pread(self._descriptor, size, offset)

    def is_at(self, path: Path) -> bool:
        """Whether a path still leads to this file."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._descriptor), path.stat())
        return False

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
