"""The store of features where files are damaged, foreign or gone, or the disk is full: nothing wrong is ever read."""

import errno
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from mser_dist.encoded import layout
from mser_dist.encoded.store import FeatureStore
from mser_dist.errors import UserError
from tests.unit.made_up_features import (
    ADDRESS,
    LAYERS,
    WIDTH,
    ended,
    features,
    fill,
    in_child,
    keys,
    same,
    shards,
    unfinished,
)


@pytest.fixture
def said() -> list[str]:
    """What the store warned of."""
    return []


@pytest.fixture
def store(tmp_path: Path, said: list[str]) -> FeatureStore:
    return FeatureStore(tmp_path / "cache", ADDRESS, LAYERS, WIDTH, torch.float16, warn=said.append)


# ---- damage


def small(store: FeatureStore) -> tuple[Path, bytes]:
    """A file of two clips, and its bytes."""
    fill(store, [1, 2])
    [path] = shards(store)
    return path, path.read_bytes()


def test_a_file_that_is_cut_anywhere_or_grown_is_passed_over(store: FeatureStore, said: list[str]) -> None:
    path, whole = small(store)
    lengths = [*range(len(whole)), len(whole) + 1, len(whole) + 64]
    for length in lengths:
        path.write_bytes(whole[:length].ljust(length, b"\0"))
        assert store.locate(keys(1, 2)).missing.all(), length
    [once] = said
    assert "damaged" in once and str(path) in once and "\n" not in once, "each file is told of once"
    path.write_bytes(whole)
    assert same(store, [1, 2])


def test_a_byte_changed_anywhere_is_noticed(store: FeatureStore, said: list[str]) -> None:
    path, whole = small(store)
    table_at = layout.FOOT.unpack(whole[-layout.FOOT.size :])[1]
    located = store.locate(keys(1, 2))
    clips = {int(at + i) for clip, at in enumerate(located.at) for i in range(features(clip + 1).nbytes)}
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        if at < layout.HEAD or at >= table_at:
            assert store.locate(keys(1, 2)).missing.all(), at
        elif at in clips:
            again = store.locate(keys(1, 2))
            assert not again.missing.any()
            with pytest.raises(UserError, match=r"damaged .*: remove that file, and its clips are encoded anew") as one:
                for clip in range(2):
                    store.read(again.place(clip))
            assert str(path) in str(one.value) and "\n" not in str(one.value)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("other", "content"),
    [
        ("of another address", None),
        ("of another form", None),
        ("no file of features", b"PK\3\4" + bytes(1000)),
        ("a folder", None),
    ],
)
def test_what_is_not_this_encoders_is_passed_over(
    store: FeatureStore, said: list[str], tmp_path: Path, other: str, content: bytes | None
) -> None:
    fill(store, [2])
    stranger = store.folder / "0stranger.features"  # before ours by name
    if content:
        stranger.write_bytes(content)
    elif other == "a folder":
        stranger.mkdir()
    else:
        wider = other == "of another form"
        elsewhere = FeatureStore(
            tmp_path / "other", ADDRESS if wider else {"encoder": "cd"}, LAYERS, WIDTH * (1 + wider), torch.float16
        )
        fill(elsewhere, [1, 2])
        shards(elsewhere)[0].rename(stranger)
    assert store.locate(keys(1, 2)).missing.tolist() == [True, False] and same(store, [2])
    [once] = said
    assert "0stranger.features" in once and "passed over" in once and "\n" not in once


def test_a_table_that_leads_out_of_its_file_is_not_believed(store: FeatureStore, said: list[str]) -> None:
    path, whole = small(store)
    table_at = layout.FOOT.unpack(whole[-layout.FOOT.size :])[1]
    rows = np.frombuffer(whole[table_at : -layout.FOOT.size], layout.ROW)
    for field, value in (("frames", 1 << 31), ("frames", 3), ("at", 0), ("at", table_at), ("at", (1 << 64) - 64)):
        wrong = rows.copy()
        wrong[field][1] = value
        path.write_bytes(whole[:table_at] + layout.tail(store.head, wrong, table_at))  # its checksums agree
        assert store.locate(keys(1, 2)).missing.all(), (field, value)
    assert "its table leads out of it" in said[0]


def test_a_file_that_is_gone_or_cannot_be_read(store: FeatureStore) -> None:
    path, _ = small(store)
    place = store.locate(keys(1)).place(0)
    path.rename(path.with_suffix(".away"))
    with pytest.raises(UserError, match=r"removed since the start: start again"):
        store.read(place)
    path.mkdir()
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        store.read(place)


def test_the_default_warning_is_a_line_for_the_terminal(
    store: FeatureStore, capsys: pytest.CaptureFixture[str]
) -> None:
    path, whole = small(store)
    path.write_bytes(whole[:-1])
    FeatureStore(store.folder.parent, ADDRESS, LAYERS, WIDTH, torch.float16).locate(keys(1))
    said = capsys.readouterr().err
    assert said.startswith(f"mser: warning: {path}: is damaged") and said.count("\n") == 1


# ---- disks


def test_a_full_disk_says_what_to_do_and_keeps_what_was_complete(small_disk: Path) -> None:
    store = FeatureStore(small_disk / "cache", ADDRESS, LAYERS, 1000, torch.float32)
    with pytest.raises(UserError, match=r"the disk is full: free space, .* encoder.cache_dir, or .*cache=off") as error:
        fill(store, range(1, 200), limit=200_000)
    assert str(store.folder) in str(error.value) and "\n" not in str(error.value)
    there = np.flatnonzero(~store.locate(keys(*range(1, 200))).missing) + 1
    assert len(there) >= 6 and same(store, there.tolist()) and not unfinished(store)


def test_a_disk_that_is_full_from_the_start(small_disk: Path) -> None:
    (small_disk / "cache").mkdir()
    with pytest.raises(OSError, match="No space left") as full, (small_disk / "filler").open("wb", 0) as file:
        while file.write(bytes(4096)):
            pass
    assert full.value.errno == errno.ENOSPC
    with pytest.raises(UserError, match="the disk is full"):
        fill(FeatureStore(small_disk / "cache", ADDRESS, LAYERS, WIDTH, torch.float16), [1])


def test_a_file_that_may_not_be_written_says_so(store: FeatureStore) -> None:
    def write() -> bool:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        with pytest.raises(UserError, match=r"cannot be written \(File too large\): choose another folder"):
            fill(store, range(1, 60))
        return not shards(store) and not unfinished(store)

    assert ended(in_child(write)) == 0


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = FeatureStore(tmp_path / "file", ADDRESS, LAYERS, WIDTH, torch.float16)
    assert store.locate(keys(1)).missing.all()
    with pytest.raises(UserError, match="features cannot be written"):
        fill(store, [1])
