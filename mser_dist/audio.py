"""Audio: bytes to a 16 kHz mono waveform and back, and Whisper's log-mel spectrogram."""

import importlib.util
import io
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import soundfile
import soxr

from mser_dist import containers
from mser_dist.errors import UserError

SAMPLE_RATE = 16_000  # Hz, what every speech encoder here expects
HOP = 160  # samples a log-mel frame: 10 ms
N_FFT = 400  # samples a window: 25 ms
MAX_SECONDS = 3600.0  # the bound on one clip's memory where the caller gives none: a header may claim any length
MAX_CHANNELS = 16
MAX_RATE = 768_000  # samples of all channels in a second: silence compresses to nothing at any rate

FLOAT_PEAK = 1 + 2**-14  # times full scale: what a float file may hold; 32768 / 32767 is a common way to write its top
CODEC_PEAK = 4.0  # times full scale: what MP3, Vorbis and Opus may decode to: hard-clipped speech to 1.5, noise to 2.6
INTEGERS_FROM = 32.0  # times full scale: a float file that reaches past it holds integers of 16 bits

FEATURE_BACKEND = "asrfront" if importlib.util.find_spec("asrfront") else "torch"
"""What `log_mel` computes with: asrfront's native code, or torch where that package is not installed."""


class BeyondFullScaleError(UserError):
    """An audio file's samples are beyond full scale; `decode` with `scale` reads it."""


def decode(
    data: bytes,
    where: str,
    rate: int = SAMPLE_RATE,
    max_seconds: float | None = None,
    *,
    scale: bool = False,
    max_rate: int = MAX_RATE,
) -> np.ndarray:
    """Decode an audio file held in memory (wav, flac, ogg, opus, mp3 …; by content, not by name) to one channel.

    Args:
        data: the file's bytes.
        where: names the file or sample in errors.
        rate: Hz of the result; another rate is resampled (soxr, HQ). Channels are averaged.
        max_seconds: longer clips are refused before their samples are read (default: `MAX_SECONDS`).
        scale: divide a clip that is beyond full scale: by 32768 if it reaches past `INTEGERS_FROM`, and what then, or
            by resampling, still is beyond by its peak.

    Returns:
        float32 [samples], full scale ±1. Without `scale` a codec's or the resampler's overshoot stays in it.

    Raises:
        UserError: unreadable, truncated or damaged (as far as `containers` can tell), empty, too long, not finite, or
            (`BeyondFullScaleError`) beyond full scale: by more than `FLOAT_PEAK` in a file of floats, which somebody
            forgot to divide, or `CODEC_PEAK` in a lossy one.
    """
    limit = MAX_SECONDS if max_seconds is None else max_seconds
    wave, native_rate = _read_wav(data, where, limit, max_rate) or _read_any(
        data, where, limit, scale, max_rate
    )  # [samples, channels]
    if wave.shape[1] == 2:
        mono = (wave[:, 0] + wave[:, 1]) * np.float32(0.5)  # 20 times as fast as mean over so short an axis
    else:
        mono = wave[:, 0] if wave.shape[1] == 1 else wave.mean(axis=1)
    if native_rate != rate:
        mono = soxr.resample(mono, native_rate, rate, quality="HQ")
        if len(mono) == 0:
            raise UserError(f"{where}: the audio is shorter than one sample at {rate} Hz; remove this file")
    if scale and (top := _peak(mono)) > 1:
        mono = mono * np.float32(32766 / 32768 / top)  # in 16 bits a step below full scale: not a clipped clip's
    return np.ascontiguousarray(mono, dtype=np.float32)


def seconds(data: bytes, where: str) -> float:
    """The length of an audio file as its header tells it, without decoding; an MP3's is counted in its frames.

    UserError naming `where` when it is not audio, or truncated or damaged as far as `containers` can tell.
    """
    with _open(data, where) as file:
        _check_claim(file.frames, file.samplerate, file.channels, where, math.inf, MAX_RATE)
        return file.frames / file.samplerate


def _peak(wave: np.ndarray) -> float:
    """The largest absolute value of a waveform that is not empty; NaN if it has one."""
    return float(max(wave.max(), -wave.min()))


def _read_wav(data: bytes, where: str, limit: float, max_rate: int = MAX_RATE) -> tuple[np.ndarray, int] | None:
    """float32 [samples, channels] and Hz of a plain wav. None: another format, or anything odd, left to libsndfile.

    Plain: 16-bit PCM in one or two channels, every size as it should be, and no chunks but those in `_PLAIN_CHUNKS`.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE" or int.from_bytes(data[4:8], "little") + 8 != len(data):
        return None
    rate = channels = 0
    pcm = None
    at = 12
    while at < len(data):
        name, begin = data[at : at + 4], at + 8
        size = int.from_bytes(data[at + 4 : begin], "little")
        at = begin + size + size % 2  # a chunk of odd size has a pad byte behind it
        if at > len(data) or name not in _PLAIN_CHUNKS:
            return None
        if name == b"fmt ":
            if channels or not (known := _plain_format(data[begin : begin + size])):
                return None
            channels, rate = known
        elif name == b"data":
            if not channels or pcm is not None or size == 0 or size % (2 * channels):
                return None
            pcm = np.frombuffer(data, "<i2", size // 2, begin).reshape(-1, channels)
    if pcm is None:
        return None
    _check_claim(len(pcm), rate, channels, where, limit, max_rate)
    wave = pcm.astype(np.float32)
    wave *= np.float32(1 / 32768)
    return wave, rate


_PLAIN_CHUNKS = frozenset({b"fmt ", b"data", b"LIST", b"JUNK", b"bext", b"id3 "})
_PCM_GUID = bytes.fromhex("0100000000001000800000aa00389b71")


def _plain_format(chunk: bytes) -> tuple[int, int] | None:
    """(channels, Hz) of a wav's `fmt ` chunk that says 16-bit PCM in one or two channels, or None.

    Layout: Microsoft's "Multiple Channel Audio Data and WAVE Files" (WAVEFORMATEX and WAVEFORMATEXTENSIBLE).
    """
    if len(chunk) < 16:
        return None
    tag, channels, rate, byte_rate, block, bits = struct.unpack_from("<HHIIHH", chunk)
    extra = chunk[16:]  # its size; of the extensible form also the valid bits, the speakers' mask and the format's GUID
    pcm = tag == 1 and extra in (b"", b"\0\0")
    pcm = pcm or (tag == 0xFFFE and extra[:4] == b"\x16\0\x10\0" and extra[8:] == _PCM_GUID)
    whole = bits == 16 and block == 2 * channels and byte_rate == rate * block
    return (channels, rate) if pcm and whole and rate and channels in (1, 2) else None


def _read_any(data: bytes, where: str, limit: float, scale: bool, max_rate: int = MAX_RATE) -> tuple[np.ndarray, int]:
    """float32 [samples, channels] and Hz of whatever libsndfile reads."""
    with _open(data, where) as file:
        _check_claim(file.frames, file.samplerate, file.channels, where, limit, max_rate)
        bits = {"PCM_S8": 8, "PCM_16": 16, "PCM_24": 24}[file.subtype] if file.format == "FLAC" else 0
        # The count must be given: files that cannot seek (GSM, G.721 …) have no other end. FLAC's MD5 is of integers.
        dtype = {0: "float32", 8: "int16", 16: "int16", 24: "int32"}[bits]
        wave = file.read(file.frames, dtype=dtype, always_2d=True)
    if len(wave) != file.frames:
        raise UserError(f"{where}: the audio is truncated ({len(data)} bytes); copy this file again")
    if len(wave) == 0:
        raise UserError(f"{where}: the audio is empty (no samples); replace or remove this file")
    if bits:
        containers.check_flac(data, (wave >> 8).astype(np.int8) if bits == 8 else wave, where)
        wave = wave.astype(np.float32) * np.float32(2.0**-31 if bits == 24 else 2.0**-15)
        return wave, file.samplerate
    top = _peak(wave)
    if not math.isfinite(top):
        raise UserError(f"{where}: the audio has NaN or infinite samples; replace or remove this file")
    if scale and top > INTEGERS_FROM:
        wave /= np.float32(32768)
    elif not scale and top > (FLOAT_PEAK if file.subtype in ("FLOAT", "DOUBLE") else CODEC_PEAK):
        raise BeyondFullScaleError(
            f"{where}: its samples reach {top:.4g} times full scale; divide them (by 32768, if they were 16-bit "
            "integers), or mser pack --scale does"
        )
    return wave, file.samplerate


def _check_claim(frames: int, rate: int, channels: int, where: str, limit: float, max_rate: int) -> None:
    """Refuse by what the header claims, before memory is taken for it."""
    if frames >= 1 << 62:  # libsndfile's "unknown"
        raise UserError(f"{where}: its header does not say how long it is; encode it to a file, not to a pipe")
    if frames > limit * rate:
        raise UserError(
            f"{where}: {frames / rate:.1f} s of audio, the limit is {limit:g} s; cut it or raise the limit "
            "(mser pack --max-seconds, data.max_seconds in a config)"
        )
    if channels > MAX_CHANNELS:
        raise UserError(f"{where}: {channels} channels, at most {MAX_CHANNELS} can be read; convert it to mono")
    if frames * channels > limit * max_rate:
        raise UserError(f"{where}: {channels} channels at {rate} Hz; resample it to {SAMPLE_RATE} Hz")


@contextmanager
def _open(data: bytes, where: str) -> Iterator[Any]:
    """A file in memory opened with libsndfile, checked by `containers`; errors become a `UserError` with `where`."""
    data = containers.whole(data, where)
    try:
        with soundfile.SoundFile(_Bytes(data)) as file:
            if file.format not in containers.READ or (file.subtype.startswith("MPEG") and file.format != "MP3"):
                raise UserError(
                    f"{where}: {file.format} ({file.subtype}) is not read, for a cut or damaged one could not be told "
                    "from a whole one; convert it to wav or flac"
                )
            yield file
    except (soundfile.SoundFileError, RuntimeError, MemoryError, ValueError, TypeError, AssertionError) as error:
        detail = " ".join(str(getattr(error, "error_string", error)).rstrip(".").split())
        raise UserError(f"{where}: not readable as audio ({detail}); replace or remove this file") from None


class _Bytes(io.BytesIO):
    """Stays in place when libsndfile seeks before the start, as it does in some damaged files.

    An exception here, inside a C callback, could not be caught: Python would print it.
    """

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


def encode(pcm: np.ndarray, rate: int, ext: str = "flac") -> bytes:
    """Encode int16 [samples] (mono) as 16-bit "flac" or "wav"; the same input gives the same bytes."""
    if pcm.dtype != np.int16 or pcm.ndim != 1:
        raise ValueError(f"encode needs int16 [samples], got {pcm.dtype} {pcm.shape}")
    if ext not in ("flac", "wav"):
        raise ValueError(f"encode writes flac or wav, not {ext!r}")
    file = io.BytesIO()
    soundfile.write(file, pcm, rate, format=ext.upper(), subtype="PCM_16")
    return file.getvalue()


def to_pcm16(wave: np.ndarray) -> np.ndarray:
    """float [samples] of full scale ±1 to int16, rounded. What is beyond full scale, by a codec's or the resampler's
    overshoot (`decode` lets nothing else through), is clipped; `peak` tells of it.
    """
    return np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)


def peak(wave: np.ndarray) -> int:
    """The largest absolute sample of a waveform in steps of 16 bits, at least 1: 32767 and 32768 touch full scale, and
    from 32769 on `to_pcm16` clips it.
    """
    return max(1, round(_peak(wave) * 32768))


def log_mel(wave: np.ndarray, n_mels: int = 80, backend: str = FEATURE_BACKEND) -> np.ndarray:
    """Whisper's log-mel spectrogram of a clip at its own length (not padded to 30 s).

    Equal to transformers' `WhisperFeatureExtractor(feature_size=n_mels)(wave, padding="longest")` to 1e-4: log10 of the
    mel power, clamped to 8 below the clip's maximum, then (x + 4) / 4. https://github.com/openai/whisper, audio.py.

    Args:
        wave: float32 [samples] at 16 kHz. Fewer than 400 samples (one window) are zero-padded to 400.
        n_mels: 80, or 128 for Whisper large-v3.
        backend: "asrfront" or "torch".

    Returns:
        float32 [n_mels, samples // 160].
    """
    if wave.ndim != 1:
        raise ValueError(f"log_mel needs [samples], got {wave.shape}")
    if len(wave) < N_FFT:
        wave = np.pad(wave, (0, N_FFT - len(wave)))
    if backend == "asrfront":
        import asrfront.whisper

        return asrfront.whisper.log_mel(wave, n_mels, pad_or_trim=False)
    import torch

    window, filters = _torch_constants(n_mels)
    spectrum = torch.stft(torch.from_numpy(wave), N_FFT, HOP, window=window, return_complex=True)[
        :, :-1
    ]  # [201, frames]
    power = (spectrum.real.square() + spectrum.imag.square()).contiguous()
    mel = (filters @ power).clamp(min=1e-10).log10()
    return ((torch.maximum(mel, mel.max() - 8.0) + 4.0) / 4.0).numpy()


@lru_cache
def _torch_constants(n_mels: int) -> tuple[Any, Any]:
    """The Hann window [400] and Slaney's mel filters [n_mels, 201], 0 to 8 kHz."""
    import torch
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        1 + N_FFT // 2, n_mels, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    )
    return torch.hann_window(N_FFT), torch.from_numpy(filters.T).float().contiguous()
