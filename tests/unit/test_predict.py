"""A trained model asked about recordings: files, arrays, folders and shards; labels of any words; windows; a stop."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas  # mlflow brings it
import pytest
import soundfile
import torch

import mser_dist
from mser_dist.cli import main as cli
from mser_dist.errors import UserError
from mser_dist.prediction import job
from mser_dist.prediction.model import Model, Prediction
from mser_dist.prediction.recordings import listed
from mser_dist.prediction.windows import Windows, together
from tests.tiny_runs import ROOT
from tests.unit import tiny_exports
from tests.unit.made_up_set import write_set
from tests.unit.tiny_exports import LABELS, wave


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny_exports.stage1(folder / "one")
    tiny_exports.stage2(folder / "two")
    tiny_exports.recordings(folder / "rec")
    return folder


@pytest.fixture(scope="module", params=[1, 2])
def model(request: pytest.FixtureRequest, runs: Path) -> Model:
    return mser_dist.load_model(runs / ("one" if request.param == 1 else "two"))


def same(one: dict[str, float], other: dict[str, float], within: float = 1e-5) -> bool:
    return one.keys() == other.keys() and all(abs(one[name] - other[name]) < within for name in one)


def test_a_recording_is_the_same_by_whatever_way_it_comes(model: Model, runs: Path) -> None:
    path = runs / "rec/r0.wav"
    sound, rate = soundfile.read(path, dtype="int16")
    found: Prediction = model.predict(path)
    assert set(found.probabilities) == set(LABELS) and sum(found.probabilities.values()) == pytest.approx(1)
    assert found.label == max(found.probabilities, key=found.probabilities.__getitem__)
    assert [(w.begin, w.end) for w in found.timeline] == [(0.0, found.seconds)] and found.seconds == 1.0
    ways: list[Any] = [str(path), path.read_bytes(), sound, torch.from_numpy(sound) / 32768, np.stack([sound] * 2)]
    for way in ways:
        assert same(model.predict(way, sampling_rate=rate).probabilities, found.probabilities)
    both = model.predict([path, runs / "rec/r1.flac"])
    assert same(both[0].probabilities, found.probabilities), "what else is asked for does not matter"
    with pytest.raises(UserError, match="give sampling_rate="):
        model.predict(sound)
    with pytest.raises(UserError, match=r"rec/gone\.wav: there is no such file"):
        model.predict(runs / "rec/gone.wav")


def test_any_words_are_labels(model: Model, runs: Path) -> None:
    found = model.predict(runs / "rec/r0.wav", labels=["furious", "quite calm"])
    assert set(found.probabilities) == {"furious", "quite calm"}
    for labels, says in (([], "no word"), (["sad", "sad"], "'sad' twice"), ("sad", "give a list"), ([" "], "no word")):
        with pytest.raises(UserError, match=says):
            model.predict(runs / "rec/r0.wav", labels=labels)


def test_a_temperature_flattens(runs: Path, tmp_path: Path) -> None:
    for make, name in ((tiny_exports.stage1, "one"), (tiny_exports.stage2, "two")):
        plain = mser_dist.load_model(runs / name).predict(runs / "rec/r0.wav").probabilities
        flat = mser_dist.load_model(make(tmp_path / name, temperature=2.0)).predict(runs / "rec/r0.wav").probabilities
        logs = {label: np.log(plain[label]) / 2 for label in plain}
        total = sum(np.exp(value) for value in logs.values())
        assert same(flat, {label: float(np.exp(value) / total) for label, value in logs.items()}, 1e-4)


def test_a_long_recording_is_heard_in_windows(model: Model, runs: Path) -> None:
    long = wave(5.0, 3)
    found = model.predict(long, sampling_rate=16000, window=2.0)
    assert [(w.begin, w.end) for w in found.timeline] == [(0, 2), (2, 4), (3, 5)]
    alone = model.predict(long[32000:64000], sampling_rate=16000)
    assert same(found.timeline[1].probabilities, alone.probabilities)
    # Between 3 and 4 s two windows speak: each counts half there.
    rows = [w.probabilities for w in found.timeline]
    mean = {name: (2 * rows[0][name] + 1.5 * rows[1][name] + 1.5 * rows[2][name]) / 5 for name in LABELS}
    assert same(found.probabilities, mean)
    assert model.embed(long, sampling_rate=16000, window=2.0).shape == model.embed(long, sampling_rate=16000).shape
    with pytest.raises(UserError, match="the encoder hears 30 s at most"):
        model.predict(long, sampling_rate=16000, window=31)
    with pytest.raises(UserError, match="no longer than a window"):
        model.predict(long, sampling_rate=16000, window=2, hop=3)


def test_windows_cover_all() -> None:
    assert Windows(1.0, 1.0).cut(16000) == [(0, 16000)]
    assert Windows(1.0, 0.5).cut(30000) == [(0, 16000), (8000, 24000), (14000, 30000)]
    assert Windows(1.0, 1.0).cut(48000) == [(0, 16000), (16000, 32000), (32000, 48000)]
    assert together([(0.0, 1.0), (1.0, 2.0)], np.array([[1.0, 0.0], [0.0, 1.0]])).tolist() == [0.5, 0.5]


def test_embeddings(model: Model, runs: Path) -> None:
    files = sorted((runs / "rec").iterdir())
    vectors = model.embed(files)
    assert vectors.shape == (4, 8 if model.stage == 1 else 16) and vectors.dtype == np.float32
    if model.stage == 1:
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(model.embed(files[1]), vectors[1], atol=1e-5)


def test_a_model_adapts_to_recordings(runs: Path, tmp_path: Path) -> None:
    model = mser_dist.load_model(runs / "two")
    files = sorted((runs / "rec").iterdir())
    before = model.predict(files[0]).probabilities
    model.adapt(files)
    assert not same(model.predict(files[0]).probabilities, before, 1e-6)
    plain = mser_dist.load_model(tiny_exports.stage1(tmp_path / "plain", normalize="none"))
    with pytest.raises(UserError, match="its features are not normalised"):
        plain.adapt(files)


# ---- the command


@pytest.fixture
def here(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(runs)
    yield runs


def mser(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main([*map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_what_is_no_audio_is_left_out(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "many"
    tiny_exports.recordings(folder / "below")
    (folder / "broken.wav").write_bytes(b"RIFF no audio")
    (folder / "notes.txt").write_text("not asked for")
    files = [tmp_path / f"out.{kind}" for kind in ("json", "csv", "parquet")]
    words = [word for file in files for word in (f"--{file.suffix[1:]}", file)]
    code, out, error = mser(capsys, "predict", "two", folder, "--window", 2, *words)
    assert code == 0 and out.startswith("4 recordings, 1 left out: ")
    assert "left out: " in error and "broken.wav: not readable as audio" in error and "notes" not in error
    plain = json.loads(files[0].read_text())
    assert [Path(one["recording"]).name for one in plain] == ["r0.wav", "r1.flac", "r2.mp3", "r3.ogg", "broken.wav"]
    assert plain[-1].keys() == {"recording", "error"} and len(plain[3]["timeline"]) == 3
    csv, parquet = pandas.read_csv(files[1]), pandas.read_parquet(files[2])
    assert len(csv) == len(parquet) == 5 + 3 and not [*tmp_path.glob("*.partial")]
    for table in (csv, parquet):
        whole = table[table["window"].isna() & table["error"].isna()]
        for row, one in zip(whole.to_dict("records"), plain, strict=False):
            assert row["label"] == one["label"]
            assert same({name: row[f"p_{name}"] for name in LABELS}, one["probabilities"])
    code, out, error = mser(capsys, "predict", "two", folder / "broken.wav")
    assert code == 2 and "none of the recordings (1) can be read" in error.splitlines()[-1]


def test_a_table_on_the_terminal(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = mser(capsys, "predict", "one", "rec/r0.wav", "--top", 2, "--labels", "calm, furious,bored")
    assert code == 0 and len(out.splitlines()) == 3
    line = out.splitlines()[2].split()
    assert line[:3] == ["rec/r0.wav", "1.0", "s"] and len(line) == 3 + 2 * 2


def test_shards_are_answered_as_an_evaluation_answers_them(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path / "set")
    words = ["data.labels=[anger,happy,sad]", f"data.sets={tmp_path / 'set'}", "data.split=all", "data.workers=0"]
    words += ["tracking.enabled=false", f"out={tmp_path / 'eval'}"]
    code, _, error = mser(capsys, "eval", "demo_eval", "stage1=one", "stage2=two", *words)
    assert code == 0, error
    evaluated = pandas.read_parquet(tmp_path / "eval/predictions.parquet")
    for stage in ("one", "two"):
        file = tmp_path / f"{stage}.parquet"
        assert mser(capsys, "predict", stage, tmp_path / "set", "--parquet", file)[0] == 0
        mine = pandas.read_parquet(file)
        mine = mine.assign(key=mine["recording"].str.rpartition("/")[2]).set_index("key")
        theirs = evaluated[evaluated["model"] == f"stage{1 if stage == 'one' else 2}"].set_index("key")
        assert len(theirs) and mine.loc[theirs.index, "label"].tolist() == theirs["predicted"].tolist()


def test_what_was_stopped_goes_on(here: Path, tmp_path: Path) -> None:
    """Killed after some windows: the same command does the others alone, and its file is as if nothing had been."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(6):
        soundfile.write(folder / f"{number}.wav", wave(2.5, number), 16000)
    model = mser_dist.load_model("two")
    recordings = listed([str(folder)])
    asked = job.Asked(LABELS, model.windows(1.0), batch=2)
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    job.predict(model, recordings, asked, [whole])
    heard = []

    class Stop(Exception):
        pass

    class Interrupted(Model):
        limit = 5

        def probabilities(self, *given: Any) -> Iterator[Any]:
            for number, rows in enumerate(super().probabilities(*given)):
                if number == self.limit:
                    raise Stop
                heard.append(len(rows))
                yield rows

    stopped = Interrupted(model.export, "cpu", "float32")
    with pytest.raises(Stop):
        job.predict(stopped, recordings, asked, [cut])
    assert not cut.exists() and sum(heard) == 10
    with (tmp_path / "cut.json.partial").open("a") as file:
        file.write('{"recording": "half a li')  # what a kill leaves
    kept = (tmp_path / "cut.json.partial").read_bytes()
    with pytest.raises(UserError, match=r"cut.json.partial is of a command that was stopped .* other labels"):
        job.predict(stopped, recordings, job.Asked(["calm", "sad"], asked.windows), [cut])
    assert (tmp_path / "cut.json.partial").read_bytes() == kept, "nothing of it is lost"
    heard.clear()
    Interrupted.limit = 99
    job.predict(stopped, recordings, asked, [cut])
    assert sum(heard) == 6 * 3 - 10 and json.loads(cut.read_text()) == json.loads(whole.read_text())
    heard.clear()
    job.predict(stopped, recordings, job.Asked(["calm", "sad"], asked.windows), [cut])
    assert sum(heard) == 18, "another question is another answer"


def test_bad_words_are_one_line(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "begun/checkpoints").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for words, says in (
        (["nowhere", "rec"], "there is no such model"),
        ([tmp_path / "begun", "rec"], "the run has no export yet"),
        ([tmp_path, "rec"], "holds no model"),
        (["two", "rec/r9.wav"], "there is no such file or folder"),
        (["two", tmp_path / "empty"], "no file in this folder has the name of an audio file"),
        (["two", "rec", "--labels", "sad,"], "names no word"),
        (["two", "rec", "--csv", "a.txt"], "ends with .csv"),
        (["two", "rec", "--top", "0"], "--top must be 1 or more"),
        (["two", "rec", "--device", "warp"], "device=warp cannot be used"),
        (["models:/nobody@best", "rec"], "models:/nobody@best is not to be had from MLflow"),
        (["runs:/0123", "rec"], "runs:/0123 is not to be had from MLflow"),
    ):
        code, _, error = mser(capsys, "predict", *words)
        assert code == 2 and says in error.splitlines()[-1], error
        assert error.splitlines()[-1].startswith("mser: error: ")


def test_a_cold_process_imports_neither_deepspeed_nor_mlflow(here: Path) -> None:
    code = (
        "import sys, mser_dist.cli.main as m; assert m.main(sys.argv[1:]) == 0\n"
        "assert not {'deepspeed', 'mlflow', 'pandas', 'matplotlib', 'sklearn'} & set(sys.modules), 'too much'"
    )
    command = [sys.executable, "-c", code, "predict", "two", "rec/r0.wav"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.returncode == 0, done.stderr
