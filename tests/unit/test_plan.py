import tracemalloc
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mser_dist.errors import UserError
from mser_dist.shards.columns import Column
from mser_dist.stream.balance import Balance, fields_of
from mser_dist.stream.packing import pack
from mser_dist.stream.plan import Plan, Position
from tools import bench_packing


def fresh(plan: Plan, **changes: Any) -> Plan:
    return Plan(**({f.name: getattr(plan, f.name) for f in fields(plan) if f.init} | changes))


def column(codes: Any, names: str) -> Column:
    return Column(np.asarray(codes), list(names))


@st.composite
def plans(draw: st.DrawFn) -> tuple[Plan, int, int | None]:
    """A plan of any kind, a world size that divides its batch, and a micro-batch."""
    world = draw(st.sampled_from([1, 2, 3, 4, 8]))
    micro = draw(st.integers(1, 3))
    batch = world * micro * draw(st.integers(1, 3))
    size = draw(st.integers(1, 80))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    duration = random.lognormal(1.0, 0.7, size).astype(np.float32)
    options: dict[str, Any] = {"duration": duration} if draw(st.booleans()) else {}
    kind = draw(st.sampled_from(["plain", "groups", "weights", "bucket", "tokens", "shards", "balance"]))
    if kind == "groups":
        options |= {"groups": random.integers(0, 12, size), "together": draw(st.integers(1, 4))}
    if kind == "weights":
        options |= {"parts": np.arange(size) % 2, "weights": [draw(st.floats(0.1, 9)), 1.0]}
        size = max(size, 2)
        options["parts"] = np.arange(size) % 2
        options.pop("duration", None)
    if kind == "bucket":
        options |= {"duration": duration, "batching": "bucket", "bucket": draw(st.integers(1, 5))}
    if kind == "tokens":
        options |= {"batching": "tokens", "tokens": random.integers(1, 50, size), "budget": 100}
        micro = 1
    if kind == "shards":
        options |= {"shards": random.integers(0, 7, size), "shuffle_shards": draw(st.integers(1, 4))}
    if kind == "balance":
        size = 8 * batch
        options = {"balance": Balance({"label": column(random.permutation(np.arange(size) % 2), "ab")}, 2 * batch)}
        batch *= 2
    return Plan(size, batch, draw(st.integers(0, 2**40)), **options), world, micro


def drawn_once(plan: Plan) -> bool:
    """Whether every sample comes once an epoch."""
    return not (plan.weights or plan.balance)


@given(plans(), st.integers(0, 3))
def test_every_sample_once_and_the_tail_from_the_start(drawn: tuple[Plan, int, int | None], epoch: int) -> None:
    plan, _, _ = drawn
    batches = [plan.batch(Position(epoch, i)) for i in range(plan.steps(epoch))]
    order = np.concatenate(batches)
    if plan.batching != "tokens":
        assert {len(batch) for batch in batches} == {plan.global_batch}
        assert 0 <= len(order) - plan.size < plan.global_batch
    if drawn_once(plan):
        counts = np.bincount(order, minlength=plan.size)
        assert counts.min() >= 1
        assert counts.max() - counts.min() <= 1
        if plan.batching == "shuffle":  # what comes twice fills the last batch, from the epoch's start
            np.testing.assert_array_equal(order[plan.size :], np.resize(order[: plan.size], len(order))[plan.size :])


@given(plans(), st.integers(0, 5))
def test_ranks_share_out_the_same_global_batch_at_any_world_size(
    drawn: tuple[Plan, int, int | None], step: int
) -> None:
    plan, world, micro = drawn
    position = list(plan.walk(Position(), step + 1))[-1]
    shares = [plan.share(position, rank, world, micro) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1  # equally many forward passes on every rank
    together = np.concatenate([indices for share in shares for indices in share])
    np.testing.assert_array_equal(np.sort(together), np.sort(plan.batch(position)))
    [alone] = [np.concatenate(plan.share(position, 0, 1, micro))]
    np.testing.assert_array_equal(np.sort(together), np.sort(alone))
    if plan.batching != "tokens":
        assert {len(indices) for share in shares for indices in share} == {micro}


@given(plans(), st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_the_order_depends_on_seed_and_epoch_alone(drawn: tuple[Plan, int, int | None], visits: list[int]) -> None:
    plan, _, _ = drawn
    visited = [plan.epoch(epoch).order.copy() for epoch in visits]  # in any order, and again
    for epoch, order in zip(visits, visited, strict=True):
        np.testing.assert_array_equal(fresh(plan).epoch(epoch).order, order)


@given(plans(), st.integers(0, 30), st.integers(0, 30))
def test_a_walk_from_the_middle_is_the_rest_of_the_walk(
    drawn: tuple[Plan, int, int | None], start: int, count: int
) -> None:
    plan, _, _ = drawn
    whole = list(plan.walk(Position(), start + count + 1))
    assert list(fresh(plan).walk(whole[start], count + 1)) == whole[start:]
    assert [position for position in whole if position.epoch == 0] == [
        Position(0, i) for i in range(min(plan.steps(0), len(whole)))
    ]


@pytest.mark.parametrize("kind", ["shuffle", "pairs", "balance", "balance, pairs"])
def test_planning_takes_few_bytes_a_clip(kind: str) -> None:
    """Ten million clips are to be planned within 1 GiB, their columns and Python itself (about 0.5 GiB) included."""
    size = 200_000
    source = np.random.default_rng(0).integers(0, 2**62, size // 6 + 1)[np.arange(size) // 6]
    tracemalloc.start()
    groups, together = (source, 2) if "pairs" in kind else (None, 1)
    balance = Balance({"label": column(np.arange(size, dtype=np.int32) % 3, "abc")}, 512, groups, together)
    Plan(size, 512, 0, groups=groups, together=together, balance=balance if "balance" in kind else None).epoch(0)
    peak = tracemalloc.get_traced_memory()[1] / size
    tracemalloc.stop()
    assert peak < 66


def test_epochs_and_seeds_differ() -> None:
    plan = Plan(100, 10, seed=0)
    first = plan.epoch(0).order
    assert not np.array_equal(first, plan.epoch(1).order)
    assert not np.array_equal(first, fresh(plan, seed=1).epoch(0).order)
    assert not np.array_equal(first, np.arange(100))


# ---- kinds of order


@given(plans(), st.integers(0, 3))
def test_runs_of_a_group_stay_side_by_side(drawn: tuple[Plan, int, int | None], epoch: int) -> None:
    plan, _, _ = drawn
    if plan.groups is None:
        return
    order = plan.groups[plan.epoch(epoch).order[: plan.size]]
    breaks = np.flatnonzero(np.diff(order)) + 1
    for group in np.unique(plan.groups):
        stretches = [len(part) for part in np.split(order, breaks) if part[0] == group]
        # Whole runs are never cut; what is left over of the group may be, between two batches.
        assert sum(length // plan.together for length in stretches) == sum(stretches) // plan.together
        assert sum(stretches) == (plan.groups == group).sum()


def test_pairs_land_in_one_batch_and_batches_mix_groups() -> None:
    groups = np.repeat(np.arange(30), 2)
    for batch in Plan(60, 12, 0, groups=groups, together=2).epoch(0).order.reshape(-1, 12):
        assert np.unique(groups[batch], return_counts=True)[1].tolist() == [2] * 6
    plain = Plan(60, 12, 0, groups=groups, together=1).epoch(0).order.reshape(-1, 12)
    assert any(len(np.unique(groups[batch])) > 6 for batch in plain)


def test_pairs_among_single_clips_stay_in_one_batch() -> None:
    groups = np.r_[np.repeat(np.arange(250), 2), np.arange(1000, 1333)]
    order = Plan(833, 32, 3, groups=groups, together=2).epoch(0).order
    batch_of = np.empty(833, dtype=int)
    batch_of[order[:833]] = np.arange(833) // 32
    assert (batch_of[0:500:2] == batch_of[1:500:2]).all()
    whole = np.bincount(batch_of[:500], minlength=27)[:-1]
    assert whole.max() - whole.min() <= 2  # and they are spread evenly


@given(st.lists(st.floats(0.05, 10), min_size=2, max_size=4), st.integers(4, 40), st.integers(0, 99))
def test_weights_hold_in_every_batch(weights: list[float], batch: int, seed: int) -> None:
    parts = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(weights)), 50))
    plan = Plan(len(parts), batch, seed, parts=parts, weights=weights)
    share = np.array(weights) / sum(weights) * batch
    order = plan.epoch(0).order
    for rows in order.reshape(-1, batch):
        found = np.bincount(parts[rows], minlength=len(weights))
        assert (np.abs(found - share) < 1 + 1e-9).all()
    for part in range(len(weights)):  # evenly: no clip of a set comes twice more often than another of it
        counts = np.bincount(order, minlength=len(parts))[parts == part]
        assert counts.max() - counts.min() <= 1


@given(st.integers(2, 30), st.sampled_from([0, 1, 7, 15]), st.integers(0, 99))
def test_weights_with_packs_make_an_epoch_of_the_sets_size(windows: int, more: int, seed: int) -> None:
    size = 16 * windows + more
    tokens = np.random.default_rng(seed).integers(1, 50, size)
    options: dict[str, Any] = {"parts": np.arange(size) % 2, "weights": [3, 1]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mser_dist.stream.plan.WINDOW", 16)
        order = Plan(size, 1, seed, batching="tokens", tokens=tokens, budget=100, **options).epoch(0).order
    assert len(order) == size
    assert abs((options["parts"][order] == 0).sum() - 0.75 * size) <= windows + 1  # less than one in each window


def test_a_set_with_a_weight_and_no_clip_is_refused() -> None:
    with pytest.raises(UserError, match=r"no clip is left of data.sets\[1\]"):
        Plan(4, 2, 0, parts=np.zeros(4), weights=[1, 1]).epoch(0)


def test_buckets_hold_clips_of_like_length_and_are_shuffled() -> None:
    duration = np.random.default_rng(0).lognormal(1.5, 0.7, 1000).astype(np.float32)

    def padding(**options: Any) -> float:
        rows = duration[Plan(1000, 10, 0, duration=duration, **options).epoch(0).order].reshape(-1, 10)
        return float(1 - rows.sum() / (rows.max(1) * 10).sum())

    assert padding(batching="bucket", bucket=20) < 0.15 < 0.4 < padding()
    lengths = duration[Plan(1000, 10, 0, duration=duration, batching="bucket", bucket=20).epoch(0).order]
    order = lengths.reshape(-1, 10).mean(1)[:20]
    assert not np.array_equal(order, np.sort(order))


def test_micro_batches_at_the_same_time_are_of_like_length() -> None:
    duration = np.arange(64, dtype=np.float32)
    plan = Plan(64, 64, 0, duration=duration)
    shares = [plan.share(Position(), rank, 2, 8) for rank in range(2)]
    for left, right in zip(*shares, strict=True):
        assert abs(duration[left].mean() - duration[right].mean()) == 8
        assert np.ptp(duration[left]) == 7


def test_shards_are_read_window_by_window() -> None:
    shards = np.repeat(np.arange(10), 12)
    order = Plan(120, 12, 0, shards=shards, shuffle_shards=2).epoch(0).order
    windows = [set(shards[order[i : i + 24]]) for i in range(0, 120, 24)]
    assert [len(window) for window in windows] == [2] * 5
    assert set().union(*windows) == set(range(10))
    assert len(np.unique(shards[order[:12]])) == 2  # shuffled within the window


# ---- packing


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=300), st.integers(100, 400), st.integers(1, 90))
def test_packs_hold_every_sample_once_within_the_budget(lengths: list[int], budget: int, window: int) -> None:
    tokens = np.array(lengths)
    order = np.random.default_rng(0).permutation(len(tokens)).astype(np.int32)
    packed, starts = pack(order, tokens, budget, window)
    for i in range(0, len(order), window):  # windows stay together, in their order
        assert sorted(packed[i : i + window]) == sorted(order[i : i + window])
    counts = np.diff(starts)
    assert counts.min() > 0 and starts[-1] == len(order)
    longest = np.maximum.reduceat(tokens[packed], starts[:-1])
    np.testing.assert_array_equal(longest, tokens[packed[starts[:-1]]])
    assert (longest * counts).max() <= budget


@pytest.mark.parametrize("kind", bench_packing.DURATIONS)
@pytest.mark.parametrize(("size", "ranks"), [(200_000, 1024), (200_000, 64), (20_000, 64), (4_000, 4)])
def test_packs_cost_little_more_than_is_in_them_and_ranks_wait_for_none(kind: str, size: int, ranks: int) -> None:
    """In what a GPU pays: the longest clip of a pack, times their number."""
    found = bench_packing.measured(bench_packing.seconds(kind, size), "tokens", ranks)
    assert found["padded_over_real"] <= 1.03
    assert found["largest_over_budget"] <= 1
    assert found["slowest_over_mean_in_all"] <= 1.03
    assert found["slowest_over_mean"] <= 1.03 or ranks == 4, "nor in the worst step, but where it is of few packs"


def test_packs_are_others_in_each_epoch_of_a_small_set_too() -> None:
    tokens = np.random.default_rng(0).permutation(np.arange(30, 630))
    plan = Plan(600, 4, 0, batching="tokens", tokens=tokens, budget=4096)
    first, second = (
        {frozenset(p) for step in range(plan.steps(epoch)) for p in plan.share(Position(epoch, step), 0, 1)}
        for epoch in (0, 1)
    )
    assert not first & second


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_fewer_packs_than_a_step_has_come_again(size: int) -> None:
    plan = Plan(size, 16, 0, batching="tokens", tokens=np.full(size, 5), budget=5)
    assert plan.steps() == 1
    counts = np.bincount(plan.batch(Position()), minlength=size)
    assert counts.sum() == 16 and counts.max() - counts.min() <= 1


def test_packs_of_few_shards_stay_near_each_other() -> None:
    """A remote set larger than the cache: no step reads from all over it, and clips of many shards are mixed."""
    size = 64_000
    tokens = np.random.default_rng(0).integers(50, 1000, size)
    shards = np.arange(size) // 100
    plan = Plan(size, 8, 0, batching="tokens", tokens=tokens, shards=shards, shuffle_shards=64)
    near = [len(np.unique(shards[plan.batch(Position(0, step))])) for step in range(0, plan.steps(), 7)]
    assert max(near) <= 3 * 64  # 8,192 clips are of 82 shards
    seen = [step for step in range(plan.steps()) if (shards[plan.batch(Position(0, step))] == 5).any()]
    assert seen[-1] - seen[0] < plan.steps() / 3


def test_a_clip_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.tokens=100: the longest clip has 101 tokens"):
        pack(np.arange(2, dtype=np.int32), np.array([5, 101]), 100, 8)


# ---- balance


def spread(codes: Any, order: np.ndarray, batch: int) -> int:
    """Largest difference, in any batch, between the counts of two values."""
    values = int(np.max(codes)) + 1
    counts = np.stack([np.bincount(codes[rows], minlength=values) for rows in order.reshape(-1, batch)])
    return int((counts.max(1) - counts.min(1)).max())


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(2, 5), st.integers(1, 3), st.integers(0, 99))
def test_a_full_grid_is_balanced_to_one_clip(labels: int, languages: int, repeats: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    label, language = random.choice(labels, 600), random.choice(languages, 600, p=_skewed(languages))
    label[: labels * languages * 9] = np.tile(np.arange(labels), languages * 9)[:600]
    language[: labels * languages * 9] = np.repeat(np.arange(languages), labels * 9)[:600]
    batch = 8 * repeats
    balance = Balance(
        {"label": column(label, "abcdef"[:labels]), "language": column(language, "vwxyz"[:languages])}, batch
    )
    order = Plan(600, batch, seed, balance=balance).epoch(0).order
    assert spread(label, order, batch) <= 1
    assert spread(language, order, batch) <= 1
    for rows in order.reshape(-1, batch):
        assert len(set(rows)) == batch
    for a in range(labels):  # within a cell, no clip comes twice more often than another
        for b in range(languages):
            counts = np.bincount(order, minlength=600)[(label == a) & (language == b)]
            assert counts.max() - counts.min() <= 1


def _skewed(n: int) -> Any:
    weights = 3.0 ** np.arange(n)
    return weights / weights.sum()


@pytest.mark.parametrize("together", [2, 3])
def test_parallel_clips_come_together_and_stay_balanced(together: int) -> None:
    # 40 utterances in each of 5 languages, each of one of 4 emotions.
    source = np.repeat(np.arange(40), 5)
    language, label = np.tile(np.arange(5), 40), source % 4
    fields = {"label": column(label, "abcd"), "language": column(language, "vwxyz")}
    batch = 12 * together
    order = Plan(200, batch, 0, balance=Balance(fields, batch, source, together)).epoch(0).order
    assert spread(label, order, batch) <= together
    assert spread(language, order, batch) <= 2
    paired = 0
    for rows in order.reshape(-1, batch):
        assert len(set(rows)) == batch
        paired += sum((source[rows] == source[row]).sum() > 1 for row in rows)
    assert paired > 0.8 * len(order)  # 5 is no multiple: one unit of a group is shorter


@pytest.mark.parametrize(
    ("counts", "batch", "says"),
    [
        ([2, 2, 2], 8, "a global batch of 8 needs as many clips, and the set has 6"),
        ([30, 30, 2], 24, r"a global batch of 24 needs 8 clips of label 'c', and the set has 2"),
        ([30, 30, 30], 2, r"a global batch of 2 cannot hold all 3 values of label"),
    ],
)
def test_a_balanced_batch_that_the_set_cannot_fill(counts: list[int], batch: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Balance({"label": column(np.repeat(np.arange(3), counts), "abc")}, batch)


def test_a_field_to_balance_that_is_none() -> None:
    with pytest.raises(UserError, match=r"data.balance names 'emotions', which is no field: use some of label"):
        fields_of(["emotions"], {"label": column([0], "a")})
