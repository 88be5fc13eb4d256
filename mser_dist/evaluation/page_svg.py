"""Pictures of a report's page as SVG text: dots with intervals, reliability, points of a map, bars.

Their colours are classes of the page (`report.html.j2`), so that they follow its light or dark scheme; what a point is
stands in its `title`. Every text is escaped. A picture is as wide as a phone, and is not drawn larger.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

WIDTH = 360  # of a picture, in CSS pixels
COLOURS, SHAPES = 7, 4  # of which each group of points has a pair of its own, up to 28 groups


@dataclass(frozen=True)
class Dot:
    """A value with its interval, a row of a picture. kind: a class of the page (model, baseline). hollow: adapted."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    kind: str = "model"
    hollow: bool = False


def forest(title: str, dots: Sequence[Dot], chance: float | None) -> str:
    """A row for each dot: its name, the dot with its interval on an axis from 0 to 1, its value; chance as a line."""
    left, right, top, step = 132, WIDTH - 38, 6, 21
    bottom = top + step * len(dots)

    def x(value: float) -> float:
        return left + (right - left) * min(max(value, 0.0), 1.0)

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<path class="grid" d="M{_n(x(tick))} {top}V{bottom}"/>')
        parts.append(_text(x(tick), bottom + 13, f"{tick:g}", "middle", "tick"))
    if chance is not None:
        parts.append(f'<path class="chance" d="M{_n(x(chance))} {top}V{bottom}"/>')
    for at, dot in enumerate(dots):
        y = top + step * (at + 0.5)
        between = "" if dot.low is None or dot.high is None else f", 95 % {dot.low:.3f} to {dot.high:.3f}"
        told = f"<title>{escape(dot.name)}: {dot.value:.3f}{between}</title>"
        whisker = ""
        if dot.low is not None and dot.high is not None:
            whisker = f'<path class="whisker" d="M{_n(x(dot.low))} {_n(y)}H{_n(x(dot.high))}"/>'
        circle = f'<circle cx="{_n(x(dot.value))}" cy="{_n(y)}" r="4.5"/>'
        kind = f"{dot.kind} hollow" if dot.hollow else dot.kind
        parts.append(f'<g class="{kind}">{told}{whisker}{circle}</g>')
        parts.append(_text(left - 8, y + 4, _cut(dot.name, 21), "end"))
        parts.append(_text(WIDTH, y + 4, f"{dot.value:.3f}", "end"))
    told = "; ".join(f"{dot.name} {dot.value:.3f}" for dot in dots)
    return _svg(WIDTH, bottom + 18, title, told, parts)


def reliability(
    title: str, bins: Sequence[tuple[float, float, int]], fitted: Sequence[tuple[float, float, int]] = ()
) -> str:
    """Accuracy against confidence, (confidence, accuracy, clips) a bin; the size of a point tells how many clips.

    fitted: the same with a temperature, drawn hollow.
    """
    size, left, top = 190, 30, 8
    parts = [f'<rect class="frame" x="{left}" y="{top}" width="{size}" height="{size}"/>']
    parts.append(f'<path class="chance" d="M{left} {top + size}L{left + size} {top}"/>')
    for tick in (0.0, 0.5, 1.0):
        x, y = left + size * tick, top + size * (1 - tick)
        parts.append(_text(x, top + size + 13, f"{tick:g}", "middle", "tick"))
        parts.append(_text(left - 4, y + 4, f"{tick:g}", "end", "tick"))
    most = max((clips for _, _, clips in [*bins, *fitted]), default=1)
    for drawn, kind, which in ((bins, "model", ""), (fitted, "model hollow", ", fitted")):
        places = [(left + size * confidence, top + size * (1 - accuracy)) for confidence, accuracy, _ in drawn]
        for (x, y), (confidence, accuracy, clips) in zip(places, drawn, strict=True):
            radius = 2 + 6 * math.sqrt(clips / most)
            told = f"<title>confidence {confidence:.3f}, accuracy {accuracy:.3f}, {clips} clips{which}</title>"
            parts.append(f'<g class="{kind}"><circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}">{told}</circle></g>')
    parts.append(_text(left + size / 2, top + size + 27, "confidence", "middle", "tick"))
    told = "; ".join(f"confidence {c:.3f}: accuracy {a:.3f} of {n} clips" for c, a, n in bins)
    return _svg(left + size + 10, top + size + 32, title, told, parts)


def points(
    title: str, xy: NDArray[np.float64], group: NDArray[np.int64], names: Sequence[str], told: Sequence[str]
) -> str:
    """Points (m, 2), each of a group with a colour and a shape of its own. told: what each point is."""
    margin, low, high = 8.0, xy.min(0), xy.max(0)
    scale = (WIDTH - 2 * margin) / max(float((high - low).max()), 1e-12)
    place = margin + (xy - low) * scale + (WIDTH - 2 * margin - (high - low) * scale) / 2  # in the middle
    place[:, 1] = WIDTH - place[:, 1]
    parts = [f'<rect class="frame" x="0.5" y="0.5" width="{WIDTH - 1}" height="{WIDTH - 1}"/>']
    for number in range(len(names)):
        colour, shape = mark(number)
        own = "".join(
            f'<use href="#mark{shape}" x="{_n(x)}" y="{_n(y)}"><title>{escape(told[i])}</title></use>'
            for i, (x, y) in enumerate(place.tolist())
            if group[i] == number
        )
        parts.append(f'<g class="c{colour}">{own}</g>')
    counts = ", ".join(f"{name} {int((group == number).sum())}" for number, name in enumerate(names))
    return _svg(WIDTH, WIDTH, title, f"{len(xy)} points: {counts}", parts)


def mark(number: int) -> tuple[int, int]:
    """Numbers of the colour and the shape of a group of points."""
    return number % COLOURS, number % SHAPES if number < COLOURS * SHAPES else SHAPES - 1


def bars(title: str, names: Sequence[str], shares: Sequence[float]) -> str:
    """An upright bar for each share, its name below; every second one is named where there are many."""
    left, top, height = 34, 8, 120
    step = (WIDTH - left) / max(len(shares), 1)
    most = max(*shares, 1e-12)
    parts = []
    for tick in (0.0, most):
        y = top + height * (1 - tick / most)
        parts += [
            f'<path class="grid" d="M{left} {_n(y)}H{WIDTH}"/>',
            _text(left - 4, y + 4, f"{tick:.2f}", "end", "tick"),
        ]
    every = 1 if len(shares) <= 14 else 4
    for i, (name, share) in enumerate(zip(names, shares, strict=True)):
        tall, x = height * share / most, left + step * i
        told = f"<title>{escape(name)}: {share:.3f}</title>"
        box = f'x="{_n(x + step * 0.15)}" y="{_n(top + height - tall)}" width="{_n(step * 0.7)}" height="{_n(tall)}"'
        parts.append(f'<rect class="model" {box}>{told}</rect>')
        if i % every == 0:
            parts.append(_text(x + step / 2, top + height + 14, name, "middle", "tick"))
    told = "; ".join(f"{name} {share:.3f}" for name, share in zip(names, shares, strict=True))
    return _svg(WIDTH, top + height + 20, title, told, parts)


def _svg(width: float, height: float, title: str, told: str, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {_n(width)} {_n(height)}" width="{_n(width)}" height="{_n(height)}"'
    return f'<svg {size} role="img"><title>{escape(title)}</title><desc>{escape(told)}</desc>{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{escape(text)}</text>'


def _n(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[: letters - 1]}…"
