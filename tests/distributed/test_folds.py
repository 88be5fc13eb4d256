"""Cross-validation by speaker for real: stopped by Ctrl-C, continued, and called once more when all is done."""

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pandas
import pytest
from mlflow import MlflowClient
from sklearn.metrics import balanced_accuracy_score

from mser_dist.cli import main as cli
from mser_dist.config.file import load_evaluation, load_training
from mser_dist.runs.record import run_id_of
from mser_dist.shards.shard_set import ShardSet
from tests.tiny_runs import ENCODER, LLM, QFORMER, lines, mser, start

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

WORDS = ["data.sets=shards", "data.languages=[en, de]", "data.workers=0", ENCODER, *QFORMER, "out=runs/cv"]
WORDS += ["train.global_batch=8", "train.steps=3", "train.log_every=1", "stage2.train.steps=1", f"stage2.{LLM}"]
WORDS += ["stage2.train.global_batch=8"]
COMMAND = ["folds", "demo_stage1", *WORDS, "--stage2", "demo_stage2", "--folds", "2"]


@pytest.fixture(scope="module")
def done(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A work folder with two finished folds, interrupted in the training of the second one's stage 1."""
    folder = tmp_path_factory.mktemp("folds")
    shutil.copytree(tiny_set, folder / "shards")
    process = start(*COMMAND, cwd=folder)
    try:
        log = folder / "runs/cv/fold02-stage1/log.jsonl"
        while process.poll() is None and not (log.is_file() and log.stat().st_size):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 75, f"{output}\n{error[-3000:]}"
    assert error.splitlines()[-1] == (
        "mser: fold 2 of 2: stopped before its end; the same command goes on from there"
    ), error[-2000:]
    first = (folder / "runs/cv/fold01-eval/report.json").read_bytes()
    again = mser(*COMMAND, cwd=folder)
    assert "▶ fold 1/2: done before" in again and "fold 2/2: train stage 1 without" in again
    assert (folder / "runs/cv/fold01-eval/report.json").read_bytes() == first
    yield folder


def test_every_clip_is_tested_once_by_each_stage_and_the_scores_are_of_all(done: Path) -> None:
    out = done / "runs/cv"
    everyone = ShardSet.open(done / "shards", keep={"language": ["en", "de"]})
    predictions = pandas.read_parquet(out / "predictions.parquet")
    report = json.loads((out / "folds.json").read_text())
    for stage in ("stage1", "stage2"):
        own = predictions[predictions["model"] == stage]
        assert sorted(own["key"]) == sorted(everyone.keys)
    for fold in report["folds"]:
        assert set(predictions[predictions["fold"] == fold["fold"]]["speaker"]) == set(fold["speakers"])
    for row in report["results"]:
        mine = predictions[(predictions["model"] == row["model"]) & (predictions["language"] == row["language"])]
        assert row["ua"] == pytest.approx(balanced_accuracy_score(mine["label"], mine["predicted"]))
    table = (out / "table.txt").read_text()
    assert "all clips pooled" in table and "over folds ± sd" in table and "stage 2" in table
    assert (out / "confusion_stage1.png").is_file() and (out / "confusion_stage2.png").is_file()


def test_each_run_is_repeatable_from_its_config(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(done)
    report = json.loads(Path("runs/cv/folds.json").read_text())
    for number, fold in enumerate(report["folds"], 1):
        for stage in (1, 2):
            run = Path(f"runs/cv/fold{number:02d}-stage{stage}")
            config = load_training(str(run / "config.yaml"), [])
            assert config.data.drop == {"speaker": fold["speakers"]} and config.data.split == "all"
            assert cli.main(["train", str(run / "config.yaml")]) == 0, "it is known as finished"
            assert [int(row["step"]) for row in lines(run) if "train/loss" in row] == [[1, 2, 3], [1]][stage - 1]
        evaluation = load_evaluation(f"{fold['out']}/config.yaml", [])
        assert evaluation.data.keep == {"speaker": fold["speakers"]}


def test_the_folds_are_children_of_one_mlflow_run(done: Path) -> None:
    out = done / "runs/cv"
    parent = run_id_of(out / "folds")
    client = MlflowClient(f"sqlite:///{done / 'runs/mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "mser-demo")
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    assert parent in runs and runs[parent].info.status == "FINISHED" and runs[parent].info.run_name == "cv"
    children = {r.info.run_name for r in runs.values() if r.data.tags.get("mlflow.parentRunId") == parent}
    assert children == {f"fold{fold:02d}-{what}" for fold in (1, 2) for what in ("stage1", "stage2", "eval")}
    assert len(runs) == 1 + len(children)
    row = json.loads((out / "folds.json").read_text())["results"][0]
    metrics = {re.sub(r"[^\w/]", "_", name): value for name, value in runs[parent].data.metrics.items()}
    place = re.sub(r"[^\w/]", "_", f"{row['model']}/{row['corpus']}/{row['language']}")
    assert metrics[f"ua/{place}"] == row["ua"] and metrics[f"ua_mean/{place}"] == row["ua_mean"]
    files = {file.path for file in client.list_artifacts(parent)}
    assert {"table.txt", "predictions.parquet", "folds.json", "confusion_stage1.png", "config.yaml"} <= files


def test_a_second_call_does_nothing_and_another_config_is_refused(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(done)
    before = {path: path.stat().st_mtime_ns for path in Path("runs/cv").rglob("*")}
    threads = threading.active_count()
    assert cli.main(COMMAND) == 0
    assert {path: path.stat().st_mtime_ns for path in Path("runs/cv").rglob("*")} == before
    output = capsys.readouterr().out
    assert "all clips pooled" in output and "▶" not in output and threading.active_count() == threads
    assert cli.main([*COMMAND, "train.lr=0.5"]) == 2
    assert "fold01-stage1 holds a run with another config (train.lr=" in capsys.readouterr().err
    assert "RANK" not in os.environ
