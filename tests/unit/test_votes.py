"""Annotators' votes: from a corpus's files into shards, their index, and a set."""

import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from mser_dist import audio
from mser_dist.corpora.manifest import parse_manifest
from mser_dist.corpora.parsers import CORPORA
from mser_dist.errors import UserError
from mser_dist.shards import index as shard_index
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.verify import verify
from mser_dist.shards.writer import DatasetWriter
from tests.unit.made_up_set import meta, pcm, write_set
from tests.unit.test_corpus_layouts import lay_out

BAD = {
    "a list": [1],
    "a text": "anger",
    "negative": {"anger": -1},
    "not a number": {"anger": float("nan")},
    "infinite": {"anger": float("inf")},
    "a word": {"anger": "two"},
    "a truth": {"anger": True},
    "of no emotion": {"": 1},
    "on two lines": {"a\nb": 1},
    "none": {"anger": 0},
    "empty": {},
}


def write(out: Path, votes: list[Any]) -> Path:
    with DatasetWriter(out, "made-up", {}) as writer:
        for i, given in enumerate(votes):
            more = {} if given is None else {"votes": given}
            writer.write("test", f"k{i}", audio.encode(pcm(i), 16000, "flac"), "flac", meta(i, **more))
    return out


def test_a_set_has_the_votes_of_its_clips(tmp_path: Path) -> None:
    out = write(tmp_path / "set", [{"anger": 2, "sad": 1, "fear": 0}, None, {"joy": 0.5}, None])
    assert verify(out) == []
    assert ShardSet.open(out).votes is None
    assert ShardSet.open(out, votes=True).votes == {0: {"anger": 2, "sad": 1}, 2: {"joy": 0.5}}
    assert ShardSet.open(out, votes=True, keep={"key": ["k2", "k3"]}).votes == {0: {"joy": 0.5}}


def test_a_set_without_votes_has_the_index_that_it_had(tmp_path: Path) -> None:
    out = write_set(tmp_path / "set")
    assert all("votes" not in shard_index.load(tar)["columns"] for tar in out.glob("*.tar"))
    assert ShardSet.open([out, write(tmp_path / "more", [{"sad": 1}])], votes=True).votes == {20: {"sad": 1}}


@pytest.mark.parametrize("name", BAD)
def test_bad_votes_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sample 'k0' of made-up: 'votes' .*; it is {emotion: number of annotators}"):
        write(tmp_path / "set", [BAD[name]])


@pytest.mark.parametrize("name", BAD)
def test_an_index_that_lies_about_votes(name: str, tmp_path: Path) -> None:
    out = write(tmp_path / "set", [{"sad": 1}, None])
    (out / "dataset.json").unlink()
    file = out / "test-000000.tar.idx.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    index["columns"]["votes"][1] = BAD[name]
    file.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match="contradicts itself"):
        ShardSet.open(out, votes=True)
    index["columns"]["votes"] = [None]
    file.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match="contradicts itself"):
        ShardSet.open(out)


def test_verify_holds_votes_against_the_json(tmp_path: Path) -> None:
    out = write(tmp_path / "set", [{"sad": 1}])
    (out / "dataset.json").unlink()
    file = out / "test-000000.tar.idx.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    index["columns"]["votes"] = [{"sad": 2}]
    file.write_text(json.dumps(index), encoding="utf-8")
    assert any("differ in votes" in problem for problem in verify(out))


def foreign(path: Path, votes: Any) -> Path:
    parts = {"a.wav": audio.encode(pcm(0), 16000, "wav"), "a.json": json.dumps({"votes": votes}).encode()}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
    return path


def test_a_foreign_tar(tmp_path: Path) -> None:
    assert ShardSet.open(foreign(tmp_path / "a.tar", {"sad": 2}), votes=True).votes == {0: {"sad": 2}}
    assert ShardSet.open(foreign(tmp_path / "b.tar", 17), votes=True).votes == {}, "some other thing of that name"
    with pytest.raises(UserError, match="-2 for 'sad'"):
        ShardSet.open(foreign(tmp_path / "c.tar", {"sad": -2}))


def test_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(audio.encode(pcm(0), 16000, "wav"))
    common = {"path": "a.wav", "emotion": "sad", "language": "de", "speaker": "s"}
    lines = tmp_path / "m.jsonl"
    lines.write_text(json.dumps({**common, "votes": {"sad": 2, "wut": 1}}), encoding="utf-8")
    table = tmp_path / "m.csv"
    table.write_text('path,emotion,language,speaker,votes\na.wav,sad,de,s,"{""sad"": 2, ""wut"": 1}"\n', "utf-8")
    for file in (lines, table):
        (clip,) = parse_manifest(file)
        assert clip.votes == {"sad": 2, "wut": 1}
    for cell, says in (("many", "no JSON"), ("{1}", "no JSON"), ('{""sad"": NaN}', "nan for 'sad'"), ("3", "mapping")):
        table.write_text(f'path,emotion,language,speaker,votes\na.wav,sad,de,s,"{cell}"\n', "utf-8")
        with pytest.raises(UserError, match=rf"m.csv, line 2.*{says}"):
            list(parse_manifest(table))


def votes_of(corpus: str, folder: Path) -> dict[str, Any]:
    return {clip.id: clip.votes for clip in CORPORA[corpus].parse(folder)}


def test_corpora_that_publish_them(tmp_path: Path) -> None:
    found = votes_of("dusha", lay_out("dusha", tmp_path / "dusha"))
    assert found["dusha_crowd_train_aa"] == {"angry": 2, "sad": 1}
    assert found["dusha_crowd_train_bb"] == {"neutral": 1, "sad": 1}

    folder = lay_out("iemocap", tmp_path / "iemocap")
    table = folder / "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt"
    more = "C-E1:\tAnger; Frustration;\t()\nC-E3:\tAnger;\t()\nC-M1:\tSadness;\t()\n"
    table.write_text(table.read_text("utf-8") + more, "utf-8")
    found = votes_of("iemocap", folder)
    assert found["iemocap_Ses01F_impro01_F000"] == {"neutral": 1}
    assert found["iemocap_Ses01F_impro01_M001"] is None
    assert found["iemocap_Ses01F_impro01_M002"] == {"anger": 1.5, "frustration": 0.5}

    folder = lay_out("cremad", tmp_path / "cremad")
    assert set(votes_of("cremad", folder).values()) == {None}
    table = folder / "processedResults/tabulatedVotes.csv"
    table.parent.mkdir()
    head = '"","A","D","F","H","N","S","fileName","numResponses"\n'
    voice, face = '"100062",6,2,0,0,1,0,"1001_DFA_ANG_XX",9\n', '"200062",0,0,0,9,0,0,"1001_DFA_ANG_XX",9\n'
    table.write_text(head + voice + face, "utf-8")
    assert votes_of("cremad", folder) == {"cremad_1001_DFA_ANG_XX": {"anger": 6, "disgust": 2, "neutral": 1}}
    table.write_text(head + voice.replace(",6,", ",many,"), "utf-8")
    with pytest.raises(UserError, match=r"tabulatedVotes.csv, line 2"):
        votes_of("cremad", folder)
