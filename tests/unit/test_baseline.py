"""Baselines: of real features of a small frozen Whisper that is made on the spot, on clips that tell their label."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas  # mlflow brings it
import pytest
from sklearn.metrics import f1_score, recall_score

from mser_dist import audio
from mser_dist import config as cfg
from mser_dist.cli import main as cli
from mser_dist.config.file import load_baseline
from mser_dist.errors import UserError
from mser_dist.evaluation.baseline import baseline
from mser_dist.evaluation.classifiers import CLASSIFIERS, Heard, fitted, majority, normalised, scores
from mser_dist.models import egemaps
from mser_dist.shards.index import sound
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.writer import DatasetWriter
from tests.unit.made_up_set import meta

PITCH = {"happy": 2000, "sad": 300, "fear": 5000}
ARCH = "{d_model: 16, encoder_layers: 2, encoder_attention_heads: 2, encoder_ffn_dim: 32}"
SYSTEMS = ["logistic_regression", "logistic_regression_adapted", "svm", "svm_adapted"]


def tone(label: str, i: int) -> np.ndarray:
    """A third of a second at the label's pitch, with some noise."""
    random, time = np.random.default_rng(i), np.arange(5000 + 16 * i) / 16000
    wave = 4000 * np.sin(2 * np.pi * PITCH[label] * random.uniform(0.9, 1.1) * time)
    return (wave + random.normal(0, 100, len(time))).astype(np.int16)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora to fit to, where happy is the most frequent, and one, of another language, to test on; configs."""
    folder = tmp_path_factory.mktemp("baseline")
    with DatasetWriter(folder / "set", "made-up", {"seed": 0}) as writer:
        for i in range(36):
            split = "train" if i < 24 else "test"
            label = ["happy", "sad", "happy", "fear"][i % 4] if split == "train" else ["happy", "sad", "fear"][i % 3]
            corpus, language = [("a", "de"), ("b", "fr")][i // 2 % 2] if split == "train" else ("c", "el")
            facts = meta(i, label=label, corpus=corpus, language=language, duration=len(tone(label, i)) / 16000)
            wave = tone(label, i)
            writer.write(split, f"k{i:02d}", audio.encode(wave, 16000, "flac"), "flac", facts, sound(wave))
    (folder / "s1.yaml").write_text(
        f"stage: 1\nout: {folder}/stage1\n"
        f"data: {{sets: [{folder}/set], labels: [fear, happy, sad], val_split: null, workers: 0}}\n"
        f"encoder: {{arch: {ARCH}, freeze: true, layers: [1, 2]}}\n"
    )
    (folder / "ev.yaml").write_text(
        f"out: {folder}/eval\ndata: {{sets: [{folder}/set], labels: [fear, happy, sad], workers: 0}}\n"
        "tracking: {enabled: false, run_name: evaluation}\n"
    )
    return folder


def run(place: Path, out: Path, *words: str, only: str = "majority,logistic_regression,svm") -> dict[str, Any]:
    config = load_baseline(f"{place}/s1.yaml", f"{place}/ev.yaml", [f"out={out}", *words], only.split(","))
    return baseline(config)


@pytest.fixture(scope="module")
def report(place: Path) -> dict[str, Any]:
    return run(place, place / "baseline")


def test_the_table_is_of_the_predictions(place: Path, report: dict[str, Any]) -> None:
    rows = {row["model"]: row for row in report["zero_shot"]}
    assert list(rows) == ["majority", *SYSTEMS]
    found = pandas.read_parquet(place / "baseline/predictions.parquet")
    for model, row in rows.items():
        own = found[found["model"] == model]
        assert (row["corpus"], row["language"], row["seen_language"], row["n"], row["k"]) == ("c", "el", False, 12, 3)
        assert row["stage"] is None and row["adapted_on"] == (12 if model.endswith("_adapted") else None)
        assert row["ua"] == pytest.approx(recall_score(own["label"], own["predicted"], average="macro"))
        assert row["macro_f1"] == pytest.approx(f1_score(own["label"], own["predicted"], average="macro"))
    assert rows["majority"]["ua"] == rows["majority"]["chance"] == pytest.approx(1 / 3)
    assert set(found[found["model"] == "majority"]["predicted"]) == {"happy"}
    assert all(rows[model]["ua"] > 0.9 for model in SYSTEMS)
    for row in rows.values():
        assert row["zero_shot"] is True and row["unseen"]["baseline"]["corpus"] is True and row["leaks"] is None
    [part] = report["ledger"]["models"]["svm"]["parts"]
    assert (part["clips"], part["languages"], part["stage"]) == (24, ["de", "fr"], None)
    assert not report["warnings"], "one answer to all is what the majority is"
    table = (place / "baseline/table.txt").read_text()
    assert "logistic regression adapted  c " in table and "mean over unseen languages" in table
    assert (place / "baseline/confusion_svm_adapted.png").is_file() and (place / "baseline/report.json").is_file()


def test_the_features_are_kept_and_the_numbers_repeat(
    place: Path, report: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    again = run(place, tmp_path / "again")
    assert again["zero_shot"] == report["zero_shot"] and "(24 were there)" in capfd.readouterr().out
    anew = run(place, tmp_path / "anew", "encoder.cache=off", "data.workers=1")
    assert anew["zero_shot"] == report["zero_shot"]


def test_the_control_is_at_chance(place: Path, tmp_path: Path) -> None:
    rows = run(place, tmp_path / "b", "data.shuffle_labels=true", only="logistic_regression")["zero_shot"]
    assert all(row["ua"] < 0.6 for row in rows)


@pytest.mark.parametrize("normalize", ["corpus", "speaker"])
def test_normalised_features_have_the_same_rows(place: Path, tmp_path: Path, normalize: str) -> None:
    rows = run(place, tmp_path / "b", f"encoder.normalize={normalize}", only="svm")["zero_shot"]
    assert [(row["model"], row["adapted_on"]) for row in rows] == [("svm", None), ("svm_adapted", 12)]


def test_labels_that_are_not_asked_about_are_not_answered(place: Path, tmp_path: Path) -> None:
    report = run(place, tmp_path / "b", "on.data.labels=[sad,fear]")
    found = pandas.read_parquet(tmp_path / "b/predictions.parquet")
    assert set(found["predicted"]) == {"sad", "fear"} and np.isfinite(found[["score_sad", "score_fear"]]).all(None)
    assert len(found) == 5 * 8 and not report["warnings"]


def test_a_label_that_was_never_heard_is_never_answered(place: Path, tmp_path: Path) -> None:
    report = run(place, tmp_path / "b", "data.labels=[sad,happy]")
    found = pandas.read_parquet(tmp_path / "b/predictions.parquet")
    assert set(found["predicted"]) == {"sad", "happy"} and (found["score_fear"] == -np.inf).all()
    assert report["warnings"] == ["no training clip has the label fear: no baseline answers it"]
    assert report["warnings"][0] in (tmp_path / "b/table.txt").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["encoder.freeze=false"], "set encoder.freeze=true"),
        (["init_from=runs/x"], "set init_from=null"),
        (["data.labels=[happy,surprise]"], "data.labels names 'surprise', and no clip of the split 'train' has it"),
        (["data.labels=[happy,sad]", "on.data.labels=[fear,surprise]"], "have no label in common"),
        (["on.batch=many"], "batch must be of type int"),
        (["on.lr=1"], "unknown key lr"),
        (["--only", "knn"], "--only knn: use some of majority, logistic_regression"),
    ],
)
def test_a_mistake_is_a_line(place: Path, words: list[str], says: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["baseline", f"{place}/s1.yaml", "--on", f"{place}/ev.yaml", "out=b", *words]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("mser: error:") and says in line and not Path("b").exists()


def test_configs_that_do_not_fit(place: Path) -> None:
    (place / "s2.yaml").write_text(f"stage: 2\nstage1: r\ndata: {{sets: [{place}/set]}}\n")
    with pytest.raises(UserError, match=r"s2\.yaml: a config of stage 2: give that of a stage 1"):
        load_baseline(f"{place}/s2.yaml", f"{place}/ev.yaml", [])
    with pytest.raises(UserError, match="give it to `mser train`"):
        load_baseline(f"{place}/s1.yaml", f"{place}/s1.yaml", [])


def test_whose_keys_the_words_set(place: Path) -> None:
    words = ["seed=3", "on.data.split=all", "encoder.stride=2"]
    config = load_baseline(f"{place}/s1.yaml", f"{place}/ev.yaml", words)
    assert (config.stage1.seed, config.stage1.encoder.stride, config.on.data.split) == (3, 2, "all")
    assert config.out == f"{place}/eval_baseline" and config.on.tracking.run_name is None
    named = load_baseline(f"{place}/s1.yaml", f"{place}/ev.yaml", ["on.tracking.run_name=x", "out=y"])
    assert (named.out, named.on.tracking.run_name, named.stage1.out) == ("y", "x", f"{place}/stage1")


def test_the_folder_of_a_training_is_left_alone(place: Path, tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="is the folder of a training run"):
        run(place, tmp_path / "run")


def test_without_opensmile(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(egemaps, "is_installed", lambda: False)
    words = [f"{place}/s1.yaml", "--on", f"{place}/ev.yaml", f"out={tmp_path / 'b'}"]
    assert cli.main(["baseline", *words, "--only", "egemaps"]) == 2
    assert "openSMILE is not installed: pip install 'mser-dist[opensmile]'" in capfd.readouterr().err
    assert cli.main(["baseline", *words]) == 0
    said = capfd.readouterr()
    assert "egemaps" not in said.out and "svm adapted" in said.out
    assert "no eGeMAPS baselines: openSMILE is not installed: pip install" in said.err and "research" in said.err


def test_egemaps(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Where openSMILE is installed."""
    pytest.importorskip("opensmile", reason="pip install 'mser-dist[opensmile]'")
    report = run(place, tmp_path / "b", "on.data.workers=2", only="egemaps")
    assert [row["model"] for row in report["zero_shot"]] == [f"egemaps_{name}" for name in SYSTEMS]
    assert all(row["ua"] > 0.9 for row in report["zero_shot"] if "logistic" in row["model"])
    assert "research and education alone" in capfd.readouterr().out
    assert run(place, tmp_path / "again", only="egemaps")["zero_shot"] == report["zero_shot"]
    assert capfd.readouterr().out.count(" (12 were there)") == 1
    assert egemaps.Functionals()(np.zeros(800, np.float32)).shape == (egemaps.WIDTH,), "too short for its windows"


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("known", [2, 4])
def test_scores_are_those_of_the_classifier(name: str, known: int) -> None:
    random = np.random.default_rng(0)
    label = np.repeat(np.arange(known), 12) + 1  # class 0 is never met
    x = (random.normal(size=(len(label), 6)) + label[:, None]).astype(np.float32)
    classifier = fitted(name, x, label, 0)
    found = scores(classifier, x, known + 1)
    assert found.shape == (len(x), known + 1) and (found[:, 0] == -np.inf).all()
    if name == "logistic_regression":
        expected = classifier.predict_log_proba(x)
    elif known > 2:
        expected = classifier.decision_function(x)
    else:
        difference = classifier.decision_function(x)  # > 0: the second class
        expected = np.stack([-difference, difference], 1) / 2
    np.testing.assert_allclose(found[:, 1:], expected, rtol=1e-4, atol=1e-6)
    assert (found.argmax(1) == classifier.predict(x)).mean() > 0.95, "an SVM of several classes votes otherwise"


def test_the_majority_knows_the_shares() -> None:
    found = majority(np.array([2, 1, 2, 2]), 4, 3)
    np.testing.assert_allclose(np.exp(found), [[0, 0.25, 0.75, 0]] * 3)


@pytest.mark.parametrize("normalize", ["none", "corpus", "speaker"])
def test_a_corpus_that_is_elsewhere_is_brought_back(place: Path, normalize: str) -> None:
    parts = [ShardSet.open(place / "set", split=split) for split in ("train", "test")]
    random = np.random.default_rng(0)
    moved = [random.normal(size=(len(part), 5)).astype(np.float32) + 50 * i for i, part in enumerate(parts)]
    train, test = (Heard(x, np.arange(len(x)), part) for x, part in zip(moved, parts, strict=True))
    (x, y, none), (x_own, y_own, own) = normalised(train, test, normalize)
    assert none is None and own is not None and own.clips["c el"] == len(test.x)
    assert (x is train.x and y is test.x) == (normalize == "none")
    assert y.mean() > 40, "inductive: what a new corpus is like is not known"
    assert np.abs(x_own.mean(0)).max() < 0.5
    # Statistics of few clips are drawn towards those of the training: of n clips, by 10 / (n + 10).
    assert y_own.mean() < y.mean() * 0.6


def test_the_names_of_systems() -> None:
    assert [name for name in cfg.BASELINES if cfg.is_called(name, "egemaps")] == list(cfg.BASELINES[3:])
    assert [name for name in cfg.BASELINES if cfg.is_called(name, "svm")] == ["svm"]
    assert {name.removeprefix("egemaps_") for name in cfg.BASELINES} == {"majority", *CLASSIFIERS}
