"""Cross-validation by speaker: who is in which fold, what each fold's configs read, and the mistakes."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mser_dist import audio
from mser_dist.cli import main as cli
from mser_dist.config import Stage2
from mser_dist.config.file import load_training, to_yaml
from mser_dist.errors import UserError
from mser_dist.jobs.folds import Plan, cut, plan
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.writer import DatasetWriter
from mser_dist.stream.examples import open_clips
from tests.unit.made_up_set import meta, pcm

LABELS = ["happy", "sad"]


def write_set(out: Path, voices: dict[str, int], corpus: str = "a", labels: list[str] = LABELS, **more: str) -> Path:
    """`voices`: clips of each speaker, of all labels in turn, in three splits."""
    with DatasetWriter(out, out.name, {}) as writer:
        for i, speaker in enumerate(speaker for speaker, clips in voices.items() for _ in range(clips)):
            facts = {"corpus": corpus, "speaker": speaker, "language": "de", "label": labels[i % len(labels)], **more}
            writer.write(("train", "val", "test")[i % 3], f"k{i:02d}", b"no audio", "flac", meta(i, **facts))
    return out


def planned(*sets: Path, folds: int | None = None, stage2: str | None = None, words: tuple[str, ...] = ()) -> Plan:
    names = ",".join(map(str, sets))
    base = [f"data.sets=[{names}]", "data.labels=[happy, sad]", "out=runs/cv"]
    return plan("demo_stage1", [*base, *words], folds=folds, stage2=stage2)


# ---- the cut


@given(
    st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.integers(1, 40), min_size=2, max_size=30),
    st.integers(2, 12),
    st.integers(1, 3),
)
def test_every_speaker_is_in_one_fold_and_folds_are_balanced(clips: dict[str, int], folds: int, places: int) -> None:
    groups = {name: f"group {i % places}" for i, name in enumerate(sorted(clips))}
    folds = min(folds, len(clips))
    parts = cut(clips, groups, folds)
    assert len(parts) == folds and all(parts)
    assert sorted(name for part in parts for name in part) == sorted(clips)
    assert parts == cut(dict(reversed(clips.items())), groups, folds), "the order of the input does not matter"
    for group in set(groups.values()):
        own = {name: clips[name] for name in clips if groups[name] == group}
        sizes = [sum(own.get(name, 0) for name in part) for part in parts]
        assert max(sizes) - min(sizes) <= max(own.values()), "dealing the next one elsewhere would not balance better"


def test_folds_by_hand() -> None:
    assert cut({"a": 5, "b": 4, "c": 3, "d": 2}, dict.fromkeys("abcd", ""), 2) == [["a", "d"], ["b", "c"]]
    # Two speakers of each corpus: no fold has both of one.
    assert cut({"a": 9, "b": 9, "c": 1, "d": 1}, {"a": "x", "b": "x", "c": "y", "d": "y"}, 2) == [
        ["a", "c"],
        ["b", "d"],
    ]


@pytest.mark.parametrize(("speakers", "folds"), [(3, 3), (10, 10), (23, 10)])
def test_ten_folds_or_as_many_as_there_are_speakers(speakers: int, folds: int) -> None:
    names = [f"s{i:02d}" for i in range(speakers)]
    assert len(cut(dict.fromkeys(names, 1), dict.fromkeys(names, ""))) == folds


# ---- the configs


def test_a_fold_trains_on_all_others_and_is_tested_on_its_own(tmp_path: Path) -> None:
    whole = write_set(tmp_path / "set", {"03": 5, "08": 4, "x": 6, "y": 4, "z": 7})
    found = planned(whole, folds=3, stage2="demo_stage2", words=("data.drop={speaker: y}", "stage2.train.lr=0.5"))
    everyone = ShardSet.open(whole, drop={"speaker": "y"})
    tested: list[str] = []
    for fold in found.folds:
        first, second = (training.config for training in fold.trainings)
        test = open_clips(fold.evaluation.data, fold.evaluation.data.split)
        tested += test.keys
        for config in (first, second):
            assert config.data.split == "all" and config.data.val_split is None
            assert sorted([*open_clips(config.data, "all").keys, *test.keys]) == sorted(everyone.keys)
        assert set(test.column("speaker")) == set(fold.speakers) and len(test) == fold.clips
        assert (
            isinstance(second, Stage2)
            and second.stage1 == first.out
            and (first.train.lr, second.train.lr) == (1e-3, 0.5)
        )
        evaluation = fold.evaluation
        assert (evaluation.stage1, evaluation.stage2) == (first.out, second.out)
        for training in fold.trainings:  # what the run folder keeps is enough to repeat the run
            (tmp_path / "config.yaml").write_text(to_yaml(training.config))
            assert load_training(str(tmp_path / "config.yaml"), []) == training.config
    assert sorted(tested) == sorted(everyone.keys), "every clip is tested once"
    assert found.folds[0].trainings[0].config.out == "runs/cv/fold01-stage1" and found.clips == len(everyone)


def test_a_name_that_two_corpora_share_is_two_speakers(tmp_path: Path) -> None:
    one, two = write_set(tmp_path / "one", {"s1": 6, "s2": 6}), write_set(tmp_path / "two", {"s1": 4, "s3": 4}, "b")
    found = planned(one, two)
    assert [fold.speakers for fold in found.folds] == [["a/s1"], ["a/s2"], ["b/s1"], ["b/s3"]]
    first = found.folds[0]
    assert first.evaluation.data.keep == {"corpus/speaker": ["a/s1"]}
    heard = open_clips(first.trainings[0].config.data, "all")
    assert set(zip(heard.column("corpus"), heard.column("speaker"), strict=True)) == {
        ("a", "s2"),
        ("b", "s1"),
        ("b", "s3"),
    }


def test_one_voice_of_two_languages_is_in_one_fold(tmp_path: Path) -> None:
    sets = [write_set(tmp_path / name, {"s1": 6, "s2": 4, "s3": 2}, language=name) for name in ("de", "el")]
    found = planned(*sets)
    assert [fold.speakers for fold in found.folds] == [["s1"], ["s2"], ["s3"]] and found.folds[0].clips == 12


def test_validation_is_of_a_split_that_words_name_and_never_of_the_fold(tmp_path: Path) -> None:
    whole = write_set(tmp_path / "set", {"s1": 6, "s2": 6, "s3": 6})
    found = planned(whole, words=("data.split=[train, test]", "data.val_split=val"))
    config = found.folds[1].trainings[0].config
    assert config.data.val_split == "val" and config.train.val_every == 36  # the preset's
    assert set(open_clips(config.data, "val").column("speaker")) == {"s1", "s3"}
    assert set(open_clips(found.folds[1].evaluation.data, ["train", "test"]).column("split")) == {"train", "test"}


def test_a_fold_without_a_label_is_told(tmp_path: Path) -> None:
    one, two = write_set(tmp_path / "one", {"s1": 6, "s2": 6}), write_set(tmp_path / "two", {"s3": 4}, "b", ["sad"])
    assert planned(one, two).warnings == ["fold 3 has no clip of happy: its UA is the mean over its other labels"]


# ---- mistakes


@pytest.mark.parametrize(
    ("voices", "folds", "says"),
    [
        ({"s1": 4}, None, "all clips are of one speaker (s1)"),
        ({"s1": 4, "s2": 4}, 3, "--folds 3: there are 2 speakers"),
        ({"s1": 4, "s2": 4}, 1, "--folds 1: give two folds or more"),
    ],
)
def test_speakers_that_make_no_folds(tmp_path: Path, voices: dict[str, int], folds: int | None, says: str) -> None:
    with pytest.raises(UserError) as refused:
        planned(write_set(tmp_path / "set", voices), folds=folds)
    assert says in str(refused.value)


def test_clips_of_no_known_speaker(tmp_path: Path) -> None:
    """As in a foreign tar, whose samples need not say who speaks."""
    with tarfile.open(tmp_path / "foreign.tar", "w") as tar:
        for i in range(4):
            facts = {"label": LABELS[i % 2], "language": "de", **({"speaker": f"s{i}"} if i < 3 else {})}
            for ending, data in (("flac", audio.encode(pcm(i), 16000)), ("json", json.dumps(facts).encode())):
                member = tarfile.TarInfo(f"k{i}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    with pytest.raises(UserError, match="sample k3: 1 clip of 4 without a speaker"):
        planned(tmp_path / "foreign.tar")


def test_a_label_that_a_training_would_not_hear(tmp_path: Path) -> None:
    sets = [write_set(tmp_path / label, {f"of {label}": 4}, labels=[label]) for label in LABELS]
    with pytest.raises(UserError, match=r"only speakers of fold 1 \(of happy\) have clips of 'happy'"):
        planned(*sets)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["demo_stage2", "stage1=runs/x"], "demo_stage2 is a config of stage 2"),
        (["demo_stage1", "--stage2", "demo_stage1"], "--stage2 demo_stage1 is no config of stage 2"),
        (["demo_stage1", "stage2.train.lr=1"], "name its config by --stage2 CONFIG"),
        (["demo_stage1", "--nproc", "0"], "--nproc must be 1 or more"),
        (["demo_stage1", "--nproc", "3"], "does not divide by the world size 3"),
        (["demo_stage1", "train.lrr=1"], "did you mean train.lr?"),
        (["demo_stage1", "data.val_split=val"], "trains on the clips that data.val_split=val validates on"),
        (["demo_stage1", "out=run"], "run holds a run: choose another folder"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    tmp_path: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_set(tmp_path / "set", {"s1": 4, "s2": 4})
    Path("run").mkdir()
    Path("run/config.yaml").write_text("stage: 1\n")
    code = cli.main(["folds", *words[:1], f"data.sets={whole}", "data.labels=[happy, sad]", *words[1:]])
    error = capsys.readouterr().err
    assert code == 2 and says in error and len(error.splitlines()) == 1
    assert [path.name for path in Path.cwd().iterdir()] == ["run"] and len(list(Path("run").iterdir())) == 1


def test_one_rank_of_several_starts_no_folds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os._exit", lambda code: None)
    assert cli.main(["folds", "demo_stage1"]) == 2
    assert "is one of 2 here: start it once, with --nproc" in capsys.readouterr().err
