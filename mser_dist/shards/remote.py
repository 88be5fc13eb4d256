"""Shards that lie elsewhere (s3://, hf://, http://, …): fetched whole through fsspec into a bounded local cache.

A cached shard is named by the hash of its content, so a set that was packed anew under the same names is never mixed up
with its old self, and processes of one node share the cache: each file is fetched by one of them.
"""

import errno
import hashlib
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mser_dist.errors import UserError
from mser_dist.files import started

ATTEMPTS = 4
FIRST_WAIT = 0.5  # seconds before the second attempt; four times as long before each further one
STALE = 300.0  # seconds after which another node's claim, or half a file, no longer counts
FETCHERS = 4  # shards fetched ahead at the same time


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL that fsspec opens (`file://` and bare paths are local)."""
    return "://" in str(path) and not str(path).startswith("file://")


def default_folder() -> Path:
    """MSER_CACHE, else ~/.cache/mser_dist/shards."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("MSER_CACHE") or base / "mser_dist" / "shards")


class RemoteCache:
    """Local copies of remote files.

    Args:
        folder: where; None: `default_folder()`.
        max_bytes: bound on the folder's shards; those used longest ago are removed.

    Credentials and options of a file system are its own or fsspec's (AWS_…, HF_TOKEN, FSSPEC_S3_ANON=true,
    ~/.config/fsspec): a run's config is logged, and is no place for a secret.

    Raises `UserError` for a file that is not there, an unknown protocol or one whose package is missing, and for a
    transfer that fails `ATTEMPTS` times.
    """

    def __init__(self, folder: str | Path | None = None, max_bytes: float = 100e9) -> None:
        self.folder = Path(folder) if folder else default_folder()
        self.max_bytes = max_bytes
        self._ahead: _Ahead | None = None

    def read(self, url: str) -> bytes:
        """A small file (dataset.json, an index), not cached."""
        return bytes(self._attempts(url, lambda fs, path: fs.cat_file(path)))

    def shards(self, url: str) -> list[str]:
        """The URLs of the tars in a remote folder."""

        def listing(fs: Any, path: str) -> list[str]:
            return sorted(fs.unstrip_protocol(found) for found in fs.glob(f"{path.rstrip('/')}/*.tar"))

        return list(self._attempts(url, listing))

    def identity(self, url: str) -> str:
        """A name for the present content of a remote file whose hash is not known: of its size and change marks."""
        info = self._attempts(url, lambda fs, path: fs.info(path))
        return hashlib.sha256(repr(sorted((str(k), str(v)) for k, v in info.items())).encode()).hexdigest()

    def path_of(self, url: str, content: str) -> Path:
        """Where the copy of a file lies, or will lie; `content` is the hash that names it."""
        return self.folder / f"{content[:16]}-{url.rstrip('/').rpartition('/')[2]}"

    def get(self, url: str, content: str, size: int | None = None, check: bool = True) -> Path:
        """The local copy of a shard, fetched unless it is there, and marked as used.

        Makes room where the cache is full. check: `content` is its SHA-256, compared once it is fetched.
        """
        path = self.path_of(url, content)
        if path.exists():
            with suppress(OSError):  # gone by now, or another user's
                os.utime(path)
            return path
        if size is not None and size > self.max_bytes:
            raise UserError(f"{url}: {size / 1e9:.1f} GB, more than the whole cache: raise data.cache_gb")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _claim(path) as mine:
                if mine:
                    self._attempts(url, lambda fs, remote: self._fetch(fs, remote, path, content if check else None))
                    self._make_room(path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                what = "the disk is full: lower data.cache_gb, or set data.cache_dir to another disk"
            else:
                what = f"cannot be written ({error.strerror}): set data.cache_dir to another folder"
            raise UserError(f"{self.folder}: {what}") from None
        return path

    def drop_if_damaged(self, url: str, sha256: str) -> bool:
        """Remove the local copy of a shard if it is not (any more) what was fetched; whether it was removed."""
        path = self.path_of(url, sha256)
        with suppress(FileNotFoundError), path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                path.unlink(missing_ok=True)
                return True
        return False

    def ahead(self, url: str, content: str, size: int, check: bool = True) -> None:
        """Start to fetch a shard that will be needed soon, in the background. A failure is left to the later `get`."""
        if self._ahead is None or self._ahead.pid != os.getpid():
            self._ahead = _Ahead(self)
        self._ahead.ask(url, content, size, check)

    def _fetch(self, fs: Any, remote: str, path: Path, sha256: str | None) -> None:
        staging = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
        try:
            fs.get_file(remote, str(staging))
            size = fs.info(remote).get("size")
            if size is not None and size != staging.stat().st_size:
                raise ValueError(f"{staging.stat().st_size} of {size} bytes arrived")
            if sha256 is not None:
                with staging.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                        raise ValueError("what arrived is not what its index says (SHA-256)")
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)

    def _make_room(self, newest: Path) -> None:
        for path in self.folder.glob(".*.partial"):  # of processes that were killed
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > STALE:
                    path.unlink()
        found = []
        for path in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total > self.max_bytes and path != newest:
                path.unlink(missing_ok=True)  # a process that has it open reads on
                total -= size

    def _attempts(self, url: str, work: Any) -> Any:
        """`work(file system, path)`, again after a pause where it fails."""
        import fsspec

        try:
            fs, path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise UserError(f"{url}: this kind of URL needs another package ({error})") from None
        except ValueError as error:
            raise UserError(f"{url}: not a URL that can be read ({error})") from None
        except OSError as error:  # some connect at once
            raise UserError(f"{url}: no connection ({error}); check the URL, or start again later") from None
        for attempt in range(ATTEMPTS):
            try:
                return work(fs, path)
            except FileNotFoundError:
                raise UserError(f"{url}: not there (moved or deleted?); check the URL") from None
            except NotImplementedError:
                raise UserError(f"{url}: this server does not list folders; give a set with a dataset.json") from None
            except Exception as error:  # each file system raises errors of its own library
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                problem = " ".join(str(error).split()) or type(error).__name__
                if attempt < ATTEMPTS - 1:
                    wait = FIRST_WAIT * 4**attempt
                    print(f"mser: {url}: {problem}; once more in {wait:g} s", file=sys.stderr, flush=True)
                    time.sleep(wait)
        raise UserError(f"{url}: could not be fetched in {ATTEMPTS} attempts ({problem}); start again later")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ahead": None}


class _Ahead:
    """Daemon threads that fetch what was asked for: an exit does not wait for them."""

    def __init__(self, cache: RemoteCache) -> None:
        self.pid = os.getpid()
        self._cache = cache
        self._asked: set[str] = set()
        self._queue: queue.SimpleQueue[tuple[str, str, int, bool]] = queue.SimpleQueue()
        for _ in range(FETCHERS):
            threading.Thread(target=self._work, daemon=True, name="mser-fetch").start()

    def ask(self, url: str, content: str, size: int, check: bool) -> None:
        path = self._cache.path_of(url, content)
        if url not in self._asked and not path.exists():
            self._asked.add(url)
            self._queue.put((url, content, size, check))

    def _work(self) -> None:
        while True:
            url, content, size, check = self._queue.get()
            with suppress(UserError):
                self._cache.get(url, content, size, check)
            self._asked.discard(url)


@contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """True where this thread is to fetch `path`, False where another one has meanwhile.

    A file that names its owner, and no lock: a lock taken by a thread is inherited, and kept, by a worker that happens
    to be forked at that moment.
    """
    mark = path.with_name(f".{path.name}.claim")
    while True:
        if path.exists():
            yield False
            return
        try:
            with mark.open("x", encoding="utf-8") as file:
                file.write(f"{socket.gethostname()} {os.getpid()} {started(os.getpid())}")
            break
        except FileExistsError:
            if _abandoned(mark):
                mark.unlink(missing_ok=True)
            else:
                time.sleep(0.02)
    try:
        yield True
    finally:
        mark.unlink(missing_ok=True)


def _abandoned(mark: Path) -> bool:
    """Whether the process that made a claim is gone; of another node's process its age decides."""
    try:
        owner = mark.read_text(encoding="utf-8").split()
        age = time.time() - mark.stat().st_mtime
    except FileNotFoundError:
        return False
    if len(owner) == 3 and owner[0] == socket.gethostname():
        return started(int(owner[1])) != owner[2]
    return age > (STALE if len(owner) == 3 else 5.0)  # a claim without its owner was being written by one that died
