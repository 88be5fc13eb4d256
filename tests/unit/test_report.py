"""What an evaluation writes and prints, of answers that are made up."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas  # mlflow brings it
import pytest
from pyarrow import parquet

from mser_dist import audio
from mser_dist import config as cfg
from mser_dist.evaluation import report
from mser_dist.files import whole
from mser_dist.runs.tracking import tracked
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.writer import DatasetWriter
from tests.unit.made_up_set import meta, pcm

LABELS = ["happy", "sad"]
CORPUS = "корпус-с-очень-длинным-именем"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Two clips in each of two languages; one corpus is named in another script, and at length."""
    out = tmp_path_factory.mktemp("report") / "set"
    with DatasetWriter(out, "set", {}) as writer:
        for i in range(4):
            place = {"language": ["de", "el"][i // 2], "corpus": ["c", CORPUS][i // 2]}
            writer.write("test", f"k{i}", b"no audio", "flac", meta(i, label=LABELS[i % 2], **place))
    return ShardSet.open(out)


def answers(scores: list[list[float]], shards: ShardSet) -> report.Answers:
    numbers = np.arange(len(scores))
    reference = np.array([LABELS.index(label) for label in shards.column("label")])
    return report.Answers(numbers, reference[numbers], np.array(scores, dtype=np.float32), ["de"])


def sure(given: report.Answers, temperature: float | None = None) -> report.Answers:
    """The same answers, whose scores are log-probabilities."""
    return replace(given, scale=1.0, temperature=temperature)


@pytest.fixture(scope="module")
def two_stages(shards: ShardSet) -> dict[str, report.Answers]:
    right, wrong = [[0.75, 0.25], [0.125, 0.875]], [[-2.5, -1.5], [-3.0, -3.5]]
    return {"stage1": answers(right + right, shards), "stage2": sure(answers(right + wrong, shards))}


def test_the_table(two_stages: dict[str, report.Answers], shards: ShardSet) -> None:
    rows = [report.as_row(group) for group in report.measure(two_stages, shards, LABELS)]
    assert str(report.zero_shot_table(rows)).splitlines() == [
        "model    corpus                         language  seen  n  chance     UA       95 %     WA  macroF1",
        "───────────────────────────────────────────────────────────────────────────────────────────────────",
        "stage 1  c                              de        yes   2   0.500  1.000  1.00–1.00  1.000    1.000",
        f"stage 1  {CORPUS}  el        no    2   0.500  1.000  1.00–1.00  1.000    1.000",
        "stage 1  mean over seen languages                                  1.000  1.00–1.00",
        "stage 1  mean over unseen languages                                1.000  1.00–1.00",
        "───────────────────────────────────────────────────────────────────────────────────────────────────",
        "stage 2  c                              de        yes   2   0.500  1.000  1.00–1.00  1.000    1.000",
        f"stage 2  {CORPUS}  el        no    2   0.500  0.000  0.00–0.00  0.000    0.000",
        "stage 2  mean over seen languages                                  1.000  1.00–1.00",
        "stage 2  mean over unseen languages                                0.000  0.00–0.00",
    ]


def test_a_mean_over_no_language_has_no_row(two_stages: dict[str, report.Answers], shards: ShardSet) -> None:
    rows = [report.as_row(group) for group in report.measure(two_stages, shards, LABELS) if group.seen]
    assert "unseen" not in str(report.zero_shot_table(rows))


def test_what_is_published(two_stages: dict[str, report.Answers], shards: ShardSet, tmp_path: Path) -> None:
    groups = report.measure(two_stages, shards, LABELS)
    with tracked(cfg.TrackingConfig(enabled=False), tmp_path, {}, {}, True) as tracker:
        assert tracker is not None
        report.publish(tracker, "title", groups, report.predictions(two_stages, shards, LABELS), LABELS)
    table = (tmp_path / "table.txt").read_text(encoding="utf-8")
    whole = f"{report.zero_shot_table([report.as_row(group) for group in groups])}\n"
    assert table.startswith(whole) and table[len(whole) :].startswith("\nUA: the mean of the classes' recalls")
    assert max(map(len, table.splitlines())) <= 120
    found = pandas.read_parquet(tmp_path / "predictions.parquet")
    assert [*found.columns] == [
        *("model", "key", "corpus", "language", "speaker", "gender", "label", "predicted", "duration"),
        *("score_happy", "score_sad", "probability_happy", "probability_sad"),
    ]
    assert found["score_sad"].dtype == found["probability_sad"].dtype == np.float32
    words = ["stage2", "k2", CORPUS, "el", "s2", "female", "happy", "sad"]
    sure = 1 / (1 + np.exp(-1.0))
    assert found.iloc[6].tolist() == [*words, pytest.approx(0.102), -2.5, -1.5, *map(pytest.approx, [1 - sure, sure])]
    assert found["probability_sad"][:4].isna().all(), "of scores that are no logarithms"
    assert found["predicted"].tolist() == ["happy", "sad"] * 3 + ["sad", "happy"]
    group = parquet.ParquetFile(tmp_path / "predictions.parquet").metadata.row_group(0)
    assert {group.column(i).compression for i in range(group.num_columns)} == {"ZSTD"}
    names = {"table.txt", "predictions.parquet", "zero_shot.json", "ua_by_language.png"}
    assert names | {f"confusion_stage{i}.png" for i in (1, 2)} <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob(".*"))


def test_a_report_tells_what_each_row_is_made_of(
    two_stages: dict[str, report.Answers], shards: ShardSet, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    told = {name: replace(given, more={"embedding": random.normal(size=(4, 3))}) for name, given in two_stages.items()}
    told["stage2"] = sure(told["stage2"], 2.0)
    with tracked(cfg.TrackingConfig(enabled=False), tmp_path, {}, {}, True) as tracker:
        report.conclude(tracker, "title", told, shards, LABELS)
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found["labels"] == LABELS
    first, *_, last = found["zero_shot"]
    assert last["confusion"] == [[0, 1], [1, 0]] and last["majority"] == 0.5
    assert last["classes"]["sad"] == {"n": 1, "recall": 0.0, "precision": 0.0, "f1": 0.0}
    assert "ece" not in first and "temperature" not in first, "cosines without a scale are no probabilities"
    flat = 1 / (1 + np.exp(-1 / 2))
    assert last["temperature"] == 2 and last["brier_calibrated"] < last["brier"]
    assert last["ece_calibrated"] == pytest.approx((flat + 1 / (1 + np.exp(-1 / 4))) / 2)
    assert last["by_gender"]["female"]["n"] == 2 and [one["from"] for one in last["by_length"]] == [0.0]
    mean = {"model": "stage2", "seen": False, "ua": 0.0, "low": 0.0, "high": 0.0, "n_languages": 1, "n_rows": 1}
    assert found["means"][-1] == mean
    assert [(row["model"], row["language"], row["n"], row["parallel"]) for row in found["retrieval"]] == [
        *(("stage1", "de", 2, 0), ("stage1", "el", 2, 0), ("stage2", "de", 2, 0), ("stage2", "el", 2, 0))
    ]
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    names = {name for line in logged for name in line}
    assert {"ece/stage2/c/de", "brier_calibrated/stage2/c/de", "map/stage1/de", "map/stage1/mean"} <= names
    assert not any(name.startswith("ece/stage1") for name in names)
    assert (tmp_path / "reliability_stage2.png").is_file() and not (tmp_path / "reliability_stage1.png").exists()
    table = (tmp_path / "table.txt").read_text(encoding="utf-8")
    assert "ECE  with T" in table and "\nretrieval" in table and max(map(len, table.splitlines())) <= 120
    (row,) = json.loads((tmp_path / "zero_shot.json").read_text(encoding="utf-8"))["data"][-1:]
    assert not any(isinstance(value, (dict, list)) for value in row)


def test_what_is_told_of_labels_and_constant_answers(shards: ShardSet, tmp_path: Path) -> None:
    right, constant = [[0.75, 0.25], [0.125, 0.875]], [[0.75, 0.25], [0.875, 0.125]]
    told = {"stage1": answers(right + constant, shards), "stage2": answers(constant + constant, shards)}
    groups = report.measure(told, shards, LABELS)
    assert [report.as_row(group)["constant"] for group in groups] == [False, True, True, True]
    assert report.warnings(groups, LABELS) == [
        f"stage 1 gives one answer to all clips of el of {CORPUS} (happy)",
        "stage 2 answers 'happy' to all 4 clips: it does not tell them apart, and its numbers are those of chance",
    ]
    assert report.warnings(report.measure({"stage1": answers(right + right, shards)}, shards, LABELS), LABELS) == []
    with tracked(cfg.TrackingConfig(enabled=False), tmp_path, {}, {}, True) as tracker:
        assert tracker is not None
        report.publish(tracker, "title", groups, report.predictions(told, shards, LABELS), LABELS)
    assert "stage 2 answers 'happy' to all 4 clips" in (tmp_path / "table.txt").read_text(encoding="utf-8")


def test_a_label_that_no_clip_has_lowers_no_chance(shards: ShardSet) -> None:
    scores = np.array([[0.75, 0.25, 0], [0, 1, 0.5], [1, 0, 0], [0, 1, 0]], dtype=np.float32)
    for reference, chances, says in (
        ([0, 1, 0, 1], [1 / 2, 1 / 2], ["no clip has the label fear: it can be answered"]),
        ([0, 1, 0, 2], [1 / 2, 1 / 2], [f"do not count there: de of c (fear), el of {CORPUS} (sad)"]),
        ([0, 1, 0, 0], [1 / 2, 1], ["no clip has the label fear", f"do not count there: el of {CORPUS} (sad)"]),
    ):
        given = report.Answers(np.arange(4), np.array(reference), scores, ["de"])
        groups = report.measure({"stage1": given, "stage2": given}, shards, ["happy", "sad", "fear"])
        assert [report.as_row(group)["chance"] for group in groups] == chances * 2
        told = report.warnings(groups, ["happy", "sad", "fear"])
        assert len(told) == len(says) and all(part in line for part, line in zip(says, told, strict=True)), told


def test_only_labels_of_the_corpus_compete(shards: ShardSet) -> None:
    scores = np.array([[1, 2, 9], [4, 3, 9], [5, 6, 9], [8, 7, 9]], dtype=np.float32)
    given = report.Answers(np.arange(4), np.array([0, 1, 1, 2]), scores, [])
    native = report.of_native_labels(given, shards).scores
    assert native.argmax(1).tolist() == [1, 0, 2, 2] and native.dtype == np.float32
    assert np.isneginf(native).tolist() == [[False, False, True]] * 2 + [[True, False, False]] * 2
    read = report.Answers(given.numbers[1:], given.reference[1:], scores[1:], [])
    assert np.isneginf(report.of_native_labels(read, shards).scores[0]).tolist() == [True, False, True], (
        "of the clips that were read"
    )


def test_a_clip_that_names_little(tmp_path: Path) -> None:
    """Of a tar with audio alone."""
    (tmp_path / "clip.wav").write_bytes(audio.encode(pcm(0), 16000, "wav"))
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(tmp_path / "clip.wav", "a.wav")
    shards = ShardSet.open(tmp_path / "a.tar")
    given = report.Answers(np.array([0]), np.array([0]), np.array([[0.5, 0.25]], dtype=np.float32), [])
    (row,) = report.predictions({"stage1": given}, shards, LABELS).to_pylist()
    assert (row["key"], row["predicted"]) == ("a", "happy")
    assert (row["speaker"], row["label"], row["language"]) == (None, None, "und")


def test_a_file_is_whole_or_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("old", "new"):
        with whole(path) as staging:
            staging.write_text(text)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == text
    with pytest.raises(KeyboardInterrupt), whole(path) as staging:
        staging.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "new" and [*tmp_path.iterdir()] == [path]
