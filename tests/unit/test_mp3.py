"""MP3: its frames tell its length, whatever its header says or does not."""

import io
import itertools

import numpy as np
import pytest
import soundfile

from mser_dist import audio, mp3
from mser_dist.errors import UserError

SECONDS = 6
RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)  # of MPEG 2.5, 2 and 1
KINDS = list(itertools.product(RATES, (1, 2), ("CONSTANT", "VARIABLE")))


def mp3_of(rate: int, channels: int = 1, mode: str = "VARIABLE", loud_first: bool = True) -> bytes:
    """Two seconds of noise before four of silence: the first frame's bit rate is not the mean one."""
    noise, silence = (
        np.random.default_rng(0).standard_normal((2 * rate, channels)) * 0.2,
        np.zeros((4 * rate, channels)),
    )
    file, parts = io.BytesIO(), (noise, silence) if loud_first else (silence, noise)
    soundfile.write(
        file, np.concatenate(parts), rate, format="MP3", subtype="MPEG_LAYER_III", bitrate_mode=mode,
        compression_level=0.5,
    )  # fmt: skip
    return file.getvalue()


def frames_of(data: bytes) -> list[bytes]:
    """The frames of a file that has nothing else."""
    found, at = [], 0
    while at < len(data):
        size = mp3._frame_bytes(int.from_bytes(data[at : at + 4], "big"))
        found.append(data[at : at + size])
        at += size
    return found


@pytest.mark.parametrize(("rate", "channels", "mode"), KINDS)
def test_whole_with_and_without_a_xing_header(rate: int, channels: int, mode: str) -> None:
    data = mp3_of(rate, channels, mode)
    assert b"Xing" in data[:64] or b"Info" in data[:64]
    exact = audio.decode(data, "clip", rate)
    assert len(exact) == SECONDS * rate
    assert audio.seconds(data, "clip") == SECONDS
    for loud_first in (True, False):
        plain = b"".join(frames_of(mp3_of(rate, channels, mode, loud_first))[1:])
        wave = audio.decode(plain, "clip", rate, max_seconds=SECONDS + 1)
        assert audio.seconds(plain, "clip") == len(wave) / rate
        assert 0 <= len(wave) - SECONDS * rate < 3 * 1152  # the encoder's delay and padding, which only Xing tells


def test_libsndfile_alone_would_lose_sound_that_we_keep() -> None:
    """Without a Xing header it believes the first frame's bit rate: the reason for the walk over the frames."""
    plain = b"".join(frames_of(mp3_of(16000))[1:])
    lost = soundfile.read(io.BytesIO(plain), dtype="float32")[0]
    wave = audio.decode(plain, "clip")
    assert len(lost) < 5 * 16000 < len(wave)
    both = slice(2000, 20000)
    shift = 529  # samples of a decoder's delay, which a header makes libsndfile leave out
    np.testing.assert_allclose(wave[both], lost[both.start + shift : both.stop + shift], atol=1e-6)


@pytest.mark.parametrize("xing", [True, False])
@pytest.mark.parametrize(("rate", "mode"), [(16000, "VARIABLE"), (44100, "CONSTANT")])
def test_cut_in_a_frame_is_refused_and_with_a_xing_header_anywhere(rate: int, mode: str, xing: bool) -> None:
    frames = frames_of(mp3_of(rate, 1, mode))[0 if xing else 1 :]
    data = b"".join(frames)
    borders = set(np.cumsum([len(frame) for frame in frames]).tolist())
    points = np.random.default_rng(0).integers(1, len(data), 60).tolist()
    for point in [*points, len(data) // 2, len(data) // 20, *(len(data) - back for back in range(1, 8))]:
        if point not in borders or xing:
            with pytest.raises(UserError, match=r"truncated|not readable"):
                audio.decode(data[:point], "clip")
    cut = b"".join(frames[: len(frames) // 2])
    if xing:
        with pytest.raises(UserError, match=r"truncated \(\d+ of \d+ MPEG frames\)"):
            audio.decode(cut, "clip")
    else:  # nothing tells
        assert len(audio.decode(cut, "clip")) < 4 * 16000


def test_tags_around_are_passed_over() -> None:
    data = mp3_of(16000)
    for xing in (True, False):
        bare = data if xing else b"".join(frames_of(data)[1:])
        wave = audio.decode(bare, "clip")
        for tagged in (
            b"ID3\4\0\0\0\0\1\1" + bytes(129) + bare,
            bare + b"TAG" + bytes(125),
            bare + b"APETAGEX" + bytes(60) + b"TAG" + bytes(125),
            bare + bytes(500),
        ):
            np.testing.assert_array_equal(audio.decode(tagged, "clip"), wave)


@pytest.mark.parametrize("xing", [True, False])
def test_what_is_between_frames_is_damage(xing: bool) -> None:
    frames = frames_of(mp3_of(16000))[0 if xing else 1 :]
    middle = len(frames) // 2
    for broken in (
        [*frames[:middle], b"no frame at all", *frames[middle:]],
        [*frames[:middle], b"\0" + frames[middle][1:], *frames[middle + 1 :]],
    ):
        with pytest.raises(UserError, match="damaged: no MPEG frame at byte"):
            audio.decode(b"".join(broken), "clip")


def test_two_files_in_one_are_not_heard_as_the_first() -> None:
    data = mp3_of(16000)
    with pytest.raises(UserError, match=r"its header counts \d+ MPEG frames, \d+ are there"):
        audio.decode(data + data, "clip")


def test_a_header_that_counts_nothing_and_fraunhofers() -> None:
    """A Xing header without its count, and a VBRI header, are passed over: the frames are counted."""
    frames = frames_of(mp3_of(16000))
    plain = audio.decode(b"".join(frames[1:]), "clip")
    at = frames[0].index(b"Xing")
    silent = frames[0][: at + 4] + bytes(12) + frames[0][at + 16 :]
    vbri = frames[0][:4] + bytes(32) + b"VBRI" + bytes(10) + (len(frames) - 1).to_bytes(4, "big")
    for first in (silent, vbri + bytes(len(frames[0]) - len(vbri))):
        np.testing.assert_array_equal(audio.decode(first + b"".join(frames[1:]), "clip"), plain)
        assert audio.seconds(first + b"".join(frames[1:]), "clip") == len(plain) / 16000


@pytest.mark.parametrize("head", ["fffd9004", "ffff9004", "fff15080"])  # layers II and I, AAC
def test_no_layer_iii_is_one_line(head: str) -> None:
    with pytest.raises(UserError, match="no frame of layer III"):
        audio.decode(bytes.fromhex(head) + bytes(2000), "clip")
