"""The scripts about translated speech, on recordings that eSpeak has made: they run, and write what they say."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mser_dist.cli import main as cli
from mser_dist.synth.espeak import Espeak
from tests.tiny_runs import ROOT

LABELS = ["anger", "happy", "sad"]
TEXT = "Kids are talking by the door."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of two speakers with their clips.csv."""
    place = tmp_path_factory.mktemp("recordings")
    _write(place / "clips.csv", "ravdess", "en")
    return place


def _write(file: Path, corpus: str, language: str) -> None:
    rows = []
    for speaker, voice in (("01", "m1"), ("02", "f2")):
        for number, label in enumerate(LABELS * 2):
            samples, rate = Espeak().synthesize(TEXT, f"en-us+{voice}", rate=130 + 40 * (number % 3), volume=50)
            path = f"{corpus}-{speaker}-{number}.wav"
            soundfile.write(file.parent / path, np.roll(samples, number), rate)
            gender = {"m": "male", "f": "female"}[voice[0]]
            rows.append([path, label, language, speaker, gender, corpus, TEXT])
    with file.open("w", encoding="utf-8", newline="") as into:
        csv.writer(into).writerows([["path", "emotion", "language", "speaker", "gender", "corpus", "text"], *rows])


def _run(tool: str, *words: object, cwd: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(ROOT / f"tools/{tool}.py"), *map(str, words)]
    done = subprocess.run(line, env=env, cwd=cwd, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_bench_translate(folder: Path, tmp_path: Path) -> None:
    words = ["--to", "de", "--clips", 12, "--folds", 2, "--transcribed", 2, "--processes", 1]
    said = _run("bench_translate", "--data", folder, *words, "--json", tmp_path / "rows.json", cwd=tmp_path)
    rows = {row["name"]: row["value"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows.keys() == {"real-time", "probe-share", "cer-ratio"} and rows["real-time"] > 0
    assert "6 clips of 2 speakers in de" in said and {"sources", "transplant", "plain"} <= set(said.split())


def test_whether_translations_help(folder: Path, tmp_path: Path) -> None:
    for corpus, language in (("ravdess", "en"), ("nemo", "pl"), ("korean", "ko")):
        (tmp_path / corpus).mkdir()
        _write(tmp_path / corpus / "clips.csv", corpus, language)
        assert (
            cli.main(["pack", "manifest", str(tmp_path / corpus / "clips.csv"), str(tmp_path / "shards" / corpus)]) == 0
        )
    words = ["--to", "de", "--seeds", "0", "--workers", 1, "--only", "transplant"]
    labels = f"data.labels=[{','.join(LABELS)}]"
    said = _run("translation_helps", *words, "train.steps=2", "train.global_batch=8", labels, cwd=tmp_path)
    out = tmp_path / "runs/translation"
    assert "mser train real_stage1" in said and "selected" in said
    card = (out / "shards/transplant/README.md").read_text(encoding="utf-8")
    assert "- scorer: " in card and "trained on ravdess (en; " in card and "- whisper: " in card
    table = (out / "compare/compare.csv").read_text(encoding="utf-8")
    assert "transplant-0-eval" in table
