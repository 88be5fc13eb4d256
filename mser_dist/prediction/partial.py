"""What `mser predict` knows so far, on the disk: a line a window, so that a command that was stopped goes on."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from mser_dist.errors import UserError
from mser_dist.files import lock_file, unlock_file
from mser_dist.prediction.recordings import Recording

Place = tuple[int, int]  # [begin, end) in samples


class Partial:
    """The probabilities of windows, by recording. `beside` opens it."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._file: TextIO | None = None
        self._rows: dict[tuple[str, int], dict[Place, NDArray[np.float64]]] = {}
        self._cut: dict[tuple[str, int], tuple[int, Sequence[Place]]] = {}  # samples, windows

    @classmethod
    @contextmanager
    def beside(cls, out: Path | None, identity: dict[str, Any]) -> Iterator["Partial"]:
        """That of the file `out`, or one in memory alone.

        Raises `UserError` where another command is at work on the same file, or was stopped that asked another model or
        something else: it may have worked for hours.
        """
        partial = cls()
        if out is None:
            yield partial
            return
        partial.path = path = out.with_name(out.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = lock_file(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}): choose another place") from None
        if lock is None:
            raise UserError(f"{path}: another command is at work on it: wait for it to end, or choose another place")
        try:
            fresh = not partial._read(identity)
            with path.open("w" if fresh else "a", encoding="utf-8") as file:
                partial._file = file
                # A kill may have cut the last line: what follows has one of its own.
                file.write(json.dumps(identity) + "\n" if fresh else "\n")
                yield partial
        finally:
            unlock_file(lock)

    def _read(self, identity: dict[str, Any]) -> bool:
        """Take what is there; False where there is nothing."""
        assert self.path is not None
        first, *lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        if not any(lines):
            return False
        known = None
        with suppress(ValueError):
            known = json.loads(first)
        if known != identity:
            raise UserError(
                f"{self.path} is of a command that was stopped and asked another model, for other labels or windows, "
                "or adapted to other recordings: give that command again to end it, or name another file"
            )
        for line in lines:
            with suppress(ValueError, TypeError, KeyError, AttributeError):
                row = json.loads(line)
                key = (str(row["recording"]), int(row["bytes"]))
                if "cut" in row:
                    self._cut[key] = (int(row["samples"]), [(int(a), int(b)) for a, b in row["cut"]])
                else:
                    begin, end = row["at"]
                    self._rows.setdefault(key, {})[begin, end] = np.array(row["p"], dtype=np.float64)
        return True

    def begin(self, recording: Recording, samples: int, places: Sequence[Place]) -> None:
        """Note into which windows a recording is cut."""
        key = (recording.name, recording.size)
        self._cut[key] = (samples, places)
        self._write({"recording": key[0], "bytes": key[1], "samples": samples, "cut": places})

    def add(self, recording: Recording, place: Place, probabilities: NDArray[np.float64]) -> None:
        """Note a window's probabilities (K,)."""
        key = (recording.name, recording.size)
        self._rows.setdefault(key, {})[place] = probabilities
        self._write({"recording": key[0], "bytes": key[1], "at": place, "p": probabilities.tolist()})

    def missing(self, recording: Recording) -> list[Place]:
        """The windows of a recording that was begun which are not known."""
        key = (recording.name, recording.size)
        return [place for place in self._cut[key][1] if place not in self._rows.get(key, {})]

    def whole(self, recording: Recording) -> bool:
        """Whether all windows of a recording are known."""
        return (recording.name, recording.size) in self._cut and not self.missing(recording)

    def of(self, recording: Recording) -> tuple[int, Sequence[Place], NDArray[np.float64]]:
        """Samples, windows and their probabilities (W, K) of a whole recording."""
        key = (recording.name, recording.size)
        samples, places = self._cut[key]
        return samples, places, np.stack([self._rows[key][place] for place in places])

    def remove(self) -> None:
        """All is written elsewhere."""
        if self.path is not None:
            self.path.unlink()

    def _write(self, row: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
