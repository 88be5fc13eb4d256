from pathlib import Path

import numpy as np
from matplotlib import image

from mser_dist import plots


def drawn(path: Path) -> np.ndarray:
    """(height, width, channels) of a PNG, which must have several colours."""
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = image.imread(path)[..., :3]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
    return pixels


def has_colour(pixels: np.ndarray, colour: str) -> bool:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return bool((np.abs(pixels - rgb).max(-1) < 0.02).sum() > 50)


def test_curves(tmp_path: Path) -> None:
    rows = [{"step": step, "seconds": 1.0, "train/loss": 1 / step, "train/lr": 1e-3} for step in range(1, 6)]
    rows += [{"step": 5, "seconds": 2.0, "val/ua": 0.5, **{f"train/x{i}": float("nan") for i in range(4)}}]
    plots.curves(rows, tmp_path / "seven.png")
    plots.curves(rows[:5], tmp_path / "two.png")
    seven, two = drawn(tmp_path / "seven.png"), drawn(tmp_path / "two.png")
    assert seven.shape[0] > 1.5 * two.shape[0], "more numbers need a second line of panels"


def test_confusions(tmp_path: Path) -> None:
    labels = ["anger", "neutral", "sad"]
    tables = {name: np.diag([9, 5, 0]) + np.eye(3, k=1, dtype=int) for name in ("de (a)", "el (b)", "fa (c)", "ru (d)")}
    plots.confusions(tables, labels, "stage 1: confusion by language", tmp_path / "four.png")
    plots.confusions({"de (a)": tables["de (a)"]}, labels, "one", tmp_path / "one.png")
    four, one = drawn(tmp_path / "four.png"), drawn(tmp_path / "one.png")
    assert four.shape[0] > 1.5 * one.shape[0] and four.shape[1] > 2 * one.shape[1]


def test_ua_by_language(tmp_path: Path) -> None:
    def row(stage: int, language: str, seen: bool) -> dict[str, object]:
        return {"stage": stage, "corpus": "synth", "language": language, "seen_language": seen, "ua": 0.7, "k": 6}

    both = [row(stage, language, language == "de") for stage in (1, 2) for language in ("de", "el")]
    plots.ua_by_language(both, tmp_path / "both.png")
    plots.ua_by_language([row(1, "de", True)], tmp_path / "seen.png")
    pixels = drawn(tmp_path / "both.png")
    assert has_colour(pixels, plots.SEEN) and has_colour(pixels, plots.UNSEEN)
    assert drawn(tmp_path / "seen.png").shape[1] < pixels.shape[1], "a panel per stage"
