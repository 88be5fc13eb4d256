"""What goes wrong with a translation: counted and named by clip, or one line that says how to mend it."""

import csv
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mser_dist.cli import main as cli
from mser_dist.config.translation_keys import SelectionConfig, TranslateConfig
from mser_dist.errors import UserError
from mser_dist.shards.shard_set import ShardSet
from mser_dist.translation.made import Made
from mser_dist.translation.measures import character_error
from mser_dist.translation.selection import KEPT, adapted, heard, outcome
from tests.unit.made_up_recordings import asked_for, config, run, write_set

OUTCOMES = {
    "fine": KEPT,
    "mute": "no transcript",
    "silent": "silent source",
    "clipped": "clipped source",
    "dies": "the program died",
    "dies-once": KEPT,
    "hangs": "the program did not answer",
    "rate": KEPT,
    "nothing": "the program made nothing",
    "nonsense": "the program made no readable audio",
    "quiet": "the voice made silence",
    "error": "the program: no such speaker",
    "loud": "the program's audio is clipped",
    "loud-rate": "the program's audio is clipped",
    "floods": "the program did not answer",
    "short": "too short",
    "last": KEPT,
}


def test_each_kind_of_bad_recording_is_counted_and_the_others_are_made(tmp_path: Path) -> None:
    source = write_set(tmp_path / "set", dict.fromkeys(OUTCOMES, "train"))
    began = time.monotonic()
    asked = config(tmp_path, "de", transcript__source="text", speech__timeout=0.7)
    outcomes = run(source, tmp_path / "out", asked)
    assert time.monotonic() - began < 30
    rows = {row["source"]: row for row in csv.DictReader((tmp_path / "out/selection.csv").open(encoding="utf-8"))}
    assert {name: row["outcome"] for name, row in rows.items()} == OUTCOMES
    assert outcomes is not None and outcomes.total(KEPT) == 4 and outcomes.total("too short") == 1
    shards = ShardSet.open([str(tmp_path / "out")])
    assert sorted(shards.keys) == ["dies-once_de", "fine_de", "last_de", "rate_de"]
    assert set(shards.column("sample_rate")) == {16000} and set(shards.duration.round(3)) == {0.5}
    assert sum(line.startswith("dies ") for line in asked_for(tmp_path)) == asked.speech.tries == 2
    assert "the program died" in (tmp_path / "out/README.md").read_text(encoding="utf-8")


def test_a_program_that_fails_time_after_time_is_told_of(tmp_path: Path) -> None:
    names = {f"fine{i}": "train" for i in range(16)} | {f"dies{i}": "train" for i in range(8)}
    source = write_set(tmp_path / "set", names)
    with pytest.raises(UserError, match=r"the program died at 5 recordings in a row \(out of memory\): mend it, and"):
        run(source, tmp_path / "out", config(tmp_path, "de"))
    assert [path.name for path in (tmp_path / "out.made").glob("*.tar")] == ["train-000000.tar"], "what is made stays"


def test_a_recording_that_ends_the_program_in_every_language_is_one_recording(tmp_path: Path) -> None:
    words = "de", "fr", "it"
    source = write_set(tmp_path / "set", dict.fromkeys(["dies1", "dies2", "fine"], "train"))
    asked = config(tmp_path, ",".join(words), speech__tries=1)
    Path(str(asked.text.table)).write_text("en,de,fr,it\nThe cat sleeps.,a,b,c\n")
    outcomes = run(source, tmp_path / "out", asked)
    assert outcomes and outcomes.total("the program died") == 6 and outcomes.total(KEPT) == 3


def test_words_that_changed_are_said_anew_and_patience_that_changed_is_not(tmp_path: Path) -> None:
    source = write_set(tmp_path / "set", {"fine": "train"})
    asked = config(tmp_path, "de")
    run(source, tmp_path / "out", asked, keep_made=True)
    asked.speech.timeout, asked.speech.tries = 300.0, 3
    run(source, tmp_path / "out", asked, keep_made=True)
    assert len(asked_for(tmp_path)) == 1
    Path(str(asked.text.table)).write_text("en,de\nThe cat sleeps.,Die Katze ruht.\n")
    with pytest.raises(UserError, match="was made in another way"):
        run(source, tmp_path / "out", asked, keep_made=True)
    run(source, tmp_path / "out", asked, overwrite=True)
    assert ShardSet.open([str(tmp_path / "out")]).read(0).meta["text"] == "Die Katze ruht."


def test_a_set_is_not_replaced_by_its_translations(tmp_path: Path) -> None:
    source = write_set(tmp_path / "set", {"fine": "train"})
    for path in (source, next(source.glob("*.tar"))):
        with pytest.raises(UserError, match="is the set that is translated"):
            run(path, source, config(tmp_path), overwrite=True)
    assert ShardSet.open([str(source)]).keys == ["fine"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--clips", "5"], "--clips is of --plan"),
        (["--price", "0.1"], "--price is of --plan"),
        (["--to", "no"], "speech.backend=espeak has no voice in no|text.backend=table has no sentence in no"),
    ],
)
def test_words_of_the_command_line(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_set(tmp_path / "set", {"fine": "train"})
    line = ["translate", str(source), str(tmp_path / "out"), "--to", "de", "speech.backend=espeak"]
    assert cli.main([*line, "selection.whisper=null", *words]) == 2
    assert re.search(says, capsys.readouterr().err)


def program(code: str) -> str:
    return shlex.join([sys.executable, "-S", "-c", code])


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("/no/such/program", "cannot be started"),
        ("'unclosed", "cannot be started"),
        (program("raise SystemExit('no GPU')"), r"the program died when it was started \(no GPU\)"),
        (program("print('{\"languages\": []}')"), "let it begin with"),
        (program('print(\'{"name": "x", "languages": "de"}\')'), "let it begin with"),
    ],
)
def test_a_program_that_is_none(command: str, says: str, tmp_path: Path) -> None:
    source = write_set(tmp_path / "set", {"fine": "train"})
    with pytest.raises(UserError, match=says) as caught:
        run(source, tmp_path / "out", config(tmp_path, speech__command=command))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("to", "changes", "says"),
    [
        ("de,el", {}, "speech.backend=command has no voice in el"),
        ("de,it", {}, "text.backend=table has no sentence in it"),
        ("en", {}, "every clip is in en already"),
        ("de", {"split": ["test"]}, "no labelled clip in split=test; the set has: train"),
        ("de", {"selection__scorer": "no/such/run"}, "there is no such model"),
    ],
)
def test_what_cannot_be_made_of_a_set(to: str, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    source = write_set(tmp_path / "set", {"fine": "train"})
    with pytest.raises(UserError, match=says) as caught:
        run(source, tmp_path / "out", config(tmp_path, to, **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    source = write_set(tmp_path / "set", {"fine": "train"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").touch()
    for overwrite, says in ((False, "already exists"), (True, "is not of a data set")):
        with pytest.raises(UserError, match=says):
            run(source, tmp_path / "out", config(tmp_path), overwrite=overwrite)
    assert (tmp_path / "out/thesis.tex").is_file()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"to": []}, "name some, e.g. --to fr,de"),
        ({"to": ["french"]}, "must be ISO 639 codes"),
        ({"to": ["fr", "fr"]}, "must be ISO 639 codes"),
        ({"split": []}, "names no split"),
        ({"text__model": "x"}, "text.model is of text.backend=model"),
        ({"text__backend": "model"}, "needs text.model"),
        ({"text__beams": 2}, "text.beams is of"),
        ({"speech__timeout": 3}, "speech.timeout is of speech.backend=command, not of transplant"),
        ({"speech__backend": "vits"}, "needs speech.model"),
        ({"speech__backend": "command"}, "needs speech.command"),
        (
            {"speech__backend": "seamless", "speech__model": "x", "text__table": "y"},
            "words of its own: leave transcript",
        ),
        ({"selection__min_score": 0.5}, "is of a scorer"),
        ({"selection__agree": False}, "is of a scorer"),
        ({"selection__scorer": "a", "selection__probe": ["b"]}, "keep one of them"),
        ({"selection__min_seconds": 30.0}, "is not below"),
        ({"selection__whisper": None, "selection__max_cer": 0.3}, "needs a Whisper"),
        ({"transcript__source": "text", "transcript__whisper": "x"}, "has no effect"),
        ({"selection__min_level": 3}, "between -120 and 0, not 3"),
    ],
)
def test_a_config_that_contradicts_itself(changes: dict[str, Any], says: str) -> None:
    made = TranslateConfig(to=["fr"])
    made.check()
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        setattr(getattr(made, section) if section else made, name, value)
    with pytest.raises(UserError, match=says) as caught:
        made.check()
    assert "\n" not in str(caught.value)


FINE: dict[str, Any] = {
    "seconds": 2.0,
    "level": -20.0,
    "clipped": 0.0,
    "cer": 0.1,
    "scores": {"anger": 0.7, "sad": 0.3},
}


@pytest.mark.parametrize(
    ("measures", "chosen", "what"),
    [
        ({}, {}, KEPT),
        ({"seconds": 0.2}, {}, "too short"),
        ({"seconds": 31.0}, {}, "too long"),
        ({"level": -70.0}, {}, "too faint"),
        ({"clipped": 0.1}, {}, "clipped"),
        ({"cer": 0.6}, {}, "other words"),
        ({"cer": 0.6}, {"max_cer": None}, KEPT),
        ({"cer": None}, {}, KEPT),
        ({"scores": {"anger": 0.3, "sad": 0.7}}, {}, "other emotion"),
        ({"scores": {"anger": 0.3, "sad": 0.7}}, {"agree": False}, KEPT),
        ({"scores": {"anger": 0.3, "sad": 0.7}}, {"agree": False, "min_score": 0.4}, "faint emotion"),
        ({"scores": {"anger": 0.5, "sad": 0.5}}, {"min_score": 0.5}, KEPT),
        ({"scores": {"sad": 1.0}}, {}, "a label that the scorer does not know"),
        ({"scores": {"sad": 1.0}}, {"agree": False}, KEPT),
        ({"seconds": 0.0, "cer": 9.0}, {"all": True}, KEPT),
    ],
)
def test_why_a_clip_is_dropped(measures: dict[str, Any], chosen: dict[str, Any], what: str) -> None:
    made = Made("k", {"label": "anger"}, "", FINE | measures)
    assert outcome(made, SelectionConfig(**chosen)) == what
    assert outcome(Made("k", {}, "silent source"), SelectionConfig(all=True)) == "silent source"


def scored(label: str, language: str, **scores: float) -> Made:
    return Made("k", {"label": label, "language": language}, "", FINE | {"scores": scores})


def test_a_scorer_that_hears_one_label_everywhere_is_heard_against_that() -> None:
    clips = [
        scored("anger", "de", anger=0.2, sad=0.7, fear=0.1),
        scored("sad", "de", anger=0.02, sad=0.9, fear=0.08),
        scored("sad", "de", anger=0.05, sad=0.8, fear=0.15),
        scored("anger", "fr", anger=0.9, sad=0.1, fear=0.0),
        scored("sad", "fr", anger=0.6, sad=0.4, fear=0.0),
        scored("anger", "it", anger=0.3, sad=0.7, fear=0.0),
        Made("k", {"label": "sad", "language": "de"}, "silent source"),
    ]
    found = adapted(clips)
    assert [heard(one.measures["scores"]) for one in found[:5] if one.measures] == [
        "anger",
        "sad",
        "sad",
        "anger",
        "sad",
    ]
    for one in found[:5]:
        assert one.measures and sum(one.measures["scores"].values()) == pytest.approx(1, abs=1e-3)
        assert one.measures["scores"].keys() == {"anger", "sad"}, "no clip has another label"
    assert found[5:] == clips[5:], "with one label alone there is nothing to tell apart"
    # Each label counts alike, however many clips have it.
    assert adapted([*clips, clips[1], clips[2]])[0] == found[0]


def test_errors_by_character() -> None:
    assert character_error("Le chat, dort.", "le chat dort") == 0
    assert character_error("", "abcd") == 1
    assert character_error("kitten", "sitting") == pytest.approx(3 / 7)
    assert character_error("abcabc", "abc") == 1
    assert character_error("他在门口", "他在門口") == 0.25
    assert (character_error("", "…"), character_error("a", "…")) == (0, 1)
