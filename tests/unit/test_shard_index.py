"""An index or a dataset.json may come from anyone: what they say is checked before it is used."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import webdataset

from mser_dist import audio
from mser_dist.cli import main as cli
from mser_dist.errors import UserError
from mser_dist.shards import index as shard_index
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.verify import verify
from mser_dist.shards.writer import DatasetWriter
from tests.unit.made_up_set import meta, pcm, write_set


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """A shard whose index no dataset.json vouches for."""
    folder = write_set(tmp_path / "set")
    (folder / "dataset.json").unlink()
    for path in folder.iterdir():
        if not path.name.startswith("test-"):
            path.unlink()
    return folder / "test-000000.tar"


def names(*values: Any) -> dict[str, Any]:
    return {"names": list(values), "codes": [0] * 4}


HOSTILE: dict[str, dict[str, Any]] = {
    "a place that is no number": {"audio_at": ["x"] * 4},
    "a place between two numbers": {"audio_at": [512.5] * 4},
    "a place before the tar": {"audio_at": [-512] * 4},
    "a place in no header's reach": {"json_at": [511] * 4},
    "a terabyte": {"audio_size": [1 << 40] * 4},
    "a terabyte of json": {"json_size": [1 << 40] * 4},
    "more than a machine's number": {"audio_size": [1 << 80] * 4},
    "a source that is none": {"source": [1 << 70] * 4},
    "a key that is none": {"key": [5] * 4},
    "a key on two lines": {"key": ["a\nb"] * 4},
    "a duration that is none": {"duration": ["x"] * 4},
    "no duration at all": {"duration": [float("nan")] * 4},
    "a negative duration": {"duration": [-1.0] * 4},
    "a name that is a list": {"language": names(["x"])},
    "a rate that is a word": {"sample_rate": names("a")},
    "a name that drives the terminal": {"language": names("\x1b[2J")},
    "a code that is a fraction": {"language": {"names": ["de"], "codes": [0.5] * 4}},
    "a code of no name": {"language": {"names": ["de"], "codes": [1] * 4}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_index_that_lies_is_one_line(tar: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tar.with_name(tar.name + shard_index.SUFFIX)
    index = json.loads(path.read_text())
    index["columns"] |= HOSTILE[name]
    path.write_text(json.dumps(index))
    tracemalloc.start()
    says = f"{path}: the index contradicts itself or its tar"
    with pytest.raises(UserError, match=says):
        ShardSet.open(tar)
    assert [problem.partition(";")[0] for problem in verify(tar)] == [says]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert cli.main(["inspect", str(tar)]) == 2
    assert cli.main(["verify", str(tar)]) == 1
    assert capsys.readouterr().err.count("mser: error: ") == 1


@pytest.mark.parametrize("value", [{"count": 4.0}, {"count": True}, {"bytes": "many"}, {"split": 5}, {"columns": []}])
def test_an_index_without_its_facts(tar: Path, value: dict[str, Any]) -> None:
    path = tar.with_name(tar.name + shard_index.SUFFIX)
    path.write_text(json.dumps(json.loads(path.read_text()) | value))
    with pytest.raises(UserError, match="the index contradicts itself"):
        ShardSet.open(tar)


def test_json_that_is_too_deep(tar: Path) -> None:
    for path in (tar.with_name(tar.name + shard_index.SUFFIX), tar.with_name("dataset.json")):
        path.write_text("[" * 200_000)
        with pytest.raises(UserError, match=rf"{path.name}: not valid JSON"):
            ShardSet.open(tar.parent)


def test_a_dataset_json_with_a_file_that_is_no_name(tar: Path) -> None:
    shard = {"count": 1, "bytes": 1, "sha256": "", "index": ""}
    for file in (5, None, "../other.tar", "/etc/passwd"):
        text = json.dumps({"version": 2, "splits": {"train": {"shards": [{"file": file, **shard}]}}})
        tar.with_name("dataset.json").write_text(text)
        with pytest.raises(UserError, match=r"dataset\.json|does not (list its|describe each of its) shards"):
            ShardSet.open(tar.parent)
        assert len(verify(tar.parent)) == 1


def test_control_characters_are_refused_and_other_scripts_are_not(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "set", "set", {}) as writer:
        data = audio.encode(pcm(0), 16000)
        with pytest.raises(UserError, match=r"'speaker' is 'a\\x1bb', with control characters"):
            writer.write("train", "a", data, "flac", meta(0, speaker="a\x1bb"))
        writer.write("train", "b", data, "flac", meta(0, emotion="بی\u200cتفاوت", speaker="a\u00a0b"))
    assert ShardSet.open(tmp_path / "set").coded["emotion"].names == ["بی\u200cتفاوت"]
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        text = json.dumps({"emotion": "بی\u200cتفاوت"}).encode()
        writer.write({"__key__": "k", "wav": audio.encode(pcm(0), 16000, "wav"), "json": text})
    for _ in range(2):  # by a scan, and from the index that it left
        assert ShardSet.open(tmp_path / "a.tar").coded["emotion"].names == ["بی\u200cتفاوت"]


def test_an_empty_tar_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(1024))
    assert verify(tmp_path) == [f"{tmp_path}: no sample is in it, the set is empty"]
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "the set is empty" in capsys.readouterr().err


def test_an_extra_shard_is_noticed_in_training_too(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    (folder / "train-000009.tar").write_bytes((folder / "train-000002.tar").read_bytes())
    with pytest.raises(UserError, match=r"train-000009\.tar: an extra shard that dataset\.json does not list; remove"):
        ShardSet.open(folder, split="test")
