import io

import numpy as np
import pytest
import soundfile
from transformers import WhisperFeatureExtractor

from mser_dist.data import audio
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


WAV = file_of(tone(0.5), 16000)
FLAC = file_of(tone(0.5), 16000, "FLAC")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not readable as audio"),
        (b"this is no audio at all" * 10, "not readable as audio"),
        (file_of(np.zeros(0, np.float32), 16000), "empty"),
        (file_of(np.array([0.1, np.nan, 0.1], np.float32), 16000, subtype="FLOAT"), "NaN"),
        (file_of(np.array([0.1, np.inf, 0.1], np.float32), 16000, subtype="FLOAT"), "NaN or infinite"),
        (file_of(np.zeros((800, 20), np.float32), 16000), "20 channels"),
        (WAV[: len(WAV) // 2], "truncated"),
        (WAV[:-100], "truncated"),
        (FLAC[: len(FLAC) // 2], "not readable|truncated"),
        (FLAC[:-100], "not readable|truncated"),
    ],
)
def test_decode_refuses_in_one_line_that_names_the_clip(data: bytes, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        audio.decode(data, "corpus/clip_7.wav")
    assert str(caught.value).startswith("corpus/clip_7.wav: ")
    assert "\n" not in str(caught.value)


def test_decode_refuses_a_long_clip_before_reading_it() -> None:
    assert len(audio.decode(WAV, "clip", max_seconds=0.5)) == 8000
    with pytest.raises(UserError, match=r"0\.5 s of audio, the limit is 0\.4 s"):
        audio.decode(WAV, "clip", max_seconds=0.4)
    claims_hours = bytearray(FLAC)  # STREAMINFO's count of samples, 36 bits at byte 21
    claims_hours[21:26] = bytes([FLAC[21] | 0x0F, 255, 255, 255, 255])
    with pytest.raises(UserError, match="the limit is 3600 s"):
        audio.decode(bytes(claims_hours), "clip")


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
