"""The tar format, as much of it as shards need: one header written, a whole file scanned with nothing skipped in
silence.

Python's `tarfile` ends its listing without an error at a damaged header, reads sparse members as gigabytes, and unpacks
a compressed file on the fly. `scan` instead accepts plain tars of regular files only, bounds what it reads, and fails
loudly. Format: https://www.gnu.org/software/tar/manual/html_node/Standard.html, and POSIX pax for extended headers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mser_dist.errors import UserError

BLOCK = 512
END = bytes(2 * BLOCK)  # a tar ends with two zero blocks
MAX_MEMBER = 1 << 30  # bytes of one file in a shard: an hour of 16-bit stereo at 48 kHz is 0.7 GB
MAX_EXTENDED = 1 << 16  # bytes of a pax or GNU long-name record: these hold a name and some times, never more


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar: its name, and where its data lies, behind a raw header of 512 bytes."""

    name: str
    offset: int
    size: int


def header(name: str, size: int) -> bytes:
    """The ustar header (512 bytes) of a regular file; owner, mode and time are fixed, so that equal input is equal
    bytes.
    """
    raw = name.encode("ascii")
    if len(raw) > 100 or not 0 <= size <= MAX_MEMBER:
        raise ValueError(f"no ustar header for a name of {len(raw)} bytes and {size} bytes of data")
    fields = b"%b%07o\0%07o\0%07o\0%011o\0%011o\0" % (raw.ljust(100, b"\0"), 0o644, 0, 0, size, 0)
    block = bytearray((fields + b" " * 8 + b"0" + bytes(100) + b"ustar\x0000").ljust(BLOCK, b"\0"))
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padding(size: int) -> bytes:
    """The zeros that follow `size` bytes of data up to the next block."""
    return bytes(-size % BLOCK)


def scan(path: Path) -> Iterator[Member]:
    """Every regular file of a plain tar, in order; directories are skipped.

    Raises UserError naming the tar for anything a shard must not be: compressed, cut, a damaged header, a link, device
    or sparse member, an absolute or `..` name, oversized records, bytes after the end.
    """
    try:
        with path.open("rb") as file:
            yield from _members(file, path.stat().st_size)
    except ValueError as error:
        raise UserError(f"{path}: {error}; not a sound tar shard, write or copy it again") from None


def _members(file: BinaryIO, total: int) -> Iterator[Member]:
    long_name: str | None = None
    long_size: int | None = None
    position = 0
    while True:
        file.seek(position)
        block = file.read(BLOCK)
        if block == bytes(BLOCK):
            return _check_end(file, position, total)
        name, size, kind = _parse(block)
        offset = position + BLOCK
        if kind in b"xgL":
            if size > MAX_EXTENDED:
                raise ValueError(
                    f"an extended header of {size} bytes at offset {position}, at most {MAX_EXTENDED} are read"
                )
            record = file.read(size)
            if kind == b"L":
                long_name = record.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == b"x":
                long_name, long_size = _pax(record, long_name)
            elif _pax(record, None) != (None, None):  # another reader would take it for every member's
                raise ValueError("a global extended header that names a path or a size")
        elif kind in b"0\0":
            full_name = name if long_name is None else long_name
            if long_size is not None and long_size != size:
                raise ValueError(f"member {full_name!r} has two sizes, {size} and {long_size}")
            _check_name(full_name)
            if size > MAX_MEMBER:
                raise ValueError(f"member {full_name!r} has {size} bytes, at most {MAX_MEMBER} are read")
            if offset + size > total:
                raise ValueError(f"cut inside member {full_name!r} at {total} bytes")
            yield Member(full_name, offset, size)
            long_name = long_size = None
        elif kind == b"5":
            _check_name(name if long_name is None else long_name)  # whoever unpacks the tar would make it
            long_name = long_size = None
        else:
            raise ValueError(f"member {name!r} of type {kind!r} (link, device, sparse …) where only files are allowed")
        position = offset + size + -size % BLOCK


def _parse(block: bytes) -> tuple[str, int, bytes]:
    """(name, size, type) of a raw header; ValueError unless its checksum holds."""
    if len(block) < BLOCK:
        raise ValueError("cut: the tar has no end marker")
    if (
        block[:2] == b"\x1f\x8b"
        or block[:6] == b"\xfd7zXZ\0"
        or block[:3] == b"BZh"
        or block[:4] == b"\x28\xb5\x2f\xfd"
    ):
        raise ValueError("compressed, and shards are plain tars")
    try:
        checksum = int(block[148:156].strip(b" \0"), 8)
        size = int(block[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        raise ValueError("a damaged header (or no tar at all)") from None
    if sum(block) - sum(block[148:156]) + 8 * 32 != checksum or size < 0:
        raise ValueError("a damaged header (checksum)")
    raw = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        raw = block[345:500].split(b"\0", 1)[0] + b"/" + raw
    return raw.decode("utf-8", "surrogateescape"), size, block[156:157]


def _pax(record: bytes, name: str | None) -> tuple[str | None, int | None]:
    """The path and size that a pax record ("<length> <key>=<value>\\n" …) gives to the next member."""
    size = None
    while record:
        length, _, _ = record.partition(b" ")
        if not length.isdigit() or not len(length) + 2 < int(length) <= len(record):
            raise ValueError("a damaged pax header")
        key, _, value = record[len(length) + 1 : int(length) - 1].partition(b"=")
        record = record[int(length) :]
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            size = int(value)
        elif key.startswith(b"GNU.sparse"):
            raise ValueError("a sparse member, and only plain files are allowed")
    return name, size


def _check_name(name: str) -> None:
    if not name or name.startswith("/") or ".." in name.split("/") or not name.isprintable():
        raise ValueError(f"the unsafe member name {name!r}")


def _check_end(file: BinaryIO, position: int, total: int) -> None:
    """Past the first zero block only zeros may follow: members behind a zeroed header would be lost without a word."""
    if total - position < len(END):
        raise ValueError("cut: the tar has no end marker")
    while chunk := file.read(1 << 20):
        if chunk.count(0) != len(chunk):
            raise ValueError(f"data after the end marker at offset {position} (a zeroed header?)")
