"""Which shards of a set that is being written are finished, so that the next writer goes on where one was stopped.

`.packed` in the staging folder has a line for each: its file, its recipe (a hash of all that decides its bytes), and
the SHA-256 of its index, which in turn has that of the tar. A line is added once both are on the disk.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

from mser_dist.errors import UserError
from mser_dist.files import file_sha256, write_text
from mser_dist.progress import bar
from mser_dist.shards import index as shard_index

JOURNAL_FILE = ".packed"


class Journal:
    """The finished shards of a staging folder.

    `kept`: file → the keys in it, of those that are whole and have the recipe that is asked for; `discarded`: the
    number of the others.

    Args:
        folder: the staging folder.
        recipes: of every shard that is to be written, by file.
        progress: show a bar while the tars are hashed.
    """

    def __init__(self, folder: Path, recipes: Mapping[str, str], progress: bool) -> None:
        self._folder = folder
        self._recipes = recipes
        lines = [line for line in _lines(folder / JOURNAL_FILE) if len(line.split()) == 3]  # the last may be cut
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # hashing lets other threads run
            checks = pool.map(self._check, lines)
            look = {"delay": 2, "leave": False, "disable": not progress}
            checked = dict(zip(lines, bar(checks, title="check", unit="shard", total=len(lines), **look), strict=True))
        self.kept = {line.split()[0]: keys for line, keys in checked.items() if keys is not None}
        self.discarded = len(lines) - len(self.kept)
        self._lines = [line for line, keys in checked.items() if keys is not None]
        self._file: TextIO | None = None

    def _check(self, line: str) -> list[str] | None:
        """The shard's keys; None unless it is to be kept."""
        file, recipe, index_hash = line.split()
        if self._recipes.get(file) != recipe:
            return None
        path = self._folder / file
        index_path = path.with_name(file + shard_index.SUFFIX)
        try:
            if file_sha256(index_path) != index_hash:
                return None
            index = shard_index.parse(index_path.read_bytes(), str(index_path))
            if path.stat().st_size != index["bytes"] or file_sha256(path) != index["sha256"]:
                return None
        except (OSError, UserError):
            return None
        return list(index["columns"]["key"])

    def start(self) -> None:
        """Write the file anew with the lines of the kept shards, ready for more."""
        path = self._folder / JOURNAL_FILE
        write_text(path, "".join(f"{line}\n" for line in self._lines))
        self._file = path.open("a", encoding="ascii")

    def add(self, file: str) -> None:
        """Note a shard as finished."""
        assert self._file is not None
        index_hash = file_sha256(self._folder / (file + shard_index.SUFFIX))
        self._file.write(f"{file} {self._recipes[file]} {index_hash}\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            self._file.close()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except FileNotFoundError:
        return []
