"""What a frozen encoder makes of the clips: computed once, kept, shared, read by data workers, the same bits."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mser_dist import config as cfg
from mser_dist.config.data_keys import SIX_EMOTIONS
from mser_dist.config.model_keys import CacheConfig
from mser_dist.encoded.encode import BATCH, encode_once, outlook
from mser_dist.encoded.place import IN_RAM, RAM, Node
from mser_dist.errors import Stopped, UserError
from mser_dist.models.attention import Attention
from mser_dist.models.encoders import build_encoder
from mser_dist.models.frozen import FrozenEncoder
from mser_dist.ranks.distributed import World
from mser_dist.shards.shard_set import ShardSet
from mser_dist.stream.examples import Examples, pad_speech
from mser_dist.stream.loader import BadClips, Request, answers

ROOT = Path(__file__).parents[2]
WHISPER = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
CLIPS = 48  # in the training split of `tiny_set`
SPEEDS = cfg.AugmentConfig(speed=0.1, gain_db=3.0, time_masks=1, variants=3)


class Counted(FrozenEncoder):
    """Knows how many clips it has heard."""

    heard = 0

    def __call__(self, speech: Tensor, lengths: Tensor) -> list[Tensor]:
        self.heard += len(lengths)
        return super().__call__(speech, lengths)


def encoder(seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Counted:
    torch.manual_seed(seed)
    built = Counted(build_encoder(cfg.EncoderConfig(arch=WHISPER, **settings), Attention("sdpa", "for the test")))
    built.to("cpu", dtype)
    return built


def examples(*sets: Path, frozen: FrozenEncoder, split: str = "train", seed: int = 0, **options: Any) -> Examples:
    shards = ShardSet.open([*map(str, sets)], split=split, labels=SIX_EMOTIONS, sound=True)
    return Examples(shards, SIX_EMOTIONS, frozen.encoder.features, seed=seed, **options)


def encode(clips: Examples, frozen: FrozenEncoder, folder: Path, cache: Any = "disk", **options: Any) -> str:
    gb = options.pop("cache_gb", 50.0)
    config = CacheConfig(cache=cache, cache_dir=str(folder), cache_gb=gb)
    return encode_once(clips, frozen, config, World(), **options)


def heard(clips: Examples, frozen: FrozenEncoder, epoch: int = 0, workers: int = 0) -> list[Tensor]:
    """What a step hears of each clip: its features, kept or made now."""
    requests = [Request(epoch, 0, [clips.requests(part)]) for part in np.array_split(np.arange(len(clips)), 4)]
    found: list[Tensor] = []
    for answer in answers(clips.decoder(pad_speech), requests, workers, BadClips(0, clips.shards.where)):
        [batch] = answer.batches
        assert bool(batch.get("encoded")) == bool(clips.encoded), "features where there are some, else audio"
        if clips.encoded:
            found += [own[:size] for own, size in zip(batch["speech"], batch["lengths"].tolist(), strict=True)]
        else:
            found += frozen(batch["speech"], batch["lengths"])
    return found


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


@pytest.fixture
def damaged(tiny_set: Path, tmp_path: Path) -> tuple[Path, str]:
    """A copy of the set in which one training clip cannot be read, and its key."""
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_set, folder)
    shards = ShardSet.open([str(folder)], split="train", labels=SIX_EMOTIONS)
    with (folder / "train-000000.tar").open("r+b") as file:
        file.seek(shards.refs([5])[0].audio_at + 50)
        file.write(b"damage")
    return folder, shards.key(5)


# ---- once, and the same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_clip_is_encoded_once_and_read_by_workers(tiny_set: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    frozen = encoder(dtype=dtype, layers=[0, 2], stride=2)
    plain = heard(examples(tiny_set, frozen=frozen), frozen)
    frozen.heard = 0
    clips = examples(tiny_set, frozen=frozen)
    said = encode(clips, frozen, tmp_path, workers=2)
    assert frozen.heard == CLIPS and f"{CLIPS} clips" in said and "(0 were there)" in said and str(tmp_path) in said
    again = examples(tiny_set, frozen=frozen, seed=7)
    assert f"({CLIPS} were there)" in encode(again, frozen, tmp_path)
    for read in (heard(clips, frozen), heard(again, frozen, epoch=3, workers=2)):
        assert same(read, plain) and read[0].dtype == dtype and read[0].shape[1:] == (2, 16)
    assert frozen.heard == CLIPS


def test_the_same_recordings_in_another_set_are_not_encoded_again(tiny_set: Path, tmp_path: Path) -> None:
    frozen = encoder()
    shutil.copytree(tiny_set, tmp_path / "copy")
    both = examples(tiny_set, tmp_path / "copy", frozen=frozen)
    assert f"{2 * CLIPS} clips" in encode(both, frozen, tmp_path / "features") and frozen.heard == CLIPS
    alone = examples(tmp_path / "copy", frozen=frozen)
    assert f"({CLIPS} were there)" in encode(alone, frozen, tmp_path / "features") and frozen.heard == CLIPS
    assert same(heard(both, frozen), heard(alone, frozen) * 2)


def test_variants_are_the_same_in_every_run_and_differ_from_each_other(tiny_set: Path, tmp_path: Path) -> None:
    frozen = encoder()
    first, other = (examples(tiny_set, frozen=frozen, seed=seed, augment=SPEEDS) for seed in (1, 2))
    plain = {epoch: heard(other, frozen, epoch) for epoch in (0, 1)}
    frozen.heard = 0
    encode(first, frozen, tmp_path)
    assert frozen.heard == 3 * CLIPS
    encode(other, frozen, tmp_path)
    assert frozen.heard == 3 * CLIPS, "another seed draws among the same variants"
    assert all(same(heard(other, frozen, epoch, workers=1), plain[epoch]) for epoch in plain)
    assert not same(plain[0], plain[1]), "an epoch draws anew"
    assert first.encoded and other.encoded
    variants = [first.encoded.read(0, number) for number in range(3)]
    assert len({tuple(v.flatten().tolist()) for v in variants}) == 3
    assert same(variants, [other.encoded.read(0, number) for number in range(3)])
    more = examples(tiny_set, frozen=frozen, augment=cfg.AugmentConfig(**{**SPEEDS.__dict__, "variants": 4}))
    encode(more, frozen, tmp_path)
    assert frozen.heard == 4 * CLIPS, "a fourth variant leaves the others as they are"


def test_changes_without_a_bound_are_not_kept(tiny_set: Path, tmp_path: Path) -> None:
    frozen = encoder()
    clips = examples(tiny_set, frozen=frozen, augment=cfg.AugmentConfig(speed=0.1))
    assert "data.augment.variants bounds it" in encode(clips, frozen, tmp_path, "auto") and clips.encoded is None
    with pytest.raises(UserError, match=r"set data\.augment\.variants"):
        encode(clips, frozen, tmp_path)
    assert frozen.heard == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"dtype": torch.bfloat16}, {"layers": [1]}, {"stride": 2}, {"pad_seconds": 3.0}],
    ids=lambda other: next(iter(other)),
)
def test_another_encoders_features_are_never_used(tiny_set: Path, tmp_path: Path, other: dict[str, Any]) -> None:
    one = encoder()
    encode(examples(tiny_set, frozen=one, split="val"), one, tmp_path)
    two = encoder(**other)
    clips = examples(tiny_set, frozen=two, split="val")
    plain = heard(clips, two)
    two.heard = 0
    assert "(0 were there)" in encode(clips, two, tmp_path) and two.heard == len(clips)
    assert same(heard(clips, two), plain)


# ---- parts, stops, some of the clips


def test_a_short_training_encodes_what_it_reads(tiny_set: Path, tmp_path: Path) -> None:
    frozen = encoder()
    clips = examples(tiny_set, frozen=frozen)
    assert "2 clips" in encode(clips, frozen, tmp_path, wanted=np.array([3, 7])) and frozen.heard == 2
    assert clips.get(7, 0).speech.shape[1:] == (1, 16)
    with pytest.raises(UserError, match="start again"):
        clips.get(4, 0)


def test_parts_are_cut_by_the_clips_and_make_the_whole(tiny_set: Path, tmp_path: Path) -> None:
    frozen = encoder()
    clips = examples(tiny_set, frozen=frozen)

    def share(part: int) -> list[int]:
        return [job.clip for job in outlook(clips, frozen, tmp_path, Node(0, 1, True)).share((part, 3))]

    before = [share(part) for part in range(3)]
    assert sorted(clip for own in before for clip in own) == list(range(CLIPS)) and all(before)
    for part in (2, 0, 1):
        assert share(part) == before[part], "whatever the others have done meanwhile"
        said = encode(clips, frozen, tmp_path, part=(part, 3))
        assert f"part {part} of 3, {len(before[part])} clips encoded" in said
        assert share(part) == [] and clips.encoded is None
    assert frozen.heard == CLIPS
    assert f"({CLIPS} were there)" in encode(clips, frozen, tmp_path)


def test_a_stop_in_the_middle_keeps_what_is_complete(tiny_set: Path, tmp_path: Path) -> None:
    frozen = encoder()
    clips = examples(tiny_set, frozen=frozen)

    def stop_in_round(number: int) -> Callable[[], None]:
        rounds = iter(range(number))

        def go_on() -> None:
            if next(rounds) == number - 1:
                raise Stopped("SIGTERM", None)

        return go_on

    with pytest.raises(Stopped):
        encode(clips, frozen, tmp_path, go_on=stop_in_round(3))
    assert clips.encoded is None
    assert f"({3 * BATCH} were there)" in encode(clips, frozen, tmp_path, workers=1)
    assert same(heard(clips, frozen), heard(examples(tiny_set, frozen=frozen), frozen))


# ---- damage


def test_a_clip_that_cannot_be_read(
    damaged: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, key = damaged
    frozen = encoder()
    clips = examples(folder, frozen=frozen)
    with pytest.raises(UserError, match=rf"sample {key}: .*data\.max_bad=0"):
        encode(clips, frozen, tmp_path / "features")
    clips = examples(folder, frozen=frozen, max_bad=1)
    encode(clips, frozen, tmp_path / "features", workers=1)
    assert clips.encoded
    there = [clip for clip in range(CLIPS) if clip != 5]
    assert all(len(clips.encoded.read(clip, 0)) for clip in there)
    with pytest.raises(KeyError):
        clips.encoded.read(5, 0)
    assert key not in capsys.readouterr().err, "it is told when a step asks for it"
    request = Request(0, 0, [clips.requests(np.arange(4, 8))])
    for workers in (0, 1):
        bad = BadClips(1, clips.shards.where)
        [answer] = answers(clips.decoder(pad_speech), [request], workers, bad)
        assert list(answer.bad) == [5] and answer.batches[0]["index"] == [4, 6, 6, 7]
        assert key in capsys.readouterr().err


def test_a_damaged_file_is_passed_over_and_its_clips_are_encoded_anew(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = encoder()
    clips = examples(tiny_set, frozen=frozen, split="val")
    encode(clips, frozen, tmp_path)
    [file] = tmp_path.glob("*/*.features")
    whole = file.read_bytes()
    plain = heard(examples(tiny_set, frozen=frozen, split="val"), frozen)
    file.write_bytes(whole[:-40])
    frozen.heard = 0
    again = examples(tiny_set, frozen=frozen, split="val")
    assert "(0 were there)" in encode(again, frozen, tmp_path) and frozen.heard == len(clips)
    said = capsys.readouterr().err
    assert f"warning: {file}: is damaged" in said and "encoded anew" in said
    assert same(heard(again, frozen), plain)
    file.unlink()
    [file] = tmp_path.glob("*/*.features")  # … and in the middle of a clip's features
    changed = bytearray(file.read_bytes())
    changed[300] ^= 1
    file.write_bytes(changed)
    with pytest.raises(UserError, match=rf"{file.name}: damaged .*remove that file"):
        heard(again, frozen)


# ---- bounds


def test_features_that_do_not_fit_are_not_kept(tiny_set: Path, tmp_path: Path) -> None:
    frozen = encoder()
    clips = examples(tiny_set, frozen=frozen)
    assert "encoder.cache_gb=1e-05 leaves" in encode(clips, frozen, tmp_path, "auto", cache_gb=1e-5)
    assert clips.encoded is None
    with pytest.raises(UserError, match=r"encoder\.cache_gb=1e-05 leaves 0\.00: raise it"):
        encode(clips, frozen, tmp_path, cache_gb=1e-5)
    assert frozen.heard == 0
    assert "cache=off" in encode(clips, frozen, tmp_path, "off") and clips.encoded is None


def test_a_disk_that_is_too_small_is_seen_before_it_is_full(tiny_set: Path, small_disk: Path) -> None:
    frozen = encoder(layers="all")
    clips = examples(tiny_set, frozen=frozen)
    with (small_disk / "filler").open("wb") as file:
        file.write(bytes(900_000))
    assert "name another disk with encoder.cache_dir" in encode(clips, frozen, small_disk / "cache", "auto")
    assert clips.encoded is None
    with pytest.raises(UserError, match=r"GB free: name another disk with encoder\.cache_dir"):
        encode(clips, frozen, small_disk / "cache")
    assert frozen.heard == 0


_IN_MEMORY = """
import sys
from pathlib import Path
from tests.unit.test_encoded import encode, encoder, examples, heard, same
frozen, folder = encoder(), Path(sys.argv[1])
clips = examples(folder, frozen=frozen, split="val")
plain = heard(clips, frozen)
print(encode(clips, frozen, Path("/none"), "memory"))
assert same(heard(clips, frozen, workers=1), plain)
"""


@pytest.mark.skipif(not RAM.is_dir(), reason="no /dev/shm")
def test_memory_is_given_back_when_the_process_ends(tiny_set: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    of_a_killed_process = RAM / f"{IN_RAM}{socket.gethostname()}-{ended.pid}-0123abcd"
    of_a_living_one = RAM / f"{IN_RAM}{socket.gethostname()}-{os.getpid()}-0123abcd"
    try:
        for folder in (of_a_killed_process, of_a_living_one):
            folder.mkdir()
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _IN_MEMORY, str(tiny_set)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        place = Path(done.stdout.split(" in ")[1].split(" (")[0])
        assert place.is_relative_to(RAM) and not place.parent.exists()
        assert not of_a_killed_process.exists() and of_a_living_one.exists()
    finally:
        for folder in (of_a_killed_process, of_a_living_one):
            shutil.rmtree(folder, ignore_errors=True)
