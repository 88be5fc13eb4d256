"""A block's file: every clip that was made of some recordings, and what is known of each, kept or not.

A plain tar: `<key>.flac` of each clip, then `rows.json`. It is whole or not there.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mser_dist.errors import UserError
from mser_dist.files import whole
from mser_dist.shards import tarsafe

_ROWS = "rows.json"


@dataclass(frozen=True)
class Made:
    """A recording in a language, or why nothing was made of it.

    facts: of the recording, as JSON: source, split, corpus, language (the new one), label, emotion, speaker, gender.
    reason: "" where a clip was made; else why not, and the rest is empty. measures: what selection goes by. meta: the
    sample's json. sound, peak: as of `DatasetWriter.write`.
    """

    key: str
    facts: dict[str, Any]
    reason: str = ""
    measures: dict[str, Any] | None = None
    meta: dict[str, Any] | None = None
    sound: int = 0
    peak: int = 0
    audio: bytes = b""


@dataclass(frozen=True)
class Kept:
    """Where the audio of a clip lies in a block's file."""

    path: Path
    offset: int
    size: int
    sha256: str

    def read(self) -> bytes:
        """Raises `UserError` for a damaged file, which is removed: the same command makes it again."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            self.path.unlink()
            raise UserError(f"{self.path} was damaged, and is removed: the same command makes it again")
        return data


def write(path: Path, recipe: str, made: Iterable[Made]) -> None:
    """Write a block's file at once."""
    rows = []
    with whole(path) as staging, staging.open("wb") as file:
        for one in made:
            row: dict[str, Any] = {"key": one.key, "facts": one.facts, "reason": one.reason}
            if not one.reason:
                head = tarsafe.header(f"{one.key}.flac", len(one.audio))
                file.write(head)
                row |= {
                    "at": [file.tell(), len(one.audio), hashlib.sha256(one.audio).hexdigest()],
                    "measures": one.measures,
                    "meta": one.meta,
                    "sound": one.sound,
                    "peak": one.peak,
                }
                file.write(one.audio + tarsafe.padding(len(one.audio)))
            rows.append(row)
        text = json.dumps({"recipe": recipe, "rows": rows}, ensure_ascii=False, sort_keys=True).encode()
        file.write(tarsafe.header(_ROWS, len(text)) + text + tarsafe.padding(len(text)) + tarsafe.END)


def read(path: Path, recipe: str) -> list[tuple[Made, Kept | None]] | None:
    """The clips of a block, without their audio, and where that lies; None unless the file is of this recipe."""
    try:
        [last] = [member for member in tarsafe.scan(path) if member.name == _ROWS]
        with path.open("rb") as file:
            file.seek(last.offset)
            told = json.loads(file.read(last.size))
        if told["recipe"] != recipe:
            return None
        return [_row(path, row) for row in told["rows"]]
    except (OSError, UserError, ValueError, KeyError, TypeError):
        return None  # not there, or not whole: it is made anew


def _row(path: Path, row: dict[str, Any]) -> tuple[Made, Kept | None]:
    if row["reason"]:
        return Made(row["key"], row["facts"], row["reason"]), None
    made = Made(row["key"], row["facts"], "", row["measures"], row["meta"], row["sound"], row["peak"])
    return made, Kept(path, *row["at"])
