import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from mser_dist import audio
from mser_dist.cli import main as cli
from mser_dist.corpora.pack import pack
from mser_dist.corpora.recording import Recording
from mser_dist.corpora.splits import split_by_speaker
from mser_dist.errors import UserError
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.verify import verify

ROOT = Path(__file__).resolve().parents[2]
EMOTIONS = ("anger", "happy", "neutral", "sad")


def clip(speaker: str, number: int, language: str = "de", corpus: str = "c", split: str | None = None) -> Recording:
    emotion = EMOTIONS[number % 4]
    name = f"{corpus}_{speaker}_{language}_{number}"
    gender = "female" if sum(map(ord, speaker)) % 2 else "male"
    return Recording(Path(name), emotion, emotion, language, speaker, corpus, name, name, gender, None, split)


def corpus_of(speakers: int, each: int = 8, **options: Any) -> list[Recording]:
    return [clip(f"s{s:02d}", number, **options) for s in range(speakers) for number in range(each)]


def speakers_of(clips: list[Recording], split: str) -> set[tuple[str, str]]:
    return {(c.corpus, c.speaker) for c in clips if c.split == split}


# ---- splits


@settings(max_examples=25, deadline=None)
@given(
    speakers=st.integers(3, 30),
    val=st.sampled_from([0.0, 0.05, 0.1, 0.3]),
    test=st.sampled_from([0.0, 0.2, 0.5, 0.6]),
    seed=st.integers(0, 5),
)
def test_no_speaker_is_in_two_splits(speakers: int, val: float, test: float, seed: int) -> None:
    greek = [clip(f"g{s:02d}", number, "el") for s in range(speakers + 1) for number in range(5)]
    clips = corpus_of(speakers) + greek + corpus_of(4, corpus="other")
    done = split_by_speaker(clips, val_fraction=val, test_fraction=test, seed=seed)
    assert [c.id for c in done] == [c.id for c in clips]
    parts = [speakers_of(done, split) for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == len({(c.corpus, c.speaker) for c in clips})
    assert {c.split for c in done} == {"train"} | ({"val"} if val else set()) | ({"test"} if test else set())
    assert done == split_by_speaker(clips, val_fraction=val, test_fraction=test, seed=seed)


def test_fractions_hold_in_each_language_and_seeds_differ() -> None:
    clips = corpus_of(20) + [clip(f"g{s}", n, "el") for s in range(10) for n in range(8)]
    done = split_by_speaker(clips, val_fraction=0.1, test_fraction=0.2)
    count = Counter((c.language, c.split) for c in done)
    assert count == {
        ("de", "train"): 14 * 8,
        ("de", "val"): 2 * 8,
        ("de", "test"): 4 * 8,
        ("el", "train"): 7 * 8,
        ("el", "val"): 8,
        ("el", "test"): 2 * 8,
    }
    assert len({frozenset(speakers_of(split_by_speaker(clips, seed=s), "test")) for s in range(8)}) > 1


def test_a_rare_emotion_reaches_the_test() -> None:
    """Two of twenty speakers alone have "fear": a blind draw puts one into each of train and test only 1 time in 3."""
    clips = corpus_of(20)
    rare = [clip(speaker, 0) for speaker in ("s03", "s17")]
    fear = [Recording(c.path, "fear", "fear", c.language, c.speaker, c.corpus, c.id + "f", c.id + "f") for c in rare]
    for seed in range(10):
        done = split_by_speaker(clips + fear, val_fraction=0, test_fraction=0.2, seed=seed)
        assert {c.split for c in done if c.label == "fear"} == {"train", "test"}


def test_a_speaker_of_two_languages_stays_in_one_split() -> None:
    clips = corpus_of(6) + corpus_of(6, each=4, language="el")
    done = split_by_speaker(clips)
    assert all(len({c.split for c in done if c.speaker == f"s{s:02d}"}) == 1 for s in range(6))


def test_chosen_test_speakers_and_folds() -> None:
    clips = corpus_of(10)
    done = split_by_speaker(clips, test_speakers=["s01", "s07"])
    assert speakers_of(done, "test") == {("c", "s01"), ("c", "s07")}
    assert len(speakers_of(done, "val")) == 1
    tests = [speakers_of(split_by_speaker(clips, folds=4, fold=fold), "test") for fold in range(4)]
    assert sorted(map(len, tests)) == [2, 2, 3, 3]
    assert len(set().union(*tests)) == 10  # each speaker is tested exactly once
    everything = split_by_speaker(corpus_of(1), val_fraction=0, test_fraction=1)
    assert {c.split for c in everything} == {"test"}


def test_a_prescribed_split_wins() -> None:
    clips = [clip("s1", n, split="train" if n % 2 else "test") for n in range(8)]
    assert split_by_speaker(clips) == clips
    with pytest.raises(UserError, match="8 of 9 clips name a split"):
        split_by_speaker([*clips, clip("s2", 0)])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, r"c \(de\): 2 speakers do not make 3 speaker-disjoint splits"),
        ({"test_fraction": 1.5}, "test_fraction=1.5"),
        ({"val_fraction": 0.5, "test_fraction": 0.6}, "their sum at most 1"),
        ({"test_speakers": ["s09"]}, "no clip of 's09'; there are s00, s01"),
        ({"folds": 3}, "has 2 speakers of de"),
        ({"folds": 2, "fold": 2}, "a fold from 0"),
        ({"folds": 2, "test_speakers": ["s00"]}, "give one of them"),
    ],
)
def test_impossible_splits_are_explained(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        split_by_speaker(corpus_of(2), **options)
    assert "\n" not in str(caught.value)


def test_two_speakers_make_a_train_and_a_test_where_nobody_asks_for_a_val() -> None:
    for options in ({}, {"test_speakers": ["s01"]}, {"folds": 2}):
        done = split_by_speaker(corpus_of(2), val_fraction=None, **options)
        assert Counter(c.split for c in done) == {"train": 8, "test": 8}
    assert split_by_speaker(corpus_of(9), val_fraction=None) == split_by_speaker(corpus_of(9))
    with pytest.raises(UserError, match="--val-fraction 0, or --test-fraction 0 or 1"):
        split_by_speaker(corpus_of(1), val_fraction=None)


# ---- pack


def test_tess_has_two_speakers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tess").mkdir()
    for i, name in enumerate(
        f"{speaker}_{word}_{e}" for speaker in ("OAF", "YAF") for word in "ab" for e in ("sad", "ps")
    ):
        soundfile.write(tmp_path / "tess" / f"{name}.wav", np.random.default_rng(i).uniform(-0.3, 0.3, 1600), 16000)
    assert cli.main(["pack", "tess", str(tmp_path / "tess"), str(tmp_path / "set")]) == 0
    assert "no val: the speakers do not suffice" in capsys.readouterr().out
    assert Counter(ShardSet.open(tmp_path / "set").column("split")) == {"train": 4, "test": 4}


@pytest.fixture
def emodb(tmp_path: Path) -> Path:
    """A small EMO-DB: 5 speakers, 7 emotions, two channels at 22.05 kHz."""
    folder = tmp_path / "wav"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for speaker in ("03", "08", "09", "10", "11"):
        for emotion in "WLEAFTN":
            soundfile.write(folder / f"{speaker}a01{emotion}a.wav", rng.uniform(-0.3, 0.3, (2205, 2)), 22050)
    return folder


def test_pack_emodb(emodb: Path, tmp_path: Path) -> None:
    summary = pack("emodb", emodb, tmp_path / "set", shard_samples=8, workers=1, progress=False)
    assert summary["splits"] == {
        "train": {"clips": 21, "speakers": 3},
        "val": {"clips": 7, "speakers": 1},
        "test": {"clips": 7, "speakers": 1},
    }
    assert summary["emotions"] == dict.fromkeys([*EMOTIONS[:1], "boredom", "disgust", "fear", *EMOTIONS[1:]], 5)
    assert (summary["clips"], summary["dropped"], summary["shared_speakers"]) == (35, {}, 0)
    assert verify(tmp_path / "set") == []
    shards = ShardSet.open(tmp_path / "set")
    i = shards.keys.index("emodb_03a01Fa")
    sample = shards.read(i)
    wave = audio.decode(sample.audio, sample.where)
    expected = audio.decode((emodb / "03a01Fa.wav").read_bytes(), "wav")
    np.testing.assert_allclose(wave, expected, atol=1 / 32768)
    assert len(wave) == 1600
    described = {"emotion": "happiness", "label": "happy", "gender": "male", "language": "de", "speaker": "03"}
    assert sample.meta.items() >= (described | {"synthetic": False, "source_id": "emodb_03a01Fa"}).items()


def test_pack_gives_the_same_bytes_with_any_number_of_processes(emodb: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        pack("emodb", emodb, tmp_path / f"set{workers}", shard_samples=8, workers=workers, progress=False)
    one = {path.name: path.read_bytes() for path in (tmp_path / "set1").iterdir()}
    assert one == {path.name: path.read_bytes() for path in (tmp_path / "set2").iterdir()}
    assert len(one) == 2 * 5 + 1


def test_the_order_of_a_manifest_does_not_matter(emodb: Path, tmp_path: Path) -> None:
    rows = [f"{path},angry,de,{path.name[:2]}" for path in sorted(emodb.iterdir())]
    for name, order in (("one", rows), ("two", rows[::-1])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "list.csv").write_text("\n".join(["path,emotion,language,speaker", *order]))
        pack("manifest", tmp_path / name / "list.csv", tmp_path / name / "set", workers=1, progress=False)
    one = {path.name: path.read_bytes() for path in (tmp_path / "one/set").iterdir()}
    assert one == {path.name: path.read_bytes() for path in (tmp_path / "two/set").iterdir()}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_unreadable_file_is_named_and_nothing_is_left(emodb: Path, tmp_path: Path, workers: int) -> None:
    (emodb / "09a01Wa.wav").write_bytes(b"RIFF, or so it says")
    with pytest.raises(UserError, match=r"09a01Wa\.wav: not readable as audio") as caught:
        pack("emodb", emodb, tmp_path / "set", workers=workers, progress=False)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["wav"]


def test_pack_a_manifest(emodb: Path, tmp_path: Path) -> None:
    rows = [{"path": f"{emodb}/{s}a01Wa.wav", "emotion": "angry", "language": "ru", "speaker": s, "split": p}
            for s, p in (("03", "train"), ("08", "dev"), ("09", "test"))]  # fmt: skip
    rows += [{**rows[0], "path": f"{emodb}/03a01Ta.wav", "emotion": "xxx"}]
    rows += [{**rows[0], "path": f"{emodb}/03a01Na.wav", "speaker": "09"}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summary = pack("manifest", tmp_path / "mine.jsonl", tmp_path / "set", audio_format="wav", workers=1, progress=False)
    assert (summary["name"], summary["clips"], summary["dropped"]) == ("mine", 4, {"xxx": 1})
    assert summary["shared_speakers"] == 1  # a prescribed split wins, and is told of
    assert Counter(ShardSet.open(tmp_path / "set").column("split")) == {"train": 2, "val": 1, "test": 1}
    assert ShardSet.open(tmp_path / "set").read(0).audio[:4] == b"RIFF"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"corpus": "emo-db"}, "unknown corpus 'emo-db'; known are manifest, aesdd"),
        ({"audio_format": "mp3"}, "unknown audio format"),
        ({"max_seconds": 0.05}, r"a01.a\.wav: 0\.1 s of audio, the limit is 0\.05 s"),
        ({"test_speakers": ["99"]}, "no clip of '99'"),
    ],
)
def test_wrong_options_are_explained(emodb: Path, tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        arguments: dict[str, Any] = {"corpus": "emodb", "src": emodb, "out": tmp_path / "set", "workers": 1}
        pack(**(arguments | options), progress=False)
    assert not (tmp_path / "set").exists()


def test_overwrite(emodb: Path, tmp_path: Path) -> None:
    pack("emodb", emodb, tmp_path / "set", workers=1, progress=False)
    with pytest.raises(UserError, match="already exists"):
        pack("emodb", emodb, tmp_path / "set", workers=1, progress=False)
    pack("emodb", emodb, tmp_path / "set", workers=1, progress=False, overwrite=True, audio_format="wav")
    assert ShardSet.open(tmp_path / "set").read(0).audio[:4] == b"RIFF"


# ---- going on where a pack was stopped


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Mser:
    """A real `mser pack` of `clips.csv` beside `out`: 2200 clips, so four shards of 512 and the rest."""

    def __init__(self, out: Path) -> None:
        self.journal = out.with_name(out.name + ".partial") / ".packed"
        command = [sys.executable, "-m", "mser_dist", "pack", "manifest", str(out.parent / "clips.csv"), str(out)]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, start_new_session=True, env=env, stderr=pipe, stdout=pipe, text=True)

    def stop(self, number: int, shards: int) -> str:
        """Send a signal to it once so many shards are finished, and wait until none of its processes is left."""
        while not self.journal.exists() or self.journal.read_bytes().count(b"\n") < shards:
            assert self.process.poll() is None, "it ended too early to be stopped"
            time.sleep(0.002)
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)  # as a terminal does
        else:
            self.process.send_signal(number)
        _, error = self.process.communicate(timeout=60)  # its workers hold the pipe too: this waits for all of them
        return error

    def end(self) -> str:
        _, error = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, error
        return error


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A manifest of 2200 clips; they share 20 recordings."""
    (tmp_path / "wav").mkdir()
    for i in range(20):
        noise = np.random.default_rng(i).uniform(-0.3, 0.3, 11025 + 100 * i)
        soundfile.write(tmp_path / "wav" / f"{i}.wav", noise, 22050)
    rows = [f"wav/{i % 20}.wav,{EMOTIONS[i % 4]},de,s{i % 9},{'train' if i % 9 else 'test'},c{i}" for i in range(2200)]
    (tmp_path / "clips.csv").write_text("\n".join(["path,emotion,language,speaker,split,id", *rows]))
    return tmp_path


@pytest.mark.faults
def test_a_pack_that_is_killed_goes_on(clips: Path) -> None:
    Mser(clips / "whole").end()
    for shards in (1, 2, 3):
        Mser(clips / "set").stop(signal.SIGKILL, shards)
        assert not (clips / "set").exists()
    error = Mser(clips / "set").end()
    assert any(f"mser: continuing: {n} of 2200 clips are packed\n" in error for n in (1536, 2048)), error
    assert "not kept" not in error
    assert contents(clips / "set") == contents(clips / "whole")
    assert not (clips / "set.partial").exists()


@pytest.mark.faults
def test_ctrl_c_says_that_the_same_command_continues(clips: Path) -> None:
    pack = Mser(clips / "set")
    error = pack.stop(signal.SIGINT, shards=1)
    assert pack.process.returncode == 130
    assert error.splitlines()[-1].startswith("mser: interrupted; the same command continues"), error
    assert "Traceback" not in error
    assert "mser: continuing: " in Mser(clips / "set").end()
    assert verify(clips / "set") == []


def pack_small(emodb: Path, out: Path, **options: Any) -> dict[str, Any]:
    return pack("emodb", emodb, out, **({"shard_samples": 5, "workers": 1} | options))


def spoil(path: Path) -> None:
    """Other content behind the same size and time: whoever decodes it again fails."""
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def stopped(emodb: Path, tmp_path: Path) -> Path:
    """A set whose pack was stopped by the recording that comes last; 7 clips of test and 21 of train are before."""
    pack_small(emodb, tmp_path / "whole", progress=False)
    last = ShardSet.open(tmp_path / "whole", split="val").keys[-1].removeprefix("emodb_")
    sound = (emodb / f"{last}.wav").read_bytes()
    (emodb / f"{last}.wav").write_bytes(b"not audio")
    with pytest.raises(UserError, match=f"{last}.wav: not readable"):
        pack_small(emodb, tmp_path / "set", progress=False)
    (emodb / f"{last}.wav").write_bytes(sound)
    return tmp_path / "set"


def test_finished_clips_are_not_decoded_again(
    stopped: Path, emodb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    staging = tmp_path / "set.partial"
    kept = [key for tar in staging.glob("*.tar") for key in ShardSet.open(tar).keys]
    assert len(kept) == 5 + 20 + 5  # of 7, 21 and 7, in shards of 5
    for key in kept:
        spoil(emodb / f"{key.removeprefix('emodb_')}.wav")
    summary = pack_small(emodb, stopped)
    assert contents(stopped) == contents(tmp_path / "whole")
    assert (summary["clips"], summary["hours"]) == (35, round(35 * 0.1 / 3600, 4))
    error = capsys.readouterr().err
    assert "mser: continuing: 30 of 35 clips are packed\n" in error
    assert "30/35" in error, "the bar starts at what is there"


def test_only_what_changed_is_made_anew(
    stopped: Path, emodb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ShardSet.open(tmp_path / "set.partial/train-000000.tar").keys[0].removeprefix("emodb_")
    soundfile.write(emodb / f"{first}.wav", np.zeros(2205), 22050)
    pack_small(emodb, stopped)
    error = capsys.readouterr().err
    assert "(damaged, or of another source or other options): 1 of 6 shards\n" in error
    assert "mser: continuing: 25 of 35 clips are packed\n" in error
    pack_small(emodb, tmp_path / "again", progress=False)
    assert contents(stopped) == contents(tmp_path / "again") != contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "options", [{"audio_format": "wav"}, {"max_seconds": 10.0}, {"shard_samples": 4}, {"test_speakers": ["03"]}]
)
def test_other_options_are_not_mixed_in(
    options: dict[str, Any], stopped: Path, emodb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack_small(emodb, stopped, **options)
    pack_small(emodb, tmp_path / "fresh", progress=False, **options)
    assert contents(stopped) == contents(tmp_path / "fresh")
    assert "mser: not kept from an earlier pack" in capsys.readouterr().err


def test_overwrite_goes_on_too(stopped: Path, emodb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "whole").rename(stopped)
    before = contents(stopped)
    with pytest.raises(UserError, match="already exists"):
        pack_small(emodb, stopped)
    pack_small(emodb, stopped, overwrite=True)
    assert "continuing: 30 of 35" in capsys.readouterr().err
    assert contents(stopped) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "wav"]
