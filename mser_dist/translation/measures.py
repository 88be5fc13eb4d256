"""What is measured of a clip: level, clipping, errors by character."""

import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist import audio

CLIPPED = 0.01  # share of the samples at full scale, from which on a sound is taken for damaged
_FULL = 0.999  # of full scale
_FLOOR = -120.0  # dB


def level(wave: NDArray[np.float32]) -> float:
    """RMS of [samples] in dB of full scale, -120 at the least."""
    power = float(np.mean(np.square(wave, dtype=np.float64))) if len(wave) else 0.0
    return max(_FLOOR, 10 * float(np.log10(max(power, 1e-12))))


def decoded(data: bytes, where: str) -> tuple[NDArray[np.float32], float]:
    """An audio file's samples at 16 kHz, within full scale, and the share that was at full scale or beyond.

    What was clipped at another rate overshoots when it is resampled: it has to be seen before it is scaled down.
    Raises `UserError` as `audio.decode`.
    """
    try:
        wave = audio.decode(data, where)
    except audio.BeyondFullScaleError:  # floats that nobody has divided
        return audio.decode(data, where, scale=True), 0.0
    share = clipped(wave)
    top = float(np.abs(wave).max())
    return (wave * np.float32(32766 / 32768 / top) if top > 1 else wave), share


def clipped(wave: NDArray[np.float32]) -> float:
    """Share of [samples] at full scale."""
    return float(np.mean(np.abs(wave) >= _FULL)) if len(wave) else 0.0


def character_error(said: str, wanted: str) -> float:
    """Levenshtein distance of two texts over the length of the wanted one; case, punctuation and spaces do not count.

    A wanted text without a letter or digit is an error of 1 if anything is said, else of 0.
    """
    a, b = _letters(said), _letters(wanted)
    if not b:
        return float(bool(a))
    row = np.arange(len(b) + 1)
    for i, letter in enumerate(a, 1):
        # Substituted or deleted; then insertions, each of which costs one more than the place to its left.
        best = np.minimum(row[:-1] + np.array([letter != other for other in b]), row[1:] + 1)
        best = np.concatenate([[i], best])
        row = np.minimum.accumulate(best - np.arange(len(b) + 1)) + np.arange(len(b) + 1)
    return float(row[-1]) / len(b)


def _letters(text: str) -> str:
    """Letters, their marks and digits alone."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(letter for letter in folded if unicodedata.category(letter)[0] in "LMN")


def seconds_of(measures: Mapping[str, Any] | None) -> float:
    """Of a clip by its measures; 0 where none was made."""
    return float(measures["seconds"]) if measures else 0.0
