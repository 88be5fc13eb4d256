"""What an evaluation has found so far, in files of the ranks' own: it goes on where it was stopped.

``<out>/parts/<model>/<number>.npz`` holds consecutive rows of one rank, beginning with the batch of that number, which
no other file has. `made_of` beside them is a hash of all that the rows depend on; rows of anything else are removed.
"""

import hashlib
import json
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.errors import UserError
from mser_dist.files import whole, write_text
from mser_dist.ranks import distributed

FOLDER = "parts"
_EVERY = 30.0  # seconds that are lost at most where a rank dies
_PATIENCE = 60.0  # seconds until a file system that nodes share shows rank 0 the files of the others
_BATCH, _CLIP = "batch_", "clip_"  # names that no scorer uses


class Parts:
    """The rows that a model's pass over a set has found. Ranks share the folder; its methods but `add` are collective.

    made_of: all that the rows depend on, as JSON.
    """

    def __init__(self, folder: Path, made_of: Mapping[str, Any], world: distributed.World) -> None:
        self.folder, self.world = folder, world
        text = json.dumps(made_of, sort_keys=True, default=str)
        self._mark = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
        self._rows: list[tuple[int, NDArray[np.int64], dict[str, NDArray[Any]]]] = []
        self._written = time.monotonic()

    def done(self) -> NDArray[np.int64]:
        """The numbers of the batches whose rows are there, in order."""
        found: NDArray[np.int64] | None = None
        if self.world.is_main:
            mark = self.folder / "made_of"
            if not (mark.is_file() and mark.read_text(encoding="utf-8") == self._mark):
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(mark, self._mark)
            found = self._batches()
        agreed: NDArray[np.int64] = distributed.agree(found)
        return agreed

    def _batches(self) -> NDArray[np.int64]:
        there = [np.zeros(0, dtype=np.int64)]
        for path in self.folder.glob("*.npz"):
            try:
                with np.load(path) as file:
                    there.append(file[_BATCH])
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                path.unlink(missing_ok=True)  # damaged: its batches are scored again
        return np.unique(np.concatenate(there))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around `add`: what was added is on the disk behind the block, whatever ends it."""
        try:
            yield
        finally:
            self._write()

    def add(self, number: int, clips: NDArray[np.int64], found: Mapping[str, NDArray[Any]]) -> None:
        """Keep what was found of the clips (B,) of a batch: each value (B, …)."""
        self._rows.append((number, clips, dict(found)))
        if time.monotonic() - self._written >= _EVERY:
            self._write()

    def _write(self) -> None:
        if self._rows:
            numbers, clips, found = zip(*self._rows, strict=True)
            columns: dict[str, Any] = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
            columns |= {_BATCH: np.array(numbers), _CLIP: np.concatenate(clips)}
            path = self.folder / f"{min(numbers):08d}.npz"
            with whole(path) as staging, staging.open("wb") as file:
                np.savez(file, **columns)
        self._rows, self._written = [], time.monotonic()

    def read(self, batches: int) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
        """The clips' numbers (n,) in order, and the n rows of each column. On rank 0 alone; not collective.

        Waits for the files of all `batches`: a file system that nodes share may be a moment late. Raises `UserError`
        where it does not show them.
        """
        deadline = time.monotonic() + _PATIENCE
        while (seen := len(self._batches())) < batches:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.folder} shows {seen} of {batches} batches that the ranks have scored: set out= to a folder "
                    "on a file system that all nodes share"
                )
            time.sleep(0.5)
        parts = []
        for path in sorted(self.folder.glob("*.npz")):
            with np.load(path) as file:
                parts.append({name: file[name] for name in file.files})
        clips = np.concatenate([part[_CLIP] for part in parts])
        order = np.argsort(clips)
        names = [name for name in parts[0] if name not in (_BATCH, _CLIP)]
        return clips[order], {name: np.concatenate([part[name] for part in parts])[order] for name in names}


def remove(out: Path) -> None:
    """Take away the parts of an evaluation that has ended."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)
