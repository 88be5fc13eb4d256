"""Sweeps: which words make which runs, and the MLflow run that they are children of."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from mser_dist.config import Stage1
from mser_dist.config.file import to_yaml
from mser_dist.errors import UserError
from mser_dist.jobs import launch, sweep
from mser_dist.ranks.distributed import free_port

BASE = ["data.sets=shards", "out=runs/x"]


def names(*words: str, config: str = "demo_stage1") -> list[str]:
    return [trial.name for trial in sweep.trials(config, [*BASE, *words])]


def test_every_combination_is_a_run_in_its_own_folder() -> None:
    found = sweep.trials("demo_stage1", [*BASE, "lr=1e-4,3e-4", "seed=0,1", "train.epochs=2"])
    assert [trial.name for trial in found] == ["lr=1e-4_seed=0", "lr=1e-4_seed=1", "lr=3e-4_seed=0", "lr=3e-4_seed=1"]
    configs = [trial.config for trial in found if isinstance(trial.config, Stage1)]
    assert [(one.train.lr, one.seed) for one in configs] == [(1e-4, 0), (1e-4, 1), (3e-4, 0), (3e-4, 1)]
    assert all(one.train.epochs == 2 for one in configs)
    assert found[1].config.out == "runs/x/lr=1e-4_seed=1" and found[1].config.tracking.run_name == "lr=1e-4_seed=1"
    assert found[1].values == {"train.lr": "1e-4", "seed": "1"}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("train.betas=[0.9, 0.98],[0.9, 0.999]", ["betas=0.9-0.98", "betas=0.9-0.999"]),
        ("encoder.arch={a: 1, b: 2},{a: 64}", ["arch=a-1-b-2", "arch=a-64"]),
        ("tracking.experiment='a,b',c", ["experiment=a-b", "experiment=c"]),
        ("init_from=null,runs/it's/here", ["init_from=null", "init_from=runs-it-s-here"]),
    ],
)  # fmt: skip
def test_commas_in_brackets_and_quotes_do_not_separate(word: str, expected: list[str]) -> None:
    assert names(word) == expected


def test_a_list_is_swept_by_bracketed_lists_only() -> None:
    found = sweep.trials("demo_stage1", ["out=x", "data.sets=a,b", "seed=0,1"])
    assert [trial.config.data.sets for trial in found] == [["a", "b"], ["a", "b"]]
    found = sweep.trials("demo_stage1", ["out=x", "data.sets=[a],[a,b]"])
    assert [trial.config.data.sets for trial in found] == [["a"], ["a", "b"]]


def test_keys_of_one_ending_are_told_apart() -> None:
    assert names("qformer.width=4,8", "contrastive.width=2,3")[0] == "qformer.width=4_contrastive.width=2"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seed=0"], "nothing to sweep"),
        (["width=4,8"], "width may be qformer.width or contrastive.width"),
        (["lrr=1,2"], "unknown key lrr: did you mean train.lr?"),
        (["train.lrr=1,2"], "did you mean train.lr?"),
        (["seed=0,1", "seed=2"], "seed is given twice"),
        (["lr=1,2", "train.lr=3"], "train.lr is given twice"),
        (["seed=0,0"], "is a value given twice?"),
        (["seed=0,,1"], "a value between the commas is missing"),
        (["out=a,b"], "out is given twice"),
        (["stage=1,2"], "stage cannot be swept"),
        (["seed=0,x"], "seed must be of type int, not 'x'"),
        (["seed"], "is not key=value"),
    ],
)
def test_mistakes_are_named(words: list[str], says: str) -> None:
    with pytest.raises(UserError) as refused:
        names(*words)
    assert says in str(refused.value)


def test_evaluations_can_be_swept() -> None:
    words = ["data.sets=shards", "stage1=runs/a,runs/b", "stage2=null", "out=e"]
    assert [trial.name for trial in sweep.trials("demo_eval", words)] == ["stage1=runs-a", "stage1=runs-b"]


def test_an_impossible_run_stops_the_whole_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="does not divide"):
        sweep.sweep("demo_stage1", [*BASE, "train.global_batch=8,9"], cluster="local", tasks_per_node=2)
    assert not list(tmp_path.iterdir())


# ---- MLflow


def test_the_runs_are_children_of_one_mlflow_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in ("seed=0,1", "seed=0,1,2"):  # submitted again, with one more: the same parent
        planned = sweep.trials("demo_stage1", [*BASE, words])
        sweep.join(planned)
    parents = {trial.config.tracking.parent for trial in planned}
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "mser-demo")
    (run,) = client.search_runs([experiment.experiment_id])
    assert parents == {run.info.run_id} and run.info.run_name == "x" and run.info.status == "FINISHED"
    assert run.data.params == {"seed": "0,1"} and "seed=0,1,2" in run.data.tags["mlflow.note.content"]


def test_a_dead_mlflow_does_not_hold_up_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    planned = sweep.trials("demo_stage1", [*BASE, "seed=0,1", f"tracking.uri=http://127.0.0.1:{free_port()}"])
    sweep.join(planned)
    assert "have no parent there" in capfd.readouterr().err
    assert {trial.config.tracking.parent for trial in planned} == {None}


def test_tracking_that_is_off_stays_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep.join(sweep.trials("demo_stage1", [*BASE, "seed=0,1", "tracking.enabled=false"]))
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_run_is_no_folder_for_a_sweep(tmp_path: Path) -> None:
    planned = sweep.trials("demo_stage1", ["data.sets=shards", f"out={tmp_path}", "seed=0,1"])
    (tmp_path / "config.yaml").write_text(to_yaml(planned[0].config))
    with pytest.raises(UserError, match="holds a run"):
        sweep.join(planned)


# ---- the table


def test_the_table_has_a_line_for_each_run() -> None:
    planned = sweep.trials("demo_stage1", [*BASE, "seed=0,1"])
    done = {"validation": {"ua": 0.5, "wa": 0.25}}
    lines = [line.split() for line in str(sweep.results_table(planned, [done, done])).splitlines()]
    assert lines[0] == ["run", "ua", "wa"] and lines[3] == ["seed=1", "0.500", "0.250"]
    table = sweep.results_table(planned, [done, UserError("job 3: no data")])
    lines = [line.split() for line in str(table).splitlines()]
    assert lines[0] == ["run", "ua", "wa", "failed"]
    assert lines[2] == ["seed=0", "0.500", "0.250"] and lines[3] == ["seed=1", "job", "3:", "no", "data"]


def test_an_evaluation_is_told_by_its_mean_uas() -> None:
    rows = [
        {"model": f"stage{stage}", "stage": stage, "seen_language": seen, "ua": ua}
        for stage, seen, ua in ((1, False, 0.9), (2, False, 0.2), (2, False, 0.4), (2, True, 0.7))
    ]
    assert sweep.scores({"zero_shot": rows}) == pytest.approx({"ua_unseen": 0.3, "ua_seen": 0.7})


def test_the_array_of_a_sweep() -> None:
    planned = sweep.trials("demo_stage1", [*BASE, "seed=0,1,2"])
    text = launch.script([trial.config for trial in planned], launch.Resources(), name="mser-sweep", parallel=2)
    assert "#SBATCH --array=0-2%2" in text
