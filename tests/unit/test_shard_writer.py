import concurrent.futures
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from mser_dist.data import audio
from mser_dist.data.shard_verify import verify
from mser_dist.data.shards import DatasetWriter, ShardSet
from mser_dist.errors import UserError
from tests.unit.made_up_set import meta, pcm, write_set


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("shards") / "set")


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "set"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"key": "a/b"}, "a key is"),
        ({"key": "../x"}, "a key is"),
        ({"key": "a.b"}, "a key is"),
        ({"key": ""}, "a key is"),
        ({"key": "x" * 91}, "a key is"),
        ({"key": "größe"}, "a key is"),
        ({"key": "k00"}, "the key comes twice"),
        ({"split": "Train/x"}, "no split name"),
        ({"ext": "pyd"}, "bytes of 'pyd'"),
        ({"data": b""}, "0 bytes of 'flac'"),
        ({"label": "joyful"}, "the label 'joyful' is not of the label set happy"),
        ({"label": 3}, "'label' is 3, of the wrong type"),
        ({"speaker": None}, "'speaker' is None"),
        ({"language": ""}, "'language' is empty"),
        ({"duration": 0.0}, "duration 0.0 s"),
        ({"duration": float("nan")}, "duration nan s"),
        ({"duration": True}, "'duration' is True"),
        ({"id": "another"}, "its id 'another'"),
        ({"drop": "source_id"}, "no 'source_id'"),
    ],
)
def test_the_writer_refuses_and_leaves_nothing(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    call: dict[str, Any] = {"split": "train", "key": "k01", "ext": "flac", "data": audio.encode(pcm(1), 16000)}
    info = meta(1) | {name: value for name, value in change.items() if name not in (*call, "drop")}
    info.pop(change.get("drop", ""), None)
    call |= {name: value for name, value in change.items() if name in call}
    with (
        pytest.raises(UserError, match=says) as caught,
        DatasetWriter(tmp_path / "set", "set", {}, labels=["happy"]) as writer,
    ):
        writer.write("train", "k00", audio.encode(pcm(0), 16000), "flac", meta(0))
        writer.write(call["split"], call["key"], call["data"], call["ext"], info)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_error_or_an_empty_set_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), DatasetWriter(tmp_path / "set", "set", {}) as writer:
        writer.write("train", "k00", audio.encode(pcm(0), 16000), "flac", meta(0))
        assert [path.name for path in tmp_path.iterdir()] == ["set.partial"]
        with pytest.raises(UserError, match="still being written"):
            ShardSet.open(tmp_path / "set.partial")
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="not one sample"), DatasetWriter(tmp_path / "set", "set", {}):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full, a disk that is always full")
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"set\.partial: the disk is full \(\d+ MiB free\); free some space"),
        DatasetWriter(tmp_path / "set", "set", {}) as writer,
    ):
        writer.write("train", "k00", audio.encode(pcm(0), 16000), "flac", meta(0))
        writer._open["train"].file.close()
        writer._open["train"].file = Path("/dev/full").open("wb")  # noqa: SIM115 (the writer closes it)
        writer.write("train", "k01", audio.encode(pcm(1), 16000), "flac", meta(1))
    assert list(tmp_path.iterdir()) == []


def test_overwrite_only_when_asked_and_only_a_set(copy: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(UserError, match="already exists"):
        write_set(copy, n=3)
    with pytest.raises(UserError, match="the key comes twice"), DatasetWriter(copy, "x", {}, overwrite=True) as writer:
        for _ in range(2):
            writer.write("train", "k", audio.encode(pcm(0), 16000), "flac", meta(0))
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before  # a failed overwrite costs nothing
    write_set(copy, n=3, overwrite=True)
    assert len(ShardSet.open(copy)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["set"]

    (copy / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"'thesis\.txt', which is not of a data set"):
        write_set(copy, overwrite=True)
    assert (copy / "thesis.txt").read_text() == "mine"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file, where the folder"):
        write_set(tmp_path / "file")


def test_what_a_killed_run_left_is_cleared_but_not_a_running_ones(tmp_path: Path) -> None:
    staging = tmp_path / "set.partial"
    staging.mkdir()
    (staging / "train-000007.tar").write_bytes(b"half")
    write_set(tmp_path / "set")
    assert not staging.exists()
    assert verify(tmp_path / "set") == []

    entered, release = threading.Event(), threading.Event()

    def slow() -> None:
        with DatasetWriter(tmp_path / "two", "two", {}) as writer:
            writer.write("train", "k00", audio.encode(pcm(0), 16000), "flac", meta(0))
            entered.set()
            release.wait(30)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(slow)
        entered.wait(30)
        try:
            with pytest.raises(UserError, match="another process is writing"):
                write_set(tmp_path / "two")
        finally:
            release.set()
        first.result()
    assert ShardSet.open(tmp_path / "two").keys == ["k00"]
