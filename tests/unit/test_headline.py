"""What an evaluation finds of a training, on the training's own MLflow run; the line that opens its page."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mser_dist.config.file import load_evaluation, to_yaml
from mser_dist.evaluation.headline import headline, last_stage, of_training
from mser_dist.runs import folder, tested
from mser_dist.runs import sync as syncing
from mser_dist.runs.names import Name
from mser_dist.runs.page import page, pages, sweep_page
from mser_dist.runs.record import HEADLINE, run_id_of
from mser_dist.runs.sync import sync
from tests.unit.made_up_runs import answers, evaluate, train, write_clips
from tests.unit.mlflow_runs import client_of, run_of

ROWS = [
    {"model": model, "corpus": "c", "language": one, "seen_language": seen, "ua": ua}
    for model, one, seen, ua in (
        ("stage1", "el", False, 0.25),
        ("stage1", "ru", False, 0.75),
        ("stage1", "de", True, 1.0),
        ("stage1_adapted", "el", False, 0.5),
        ("stage2", "de", True, 0.125),
    )
]


def test_a_model_in_few_numbers() -> None:
    means: dict[Name, float] = {"test/ua_unseen": 0.5, "test/ua_seen": 1.0}
    assert headline(ROWS, "stage1") == means and last_stage(ROWS) == "stage2"
    languages: dict[Name, float] = {
        ("test", "ua", "c", "el"): 0.25,
        ("test", "ua", "c", "ru"): 0.75,
        ("test", "ua", "c", "de"): 1.0,
    }
    assert of_training(ROWS, "stage1") == {**means, **languages, "test/ua_unseen_adapted": 0.5}
    assert headline(ROWS, "stage2")["test/ua_seen"] == 0.125 and "test/ua_unseen" not in headline(ROWS, "stage2")
    assert last_stage([{"model": "svm"}]) is None


@pytest.fixture
def tracked_in() -> dict[str, Any]:
    return {"enabled": True, "experiment": "headline"}


def test_a_trainings_run_gets_what_evaluations_find_and_the_last_one_counts(
    runs: Path, tracked_in: dict[str, Any]
) -> None:
    shards, out = write_clips(runs / "set"), runs / "train"
    train(out, "train.lr=1e-2", **tracked_in)
    found = []
    for name, right in (("one", 0.8), ("two", 0.4)):  # the last one is worse
        evaluate(runs / name, shards, {"stage1": answers(shards, right)}, stages={1: out}, **tracked_in)
        found.append(run_of(runs / name).data.metrics[HEADLINE])
        assert run_of(out).data.metrics[HEADLINE] == found[-1], "at once"
    assert found[0] > found[1]
    history = client_of(runs).get_metric_history(run_id_of(out), HEADLINE)
    assert [(point.step, point.value) for point in sorted(history, key=lambda point: point.timestamp)] == [
        (0, found[0]),
        (0, found[1]),
    ]
    assert "0 of " in sync(out)
    assert len(client_of(runs).get_metric_history(run_id_of(out), HEADLINE)) == 2, "nothing is sent twice"
    run = run_of(out)
    assert run.data.params["train.lr"] == "0.01", "what it can be drawn against"
    assert {"test/ua/made_up/el", "test/ua/made_up/ru"} <= run.data.metrics.keys()
    experiment = client_of(runs).get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experiment.primaryMetric.name"] == HEADLINE
    assert experiment.tags["mlflow.experiment.primaryMetric.greaterIsBetter"] == "true"


def test_the_best_model_on_a_language_is_found(runs: Path, tracked_in: dict[str, Any]) -> None:
    shards, client = write_clips(runs / "set"), client_of(runs)
    for name, right in (("go.od", 0.9), ("bad", 0.3)):  # MLflow takes no point in the name of a model
        train(runs / name, **tracked_in)
        given = {"stage1": answers(shards, right)}
        evaluate(runs / f"{name}-eval", shards, given, stages={1: runs / name}, **tracked_in)
        again = f"0 of {len(run_of(runs / f'{name}-eval').data.metrics)} numbers sent"
        assert "0 of " in sync(runs / f"{name}-eval"), again
    run = run_of(runs / "go.od-eval")
    inputs = {one.dataset.name: one for one in run.inputs.dataset_inputs}
    assert set(inputs) == {"el of made-up", "ru of made-up"} and len(inputs["el of made-up"].dataset.digest) == 16
    assert [tag.value for tag in inputs["el of made-up"].tags] == ["test"]
    where = [run.info.experiment_id]
    greek = [{"dataset_name": "el of made-up"}]
    rows = json.loads((runs / "go.od-eval/report.json").read_text())["zero_shot"]
    (ua,) = (row["ua"] for row in rows if row["language"] == "el")
    found = client.search_logged_models(where, f"metrics.ua >= {ua - 1e-6}", greek)
    assert [one.source_run_id for one in found] == [run_id_of(runs / "go.od")]
    order = [{"field_name": "metrics.ua", "ascending": False, **greek[0]}]
    both = client.search_logged_models(where, order_by=order)
    assert [one.source_run_id for one in both] == [run_id_of(runs / name) for name in ("go.od", "bad")]
    assert both[0].name == "go_od" and both[0].tags["mser.step"] == "1"
    assert run.data.metrics["ua"] == run.data.metrics[HEADLINE], "of the run itself it is the mean"


def test_a_metric_that_somebody_chose_stays_the_first(runs: Path) -> None:
    client = client_of(runs)
    made = client.create_experiment("chosen", tags={"mlflow.experiment.primaryMetric.name": "val/ua"})
    train(runs / "train", enabled=True, experiment="chosen")
    assert client.get_experiment(made).tags["mlflow.experiment.primaryMetric.name"] == "val/ua"


def test_what_a_dead_server_misses_is_sent_later(
    runs: Path, tracked_in: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, out = write_clips(runs / "set"), runs / "train"
    train(out, **tracked_in)

    class Dead(syncing.Sender):
        def connect(self) -> None:
            raise ConnectionError("no route to it")

    with monkeypatch.context() as patched:
        patched.setattr(syncing, "Sender", Dead)
        evaluate(runs / "eval", shards, {"stage1": answers(shards, 0.8)}, stages={1: out}, **tracked_in)
    assert f"`mser sync {out}` sends it later" in capsys.readouterr().err
    assert HEADLINE not in run_of(out).data.metrics
    sync(out)
    assert run_of(out).data.metrics[HEADLINE] == run_of(runs / "eval").data.metrics[HEADLINE]


@pytest.mark.parametrize("how", ["deleted", "unknown"])
def test_a_training_whose_run_is_gone(
    runs: Path, tracked_in: dict[str, Any], capsys: pytest.CaptureFixture[str], how: str
) -> None:
    shards, out = write_clips(runs / "set"), runs / "train"
    train(out, **tracked_in)
    client, gone = client_of(runs), str(run_id_of(out))
    if how == "deleted":
        client.delete_run(gone)
    else:
        path = out / "mlflow.json"
        path.write_text(path.read_text().replace(gone, "0" * 32))
        (out / "config.yaml").unlink()  # else its run is found again by its key
    evaluate(runs / "eval", shards, {"stage1": answers(shards, 0.8)}, stages={1: out}, **tracked_in)
    said = capsys.readouterr().err
    run = run_of(runs / "eval")
    assert run.info.status == "FINISHED" and run.data.metrics["ua"] == run.data.metrics[HEADLINE]
    (model,) = client.search_logged_models([run.info.experiment_id], f"tags.`mser.out` = '{out}'")
    assert model.source_run_id is None and {point.key for point in model.metrics} >= {"ua", "wa"}
    if how == "deleted":
        assert f"was deleted in MLflow, which takes nothing more of it: `mlflow runs restore --run-id {gone}`" in said
        assert "sends it later" not in said and len(said.splitlines()) == 1, said
        client.restore_run(gone)
        sync(out)
        assert run_of(out).data.metrics[HEADLINE] == run.data.metrics[HEADLINE]


def test_results_go_before_another_evaluation_begins(runs: Path) -> None:
    shards, out = write_clips(runs / "set"), runs / "eval"
    run = train(runs / "train")
    evaluate(out, shards, {"stage1": answers(shards, 0.8)}, stages={1: run})
    config = load_evaluation("demo_eval", [f"out={out}", f"stage1={run}", "stage2=null", "batch=7"], runs=False)
    assert (out / "report.json").is_file() and not folder.evaluated(config, [run])
    folder.prepare_evaluation(out, to_yaml(config))  # and it is killed here
    assert not folder.evaluated(config, [run]), "it was never scored"
    assert not {"report.json", "predictions.parquet", "table.txt"} & {path.name for path in out.iterdir()}


def test_a_folder_that_cannot_be_written_and_one_that_is_no_run(
    runs: Path, tracked_in: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    shards, out = write_clips(runs / "set"), runs / "train"
    train(out, **tracked_in)
    (out / tested.FILE).mkdir()  # as root, whom no permission stops
    (runs / "download").mkdir()  # an export alone
    for name, run in (("one", out), ("two", runs / "download")):
        evaluate(runs / name, shards, {"stage1": answers(shards, 0.8)}, stages={1: run}, **tracked_in)
        assert HEADLINE in run_of(runs / name).data.metrics
    assert "its run does not get this evaluation" in capsys.readouterr().err
    assert list((runs / "download").iterdir()) == []


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    tested.note(tmp_path, tmp_path, 3, {"test/ua-x": 0.5, "test/none": float("nan")})
    with (tmp_path / tested.FILE).open("a") as file:
        file.write('{"time": 1}\n[]\n{"time": 1, "st')
    assert [(name, step, value) for name, step, _, value in tested.points(tmp_path)] == [("test/ua_x", 0, 0.5)]


def test_the_line_that_opens_a_page(runs: Path, monkeypatch: pytest.MonkeyPatch, tracked_in: dict[str, Any]) -> None:
    monkeypatch.chdir(runs)
    one, two = (train(runs / name, **tracked_in) for name in ("one", "two"))
    record = json.loads((one / "mlflow.json").read_text())
    where = f"#/experiments/{record['experiment_id']}/runs/{record['run_id']}?workflowType=machine_learning"
    line = page(one)
    assert line and line.endswith(f"ui --backend-store-uri sqlite:///mlflow.db, then http://127.0.0.1:5000/{where}")
    both = pages([one, two])
    assert both and "compare-runs?runs=%5B%22" in both and str(run_id_of(two)) in both
    (one / "mlflow.json").write_text(json.dumps(record | {"tracking_uri": "http://lab:5000/"}))
    assert page(one) == f"MLflow: http://lab:5000/{where}" and pages([one, two]) is None
    assert "tags.%60mlflow.parentRunId%60%20%3D%20%27" in str(sweep_page(one, 1))
    (one / "mlflow.json").write_text(json.dumps(record | {"run_id": None}))
    assert page(one) is None and page(runs / "nowhere") is None
    shutil.rmtree(two)
    assert pages([one, two]) is None
