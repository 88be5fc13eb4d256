import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mser_dist import audio
from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.writer import DatasetWriter
from mser_dist.stream.examples import (
    Examples,
    open_clips,
    open_evaluation_clips,
    open_training_clips,
    pad_speech,
    shuffled,
)
from mser_dist.stream.features import Features
from mser_dist.stream.loader import Example
from mser_dist.stream.plan import Plan, Position
from mser_dist.stream.steps import Step, check_identity, identity, one_pass, plan_of, training_steps
from mser_dist.training.loop import RunState
from tests.unit.made_up_set import meta, pcm

LABELS = ["anger", "happy", "sad"]
START = Position()
AUGMENT = cfg.AugmentConfig(probability=1.0, speed=0.2, gain_db=6.0, noise_snr_db=[5, 20], time_masks=1, freq_masks=1)


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
    """24 clips in shards of 5, 5, 5, 5 and 4: uneven, and more ranks and workers than some tests have shards."""
    out = tmp_path_factory.mktemp("stream") / "set"
    with DatasetWriter(out, "made-up", {}, shard_samples=5) as writer:
        for i in range(24):
            values = meta(i, label=LABELS[i % 3], source_id=f"u{i // 2}")
            writer.write("train", f"k{i:02d}", audio.encode(pcm(i), 16000), "flac", values)
    return ShardSet.open(out)


@pytest.fixture(scope="module")
def two_sets(shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """The same 24 clips and 7 of another set, which uses some of the same keys."""
    out = tmp_path_factory.mktemp("stream") / "other"
    with DatasetWriter(out, "other", {}, shard_samples=3) as writer:
        for i in range(7):
            data = audio.encode(pcm(30 + i), 16000)
            writer.write("train", f"k{i:02d}", data, "flac", meta(30 + i, label=LABELS[i % 3]))
    return ShardSet.open([Path(shards.shards[0].name).parent, out])


def clips_of(shards: ShardSet, **options: Any) -> Examples:
    given: dict[str, Any] = {"features": Features(), "max_seconds": 1.0, "seed": 5}
    return Examples(shards, LABELS, **(given | options))


def collate(clips: list[Example]) -> dict[str, Any]:
    draws = torch.tensor([clip.draw.random() for clip in clips])
    return {**pad_speech(clips), "index": [clip.index for clip in clips], "draws": draws}


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else bool(np.all(left == right))


def test_clips_are_decoded_and_labelled(shards: ShardSet) -> None:
    clips = clips_of(shards)
    assert len(clips) == 24
    for i in range(len(clips)):
        clip = clips.get(i, epoch=0)
        number = int(shards.key(i)[1:])
        wave = audio.decode(audio.encode(pcm(number), 16000), "clip")
        np.testing.assert_array_equal(clip.speech, audio.log_mel(wave, 80))
        assert clip.speech.shape == (80, len(pcm(number)) // 160)
        assert LABELS[clip.label] == LABELS[number % 3] == shards.column("label")[i]
        assert clip.index == i
    sources = np.array([clips.get(i, 0).source for i in range(24)])
    numbers = np.array([int(key[1:]) // 2 for key in shards.keys])
    np.testing.assert_array_equal(sources[:, None] == sources[None], numbers[:, None] == numbers[None])


def test_a_waveform_and_padding_when_asked(shards: ShardSet) -> None:
    wave = clips_of(shards, features=Features(n_mels=None)).get(3, 0).speech
    np.testing.assert_array_equal(wave, pcm(3).astype(np.float32) / 32768)
    normal = clips_of(shards, features=Features(n_mels=None, normalize=True)).get(3, 0).speech
    assert abs(normal.mean()) < 1e-6
    assert abs(normal.std() - 1) < 1e-4
    padded = clips_of(shards, features=Features(pad_seconds=2.0)).get(3, 0).speech
    np.testing.assert_array_equal(padded, audio.log_mel(np.pad(wave, (0, 32000 - len(wave)))))


def test_labels_are_numbered_as_the_config_orders_them(shards: ShardSet) -> None:
    reverse = Examples(shards, LABELS[::-1], Features())
    assert [LABELS[::-1][n] for n in reverse.label] == list(shards.column("label"))


def test_draws_depend_on_seed_epoch_and_clip(shards: ShardSet) -> None:
    def draw(seed: int, epoch: int, index: int) -> float:
        return float(clips_of(shards, seed=seed).get(index, epoch).draw.random())

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(1, 2, 3), draw(0, 2, 3), draw(1, 1, 3), draw(1, 2, 4)}) == 4


def test_augmentation_is_seeded_by_clip_and_epoch(shards: ShardSet) -> None:
    clips, plain = clips_of(shards, augment=AUGMENT), clips_of(shards)
    first, again, later = clips.get(3, 0), clips.get(3, 0), clips.get(3, 1)
    np.testing.assert_array_equal(first.speech, again.speech)
    assert not same(torch.tensor(first.speech.shape), torch.tensor(later.speech.shape)) or not np.array_equal(
        first.speech, later.speech
    )
    assert first.draw.random() == plain.get(3, 0).draw.random()  # captions are the same with and without it
    unchanged = clips_of(shards, augment=cfg.AugmentConfig(probability=1.0))
    np.testing.assert_array_equal(unchanged.get(3, 0).speech, plain.get(3, 0).speech)


def test_shuffle_labels_keeps_the_counts(shards: ShardSet) -> None:
    plain, control = clips_of(shards), clips_of(shards, shuffle_labels=True)
    assert sorted(plain.label) == sorted(control.label)
    assert not np.array_equal(plain.label, control.label)
    np.testing.assert_array_equal(control.label, clips_of(shards, shuffle_labels=True).label)
    assert not np.array_equal(control.label, clips_of(shards, shuffle_labels=True, seed=6).label)


@pytest.mark.parametrize("features", [Features(), Features(n_mels=None)])
def test_pad_speech(shards: ShardSet, features: Features) -> None:
    clips = [clips_of(shards, features=features).get(i, 0) for i in (0, 23)]
    batch = pad_speech(clips)
    lengths = [clip.speech.shape[-1] for clip in clips]
    assert lengths[0] != lengths[1]
    assert batch["lengths"].tolist() == lengths
    assert batch["speech"].shape == (2, *clips[0].speech.shape[:-1], max(lengths))
    for row, clip in zip(batch["speech"], clips, strict=True):
        np.testing.assert_array_equal(row[..., : clip.speech.shape[-1]].numpy(), clip.speech)
        assert not row[..., clip.speech.shape[-1] :].any()


# ---- steps

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"parallel": 1},
    "pairs": {"parallel": 2},
    "bucket": {"parallel": 1, "batching": "bucket", "bucket": 2},
    "tokens": {"parallel": 1, "batching": "tokens", "tokens": 20},
    "balance": {"parallel": 2, "balance": ["label"]},
    "shards": {"parallel": 1, "shuffle_shards": 2},
    "weights": {"parallel": 1, "weights": [1, 2]},
    "weights, tokens": {"parallel": 1, "weights": [2, 1], "batching": "tokens", "tokens": 20},
}


@pytest.fixture(scope="module")
def pool(shards: ShardSet, two_sets: ShardSet) -> Callable[[str], ShardSet]:
    """What a kind of plan is of."""
    return lambda kind: two_sets if "weights" in KINDS[kind] else shards


def plan(clips: Examples, kind: str = "pairs", batch: int = 8) -> Plan:
    return plan_of(clips.shards, cfg.TrainingDataConfig(**KINDS[kind]), batch, KINDS[kind]["parallel"], clips.seed)


def steps(
    shards: ShardSet,
    kind: str,
    count: int,
    start: Position = START,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
) -> list[Step]:
    clips = clips_of(shards, augment=AUGMENT)
    micro = None if "tokens" in kind else 2
    return list(training_steps(clips, plan(clips, kind), start, count, micro, rank, world, collate, workers))


def ranks_of(
    shards: ShardSet, kind: str, count: int, start: Position, workers: int, world: int
) -> list[list[list[dict[str, Any]]]]:
    """Each rank's steps, each of micro-batches: as many on every rank, and of the same global batches."""
    ranks = [steps(shards, kind, count, start, workers, rank, world) for rank in range(world)]
    for parts in zip(*ranks, strict=True):
        assert len({len(part.batches) for part in parts}) == 1
        assert len({(part.clips, part.after) for part in parts}) == 1
        assert sum(len(batch["index"]) for part in parts for batch in part.batches) == parts[0].clips
    return [[step.batches for step in rank] for rank in ranks]


def global_batches(ranks: list[list[list[dict[str, Any]]]]) -> list[list[int]]:
    """The sorted samples of each step, over all ranks."""
    together = [[batch for batches in parts for batch in batches] for parts in zip(*ranks, strict=True)]
    return [sorted(index for batch in batches for index in batch["index"]) for batches in together]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_samples_on_any_number_of_ranks_and_workers(pool: Callable[[str], ShardSet], kind: str) -> None:
    """{1, 2, 4} ranks x {0, 1, 3} workers: the same global batches, and a rank's are the same to the bit."""
    shards = pool(kind)
    whole = global_batches(ranks_of(shards, kind, 7, START, 0, 1))
    for world in (1, 2, 4):
        alone = ranks_of(shards, kind, 7, START, 0, world)
        assert global_batches(alone) == whole
        for workers in (1, 3):
            assert same(alone, ranks_of(shards, kind, 7, START, workers, world)), (world, workers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_at_any_step_is_the_rest_to_the_bit(pool: Callable[[str], ShardSet], kind: str) -> None:
    shards = pool(kind)
    for world in (1, 2):
        whole = steps(shards, kind, 8, rank=world - 1, world=world)  # into the second epoch, or the third
        for at in range(7):
            rest = steps(shards, kind, 7 - at, whole[at].after, rank=world - 1, world=world)
            assert [step.after for step in rest] == [step.after for step in whole[at + 1 :]]
            assert same([step.batches for step in rest], [step.batches for step in whole[at + 1 :]])


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 4])), min_size=1))
def test_a_training_that_stops_and_goes_on_elsewhere_sees_the_same(
    pool: Callable[[str], ShardSet], kind: str, stretches: list[tuple[int, int]]
) -> None:
    """Stretches of (steps, ranks), with the state through JSON in between."""
    shards = pool(kind)
    clips = clips_of(shards)
    stretches = stretches[:5]
    whole = global_batches(ranks_of(shards, kind, sum(count for count, _ in stretches), START, 0, 1))
    found: list[list[int]] = []
    position = START
    for count, world in stretches:
        found += global_batches(ranks_of(shards, kind, count, position, 0, world))
        after = steps(shards, kind, count, position)[-1].after
        saved = json.loads(json.dumps(RunState(position=after, order=identity(clips, plan(clips, kind))).to_json()))
        check_identity(saved["order"], identity(clips_of(shards), plan(clips_of(shards), kind)))
        position = RunState.from_json(saved).position
    assert found == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing_and_a_resume_is_the_rest_to_the_bit(shards: ShardSet, workers: int) -> None:
    whole = steps(shards, "pairs", 8)  # three steps an epoch: into the third
    assert [[len(batch["index"]) for batch in step.batches] for step in whole] == [[2] * 4] * 8
    assert {index for step in whole[:3] for batch in step.batches for index in batch["index"]} == set(range(24))
    assert same([step.batches for step in whole], [step.batches for step in steps(shards, "pairs", 8, workers=workers)])
    rest = steps(shards, "pairs", 4, start=whole[3].after, workers=workers)
    assert same([step.batches for step in whole[4:]], [step.batches for step in rest])


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_random_state_alone(shards: ShardSet, workers: int) -> None:
    """A resumed training makes a new loader: had that drawn from torch's generator, its dropout would be another."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    steps(shards, "plain", 1, workers=workers)
    assert torch.equal(before, torch.get_rng_state())


def test_the_state_is_small_json_and_of_this_data_alone(shards: ShardSet) -> None:
    clips = clips_of(shards)
    order = identity(clips, plan(clips))
    state = RunState(step=7, position=Position(3, 1), order=order, bad={5, 2}, validation={"ua": 0.5}, validated=6)
    assert len(json.dumps(state.to_json())) < 400
    assert RunState.from_json(json.loads(json.dumps(state.to_json()))) == state
    check_identity(order, order)
    for change, says in {
        "fingerprint": "the data set has changed since",
        "clips": "the data set has changed since",
        "seed": "it is of another configuration",
        "global_batch": "it is of another configuration",
        "version": "another version of mser_dist put the clips in another order",
    }.items():
        with pytest.raises(UserError, match=rf"the checkpoint's data.{change} is 99, .*{says}"):
            check_identity(order | {change: 99}, order)


@settings(max_examples=12, deadline=None)
@given(batch=st.integers(1, 6), world=st.integers(1, 5))
def test_one_pass_covers_the_set_in_equal_rounds(shards: ShardSet, batch: int, world: int) -> None:
    """By the same batches on however many ranks; those that were done before are left out."""
    clips = clips_of(shards)
    count = -(-24 // batch)
    _, alone = one_pass(clips, batch, 0, 1, collate, workers=0)
    expected = {number: indices.tolist() for number, indices, _ in alone}
    assert list(expected) == list(range(count))
    assert sorted(i for indices in expected.values() for i in indices if i >= 0) == list(range(24))
    for done in ([], [0], list(range(0, count, 2)), list(range(count))):
        covered = {}
        for rank in range(world):
            rounds, batches = one_pass(clips, batch, rank, world, collate, 0, np.array(done))
            assert rounds == -(-(count - len(done)) // world)
            found = list(batches)
            assert [len(indices) for _, indices, _ in found] == [batch] * rounds
            for number, indices, inputs in found:
                assert len(inputs["index"]) == batch, "a batch to keep step with"
                if number is None:
                    assert (indices == -1).all()
                    continue
                assert [i for i in inputs["index"] if i in indices] == [i for i in indices if i >= 0]
                covered[number] = indices.tolist()
        assert covered == {number: clips for number, clips in expected.items() if number not in done}


# ---- what a config can ask for in vain


def data(shards: ShardSet, **options: Any) -> cfg.TrainingDataConfig:
    folder = shards.shards[0].name.rpartition("/")[0]
    return cfg.TrainingDataConfig(**({"sets": [folder], "labels": LABELS} | options))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"labels": ["anger", "happy", "sadd"]}, "data.labels names 'sadd'.*did you mean sad"),
        ({"languages": ["de", "xx"]}, "no sample has language 'xx'"),
        ({"keep": {"duration": [20, 30]}}, "no sample is left by the filter"),
        ({"max_seconds": 0.12}, r"sample k\d\d lasts 0.1 s, more than data.max_seconds=0.12, as do \d+ others"),
    ],
)
def test_a_choice_of_clips_that_fails(shards: ShardSet, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_training_clips(data(shards, **options))


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([*LABELS, "surprise"], None),  # nobody has it: asked in vain, and no typo
        ([*LABELS, "boredom"], None),
        ([*LABELS, "grumpy"], None),  # the export was trained on it
        ([*LABELS, "angr"], "did you mean anger"),
        ([*LABELS, "joy"], "did you mean happy"),
        ([*LABELS, "suprise"], "did you mean surprise"),
        ([*LABELS, "grumpi"], "did you mean grumpy"),
        ([*LABELS, "zzz"], "labels there: anger, happy, sad"),
    ],
)
def test_an_evaluations_labels_mean_something(shards: ShardSet, labels: list[str], says: str | None) -> None:
    if says is None:
        assert len(open_evaluation_clips(data(shards, labels=labels), ["grumpy"])) == len(shards)
        return
    with pytest.raises(UserError, match=f"data.labels names {labels[-1]!r}, and no clip of the sets has it: {says}"):
        open_evaluation_clips(data(shards, labels=labels), ["grumpy"])


def test_filters_and_two_sets_with_weights(shards: ShardSet, tmp_path: Any) -> None:
    kept = open_clips(data(shards, languages=["de"], keep={"speaker": ["s0", "s2"]}, drop={"key": "k06"}), "train")
    assert set(kept.keys) == {f"k{i:02d}" for i in range(0, 24, 6)} - {"k06"}
    other = tmp_path / "other"
    with DatasetWriter(other, "other", {}) as writer:
        for i in range(4):
            writer.write("train", f"o{i}", audio.encode(pcm(i), 16000), "flac", meta(i, label=LABELS[i % 3]))
    two = data(shards, weights=[1, 1])
    two.sets.append(str(other))
    clips = clips_of(open_training_clips(two))
    of_set = clips.shards.column("set")
    for step in training_steps(clips, plan_of(clips.shards, two, 8), START, 4, None, 0, 1, collate, 0):
        assert of_set[step.batches[0]["index"]].tolist().count(1) == 4
