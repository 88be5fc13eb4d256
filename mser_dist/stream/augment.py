"""Random changes of training clips: speed, gain and noise of the waveform, SpecAugment's masks on the log-mel.

All are functions of their input and of `draw`: a generator seeded by (run, epoch, batch, clip) repeats them.
"""

import numpy as np
import soxr
from numpy.typing import NDArray

from mser_dist.audio import SAMPLE_RATE
from mser_dist.config import AugmentConfig


def augment_wave(
    wave: NDArray[np.float32], draw: np.random.Generator, config: AugmentConfig, max_samples: int
) -> NDArray[np.float32]:
    """Speed, then gain, then white noise, each with `config.probability`; `wave` itself is left as it is.

    - Speed: resampled to 1/f of its length, f uniform in 1 ± `speed`. Tempo and pitch change together.
    - Gain: times 10^(g/20), g uniform in ± `gain_db`. The result may exceed full scale: it is not clipped.
    - Noise: of power mean(x²) / 10^(d/10), d uniform in `noise_snr_db`, x being the whole clip with its pauses. It is
      uniformly distributed, as white as Gaussian noise and 5 times as cheap. A clip of zeros stays zeros: it has no
      signal that a ratio could refer to.

    What one kind draws does not depend on whether another is on, except that noise follows the clip's length.

    Args:
        wave: float32 [samples] at 16 kHz.
        draw: where every random number comes from.
        config: which kinds, how much.
        max_samples: the result is cut to this, for a slowed clip may become too long for the encoder.

    Returns:
        float32 [at most max_samples].
    """
    if wave.ndim != 1:
        raise ValueError(f"augment_wave needs [samples], got {wave.shape}")
    speed, gain, noise = draw.random(3) < config.probability
    factor = 1 + config.speed * draw.uniform(-1, 1)
    level = 10 ** (config.gain_db * draw.uniform(-1, 1) / 20)
    position = draw.random()
    if config.speed and speed:  # MQ: within -115 dB of the exact result on two tones, at 0.7 of the time of HQ
        wave = soxr.resample(wave, SAMPLE_RATE * factor, SAMPLE_RATE, quality="MQ")
    wave = wave[:max_samples]
    if config.gain_db and gain:
        wave = wave * np.float32(level)
    if config.noise_snr_db and noise:
        lowest, highest = config.noise_snr_db
        power = np.square(wave).mean() / 10 ** ((lowest + (highest - lowest) * position) / 10)
        hiss = draw.random(len(wave), dtype=np.float32)  # of variance 1/12 and mean 1/2
        wave = wave + (hiss - np.float32(0.5)) * np.float32(np.sqrt(12 * power))
    return wave


def spec_augment(mel: NDArray[np.float32], draw: np.random.Generator, config: AugmentConfig) -> NDArray[np.float32]:
    """SpecAugment (Park et al., arXiv 1904.08779) without its time warp: stretches and bands set to the clip's mean.

    The width of a time mask is uniform in 0 … `time_width` · frames, of a frequency mask in 0 … `freq_width`; its start
    is uniform where the mask fits. Masks may overlap.

    Args:
        mel: float32 [n_mels, frames]; left as it is.
        draw: where every random number comes from.
        config: how many masks, how wide.

    Returns:
        float32 [n_mels, frames].
    """
    if mel.ndim != 2:
        raise ValueError(f"spec_augment needs [n_mels, frames], got {mel.shape}")
    if not (config.time_masks or config.freq_masks):
        return mel
    bins, frames = mel.shape
    masked = mel.copy()
    mean = mel.mean()
    for _ in range(config.time_masks):
        start, end = _stretch(frames, int(config.time_width * frames), draw)
        masked[:, start:end] = mean
    for _ in range(config.freq_masks):
        start, end = _stretch(bins, min(config.freq_width, bins), draw)
        masked[start:end] = mean
    return masked


def _stretch(length: int, widest: int, draw: np.random.Generator) -> tuple[int, int]:
    """Start and end of a stretch of 0 … `widest` within `length`."""
    width = int(draw.integers(widest + 1))
    start = int(draw.integers(length - width + 1))
    return start, start + width
