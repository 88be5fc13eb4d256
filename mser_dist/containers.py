"""Whether an audio file is whole, by its container: what libsndfile does not check, or reads shorter without a word.

| container | a cut file is known by | flipped bits by |
|---|---|---|
| WAV, WAVEX, RF64, W64, AIFF, SVX, CAF | the data chunk's size (and, of the first five and SVX, that of the file) | – |
| AU, NIST, AVR, WVE, MPC2K | the header's count of bytes or samples | – |
| HTK | libsndfile itself | – |
| FLAC | libsndfile itself (frame CRCs, count of samples) | the same, and the MD5 of all samples |
| Ogg (Vorbis, Opus) | the last page's end-of-stream flag, the pages' numbers | each page's CRC-32 |
| MP3 | the walk over its frames (`mp3`), the Xing header's count of frames | those in frame headers |

Cannot be judged, and are read: a WAV, RF64, W64, AIFF, AU or CAF that a program streamed (its sizes are 0, or 2 GiB and
more), and an MP3 without a Xing header that ends between two frames. All other containers are refused: PAF, PVF, IRCAM
and SD2 do not say how long they are; XI has no sample rate; libsndfile reads VOC beyond its end, ignores the checksums
of SDS, and takes MAT4 and MAT5 only as it writes them itself.
"""

import hashlib
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist import mp3
from mser_dist.errors import UserError
from mser_dist.files import LFS_POINTER

READ = frozenset(
    {"WAV", "WAVEX", "RF64", "W64", "AIFF", "SVX", "CAF", "AU", "NIST", "AVR", "WVE", "MPC2K", "HTK"}
    | {"FLAC", "OGG", "MP3"}
)
"""soundfile's names of the containers that are read."""

STREAMED = 0x7F000000  # bytes: sizes from here on are what programs write that do not know them yet (sox, ffmpeg)


def whole(data: bytes, where: str) -> bytes:
    """The bytes of an audio file for libsndfile to read: as they are, without what libsndfile would take for samples
    behind their end, or with a header that tells an MP3's true length. UserError naming `where` for a file that is cut
    or damaged, as far as its container tells (see the table above).
    """
    if data.startswith(LFS_POINTER):
        raise UserError(f"{where}: a Git LFS pointer, not the audio itself; run git lfs pull where it was cloned")
    if data[:4] == b"OggS":
        _check_pages(data, where)
        return data
    if mp3.begins(data):
        return mp3.with_length(data, where)
    for magic, end, trimmed in _ENDS:
        if data.startswith(magic):
            try:
                at = end(data)
            except (struct.error, ValueError, KeyError, IndexError):  # not even its header is whole
                raise _cut(data, where) from None
            if at is not None and at > len(data):
                raise _cut(data, where)
            return trimmed(data, len(data) if at is None else min(at, len(data)))
    return data


def _cut(data: bytes, where: str) -> UserError:
    return UserError(f"{where}: the audio is truncated ({len(data)} bytes); copy this file again")


def _sized(size: int, begin: int) -> int | None:
    """Where `size` bytes from `begin` end; None where a streaming program left the size open."""
    return begin + size if 0 < size < STREAMED else None


def _chunk(data: bytes, name: bytes, at: int, form: str, pad: int, counts_head: bool = False) -> tuple[int, int]:
    """(begin, size) of the first chunk called `name` of those that begin at `at`; KeyError where there is none."""
    head = struct.Struct(form)
    while at + head.size <= len(data):
        found, size = head.unpack_from(data, at)
        begin = at + head.size
        size -= head.size if counts_head else 0
        if found == name:
            return begin, size
        at = begin + max(size, 0) + -max(size, 0) % pad
    raise KeyError(name)


def _both(file_end: int | None, data_end: int | None) -> int | None:
    """Where the audio must reach: a cut file is shorter than both the file's own size and the data chunk's.

    One of the two alone is often wrong in files that are whole: editors add and take chunks, recorders miscount.
    """
    return data_end if file_end is None or data_end is None else min(file_end, data_end)


def _wav(data: bytes) -> int | None:
    if data[8:12] != b"WAVE":
        return None
    order = ">" if data[:4] == b"RIFX" else "<"
    begin, size = _chunk(data, b"data", 12, order + "4sI", 2)
    return _both(_sized(struct.unpack_from(order + "I", data, 4)[0], 8), _sized(size, begin))


def _rf64(data: bytes) -> int | None:
    if data[8:12] != b"WAVE":
        return None
    wide, _ = _chunk(data, b"ds64", 12, "<4sI", 2)
    file_size, data_size = struct.unpack_from("<QQ", data, wide)
    begin, size = _chunk(data, b"data", 12, "<4sI", 2)
    return _both(_sized(file_size, 8), _sized(data_size if size == 0xFFFFFFFF else size, begin))


def _w64(data: bytes) -> int | None:
    begin, size = _chunk(data, b"data" + _W64_GUID, 40, "<16sQ", 8, counts_head=True)
    return _both(_sized(struct.unpack_from("<Q", data, 16)[0], 0), _sized(size, begin))


def _iff(data: bytes) -> int | None:
    name = {b"AIFF": b"SSND", b"AIFC": b"SSND", b"8SVX": b"BODY", b"16SV": b"BODY"}.get(data[8:12])
    if name is None:
        return None
    begin, size = _chunk(data, name, 12, ">4sI", 2)
    return _both(_sized(struct.unpack_from(">I", data, 4)[0], 8), _sized(size, begin))


def _caf(data: bytes) -> int | None:
    begin, size = _chunk(data, b"data", 8, ">4sq", 1)
    return _sized(size, begin)


def _au(data: bytes) -> int | None:
    begin, size = struct.unpack_from(">II" if data[:4] == b".snd" else "<II", data, 4)
    return _sized(size, begin)


def _nist(data: bytes) -> int:
    head = data[:1024].split(b"end_head")[0].decode("latin-1").split("\n")
    fields = {line.split(" ")[0]: line.split(" ")[-1] for line in head[2:]}
    count, width, channels = (int(fields[name]) for name in ("sample_count", "sample_n_bytes", "channel_count"))
    return int(head[1]) + count * width * channels


def _avr(data: bytes) -> int:
    stereo, bits, frames = (*struct.unpack_from(">HH", data, 12), *struct.unpack_from(">I", data, 26))
    return int(128 + frames * (2 if stereo else 1) * bits // 8)


def _wve(data: bytes) -> int:
    return int(32 + struct.unpack_from(">I", data, 18)[0])


def _mpc2k(data: bytes) -> int:
    stereo, frames = data[21], struct.unpack_from("<I", data, 30)[0]
    return int(42 + frames * 2 * (2 if stereo else 1))


def _as_it_is(data: bytes, _: int) -> bytes:
    return data


def _cut_behind(data: bytes, end: int) -> bytes:
    """For containers of which libsndfile reads all that follows as samples."""
    return data[:end]


def _unpadded_wav(data: bytes, _: int) -> bytes:
    """Without the byte that pads an odd data chunk: of GSM, libsndfile would decode it as one more block, to noise. And
    one that was streamed with sizes of 0, which libsndfile takes for empty, with the largest: it reads to the end.
    """
    if data[8:12] != b"WAVE":
        return data
    begin, size = _chunk(data, b"data", 12, "<4sI", 2)
    end = len(data) if size == 0 and data[4:8] == bytes(4) else begin + size if size % 2 else 0
    return data[: begin - 4] + b"\xff" * 4 + data[begin:end] if end else data


_W64_GUID = bytes.fromhex("f3acd3118cd100c04f8edb8a")
_ENDS: tuple[tuple[bytes, Callable[[bytes], int | None], Callable[[bytes, int], bytes]], ...] = (
    # how a file begins, where its audio ends (None: nobody says), and what libsndfile is given of it
    (b"RIFF", _wav, _unpadded_wav),
    (b"RIFX", _wav, _as_it_is),
    (b"RF64", _rf64, _as_it_is),
    (b"riff", _w64, _cut_behind),
    (b"FORM", _iff, _as_it_is),
    (b"caff", _caf, _as_it_is),
    (b".snd", _au, _cut_behind),
    (b"dns.", _au, _cut_behind),
    (b"NIST_1A\n", _nist, _cut_behind),
    (b"2BIT", _avr, _cut_behind),
    (b"ALawSoundFile**", _wve, _cut_behind),
    (b"\x01\x04", _mpc2k, _cut_behind),
)

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _page_crc(page: bytes) -> int:
    """Ogg's CRC-32 of a page whose own field is zero: zlib's polynomial, with bits the other way round (RFC 3533)."""
    crc = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(crc.to_bytes(4, "little").translate(_REVERSED), "big")


def _check_pages(data: bytes, where: str) -> None:
    """Every page of an Ogg file is there and as it was written, and so is its end. One stream: libsndfile would leave
    out a second one without a word.
    """
    at, number, serial, ended = 0, 0, b"", False
    while at < len(data):
        head = data[at : at + 27]
        if ended and head[:4] != b"OggS":
            return  # a tag or padding that some program put behind the last page
        if ended:
            raise UserError(f"{where}: several Ogg streams in one file; encode it again as one")
        end = at + 27 + head[26] if len(head) == 27 else len(data) + 1
        end += sum(data[at + 27 : end])
        if end > len(data) or head[:4] != b"OggS":
            break
        page = data[at : at + 22] + bytes(4) + data[at + 26 : end]
        sequence, crc = struct.unpack_from("<II", head, 18)
        if crc != _page_crc(page):
            raise UserError(f"{where}: damaged: the checksum of Ogg page {number} is wrong; copy this file again")
        serial = serial or head[14:18]
        if head[14:18] != serial:
            raise UserError(f"{where}: several Ogg streams in one file; encode it again as one")
        if sequence != number:
            raise UserError(f"{where}: damaged: the Ogg page {number} is missing; copy this file again")
        ended, number, at = bool(head[5] & 4), number + 1, end
    if at < len(data) and data[at : at + 4] != b"OggS"[: len(data) - at]:
        raise UserError(f"{where}: damaged: no Ogg page where number {number} should begin; copy this file again")
    if not ended:
        raise _cut(data, where)


def check_flac(data: bytes, samples: NDArray[Any], where: str) -> None:
    """Hold what a FLAC decoded to against the MD5 in its header, and the header's rate, which no checksum covers,
    against that of its first frame. UserError naming `where` if they differ.

    samples: int [samples, channels], of as many bits as the file's, in int8, int16 or (24 bits, in the upper three
    bytes) int32.
    """
    at = 4 + (mp3.tag_size(data) if data[:3] == b"ID3" else 0)
    info = data[at + 4 : at + 38]  # STREAMINFO, always the first block
    if info[18:34] != bytes(16):  # zeros: the encoder streamed it, and did not know
        raw = samples if samples.dtype.itemsize < 4 else samples.view(np.uint8).reshape(-1, 4)[:, 1:]
        if hashlib.md5(np.ascontiguousarray(raw).data, usedforsecurity=False).digest() != info[18:34]:
            raise UserError(f"{where}: damaged: its samples are not those of the MD5 in its header; copy it again")
    last = False
    while not last and at + 4 <= len(data):
        last = data[at] >= 0x80
        at += 4 + int.from_bytes(data[at + 1 : at + 4], "big")
    rate = _flac_frame_rate(data[at : at + 16])
    if rate is not None and rate != int.from_bytes(info[10:13], "big") >> 4:
        raise UserError(f"{where}: damaged: its header and its first frame name two sample rates; copy it again")


_FLAC_RATES = (88_200, 176_400, 192_000, 8_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000)  # codes 1 to 11


def _flac_frame_rate(head: bytes) -> int | None:
    """Hz by a FLAC frame's header (RFC 9639, 9.1); None where it leaves that to the file's header."""
    block, code = head[2] >> 4, head[2] & 15
    if 1 <= code <= 11:
        return _FLAC_RATES[code - 1]
    at = 4 + max(1, 8 - (head[4] ^ 0xFF).bit_length())  # behind the frame's number, which is coded as UTF-8 is
    at += {6: 1, 7: 2}.get(block, 0)
    wide = int.from_bytes(head[at : at + 2], "big")
    return {12: head[at] * 1000, 13: wide, 14: wide * 10}.get(code)
