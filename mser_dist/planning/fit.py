"""Fits the constants of the step-time model, and says how far it is off where it has not looked."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mser_dist.planning.published import MANY, Figure, figures, split
from mser_dist.planning.step_time import NAMES, Constants, seconds, shipped

# name → (lowest, first guess, highest)
_BOUNDS = {
    "h100": (0.3, 0.6, 1.0),
    "a100": (0.3, 0.75, 1.0),
    "width": (0.0, 0.1, 2.0),
    "tokens": (0.0, 0.1, 3.0),
    "launch": (0.0, 3e-4, 2e-3),
    "attention": (0.3, 1.0, 2.0),
    "recompute": (0.0, 0.25, 1 / 3),
    "within": (0.1, 0.5, 1.0),
    "across": (0.2, 0.7, 1.0),
    "overlap": (1.0, 3.0, 8.0),
    "latency": (0.0, 1e-6, 5e-5),
}


def fit(found: Sequence[Figure]) -> Constants:
    """Least squares of the logarithms, robust (soft L1); a source of n figures weighs √n: none decides alone."""
    from scipy.optimize import least_squares

    counts = Counter(figure.source for figure in found)
    weights = np.array([counts[figure.source] ** -0.25 for figure in found])
    weights /= weights.mean()  # so that the robust loss turns from squares to lengths at the same errors for any data
    low, guess, high = np.array([_BOUNDS[name] for name in NAMES]).T

    def values(shares: np.ndarray) -> np.ndarray:
        return np.asarray(low + shares * (high - low))

    def residuals(shares: np.ndarray) -> np.ndarray:
        constants = Constants(*values(shares).tolist())
        return weights * [math.log(_planned(f, constants) / f.seconds) for f in found]

    first = (guess - low) / (high - low)
    best = least_squares(residuals, first, bounds=(0, 1), loss="soft_l1", f_scale=0.05)
    return Constants(*map(float, values(best.x)))


def _planned(figure: Figure, constants: Constants) -> float:
    return seconds(figure.work, figure.machine, constants).step


def errors(found: Sequence[Figure], constants: Constants) -> np.ndarray:
    """(n,) planned seconds over published ones, less 1."""
    return np.array([_planned(figure, constants) / figure.seconds - 1 for figure in found])


@dataclass(frozen=True)
class Held:
    """The figures of `MANY` GPUs and more of the sources that were held out, and their errors, signed."""

    figures: list[Figure]
    errors: np.ndarray

    @property
    def median(self) -> float:
        return float(np.median(np.abs(self.errors)))

    @property
    def p90(self) -> float:
        return float(np.quantile(np.abs(self.errors), 0.9))


def held_out(constants: Constants | None = None) -> Held:
    """How far the shipped constants are off on sources that they have not seen."""
    many = [figure for figure in split(figures())[1] if figure.ranks >= MANY]
    return Held(many, errors(many, constants or shipped()[0]))


def one_source_out() -> Held:
    """The same for every source that has such figures: each by constants that are fitted on all the others."""
    everything = figures()
    many: list[Figure] = []
    parts = []
    for source in sorted({figure.source for figure in everything if figure.ranks >= MANY}):
        mine = [f for f in everything if f.source == source and f.ranks >= MANY]
        many += mine
        parts.append(errors(mine, fit([f for f in everything if f.source != source])))
    return Held(many, np.concatenate(parts))


def median_error() -> float:
    """Of planned step times against published ones, as a share: `plan-median-error` of tools/bench_scale.py."""
    return held_out().median


def p90_error() -> float:
    """Its 90th percentile: `plan-p90-error`."""
    return held_out().p90
