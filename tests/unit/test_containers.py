"""Every container that soundfile writes: whole it is decoded whole, cut or (with a checksum) damaged it is refused."""

import io
import struct
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import soundfile

from mser_dist import audio, containers
from mser_dist.errors import UserError

NEVER_READ = {
    "RAW": "has no header",
    "SD2": "keeps its header in another file",
    "PAF": "does not say how long it is",
    "PVF": "does not say how long it is",
    "IRCAM": "does not say how long it is",
    "XI": "has no sample rate",
    "SDS": "has checksums that libsndfile ignores",
    "VOC": "is read beyond its end by libsndfile",
    "MAT4": "is read by libsndfile only as it writes it",
    "MAT5": "is read by libsndfile only as it writes it",
}
DWVW = {"DWVW_12", "DWVW_16", "DWVW_24"}  # libsndfile writes it, and cannot read it from memory
UNWRITABLE = {("AIFF", "DWVW_12"), ("MP3", "MPEG_LAYER_I"), ("MP3", "MPEG_LAYER_II"), ("WAV", "MPEG_LAYER_III")}
BLOCKS = {"IMA_ADPCM", "MS_ADPCM", "GSM610", "G721_32", "G723_24", "G723_40"}  # end with a whole block of samples
BLOCKS |= {"NMS_ADPCM_16", "NMS_ADPCM_24", "NMS_ADPCM_32"}
PAIRS = [
    (kind, subtype)
    for kind in soundfile.available_formats()
    for subtype in soundfile.available_subtypes(kind)
    if kind not in ("RAW", "SD2") and (kind, subtype) not in UNWRITABLE  # writing SD2 leaves a file in this folder
]
READ = [pair for pair in PAIRS if pair[0] not in NEVER_READ and pair[1] not in DWVW]
CHECKED = [pair for pair in READ if pair[0] in ("FLAC", "OGG")]
SAMPLES = 5999  # odd: chunks of one byte a sample are padded


def rate_of(kind: str) -> int:
    return 8000 if kind == "WVE" else 16000


@cache
def file_of(kind: str, subtype: str) -> bytes:
    file = io.BytesIO()
    wave = np.convolve(np.random.default_rng(0).standard_normal(SAMPLES), np.ones(8) / 8, "same") * 0.3
    soundfile.write(file, wave, rate_of(kind), format=kind, subtype=subtype)
    return file.getvalue()


def read(data: bytes, kind: str = "WAV") -> np.ndarray | None:
    """What `decode` returns, None where it refuses, in one line."""
    try:
        wave = audio.decode(data, "clip", rate_of(kind))
    except UserError as error:
        assert str(error).startswith("clip: ")
        assert "\n" not in str(error)
        return None
    assert wave.dtype == np.float32 and wave.ndim == 1 and len(wave) and np.isfinite(wave).all()
    return wave


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_each_container_is_read_or_never() -> None:
    assert containers.READ | NEVER_READ.keys() == soundfile.available_formats().keys()
    assert not containers.READ & NEVER_READ.keys()


@pytest.mark.parametrize(("kind", "subtype"), READ)
def test_a_whole_file_is_decoded_whole(kind: str, subtype: str) -> None:
    data = file_of(kind, subtype)
    wave = read(data, kind)
    assert wave is not None
    if subtype in BLOCKS:
        assert 0 <= len(wave) - SAMPLES < 1024
        assert np.abs(wave[SAMPLES:]).max(initial=0) < 0.9  # no noise
    else:
        padded = kind == "AIFF" and subtype in ("PCM_S8", "PCM_U8", "ULAW", "ALAW")  # libsndfile writes one more
        assert len(wave) == SAMPLES + padded
    assert audio.seconds(data, "clip") == len(wave) / rate_of(kind)


@pytest.mark.parametrize(("kind", "subtype"), [pair for pair in PAIRS if pair not in READ])
def test_what_cannot_be_judged_is_refused(kind: str, subtype: str) -> None:
    assert read(file_of(kind, subtype), kind) is None


@pytest.mark.parametrize(("kind", "subtype"), READ)
def test_a_cut_file_is_refused(kind: str, subtype: str) -> None:
    """At halves and other fractions, a few bytes before its end, and at random: nothing is lost in silence."""
    data = file_of(kind, subtype)
    points = [len(data) * part // 20 for part in range(20)] + [len(data) - back for back in range(1, 6)]
    points += np.random.default_rng(1).integers(1, len(data), 20).tolist()
    whole = read(data, kind)
    for point in points:
        wave = read(data[:point], kind)
        if wave is not None:  # a byte that only pads the last chunk, or ends a CAF's table of packets
            assert len(data) - point == 1
            np.testing.assert_array_equal(wave, whole)


@pytest.mark.parametrize(("kind", "subtype"), CHECKED)
def test_flipped_bits_are_refused_where_the_container_has_a_checksum(kind: str, subtype: str) -> None:
    data, whole = file_of(kind, subtype), read(file_of(kind, subtype), kind)
    bits = [*range(0, 8 * 64), *np.random.default_rng(2).integers(0, 8 * len(data), 150).tolist()]
    refused = 0
    for bit in bits:
        wave = read(flipped(data, bit), kind)
        refused += wave is None
        if wave is not None:  # FLAC: in its comments, its sizes of blocks and frames, or another seek point
            assert kind == "FLAC" and bit // 8 < 8192
            np.testing.assert_array_equal(wave, whole)
    assert refused > 150
    assert kind == "FLAC" or refused == len(bits)


@pytest.mark.parametrize(("kind", "subtype"), READ)
def test_damage_is_never_another_exception(kind: str, subtype: str) -> None:
    draw, data = np.random.default_rng(3), file_of(kind, subtype)
    for number in range(30):
        damaged = bytearray(data)
        for at in draw.integers(0, 120 if number % 2 else len(data), draw.integers(1, 9)):
            damaged[at % len(data)] = draw.integers(256)
        read(bytes(damaged[: len(data) if number % 3 else draw.integers(1, len(data))]), kind)


def chunked(sizes: dict[int, int], form: str = "<I", subtype: str = "PCM_24", kind: str = "WAV") -> bytes:
    """A file with other sizes in its header: {offset: value}."""
    data = bytearray(file_of(kind, subtype))
    for at, value in sizes.items():
        struct.pack_into(form, data, at, value)
    return bytes(data)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
@pytest.mark.parametrize("off", [-100, -37, 1, 100, 4000])
def test_a_wrong_riff_size_with_a_whole_data_chunk_is_read(subtype: str, off: int) -> None:
    data = file_of("WAV", subtype)
    size = struct.unpack_from("<I", data, 4)[0]
    wave = read(chunked({4: size + off}, subtype=subtype))
    assert wave is not None and len(wave) == SAMPLES


@pytest.mark.parametrize("open_size", [0, 0x7FFF0000, 0xFFFFFFFF])
def test_a_streamed_file_is_read(open_size: int) -> None:
    """ffmpeg and sox write these sizes into a pipe."""
    for data in (
        chunked({4: open_size, 40: open_size}),
        chunked({8: open_size or 0xFFFFFFFF}, ">I", "PCM_16", "AU"),
        chunked({4: open_size, 4 + file_of("WAV", "FLOAT").index(b"data"): open_size}, "<I", "FLOAT"),
    ):
        wave = read(data)
        assert wave is not None and len(wave) == SAMPLES


def test_a_recorder_that_counts_its_header_into_the_data_chunk_lost_nothing() -> None:
    data = file_of("WAV", "PCM_24")
    wave = read(chunked({40: len(data) - 8}))
    assert wave is not None and len(wave) == SAMPLES


@pytest.mark.parametrize("kind", ["W64", "NIST", "AVR", "WVE", "MPC2K", "WAV", "AU"])
def test_what_stands_behind_the_audio_is_not_heard(kind: str) -> None:
    subtype = {"WVE": "ALAW"}.get(kind, "PCM_16")
    data = file_of(kind, subtype)
    np.testing.assert_array_equal(read(data + b"\x77" * 64, kind), read(data, kind))


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_without_a_page_without_its_end_or_with_a_second_stream_is_refused(subtype: str) -> None:
    data = file_of("OGG", subtype)
    starts = [i for i in range(len(data)) if data.startswith(b"OggS", i)] + [len(data)]
    pages = [data[a:b] for a, b in pairwise(starts)]
    for left_out in range(1, len(pages)):
        assert read(b"".join(pages[:left_out] + pages[left_out + 1 :])) is None
    for pages_there in range(1, len(pages)):
        assert read(b"".join(pages[:pages_there])) is None
    with pytest.raises(UserError, match="several Ogg streams"):
        audio.decode(data + data, "clip")
    np.testing.assert_array_equal(read(data + b"TAG" + bytes(125)), read(data))


def info_of(flac: bytes, at: int, bits: int, value: int) -> bytes:
    """FLAC whose STREAMINFO has another value in `bits` bits from bit `at` of the file."""
    whole = int.from_bytes(flac, "big")
    shift = 8 * len(flac) - at - bits
    return (whole & ~(((1 << bits) - 1) << shift) | value << shift).to_bytes(len(flac), "big")


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 11025, 12345, 37000])  # in all the ways a frame writes them
def test_a_flac_whose_header_has_another_rate_than_its_frames_is_refused(rate: int) -> None:
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(9000) / 9) / 2, rate, format="FLAC")
    assert len(audio.decode(file.getvalue(), "clip", rate)) == 9000
    with pytest.raises(UserError, match="two sample rates"):
        audio.decode(info_of(file.getvalue(), 18 * 8, 20, rate + 16), "clip", rate)


@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_flacs_md5_is_that_of_its_samples(subtype: str, channels: int) -> None:
    file, wave = io.BytesIO(), np.random.default_rng(0).uniform(-1, 1, (3000, channels))
    soundfile.write(file, wave, 16000, format="FLAC", subtype=subtype)
    data = file.getvalue()
    expected = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0]
    np.testing.assert_array_equal(audio._read_any(data, "clip", 9, False)[0], expected)
    with pytest.raises(UserError, match="MD5"):
        audio.decode(info_of(data, 26 * 8, 128, 1), "clip")
    unknown = info_of(data, 26 * 8, 128, 0)  # as ffmpeg writes it into a pipe
    np.testing.assert_array_equal(audio._read_any(unknown, "clip", 9, False)[0], expected)


@pytest.mark.parametrize("call", [audio.decode, audio.seconds])
def test_a_git_lfs_pointer_is_called_one(call: Callable[[bytes, str], object]) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    with pytest.raises(UserError, match=r"^clip: a Git LFS pointer, .*git lfs pull"):
        call(pointer, "clip")
