"""`mser compare` of run folders: which rows stand in which table, what they differ in, and how sure a difference is."""

import csv
import json
import re
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet
from sklearn.metrics import balanced_accuracy_score, f1_score

from mser_dist.cli import main as cli
from mser_dist.config.file import load_training, to_yaml
from mser_dist.evaluation import compare_report, pooled
from mser_dist.evaluation.bootstrap import draw_difference
from mser_dist.evaluation.compare import Comparison, compare
from mser_dist.evaluation.gathered import of_folders
from mser_dist.evaluation.metrics import score
from mser_dist.files import write_json
from mser_dist.shards.shard_set import ShardSet
from tests.unit.made_up_runs import LABELS, answers, baseline, evaluate, train, write_clips


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_clips(tmp_path_factory.mktemp("clips") / "set")


@pytest.fixture(scope="module")
def runs(shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two learning rates with two seeds each, trained and evaluated, and a baseline; nobody changes them."""
    folder = tmp_path_factory.mktemp("compared")
    for lr, right in (("1e-4", 0.4), ("1e-2", 0.7)):
        for seed in (0, 1):
            name = f"lr={lr}_seed={seed}"
            trained = train(folder / "train" / name, f"train.lr={lr}", f"seed={seed}", ua=right)
            given = {"stage1": answers(shards, right, 10 * seed + len(lr))}
            evaluate(folder / "eval" / name, shards, given, stages={1: trained})
    baseline(folder / "base", shards, {"svm": answers(shards, 0.6, 5)})
    return folder


def compared(*folders: Path, **how: object) -> Comparison:
    systems, notes = of_folders(folders)
    return compare(systems, notes=notes, **how)  # type: ignore[arg-type]


# ---- the paired bootstrap


def test_a_paired_difference_is_that_of_all_draws() -> None:
    """Four speakers can be drawn in 256 ways: two plain loops over them have the distribution that is drawn from."""
    random = np.random.default_rng(0)
    who, reference = np.repeat(np.arange(4), 12), np.tile(np.arange(3), 16)
    ours, theirs = (np.where(random.random((2, 48)) < p, reference, random.integers(0, 3, (2, 48))) for p in (0.8, 0.5))
    for name in ("ua", "wa", "macro_f1"):
        exact = []
        for speakers in product(range(4), repeat=4):
            clips = np.concatenate([np.flatnonzero(who == speaker) for speaker in speakers])
            means = []
            for runs in (ours, theirs):
                means.append(np.mean([getattr(score(reference[clips], run[clips], 3), name) for run in runs]))
            exact.append(means[0] - means[1])
        drawn = draw_difference(reference, ours, theirs, who, 3, name, draws=20_000)
        assert drawn.clusters == 4 and set(np.round(drawn.values, 9)) <= set(np.round(exact, 9))
        # The mean of 20,000 draws is off by more than four of its standard errors once in 16,000 times.
        assert drawn.values.mean() == pytest.approx(np.mean(exact), abs=4 * np.std(exact) / np.sqrt(20_000))
        assert drawn.values.std() == pytest.approx(np.std(exact), rel=0.03)


def test_what_speakers_do_to_both_cancels(runs: Path) -> None:
    """Two systems with the same answers differ by nothing, however much speakers differ."""
    systems, _ = of_folders([runs / "eval/lr=1e-4_seed=0"])
    twin = replace(systems[0], params={**(systems[0].params or {}), "stage1.train.lr": "7"}, behind=frozenset({"x"}))
    [section] = compare([*systems, twin]).sections
    best, other = section.rows
    assert other.difference == 0 and other.difference_interval == (0.0, 0.0) and other.undecided
    assert best.interval is not None and best.interval[1] - best.interval[0] > 0.05


# ---- rows


def test_seeds_are_one_row_and_the_best_comes_first(runs: Path) -> None:
    found = compared(runs / "eval", runs / "base")
    [section] = found.sections
    assert section.metric == "UA, mean over 2 unseen languages (el, ru)" and section.over == [
        ("made-up", "el"),
        ("made-up", "ru"),
    ]
    assert [(row.model, row.params.get("stage1.train.lr"), len(row.runs)) for row in section.rows] == [
        ("stage1", "0.01", 2),
        ("svm", None, 1),
        ("stage1", "0.0001", 2),
    ]
    best, svm, worst = section.rows
    assert best.mean == pytest.approx(np.mean(best.values)) and best.sd == pytest.approx(np.std(best.values, ddof=1))
    assert (best.difference, best.difference_interval, svm.sd) == (None, None, None)
    assert worst.difference == pytest.approx(worst.mean - best.mean) and not worst.undecided
    assert worst.difference is not None and worst.difference_interval is not None
    assert worst.difference_interval[0] < worst.difference < worst.difference_interval[1]
    assert "stage1.train.lr" in found.keys and "stage1.seed" not in found.keys
    assert not [key for key in found.keys if key.startswith(("stage1.qformer", "stage1.train.epochs"))], (
        "a baseline has no such key, and so does not differ in it"
    )
    assert section.chance == pytest.approx(1 / 3)


def test_the_numbers_are_those_of_the_evaluation(runs: Path) -> None:
    folder = runs / "eval/lr=1e-2_seed=1"
    rows = json.loads((folder / "report.json").read_text(encoding="utf-8"))["zero_shot"]
    for language in ("el", "ru"):
        [section] = compared(folder, languages=[language]).sections
        [own] = [row for row in rows if row["language"] == language]
        assert section.rows[0].mean == own["ua"] and section.rows[0].interval == (own["ua_low"], own["ua_high"])
    system = of_folders([folder])[0][0]
    assert system.clips is not None and system.predicted is not None
    mine = system.clips.language == "el"
    reference, predicted = system.clips.reference[mine], system.predicted[mine]
    found = compared(folder, languages=["el"], score="macro_f1").sections[0].rows[0].mean
    assert found == pytest.approx(f1_score(reference, predicted, average="macro"))
    assert compared(folder, languages=["el"]).sections[0].rows[0].mean == pytest.approx(
        balanced_accuracy_score(reference, predicted)
    )


def test_by_a_key(runs: Path) -> None:
    found = compared(runs / "eval", by="lr")
    assert found.by == "stage1.train.lr"
    assert [row.params[found.by] for row in found.sections[0].rows] == ["0.0001", "0.01"]
    assert [row.difference is None for row in found.sections[0].rows] == [False, True], "still to the best"


def test_a_key_that_an_older_config_lacks_is_its_default(runs: Path, tmp_path: Path) -> None:
    old, new = (Path(shutil.copytree(runs / f"train/lr=1e-2_seed={i}", tmp_path / f"t{i}")) for i in (0, 1))
    text = (old / "config.yaml").read_text(encoding="utf-8")
    assert text.count("  ema: ") == 1
    (old / "config.yaml").write_text(re.sub(r"  ema: .*\n", "", text), encoding="utf-8")
    found = compared(old, new)
    assert found.keys == [] and len(found.sections[0].rows) == 1
    (old / "config.yaml").write_text(re.sub("# mser_dist .*", "# mser_dist 0.0.7", text), encoding="utf-8")
    assert compared(old, new).keys == ["stage1.version"], "another version may compute otherwise"


def test_stage_2_differs_by_its_stage_1_too(shards: ShardSet, tmp_path: Path) -> None:
    for lr in ("1e-3", "1e-2"):
        first = train(tmp_path / f"one{lr}", f"train.lr={lr}")
        second = train(tmp_path / f"two{lr}", f"stage1={first}", stage=2)
        given = {f"stage{stage}": answers(shards, 0.5, stage) for stage in (1, 2)}
        evaluate(tmp_path / f"eval{lr}", shards, given, stages={1: first, 2: second})
    found = compared(tmp_path)
    assert found.keys == ["stage1.train.lr"] and len(found.sections) == 1, "trainings are not rows of their own"
    assert [row.model for row in found.sections[0].rows].count("stage2") == 2
    table = str(compare_report.table(found, found.sections[0]))
    assert table.startswith("stage1.train.lr  model") and "stage 2" in table


def test_a_training_is_compared_by_its_validation(runs: Path, tmp_path: Path) -> None:
    found = compared(runs / "train")
    [section] = found.sections
    assert [row.mean for row in section.rows] == pytest.approx([0.7, 0.4])
    assert section.rows[0].difference is None and section.rows[1].difference == pytest.approx(-0.3)
    assert all(row.sd == pytest.approx(0) and row.interval is None for row in section.rows)
    assert section.title.startswith("validation, val of runs/demo/shards; labels anger,")
    other = train(tmp_path / "other", "data.val_split=test", ua=0.9)
    assert len(compared(runs / "train", other).sections) == 2, "on other clips"
    silent = train(tmp_path / "silent", ua=None)
    assert any("silent is left out: neither evaluated nor" in note for note in compared(runs / "train", silent).notes)


def test_a_cross_validation_is_a_row_a_model(shards: ShardSet, tmp_path: Path) -> None:
    """Its folds share all but the speakers that each leaves out."""
    for lr in ("1e-3", "1e-2"):
        out = tmp_path / f"folds{lr}"
        first = train(out / "fold01-stage1", f"train.lr={lr}", "data.drop={speaker: [el0]}")
        second = train(out / "fold01-stage2", f"stage1={first}", "data.drop={speaker: [el0]}", stage=2)
        given = {f"stage{stage}": answers(shards, 0.5, stage) for stage in (1, 2)}
        evaluate(out / "fold01-eval", shards, given, stages={1: first, 2: second})
        (out / "folds").mkdir()
        base = load_training("demo_stage1", [f"out={out}", f"train.lr={lr}"])
        (out / "folds/config.yaml").write_text(to_yaml(base), encoding="utf-8")
        predictions = pooled.read({1: out / "fold01-eval"})
        parquet.write_table(predictions, out / "predictions.parquet")
        results = pooled.as_rows(pooled.pool(predictions, LABELS))
        write_json(out / "folds.json", {"results": results})
    found = compared(tmp_path)
    [section] = found.sections
    assert found.keys == ["stage1.train.lr"] and section.metric == "UA, mean over 2 languages (el, ru)"
    assert sorted(row.model for row in section.rows) == ["stage1", "stage1", "stage2", "stage2"] and not found.notes
    assert section.rows[0].by_place["made-up", "el"] in [one["ua"] for one in results]


# ---- what does not compare


def test_other_clips_stand_apart(runs: Path, tmp_path: Path) -> None:
    few = write_clips(tmp_path / "few", languages=("el",))
    evaluate(tmp_path / "other", few, {"stage1": answers(few, 0.9)})
    found = compared(runs / "eval", tmp_path / "other")
    assert [len(section.rows) for section in found.sections] == [2, 1]
    assert any("sections are of other clips (45 clips in all of them: --common" in note for note in found.notes)
    assert not any("parameters are not known" in note for note in found.notes), "it names no training"
    [section] = compared(runs / "eval", tmp_path / "other", common=True).sections
    assert len(section.rows) == 3 and section.over == [("made-up", "el")] and section.title.startswith("45 clips")


def test_other_labels_stand_apart(runs: Path, shards: ShardSet, tmp_path: Path) -> None:
    more = [*LABELS, "surprise"]
    evaluate(tmp_path / "four", shards, {"stage1": answers(shards, 0.5, labels=more)}, labels=more)
    evaluate(tmp_path / "native", shards, {"stage1": answers(shards, 0.5)}, "native_labels=true")
    found = compared(runs / "eval", tmp_path / "four", tmp_path / "native")
    assert [len(section.rows) for section in found.sections] == [2, 1, 1]
    assert any("sections differ in the labels to choose from" in note for note in found.notes)


def test_what_some_were_trained_on_is_no_part_of_the_mean(runs: Path, shards: ShardSet, tmp_path: Path) -> None:
    evaluate(tmp_path / "heard", shards, {"stage1": answers(shards, 0.9, heard=["el"])})
    [section] = compared(runs / "eval", tmp_path / "heard").sections
    assert section.over == [("made-up", "ru")] and section.metric == "UA on ru (unseen)"
    assert section.notes == [
        f"el of made-up is left out of the mean: {tmp_path / 'heard'} (stage1) was trained on its language"
    ]
    [section] = compared(runs / "eval", tmp_path / "heard", languages=["el"]).sections
    assert "el of made-up is of a language that only some were trained on (1 run)" in section.notes


def test_the_same_training_evaluated_again_is_no_further_run(runs: Path, shards: ShardSet, tmp_path: Path) -> None:
    trained = runs / "train/lr=1e-2_seed=0"
    evaluate(tmp_path / "again", shards, {"stage1": answers(shards, 0.7, 4)}, stages={1: trained})
    found = compared(runs / "eval", tmp_path / "again")
    assert [len(row.runs) for row in found.sections[0].rows] == [2, 2]
    assert any("again is of the same training and clips as" in note for note in found.notes)


def test_without_predictions_nothing_is_paired(runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs / "eval/lr=1e-2_seed=0", tmp_path / "cut"))
    rows = json.loads((folder / "report.json").read_text(encoding="utf-8"))["zero_shot"]
    for damage in (b"PAR1, and no more", None):
        (folder / "predictions.parquet").unlink()
        if damage is not None:
            (folder / "predictions.parquet").write_bytes(damage)
        found = compared(runs / "eval/lr=1e-4_seed=0", folder)
        assert [section.title.split(":")[0] for section in found.sections][1] == "without predictions"
        row = found.sections[1].rows[0]
        assert row.mean == pytest.approx(np.mean([one["ua"] for one in rows])) and row.interval
        assert any("cut has no predictions that can be read" in note for note in found.notes)


def test_an_evaluation_of_0_1_0(runs: Path, tmp_path: Path) -> None:
    """It wrote no predictions, and named the stage of a row alone."""
    folder = Path(shutil.copytree(runs / "eval/lr=1e-2_seed=0", tmp_path / "old"))
    (folder / "predictions.parquet").unlink()
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    kept = ("stage", "corpus", "language", "seen_language", "n", "k", "chance", "ua", "wa", "macro_f1")
    rows = [{key: row[key] for key in kept} for row in report["zero_shot"]]
    write_json(folder / "report.json", {"zero_shot": rows})
    [row] = compared(folder).sections[0].rows
    assert row.model == "stage1" and row.mean == pytest.approx(np.mean([one["ua"] for one in rows]))


def test_a_training_that_is_gone(runs: Path, shards: ShardSet, tmp_path: Path) -> None:
    trained = train(tmp_path / "gone", "train.lr=0.5")
    for seed in (0, 1):
        evaluate(tmp_path / f"eval{seed}", shards, {"stage1": answers(shards, 0.5, seed)}, stages={1: trained})
    shutil.rmtree(trained)
    found = compared(tmp_path)
    assert [len(row.runs) for row in found.sections[0].rows] == [1, 1], "not known to be seeds of one config"
    assert sum("its parameters are not known" in note for note in found.notes) == 2


# ---- what is written


def test_the_files(runs: Path, tmp_path: Path) -> None:
    few = write_clips(tmp_path / "few", languages=("el",))
    evaluate(tmp_path / "<b>", few, {"stage1": answers(few, 0.9)})
    found = compared(runs / "eval", runs / "base", tmp_path / "<b>")
    compare_report.check_out(tmp_path / "out")
    compare_report.write(found, tmp_path / "out", "mser compare runs")
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(compare_report.FILES)
    with (tmp_path / "out/compare.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["section"] for line in lines] == ["1", "1", "1", "2"]
    assert float(lines[0]["mean"]) == found.sections[0].rows[0].mean and lines[0]["stage1.train.lr"] == "0.01"
    assert float(lines[2]["difference_high"]) < 0 and lines[0]["difference"] == "" and lines[0]["number_of_runs"] == "2"
    assert float(lines[1]["ua ru of made-up"]) == found.sections[0].rows[1].by_place["made-up", "ru"]
    markdown = (tmp_path / "out/compare.md").read_text(encoding="utf-8")
    head = next(line for line in markdown.splitlines() if line.startswith("| train.lr"))
    assert head.count("|") == next(line for line in markdown.splitlines() if "---:" in line).count("|")
    assert "\\<b\\>" in markdown and "(compare.png)" in markdown
    page = (tmp_path / "out/compare.html").read_text(encoding="utf-8")
    assert page.count("<svg ") == 2 and "&lt;b&gt;" in page and "<b>" not in page
    assert not re.search(r"""(src|href)=["'](?!#)""", page), "it needs no other file"
    assert "var(--ink)" in page and "prefers-color-scheme: dark" in page
    assert not re.search("<svg.*#1b1f24", page, re.DOTALL), "every colour of the plot is the page's"


def test_the_command(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(runs / "eval"), "--by", "train.lr", "--metric", "wa", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert said.startswith("WA, mean over 2 unseen languages (el, ru)\n90 clips of made-up, 3 labels\n")
    assert re.search(r"^train\.lr +model +run +runs +WA +95 % +to the best +95 % of that", said, re.MULTILINE)
    assert re.search(
        r"^0\.01 +stage 1 .*lr=1e-2_seed=\d \+1 +2 +0\.\d{3} ± 0\.\d{3} +0\.\d\d–0\.\d\d$", said, re.MULTILINE
    )
    page = (tmp_path / "out/compare.html").read_text(encoding="utf-8")
    assert "--by train.lr" in page and "--metric wa" in page


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "name either run folders or --experiment E"),
        (["eval", "--experiment", "x"], "name either run folders or --experiment E"),
        (["eval", "--uri", "x"], "--uri is where --experiment E is looked up"),
        (["nowhere"], "nowhere: there is no such run folder (was it deleted?)"),
        (["empty"], "there is nothing to compare: empty is left out: it is no run, and holds none"),
        (["begun"], "there is nothing to compare: begun is left out: it has not ended"),
        (["eval", "--by", "train.lrr"], "--by train.lrr: no run has it: did you mean train.lr?"),
        (["eval", "--by", "width"], "--by width may be"),
        (["eval", "--by", "seed"], "--by seed: runs that differ in their seed alone are one row"),
        (["eval", "--model", "stage2"], "--model stage2: there is stage1"),
        (["eval", "--language", "xx"], "--language xx: no run was evaluated on it"),
        (["eval", "--metric", "f1"], "invalid choice: 'f1'"),
        (["eval", "--out", "begun"], "--out begun holds a run"),
        (["eval", "--out", "file"], "--out file cannot be made (File exists)"),
        (["eval", "damaged"], "config.yaml cannot be read"),
    ],
)
def test_mistakes_are_one_line(words: list[str], says: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("eval").symlink_to(runs / "eval")
    Path("empty").mkdir()
    Path("file").write_text("")
    Path("begun").mkdir()
    Path("begun/config.yaml").write_text("stage: 1\n")
    shutil.copytree(runs / "base", "damaged")
    Path("damaged/config.yaml").write_text("a: [")
    assert cli.main(["compare", *words]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1
