"""A recording cut into windows, and what the windows' answers come to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mser_dist.audio import SAMPLE_RATE
from mser_dist.errors import UserError


@dataclass(frozen=True)
class Windows:
    """How recordings are cut: those longer than `window` seconds into windows of that length, `hop` seconds apart."""

    window: float
    hop: float

    def __post_init__(self) -> None:
        if not 0 < self.hop <= self.window:
            raise UserError(
                f"hop={self.hop:g} and window={self.window:g}: a hop is above 0, and no longer than a window, or some "
                "speech would not be heard"
            )

    def cut(self, samples: int) -> list[tuple[int, int]]:
        """[begin, end) in samples of each window of a recording; the last one ends where it does, and is as long."""
        size, hop = round(self.window * SAMPLE_RATE), max(1, round(self.hop * SAMPLE_RATE))
        if samples <= size:
            return [(0, samples)]
        begins = [*range(0, samples - size, hop), samples - size]
        return [(begin, begin + size) for begin in begins]


def together(windows: Sequence[tuple[float, float]], probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K,) the mean of the windows' probabilities (W, K) over the recording's time.

    windows: (begin, end) of each, in seconds. Each moment's probabilities are the mean of the windows that hold it, so
    that no moment counts twice where windows overlap.
    """
    edges = np.unique(np.array(windows))
    middles, lengths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    begin, end = (np.array(side)[:, None] for side in zip(*windows, strict=True))
    holds = (begin <= middles) & (middles < end)  # (W, moments)
    weight = (holds / holds.sum(0) * lengths).sum(1)  # (W,)
    mean: NDArray[np.float64] = (weight[:, None] * probabilities).sum(0) / weight.sum()
    return mean
