"""Ranks of one node share one table of a set; what they see is what each would have read itself."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mser_dist.errors import UserError
from mser_dist.shards import node, source
from mser_dist.shards.columns import FIELDS
from mser_dist.shards.shard_set import ShardSet
from tests.unit.made_up_set import write_set

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mser_dist.shards.shard_set"])


@pytest.fixture
def a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process as rank 0 of two, with a folder of its own in place of /dev/shm."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "7"}.items():
        monkeypatch.setenv(name, value)
    shared = tmp_path / "shm"
    shared.mkdir(mode=0o700)
    monkeypatch.setattr(node, "_folder", lambda: shared)
    yield shared


def same(one: ShardSet, two: ShardSet) -> None:
    assert one.fingerprint() == two.fingerprint() and one.keys == two.keys
    assert one.shards == two.shards
    for name in ("duration", "source", "sound", "peak", "shard"):
        a, b = getattr(one, name), getattr(two, name)
        assert np.array_equal(a, b) and a.dtype == b.dtype
    for name in FIELDS:
        assert one.column(name).tolist() == two.column(name).tolist() and one.coded[name].names == two.coded[name].names
    assert one.read(1) == two.read(1) and one.refs([0, 2]) == two.refs([0, 2])


def test_the_second_rank_reads_no_index(finished: Path, a_rank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = ShardSet.open(finished, sound=True)
    monkeypatch.setattr("mser_dist.shards.shard_set.load_all", lambda *a: pytest.fail("an index was read"))
    shared = ShardSet.open(finished, sound=True)
    same(alone, shared)
    assert not shared.duration.flags.owndata and not shared.duration.flags.writeable, "mapped"
    with pytest.raises(pytest.fail.Exception, match="an index was read"):
        ShardSet.open(finished, sound=True, keep={"label": ["anger"]})


def test_what_a_rank_finds_wrong_the_others_say(finished: Path, a_rank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as first:
        ShardSet.open(finished, keep={"label": ["nothing"]})
    monkeypatch.setattr("mser_dist.shards.shard_set.load_all", lambda *a: pytest.fail("an index was read"))
    with pytest.raises(UserError) as second:
        ShardSet.open(finished, keep={"label": ["nothing"]})
    assert str(first.value) == str(second.value)


def test_a_set_that_was_written_anew_and_a_rank_that_is_gone_are_not_believed(
    copy: Path, a_rank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ShardSet.open(copy)
    shutil.rmtree(copy)
    shutil.move(str(write_set(tmp_path / "again")), copy)
    looked: list[Any] = []
    plain = source.load_all

    def heard(*given: Any) -> Any:
        looked.append(given)
        return plain(*given)

    monkeypatch.setattr("mser_dist.shards.shard_set.load_all", heard)
    ShardSet.open(copy)
    assert len(looked) == 1, "another set of the same name"
    for table in a_rank.glob("*/table.json"):
        table.write_text(table.read_text().replace(f'"owner": [{os.getpid()},', '"owner": [999999,'))
    ShardSet.open(copy)
    assert len(looked) == 2, "its owner is gone"
    assert len(list(a_rank.glob("*/table.json"))) == 1, "and what it left is removed"


def test_one_process_and_a_node_without_room_share_nothing(
    finished: Path, a_rank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("numpy.ascontiguousarray", lambda array: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert len(ShardSet.open(finished)) and not list(a_rank.glob("*/"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(node, "_write", lambda *a: pytest.fail("shared"))
    assert len(ShardSet.open(finished))


def open_as(rank: int, folder: str, found: "Queue[Any]") -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="6", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{os.getppid() % 60000}")
    opened = ShardSet.open(folder)
    place = node._folder()
    assert place is not None and not opened.duration.flags.writeable, "mapped, by the one who has written it too"
    owners = [json.loads(table.read_text(encoding="utf-8"))["owner"][0] for table in place.glob("*/table.json")]
    found.put((opened.fingerprint(), os.getpid() in owners))
    if os.getpid() in owners:  # who has written it goes last
        while found.qsize() < 6:
            pass


def test_of_six_ranks_that_begin_at_once_one_reads(finished: Path) -> None:
    found: Queue[Any] = CONTEXT.Queue()
    ranks = [CONTEXT.Process(target=open_as, args=(rank, str(finished), found)) for rank in range(6)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    answers = [found.get() for _ in ranks]
    assert len({fingerprint for fingerprint, _ in answers}) == 1
    assert sum(own for _, own in answers) == 1
