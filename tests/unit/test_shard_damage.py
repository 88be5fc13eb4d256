"""Damage: every mutation is found by verify, by reading, and by what a training's worker does."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from mser_dist import audio
from mser_dist.errors import UserError
from mser_dist.shards import tarsafe
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.verify import verify
from mser_dist.shards.writer import DatasetWriter
from mser_dist.stream.examples import Examples
from mser_dist.stream.features import Features
from mser_dist.stream.loader import Request
from tests.unit.made_up_set import meta, pcm, write_set
from tests.unit.test_shards import write_foreign


def _read_all(shards: ShardSet) -> list[str]:
    return [shards.read(i).meta["id"] for i in range(len(shards))]


def flip(shard: Path, at: int) -> None:
    data = bytearray(shard.read_bytes())
    data[at] ^= 0x10
    shard.write_bytes(data)


def place(shard: Path, number: int, part: str) -> int:
    return int(_columns(shard)[f"{part}_at"][number])


def _columns(shard: Path) -> dict[str, Any]:
    return dict(json.loads(shard.with_name(shard.name + ".idx.json").read_text())["columns"])


MUTATIONS: dict[str, Callable[[Path], None]] = {
    "flipped header byte": lambda s: flip(s, place(s, 2, "audio") - 512 + 3),
    "flipped json header byte": lambda s: flip(s, place(s, 2, "json") - 512 + 130),
    "flipped payload byte": lambda s: flip(s, place(s, 2, "audio") + 700),
    "flipped json byte": lambda s: flip(s, place(s, 2, "json") + 20),
    "zeroed header": lambda s: _overwrite(s, place(s, 2, "audio") - 512, bytes(512)),
    "swapped samples": lambda s: _overwrite(
        s, place(s, 0, "audio") - 512, s.read_bytes()[place(s, 1, "audio") - 512 :][:4096]
    ),
    "repeated key": lambda s: _overwrite(s, place(s, 1, "audio") - 512, _header(s, 0, "audio", of=1)),
    "interleaved keys": lambda s: _overwrite(s, place(s, 0, "json") - 512, _swapped(s)),
}


def _header(shard: Path, number: int, part: str, of: int) -> bytes:
    """The header of a sample's file, with the size of another sample's."""
    at, size = place(shard, number, part), int(_columns(shard)[f"{part}_size"][of])
    return tarsafe.header(shard.read_bytes()[at - 512 : at].split(b"\0")[0].decode(), size)


def _swapped(shard: Path) -> bytes:
    """The json of sample 0 and the audio of sample 1, which lie side by side, in the other order."""
    middle, end = place(shard, 1, "audio") - 512, place(shard, 1, "json") - 512
    data = shard.read_bytes()
    return data[middle:end] + data[place(shard, 0, "json") - 512 : middle]


def _overwrite(shard: Path, at: int, data: bytes) -> None:
    with shard.open("r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize("name", MUTATIONS)
def test_damage_is_found_by_verify_and_by_reading(copy: Path, name: str) -> None:
    shard = copy / "train-000001.tar"
    assert verify(copy) == []
    MUTATIONS[name](shard)
    problems = verify(copy)
    assert any("SHA-256" in problem for problem in problems)
    assert all(str(shard) in problem for problem in problems)
    says = r"train-000001\.tar: sample k\d\d: what the shard holds is not what its index says"
    with pytest.raises(UserError, match=says):
        _read_all(ShardSet.open(copy))
    shards = ShardSet.open(copy, split="train")
    labels: list[Any] = [None, "happy"]
    requests = Examples(shards, labels, Features()).requests(np.arange(len(shards)))
    decoder = Examples(shards, labels, Features()).decoder(lambda clips: {"keys": [shards.key(c.index) for c in clips]})
    answer = decoder(Request(0, 0, [requests]))  # what a worker does
    assert answer.bad and all("not what its index says" in problem for problem in answer.bad.values())
    assert not {shards.key(i) for i in answer.bad} & set(answer.batches[0]["keys"])


def test_a_damaged_foreign_tar_is_not_silently_shorter(tmp_path: Path, finished: Path) -> None:
    """tarfile lists such a file up to the damage, without an error."""
    for number, at in enumerate([512 * 5, 0]):
        shutil.copy(finished / "train-000000.tar", tmp_path / f"{number}.tar")
        header = place(finished / "train-000000.tar", 2, "audio") - 512 if at else 0
        _overwrite(tmp_path / f"{number}.tar", header, bytes(512) if at else b"\xff")
        with pytest.raises(UserError, match=r"zeroed header|damaged header"):
            ShardSet.open(tmp_path / f"{number}.tar")


def test_truncation_at_any_point(copy: Path) -> None:
    shard = copy / "train-000000.tar"
    data = shard.read_bytes()
    boundary = place(shard, 3, "audio") - 512
    for size in (0, 100, 512, boundary, boundary + 512, len(data) - 1024, len(data) - 512, len(data) - 1):
        shard.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"train-000000\.tar: \d+ bytes where its index says"):
            ShardSet.open(copy)
        assert verify(copy)
        alone = copy.parent / "foreign.tar"  # the same, where no index tells the size
        alone.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"foreign\.tar: .*(cut|damaged)"):
            ShardSet.open(alone)


def test_missing_and_extra_and_foreign_files(copy: Path) -> None:
    shard, index = copy / "train-000002.tar", copy / "train-000002.tar.idx.json"
    shutil.copy(shard, copy / "train-000009.tar")
    assert any("train-000009.tar: an extra shard" in problem for problem in verify(copy))
    (copy / "train-000009.tar").unlink()

    content = index.read_text()
    index.unlink()
    assert any("its index is missing" in problem for problem in verify(copy))
    with pytest.raises(UserError, match="its index is missing"):
        ShardSet.open(copy)
    hollow = json.loads(content)["columns"] | {"crc": []}
    changes: list[dict[str, Any]] = [{"count": 1}, {"columns": hollow}, {"split": "test"}, {"foreign": True}]
    for damage in [content[:-20], content.replace('"k1', '"q1', 1), *(json.loads(content) | c for c in changes)]:
        index.write_text(damage if isinstance(damage, str) else json.dumps(damage))
        with pytest.raises(UserError, match=r"idx\.json: not the index that dataset\.json"):
            ShardSet.open(copy)
        assert verify(copy)
    index.write_text(content)

    shards = ShardSet.open(copy)
    shard.unlink()
    assert any("train-000002.tar: the shard is missing" in problem for problem in verify(copy))
    with pytest.raises(UserError, match=r"train-000002\.tar: the shard is missing"):
        ShardSet.open(copy)
    with pytest.raises(UserError, match=r"train-000002\.tar: cannot be read"):
        _read_all(shards)  # it vanished after it was opened


def test_a_shard_of_another_set_is_noticed(copy: Path, tmp_path: Path) -> None:
    other = write_set(tmp_path / "other", n=21, ext="wav")
    for name in ("train-000001.tar", "train-000001.tar.idx.json"):
        shutil.copy(other / name, copy / name)
    with pytest.raises(UserError, match=r"train-000001\.tar\.idx\.json: not the index that dataset\.json"):
        ShardSet.open(copy)
    assert verify(copy)


def test_a_sample_that_no_index_lists_is_noticed(copy: Path) -> None:
    """The index and dataset.json agree with each other and with the tar's hash, and yet a sample is lost."""
    path = copy / "train-000001.tar.idx.json"
    index = json.loads(path.read_text())
    for column in index["columns"].values():
        del (column["codes"] if isinstance(column, dict) else column)[3]
    index["count"] -= 1
    path.write_text(json.dumps(index))
    description = json.loads((copy / "dataset.json").read_text())
    description["splits"]["train"]["shards"][1]["count"] -= 1
    description["splits"]["train"]["count"] -= 1
    (copy / "dataset.json").write_text(json.dumps(description))
    lost = f"{copy}/train-000001.tar: 0 indexed files not in the tar, 2 files not indexed"
    assert verify(copy) == [f"{path}: its bytes are not those that were written (SHA-256 differs)", lost]
    description["splits"]["train"]["shards"][1]["index"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (copy / "dataset.json").write_text(json.dumps(description))
    assert verify(copy) == [lost]


def test_a_dataset_json_that_tells_other_totals_is_noticed(copy: Path) -> None:
    path = copy / "dataset.json"
    path.write_text(path.read_text().replace('"happy"', '"sad"'))
    assert verify(copy) == [f"{path}: its 'labels' is not what the shards hold"]
    shutil.copy(copy / "train-000000.tar.idx.json", copy / "train-000007.tar.idx.json")
    assert any("an index that dataset.json does not list" in problem for problem in verify(copy))


def test_an_index_of_a_foreign_tar_follows_the_tar(tmp_path: Path) -> None:
    """tarfile pads to 10,240 bytes, so an edited label leaves the size as it was."""
    write_foreign(tmp_path / "a.tar")
    assert set(ShardSet.open(tmp_path).column("label")) == {"sad"}
    size = (tmp_path / "a.tar").stat().st_size
    data = (tmp_path / "a.tar").read_bytes().replace(b'"label": "sad"', b'"label": "joy"')
    (tmp_path / "a.tar").write_bytes(data)
    os.utime(tmp_path / "a.tar", ns=(0, 10**18))
    assert (tmp_path / "a.tar").stat().st_size == size
    assert set(ShardSet.open(tmp_path).column("label")) == {"joy"}
    index = tmp_path / "a.tar.idx.json"
    index.write_text(index.read_text().replace('"joy"', '"fear"'))
    assert verify(tmp_path) == [f"{index}: not what a new scan of the tar gives; delete this index"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (3.5, "3.5"),
        (True, "true"),
        ([1, "é"], '[1,"é"]'),
        ({"a": None}, '{"a":null}'),
        (None, ""),
        ("s", "s"),
    ],
)
def test_json_of_any_type_is_kept_as_text(value: Any, text: str, tmp_path: Path) -> None:
    names = ("emotion", "language", "speaker", "gender", "corpus", "source_id", "text")
    line = dict.fromkeys(names, value) | {"duration": "0.25", "sample_rate": 44100.0, "synthetic": 1}
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for key, one in (("k", line), ("nan", dict.fromkeys(names, float("nan")))):
            data = audio.encode(pcm(0), 16000, "wav")
            writer.write({"__key__": key, "wav": data, "json": json.dumps(one).encode()})
    shards = ShardSet.open(tmp_path / "a.tar")
    assert [shards.column(name)[0] for name in ("emotion", "speaker")] == [text] * 2
    assert shards.column("language")[0] == (text or "und") and shards.column("gender")[0] == (text or None)
    assert shards.column("corpus")[0] == (text or tmp_path.name)
    assert (shards.duration[0], shards.column("sample_rate")[0]) == (0.25, 44100)
    assert shards.column("synthetic").tolist() == [True, False]
    assert shards.column("speaker")[1] == "" and shards.column("language")[1] == "und", "NaN is how Python says none"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"[" * 100_000, "its json cannot be read"),
        (b'{"language": "\\ud800"}', "cannot be printed"),
        (b'{"duration": 1' + b"0" * 400 + b', "sample_rate": 1' + b"0" * 400 + b"}", None),
        (b'{"emotion": "anger"}', None),
    ],
)
def test_odd_json_in_a_foreign_tar(tmp_path: Path, text: bytes, says: str | None) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        writer.write({"__key__": "k", "wav": audio.encode(pcm(0), 16000, "wav"), "json": text})
    if says:
        with pytest.raises(UserError, match=rf"a\.tar: sample k: .*{says}"):
            ShardSet.open(tmp_path)
    else:
        shards = ShardSet.open(tmp_path)
        assert shards.duration[0] == np.float32(len(pcm(0)) / 16000)
        assert shards.column("label")[0] == ("anger" if b"anger" in text else None)


def test_verify_decodes_every_sample(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "set", "set", {}) as writer:
        writer.write("train", "good", audio.encode(pcm(1), 16000), "flac", meta(1))
        writer.write("train", "noise", b"no flac at all", "flac", meta(1))
        writer.write("train", "short", audio.encode(pcm(1), 16000), "flac", meta(1, duration=9.0))
    noise, short = verify(tmp_path / "set")
    assert "sample noise: not readable as audio" in noise
    assert "sample short: 0.10 s of audio, its index says 9.00 s" in short


def test_no_set_at_all(tmp_path: Path) -> None:
    for path, says in ((tmp_path / "nowhere", "no such data set"), (tmp_path, r"holds no \.tar")):
        with pytest.raises(UserError, match=says):
            ShardSet.open(path)
        with pytest.raises(UserError, match=says):
            verify(path)
