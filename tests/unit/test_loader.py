import os
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mser_dist import audio
from mser_dist.errors import UserError
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.verify import verify
from mser_dist.shards.writer import DatasetWriter
from mser_dist.stream.examples import Examples
from mser_dist.stream.features import Features
from mser_dist.stream.loader import Example
from mser_dist.stream.plan import Plan, Position
from mser_dist.stream.steps import Step, one_pass, training_steps
from tests.unit.made_up_set import meta, pcm

LABELS = ["happy", "sad"]


@pytest.fixture(name="folder")
def write_folder(tmp_path: Path) -> Path:
    with DatasetWriter(tmp_path / "set", "made-up", {}, shard_samples=6) as writer:
        for i in range(18):
            data = audio.encode(pcm(i), 16000, "wav")
            writer.write("train", f"k{i:02d}", data, "wav", meta(i, label=LABELS[i % 2]))
    return tmp_path / "set"


def collate(clips: list[Example]) -> dict[str, Any]:
    return {"index": [clip.index for clip in clips], "seconds": [clip.speech.shape[1] for clip in clips]}


def run(clips: Examples, workers: int, count: int = 3, rank: int = 0, world: int = 1) -> Iterator[Step]:
    plan = Plan(len(clips), 6, 0)
    return training_steps(clips, plan, Position(), count, None, rank, world, collate, workers)


def damage(folder: Path, key: str) -> None:
    """Flip a byte in a sample's audio."""
    shards = ShardSet.open(folder)
    index = shards.keys.index(key)
    ref = shards.refs([index])[0]
    with Path(shards.shards[ref.shard].name).open("r+b") as file:
        file.seek(ref.audio_at + 100)
        byte = file.read(1)
        file.seek(ref.audio_at + 100)
        file.write(bytes([byte[0] ^ 8]))


# ---- damage


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_clip_stops_the_run_and_is_named(folder: Path, workers: int) -> None:
    damage(folder, "k07")
    clips = Examples(ShardSet.open(folder), LABELS, Features())
    with pytest.raises(UserError, match=r"train-000001\.tar: sample k07: what the shard holds is not") as caught:
        list(run(clips, workers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_within_the_budget_another_clip_of_the_step_takes_its_place(
    folder: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = [list(run(Examples(ShardSet.open(folder), LABELS, Features()), 0, 3, rank, 2)) for rank in range(2)]
    damage(folder, "k07")
    damage(folder, "k12")
    shards = ShardSet.open(folder)
    bad = {shards.keys.index("k07"), shards.keys.index("k12")}
    reported = 0
    for rank in range(2):
        steps = list(run(Examples(shards, LABELS, Features(), max_bad=2), workers, 3, rank, 2))
        for before, after in zip(sound[rank], steps, strict=True):
            [expected], [found] = (step.batches for step in (before, after))
            assert len(found["index"]) == len(expected["index"])  # its shape is that of every other rank
            assert not bad & set(found["index"])
            for was, now in zip(expected["index"], found["index"], strict=True):
                assert was == now if was not in bad else now in expected["index"]
        reported += len(steps[-1].bad)
    assert reported == 2
    assert capsys.readouterr().err.count("another clip takes its place") == 2
    with pytest.raises(UserError, match=r"sample k(07|12): .*\(bad clip number 2, data.max_bad=1\)"):
        list(run(Examples(shards, LABELS, Features(), max_bad=1), workers))


def test_a_step_without_one_good_clip_stops_the_run(folder: Path) -> None:
    for i in range(18):
        damage(folder, f"k{i:02d}")
    with pytest.raises(UserError, match=r"sample k\d\d: .*and so is every other clip of its step"):
        list(run(Examples(ShardSet.open(folder), LABELS, Features(), max_bad=100), 1))


def test_evaluation_leaves_a_damaged_clip_out(folder: Path) -> None:
    damage(folder, "k07")
    clips = Examples(ShardSet.open(folder), LABELS, Features(), max_bad=1)
    _, batches = one_pass(clips, 4, 0, 1, collate, 0)
    found = sorted(i for _, indices, _ in batches for i in indices.tolist() if i >= 0)
    assert [clips.shards.key(i) for i in found] == [f"k{i:02d}" for i in range(18) if i != 7]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_is_named_and_no_budget_covers_it(folder: Path, workers: int) -> None:
    clips = Examples(ShardSet.open(folder), LABELS, Features(), max_bad=100)
    (folder / "train-000002.tar").unlink()
    with pytest.raises(UserError, match=r"train-000002\.tar: cannot be read"):
        list(run(clips, workers))


# ---- bad clips of every kind


def wav(samples: np.ndarray, rate: int = 16000, subtype: str = "PCM_16", fmt: str = "WAV") -> bytes:
    import io

    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=fmt, subtype=subtype)
    return file.getvalue()


NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 8000).astype(np.float32)
FINE = {
    "8bit": wav(NOISE, subtype="PCM_U8"),
    "24bit": wav(NOISE, subtype="PCM_24"),
    "stereo": wav(np.stack([NOISE, NOISE], 1)),
    "96khz": wav(NOISE, rate=96000),
    "mp3": wav(NOISE, fmt="MP3", subtype="MPEG_LAYER_III"),  # named .wav all the same
}
UNFIT = {
    "empty": (wav(NOISE[:0]), r"the audio is empty"),
    "nan": (wav(np.full(800, np.nan, np.float32), subtype="FLOAT"), "NaN or infinite"),
    "noise": (b"RIFF but nothing that a wav has", "not readable as audio"),
    "long": (wav(np.zeros(40 * 60 * 1000), rate=1000), r"2400.0 s of audio, the limit is 30 s"),
}


@pytest.mark.parametrize("name", [*FINE, *UNFIT])
def test_unusual_audio_is_read_or_named(tmp_path: Path, name: str) -> None:
    with DatasetWriter(tmp_path / "set", "odd", {}) as writer:
        for i in range(4):
            data = audio.encode(pcm(i), 16000, "wav")
            writer.write("train", f"good{i}", data, "wav", meta(i, label=LABELS[i % 2]))
        data = FINE.get(name) or UNFIT[name][0]
        writer.write("train", name, data, "wav", meta(1, label="sad"))
    clips = Examples(ShardSet.open(tmp_path / "set"), LABELS, Features())
    if name in FINE:
        assert len({i for step in run(clips, 0, 1) for i in step.batches[0]["index"]}) == 5
    else:
        with pytest.raises(UserError, match=rf"train-000000\.tar: sample {name}: .*{UNFIT[name][1]}"):
            list(run(clips, 0, 1))
        tolerant = Examples(clips.shards, LABELS, Features(), max_bad=1)
        assert [len(step.batches[0]["index"]) for step in run(tolerant, 0, 2)] == [6, 6]


class Canary:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mknod, (self.path,)


@pytest.mark.parametrize("name", ["x.pyd", "x.pkl", "x.pickle", "x.pth", "x.npy", "x.tar.gz", "x.wav", "x.json"])
def test_no_payload_runs(tmp_path: Path, name: str) -> None:
    """webdataset's default decoder runs what a .pyd member says."""
    payload = tmp_path / name
    payload.write_bytes(pickle.dumps(Canary(str(tmp_path / "sang"))))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        (tmp_path / "x.flac").write_bytes(audio.encode(pcm(1), 16000))
        tar.add(tmp_path / "x.flac", "x.flac")
        tar.add(payload, name)
    with pytest.raises(UserError):
        [ShardSet.open(tmp_path / "a.tar").read(0).meta]
    assert verify(tmp_path / "a.tar")
    assert not (tmp_path / "sang").exists()


def test_a_pipe_url_is_no_command(tmp_path: Path) -> None:
    for url in (f"pipe:touch {tmp_path}/sang", f"pipe://touch {tmp_path}/sang"):
        with pytest.raises(UserError):
            ShardSet.open(url)
    assert not (tmp_path / "sang").exists()


def test_a_set_without_an_index_reads_the_same(folder: Path) -> None:
    before = [step.batches for step in run(Examples(ShardSet.open(folder), LABELS, Features()), 0)]
    for index in folder.glob("*.idx.json"):
        index.unlink()
    (folder / "dataset.json").unlink()
    assert [step.batches for step in run(Examples(ShardSet.open(folder), LABELS, Features()), 0)] == before
