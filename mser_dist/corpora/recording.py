"""A recording of a corpus before it is packed, as every parser yields it."""

import errno
import functools
import hashlib
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mser_dist.errors import UserError


@dataclass(frozen=True, slots=True)
class Recording:
    """One recording of a corpus and what is known of it."""

    path: Path
    emotion: str  # the corpus's own word
    label: str | None  # the class (`emotions.to_label`); None where annotators named no emotion
    language: str  # ISO 639-1
    speaker: str
    corpus: str
    id: str  # unique in the corpus, fit for a shard's key
    source_id: str  # the utterance it speaks or translates; links parallel clips
    gender: str | None = None  # "female", "male" or not known
    text: str | None = None
    split: str | None = None  # "train", "val" or "test" where the source prescribes it
    votes: dict[str, float] | None = None  # annotators by the emotion that they heard, in the corpus's words
    inside: tuple[str, int] | None = None  # of a parquet file: column (with a field `bytes`) and row


def where(path: Path, inside: tuple[str, int] | None) -> str:
    """Names a recording, for messages."""
    return str(path) if inside is None else f"{path}, row {inside[1]}"


def read_bytes(path: Path, inside: tuple[str, int] | None) -> bytes:
    """The bytes of a recording's audio file, which `Recording.inside` may say to lie in a parquet file."""
    if inside is None:
        return path.read_bytes()
    import pyarrow as pa
    import pyarrow.parquet as pq

    column, row = inside
    try:
        file = pq.ParquetFile(path)
        group = 0
        while row >= (count := file.metadata.row_group(group).num_rows):
            row, group = row - count, group + 1
        data = _audio_bytes(path, group, column)[row].as_py()
    except (pa.ArrowException, RuntimeError) as error:
        raise UserError(
            f"{where(path, inside)}: cannot be read ({str(error).splitlines()[0]}); fetch it anew"
        ) from None
    if not data:
        raise UserError(f"{where(path, inside)}: holds no audio; fetch the set with its audio")
    return bytes(data)


@functools.lru_cache(maxsize=1)  # neighbours are read one after another; a row group may be hundreds of MB
def _audio_bytes(path: Path, group: int, column: str) -> Any:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(path).read_row_group(group, columns=[f"{column}.bytes"])
    return table.column(column).combine_chunks().field("bytes")


def why_no_file(path: Path) -> str | None:
    """None for a file that is there; else the path, cut where it is long, and what is there instead."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
        what = f"{'is missing' if missing else 'cannot be read'} ({str(error.strerror).lower()})"
    except UnicodeEncodeError:
        what = f"has no name in this machine's encoding ({sys.getfilesystemencoding()}; PYTHONUTF8=1 makes it UTF-8)"
    except ValueError:
        what = "is missing (it holds a NUL byte)"
    else:
        if stat.S_ISREG(mode):
            return None
        what = "is a folder, not a file" if stat.S_ISDIR(mode) else "is no regular file"
    name = str(path) if str(path).isprintable() else repr(str(path))
    return f"{name if len(name) <= 250 else name[:80] + '…' + name[-40:]} {what}"


def safe_id(name: str) -> str:
    """An identifier of at most 74 of the characters A-Z a-z 0-9 _ -; a name that had to be changed gets a hash of it
    appended.
    """
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", name.replace("/", "_"))
    if safe != name.replace("/", "_") or len(safe) > 74:
        safe = f"{safe[:65]}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
    return safe
