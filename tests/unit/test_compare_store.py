"""`mser compare --experiment`: what of a real MLflow store is compared, with run folders and without; what is told."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mser_dist.cli import main as cli
from mser_dist.errors import UserError
from mser_dist.evaluation.compare import Comparison, compare
from mser_dist.evaluation.gathered import of_experiment, of_folders
from mser_dist.runs.record import run_id_of
from mser_dist.runs.stored import Store
from tests.unit.made_up_runs import answers, evaluate, train, write_clips
from tests.unit.mlflow_runs import Silent, client_of

EXPERIMENT = "compared"


@pytest.fixture(scope="module")
def made(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trainings, an evaluation of each, and a training that none is of, in a folder with its store."""
    folder = tmp_path_factory.mktemp("stored") / "runs"
    folder.mkdir()
    shutil.copy(prepared, folder / "mlflow.db")
    how: dict[str, Any] = {"enabled": True, "experiment": EXPERIMENT, "uri": f"sqlite:///{folder}/mlflow.db"}
    shards = write_clips(folder.parent / "set")
    for lr, right in (("1e-4", 0.4), ("1e-2", 0.7)):
        trained = train(folder / f"train{lr}", f"train.lr={lr}", **how)
        evaluate(folder / f"eval{lr}", shards, {"stage1": answers(shards, right)}, stages={1: trained}, **how)
    train(folder / "alone", "train.lr=0.5", ua=0.3, **how)
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    """The same elsewhere, to be damaged: MLflow keeps a database open, so that it cannot be put back in its place."""
    here = Path(shutil.copytree(made, tmp_path / "runs"))
    for path in [*here.glob("*/*.json"), *here.glob("*/config.yaml")]:
        path.write_text(path.read_text(encoding="utf-8").replace(str(made), str(here)), encoding="utf-8")
    with closing(sqlite3.connect(here / "mlflow.db")) as database, database:
        for table, column in (("tags", "value"), ("params", "value"), ("runs", "artifact_uri")):
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(made), str(here)))
    return here


def compared(folder: Path) -> Comparison:
    systems, notes = of_experiment(Store(f"sqlite:///{folder}/mlflow.db"), EXPERIMENT)
    return compare(systems, notes=notes)


def told(found: Comparison) -> list[tuple[str, str | None, float, bool]]:
    """Model, learning rate, mean and whether there is an interval, of every row."""
    return [
        (row.model, row.params.get("stage1.train.lr"), row.mean, row.interval is not None)
        for section in found.sections
        for row in section.rows
    ]


def test_an_experiment_is_as_its_folders(made: Path) -> None:
    found = compared(made)
    systems, notes = of_folders([made])
    assert told(found) == told(compare(systems, notes=notes)) and found.notes == []
    assert [(model, lr, between) for model, lr, _, between in told(found)] == [
        ("stage1", "0.01", True),
        ("stage1", "0.0001", True),
        ("stage1", "0.5", False),
    ]
    assert found.sections[0].rows[0].runs[0].run == str(made / "eval1e-2")


def test_without_the_folders_mlflow_has_all_of_it(runs: Path) -> None:
    before = told(compared(runs))
    for folder in ("eval1e-2", "train1e-2", "train1e-4", "alone"):
        shutil.rmtree(runs / folder)
    found = compared(runs)
    assert told(found) == before and found.notes == [] and found.keys == ["stage1.train.lr"]
    assert found.sections[0].rows[0].runs[0].run == str(runs / "eval1e-2"), "many have one name in MLflow"


def test_a_folder_that_is_another_runs_by_now(runs: Path) -> None:
    before = told(compared(runs))
    shutil.rmtree(runs / "train1e-2")
    train(runs / "train1e-2", "train.lr=0.77")
    assert run_id_of(runs / "train1e-2") is None and told(compared(runs)) == before


def test_only_figures_are_left(runs: Path) -> None:
    shutil.rmtree(runs / "eval1e-2")
    shutil.rmtree(runs / "mlartifacts")
    found = compared(runs)
    [section] = [one for one in found.sections if one.title.startswith("without predictions")]
    assert section.metric == "UA, mean over unseen languages" and len(section.rows) == 1
    assert any("eval1e-2 has no predictions" in note for note in found.notes)


def test_what_is_deleted_is_left_out(runs: Path) -> None:
    client = client_of(runs)
    client.delete_run(run_id_of(runs / "eval1e-4"))
    assert [lr for _, lr, _, _ in told(compared(runs))] == ["0.01", "0.0001", "0.5"], "by its validation"
    client.delete_run(run_id_of(runs / "train1e-2"))
    shutil.rmtree(runs / "train1e-2")
    found = compared(runs)
    assert told(found)[0][:2] == ("stage1", None)
    assert any("eval1e-2 is not there: its parameters are not known" in note for note in found.notes)
    for name in ("eval1e-2", "train1e-4", "alone"):
        client.delete_run(run_id_of(runs / name))
    with pytest.raises(UserError, match="has no run that is not deleted: name another one"):
        compared(runs)
    client.delete_experiment(client.get_experiment_by_name(EXPERIMENT).experiment_id)
    with pytest.raises(UserError, match="was deleted: `mlflow experiments restore -x"):
        compared(runs)


def test_runs_of_others_and_those_that_go_on(runs: Path) -> None:
    client = client_of(runs)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    foreign = client.create_run(experiment, run_name="somebody's")
    client.log_param(foreign.info.run_id, "train.lr", "9")
    client.update_run(run_id_of(runs / "eval1e-4"), status="RUNNING")
    found = compared(runs)
    assert "1 run of the experiment left out: not of mser" in found.notes
    assert f"{runs / 'eval1e-4'} is left out: not FINISHED in MLflow" in found.notes
    assert [lr for _, lr, _, _ in told(found)] == ["0.01", "0.0001", "0.5"]
    other = client.create_experiment("somebody else's")
    client.create_run(other)
    with pytest.raises(UserError, match="has 1 run, none of them of mser: name another one"):
        of_experiment(Store(f"sqlite:///{runs}/mlflow.db"), "somebody else's")
    assert told(compared(runs)) and of_experiment(Store(f"sqlite:///{runs}/mlflow.db"), experiment)[0], "by its id"


@pytest.mark.parametrize("tag", [None, "eval"])
def test_a_link_to_a_run_that_is_no_training(runs: Path, tag: str | None) -> None:
    client = client_of(runs)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    foreign = client.create_run(experiment, run_name="somebody's", tags={"mser.stage": tag} if tag else {})
    client.set_tag(run_id_of(runs / "eval1e-2"), "mser.stage1_run_id", foreign.info.run_id)
    found = compared(runs)
    assert told(found)[0][:2] == ("stage1", None)
    assert any("its parameters are not known" in note for note in found.notes)


def test_a_training_of_another_experiment(runs: Path) -> None:
    shutil.rmtree(runs / "train1e-2")
    client = client_of(runs)
    elsewhere = client.create_experiment("elsewhere")
    with closing(sqlite3.connect(runs / "mlflow.db")) as database, database:
        database.execute(
            "UPDATE runs SET experiment_id = ? WHERE run_uuid = ?", (int(elsewhere), _link(client, runs / "eval1e-2"))
        )
    found = compared(runs)
    assert told(found)[0][:2] == ("stage1", "0.01") and found.notes == []


def _link(client: object, folder: Path) -> str:
    return str(client.get_run(run_id_of(folder)).data.tags["mser.stage1_run_id"])  # type: ignore[attr-defined]


def test_stores_that_refuse(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    Path("text.db").write_text("no database")
    silent = Silent()
    try:
        for uri, name, says in (
            (
                "sqlite:///nowhere.db",
                EXPERIMENT,
                "the MLflow store sqlite:///nowhere.db is not there: name that of the",
            ),
            ("sqlite:///text.db", EXPERIMENT, "the MLflow store sqlite:///text.db is no sqlite database"),
            ("http://me:secret@127.0.0.1:9", EXPERIMENT, "MLflow at http://127.0.0.1:9 does not answer ("),
            (silent.uri, EXPERIMENT, f"MLflow at {silent.uri} does not answer ("),
            (f"sqlite:///{made}/mlflow.db", "compare", "has no experiment 'compare': did you mean 'compared'?"),
            (f"sqlite:///{made}/mlflow.db", "xyz", "has no experiment 'xyz': it has '"),
        ):
            assert cli.main(["compare", "--experiment", name, "--uri", uri]) == 2
            error = capsys.readouterr().err
            assert says in error and "secret" not in error and len(error.splitlines()) == 1, error
    finally:
        silent.stop()
    assert not Path("nowhere.db").exists(), "reading makes no store"
    assert cli.main(["compare", "--experiment", EXPERIMENT]) == 2
    assert "the MLflow store sqlite:///runs/mlflow.db is not there" in capsys.readouterr().err


def test_a_page_that_is_shared_holds_no_password(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mser_dist.cli import compare as verb
    from mser_dist.cli.main import _options

    words = ["compare", "--experiment", "e", "--uri", "postgresql://me:secret@host/db", "--out", "x", "--common"]
    assert verb._command(_options(words)) == (
        "mser compare --experiment e --uri postgresql://host/db --metric ua --out x --common"
    )
