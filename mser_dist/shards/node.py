"""One table of a set for all ranks of a node: the first one there reads the indexes, the others map what it made of it.

A thousand indexes are a thousand files to open and parse, and the columns that come of them are the same on every rank.
So the first rank of a job on a node that asks for a set writes its columns to one file in memory (/dev/shm), and the
others map that: pages that they share. It is of this job alone, so that what a later job opens is looked at anew, and
goes with the process that wrote it; what a killed one leaves goes when this user next opens a set on that node.
`ShardSet` and its numbers are the same either way.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np

from mser_dist.errors import UserError
from mser_dist.files import lock_file, started, unlock_file
from mser_dist.ranks import distributed
from mser_dist.shards.columns import Column, Keys, Table
from mser_dist.shards.reader import Shard

_ALIGN = 64  # bytes
_JOB = (
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
)


def once(question: Any, make: Callable[[], Table]) -> Table:
    """`make()`, or what another rank of this job on this node made of the same question (JSON). Raises what it raised.

    Where there is no memory to share, or one rank alone, each makes its own.
    """
    world = distributed.discover()
    folder = _folder() if world.world_size > 1 else None
    if folder is None:
        return make()
    job = [world.launcher, *(os.environ.get(name) for name in _JOB)]
    name = hashlib.sha256(json.dumps([job, question], sort_keys=True, default=sorted).encode()).hexdigest()[:32]
    with _alone(folder / f"{name}.lock"):
        if (found := _read(folder / name)) is not None:
            return found
        try:
            table = make()
        except UserError as error:
            _write(folder / name, {"error": str(error)}, {})
            raise
        _write(folder / name, *_plain(table))
        return _read(folder / name) or table  # the shared one: a node holds it once


def _folder() -> Path | None:
    """A folder of this user's in memory, or else in the temporary one; None where there is none that can be trusted."""
    for base in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        folder = base / f"mser-sets-{os.geteuid()}"
        with suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            if found.st_uid == os.geteuid() and found.st_mode & 0o7777 == 0o700 and not folder.is_symlink():
                return folder
    return None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One rank at a time; who waits does so as long as the other works, and no longer than it lives."""
    while (handle := lock_file(path)) is None:
        time.sleep(0.02)
    try:
        yield
    finally:
        unlock_file(handle)


def _plain(table: Table) -> tuple[dict[str, Any], dict[str, Any]]:
    """(facts as JSON, arrays) of a table."""
    blob, starts = table.keys.packed()
    arrays = {**table.arrays, "keys": blob, "key starts": starts}
    arrays |= {f"coded {name}": column.codes for name, column in table.coded.items()}
    facts = {
        "shards": [[shard.name, shard.bytes, shard.sha256, shard.own_hash] for shard in table.shards],
        "names": {name: column.names for name, column in table.coded.items()},
    }
    return facts, arrays


def _write(place: Path, facts: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Write a table for the others; where there is no room, they make their own."""
    for old in place.parent.glob("*/table.json"):  # of processes that ended without a chance to remove theirs
        with suppress(OSError, ValueError, KeyError):
            if not _lives(json.loads(old.read_text(encoding="utf-8"))["owner"]):
                shutil.rmtree(old.parent, ignore_errors=True)
    staging = place.with_suffix(".partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(place, ignore_errors=True)
        staging.mkdir()
        listed = {}
        with (staging / "arrays").open("wb") as file:
            for name, array in arrays.items():
                file.write(bytes(-file.tell() % _ALIGN))
                listed[name] = [file.tell(), array.dtype.str, len(array)]
                file.write(np.ascontiguousarray(array).data)
        owner = [os.getpid(), started(os.getpid())]
        text = json.dumps({"owner": owner, "arrays": listed, **facts})
        (staging / "table.json").write_text(text, encoding="utf-8")
        staging.rename(place)
        Finalize(None, _forget, args=(place, os.getpid()), exitpriority=0)  # atexit's, and of processes of its own
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)


def _forget(place: Path, owner: int) -> None:
    if os.getpid() == owner:  # and no process that it has forked since
        shutil.rmtree(place, ignore_errors=True)  # not its lock, which another may hold by now: an empty file


def _read(place: Path) -> Table | None:
    """The table that another rank has written, if it still lives. Raises the `UserError` that it met with."""
    try:
        facts = json.loads((place / "table.json").read_text(encoding="utf-8"))
        if not _lives(facts["owner"]):
            return None
        if "error" in facts:
            raise UserError(facts["error"])
        raw = np.memmap(place / "arrays", dtype=np.uint8, mode="r") if facts["arrays"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    arrays: dict[str, Any] = {}
    for name, (start, kind, count) in facts["arrays"].items():
        dtype = np.dtype(kind)
        assert raw is not None
        arrays[name] = np.asarray(raw[start : start + count * dtype.itemsize]).view(dtype)
    keys = Keys.of_packed(arrays.pop("keys"), arrays.pop("key starts"))
    coded = {name: Column(arrays.pop(f"coded {name}"), names) for name, names in facts["names"].items()}
    shards = [Shard(*one) for one in facts["shards"]]
    return Table(shards, arrays, coded, keys, None)


def _lives(owner: list[Any]) -> bool:
    return started(int(owner[0])) == owner[1]
