"""Sweeps: which words make which runs, and the MLflow run that they are children of."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mser_dist.config import Stage1
from mser_dist.config.file import to_yaml
from mser_dist.errors import UserError
from mser_dist.files import read_json, write_json
from mser_dist.jobs import launch, ranked, sweep
from mser_dist.ranks.distributed import free_port
from mser_dist.runs.record import run_id_of
from mser_dist.shards.shard_set import ShardSet
from tests.unit.made_up_runs import LABELS, answers, evaluate, train, write_clips
from tests.unit.mlflow_runs import client_of

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
    client = client_of(tmp_path / "runs")
    (experiment,) = (e for e in client.search_experiments() if e.name == "mser-demo")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`mser.sweep` = '{tmp_path}/runs/x'")
    assert parents == {f"{tmp_path}/runs/x/sweep"} and run_id_of(f"{tmp_path}/runs/x/sweep") == run.info.run_id
    assert run.info.run_name == "x" and run.info.status == "RUNNING"
    assert run.data.params == {"seed": "0,1"} and "seed=0,1,2" in run.data.tags["mlflow.note.content"]


def test_a_dead_mlflow_does_not_hold_up_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    planned = sweep.trials("demo_stage1", [*BASE, "seed=0,1", f"tracking.uri=http://127.0.0.1:{free_port()}"])
    sweep.join(planned)
    assert "have no parent there" in capfd.readouterr().err
    assert {trial.config.tracking.parent for trial in planned} == {f"{tmp_path}/runs/x/sweep"}, "for when it answers"


def test_tracking_that_is_off_stays_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep.join(sweep.trials("demo_stage1", [*BASE, "seed=0,1", "tracking.enabled=false"]))
    assert not list(tmp_path.rglob("*mlflow*"))


def test_the_folder_of_a_run_is_no_folder_for_a_sweep(tmp_path: Path) -> None:
    planned = sweep.trials("demo_stage1", ["data.sets=shards", f"out={tmp_path}", "seed=0,1"])
    (tmp_path / "config.yaml").write_text(to_yaml(planned[0].config))
    with pytest.raises(UserError, match="holds a run"):
        sweep.join(planned)


# ---- the ranking


def made(folder: Path, name: str, scores: dict[str, float], **values: str) -> ranked.Outcome:
    return ranked.Outcome(name, values, folder / name, None, f"mser train {name}", scores, ended=True)


def unseen(folder: Path, name: str, **ua: float) -> ranked.Outcome:
    """An evaluation that found these UAs; of languages in capitals, which the training had heard."""
    rows = [
        {"model": "stage1", "corpus": "c", "language": key.lower(), "seen_language": key.isupper(), "ua": value}
        | {"ua_low": None, "ua_high": None}
        for key, value in ua.items()
    ]
    return replace(made(folder, name, {}, sets=name), rows=rows)


def test_the_best_is_first_and_what_failed_is_last(tmp_path: Path) -> None:
    found = ranked.rank(
        [
            made(tmp_path, "a", {"ua": 0.25, "wa": 0.5}, lr="1"),
            ranked.Outcome("b", {"lr": "2"}, tmp_path, None, "", failed="job 3: no data"),
            made(tmp_path, "c", {"ua": 0.5, "wa": 0.25}, lr="3"),
            made(tmp_path, "d", {"ua": float("nan"), "wa": 0.25}, lr="4"),
        ]
    )
    lines = [line.split() for line in str(found.table()).splitlines()]
    assert [line[1] for line in lines[2:]] == ["c", "a", "d", "job"], lines
    assert lines[0] == ["run", "validation", "UA", "WA", "failed"] and lines[5] == ["b", "job", "3:", "no", "data"]
    assert found.winner() == [f"best: c, in {tmp_path}/c", "  to repeat it: mser train c"]
    assert (found.left, found.failed) == (0, 1)


def test_seeds_count_together(tmp_path: Path) -> None:
    given = (("1", "0", 0.9), ("1", "1", 0.1), ("2", "0", 0.6), ("2", "1", 0.7))
    found = ranked.rank([made(tmp_path, f"{lr}/{seed}", {"ua": ua}, lr=lr, seed=seed) for lr, seed, ua in given])
    assert [one.name for one in found.outcomes] == ["2/1", "2/0", "1/0", "1/1"], "0.9 was luck"
    assert "0.650 of 2" in str(found.table())


def test_evaluations_are_ranked_by_what_is_unseen_in_all(tmp_path: Path) -> None:
    given = (
        unseen(tmp_path, "all", EN=0.9, DE=0.9, EL=0.9),
        unseen(tmp_path, "en", EN=0.9, de=0.8, el=0.5),  # .65 of its own
        unseen(tmp_path, "en,de", EN=0.9, DE=0.9, el=0.6),
    )
    found = ranked.rank(given)
    assert [one.name for one in found.outcomes] == ["en,de", "en", "all"] and found.left == 0
    assert [one.score for one in found.outcomes] == [0.6, 0.5, float("-inf")]
    assert [one.scores["ua_seen"] for one in found.outcomes] == [0.9, 0.9, 0.9], "over en alone"
    lines = "\n".join(found.winner())
    assert "the mean is over el of c, unseen in all runs that have any; left out: de of c" in lines
    assert "nothing is unseen to all: ranked last" in lines and "best: en,de" in lines and "–" in str(found.table())
    assert ranked.rank(given[1:2]).outcomes[0].score == pytest.approx(0.65), "alone it is its own"
    found = ranked.rank([unseen(tmp_path, "a", de=0.8, EL=0.7), unseen(tmp_path, "b", el=0.9, DE=0.7)])
    assert found.best is None and "no corpus and language is unseen in all runs" in found.winner()[0]
    leaky = [{**row, "leaks": "stage 1 heard 3 clips"} if row["language"] == "de" else row for row in given[1].rows]
    found = ranked.rank([replace(given[1], rows=leaky)])
    assert found.best and found.best.score == 0.5 and "without de of c (it leaks)" in found.notes[0]
    found = ranked.rank([unseen(tmp_path, "a", DE=0.8), unseen(tmp_path, "b", DE=0.9)])
    assert found.best and found.best.name == "b" and found.notes == [], "of what all have heard"


def planned_trainings(tmp_path: Path, *words: str) -> list[sweep.Trial]:
    off = "tracking.enabled=false"
    return sweep.trials("demo_stage1", ["data.sets=shards", f"out={tmp_path}/x", "seed=0,1", off, *words])


def test_a_sweep_without_validation_ends(tmp_path: Path) -> None:
    planned = planned_trainings(tmp_path)
    sweep.join(planned)
    for trial in planned:
        train(Path(trial.config.out), ua=None)
    found = ranked.settle(tmp_path / "x")
    assert (found.left, found.best) == (0, None) and "seed=1" in str(found.table())


def test_a_temperature_is_no_score(tmp_path: Path) -> None:
    planned = planned_trainings(tmp_path)
    sweep.join(planned)
    for trial in planned:
        train(Path(trial.config.out))
        path = Path(trial.config.out) / "summary.json"
        summary = read_json(path)
        write_json(path, summary | {"validation": {"temperature": 1.5} | summary["validation"]})
    found = ranked.settle(tmp_path / "x")
    assert "temperature" not in str(found.table()) and found.best and found.best.score == 0.5


def test_what_is_to_be_longer_has_not_ended(tmp_path: Path) -> None:
    for epochs in (5, 9):
        planned = planned_trainings(tmp_path, f"train.epochs={epochs}")
        sweep.join(planned)
        assert ranked.settle(tmp_path / "x").left == 2, "the old results are of a shorter run"
        for trial in planned:
            train(Path(trial.config.out), *as_words(trial.config))
        assert ranked.settle(tmp_path / "x").left == 0
    sweep.join(planned)
    assert ranked.settle(tmp_path / "x").left == 0, "there is nothing to do"


# ---- an evaluation behind each run


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return write_clips(tmp_path / "set")


def evaluated_trials(tmp_path: Path, *words: str) -> list[sweep.Trial]:
    words = (f"data.sets={tmp_path}/set", f"out={tmp_path}/runs/lr", "lr=1e-4,1e-2", *words)
    labels = f"eval.data.labels=[{','.join(LABELS)}]"
    return sweep.trials("demo_stage1", [*words, f"eval.data.sets={tmp_path}/set", labels], "demo_eval")


@pytest.mark.usefixtures("shards")
def test_each_run_has_an_evaluation_of_its_own(tmp_path: Path) -> None:
    first, second = evaluated_trials(tmp_path, "eval.batch=7")
    assert first.evaluation and second.evaluation
    assert (first.evaluation.stage1, first.evaluation.stage2) == (f"{tmp_path}/runs/lr/lr=1e-4", None)
    assert first.evaluation.out == f"{tmp_path}/runs/lr/lr=1e-4-eval" and first.evaluation.batch == 7
    assert first.evaluation.tracking.experiment == first.config.tracking.experiment


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize(
    ("words", "evaluate", "says"),
    [
        (["eval.batch=7"], None, "add --evaluate EVAL"),
        (["eval.out=x"], "demo_eval", "eval.out is what the sweep sets"),
        (["eval.stage1=x"], "demo_eval", "eval.stage1 is what the sweep sets"),
        (["eval.bach=7"], "demo_eval", "did you mean batch"),
        ([], "demo_stage1", "this is a config for mser train"),
        (["eval.data.labels=[anger,hapy]"], "demo_eval", "data.labels names 'hapy'"),
    ],
)
def test_mistakes_in_the_evaluation_show_before_any_training(
    tmp_path: Path, words: list[str], evaluate: str | None, says: str
) -> None:
    base = [f"data.sets={tmp_path}/set", "out=x", "seed=0,1"]
    on = [f"eval.data.sets={tmp_path}/set"] if evaluate == "demo_eval" else []
    with pytest.raises(UserError) as refused:
        sweep.check_evaluation(sweep.trials("demo_stage1", [*base, *on, *words], evaluate))
    assert says in str(refused.value)


def test_a_sweep_is_ranked_in_its_folder_and_in_mlflow(
    tmp_path: Path, shards: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = evaluated_trials(tmp_path)
    out, store = tmp_path / "runs/lr", client_of(tmp_path / "runs")
    sweep.join(planned, command="mser sweep …")
    assert sweep.is_done(planned[0]) is False and ranked.settle(out).left == 2
    parent = str(run_id_of(out / "sweep"))
    assert store.get_run(parent).info.status == "RUNNING"
    how: dict[str, Any] = {"enabled": True, "experiment": "mser-demo"}
    for trial, right in zip(planned, (0.3, 0.7), strict=True):
        assert trial.evaluation
        assert trial.config.tracking.parent == trial.evaluation.tracking.parent == str(out / "sweep")
        trained = train(Path(trial.config.out), *as_words(trial.config), **how)
        given = {"stage1": answers(shards, right)}
        evaluate(Path(trial.evaluation.out), shards, given, *as_words(trial.evaluation), stages={1: trained}, **how)
    ranking = ranked.settle(out)
    assert [one.name for one in ranking.outcomes] == ["lr=1e-2", "lr=1e-4"] and ranking.left == 0
    assert ranking.outcomes[0].interval and ranking.outcomes[0].scores["ua"] == 0.5
    assert all(map(sweep.is_done, planned)), "the same command has nothing left to do"
    table = (out / "sweep/table.txt").read_text()
    summary = out / "lr=1e-2/summary.json"
    os.utime(summary, ns=(time.time_ns(),) * 2)
    assert ranked.outcome(read_json(out / "sweep/trials.json")[1]).ended is False, "it was trained anew"
    summary.unlink()
    assert ranked.outcome(read_json(out / "sweep/trials.json")[1]).ended is False, "it is being trained"
    assert not sweep.is_done(planned[1])
    assert "to repeat it: mser train demo_stage1" in table and f"out={out}/lr=1e-2" in table
    run = store.get_run(parent)
    assert run.info.status == "FINISHED" and table.strip() in run.data.tags["mlflow.note.content"]
    assert run.data.tags["mser.best_trial"] == "lr=1e-2" and run.data.tags["mser.best.train.lr"] == "1e-2"
    assert run.data.tags["mser.best_run_id"] == run_id_of(out / "lr=1e-2")
    assert run.data.metrics["best/ua_unseen"] == ranking.outcomes[0].score
    there = {file.path for file in store.list_artifacts(parent)}
    assert there >= {"table.txt", "trials.table.json", "compare.png", "compare.html"}
    assert "train.lr" in (out / "sweep/compare.svg").read_text(), "drawn against what was swept"


def as_words(config: launch.Config) -> list[str]:
    """Words that make the same config of the preset again."""
    said = config.said  # type: ignore[union-attr]
    return [word for word in said.words if not word.startswith(("out=", "stage", "data.labels="))]


def test_the_array_of_a_sweep() -> None:
    planned = sweep.trials("demo_stage1", [*BASE, "seed=0,1,2"])
    text = launch.script([trial.config for trial in planned], launch.Resources(), name="mser-sweep", parallel=2)
    assert "#SBATCH --array=0-2%2" in text
