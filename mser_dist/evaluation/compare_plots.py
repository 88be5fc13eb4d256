"""The picture of a comparison: a row a system with its interval, or the metric against one parameter."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from mser_dist.evaluation.compare import Comparison, Row, Section, number
from mser_dist.evaluation.compare_report import labels_of, short
from mser_dist.evaluation.systems import cell
from mser_dist.runs.plots import PALETTE

MOST = 40  # rows of a section that are drawn
# A page replaces these in the SVG by colours of its own scheme.
INK, FAINT, BEST = "#1b1f24", "#8b949e", PALETTE[0]


def draw(comparison: Comparison, sections: Sequence[Section], *paths: Path) -> None:
    """Draw sections below each other into files, whose endings are their formats (png, svg)."""
    lines = [min(len(section.rows), MOST) for section in sections]
    heights = [3.6 if comparison.by else 1.1 + 0.28 * number for number in lines]
    with _style():
        figure = Figure(figsize=(8.0, sum(heights)), layout="constrained")
        axes = figure.subplots(len(sections), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axis, section in zip(axes, sections, strict=True):
            if comparison.by:
                _against_key(axis, comparison, section)
            else:
                _forest(axis, comparison, section)
            if len(sections) > 1:  # on a page each has a heading
                axis.set_title(textwrap.fill(section.title, 70), fontsize=9, loc="left")
        for path in paths:
            bare = path.suffix == ".svg"  # which has no background and no date
            figure.savefig(path, dpi=130, transparent=bare, metadata={"Date": None} if bare else None)
            figure.set_layout_engine("none")  # it is laid out, for other formats too


@contextmanager
def _style() -> Iterator[None]:
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "mser", "text.parse_math": False}
    for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor"):
        style[name] = INK
    with mpl.rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
        yield


def _folded(text: str, width: int = 100) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _forest(axis: Any, comparison: Comparison, section: Section) -> None:
    rows = section.rows[:MOST]
    named = labels_of(comparison, section)[:MOST]
    for at, row in enumerate(rows):
        colour = BEST if row.difference is None or row.undecided else FAINT
        if row.interval:
            axis.hlines(at, *row.interval, color=colour, linewidth=1.6)
        if len(row.values) > 1:
            axis.plot(row.values, [at] * len(row.values), "|", color=colour, markersize=7)
        axis.plot([row.mean], [at], "o", color=colour, markersize=5)
    axis.set_yticks(range(len(rows)), [_folded(one, 60) for one in named], fontsize=8)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    if _chance(axis.axvline, section):
        axis.annotate(" chance", (section.chance, 0.02), xycoords=("data", "axes fraction"), fontsize=7)
    axis.grid(axis="x", alpha=0.3)
    more = f" (the best {MOST} of {len(section.rows)})" if len(section.rows) > MOST else ""
    axis.set_xlabel(f"{section.metric}{more}", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)


def _chance(line: Any, section: Section) -> bool:
    """Chance as a line, where it is not far off all rows."""
    values = [row.mean for row in section.rows if row.mean == row.mean]
    near = section.chance is not None and bool(values) and min(values) - section.chance < 0.25
    if near:
        line(section.chance, color=INK, linestyle="--", linewidth=1)
    return near


def _against_key(axis: Any, comparison: Comparison, section: Section) -> None:
    """The metric against the parameter, a line for each system that differs in something else."""
    by = comparison.by
    assert by is not None
    rows = [row for row in section.rows if row.params.get(by) is not None and row.mean == row.mean]
    words = list(dict.fromkeys(row.params[by] for row in rows))
    numeric = all(number(word) is not None for word in words)
    others = labels_of(comparison, section, without=by)
    lines: dict[str, list[Row]] = {}
    for row, name in zip(section.rows, others, strict=True):
        if row in rows:
            lines.setdefault(name, []).append(row)
    for line, (name, own) in enumerate(lines.items()):
        x = [(number(row.params[by]) or 0.0) if numeric else words.index(row.params[by]) for row in own]
        colour = PALETTE[line % len(PALETTE)]
        axis.plot(
            x, [row.mean for row in own], "o-", color=colour, markersize=4, linewidth=1.3, label=_folded(name, 50)
        )
        for at, row in zip(x, own, strict=True):
            if row.interval:
                axis.vlines(at, *row.interval, color=colour, linewidth=1, alpha=0.6)
    if numeric and words:
        values = [number(word) or 0.0 for word in words]
        if min(values) > 0 and max(values) >= 10 * min(values):
            axis.set_xscale("log")
        axis.set_xticks(values, [cell(word) for word in words])
        axis.minorticks_off()
    else:
        axis.set_xticks(range(len(words)), [_folded(cell(word), 30) for word in words])
    if _chance(axis.axhline, section):
        axis.annotate(
            "chance", (1, section.chance), xycoords=("axes fraction", "data"), fontsize=7, ha="right", va="bottom"
        )
    axis.set_xlabel(short(comparison, by), fontsize=8)
    axis.set_ylabel(_folded(section.metric, 45), fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    if 1 < len(lines) <= 12:
        axis.legend(fontsize=7, frameon=False)


def inline(svg: str) -> str:
    """An SVG for a page: without its head, in the page's colours."""
    for colour, name in ((INK, "ink"), (FAINT, "faint"), (BEST, "accent")):
        svg = svg.replace(colour, f"var(--{name})")
    return svg[svg.index("<svg") :]
