"""The store of features: what is read is what was written, by however many; room; memory."""

import concurrent.futures
import json
import os
import pickle
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mser_dist.encoded.store import FeatureStore, make_room
from tests.unit.made_up_features import (
    ADDRESS,
    LAYERS,
    WIDTH,
    ended,
    equal,
    features,
    fill,
    in_child,
    keys,
    same,
    shards,
    unfinished,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DAY = 86400


@pytest.fixture
def said() -> list[str]:
    """What the store warned of."""
    return []


@pytest.fixture
def store(tmp_path: Path, said: list[str]) -> FeatureStore:
    return FeatureStore(tmp_path / "cache", ADDRESS, LAYERS, WIDTH, torch.float16, warn=said.append)


# ---- round trips


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", [1, 2000, 64 << 20])
def test_what_is_read_is_what_was_written(tmp_path: Path, said: list[str], dtype: torch.dtype, limit: int) -> None:
    store = FeatureStore(tmp_path, ADDRESS, LAYERS, WIDTH, dtype, warn=said.append)
    fill(store, range(20), limit)
    assert same(store, range(20)), "in this process"
    assert same(FeatureStore(tmp_path, ADDRESS, LAYERS, WIDTH, dtype), range(20)), "at the next start"
    assert (len(shards(store)) == 1) == (limit > 2000)
    assert not unfinished(store) and not said


def test_features_of_any_layout_in_memory_are_kept(store: FeatureStore) -> None:
    plain = torch.randn(LAYERS, WIDTH, 9, requires_grad=True, dtype=torch.float16)
    with store.writer() as writer:
        writer.add(1, plain.permute(2, 0, 1))
        writer.add(2, plain.permute(2, 0, 1)[::2])
        for wrong in (torch.zeros(3, LAYERS, WIDTH), torch.zeros(3, WIDTH, LAYERS, dtype=torch.float16)):
            with pytest.raises(ValueError, match=r"not \(T, 2, 24\)"):
                writer.add(3, wrong)
    located = store.locate(keys(1, 2, 3))
    assert equal(store.read(located.place(0)), plain.detach().permute(2, 0, 1))
    assert equal(store.read(located.place(1)), plain.detach().permute(2, 0, 1)[::2])
    assert located.missing.tolist() == [False, False, True]


def test_keys_that_are_missing_or_come_twice(store: FeatureStore) -> None:
    assert store.locate(keys(1, 2)).missing.all(), "before the folder is there"
    fill(store, [1, 5, (1 << 64) - 1])
    fill(store, [7])
    wanted = [7, 2, 1, 7, (1 << 64) - 1, 1 << 63, 1, 0]
    located = store.locate(keys(*wanted))
    assert located.missing.tolist() == [False, True, False, False, False, True, False, True]
    for i in np.flatnonzero(~located.missing):
        assert equal(store.read(located.place(int(i))), features(wanted[i]))
    with pytest.raises(KeyError, match="clip 1 has no features yet"):
        located.place(1)
    assert len(store.locate(keys()).file) == 0


def test_the_oldest_of_several_counts(store: FeatureStore) -> None:
    fill(store, [1, 2])
    fill(store, [2, 3])
    old, new = (path.name for path in shards(store))
    located = store.locate(keys(1, 2, 3))
    assert [located.place(i).file for i in range(3)] == [old, old, new]
    with store.writer() as writer:
        for number in (4, 5):
            writer.add(9, features(number))
    assert equal(store.read(store.locate(keys(9)).place(0)), features(4)), "twice in one file"


def test_every_address_has_a_folder_that_says_what_it_is(store: FeatureStore, tmp_path: Path) -> None:
    fill(store, [3])
    turned = dict(reversed(ADDRESS.items()))
    assert FeatureStore(tmp_path / "cache", turned, LAYERS, WIDTH, torch.float16).folder == store.folder
    other = FeatureStore(tmp_path / "cache", ADDRESS | {"stride": 2}, LAYERS, WIDTH, torch.float16)
    assert other.folder != store.folder and other.locate(keys(3)).missing.all()
    assert json.loads((store.folder / "address.json").read_text()) == ADDRESS
    for folder in (store.folder, store.folder.parent):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_features_can_be_mapped(store: FeatureStore) -> None:
    fill(store, [5, 6])
    place = store.locate(keys(6)).place(0)
    mapped = np.memmap(store.folder / place.file, np.float16, "r", place.at, (place.frames, LAYERS, WIDTH))
    assert place.at % 64 == 0 and mapped.tobytes() == features(6).numpy().tobytes()


# ---- processes and threads


def test_forks_pickles_and_threads_read_with_few_open_files(store: FeatureStore) -> None:
    numbers = range(80)  # more files than may be open
    fill(store, numbers, limit=1)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert same(store, numbers)
    assert 60 <= len(os.listdir("/proc/self/fd")) - before <= 64  # noqa: PTH208
    children = [in_child(lambda: same(store, numbers)) for _ in range(2)]
    assert same(store, numbers), "while they read from what they inherited"
    assert [ended(child) for child in children] == [0, 0]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: same(store, numbers), range(4)))
    assert same(pickle.loads(pickle.dumps(FeatureStore(store.folder.parent, ADDRESS, LAYERS, WIDTH, store.dtype))), [3])


def test_writers_and_readers_at_once(store: FeatureStore, said: list[str]) -> None:
    def write(numbers: Any) -> bool:
        fill(store, numbers, limit=3000)
        return same(store, numbers)

    children = [in_child(lambda: write(range(150))), in_child(lambda: write(range(149, 50, -1)))]
    left = set(children)
    while left:  # whatever is seen meanwhile is whole
        located = store.locate(keys(*range(150)))
        assert all(equal(store.read(located.place(int(i))), features(int(i))) for i in np.flatnonzero(~located.missing))
        left -= {child for child in left if os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG)}
    assert [ended(child) for child in children] == [0, 0]
    assert same(store, range(150)) and not said and not unfinished(store)


def test_a_writer_that_is_killed_leaves_what_was_complete(store: FeatureStore, said: list[str]) -> None:
    def die() -> bool:
        with store.writer(limit=3000) as writer:
            for key in range(1, 60):
                writer.add(key, features(key))
            os._exit(7)

    assert ended(in_child(die)) == 7
    [left] = unfinished(store)
    there = ~store.locate(keys(*range(1, 60))).missing
    assert there.any() and not there.all() and same(store, (np.flatnonzero(there) + 1).tolist()) and not said
    fill(store, [70])
    assert unfinished(store) == [left], "it could be of one that writes"
    os.utime(left, (time.time() - DAY - 60,) * 2)
    fill(store, [71])
    assert not unfinished(store)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_block_that_fails_keeps_what_was_complete(store: FeatureStore, failure: type[BaseException]) -> None:
    with pytest.raises(failure), store.writer(limit=1) as writer:
        writer.add(5, features(5))
        writer._limit = 1 << 20
        writer.add(6, features(6))
        raise failure
    assert same(store, [5]) and store.locate(keys(6)).missing.all() and not unfinished(store)


# ---- room


def test_room_is_made_by_removing_others_features_oldest_first(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    mine, recent, old, older = stores = [
        FeatureStore(root, ADDRESS | {"stride": n}, LAYERS, WIDTH, torch.float16) for n in range(4)
    ]
    for store in stores:
        fill(store, range(1, 20), limit=3000)
    for age, store in ((DAY, mine), (600, recent), (7200, old), (14400, older)):
        os.utime(store.folder / "used", (time.time() - age,) * 2)
    stranger = root / "photos" / "1.features"
    stranger.parent.mkdir()
    stranger.write_bytes(bytes(100_000))
    left = older.folder / ".1.partial"
    left.touch()
    os.utime(left, (0, 0))
    total = sum(path.stat().st_size for store in stores for path in store.folder.iterdir())
    count, first = len(shards(older)), shards(older)[0].stat().st_size

    assert make_room(root, 1000, total + 1000, mine.folder) == 1000 and len(shards(older)) == count
    assert not left.exists()
    assert make_room(root, 1000, total + 999, mine.folder) == 999 + first, "one file was enough"
    assert len(shards(older)) == len(shards(old)) - 1 == count - 1
    spare = sum(path.stat().st_size for store in (old, older) for path in shards(store))
    assert make_room(root, total, total, mine.folder) == first + spare
    assert not shards(old) and not shards(older) and same(mine, range(1, 20)) and same(recent, range(1, 20))
    assert make_room(root, 10, 20, mine.folder) == 0
    assert stranger.exists() and make_room(tmp_path / "none", 5, 9, mine.folder) == 9


@pytest.mark.parametrize("use", ["locate", "read", "add"])
def test_features_that_are_used_are_not_removed(store: FeatureStore, use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store, [1])
    place = store.locate(keys(1)).place(0)
    with store.writer() as writer:
        os.utime(store.folder / "used", (0, 0))
        monkeypatch.setattr("mser_dist.encoded.store.MARK_EVERY", 0.0)  # ten minutes have gone by
        if use == "locate":
            store.locate(keys(1))
        elif use == "read":
            store.read(place)
        else:
            writer.add(2, features(2))
        make_room(store.folder.parent, 1, 0, store.folder.parent / ("0" * 24))
    assert same(store, [1])


# ---- memory


@pytest.mark.parametrize("keep", [False, True])
def test_reading_takes_the_memory_of_what_is_kept(tmp_path: Path, keep: bool) -> None:
    store = FeatureStore(tmp_path, ADDRESS, LAYERS, 1024, torch.float32)
    one = torch.ones(122, LAYERS, 1024)  # 1 MB
    with store.writer() as writer:
        for key in range(200):
            writer.add(key, one)

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10  # MiB

    def read() -> bool:
        located = store.locate(keys(*range(200)))
        store.read(located.place(0))
        before, kept = peak(), []
        for clip in range(200):
            kept.append(store.read(located.place(clip)))
            if not keep:
                kept.clear()
        return peak() - before > 150 if keep else peak() - before < 40

    assert ended(in_child(read)) == 0
