"""Lists and folders as people have them: other columns and words, files that cannot be read, one split for all."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from mser_dist.cli import main as cli
from mser_dist.config.file import load_evaluation, load_training
from mser_dist.corpora.manifest import Reading, parse_manifest
from mser_dist.corpora.pack import pack
from mser_dist.corpora.recording import Recording
from mser_dist.corpora.splits import split_by_speaker, without
from mser_dist.errors import UserError
from mser_dist.shards import emotions
from mser_dist.shards.emotions import to_label
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.verify import verify
from mser_dist.stream.examples import open_clips


def recordings(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        soundfile.write(folder / f"{i:02d}.wav", np.random.default_rng(i).uniform(-0.3, 0.3, 800), 16000)
    return folder


def table(file: Path, rows: list[dict[str, Any]]) -> Path:
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file
    with file.open("w", newline="") as text:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


# ---- emotion words


def test_every_word_is_found_as_it_is_typed_without_accents() -> None:
    by_spelling: dict[str, str] = {}
    for label, words in (emotions._COMMON_WORDS | emotions._OWN_WORDS).items():
        for word in words.split():
            for typed in (word, word.upper(), *emotions._spellings(word)):
                assert to_label(typed) == label
                assert by_spelling.setdefault(typed, label) == label  # no spelling is of two emotions


@pytest.mark.parametrize(
    ("typed", "label"),
    [
        *(("Aerger", "anger"), ("Arger", "anger"), ("zlosc", "anger"), ("ZŁOŚĆ", "anger"), ("ofke", "anger")),
        *(("colere", "anger"), ("Ueberraschung", "surprise"), ("Pleasant Surprise", "surprise"), ("Uzgun", "sad")),
        *(
            ("আনন্দ", "happy"),
            ("غصہ", "anger"),
            ("ደስታ", "happy"),
            ("행복", "happy"),
            ("страх", "fear"),
            ("strach", "fear"),
        ),
        *(("a\u0308rger", "anger"), ("No-Agreement", ""), ("agnst", None)),
    ],
)
def test_words_of_other_languages_and_keyboards(typed: str, label: str | None) -> None:
    if label is None:
        with pytest.raises(KeyError):
            to_label(typed)
    else:
        assert to_label(typed) == (label or None)


# ---- manifests


@pytest.mark.parametrize("name", ["list.csv", "list.tsv", "list.jsonl"])
def test_a_list_of_other_columns_and_words(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recordings(tmp_path / "wav", 4)
    rows = [
        {"file": f"wav/{i:02d}.wav", "label": word, "actor": f"a{i % 2}"}
        for i, word in enumerate(["Foch", "radosc", "smutek", "nijak"])
    ]
    file = table(tmp_path / name, rows)
    if name.endswith(".tsv"):
        file.write_text(file.read_text().replace(",", "\t"))
    words = ["--column", "path=file", "--column", "emotion=label", "--column", "speaker=actor", "--language", "pl"]
    words += ["--corpus", "mine", "--map", "foch=anger", "--map", "nijak=other", "--split", "test"]
    assert cli.main(["pack", "manifest", str(file), str(tmp_path / "set"), *words]) == 0
    assert "dropped: nijak 1" in capsys.readouterr().out
    shards = ShardSet.open(tmp_path / "set")
    assert sorted(shards.column("label")) == ["anger", "happy", "sad"]
    for column, value in (("language", "pl"), ("corpus", "mine"), ("split", "test")):
        assert set(shards.column(column)) == {value}
    assert sorted(shards.column("emotion")) == ["Foch", "radosc", "smutek"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--column", "emotion=mood"], "no column mood"),
        (["--column", "feeling=emotion"], "there is no column 'feeling' to fill"),
        (["--column", "emotion"], "give it as --column OURS=THEIRS"),
        (["--map", "=anger"], "give it as --map WORD=LABEL"),
        (["--map", "a=anger", "--map", "a=sad"], "a is anger already"),
        (["--map", "joy=angre"], "no label 'angre'"),
        (["--map", "wutt=anger"], "no clip has this emotion; there are joy"),
        (["--language", "pl"], "line 2: language is 'de', and --language says 'pl'"),
        (["--language", "german", "--column", "language=x"], "both say what the language is"),
        (["--split", "test", "--folds", "2"], "--split test puts all clips into one split: leave out --folds"),
        (["--split", "test", "--val-fraction", "0"], "leave out --val-fraction"),
        (["--skip-bad", "-1"], "give 0 or more"),
    ],
)
def test_wrong_options_are_one_line(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recordings(tmp_path / "wav", 2)
    rows = [{"path": f"wav/{i:02d}.wav", "emotion": "joy", "language": "de", "speaker": f"s{i}"} for i in range(2)]
    file = table(tmp_path / "list.csv", rows)
    assert cli.main(["pack", "manifest", str(file), str(tmp_path / "set"), *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "set").exists()


def test_a_column_that_no_line_of_a_jsonl_has(tmp_path: Path) -> None:
    recordings(tmp_path / "wav", 1)
    row = {"path": "wav/00.wav", "emotion": "joy", "language": "de", "speaker": "s"}
    with pytest.raises(UserError, match="no line names 'sex'; correct --column"):
        list(parse_manifest(table(tmp_path / "list.jsonl", [row]), Reading(columns={"gender": "sex"})))


def test_options_of_a_manifest_are_refused_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="are of mser pack manifest; emodb has its own"):
        pack("emodb", tmp_path, tmp_path / "set", constants={"language": "de"})


# ---- files that cannot be read


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """40 clips of 4 speakers, of which 03, 04 and 05 cannot be read, and 06 is not there."""
    folder = recordings(tmp_path / "wav", 40)
    for i in (3, 4, 5):
        (folder / f"{i:02d}.wav").write_bytes(b"RIFF, or so it says")
    (folder / "06.wav").unlink()
    rows = [
        {"path": f"wav/{i:02d}.wav", "emotion": "joy", "language": "de", "speaker": f"s{i % 4}", "split": "train"}
        for i in range(40)
    ]
    return table(tmp_path / "list.csv", rows)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("shard_samples", [3, 512])  # of 3: the second shard has no clip that can be read
def test_bad_files_are_left_out_and_listed(workers: int, shard_samples: int, spoilt: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    options: dict[str, Any] = {"workers": workers, "progress": False, "shard_samples": shard_samples}
    if shard_samples == 3:
        spoilt.write_text("".join(line for line in spoilt.read_text().splitlines(True) if "06.wav" not in line))
    bad = 3 if shard_samples == 3 else 4
    with pytest.raises(
        UserError, match=rf"(is missing|0[345]\.wav).*\(and {bad - 1} were left out, as --skip-bad allows"
    ):
        pack("manifest", spoilt, out, skip_bad=bad - 1, **options)
    assert not out.exists()
    summary = pack("manifest", spoilt, out, skip_bad=bad, **options)
    assert summary["left_out"] == {"clips": bad, "list": f"{out}.left_out.csv"}
    with Path(summary["left_out"]["list"]).open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert [Path(row["path"]).name for row in rows] == ["03.wav", "04.wav", "05.wav", "06.wav"][:bad]
    assert all(row["why"] for row in rows)
    assert (verify(out), len(ShardSet.open(out))) == ([], summary["clips"])
    assert summary["clips"] == sum(part["clips"] for part in summary["splits"].values()) == 36
    with pytest.raises(UserError, match="list.csv, line 8: .* is missing" if bad == 4 else "03.wav"):
        pack("manifest", spoilt, tmp_path / "strict", **options)


def test_going_on_lists_what_the_finished_shards_lack(spoilt: Path, tmp_path: Path) -> None:
    """Stopped by the fourth bad file, the shards before it stay; those they lack are named by the call that ends it."""
    (tmp_path / "wav/06.wav").write_bytes((tmp_path / "wav/07.wav").read_bytes())
    (tmp_path / "wav/30.wav").write_bytes(b"RIFF, or so it says")
    options: dict[str, Any] = {"workers": 1, "progress": False, "shard_samples": 4, "skip_bad": 4}
    with pytest.raises(UserError, match=r"30\.wav"):
        pack("manifest", spoilt, tmp_path / "set", **options | {"skip_bad": 3})
    assert len(list((tmp_path / "set.partial").glob("*.tar"))) == 7
    summary = pack("manifest", spoilt, tmp_path / "set", **options)
    pack("manifest", spoilt, tmp_path / "whole", **options)
    assert summary["left_out"]["clips"] == 4
    lists = [(tmp_path / f"{name}.left_out.csv").read_text() for name in ("set", "whole")]
    assert lists[0] == lists[1]
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("set", "whole"))
    assert one == other


def test_duplicates_are_looked_for_among_those_that_can_be_read(spoilt: Path, tmp_path: Path) -> None:
    (tmp_path / "wav/08.wav").write_bytes((tmp_path / "wav/07.wav").read_bytes())
    options: dict[str, Any] = {"workers": 1, "progress": False, "skip_bad": 4, "drop_duplicates": True}
    summary = pack("manifest", spoilt, tmp_path / "set", **options)
    assert (summary["clips"], summary["left_out"]["clips"], summary["duplicates"]["clips"]) == (35, 4, 1)


def test_a_list_of_an_earlier_pack_does_not_stay(
    spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pack", "manifest", str(spoilt), str(tmp_path / "set"), "--skip-bad", "4", "--overwrite"]
    assert cli.main(words) == 0
    assert f"cannot be read: 4, see {tmp_path}/set.left_out.csv" in capsys.readouterr().out
    for i in (3, 4, 5, 6):
        (tmp_path / f"wav/{i:02d}.wav").write_bytes((tmp_path / "wav/07.wav").read_bytes())
    assert cli.main(words) == 0
    assert "left out" not in capsys.readouterr().out
    assert not (tmp_path / "set.left_out.csv").exists()


# ---- splits


def of_sizes(sizes: list[int], corpus: str = "c") -> list[Recording]:
    return [
        Recording(Path("x"), word, word, "de", f"s{s}", corpus, f"{s}_{i}", f"{s}_{i}")
        for s, size in enumerate(sizes)
        for i in range(size)
        for word in [("anger", "sad", "happy")[i % 3]]
    ]


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(10, 60), min_size=12, max_size=30), seed=st.integers(0, 3))
def test_shares_are_of_clips(sizes: list[int], seed: int) -> None:
    """Speakers of 10 to 60 clips: each split is within half a speaker of its share."""
    clips = split_by_speaker(of_sizes(sizes), val_fraction=0.15, test_fraction=0.25, seed=seed)
    counts = Counter(clip.split for clip in clips)
    for split, share in (("val", 0.15), ("test", 0.25), ("train", 0.6)):
        assert abs(counts[split] - share * len(clips)) <= 30
    assert sum(len({clip.speaker for clip in clips if clip.split == part}) for part in counts) == len(sizes)


def test_one_large_speaker_does_not_fill_the_test() -> None:
    clips = split_by_speaker(of_sizes([400, *[20] * 30]), val_fraction=0.1, test_fraction=0.2)
    assert Counter(clip.split for clip in clips) == {"train": 700, "val": 100, "test": 200}


def test_few_speakers_make_the_splits_they_can() -> None:
    free: dict[str, Any] = {"val_fraction": None, "test_fraction": None}
    for speakers, missing in ((1, ["val", "test"]), (2, ["val"]), (3, [])):
        clips = split_by_speaker(of_sizes([6] * speakers), **free)
        assert without(clips) == ({"c (de)": missing} if missing else {})
    mixed = split_by_speaker(of_sizes([6] * 9) + of_sizes([6] * 2, "tess"), **free)
    assert without(mixed) == {"tess (de)": ["val"]}


def test_one_speaker_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recordings(tmp_path / "wav", 3)
    rows = [{"path": f"wav/{i:02d}.wav", "emotion": "joy", "language": "pl", "speaker": "s"} for i in range(3)]
    file = table(tmp_path / "list.csv", rows)
    assert cli.main(["pack", "manifest", str(file), str(tmp_path / "set")]) == 0
    assert "no val, no test: the speakers do not suffice in list (pl)" in capsys.readouterr().out


# ---- data.split


@pytest.fixture
def three_splits(tmp_path: Path) -> str:
    recordings(tmp_path / "wav", 6)
    rows = [
        {
            "path": f"wav/{i:02d}.wav",
            "emotion": ("anger", "sad")[i % 2],
            "language": "de",
            "speaker": f"s{i}",
            "split": s,
        }
        for i, s in enumerate(["train", "train", "train", "val", "test", "test"])
    ]
    pack("manifest", table(tmp_path / "list.csv", rows), tmp_path / "set", workers=1, progress=False)
    return str(tmp_path / "set")


@pytest.mark.parametrize(
    ("word", "value", "clips"),
    [("all", "all", 6), ("[train, test]", ["train", "test"], 5), ("val,test", ["val", "test"], 3), ("[val]", "val", 1)],
)
def test_several_splits_or_all(word: str, value: Any, clips: int, three_splits: str) -> None:
    words = [f"data.sets=[{three_splits}]", "data.labels=[anger, sad]", f"data.split={word}"]
    data = load_evaluation("demo_eval", words).data
    assert data.split == value
    assert len(open_clips(data, data.split)) == clips


def test_the_order_of_splits_is_not_the_order_of_clips(three_splits: str) -> None:
    one, other = (ShardSet.open(three_splits, split=s) for s in (["train", "test"], ["test", "train"]))
    assert one.fingerprint() == other.fingerprint()
    assert (
        ShardSet.open(three_splits, split=["train"]).fingerprint()
        == ShardSet.open(three_splits, split="train").fingerprint()
    )


@pytest.mark.parametrize("word", ["[]", "[train, train]", "[all, val]", "3.5e"])
def test_wrong_splits_are_refused(word: str, three_splits: str) -> None:
    words = [f"data.sets=[{three_splits}]", f"data.split={word}"]
    with pytest.raises(UserError, match=r"data\.split|no split|no sample|splits") as caught:
        data = load_evaluation("demo_eval", words).data
        open_clips(data, data.split)
    assert "\n" not in str(caught.value)


def test_a_split_of_a_list_that_is_not_there(three_splits: str) -> None:
    data = load_evaluation("demo_eval", [f"data.sets=[{three_splits}]", "data.split=[val, tset]"]).data
    with pytest.raises(
        UserError, match=r"names 'tset', and no clip of it is wanted or there: splits there: test, train, val"
    ):
        open_clips(data, data.split)


@pytest.mark.parametrize(("split", "val"), [("all", "val"), ("[train, val]", "val"), ("[train, val]", "[val, test]")])
def test_no_training_on_the_clips_of_the_validation(split: str, val: str) -> None:
    words = ["out=run", "data.sets=[x]", f"data.split={split}"]
    with pytest.raises(UserError, match=r"trains on the clips that data\.val_split="):
        load_training("demo_stage1", [*words, f"data.val_split={val}"])
    load_training("demo_stage1", [*words, "data.val_split=null"])
