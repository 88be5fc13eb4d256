"""Pictures of a run (loss curves, confusion per language, UA by language) and of a data set (durations, labels,
speakers, sample rates). PNG files, drawn without a display.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # not pyplot, whose backend and open figures are a notebook's own
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray

PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")  # Paul Tol's, colour-blind safe
SEEN, UNSEEN = PALETTE[:2]


def curves(rows: list[dict[str, float]], path: Path) -> None:
    """Every logged number against the step, one small plot each; the shares of an encoder's layers in one, and the
    parts of a step's time in another.
    """
    hidden = {"step", "seconds"}
    names = sorted({name for row in rows for name in row} - hidden, key=_train_first)
    panels: dict[str, list[str]] = {}
    for name in names:
        panels.setdefault(_SHARE.sub("", name), []).append(name)
    columns = 4
    lines = -(-len(panels) // columns)
    figure, axes = _subplots(lines, columns, figsize=(4 * columns, 2.6 * lines), squeeze=False)
    for axis, (title, drawn) in zip(axes.flat, panels.items(), strict=False):
        for name in drawn:
            points = [(row["step"], row[name]) for row in rows if name in row]
            x, y = zip(*points, strict=True)
            axis.plot(x, y, marker="o" if len(x) < 20 else None, markersize=3, linewidth=1.2)
            if drawn != [title]:  # at its line, for there may be more layers than colours
                axis.text(x[-1], y[-1], f" {name.removeprefix(title + '_')}", fontsize=7, va="center")
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    _save(figure, path)


_SHARE = re.compile(r"(?<=layer_share)_\d+$|(?<=/time)_[a-z]+$")


def _train_first(name: str) -> tuple[Any, ...]:
    """Order of the plots: of the training first; layers by their numbers."""
    number = _SHARE.search(name)
    return (
        not name.startswith(("train/", "val/")),
        _SHARE.sub("", name),
        int(number[0][1:]) if number and number[0][1:].isdigit() else 0,
    )


def confusions(tables: dict[str, NDArray[np.int64]], labels: list[str], title: str, path: Path) -> None:
    """One (K, K) confusion a panel, rows (true classes) scaled to shares, counts written in."""
    columns = min(3, len(tables))
    lines = -(-len(tables) // columns)
    figure, axes = _subplots(lines, columns, figsize=(4.2 * columns, 3.9 * lines), squeeze=False)
    for axis, (name, table) in zip(axes.flat, tables.items(), strict=False):
        share = table / np.maximum(table.sum(1, keepdims=True), 1)
        axis.imshow(share, vmin=0, vmax=1, cmap="Blues")
        for i, j in np.ndindex(*table.shape):
            if table[i, j]:
                colour = "white" if share[i, j] > 0.5 else "black"
                axis.text(j, i, str(table[i, j]), ha="center", va="center", fontsize=7, color=colour)
        axis.set_xticks(range(len(labels)), labels, rotation=45, ha="right", fontsize=7)
        axis.set_yticks(range(len(labels)), labels, fontsize=7)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("predicted", fontsize=8)
        axis.set_ylabel("true", fontsize=8)
    for axis in axes.flat[len(tables) :]:
        axis.axis("off")
    figure.suptitle(title)
    _save(figure, path)


def reliability(rows: list[dict[str, Any]], title: str, path: Path, bins: int = 15) -> None:
    """Share of clips that are right against the probability of the likeliest label, of the languages seen in training
    and of the others; a bin's dot is as large as it has clips. Beside it with the temperature, if one was fitted."""
    panels = {"as it is": "reliability"}
    if any("reliability_calibrated" in row for row in rows):
        panels[f"with the temperature {rows[0]['temperature']:.2f}"] = "reliability_calibrated"
    size = (4.5 * len(panels), 4.8)
    figure, axes = _subplots(1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, (name, key) in zip(axes.flat, panels.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
        for seen, colour in ((True, SEEN), (False, UNSEEN)):
            found = [one for row in rows if row["seen_language"] is seen for one in row.get(key, [])]
            if not found:
                continue
            sure, right, n = (np.array([one[of] for one in found]) for of in ("confidence", "accuracy", "n"))
            place = np.minimum((sure * bins).astype(int), bins - 1)
            clips = np.bincount(place, n, bins)
            there = clips > 0
            x, y = (np.bincount(place, values * n, bins)[there] / clips[there] for values in (sure, right))
            label = "languages seen in training" if seen else "unseen languages"
            axis.plot(x, y, color=colour, linewidth=1.2, label=label)
            axis.scatter(x, y, 8 + 120 * clips[there] / clips.sum(), color=colour)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("probability of the likeliest label", fontsize=8)
        axis.set_xlim(0, 1.02)
        axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("share of the clips that is right", fontsize=8)
    figure.suptitle(title)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    _save(figure, path)


def ua_by_language(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of UA per language with its interval, a panel per model, unseen languages in their own colour, chance as a
    line."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = -(-len(models) // 2)
    size = (6.5 * min(2, len(models)), 4.0 * lines)
    figure, axes = _subplots(lines, min(2, len(models)), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis in axes.flat[len(models) :]:
        axis.axis("off")
    for axis, model in zip(axes.flat, models, strict=False):
        mine = [row for row in rows if row["model"] == model]
        several = len({row["corpus"] for row in mine}) > 1
        names = [f"{row['language']} {row['corpus']}" if several else row["language"] for row in mine]
        colours = [SEEN if row["seen_language"] else UNSEEN for row in mine]
        bars = axis.bar(range(len(mine)), [row["ua"] for row in mine], color=colours)
        axis.bar_label(bars, fmt="%.2f", fontsize=8, label_type="center", color="white")
        for place, row in enumerate(mine):
            if row["ua_low"] is not None:
                axis.vlines(place, row["ua_low"], row["ua_high"], color="black", linewidth=1)
        ends = [(i - 0.5, i + 0.5) for i in range(len(mine))]
        chance = [1 / row["k"] for row in mine]  # of its own in each language, by the labels that it has
        axis.hlines(chance, *zip(*ends, strict=True), color="black", linestyle="--", linewidth=1)
        axis.text(len(mine) - 0.5, chance[-1], " chance", fontsize=8, va="bottom", ha="right")
        axis.set_xticks(range(len(mine)), names, fontsize=8, rotation=30 if several else 0)
        axis.set_ylim(0, 1.05)
        axis.set_title(model.replace("stage", "stage ").replace("_", " "))
        axis.set_ylabel("UA")
    handles = [Rectangle((0, 0), 1, 1, color=c) for c in (SEEN, UNSEEN)]
    names = ["language seen in training", "unseen language"]
    figure.legend(handles, names, fontsize=8, loc="outside lower center", ncols=2)
    _save(figure, path)


def durations(seconds: dict[str, NDArray[np.float32]], path: Path) -> None:
    """Stacked histogram of the clips' lengths, a colour a split. The longest thousandth goes into the last bar."""
    longest = float(np.quantile(np.concatenate(list(seconds.values())), 0.999))
    edges = np.linspace(0, longest, 61)
    figure, axis = _subplots(figsize=(7, 4))
    below = np.zeros(len(edges) - 1)
    for (split, values), colour in zip(seconds.items(), _colours(len(seconds)), strict=True):
        counts, _ = np.histogram(np.minimum(values, longest), edges)
        axis.stairs(below + counts, edges, baseline=below, fill=True, color=colour, label=split)
        below = below + counts
    axis.set_xlabel("seconds")
    axis.set_ylabel("clips")
    _thousands(axis.yaxis)
    axis.set_xlim(0, longest)
    axis.legend(fontsize=8)
    _save(figure, path)


def counts(table: NDArray[np.int64], rows: list[str], columns: list[str], path: Path) -> None:
    """Heat map of a (rows, columns) table of clips, the counts written in."""
    size = (2.5 + 0.75 * len(columns), 1.6 + 0.33 * len(rows))
    figure, axis = _subplots(figsize=size, layout="constrained")
    shade = np.log1p(table) / max(np.log1p(table).max(), 1)  # small counts would all look like none
    axis.imshow(shade, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for i, j in np.ndindex(*table.shape):
        if table[i, j]:
            colour = "white" if shade[i, j] > 0.6 else "black"
            axis.text(j, i, f"{table[i, j]:,}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.set_title("clips", fontsize=10)
    _save(figure, path)


def label_shares(table: NDArray[np.int64], splits: list[str], labels: list[str], path: Path) -> None:
    """Bars of each label's share of its split, from a (splits, labels) table of clips, the counts written on top."""
    figure, axis = _subplots(figsize=(2 + 0.4 * (len(splits) + 1) * len(labels), 4), layout="constrained")
    width = 0.85 / len(splits)
    for i, colour in enumerate(_colours(len(splits))):
        share = 100 * table[i] / max(table[i].sum(), 1)
        at = np.arange(len(labels)) + (i - (len(splits) - 1) / 2) * width
        bars = axis.bar(at, share, width, color=colour, label=splits[i])
        axis.bar_label(bars, [f"{count:,}" for count in table[i]], fontsize=7, rotation=90, padding=2)
    axis.set_xticks(range(len(labels)), labels, fontsize=8)
    axis.set_ylabel("% of the split (above: clips)")
    axis.margins(y=0.2)
    axis.legend(fontsize=8)
    _save(figure, path)


def speakers(clips: dict[str, NDArray[np.int64]], path: Path) -> None:
    """Clips a speaker, those with most first, the splits side by side. `clips`: split → (speakers,), 0 if not in it."""
    figure, axis = _subplots(figsize=(7, 4))
    start = 0
    for (split, values), colour in zip(clips.items(), _colours(len(clips)), strict=True):
        own = np.sort(values[values > 0])[::-1]
        edges = np.arange(start, start + len(own) + 1)
        axis.stairs(own, edges, fill=True, color=colour, label=f"{split}: {len(own):,} speakers")
        start += len(own)
    everyone = np.concatenate([values[values > 0] for values in clips.values()])
    if len(everyone) and everyone.max() > 20 * np.median(everyone):  # else the many with few clips could not be seen
        axis.set_yscale("log")
    axis.set_xlim(0, max(start, 1))
    axis.set_xlabel("speakers")
    axis.set_ylabel("clips")
    _thousands(axis.xaxis, axis.yaxis)
    axis.legend(fontsize=8)
    _save(figure, path)


def sample_rates(clips: dict[str, int], path: Path) -> None:
    """Bars of the clips of each sample rate."""
    figure, axis = _subplots(figsize=(3 + 0.6 * len(clips), 4))
    bars = axis.bar(list(clips), list(clips.values()), width=0.6, color=SEEN)
    axis.bar_label(bars, [f"{count:,}" for count in clips.values()], fontsize=8)
    axis.set_xlim(-0.8, len(clips) - 0.2)
    axis.set_xlabel("Hz")
    axis.set_ylabel("clips")
    _thousands(axis.yaxis)
    _save(figure, path)


def _subplots(
    lines: int = 1, columns: int = 1, *, figsize: tuple[float, float], layout: Any = None, **options: Any
) -> tuple[Figure, Any]:
    """What pyplot's `subplots` returns, of a figure that pyplot does not know."""
    figure = Figure(figsize=figsize, layout=layout)
    return figure, figure.subplots(lines, columns, **options)


def _thousands(*axes: Any) -> None:
    for axis in axes:
        if axis.get_scale() == "linear":
            axis.set_major_locator(MaxNLocator(7, integer=True))  # there are no half clips
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _colours(count: int) -> list[str]:
    """Those of the palette, over again where it does not suffice."""
    return [PALETTE[i % len(PALETTE)] for i in range(count)]


def _save(figure: Any, path: Path) -> None:
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    figure.savefig(path, dpi=110)
