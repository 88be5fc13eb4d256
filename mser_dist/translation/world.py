"""WORLD: speech to pitch, spectral envelope and aperiodicity, and back.

M. Morise, F. Yokomori, K. Ozawa: WORLD, a vocoder-based high-quality speech synthesis system for real-time applications
(IEICE Trans. E99-D, 2016, https://doi.org/10.1587/transinf.2015EDP7457), by the package ``pyworld-prebuilt``. Pitch is
DIO's, refined by StoneMask: Harvest took 15 times as long.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.audio import SAMPLE_RATE
from mser_dist.errors import UserError

Floats = NDArray[np.float64]

FRAME = 0.005  # seconds from one frame to the next, WORLD's own choice
LOWEST, HIGHEST = 60.0, 600.0  # Hz of the pitch: deep male voices to screams
BINS = 513  # of the envelope, 0 to 8 kHz: an FFT of 1024 is the shortest that pitches from 47 Hz on allow
_FFT = 2 * (BINS - 1)
_LEAST = 1e-16  # of a power spectrum: digital silence has a logarithm too


@dataclass(frozen=True)
class Frames:
    """Speech as WORLD's frames, one each `FRAME` seconds.

    pitch: (T,) Hz, 0 where a frame is unvoiced. envelope: (T, BINS) natural logarithm of the power spectrum.
    noise: (T,) dB, the aperiodic share of the upper band (0: all noise), as WORLD codes it at 16 kHz.
    """

    pitch: Floats
    envelope: Floats
    noise: Floats

    def __len__(self) -> int:
        return len(self.pitch)


def analyse(wave: np.ndarray) -> Frames:
    """The frames of (n,) samples at 16 kHz. Raises `UserError` where the package is missing."""
    world = _world()
    x = np.ascontiguousarray(wave, np.float64)
    options = {"f0_floor": LOWEST, "f0_ceil": HIGHEST, "frame_period": 1000 * FRAME}
    rough, times = world.dio(x, SAMPLE_RATE, **options)
    pitch = world.stonemask(x, rough, times, SAMPLE_RATE)
    envelope = world.cheaptrick(x, pitch, times, SAMPLE_RATE, f0_floor=LOWEST, fft_size=_FFT)
    aperiodicity = world.d4c(x, pitch, times, SAMPLE_RATE, fft_size=_FFT)
    noise = world.code_aperiodicity(aperiodicity, SAMPLE_RATE)[:, 0]
    return Frames(pitch, np.log(np.maximum(envelope, _LEAST)), noise)


def synthesise(frames: Frames) -> NDArray[np.float32]:
    """(n,) samples at 16 kHz. The same frames give the same bytes: WORLD seeds its noise anew at each call."""
    world = _world()
    noise = np.where(frames.pitch > 0, np.clip(frames.noise, -60.0, 0.0), 0.0)
    aperiodicity = world.decode_aperiodicity(np.ascontiguousarray(noise[:, None]), SAMPLE_RATE, _FFT)
    aperiodicity[frames.pitch <= 0] = 1 - 1e-12
    envelope = np.ascontiguousarray(np.exp(frames.envelope))
    pitch = np.ascontiguousarray(frames.pitch)
    made: NDArray[np.float64] = world.synthesize(pitch, envelope, aperiodicity, SAMPLE_RATE, 1000 * FRAME)
    return made.astype(np.float32)


def _world() -> Any:
    try:
        import pyworld
    except ImportError as error:
        raise UserError(
            "the transplant of prosody needs WORLD, which is not installed: pip install pyworld-prebuilt"
        ) from error
    return pyworld
