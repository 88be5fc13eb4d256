"""Sets of many shards, and remote ones, are shuffled within a window of shards; small ones as they always were."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.shards.reader import ShardReader
from mser_dist.shards.shard_set import ShardSet
from mser_dist.stream.examples import Examples
from mser_dist.stream.features import Features
from mser_dist.stream.plan import Plan, Position
from mser_dist.stream.steps import WINDOW_SHARDS, check_identity, identity, plan_of
from tools.bench_plan import LABELS, write_small

SHARDS, EACH, BATCH = 150, 2, 20


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("many") / "set"
    write_small(folder, SHARDS, EACH)
    return ShardSet.open(folder)


def plan(shards: ShardSet, parallel: int = 1, wish: tuple[str, ...] = (), **options: Any) -> Plan:
    return plan_of(shards, cfg.TrainingDataConfig(**options), BATCH, parallel, seed=3, wish=wish)


def opens(shards: ShardSet, order: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Shards that one reader opens to read clips in an order."""
    opened: list[str] = []
    plain = ShardReader._open

    def heard(self: ShardReader, shard: Any) -> Any:
        opened.append(shard.name)
        return plain(self, shard)

    monkeypatch.setattr(ShardReader, "_open", heard)
    reader = ShardReader(shards.shards, None)
    for ref in shards.refs(order):
        reader.read(ref)
    return len(opened)


def test_a_set_of_many_shards_opens_each_once_an_epoch(many: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    windowed, whole = plan(many), plan(many, shuffle_shards=0)
    assert (windowed.shuffle_shards, windowed.automatic) == (WINDOW_SHARDS, True)
    assert (whole.shuffle_shards, whole.automatic) == (0, False)
    order = windowed.epoch(1).order[: len(many)]
    assert sorted(order.tolist()) == list(range(len(many))), "every clip once"
    first = many.shard[order[: WINDOW_SHARDS * EACH]]
    assert len(np.unique(first)) == WINDOW_SHARDS and not np.array_equal(first, np.sort(first))
    assert not np.array_equal(order, windowed.epoch(2).order[: len(many)])
    assert opens(many, order, monkeypatch) == SHARDS
    assert opens(many, whole.epoch(1).order[: len(many)], monkeypatch) > SHARDS * 1.1


def test_the_order_is_the_same_from_anywhere_and_on_any_number_of_ranks(many: ShardSet) -> None:
    one, other = plan(many), plan(many)
    other.epoch(2)  # what was asked before does not matter
    for position in one.walk(Position(0, 9), 12):
        batch = one.batch(position)
        for ranks in (1, 4):
            dealt = [i for rank in range(ranks) for part in other.share(position, rank, ranks, 5) for i in part]
            assert sorted(dealt) == sorted(batch.tolist())


def test_packs_take_the_window_too(many: ShardSet) -> None:
    packed = plan(many, batching="tokens", tokens=100)
    assert packed.automatic and len(np.unique(packed.epoch(0).order)) > 0.9 * len(many)


@pytest.mark.parametrize(
    "options", [{"parallel": 2}, {"batching": "bucket"}, {"balance": ["label"]}, {"wish": ("label",)}]
)
def test_what_decides_the_order_otherwise_does_so_alone(many: ShardSet, options: dict[str, Any]) -> None:
    assert plan(many, **options).shuffle_shards == 0


def test_small_sets_are_shuffled_as_ever(many: ShardSet, tmp_path: Path) -> None:
    write_small(tmp_path / "set", 128, 1)
    small = ShardSet.open(tmp_path / "set")
    random = np.random.default_rng([3, 0])
    plain = np.resize(random.permutation(np.arange(128, dtype=np.int32)), 140)
    assert np.array_equal(plan(small).epoch(0).order, plain)


def remote(shards: ShardSet, gigabytes: float) -> ShardSet:
    """The same, as if each shard lay elsewhere and were so large."""
    found = ShardSet.__new__(ShardSet)
    found.__dict__.update(shards.__dict__)
    size = int(gigabytes * 1e9 / SHARDS)
    found.shards = [replace(shard, name=f"s3://bucket/{i}.tar", bytes=size) for i, shard in enumerate(shards.shards)]
    return found


def test_a_remote_set_takes_what_fits_the_cache_twice(many: ShardSet) -> None:
    assert plan(remote(many, 10.0)).shuffle_shards == WINDOW_SHARDS
    large = remote(many, 1000.0)
    assert plan(large).shuffle_shards == 7
    told = r"1000\.0 GB and the cache 100 GB.*Set data\.shuffle_shards=7, or raise"
    with pytest.raises(UserError, match=told):
        plan(large, shuffle_shards=0)
    with pytest.raises(UserError, match=told):
        plan(large, parallel=2)


def test_a_checkpoint_of_another_window_is_refused_with_what_to_set(many: ShardSet) -> None:
    clips = Examples(many, LABELS, Features())
    windowed, whole = identity(clips, plan(many)), identity(clips, plan(many, shuffle_shards=0))
    check_identity(windowed, windowed)
    older = {name: value for name, value in whole.items() if name not in ("shuffle_shards", "automatic")}
    check_identity(older, whole)
    check_identity(older, identity(clips, plan(many, shuffle_shards=9)))  # its config says the same
    with pytest.raises(UserError, match=r"set data\.shuffle_shards=0 to go on in that order"):
        check_identity(older, windowed)
    for other, remedy in ((whole, 64), (identity(clips, plan(many, shuffle_shards=9)), 64)):
        with pytest.raises(UserError, match=rf"data\.shuffle_shards is 64, and now it is \d: set .*={remedy};"):
            check_identity(windowed, other)
        check_identity(windowed, identity(clips, plan(many, shuffle_shards=remedy)))


def test_a_window_is_of_shards_that_have_clips(many: ShardSet) -> None:
    """Others lie between them: of another split, or of what a filter leaves out."""
    sparse = ShardSet.__new__(ShardSet)
    sparse.__dict__.update(many.__dict__)
    sparse.shard = many.shard.astype(np.int32) * 20
    sparse.shards = [many.shards[i // 20] for i in range(20 * SHARDS)]
    for shuffle_shards in (None, WINDOW_SHARDS):
        order = plan(sparse, shuffle_shards=shuffle_shards).epoch(1).order
        assert np.array_equal(order, plan(many, shuffle_shards=shuffle_shards).epoch(1).order)
    clips = Examples(sparse, LABELS, Features())
    asked = identity(clips, plan(sparse, shuffle_shards=9))
    with pytest.raises(UserError, match="another version of mser_dist put the clips in another order"):
        check_identity({name: value for name, value in asked.items() if name != "windows"}, asked)
