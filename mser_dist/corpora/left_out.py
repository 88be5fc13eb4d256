"""Recordings that cannot be packed: up to so many are left out, and written down beside the set."""

import csv
from pathlib import Path

from mser_dist.corpora.recording import Recording
from mser_dist.errors import UserError


class LeftOut:
    """What is left out of a set, at most `allowed` recordings."""

    def __init__(self, allowed: int) -> None:
        if allowed < 0:
            raise UserError(f"--skip-bad {allowed}: give 0 or more")
        self.allowed = allowed
        self.found: list[tuple[Recording, str]] = []

    def add(self, clip: Recording, why: str) -> None:
        """Leave a recording out, or raise why it cannot be had where that are too many."""
        if len(self.found) == self.allowed:
            raise UserError(f"{why} (and {self.allowed} were left out, as --skip-bad allows)" if self.allowed else why)
        self.found.append((clip, why))

    def write(self, out: Path) -> Path | None:
        """Write `<out>.left_out.csv` (id, path, why), or remove an earlier one where nothing is left out."""
        path = out.with_name(f"{out.name}.left_out.csv")
        if not self.found:
            path.unlink(missing_ok=True)
            return None
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as text:
            table = csv.writer(text, lineterminator="\n")
            table.writerow(["id", "path", "why"])
            table.writerows([clip.id, clip.path, why] for clip, why in sorted(self.found, key=lambda one: one[0].id))
        return path
