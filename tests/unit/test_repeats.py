"""Identical audio: found in whatever file it is, across splits, labels and speakers; named, and dropped if asked."""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from mser_dist import audio
from mser_dist.cli import main as cli
from mser_dist.corpora.pack import pack
from mser_dist.shards import index as shard_index
from mser_dist.shards import repeats
from mser_dist.shards.columns import Filter, Gathered
from mser_dist.shards.reader import Shard
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.verify import verify
from tests.unit.made_up_set import meta, pcm, write_set

HEADER = "path,emotion,language,speaker,split"


def manifest(folder: Path, rows: list[tuple[str, int, str, str, str]]) -> Path:
    """A manifest of (file, number of its noise, emotion, speaker, split); the format is the file's ending."""
    lines = [HEADER]
    for name, number, emotion, speaker, split in rows:
        sound = np.random.default_rng(number).integers(-3000, 3000, (1600, 1)).astype(np.int16)
        if "stereo" in name:
            sound = np.repeat(sound, 2, axis=1)
        soundfile.write(folder / name, sound, 16000)
        lines.append(f"{name},{emotion},de,{speaker},{split}")
    (folder / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "list.csv"


ROWS = [
    ("a.wav", 1, "happy", "s1", "train"),
    ("b.flac", 1, "happy", "s2", "test"),  # a leak, and of another speaker
    ("c.wav", 2, "happy", "s1", "train"),
    ("c_stereo.flac", 2, "sad", "s1", "train"),  # a contradiction
    ("d.wav", 3, "sad", "s1", "train"),
    ("e.wav", 3, "sad", "s1", "train"),  # once too often, no more
    ("f.wav", 4, "sad", "s3", "test"),
]
SAID = [
    "warning: identical audio in more than one split (a leak): 1 (2 clips)",
    "  b (test, happy, s2) = a (train, happy, s1)",
    "warning: identical audio with different labels (a contradiction): 1 (2 clips)",
    "  c (train, happy, s1) = c_stereo (train, sad, s1)",
    "warning: identical audio of different speakers: 1 (2 clips)",
    "warning: identical audio of one split, label and speaker: 1 (2 clips)",
    "  d (train, sad, s1) = e (train, sad, s1)",
]


@pytest.mark.parametrize("form", ["flac", "wav"])
def test_pack_inspect_and_verify_name_it(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "set")
    assert cli.main(["pack", "manifest", str(manifest(tmp_path, ROWS)), out, "--format", form]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line[2:] for line in said if line[2:] in SAID] == SAID
    assert "  --drop-duplicates keeps the first of each" in [line[2:] for line in said]
    assert cli.main(["inspect", out, "--json", str(tmp_path / "set.json")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line in SAID] == SAID
    told = json.loads((tmp_path / "set.json").read_text(encoding="utf-8"))["identical"]
    assert (told["recordings"], told["clips"], told["unknown"]) == (3, 6, 0)
    assert cli.main(["verify", out, out + "/"]) == 0, "it is no damage"
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line in SAID] == SAID


@pytest.mark.parametrize("workers", [1, 2])
def test_drop_duplicates_keeps_the_first(workers: int, tmp_path: Path) -> None:
    out = tmp_path / "set"
    made = pack("manifest", manifest(tmp_path, ROWS), out, workers=workers, progress=False, drop_duplicates=True)
    assert made["duplicates"] == {"clips": 3, "other_labels": 1, "other_splits": 1}
    assert sorted(ShardSet.open(out).keys) == ["a", "c", "d", "f"]
    assert (made["clips"], made["identical"]["recordings"]) == (4, 0)
    assert verify(out) == []


def test_drop_duplicates_says_how_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pack", "manifest", str(manifest(tmp_path, ROWS)), str(tmp_path / "set"), "--drop-duplicates"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "dropped: 3 (1 of another label, 1 of another split)" in said and "warning" not in said


def test_across_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, split in (("one", "train"), ("two", "test")):
        (tmp_path / name).mkdir()
        rows = [(f"{name}{i}.wav", i, "sad", f"s{i}", split) for i in range(2)]
        pack("manifest", manifest(tmp_path / name, rows), tmp_path / name / "set", workers=1, progress=False)
    for verb in ("inspect", "verify"):
        assert cli.main([verb, *(str(tmp_path / name / "set") for name in ("one", "two"))]) == 0
        assert "in more than one split (a leak): 2 (4 clips)" in capsys.readouterr().out


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with a tar that is not ours: two clips of the same audio, one of them in another format."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (number, ext) in enumerate([(0, "wav"), (0, "flac"), (1, "wav")]):
            for name, data in (
                (f"{i}.{ext}", audio.encode(pcm(number), 16000, ext)),
                (f"{i}.json", b'{"label":"sad"}'),
            ):
                (tmp_path / "file").write_bytes(data)
                tar.add(tmp_path / "file", name)
    (tmp_path / "file").unlink()
    return tmp_path


def test_a_tar_that_is_not_ours_is_known_after_verify(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["inspect", str(foreign)])
    assert "not known of 3 clips" in capsys.readouterr().out
    twice = "identical audio of one split, label and speaker: 1 (2 clips)\n  0 (sad) = 1 (sad)"
    for verb in ("verify", "inspect", "verify"):
        assert cli.main([verb, str(foreign)]) == 0
        said = capsys.readouterr().out
        assert twice in said and "not known" not in said


def old(folder: Path) -> None:
    """Make the indexes those of a version that kept no hash."""
    for path in folder.glob("*.idx.json"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r',"sound":\[[\d,]*\]', "", re.sub(r'"scan":\d+,', "", text)), encoding="utf-8")
        assert "sound" not in path.read_text(encoding="utf-8")


def test_an_older_index_is_read_and_verify_still_looks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack("manifest", manifest(tmp_path, ROWS), tmp_path / "set", workers=1, progress=False)
    old(tmp_path / "set")
    (tmp_path / "set" / "dataset.json").unlink()  # it has the hashes of the newer indexes
    shards = ShardSet.open(tmp_path / "set", sound=True)
    assert shards.sound is not None and not shards.sound.any()
    assert cli.main(["inspect", str(tmp_path / "set")]) == 0
    assert "not known of 7 clips" in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path / "set")]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line in SAID] == SAID


def test_an_older_index_of_a_tar_that_is_not_ours_is_made_anew(foreign: Path) -> None:
    assert ShardSet.open(foreign).column("speaker").tolist() == [""] * 3
    old(foreign)
    path = foreign / "a.tar.idx.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"sad"', '"joy"'), encoding="utf-8")
    assert ShardSet.open(foreign).column("label").tolist() == ["sad"] * 3


def test_a_hash_that_is_not_the_samples_is_a_problem(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", n=4)
    (folder / "dataset.json").unlink()
    path = folder / "train-000000.tar.idx.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index["columns"]["sound"][1] = 5
    path.write_text(json.dumps(index), encoding="utf-8")
    (problem,) = verify(folder)
    assert problem.endswith("its files and its index differ in sound")
    index["columns"]["sound"] = [-1] * index["count"]
    path.write_text(json.dumps(index), encoding="utf-8")
    assert "contradicts itself" in verify(folder)[0]


def test_the_hash_is_of_the_samples() -> None:
    assert shard_index.sound(pcm(1)) == shard_index.sound(audio.to_pcm16(pcm(1) / np.float32(32768)))
    assert len({shard_index.sound(pcm(i)) for i in range(50)}) == 50
    assert shard_index.sound(pcm(1)) != shard_index.sound(pcm(1)[:-1]) != shard_index.sound(-pcm(1))
    assert all(0 < shard_index.sound(pcm(i)) < 1 << 63 for i in range(50))


CLIP = st.tuples(
    st.integers(0, 5),
    st.sampled_from(["train", "test", ""]),
    st.sampled_from([None, "happy", "sad"]),
    st.sampled_from(["", "s1", "s2"]),
    st.sampled_from(["one", "two"]),
)


@given(st.lists(CLIP, max_size=25))
def test_the_counts_are_those_of_counting(clips: list[tuple[int, str, str | None, str, str]]) -> None:
    gathered = Gathered(Filter(None, None, {}, {}), sound=True)
    for split in ("train", "test", ""):
        rows: list[dict[str, Any]] = []
        for i, (sound, of, label, speaker, corpus) in enumerate(clips):
            if of == split:
                place = dict.fromkeys(shard_index.PLAIN, 1)
                same = {"label": label, "speaker": speaker, "corpus": corpus}
                rows.append(meta(0) | place | {"key": str(i), "sound": sound} | same)
        index = {"split": split, "count": len(rows), "columns": shard_index.columns(rows)}
        gathered.add(0, Shard(split, 1, ""), index)
    report = repeats.describe(ShardSet(gathered.table(), None))
    groups = [[clip for clip in clips if clip[0] == sound] for sound in range(1, 6)]
    groups = [group for group in groups if len(group) > 1]

    def differ(group: list[Any], kind: str) -> bool:
        values = {
            "splits": {clip[1] for clip in group} - {""},
            "labels": {clip[2] for clip in group} - {None},
            "speakers": {(clip[4], clip[3]) for clip in group if clip[3]},
        }
        return len(values[kind]) > 1 if kind in values else not any(len(found) > 1 for found in values.values())

    for kind in repeats.KINDS:
        own = [group for group in groups if differ(group, kind)]
        assert report[kind] == {"recordings": len(own), "clips": sum(map(len, own))}
    assert (report["recordings"], report["clips"]) == (len(groups), sum(map(len, groups)))
    assert report["unknown"] == sum(clip[0] == 0 for clip in clips)
    assert len(report["named"]) == len(groups)
    order = [list(repeats.KINDS).index(one["kind"]) for one in report["named"]]
    assert order == sorted(order)
    for one in report["named"]:
        group = [clips[int(clip["key"])] for clip in one["clips"]]
        assert one["kind"] == next(kind for kind in repeats.KINDS if differ(group, kind))
    assert json.loads(json.dumps(report)) == report
    assert all("\n" not in line for line in repeats.lines(report))


def test_many_are_counted_and_few_are_named(tmp_path: Path) -> None:
    rows = [(f"c{i:02d}.wav", i // 2, "sad", "s1", "train") for i in range(40)]
    rows += [(f"x{i:02d}.wav", 99, "sad", "s1", "train") for i in range(9)]
    made = pack("manifest", manifest(tmp_path, rows), tmp_path / "set", workers=1, progress=False)
    said = repeats.lines(made["identical"])
    assert said[0].endswith("speaker: 21 (49 clips)")
    assert len(said) == 1 + repeats.NAMED + 1 and said[-1] == "  and 16 more"
