"""MP3: how long it really is, and whether it is whole. Only its frames tell: libsndfile takes the length from the first
frame's bit rate where no Xing header gives a count, and reads no further than that.

Layout: ISO/IEC 11172-3 and 13818-3 (frames), ID3v2.4 (tags before them), LAME's and Fraunhofer's headers in the first
frame ("Xing" or "Info", "VBRI").
"""

import struct

from mser_dist.errors import UserError

_RATES = (44_100, 48_000, 32_000)  # Hz, of MPEG 1; MPEG 2 has half of it, MPEG 2.5 a quarter
_KBITS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)  # layer III, by the header's index
_KBITS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_SAME = 0xFFFE0C00  # the bits of a frame's header that all frames of a file share: sync, version, layer, rate
_BEHIND = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"ID3", b"3DI")  # tags that programs put behind the last frame


def tag_size(data: bytes) -> int:
    """Bytes of the ID3v2 tag that `data` begins with."""
    size = 0
    for byte in data[6:10]:
        size = size << 7 | byte & 0x7F
    return 10 + size + (10 if len(data) > 5 and data[5] & 0x10 else 0)


def _first(data: bytes) -> int:
    """Where the first frame should begin: behind tags and the zeros that pad them."""
    at = 0
    while data[at : at + 3] == b"ID3":
        at += tag_size(data[at : at + 10])
    while data[at : at + 1] == b"\0" and at > 0:
        at += 1
    return at


def begins(data: bytes) -> bool:
    """Whether a file begins as MPEG audio does."""
    at = _first(data)
    return data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] >= b"\xe0"


def _frame_bytes(header: int) -> int:
    """The size of the layer III frame with this header; 0 for one that is not possible, or of a size that none says."""
    version, index, rate = header >> 19 & 3, header >> 12 & 15, header >> 10 & 3
    if header >> 21 != 0x7FF or version == 1 or header >> 17 & 3 != 1 or index in (0, 15) or rate == 3:
        return 0
    hertz = _RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
    kbits = _KBITS_1[index] if version == 3 else _KBITS_2[index]
    return (144_000 if version == 3 else 72_000) * kbits // hertz + (header >> 9 & 1)


def with_length(data: bytes, where: str) -> bytes:
    """An MP3 of whose length its header says the truth: the file itself, or its frames behind a Xing header that counts
    them. UserError naming `where` if it ends within a frame, has other things than frames between them, or fewer or
    more than its own header counts.
    """
    first = at = _first(data)
    size = _frame_bytes(kind := int.from_bytes(data[at : at + 4], "big"))
    if not size:
        raise UserError(f"{where}: not readable as audio (MPEG, but no frame of layer III); convert it to wav or flac")
    frames, same = 0, kind & _SAME
    while size and at + size <= len(data):
        at, frames = at + size, frames + 1
        header = int.from_bytes(data[at : at + 4], "big")
        size = _frame_bytes(header) if header & _SAME == same else 0
    counted, rest = _count(data[first : first + 256], kind), data[at:]
    frames -= counted is not None  # the frame with the count has no sound
    if size or (len(rest) < 4 and rest[:1] == b"\xff"):
        raise UserError(f"{where}: the audio is truncated ({len(data)} bytes); copy this file again")
    if counted != frames and not rest.startswith(_BEHIND) and rest.strip(b"\0"):
        raise UserError(f"{where}: damaged: no MPEG frame at byte {at}, where one should begin; copy this file again")
    if counted and counted > frames:
        raise UserError(f"{where}: the audio is truncated ({frames} of {counted} MPEG frames); copy this file again")
    if counted and counted < frames:
        raise UserError(f"{where}: its header counts {counted} MPEG frames, {frames} are there; encode it again")
    if counted and data[first + 36 : first + 40] != b"VBRI":
        return data
    begin = first + _frame_bytes(kind) if counted is not None else first
    return _counting(kind, frames) + data[begin:at]


def _count_at(kind: int) -> int:
    """Where in a frame "Xing" stands: behind its header and side information."""
    mono = kind >> 6 & 3 == 3
    return 4 + ((17 if mono else 32) if kind >> 19 & 3 == 3 else (9 if mono else 17))


def _count(frame: bytes, kind: int) -> int | None:
    """The frames that a file's first one counts, 0 if it is such a frame and does not say, None if it is not."""
    for at in (_count_at(kind), _count_at(kind) + 2):  # + 2: the frame's own checksum, which some encoders put before
        if frame[at : at + 4] in (b"Xing", b"Info"):
            flags, frames = struct.unpack_from(">II", frame, at + 4)
            return int(frames) if flags & 1 else 0
    if frame[36:40] == b"VBRI":
        return int(struct.unpack_from(">I", frame, 50)[0])
    return None


def _counting(kind: int, frames: int) -> bytes:
    """A frame without sound, of a file's own kind, that counts its frames."""
    kind = kind & ~0xF200 | 0x18000  # no checksum, 112 or 64 kbit/s, no padding
    size, at = _frame_bytes(kind), _count_at(kind)
    head = kind.to_bytes(4, "big") + bytes(at - 4) + b"Xing" + struct.pack(">II", 1, frames)
    return head + bytes(size - len(head))
