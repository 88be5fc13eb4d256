import concurrent.futures
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from mser_dist import audio
from mser_dist.errors import UserError
from mser_dist.shards import index as shard_index
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.verify import verify
from mser_dist.shards.writer import DatasetWriter
from tests.unit.made_up_set import meta, pcm, write_set


def test_written_set_reads_back(finished: Path) -> None:
    shards = ShardSet.open(finished)
    assert len(shards) == 20
    assert sorted(path.name for path in finished.glob("*.tar")) == [
        "test-000000.tar",
        *(f"train-{i:06d}.tar" for i in range(3)),
    ]
    for i, key in enumerate(shards.keys):
        number = int(key[1:])
        sample = shards.read(i)
        assert sample.key == key
        np.testing.assert_array_equal(audio.to_pcm16(audio.decode(sample.audio, key)), pcm(number))
        split = "test" if number % 5 == 0 else "train"
        assert sample.meta == meta(number) | {"id": key, "split": split}
        for name in (*shard_index.CODED, "split"):
            assert shards.column(name)[i] == sample.meta[name]
        assert shards.source[i] == shard_index.source("made-up", sample.meta["source_id"])
        assert shards.duration[i] == np.float32(sample.meta["duration"])


def test_dataset_json_totals(finished: Path) -> None:
    description = json.loads((finished / "dataset.json").read_text())
    assert {name: split["count"] for name, split in description["splits"].items()} == {"test": 4, "train": 16}
    assert description["totals"]["de"]["joy"] == {"test": 1, "train": 2}  # 3, 9, 15
    assert sum(n for e in description["totals"].values() for s in e.values() for n in s.values()) == 20
    assert description["labels"] == ["happy"]
    assert description["speakers"]["test"] == ["s0", "s1", "s2", "s3"]
    assert description["sample_rates"] == {"16000": 20}
    seconds = sum(len(pcm(i)) for i in range(20)) / 16000
    assert sum(split["hours"] for split in description["splits"].values()) == pytest.approx(seconds / 3600, abs=2e-6)


def test_same_input_same_bytes(finished: Path, tmp_path: Path) -> None:
    again = write_set(tmp_path / "elsewhere")
    names = sorted(path.name for path in finished.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    for name in names:
        assert (finished / name).read_bytes() == (again / name).read_bytes()


def test_filters(finished: Path) -> None:
    assert set(ShardSet.open(finished, split="train").column("split")) == {"train"}
    greek = ShardSet.open([finished], keep={"language": "el"}, labels={"happy"})
    assert sorted(greek.keys) == ["k01", "k07", "k13", "k19"]
    assert [greek.read(i).key for i in range(len(greek))] == greek.keys
    assert greek.coded["language"].names == ["el"]
    long = ShardSet.open(finished, keep={"duration": [0.11, 0.115]})
    assert sorted(long.keys) == [f"k{i:02d}" for i in range(20) if 0.11 <= len(pcm(i)) / 16000 <= 0.115]
    rest = ShardSet.open(finished, drop={"speaker": ["s0", "s1"], "key": "k03"}, keep={"synthetic": True})
    assert sorted(rest.keys) == [f"k{i:02d}" for i in range(20) if i % 4 in (2, 3) and i != 3]
    pairs = list(zip(*(ShardSet.open(finished).column(name) for name in ("language", "speaker")), strict=True))
    together = ShardSet.open(finished, drop={"language/speaker": ["el/s1", "de/s0"]})
    assert len(together) == sum(pair not in {("el", "s1"), ("de", "s0")} for pair in pairs) < 20
    assert ("el", "s1") in pairs and {"el", "de"} <= set(together.column("language"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"split": "val"}, r"no sample is left by the filter: split \['val'\] of \['test', 'train'\]"),
        ({"keep": {"corpus": []}}, "no sample is left by the filter: corpus"),
        ({"keep": {"duration": [5, 9]}}, r"no sample is left by the filter: duration \[5.0, 9.0\]"),
        ({"drop": {"language": ["de", "el", "fr"]}}, "no sample is left by the filter: without language"),
        ({"keep": {"corpus": "made_up"}}, "no sample has corpus 'made_up': did you mean made-up?"),
        ({"drop": {"key": ["k99x"]}}, "no sample has key 'k99x'"),
        (
            {"drop": {"corpus/speaker": ["made-up/s9"]}},
            "no sample has corpus/speaker 'made-up/s9': did you mean made-up/s",
        ),
        ({"drop": {"corpus/key": ["made-up/k01"]}}, "no field 'corpus/key' to filter by"),
        ({"keep": {"langauge": "de"}}, "no field 'langauge' to filter by: did you mean language?"),
        ({"keep": {"duration": 5}}, r"a filter by duration is \[shortest, longest\]"),
    ],
)
def test_a_filter_that_cannot_be_meant(finished: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        ShardSet.open(finished, **options)


def test_the_fingerprint_is_of_what_is_there(finished: Path, tmp_path: Path) -> None:
    whole = ShardSet.open(finished).fingerprint()
    moved = Path(shutil.copytree(finished, tmp_path / "moved"))
    assert ShardSet.open(moved).fingerprint() == whole
    assert ShardSet.open(finished, drop={"key": "k03"}).fingerprint() != whole
    assert ShardSet.open(write_set(tmp_path / "wav", ext="wav")).fingerprint() != whole


def test_two_sets_together_and_the_same_twice(finished: Path, tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "other", "other", {}) as writer:
        writer.write("train", "k03", audio.encode(pcm(1), 16000), "flac", meta(1))  # a key that the other set has too
    both = ShardSet.open([finished, tmp_path / "other"])
    assert len(both) == 21
    assert both.read(20).key == "k03"
    assert both.column("set").tolist() == [0] * 20 + [1]
    with pytest.raises(UserError, match="the same shard is named twice"):
        ShardSet.open([finished, finished])
    for name in ("a.tar", "b.tar"):
        shutil.copy(finished / "test-000000.tar", tmp_path / name)
    with pytest.raises(UserError, match=r"b\.tar: the key 'k\d\d' is also in .*a\.tar"):
        ShardSet.open(tmp_path)


def _read_all(shards: ShardSet) -> list[str]:
    return [shards.read(i).meta["id"] for i in range(len(shards))]


def test_reads_in_threads_forks_and_spawns(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mser_dist.shards.reader.MAX_OPEN", 2
    )  # fewer than the shards, so that files are closed and reopened
    shards = ShardSet.open(finished)
    assert _read_all(shards) == shards.keys
    assert _read_all(pickle.loads(pickle.dumps(shards))) == shards.keys
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(keys == shards.keys for keys in pool.map(_read_all, [shards] * 16))
    pid = os.fork()
    if pid == 0:
        os._exit(0 if _read_all(shards) == shards.keys else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert _read_all(shards) == shards.keys


# ---- plain WebDataset, both ways


def test_webdataset_reads_our_shards(finished: Path) -> None:
    files = [str(path) for path in sorted(finished.glob("train-*.tar"))]
    samples = list(webdataset.WebDataset(files, shardshuffle=False, empty_check=False))
    assert sorted(sample["__key__"] for sample in samples) == [f"k{i:02d}" for i in range(20) if i % 5]
    for sample in samples:
        number = int(sample["__key__"][1:])
        assert json.loads(sample["json"])["text"] == "größer"
        np.testing.assert_array_equal(audio.to_pcm16(audio.decode(sample["flac"], "clip")), pcm(number))


LONG = "long_" + "x" * 120


def write_foreign(path: Path, with_json: bool = True) -> Path:
    """A tar of the webdataset package, with what needs pax headers: fractional times, long and non-ASCII names."""
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for i, key in enumerate(["plain", LONG, "sub/folder", "größe", "пример"]):
            sample: dict[str, Any] = {
                "__key__": key,
                "wav": audio.encode(pcm(i), 16000, "wav"),
                "txt": b"ignored",
                "cls": b"3",
            }
            if with_json:
                sample["json"] = json.dumps({"label": "sad", "language": "ru", "split": "val"}).encode()
            writer.write(sample)
    assert b"PaxHeader" in path.read_bytes()
    return path


@pytest.mark.parametrize("with_json", [True, False])
def test_a_tar_of_webdataset_is_indexed_on_first_use(tmp_path: Path, with_json: bool) -> None:
    tar = write_foreign(tmp_path / "data-0.tar", with_json)
    shards = ShardSet.open(tmp_path)
    assert sorted(shards.keys) == sorted(["plain", LONG, "sub/folder", "größe", "пример"])
    for i in range(len(shards)):
        number = ["plain", LONG, "sub/folder", "größe", "пример"].index(shards.keys[i])
        sample = shards.read(i)
        np.testing.assert_array_equal(audio.to_pcm16(audio.decode(sample.audio, "clip")), pcm(number))
        assert shards.duration[i] == pytest.approx(len(pcm(number)) / 16000)
        assert sample.meta == ({"label": "sad", "language": "ru", "split": "val"} if with_json else {})
    assert set(shards.column("language")) == ({"ru"} if with_json else {"und"})
    assert set(shards.column("split")) == ({"val"} if with_json else {""})
    assert verify(tmp_path) == []
    assert (tmp_path / "data-0.tar.idx.json").exists()
    os.utime(tar, (0, 0))
    assert ShardSet.open(tar).keys == shards.keys  # from the cached index


def test_a_foreign_tar_that_was_replaced_is_indexed_anew(tmp_path: Path) -> None:
    write_foreign(tmp_path / "a.tar")
    assert len(ShardSet.open(tmp_path)) == 5
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        writer.write({"__key__": "only", "wav": audio.encode(pcm(0), 16000, "wav")})
    assert ShardSet.open(tmp_path).keys == ["only"]
