"""Pictures of a run: loss curves, confusion per language, UA by language. PNG files, drawn without a display."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SEEN, UNSEEN = "#4477aa", "#ee6677"  # Paul Tol's colour-blind safe palette


def curves(rows: list[dict[str, float]], path: Path) -> None:
    """Every logged number against the step, one small plot each."""
    hidden = {"step", "seconds"}
    names = sorted(
        {name for row in rows for name in row} - hidden, key=lambda n: (not n.startswith(("train/", "val/")), n)
    )
    columns = 4
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 2.6 * lines), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        x, y = zip(*points, strict=True)
        axis.plot(x, y, marker="o" if len(x) < 20 else None, markersize=3, linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    _save(figure, path)


def confusions(tables: dict[str, NDArray[np.int64]], labels: list[str], title: str, path: Path) -> None:
    """One (K, K) confusion a panel, rows (true classes) scaled to shares, counts written in."""
    columns = min(3, len(tables))
    lines = -(-len(tables) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.9 * lines), squeeze=False)
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


def ua_by_language(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of UA per language, a panel per stage, unseen languages in their own colour, chance as a line."""
    stages = sorted({row["stage"] for row in rows})
    size = (6.5 * len(stages), 4.0)
    figure, axes = plt.subplots(1, len(stages), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, stage in zip(axes.flat, stages, strict=True):
        mine = [row for row in rows if row["stage"] == stage]
        several = len({row["corpus"] for row in mine}) > 1
        names = [f"{row['language']} {row['corpus']}" if several else row["language"] for row in mine]
        colours = [SEEN if row["seen_language"] else UNSEEN for row in mine]
        bars = axis.bar(range(len(mine)), [row["ua"] for row in mine], color=colours)
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
        axis.axhline(1 / mine[0]["k"], color="black", linestyle="--", linewidth=1)
        axis.text(len(mine) - 0.5, 1 / mine[0]["k"], " chance", fontsize=8, va="bottom", ha="right")
        axis.set_xticks(range(len(mine)), names, fontsize=8, rotation=30 if several else 0)
        axis.set_ylim(0, 1.05)
        axis.set_title(f"stage {stage}")
        axis.set_ylabel("UA")
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (SEEN, UNSEEN)]
    names = ["language seen in training", "unseen language"]
    figure.legend(handles, names, fontsize=8, loc="outside lower center", ncols=2)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
