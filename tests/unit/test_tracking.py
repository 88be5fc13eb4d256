import json
import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlflow
import pytest

from mser_dist import config as cfg
from mser_dist.tracking import Tracker, run_id_of, tracked, tracking_uri


@pytest.fixture(autouse=True)
def leave_mlflow_as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"MLFLOW_HTTP_REQUEST_TIMEOUT": "2", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}.items():
        monkeypatch.setenv(name, value)
    before = mlflow.get_tracking_uri()
    yield
    mlflow.end_run()
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracking database with its tables made: that takes MLflow a second."""
    folder = tmp_path_factory.mktemp("mlflow")
    tracker = start(folder / "prepared")
    tracker.close("FINISHED")
    return folder / "mlflow.db"


@pytest.fixture
def runs(prepared: Path, tmp_path: Path) -> Path:
    """A folder for runs, with that database in it."""
    shutil.copy(prepared, tmp_path / "mlflow.db")
    return tmp_path


def start(
    out: Path, params: dict[str, str] | None = None, tags: dict[str, str] | None = None, **options: Any
) -> Tracker:
    out.mkdir(exist_ok=True)
    # A new experiment for each: the artifact folder is kept in the experiment, and the database here is a copy.
    return Tracker(cfg.Tracking(experiment=f"test-{out.parent.name}", **options), out, tags or {}, params or {})


def log_lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_all_of_a_run_is_in_mlflow_and_a_resume_continues_it(runs: Path) -> None:
    out = runs / "stage1"
    tracker = start(out, {"train.lr": "0.001", "long": "x" * 7000}, {"mser.stage": "1"})
    run_id = tracker.run_id
    assert run_id and run_id_of(out) == run_id
    tracker.metrics(1, {"train/loss": 2.0})
    tracker.metrics(2, {"train/loss": 1.0, "train/lr": 1e-3})
    (out / "notes.txt").write_text("größer")
    tracker.artifact(out / "notes.txt", "texts")
    tracker.table([{"language": "el", "ua": 0.5}, {"language": "ru", "ua": 0.25}], "zero_shot.json")
    tracker.close("FAILED")
    client = mlflow.MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    assert client.get_run(run_id).info.status == "FAILED"

    again = start(out, {"train.lr": "0.001"}, {"mser.stage": "1"})
    assert again.run_id == run_id
    assert client.get_run(run_id).info.status == "RUNNING"
    again.metrics(3, {"train/loss": 0.5})
    again.close("FINISHED")

    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "stage1"
    assert run.data.params["train.lr"] == "0.001" and len(run.data.params["long"]) == 6000
    assert run.data.tags["mser.stage"] == "1"
    history = client.get_metric_history(run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert run.data.metrics["train/lr"] == 1e-3
    files = {path.name: path for path in (runs / "mlartifacts").rglob("*") if path.is_file()}
    assert files["notes.txt"].read_text() == "größer" and files["notes.txt"].parent.name == "texts"
    assert json.loads(files["zero_shot.json"].read_text()) == {
        "columns": ["language", "ua"],
        "data": [["el", 0.5], ["ru", 0.25]],
    }
    assert [row["step"] for row in again.rows()] == [1, 2, 3]


def test_sibling_runs_share_an_experiment(runs: Path) -> None:
    ids = []
    for name in ("stage1", "stage2"):
        tracker = start(runs / name, run_name=f"my {name}")
        ids.append(tracker.run_id)
        tracker.close("FINISHED")
    client = mlflow.MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    first, second = (client.get_run(run_id).info for run_id in ids)
    assert first.run_id != second.run_id
    assert first.experiment_id == second.experiment_id
    assert (first.run_name, second.run_name) == ("my stage1", "my stage2")


def test_where_a_run_is_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    assert tracking_uri(cfg.Tracking(), out) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri(cfg.Tracking(), out) == "http://tracking:5000"
    assert tracking_uri(cfg.Tracking(uri="sqlite:///x.db"), out) == "sqlite:///x.db"


def test_the_environment_decides_where(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = runs / "elsewhere.db"
    shutil.move(runs / "mlflow.db", elsewhere)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{elsewhere}")
    tracker = start(runs / "run")
    tracker.close("FINISHED")
    run_id = run_id_of(runs / "run")
    assert run_id and mlflow.MlflowClient(f"sqlite:///{elsewhere}").get_run(run_id).info.status == "FINISHED"
    assert not (runs / "mlflow.db").exists()


def test_a_dead_server_warns_once_and_the_log_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.warns(UserWarning, match=r"MLflow at http://127\.0\.0\.1:9 failed and is switched off") as caught:
        tracker = start(out, uri="http://127.0.0.1:9")
    assert len([w for w in caught if "MLflow at" in str(w.message)]) == 1
    assert "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(5):
            tracker.metrics(step, {"loss": 1.0 / (step + 1)})
        tracker.artifact(out / "log.jsonl")
        tracker.table([{"a": 1}], "t.json")
        tracker.close("FINISHED")
    assert tracker.run_id is None and run_id_of(out) is None
    assert [(row["step"], row["loss"]) for row in log_lines(out)] == [(n, 1.0 / (n + 1)) for n in range(5)]


def test_a_call_that_fails_switches_mlflow_off_and_the_run_still_ends(runs: Path) -> None:
    out = runs / "run"
    tracker = start(out)
    tracker.metrics(1, {"loss": 1.0})
    with pytest.warns(UserWarning, match="switched off for this run"):
        tracker.artifact(out / "no such file")
    tracker.metrics(2, {"loss": 0.5})
    tracker.close("FAILED")
    assert [row["step"] for row in log_lines(out)] == [1, 2]
    run_id = run_id_of(out)
    assert run_id
    client = mlflow.MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    assert client.get_run(run_id).info.status == "FAILED"
    assert [point.step for point in client.get_metric_history(run_id, "loss")] == [1]


@pytest.mark.parametrize(
    ("end", "status"), [(None, "FINISHED"), (RuntimeError("x"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_the_status_tells_how_a_run_ended(runs: Path, end: BaseException | None, status: str) -> None:
    out = runs / "run"
    out.mkdir()
    (out / "config.yaml").write_text("stage: 1\n")
    with (
        nullcontext() if end is None else pytest.raises(type(end)),
        tracked(cfg.Tracking(experiment=f"test-{runs.name}"), out, {"a": "b"}, {}, main=True) as tracker,
    ):
        assert tracker
        tracker.describe("# What it is")
        if end:
            raise end
    run_id = run_id_of(out)
    assert run_id
    run = mlflow.MlflowClient(f"sqlite:///{runs / 'mlflow.db'}").get_run(run_id)
    assert run.info.status == status
    assert (run.data.tags["a"], run.data.tags["mser.out"]) == ("b", str(out))
    assert run.data.tags["mlflow.note.content"] == "# What it is"
    assert len(list((runs / "mlartifacts").rglob("config.yaml"))) == 1


def test_other_ranks_track_nothing(tmp_path: Path) -> None:
    with tracked(cfg.Tracking(), tmp_path, {}, {}, main=False) as tracker:
        assert tracker is None
    assert not list(tmp_path.iterdir())


def test_tracking_can_be_switched_off(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    tracker = Tracker(cfg.Tracking(enabled=False), out, {}, {})
    tracker.metrics(1, {"loss": 1.0})
    tracker.close("FINISHED")
    assert tracker.run_id is None
    assert [row["loss"] for row in log_lines(out)] == [1.0]
    assert not (tmp_path / "mlflow.db").exists()


def test_the_log_of_a_killed_and_resumed_run_reads_as_one(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    lines = ['{"step": 1, "loss": 3.0}', '{"step": 2, "loss": 2.0}', '{"step": 2, "val/ua": 0.5}']
    (out / "log.jsonl").write_text("\n".join([*lines, '{"step": 3, "lo']))  # killed in the middle of a line
    tracker = Tracker(cfg.Tracking(enabled=False), out, {}, {})
    tracker.metrics(2, {"loss": 2.5})  # went on from the checkpoint of step 1
    tracker.metrics(3, {"loss": math.nan})
    rows = tracker.rows()
    tracker.close("FINISHED")
    assert [(row["step"], row.get("loss"), row.get("val/ua")) for row in rows[:3]] == [
        (1, 3.0, None),
        (2, 2.5, None),
        (2, None, 0.5),
    ]
    assert rows[3]["step"] == 3 and math.isnan(rows[3]["loss"])


def test_run_ids_of_folders_that_have_none(tmp_path: Path) -> None:
    assert run_id_of(tmp_path) is None
    (tmp_path / "mlflow.json").write_text("{")
    assert run_id_of(tmp_path) is None
    (tmp_path / "mlflow.json").write_text("{}")
    assert run_id_of(str(tmp_path)) is None
