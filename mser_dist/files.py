"""Files that are whole or not there: hashes, fsync, atomic replacement."""

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mser_dist.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # what a file that Git LFS has not fetched begins with


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shows(path: Path, seconds: float, size: int | None = None) -> bool:
    """Whether a file is there (of so many bytes) within `seconds`: a network disk shows another node's a bit later."""
    deadline = time.monotonic() + seconds
    while not (path.is_file() and size in (None, path.stat().st_size)):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
    return True


def read_json(path: Path) -> Any:
    """The value in a JSON file that this program wrote. Raises `UserError` if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it, and run the step that writes it again") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file for the block to write, which then replaces `path` at once; where the block fails, nothing has changed.

    A reader sees the old file or the new one, also after a crash.
    """
    # Several processes, on several nodes, may write the same file.
    staging = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        yield staging
        fsync_tree(staging, below=False)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once, as `whole` does."""
    with whole(path) as staging:
        staging.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, compact: bool = False) -> None:
    """Replace a JSON file at once; `compact`: keys in order and no spaces, so that equal values are equal bytes."""
    if compact:
        write_text(path, json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")))
    else:
        write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def fsync_tree(folder: Path, below: bool = True) -> None:
    """Put a file, or a folder's own entries and with `below` every file in it, on the disk."""
    for path in [*(folder.rglob("*") if below else ()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def lock_file(path: Path) -> int | None:
    """Take a file for this process, or None if another one has it; `unlock_file` frees it, and so does the end."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        pass  # a file system without locks: then they cannot protect, and must not stop
    return handle


def unlock_file(handle: int) -> None:
    """Give a `lock_file` back. Not by closing alone: data workers, forked since, have the file open too."""
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def started(pid: int) -> str:
    """When a process of this machine started, in clock ticks: with its number it names one process for good."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return text.rpartition(")")[2].split()[19]  # field 22 of proc_pid_stat(5)
    except (OSError, IndexError):
        return "gone"


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
