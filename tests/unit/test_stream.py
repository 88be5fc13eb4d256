from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mser_dist.data import audio
from mser_dist.data.shards import DatasetWriter, ShardSet
from mser_dist.data.stream import Clip, Clips, Plan, one_pass, pad_mels, shuffled, training_steps
from mser_dist.errors import UserError
from tests.unit.made_up_set import meta, pcm

LABELS = ["anger", "happy", "sad"]


# ---- the plan, without data


@st.composite
def plans(draw: st.DrawFn) -> tuple[Plan, int]:
    """A plan and a world size that divides its batch."""
    world_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    batch = world_size * draw(st.integers(1, 6))
    size, together = draw(st.integers(1, 60)), draw(st.integers(1, 4))
    groups = np.array(draw(st.lists(st.integers(0, 12), min_size=size, max_size=size))) if draw(st.booleans()) else None
    return Plan(size, batch, draw(st.integers(0, 2**40)), groups, together), world_size


def fresh(plan: Plan, **changes: Any) -> Plan:
    values = {"size": plan.size, "global_batch": plan.global_batch, "seed": plan.seed, "groups": plan.groups}
    return Plan(**(values | {"together": plan.together} | changes))


@given(plans(), st.integers(0, 3))
def test_every_sample_once_and_the_tail_from_the_start(drawn: tuple[Plan, int], epoch: int) -> None:
    plan, _ = drawn
    order = plan.epoch(epoch)
    assert len(order) == plan.steps_per_epoch * plan.global_batch
    assert 0 <= len(order) - plan.size < plan.global_batch
    assert sorted(order[: plan.size]) == list(range(plan.size))
    np.testing.assert_array_equal(order[plan.size :], np.resize(order[: plan.size], len(order))[plan.size :])


@given(plans(), st.integers(0, 5))
def test_ranks_partition_the_global_batch(drawn: tuple[Plan, int], step: int) -> None:
    plan, world_size = drawn
    shares = [plan.step(step, rank, world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {plan.global_batch // world_size}
    # The same global batch as one process would read, whatever the number of processes.
    np.testing.assert_array_equal(np.concatenate(shares), plan.step(step, 0, 1))
    epoch, inside = divmod(step, plan.steps_per_epoch)
    cut = plan.epoch(epoch)[inside * plan.global_batch : (inside + 1) * plan.global_batch]
    np.testing.assert_array_equal(plan.step(step, 0, 1), cut)


@given(plans(), st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_the_order_depends_on_seed_and_epoch_alone(drawn: tuple[Plan, int], visits: list[int]) -> None:
    plan, _ = drawn
    visited = [plan.epoch(epoch).copy() for epoch in visits]  # in any order, and again
    for epoch, order in zip(visits, visited, strict=True):
        np.testing.assert_array_equal(fresh(plan).epoch(epoch), order)


def test_epochs_and_seeds_differ() -> None:
    plan = Plan(100, 10, seed=0)
    assert not np.array_equal(plan.epoch(0), plan.epoch(1))
    assert not np.array_equal(plan.epoch(0), fresh(plan, seed=1).epoch(0))
    assert not np.array_equal(plan.epoch(0), np.arange(100))


@given(plans(), st.integers(0, 3))
def test_runs_of_a_group_stay_side_by_side(drawn: tuple[Plan, int], epoch: int) -> None:
    plan, _ = drawn
    if plan.groups is None:
        return
    order = plan.groups[plan.epoch(epoch)[: plan.size]]
    breaks = np.flatnonzero(np.diff(order)) + 1
    for group in np.unique(plan.groups):
        stretches = [len(part) for part in np.split(order, breaks) if part[0] == group]
        # Stretches of one group are whole runs that may touch: all but one are multiples of `together`.
        assert sum(length % plan.together > 0 for length in stretches) <= 1
        assert sum(stretches) == (plan.groups == group).sum()


def test_pairs_land_in_one_batch_and_batches_mix_groups() -> None:
    groups = np.repeat(np.arange(30), 2)
    batches = Plan(60, 12, 0, groups, together=2).epoch(0).reshape(-1, 12)
    for batch in batches:
        assert np.unique(groups[batch], return_counts=True)[1].tolist() == [2] * 6
    plain = Plan(60, 12, 0, groups, together=1).epoch(0).reshape(-1, 12)
    assert any(len(np.unique(groups[batch])) > 6 for batch in plain)


@given(st.lists(st.integers(1, 40), min_size=2, max_size=7), st.integers(0, 100))
def test_shuffled_labels_tell_nothing(counts: list[int], seed: int) -> None:
    label = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    result = shuffled(label, np.random.default_rng(seed))
    table = np.zeros((len(counts), len(counts)), dtype=int)
    np.add.at(table, (label, result), 1)
    np.testing.assert_array_equal(table.sum(0), counts)
    # Each class gets each label in the label's own proportion, up to rounding: true and new label are independent.
    assert np.abs(table - np.outer(counts, counts) / sum(counts)).max() < 2


# ---- clips


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    out = tmp_path_factory.mktemp("stream") / "set"
    with DatasetWriter(out, "made-up", {}, shard_samples=5) as writer:
        for i in range(14):
            values = meta(i, label=LABELS[i % 3], source_id=f"u{i // 2}")
            writer.write("train", f"k{i:02d}", audio.encode(pcm(i), 16000), "flac", values)
    return ShardSet.open(out)


def clips_of(shards: ShardSet, **options: Any) -> Clips:
    return Clips(shards, LABELS, **({"n_mels": 80, "max_seconds": 1.0, "seed": 5} | options))


def collate(clips: list[Clip]) -> dict[str, Any]:
    draws = torch.tensor([clip.draw.random() for clip in clips])
    return {**pad_mels(clips), "keys": [clip.key for clip in clips], "draws": draws}


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else bool(np.all(left == right))


def test_clips_are_decoded_and_labelled(shards: ShardSet) -> None:
    clips = clips_of(shards)
    assert len(clips) == 14
    for i in range(len(clips)):
        clip = clips.get(i, epoch=0)
        number = int(clip.key[1:])
        wave = audio.decode(audio.encode(pcm(number), 16000), "clip")
        np.testing.assert_array_equal(clip.mel, audio.log_mel(wave, 80))
        assert clip.mel.shape == (80, len(pcm(number)) // 160)
        assert LABELS[clip.label] == LABELS[number % 3] == shards.label[i]
    sources = np.array([clips.get(i, 0).source for i in range(14)])
    same_id = shards.source_id[:, None] == shards.source_id[None]
    np.testing.assert_array_equal(sources[:, None] == sources[None], same_id)


def test_labels_are_numbered_as_the_config_orders_them(shards: ShardSet) -> None:
    assert [LABELS[::-1][n] for n in Clips(shards, LABELS[::-1], 80, 1.0, 0).label] == list(shards.label)


def test_draws_depend_on_seed_epoch_and_clip(shards: ShardSet) -> None:
    def draw(seed: int, epoch: int, index: int) -> float:
        return float(clips_of(shards, seed=seed).get(index, epoch).draw.random())

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(1, 2, 3), draw(0, 2, 3), draw(1, 1, 3), draw(1, 2, 4)}) == 4


def test_shuffle_labels_keeps_the_counts(shards: ShardSet) -> None:
    plain, control = clips_of(shards), clips_of(shards, shuffle_labels=True)
    assert sorted(plain.label) == sorted(control.label)
    assert not np.array_equal(plain.label, control.label)
    np.testing.assert_array_equal(control.label, clips_of(shards, shuffle_labels=True).label)
    assert not np.array_equal(control.label, clips_of(shards, shuffle_labels=True, seed=6).label)


def test_pad_mels(shards: ShardSet) -> None:
    clips = [clips_of(shards).get(i, 0) for i in (0, 13)]
    batch = pad_mels(clips)
    lengths = [clip.mel.shape[1] for clip in clips]
    assert lengths[0] != lengths[1]
    assert batch["lengths"].tolist() == lengths
    assert batch["mel"].shape == (2, 80, max(lengths))
    for row, clip in zip(batch["mel"], clips, strict=True):
        np.testing.assert_array_equal(row[:, : clip.mel.shape[1]].numpy(), clip.mel)
        assert not row[:, clip.mel.shape[1] :].any()


# ---- loading


def steps(shards: ShardSet, span: range, workers: int, rank: int = 0, world: int = 1) -> list[list[dict[str, Any]]]:
    clips = clips_of(shards)
    plan = Plan(len(clips), 4, 9, clips.source, together=2)
    return list(training_steps(clips, plan, span, 4 // world // 2 or 1, rank, world, collate, workers))


def test_workers_change_nothing_and_a_resume_is_the_rest(shards: ShardSet) -> None:
    whole = steps(shards, range(9), workers=0)  # four steps an epoch: into the third
    assert [len(step) for step in whole] == [2] * 9
    assert [len(batch["keys"]) for step in whole for batch in step] == [2] * 18
    assert {key for step in whole[:4] for batch in step for key in batch["keys"]} == {f"k{i:02d}" for i in range(14)}
    assert same(whole, steps(shards, range(9), workers=2))
    assert same(whole[5:], steps(shards, range(5, 9), workers=0))


def test_two_ranks_share_out_what_one_reads(shards: ShardSet) -> None:
    parts = [steps(shards, range(4), 0, rank, world=2) for rank in (0, 1)]
    for one, *two in zip(steps(shards, range(4), 0), *parts, strict=True):
        keys = [key for batch in one for key in batch["keys"]]
        assert keys == [key for part in two for batch in part for key in batch["keys"]]


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_random_state_alone(shards: ShardSet, workers: int) -> None:
    """A resumed training makes a new loader: had that drawn from torch's generator, its dropout would be another."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    steps(shards, range(1), workers)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_clip_is_one_line(shards: ShardSet, workers: int) -> None:
    clips = clips_of(shards, max_seconds=0.01)
    with pytest.raises(UserError, match=r"train-000000\.tar: sample k\d\d.*the limit is 0\.01 s") as caught:
        list(training_steps(clips, Plan(14, 2, 0), range(2), 2, 0, 1, collate, workers))
    assert "\n" not in str(caught.value)


@settings(max_examples=12)
@given(batch=st.integers(1, 6), world=st.integers(1, 5))
def test_one_pass_covers_the_set_in_equal_rounds(shards: ShardSet, batch: int, world: int) -> None:
    clips = clips_of(shards)
    covered: list[int] = []
    for rank in range(world):
        rounds, batches = one_pass(clips, batch, rank, world, collate, workers=0)
        assert rounds == -(-14 // (batch * world))
        found = list(batches)
        assert [len(indices) for indices, _ in found] == [batch] * rounds
        for indices, inputs in found:
            assert inputs["keys"] == [shards.keys[i] for i in indices]
            covered += indices.tolist()
    assert set(covered) == set(range(14))
    assert len(covered) - 14 < batch * world, "no more repeats than equal rounds need"
