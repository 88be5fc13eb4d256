"""The demo as a newcomer runs it: learned honestly, tracked in MLflow, within its time and memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]

Demo = tuple[Path, dict[str, Any], str]
UNSEEN = {"el", "ru", "fa"}
MODELS = ("stage1", "stage1_adapted", "stage2", "stage2_adapted")


def run_demo(folder: Path, *words: str) -> tuple[dict[str, Any], str]:
    env = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    if "MSER_DEMO" in env:  # the clips that it encoded are those of the control
        del env["MSER_FEATURES"]
    command = [sys.executable, "-m", "mser_dist", "demo", *words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    out = folder / (words[words.index("--out") + 1] if "--out" in words else "runs/demo")
    return json.loads((out / "report.json").read_text()), done.stdout


def unseen_ua(report: dict[str, Any], model: str) -> float:
    values = [row["ua"] for row in report["zero_shot"] if row["model"] == model and not row["seen_language"]]
    assert len(values) == len(UNSEEN)
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The folder that holds ``runs/demo``, its report, and what it printed.

    A demo made a moment ago by `make demo` may be given (`.ci/run` does so): MSER_DEMO is its folder, MSER_DEMO_LOG
    what it printed.
    """
    if given := os.environ.get("MSER_DEMO"):
        made = Path(given)
        return (
            made.parents[1],
            json.loads((made / "report.json").read_text()),
            Path(os.environ["MSER_DEMO_LOG"]).read_text(),
        )
    folder = tmp_path_factory.mktemp("demo")
    return folder, *run_demo(folder)


def test_unseen_languages_are_recognised(demo: Demo) -> None:
    _, report, printed = demo
    told = {(row["language"] in UNSEEN, row["zero_shot"], row["leaks"], row["unknown"]) for row in report["zero_shot"]}
    assert told == {(True, True, None, None), (False, False, None, None)}, "by the ledgers: no voice was trained on"
    for model in MODELS:
        assert unseen_ua(report, model) >= 0.70, model
    assert report["world_size"] == 2 and report["zero_stage"] == 3
    assert set(report["seconds_by_step"]) == {"synthesis", "stage1", "stage2", "evaluation"}
    for row in report["zero_shot"]:
        assert row["k"] == 6 and row["n"] >= 72 and row["seen_language"] == (row["language"] not in UNSEEN)
    assert "mlflow ui --backend-store-uri" in printed and "mean over unseen languages" in printed


def test_shuffled_labels_end_at_chance(demo: Demo, tmp_path: Path) -> None:
    """The same run on the same clips, with training labels that tell nothing: what is learned above comes from them."""
    folder, *_ = demo
    shards = str(folder / "runs/demo/shards")
    control, _ = run_demo(tmp_path, "--shuffle-labels", "--shards", shards, "--out", "runs/control")
    # Chance is 1/6; by luck alone the mean over 324 clips moves by 0.02 (one standard deviation).
    for model in MODELS:
        assert unseen_ua(control, model) < 0.25, model


def test_three_linked_runs_are_in_mlflow(demo: Demo) -> None:
    folder, report, _ = demo
    ids = report["mlflow"]
    client = mlflow.MlflowClient(ids["tracking_uri"])
    runs = {name: client.get_run(ids[f"{name}_run_id"]) for name in ("stage1", "stage2", "eval")}
    assert len({run.info.experiment_id for run in runs.values()}) == 1
    assert all(run.info.status == "FINISHED" for run in runs.values())
    assert runs["stage2"].data.tags["mser.stage1_run_id"] == ids["stage1_run_id"]
    assert runs["eval"].data.tags["mser.stage1_run_id"] == ids["stage1_run_id"]
    assert runs["eval"].data.tags["mser.stage2_run_id"] == ids["stage2_run_id"]
    for name in ("stage1", "stage2"):
        data = runs[name].data
        assert data.tags["mser.attention.kernel"] == "sdpa" and data.tags["mser.world_size"] == "2"
        assert len(client.get_metric_history(runs[name].info.run_id, "train/loss")) > 10
        assert any(metric.startswith("system/") for metric in data.metrics)
        files = {item.path for item in client.list_artifacts(runs[name].info.run_id)}
        assert {"config.yaml", "curves.png"} <= files
    files = {item.path for item in client.list_artifacts(ids["eval_run_id"])}
    expected = {
        "config.yaml",
        "table.txt",
        "zero_shot.json",
        "confusion_stage1.png",
        "confusion_stage2.png",
        "ua_by_language.png",
    }
    assert expected <= files
    config = yaml.safe_load((folder / "runs/demo/stage1/config.yaml").read_text())
    assert config["train"]["weight_decay"] == 0.01, "the resolved config spells out every default"


def test_a_finished_demo_is_kept(demo: Demo) -> None:
    folder, *_ = demo
    command = [sys.executable, "-m", "mser_dist", "demo"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--overwrite" in done.stderr and "Traceback" not in done.stderr
