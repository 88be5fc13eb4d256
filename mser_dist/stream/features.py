"""What an encoder is fed: Whisper's log-mel spectrogram, or the waveform itself for wav2vec-style encoders."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mser_dist.audio import HOP, N_FFT, SAMPLE_RATE, log_mel


@dataclass(frozen=True)
class Features:
    """Waveform → features of one clip, at the clip's own length.

    n_mels: height of the log-mel; None: the waveform.
    normalize: of a waveform, zero mean and unit variance a clip, as transformers' Wav2Vec2FeatureExtractor does.
    pad_seconds: zeros are put behind a shorter waveform up to this length, as Whisper was trained (30 s). The encoder
        then attends to them, and nothing behind it. None: no padding.
    """

    n_mels: int | None = 80
    normalize: bool = False
    pad_seconds: float | None = None

    def __call__(self, wave: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [samples] at 16 kHz → float32 [n_mels, frames], or [samples]."""
        if self.normalize and not self.n_mels:
            wave = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
        if self.pad_seconds is not None:
            wave = np.pad(wave, (0, max(0, round(self.pad_seconds * SAMPLE_RATE) - len(wave))))
        if self.n_mels:
            return log_mel(wave, self.n_mels)
        return np.ascontiguousarray(wave, dtype=np.float32)

    def size(self, seconds: float) -> int:
        """Mel frames, or samples, of a clip of so many seconds without padding."""
        return self.own(round(seconds * SAMPLE_RATE))

    def own(self, samples: int) -> int:
        """Mel frames, or samples, that are a clip's own."""
        return max(samples, N_FFT) // HOP if self.n_mels else samples
