import io
import struct
import sys

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from mser_dist import audio
from mser_dist.errors import UserError


def tone(seconds: float, rate: int = 16000, hertz: float = 440.0, level: float = 0.3) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def file_of(wave: np.ndarray, rate: int, kind: str = "WAV", subtype: str | None = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize("ext", ["flac", "wav"])
def test_encode_then_decode_gives_the_same_samples(ext: str) -> None:
    pcm = np.random.default_rng(0).integers(-32768, 32768, 4001).astype(np.int16)
    data = audio.encode(pcm, 16000, ext)
    assert data == audio.encode(pcm, 16000, ext)
    wave = audio.decode(data, "clip")
    assert wave.dtype == np.float32
    np.testing.assert_array_equal(audio.to_pcm16(wave), pcm)


def test_to_pcm16_clips_at_full_scale() -> None:
    assert audio.to_pcm16(np.array([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [-32768, -32768, 0, 32767, 32767]


@pytest.mark.parametrize(
    ("kind", "subtype", "tolerance"),
    [
        ("WAV", "PCM_U8", 0.02),
        ("WAV", "PCM_24", 0.001),
        ("WAV", "FLOAT", 0.001),
        ("FLAC", "PCM_24", 0.001),
        ("OGG", "VORBIS", 0.05),
        ("MP3", "MPEG_LAYER_III", 0.1),
    ],
)
def test_decode_any_format_rate_and_channels(kind: str, subtype: str, tolerance: float) -> None:
    """A 440 Hz tone, at twice the level left of silence, comes back as the same tone at 16 kHz mono."""
    rate = 48000
    stereo = np.stack([tone(1, rate, level=0.6), np.zeros(rate, np.float32)], axis=1)
    wave = audio.decode(file_of(stereo, rate, kind, subtype), "clip")
    assert abs(len(wave) - 16000) <= 1200  # mp3 adds its encoder's delay
    middle = wave[4000:12000]
    spectrum = np.abs(np.fft.rfft(middle))
    assert np.argmax(spectrum) == 220  # 440 Hz in bins of 2 Hz
    assert 2 * spectrum[220] / len(middle) == pytest.approx(0.3, abs=tolerance)


def test_decode_96_khz_is_resampled_without_aliasing() -> None:
    wave = audio.decode(file_of(tone(0.5, 96000, hertz=20000), 96000, subtype="PCM_24"), "clip")
    assert len(wave) == 8000
    assert np.abs(wave[1000:-1000]).max() < 1e-3  # 20 kHz cannot be heard at a rate of 16 kHz


def test_decode_goes_by_content_not_by_name() -> None:
    assert len(audio.decode(file_of(tone(0.5), 16000, "MP3", "MPEG_LAYER_III"), "really_an_mp3.wav")) >= 8000


def chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def pcm16_format(channels: int, rate: int, form: int) -> bytes:
    """A wav's `fmt ` chunk of 16, 18 or 40 bytes (WAVE_FORMAT_EXTENSIBLE)."""
    body = struct.pack("<HHIIHH", 0xFFFE if form == 40 else 1, channels, rate, rate * 2 * channels, 2 * channels, 16)
    if form == 18:
        body += b"\0\0"
    if form == 40:
        body += struct.pack("<HHI", 22, 16, 3) + bytes.fromhex("0100000000001000800000aa00389b71")
    return chunk(b"fmt ", body)


bystanders = st.lists(
    st.one_of(
        st.builds(chunk, st.just(b"JUNK"), st.binary(max_size=9)),
        st.builds(lambda text: chunk(b"LIST", b"INFO" + chunk(b"ISFT", text)), st.binary(max_size=9)),
        st.builds(lambda text: chunk(b"LIST", b"adtl" + text), st.sampled_from([b"", b"odd"])),
        st.builds(lambda notes: chunk(b"bext", bytes(602) + notes), st.binary(max_size=9)),
    ),
    max_size=2,
).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(
    rate=st.sampled_from([8000, 11025, 16000, 22050, 44100, 48000, 96000]) | st.integers(1, 2**30 - 1),
    channels=st.integers(1, 2),
    form=st.sampled_from([16, 18, 40]),
    around=st.tuples(bystanders, bystanders, bystanders),
    frames=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_a_plain_wav_equals_libsndfile_bit_for_bit(
    rate: int, channels: int, form: int, around: tuple[bytes, bytes, bytes], frames: int, seed: int
) -> None:
    pcm = np.random.default_rng(seed).integers(-32768, 32768, (frames, channels)).astype("<i2")
    first, middle, last = around
    body = first + pcm16_format(channels, rate, form) + middle + chunk(b"data", pcm.tobytes()) + last
    data = chunk(b"RIFF", b"WAVE" + body)
    expected, native_rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    found = audio._read_wav(data, "clip", 1.0 * frames)
    assert found is not None, "left to libsndfile, which is slower"
    assert found[1] == native_rate == rate
    np.testing.assert_array_equal(found[0], expected)
    np.testing.assert_array_equal(audio.decode(data, "clip", rate), expected.mean(axis=1))


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM", "MS_ADPCM"])
def test_any_other_wav_is_libsndfiles(subtype: str) -> None:
    data = file_of(tone(0.5), 16000, subtype=subtype)
    assert audio._read_wav(data, "clip", 1) is None
    np.testing.assert_array_equal(audio.decode(data, "clip"), soundfile.read(io.BytesIO(data), dtype="float32")[0])


WAV = file_of(tone(0.5), 16000)
FLAC = file_of(tone(0.5), 16000, "FLAC")
FORTY_MINUTES = file_of(np.zeros(40 * 60 * 1000, np.float32), 1000)


def claiming(samples: int) -> bytes:
    """FLAC with another length in its header: STREAMINFO's count of samples, 36 bits at byte 21."""
    return FLAC[:21] + ((FLAC[21] >> 4) << 36 | samples).to_bytes(5, "big") + FLAC[26:]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not readable as audio \\(Format not recognised\\)"),
        (b"this is no audio at all" * 10, "not readable as audio"),
        (file_of(np.zeros(0, np.float32), 16000), "empty"),
        (file_of(np.array([0.1, np.nan, 0.1], np.float32), 16000, subtype="FLOAT"), "NaN"),
        (file_of(np.array([0.1, np.inf, 0.1], np.float32), 16000, subtype="FLOAT"), "NaN or infinite"),
        (file_of(np.zeros((800, 20), np.float32), 16000), "20 channels"),
        (WAV[: len(WAV) // 2], "truncated"),
        (WAV[:-100], "truncated"),
        (FLAC[: len(FLAC) // 2], "not readable|truncated"),
        (FLAC[:-100], "not readable|truncated"),
        (FORTY_MINUTES, r"2400\.0 s of audio, the limit is 30 s"),
        (FORTY_MINUTES[:60], "truncated"),
        (claiming(40 * 60 * 16000), r"2400\.0 s of audio, the limit is 30 s"),
        (claiming(8001), "not readable|truncated"),
        (claiming(0), "does not say how long"),
    ],
    ids=lambda value: value if isinstance(value, str) else "audio",  # bytes as ids: libsndfile writes the time in them
)
@pytest.mark.parametrize("where", ["corpus/clip_7.wav", ""])
def test_decode_refuses_in_one_line_that_names_the_clip(data: bytes, says: str, where: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        audio.decode(data, where, max_seconds=30)
    assert str(caught.value).startswith(f"{where}: ")
    assert str(caught.value).removeprefix(f"{where}: ")[0].isalnum()
    assert "\n" not in str(caught.value)


def test_a_damaged_file_prints_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """libsndfile seeks before the start of this one; errors in its callbacks go to this hook, which prints."""
    printed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    cut = file_of(tone(0.5), 16000, "AIFF")[:28]
    with pytest.raises(soundfile.SoundFileError):
        soundfile.SoundFile(audio._Bytes(cut))
    assert not printed


@pytest.mark.parametrize("data", [WAV, FLAC])
def test_decode_refuses_by_the_limit_and_not_at_it(data: bytes) -> None:
    assert len(audio.decode(data, "clip", max_seconds=0.5)) == 8000
    with pytest.raises(UserError, match=r"0\.5 s of audio, the limit is 0\.4 s"):
        audio.decode(data, "clip", max_seconds=0.4)


def test_decode_takes_no_memory_for_what_a_header_claims() -> None:
    with pytest.raises(UserError, match="the limit is 3600 s"):
        audio.decode(claiming(2**36 - 1), "clip")


def test_decode_takes_no_memory_for_silence_at_a_rate_that_nobody_records() -> None:
    """A few kB of FLAC that are 63 MB of samples, of 3 seconds."""
    pcm = np.zeros((3 * 655_350, 8), np.int16)
    data = file_of(pcm, 655_350, "FLAC")
    assert len(data) < 100_000
    with pytest.raises(UserError, match="clip: 8 channels at 655350 Hz; resample it to 16000 Hz"):
        audio.decode(data, "clip", max_seconds=3)


def test_a_small_file_of_silence_cannot_take_any_memory() -> None:
    silence = file_of(np.zeros((96_000, 8), np.float32), 96_000, "FLAC")
    assert len(silence) < 2000 and len(audio.decode(silence, "clip")) == 16_000
    for data in (silence, file_of(np.zeros((60_000, 2), np.float32), 60_000)):
        with pytest.raises(UserError, match=r"clip: [28] channels at \d+ Hz; resample it to 16000 Hz"):
            audio.decode(data, "clip", max_seconds=1, max_rate=96_000)
    assert len(audio.decode(file_of(np.zeros((48_000, 2), np.float32), 48_000), "clip", max_seconds=1, max_rate=96_000))


def test_seconds_goes_by_the_header() -> None:
    assert audio.seconds(WAV, "clip") == audio.seconds(FLAC, "clip") == 0.5
    for data, says in [(b"no audio", "not readable"), (claiming(0), "does not say how long")]:
        with pytest.raises(UserError, match=f"^clip: .*{says}"):
            audio.seconds(data, "clip")


def array_or_refusal(data: bytes) -> np.ndarray | None:
    """What `decode` returns, if it does not refuse the file."""
    try:
        wave = audio.decode(data, "clip", max_seconds=30)
    except UserError:
        return None
    assert wave.dtype == np.float32 and wave.ndim == 1 and len(wave) > 0 and np.isfinite(wave).all()
    return wave


fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(st.sampled_from([b"", WAV[:12], WAV[:44], FLAC[:4], FLAC[:42], b"OggS", b"ID3", b"FORM"]), st.binary())
def test_any_bytes_give_an_array_or_a_refusal(start: bytes, rest: bytes) -> None:
    array_or_refusal(start + rest)


@fuzz
@given(
    data=st.sampled_from(
        [
            WAV,
            FLAC,
            file_of(np.stack([tone(0.1), -tone(0.1)], axis=1), 44100, "FLAC"),
            file_of(tone(0.1), 48000, "WAV", "FLOAT"),
        ]
    ),
    flips=st.lists(st.tuples(st.integers(0, 60) | st.integers(0, 10**6), st.integers(1, 255)), max_size=4),
    keep=st.none() | st.floats(0, 1),
)
def test_a_damaged_file_gives_what_libsndfile_reads_or_a_refusal(
    data: bytes, flips: list[tuple[int, int]], keep: float | None
) -> None:
    damaged = bytearray(data)
    for at, bits in flips:
        damaged[at % len(data)] ^= bits
    damaged = damaged[: None if keep is None else round(keep * len(data))]
    wave = array_or_refusal(bytes(damaged))
    try:
        expected, rate = soundfile.read(io.BytesIO(damaged), dtype="float32", always_2d=True)
    except (RuntimeError, ValueError):  # libsndfile refuses damaged tags too, which dr_flac skips
        return
    if wave is not None and rate == 16000:
        np.testing.assert_array_equal(wave, expected.mean(axis=1))


@pytest.mark.parametrize("backend", sorted({audio.FEATURE_BACKEND, "torch"}))
@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("samples", [400, 3999, 16000, 52345])
def test_log_mel_equals_whispers_feature_extractor(backend: str, n_mels: int, samples: int) -> None:
    wave = (np.random.default_rng(samples).standard_normal(samples) * 0.1).astype(np.float32) + tone(samples / 16000)
    extractor = WhisperFeatureExtractor(feature_size=n_mels)
    expected = extractor(wave, sampling_rate=16000, padding="longest", return_tensors="np").input_features[0]
    found = audio.log_mel(wave, n_mels, backend)
    assert found.dtype == np.float32
    assert found.shape == (n_mels, samples // 160)
    np.testing.assert_allclose(found, expected[:, : samples // 160], atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", sorted({audio.FEATURE_BACKEND, "torch"}))
def test_log_mel_of_a_click_and_of_silence(backend: str) -> None:
    assert audio.log_mel(np.ones(7, np.float32), 80, backend).shape == (80, 2)  # padded to one window
    np.testing.assert_allclose(audio.log_mel(np.zeros(1600, np.float32), 80, backend), -1.5)  # (log10 1e-10 + 4) / 4
