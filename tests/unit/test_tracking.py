"""Real MLflow on sqlite, and servers that are dead or never answer. Real servers: tests/faults/test_tracker.py."""

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import mlflow
import pytest

from mser_dist import config as cfg
from mser_dist.errors import Stopped, UserError
from mser_dist.runs import tracking
from mser_dist.runs.sync import sync
from mser_dist.runs.tracking import Tracker, run_id_of, tracked, tracking_uri
from tests.unit.mlflow_runs import Silent, client_of, files_of, history, log_lines, run_of, start

DEAD = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "_EVERY", 0.1)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For servers that will not answer however long one waits."""
    monkeypatch.setattr(tracking, "PATIENCE", dict.fromkeys(tracking.PATIENCE, 0.5))


@pytest.fixture
def silent() -> Iterator[Silent]:
    server = Silent()
    yield server
    server.stop()


def test_all_of_a_run_is_in_mlflow_and_a_resume_continues_it(runs: Path) -> None:
    out = runs / "stage1"
    tracker = start(out, {"train.lr": "0.001", "long": "x" * 7000}, {"mser.stage": "1"})
    run_id = tracker.run_id
    assert run_id and run_id_of(out) == run_id
    for step in (1, 2):
        tracker.metrics(step, {"train/loss": 2.0 / step, "train/lr": 1e-3})
    (out / "notes.txt").write_text("größer")
    tracker.artifact(out / "notes.txt", "texts")
    tracker.table([{"language": "el", "ua": 0.5}, {"language": "ru", "ua": math.nan}], "zero_shot.json")
    tracker.close("FAILED")
    assert run_of(out).info.status == "FAILED"
    logged = [(point.timestamp, point.step) for point in client_of(runs).get_metric_history(run_id, "train/loss")]
    assert sorted(logged) == [(int(1000 * row["time"]), row["step"]) for row in log_lines(out)]

    again = start(out, {"train.lr": "changed", "new": "1"}, {"mser.stage": "1"})
    assert again.run_id == run_id
    again.metrics(2, {"train/loss": 1.25})  # once more, after a checkpoint of step 1: the first one stays
    again.metrics(3, {"train/loss": 0.5})
    while run_of(out).info.status != "RUNNING":
        time.sleep(0.05)
    again.table([{"language": "el", "ua": 0.75}], "zero_shot.json")
    again.close("FINISHED")

    run = run_of(out)
    assert run.info.status == "FINISHED" and run.info.run_name == "stage1"
    assert run.data.params == {"train.lr": "0.001", "long": "x" * 6000, "new": "1"}
    assert run.data.tags["mser.stage"] == "1" and run.data.tags["mlflow.user"]
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "zero_shot.json", "type": "table"}]
    assert history(out, "train/loss") == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert run.data.metrics["train/lr"] == 1e-3
    files = files_of(runs)
    assert files["notes.txt"].read_text() == "größer" and files["notes.txt"].parent.name == "texts"
    assert json.loads(files["zero_shot.json"].read_text()) == {"columns": ["language", "ua"], "data": [["el", 0.75]]}
    assert [row["step"] for row in again.rows()] == [1, 2, 2, 3]


@pytest.mark.parametrize("left", ["", '{"step": 1, "time": 5.0, "train/loss": 2.0}\n', '{"step": 1, "ti'])
def test_a_log_goes_on_where_a_stop_left_it(runs: Path, left: str) -> None:
    """Before the first step, after one, and in the middle of a line."""
    out = runs / "run"
    out.mkdir(parents=True)
    (out / "log.jsonl").write_text(left)
    tracker = start(out, enabled=False)
    tracker.metrics(2, {"train/loss": 1.0})
    tracker.close("FINISHED")
    *before, last = (out / "log.jsonl").read_text().splitlines()
    assert before == left.splitlines() and json.loads(last)["step"] == 2


def test_the_machines_load_goes_along(runs: Path) -> None:
    tracker = start(runs / "run")
    assert tracker.run_id
    while not (names := [name for name in run_of(runs / "run").data.metrics if name.startswith("system/")]):
        time.sleep(0.05)
    tracker.close("FINISHED")
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(names)


def test_sibling_runs_share_an_experiment(runs: Path) -> None:
    for name in ("stage1", "stage2"):
        start(runs / name, run_name=f"my {name}").close("FINISHED")
    first, second = (run_of(runs / name).info for name in ("stage1", "stage2"))
    assert first.run_id != second.run_id
    assert first.experiment_id == second.experiment_id
    assert (first.run_name, second.run_name) == ("my stage1", "my stage2")


def test_where_a_run_is_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    assert tracking_uri(cfg.TrackingConfig(), out) == f"sqlite:///{tmp_path}/mlflow.db"
    within = tmp_path / "runs" / "demo" / "stage1"
    assert tracking_uri(cfg.TrackingConfig(), within) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    own = tmp_path / "runs" / "demo" / "mlflow.db"  # of an earlier version
    within.mkdir(parents=True)
    (within / "mlflow.json").write_text(json.dumps({"tracking_uri": f"sqlite:///{own}"}))
    assert tracking_uri(cfg.TrackingConfig(), within) == f"sqlite:///{tmp_path}/runs/mlflow.db", "it is gone"
    own.touch()
    assert tracking_uri(cfg.TrackingConfig(), within) == f"sqlite:///{own}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri(cfg.TrackingConfig(), out) == "http://tracking:5000"
    assert tracking_uri(cfg.TrackingConfig(uri="sqlite:///x.db"), out) == "sqlite:///x.db"


def test_the_environment_decides_where_and_sync_remembers_it(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = runs / "elsewhere.db"
    shutil.move(runs / "mlflow.db", elsewhere)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{elsewhere}")
    start(runs / "run").close("FINISHED")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert str(elsewhere) in sync(runs / "run")
    run_id = run_id_of(runs / "run")
    assert run_id and mlflow.MlflowClient(f"sqlite:///{elsewhere}").get_run(run_id).info.status == "FINISHED"
    assert not (runs / "mlflow.db").exists()


@pytest.mark.usefixtures("impatient")
def test_a_run_with_a_dead_server_is_complete_and_synced_later(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = runs / "run"
    tracker = start(out, {"train.lr": "0.5"}, {"mser.stage": "1"}, uri=DEAD)
    assert tracker.run_id is None  # it has been tried
    for step in range(5):
        tracker.metrics(step, {"loss": 1.0 / (step + 1), "bad": math.nan if step == 3 else math.inf})
    tracker.describe("# What it is")
    tracker.table([{"a": 1}], "t.json")
    tracker.close("KILLED")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "Connection refused); the run goes on" in said[0]
    assert "sending the rest" in said[1]
    assert "5 lines of log.jsonl are not sent" in said[2] and f"`mser sync {out}`" in said[2]
    assert [(row["step"], row["loss"]) for row in log_lines(out)] == [(n, 1.0 / (n + 1)) for n in range(5)]
    assert run_id_of(out) is None

    where = f"sqlite:///{runs / 'mlflow.db'}"
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9 does not answer .*refused"):
        sync(out)
    line = sync(out, where)
    assert line == f"{out}: 10 of 10 numbers and 2 files sent to {where}, run {run_id_of(out)}, status KILLED"
    run = run_of(out)
    assert (run.info.status, run.data.params) == ("KILLED", {"train.lr": "0.5"})
    assert (run.data.tags["mser.stage"], run.data.tags["mlflow.note.content"]) == ("1", "# What it is")
    assert history(out, "loss") == [(n, 1.0 / (n + 1)) for n in range(5)]
    assert math.isnan(history(out, "bad")[3][1]) and len(history(out, "bad")) == 5
    times = {point.timestamp for point in client_of(runs).get_metric_history(run.info.run_id, "loss")}
    assert times == {int(1000 * row["time"]) for row in log_lines(out)}
    assert run.info.start_time <= min(times) and max(times) <= run.info.end_time
    assert set(files_of(runs)) >= {"t.json", "config.yaml"}
    # Again: nothing. And on: the same run.
    before = run_id_of(out)
    assert f"0 of 10 numbers sent to {where}" in sync(out) and run_id_of(out) == before
    again = start(out)
    again.metrics(5, {"loss": 0.0})
    again.close("FINISHED")
    assert run_id_of(out) == before and run_of(out).info.status == "FINISHED"
    assert [step for step, _ in history(out, "loss")] == [0, 1, 2, 3, 4, 5]


@pytest.mark.usefixtures("impatient")
def test_a_server_that_never_answers_holds_nothing_up(
    runs: Path, silent: Silent, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1000")  # what returns has not waited for it
    monkeypatch.setattr(tracking, "_FIRST_ANSWER", 0.1)
    out = runs / "run"
    with tracked(cfg.TrackingConfig(uri=silent.uri, experiment=f"test-{runs.name}"), *_prepared(out)) as tracker:
        assert tracker and silent.heard.wait(30)
        for step in range(100):
            tracker.metrics(step, {"loss": float(step)})
        tracker.describe("text")
        assert tracker.run_id is None
    assert len(tracker.rows()) == 100
    assert "is slow: 100 lines of log.jsonl are not sent" in capsys.readouterr().err
    assert tracker._thread and tracker._thread.is_alive()  # still waiting for the first answer
    with pytest.raises(UserError, match="is in use"):  # and about to send, if there is one
        sync(out)


def _prepared(out: Path) -> tuple[Path, dict[str, str], dict[str, str], bool]:
    out.mkdir()
    (out / "config.yaml").write_text("stage: 1\n")
    return out, {"a": "b"}, {}, True


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (None, "FINISHED"),
        (RuntimeError("x"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (Stopped("SIGUSR2", 7), "KILLED"),
    ],
)
def test_the_status_tells_how_a_run_ended(runs: Path, end: BaseException | None, status: str) -> None:
    out = runs / "run"
    with (
        nullcontext() if end is None else pytest.raises(type(end)),
        tracked(cfg.TrackingConfig(experiment=f"test-{runs.name}"), *_prepared(out)) as tracker,
    ):
        assert tracker
        tracker.describe("# What it is")
        if end:
            raise end
    run = run_of(out)
    assert run.info.status == status
    assert (run.data.tags["a"], run.data.tags["mser.out"]) == ("b", str(out))
    assert run.data.tags["mlflow.note.content"] == "# What it is"
    assert [file.path for file in client_of(runs).list_artifacts(run.info.run_id)] == ["config.yaml"]


def test_other_ranks_track_nothing(tmp_path: Path) -> None:
    with tracked(cfg.TrackingConfig(), tmp_path, {}, {}, main=False) as tracker:
        assert tracker is None
    assert not list(tmp_path.iterdir())


def test_a_run_without_tracking_can_be_synced(runs: Path) -> None:
    out = runs / "run"
    tracker = start(out, {"fact": "1"}, enabled=False)
    with pytest.raises(UserError, match="in use"):
        sync(out)
    tracker.metrics(1, {"loss": 1.0})
    tracker.close("FINISHED")
    assert tracker.run_id is None and run_id_of(out) is None
    assert [row["loss"] for row in log_lines(out)] == [1.0]
    assert "1 of 1 numbers and 1 file sent" in sync(out)
    assert (run_of(out).info.status, run_of(out).data.params) == ("FINISHED", {"fact": "1"})


def test_a_run_folder_of_an_earlier_version_is_synced(runs: Path) -> None:
    out = runs / "run"
    out.mkdir()
    lines = [
        '{"step": 1, "seconds": 2.5, "loss": 3.0}',
        '{"step": 1, "loss": 4}',
        "[1]",
        '{"step": 2}',
        '{"step": 3, "l',
    ]
    (out / "log.jsonl").write_text("\n".join(lines))
    (out / "config.yaml").write_text("stage: 2\ntrain: {lr: 0.1}\n")
    (out / "summary.json").write_text("{}")
    assert "1 of 1 numbers and 1 file" in sync(out)
    run = run_of(out)
    assert (run.info.status, run.data.params) == ("FINISHED", {"train.lr": "0.1"})
    assert history(out, "loss") == [(1, 3.0)] and run.data.tags["mser.stage"] == "2"


def test_a_run_is_linked_to_another_one_that_gets_its_id_later(runs: Path) -> None:
    one, two, three = runs / "one", runs / "two", runs / "three"
    start(one, enabled=False).close("FINISHED")
    config = cfg.TrackingConfig(experiment=f"test-{runs.name}")
    config.parent = "0123456789abcdef0123456789abcdef"
    with tracked(config, *_prepared(two), links={"mser.stage1_run_id": one}):
        pass
    assert "mser.stage1_run_id" not in run_of(two).data.tags
    assert run_of(two).data.tags["mlflow.parentRunId"] == config.parent
    config.parent = str(one)  # as those of a sweep and of folds: MLflow may answer them late
    with tracked(config, *_prepared(three)):
        pass
    assert "mlflow.parentRunId" not in run_of(three).data.tags
    for run in (one, two, three):
        sync(run)
    assert run_of(two).data.tags["mser.stage1_run_id"] == run_id_of(one)
    assert run_of(three).data.tags["mlflow.parentRunId"] == run_id_of(one)


def test_a_run_that_was_made_but_not_noted_down_is_found(runs: Path) -> None:
    out = runs / "run"
    tracker = start(out)
    tracker.metrics(1, {"loss": 1.0})
    tracker.close("FINISHED")
    record = json.loads((out / "mlflow.json").read_text())
    (out / "mlflow.json").write_text(json.dumps(record | {"run_id": None}))
    assert "0 of 1 numbers and" in sync(out)
    assert run_id_of(out) == record["run_id"]


def test_a_run_whose_database_is_gone_is_sent_anew(runs: Path, prepared: Path) -> None:
    out = runs / "run"
    tracker = start(out)
    tracker.metrics(1, {"loss": 1.0})
    tracker.close("FINISHED")
    before = run_id_of(out)
    shutil.copy(prepared, runs / "mlflow.db")
    assert "1 of 1 numbers and 1 file sent" in sync(out)
    assert run_id_of(out) != before and history(out, "loss") == [(1, 1.0)]


@pytest.mark.usefixtures("impatient")
def test_passwords_are_in_no_file_and_on_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    uri = "http://me:sec@ret@127.0.0.1:9?password=secret"
    tracker = start(out, {"tracking.uri": uri}, uri=uri)
    tracker.metrics(1, {"loss": 1.0})
    tracker.close("FINISHED")
    with pytest.raises(UserError) as caught:
        sync(out, uri)
    written = "".join(path.read_text() for path in out.iterdir())
    for text in (written, *capsys.readouterr(), str(caught.value)):
        assert "sec" not in text.replace('"seconds"', "")
    assert "127.0.0.1:9" in tracker.uri


@pytest.mark.usefixtures("impatient")
def test_a_uri_that_mlflow_refuses_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = start(tmp_path / "run", uri=f"file:{tmp_path}/mlruns")
    tracker.metrics(1, {"loss": 1.0})
    assert tracker.run_id is None
    tracker.close("FINISHED")
    said = capsys.readouterr().err
    assert "refuses (The filesystem tracking backend" in said and "sqlite:///" in said
    with pytest.raises(UserError, match="refuses"):
        sync(tmp_path / "run")


def test_what_cannot_be_synced(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        sync(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_gone_is_said_and_holds_up_nothing(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = runs / "run"
    tracker = start(out, enabled=False)
    tracker.artifact(out / "never there")
    (out / "a.txt").write_text("a")
    tracker.artifact(out / "a.txt")
    (out / "a.txt").unlink()
    tracker.close("FAILED")
    tracker.close("FINISHED")  # the first one counts
    assert "status FAILED" in sync(out)
    said = capsys.readouterr().err
    assert "no file" in said and "a.txt is gone" in said


def test_the_log_of_a_killed_and_resumed_run_reads_as_one(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    lines = ['{"step": 1, "loss": 3.0}', '{"step": 2, "loss": 2.0}', '{"step": 2, "val/ua": 0.5}']
    (out / "log.jsonl").write_text("\n".join([*lines, '{"step": 3, "lo']))  # killed in the middle of a line
    tracker = Tracker(cfg.TrackingConfig(enabled=False), out, {}, {})
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
    assert all(row.keys() <= {"step", "seconds", "loss", "val/ua"} for row in rows)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"run_id": null}'])
def test_run_ids_of_folders_that_have_none(tmp_path: Path, text: str) -> None:
    assert run_id_of(tmp_path) is None
    (tmp_path / "mlflow.json").write_text(text)
    assert run_id_of(str(tmp_path)) is None
