"""Pooling over folds: equal to scikit-learn on all predictions, with mean and spread, in a table and as metrics."""

import json
import statistics
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from mser_dist.errors import UserError
from mser_dist.evaluation import pooled
from mser_dist.runs.names import plain

LABELS = ["anger", "happy", "sad"]
SIZES = {1: 7, 2: 40, 3: 23}  # clips of each fold


def written(
    folder: Path, fold: int, models: tuple[str, ...] = ("stage1", "stage1_adapted"), language: str = "de"
) -> Path:
    """The predictions of a fold's evaluation, right more often than not. Fold 1 has no clip of anger."""
    random = np.random.default_rng([fold, *language.encode()])
    parts = []
    for model in models:
        label = random.integers(1 if fold == 1 else 0, 3, SIZES[fold])
        predicted = np.where(random.random(len(label)) < 0.6, label, random.integers(0, 3, len(label)))
        texts = {"model": [model] * len(label), "corpus": [None] * len(label), "language": [language] * len(label)}
        texts |= {name: [LABELS[i] for i in numbers] for name, numbers in (("label", label), ("predicted", predicted))}
        parts.append(pyarrow.table({name: pyarrow.array(values, pyarrow.string()) for name, values in texts.items()}))
    folder.mkdir()
    parquet.write_table(pyarrow.concat_tables(parts), folder / "predictions.parquet")
    return folder


@pytest.fixture
def predictions(tmp_path: Path) -> pyarrow.Table:
    return pooled.read({fold: written(tmp_path / f"fold{fold}", fold) for fold in SIZES})


def test_pooled_metrics_are_scikit_learns(predictions: pyarrow.Table) -> None:
    table = predictions.to_pandas()
    results = pooled.pool(predictions, LABELS)
    assert [one.model for one in results] == ["stage1", "stage1_adapted"]
    for one in results:
        own = table[table["model"] == one.model]
        assert one.overall.n == len(own) == sum(SIZES.values())
        assert one.overall.ua == pytest.approx(balanced_accuracy_score(own["label"], own["predicted"]))
        assert one.overall.wa == pytest.approx(accuracy_score(own["label"], own["predicted"]))
        assert one.overall.macro_f1 == pytest.approx(f1_score(own["label"], own["predicted"], average="macro"))
        uas = [
            balanced_accuracy_score(part["label"], part["predicted"])
            for _, part in own[(own["fold"] != 1) | (own["predicted"] != "anger")].groupby("fold")
        ]
        assert [one.folds[fold].ua for fold in (2, 3)] == pytest.approx(uas[1:])
        assert {fold: metrics.n for fold, metrics in one.folds.items()} == SIZES and one.folds[1].k == 2
        by_fold = [metrics.ua for metrics in one.folds.values()]
        assert one.mean("ua") == pytest.approx(statistics.mean(by_fold))
        assert one.sd("ua") == pytest.approx(statistics.stdev(by_fold))


def test_the_table_has_each_fold_all_clips_and_the_mean(predictions: pyarrow.Table) -> None:
    (one, _) = results = pooled.pool(predictions, LABELS)
    speakers = {1: ["03"], 2: ["08", "09"], 3: [f"s{i}" for i in range(9)]}
    lines = [line.split("  ") for line in str(pooled.table(results, speakers)).splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[0] == ["model", "fold", "speakers", "n", "UA", "WA", "macroF1"]
    assert cells[3][:4] == ["stage 1", "2", "08, 09", "40"] and "s5 and 3 more" in cells[4][2]
    assert cells[5][:5] == ["stage 1", "all", "all clips pooled", "70", f"{one.overall.ua:.3f}"]
    assert cells[6][:4] == ["stage 1", "mean", "over folds ± sd", f"{one.mean('ua'):.3f} ± {one.sd('ua'):.3f}"]
    assert cells[8][0] == "stage 1 adapted" and len(cells) == 13


def test_languages_are_not_pooled_and_a_single_fold_has_no_spread(tmp_path: Path) -> None:
    folders = {1: written(tmp_path / "one", 2), 2: written(tmp_path / "two", 3, language="el")}
    results = pooled.pool(pooled.read(folders), LABELS)
    assert [(one.model, one.language, list(one.folds)) for one in results] == [
        ("stage1", "de", [1]),
        ("stage1", "el", [2]),
        ("stage1_adapted", "de", [1]),
        ("stage1_adapted", "el", [2]),
    ]
    assert results[0].sd("ua") is None and "±" not in str(pooled.table(results, {1: ["a"], 2: ["b"]})).splitlines()[3]
    rows = json.loads(json.dumps(pooled.as_rows(results), allow_nan=False))
    assert rows[0]["ua_sd"] is None and rows[0]["ua"] == rows[0]["ua_mean"] == rows[0]["folds"][0]["ua"]


def test_what_a_tracker_gets(predictions: pyarrow.Table) -> None:
    (one, _) = results = pooled.pool(predictions, LABELS)
    steps = [
        (step, dict(zip(plain(numbers), numbers.values(), strict=True))) for step, numbers in pooled.metrics_of(results)
    ]
    assert [step for step, _ in steps] == [1, 2, 3, 0]
    assert steps[1][1]["ua_by_fold/stage1/_/de"] == one.folds[2].ua
    assert steps[3][1]["macro_f1/stage1/_/de"] == one.overall.macro_f1 and "ua_sd/stage1_adapted/_/de" in steps[3][1]


def test_predictions_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "predictions.parquet").write_bytes(b"PAR1, and no more")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"predictions.parquet cannot be read"):
            pooled.read({1: folder})
