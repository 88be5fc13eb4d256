from pathlib import Path

import numpy as np
from matplotlib import image

from mser_dist.runs import plots


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
        return {
            "model": f"stage{stage}",
            "corpus": "synth",
            "language": language,
            "seen_language": seen,
            "ua": 0.7,
            "ua_low": 0.6 if seen else None,
            "ua_high": 0.75 if seen else None,
            "k": 6,
        }

    both = [row(stage, language, language == "de") for stage in (1, 2) for language in ("de", "el")]
    plots.ua_by_language(both, tmp_path / "both.png")
    plots.ua_by_language([row(1, "de", True)], tmp_path / "seen.png")
    pixels = drawn(tmp_path / "both.png")
    assert has_colour(pixels, plots.SEEN) and has_colour(pixels, plots.UNSEEN)
    assert drawn(tmp_path / "seen.png").shape[1] < pixels.shape[1], "a panel per stage"


def test_plots_of_a_set(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    seconds = {"train": rng.uniform(1, 5, 900).astype(np.float32), "test": rng.uniform(1, 5, 100).astype(np.float32)}
    plots.durations(seconds, tmp_path / "durations.png")
    plots.durations({"train": np.full(3, 2.0, np.float32)}, tmp_path / "equal.png")
    clips = {"train": np.array([1] * 30 + [900] + [0]), "test": np.array([0] * 31 + [5])}
    plots.speakers(clips, tmp_path / "speakers.png")
    table = np.array([[9, 0, 1], [1, 2, 30000]])
    plots.label_shares(table, ["train", "test"], ["anger", "sad", "no label"], tmp_path / "labels.png")
    for name in ("durations", "speakers", "labels"):
        pixels = drawn(tmp_path / f"{name}.png")
        assert has_colour(pixels, plots.PALETTE[0]) and has_colour(pixels, plots.PALETTE[1]), "a colour a split"
    assert has_colour(drawn(tmp_path / "equal.png"), plots.PALETTE[0])
    plots.speakers({"train": np.zeros(0, np.int64)}, tmp_path / "nobody.png")
    drawn(tmp_path / "nobody.png")

    plots.counts(table, ["de", "el"], ["anger", "sad", "no label"], tmp_path / "two.png")
    plots.counts(np.tile(table, (9, 1)), ["de", "el"] * 9, ["anger", "sad", "no label"], tmp_path / "many.png")
    assert drawn(tmp_path / "many.png").shape[0] > 2 * drawn(tmp_path / "two.png").shape[0], "as high as its rows"
    plots.sample_rates({"16000": 30, "unknown": 2}, tmp_path / "rates.png")
    assert has_colour(drawn(tmp_path / "rates.png"), plots.SEEN)
