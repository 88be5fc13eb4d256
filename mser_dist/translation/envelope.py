"""The slow shape of a spectral envelope: how loud, how tilted, how bowed; the fine shape is the words'."""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from mser_dist.audio import SAMPLE_RATE
from mser_dist.translation.world import BINS, FRAME, Floats

# More cosines or a quicker loudness name the emotion hardly better, and the words are lost: README.md.
_COSINES = 3  # over mel: level, tilt and bow
_LOUDNESS = 0.5  # seconds, the standard deviation of the smoothing
SETTINGS: dict[str, Any] = {"cosines": _COSINES, "loudness": _LOUDNESS}


def shaped(
    carrier: Floats, recording: Floats, voiced: NDArray[np.bool_], recording_voiced: NDArray[np.bool_]
) -> Floats:
    """(T, BINS) the carrier's logarithmic envelopes with the mean shape and the loudness of the recording's.

    Both are (T, BINS), frame laid upon frame. voiced, recording_voiced: (T,) the frames of each that the mean is of.
    """
    made = carrier
    if voiced.any() and recording_voiced.any():
        made = carrier + drawn(shape(recording[recording_voiced].mean(0) - carrier[voiced].mean(0)))
    powers = [gaussian_filter1d(np.exp(power(envelope)), _LOUDNESS / FRAME) for envelope in (recording, made)]
    return np.asarray(made + np.log(powers[0] / powers[1])[:, None], np.float64)


def shape(envelope: Floats) -> Floats:
    """(K,) slow shape of a (BINS,) logarithmic envelope."""
    return np.asarray(envelope @ _cosines()[1], np.float64)


def drawn(shape: Floats) -> Floats:
    """(BINS,) logarithmic envelope of such a shape alone."""
    return np.asarray(shape @ _cosines()[0], np.float64)


def power(envelope: Floats) -> Floats:
    """(T,) logarithm of the power of (T, BINS) logarithmic envelopes."""
    top = envelope.max(1)
    return np.asarray(top + np.log(np.exp(envelope - top[:, None]).sum(1)), np.float64)


@lru_cache(1)
def _cosines() -> tuple[Floats, Floats]:
    """(K, BINS) cosines over mel (2595 lg(1 + f / 700), O'Shaughnessy) and (BINS, K) their least squares."""
    hertz = np.linspace(0, SAMPLE_RATE / 2, BINS)
    mel = np.log1p(hertz / 700) / np.log1p(SAMPLE_RATE / 2 / 700)
    shapes = np.cos(np.pi * np.arange(_COSINES)[:, None] * mel)
    return shapes, np.linalg.pinv(shapes)
