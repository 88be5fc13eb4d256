"""The file that holds many clips' features, written front to back: head, features, table, foot.

| part | bytes | what |
|---|---|---|
| head | 256 | `MAGIC`, then JSON that says whose features they are: a file is only read by a store with the same head |
| features | | each clip's, (T, L, D) as in memory, little-endian, from a multiple of 64: they can be mapped |
| table | 24 a clip | `ROW`s: key, first byte, frames, CRC-32 of the clip's features |
| foot | 28 | `MAGIC`, the table's first byte, its rows, the CRC-32 of head, table and the foot before it |

A file that was cut does not end in a foot that fits its size: that is seen without reading the features.
"""

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"mserft1\n"  # its digit is the version
HEAD = 256
ALIGN = 64
ROW = np.dtype([("key", "<u8"), ("at", "<u8"), ("frames", "<u4"), ("crc", "<u4")])
FOOT = struct.Struct("<8sQQI")


class UnusableError(Exception):
    """Why a file is passed over: the end of a sentence that begins with its path."""


def head(facts: dict[str, Any]) -> bytes:
    """The `HEAD` bytes before the features."""
    return (MAGIC + json.dumps(facts, sort_keys=True).encode()).ljust(HEAD - 1) + b"\n"


def tail(first: bytes, rows: NDArray[Any], table_at: int) -> bytes:
    """Table and foot of a file that begins with the head `first` and is `table_at` bytes long so far."""
    table, fields = rows.tobytes(), FOOT.pack(MAGIC, table_at, len(rows), 0)[:-4]
    return table + fields + struct.pack("<I", _checksum(first, table, fields))


def read_table(path: Path, first: bytes, frame_bytes: int) -> NDArray[Any]:
    """The table of a file, (clips,) of `ROW`; each clip's features lie within the file.

    Args:
        first: the head that the file must have.
        frame_bytes: size of one frame, L · D · bytes of a number.

    Raises `UnusableError` for a file that is damaged or another encoder's, `OSError` where it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        found = file.read(HEAD)
        if size < HEAD + FOOT.size or not found.startswith(MAGIC):
            raise UnusableError("is damaged, or no file of features of this version")
        file.seek(size - FOOT.size)
        foot = file.read(FOOT.size)
        magic, table_at, count, crc = FOOT.unpack(foot.ljust(FOOT.size))
        if magic != MAGIC or table_at + count * ROW.itemsize + FOOT.size != size or table_at < HEAD:
            raise UnusableError("is damaged (cut short?)")
        file.seek(table_at)
        table = file.read(size - FOOT.size - table_at)
    if _checksum(found, table, foot[:-4]) != crc:
        raise UnusableError("is damaged (the checksum of its table differs)")
    if found != first:
        raise UnusableError("holds the features of another encoder, or in another form")
    rows: NDArray[Any] = np.frombuffer(table, ROW)
    room = table_at - rows["at"].astype(np.int64)  # (clips,) bytes from a clip's first one to the table
    if (
        (rows["at"] < HEAD).any()
        or (rows["at"] > table_at).any()
        or (room < rows["frames"].astype(np.int64) * frame_bytes).any()
    ):
        raise UnusableError("is damaged (its table leads out of it)")
    return rows


def _checksum(first: bytes, table: bytes, fields: bytes) -> int:
    return zlib.crc32(fields, zlib.crc32(table, zlib.crc32(first)))
