import concurrent.futures
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mser_dist import audio
from mser_dist.errors import UserError
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.verify import verify
from mser_dist.shards.writer import DatasetWriter, shard_name
from tests.unit.made_up_set import meta, pcm, write_set


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
        ({"label": ""}, "'label' is empty"),
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


# ---- going on where a writer was stopped


PLAN = {shard_name(split, n): [f"{split}-{n}-{i}" for i in range(2 if n == 3 else 3)] for split in ("test", "train")
        for n in range(4)}  # fmt: skip
RECIPES = {file: f"how-{file}-is-made" for file in PLAN}


class Stopped(BaseException):
    pass


def write_plan(out: Path, stop: int | None = None, recipes: dict[str, str] = RECIPES) -> frozenset[str]:
    """Write what is missing of PLAN, or stop before sample number `stop` of that. Returns the shards that were kept."""
    with DatasetWriter(out, "set", {}, shard_samples=3, recipes=recipes) as writer:
        missing = [(file, key) for file in PLAN if file not in writer.kept for key in PLAN[file]]
        for i, (file, key) in enumerate(missing):
            if i == stop:
                raise Stopped
            info = meta(i=0, speaker=key, source_id=key, duration=0.1 + len(key))
            writer.write(file.split("-")[0], key, f"audio of {key}".encode(), "flac", info)
    return writer.kept


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 4
    path.write_bytes(data)


@settings(max_examples=40, deadline=None)
@given(
    stops=st.lists(st.integers(0, 21), min_size=1, max_size=4),
    damage=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 10**6)), max_size=2),
)
def test_however_often_it_is_stopped_the_bytes_are_the_same(stops: list[int], damage: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out, staging = Path(folder) / "set", Path(folder) / "set.partial"
        write_plan(Path(folder) / "whole")
        for stop in stops:
            with suppress(Stopped):
                write_plan(out, stop)
            if out.exists():
                break
            files = sorted(path for path in staging.glob("*") if path.stat().st_size)
            for number, at in damage if files else []:
                flip(files[number % len(files)], at)
        if not out.exists():
            write_plan(out)
        assert contents(out) == contents(Path(folder) / "whole")
        assert not staging.exists()


def test_finished_shards_stay_and_nothing_else(tmp_path: Path) -> None:
    staging = tmp_path / "set.partial"
    for stop, finished in ((2, 0), (7, 2), (4, 3)):
        with pytest.raises(Stopped):
            write_plan(tmp_path / "set", stop)
        files = [file + end for file in [*PLAN][:finished] for end in ("", ".idx.json")]
        assert {path.name for path in staging.glob("*")} == ({*files, ".lock", ".packed"} if files else set())
    with pytest.raises(UserError, match="still being written"):
        ShardSet.open(staging)
    (staging / "train-000000.tar").write_bytes(b"half, by a writer that was killed")
    assert write_plan(tmp_path / "set") == {*[*PLAN][:3]}


@pytest.mark.parametrize(
    ("harm", "lost"),
    [
        (lambda staging: flip(staging / "test-000001.tar", 700), 1),
        (lambda staging: flip(staging / "test-000001.tar.idx.json", 300), 1),
        (lambda staging: (staging / "test-000001.tar").write_bytes(b""), 1),
        (lambda staging: (staging / "test-000001.tar").unlink(), 1),
        (lambda staging: (staging / "test-000001.tar.idx.json").unlink(), 1),
        (lambda staging: (staging / ".packed").unlink(), 3),
        (lambda staging: (staging / ".packed").write_bytes((staging / ".packed").read_bytes()[:-70]), 1),
        (lambda staging: (staging / ".packed").write_bytes(b"\xff\x00" * 99), 3),
    ],
)
def test_a_damaged_shard_is_written_again(harm: Any, lost: int, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        write_plan(tmp_path / "set", 10)
    harm(tmp_path / "set.partial")
    assert len(write_plan(tmp_path / "set")) == 3 - lost
    write_plan(tmp_path / "whole")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_a_shard_of_another_recipe_is_written_again(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        write_plan(tmp_path / "set", 10)
    with pytest.raises(Stopped):
        write_plan(tmp_path / "set", 1, RECIPES | {"test-000001.tar": "another-way"})
    assert write_plan(tmp_path / "set") == {"test-000000.tar", "test-000002.tar"}


def test_a_forgotten_sample_is_noticed(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "set", "set", {}, recipes={"train-000000.tar": "a", "train-000001.tar": "b"})
    with pytest.raises(ValueError, match="not those that recipes"), writer:
        writer.write("train", "k", b"audio", "flac", meta(0))
    assert not (tmp_path / "set").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full, a disk that is always full")
@pytest.mark.parametrize("what", ["tar", "journal"])
def test_a_full_disk_keeps_the_finished_shards(what: str, tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "set", "set", {}, shard_samples=3, recipes=RECIPES)
    with pytest.raises(UserError, match="the disk is full"), writer:
        for i, key in enumerate(key for file in PLAN for key in PLAN[file]):
            info = meta(i=0, speaker=key, source_id=key, duration=0.1 + len(key))
            writer.write("test", key, f"audio of {key}".encode(), "flac", info)
            if i == 6:
                owner: Any = writer._open["test"] if what == "tar" else writer._journal
                name = "file" if what == "tar" else "_file"
                getattr(owner, name).close()
                setattr(owner, name, Path("/dev/full").open("wb" if what == "tar" else "w"))  # noqa: SIM115
    assert write_plan(tmp_path / "set") == {"test-000000.tar", "test-000001.tar"}
    write_plan(tmp_path / "whole")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
