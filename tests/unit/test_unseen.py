"""What an evaluation says by the ledgers: what of a row training had heard, and what may be called zero-shot."""

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mser_dist import audio
from mser_dist.cli import folds
from mser_dist.cli import main as cli
from mser_dist.errors import UserError
from mser_dist.evaluation import report, unseen
from mser_dist.evaluation.gathered import of_folders
from mser_dist.models.declared import declared
from mser_dist.models.heard import ledger_of
from mser_dist.shards.ledger import FILE, VALIDATION, Ledger, part_of
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.verify import verify
from tests.unit import tiny_exports
from tests.unit.made_up_ledger import LABELS, opened, republish, write, write_trained
from tests.unit.made_up_runs import evaluate
from tests.unit.made_up_set import pcm


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_trained(tmp_path_factory.mktemp("trained") / "set")


@pytest.fixture(scope="module")
def ledger(trained: ShardSet) -> Ledger:
    return Ledger((part_of(trained, "one", 1),), "openai/whisper-base")


def found(ledger: Ledger, shards: ShardSet) -> unseen.Found:
    """Of the one place that a set has."""
    [(corpus, language, numbers)] = unseen.places(shards)
    return unseen.Unseen(ledger, shards).of(corpus, language, sorted(set(shards.column("label"))), numbers)


def test_another_language_of_other_speakers_is_zero_shot(ledger: Ledger, tmp_path: Path) -> None:
    test = opened(write(tmp_path / "set", {"k00": (30, {"language": "el", "corpus": "c", "label": "fear"})}))
    said = found(ledger, test)
    assert said.why_not is None and said.as_row()["zero_shot"] is True and said.leaks is None
    assert said.unseen["stage1"] == {
        **{"known": True, "language": True, "corpus": True, "labels": ["fear"], "speakers": 1, "speakers_shared": 0},
        **{"clips_shared": 0, "texts_shared": 0, "unknown": []},
    }
    encoder = said.unseen["encoder"]
    assert encoder["language"] is False and encoder["labels"] == ["fear"], "declared: heard, without emotions"
    assert encoder["clips_shared"] is None, "nobody declared its clips"


def test_the_training_set_itself_leaks(ledger: Ledger, trained: ShardSet) -> None:
    for corpus, language, numbers in unseen.places(trained):
        said = unseen.Unseen(ledger, trained).of(corpus, language, LABELS, numbers)
        assert said.leaks == "stage 1 heard 6 of its 6 clips and 3 of its 3 speakers"
        assert said.why_not == f"stage 1 was trained on its language; {said.leaks}"


@pytest.mark.parametrize(
    ("clip", "says"),
    [
        ((40, {"language": "de", "corpus": "c"}), "stage 1 was trained on its language"),
        ((40, {"language": "de-AT", "corpus": "c"}), "stage 1 was trained on its language"),
        ((40, {"language": "el", "corpus": "a", "speaker": "s1"}), "stage 1 heard 1 of its 1 speakers"),
        ((3, {"language": "el", "corpus": "c"}), "stage 1 heard 1 of its 1 clips"),
        ((40, {"language": "el", "corpus": "c", "speaker": "s1"}), None),
        ((40, {"language": "el", "corpus": "a", "speaker": "new"}), None),
        ((40, {"language": "el", "corpus": "a", "speaker": "new", "source_id": "u0"}), None),
        ((40, {"language": "und", "corpus": "c"}), "its language is not named"),
    ],
    ids=["language", "dialect", "speaker", "renamed clip", "name of another corpus", "corpus", "sentence", "unnamed"],
)
def test_what_is_not_zero_shot(
    clip: tuple[int, dict[str, Any]], says: str | None, ledger: Ledger, tmp_path: Path
) -> None:
    said = found(ledger, opened(write(tmp_path / "set", {"another-key": clip})))
    assert said.why_not == says
    assert said.unseen["stage1"]["texts_shared"] == (clip[1].get("source_id") == "u0")
    assert bool(said.leaks) == ("heard" in (says or ""))


def test_what_a_checkpoint_was_chosen_by_counts(trained: ShardSet, tmp_path: Path) -> None:
    ledger = Ledger((part_of(opened(write(tmp_path / "x", {"k": (60, {"language": "it"})})), "one", 1),), "")
    ledger = ledger.with_those_of([Ledger((part_of(trained, "one", 1, VALIDATION),))])
    some = opened(write(tmp_path / "set", {"k": (1, {"language": "de", "corpus": "a"})}))
    assert found(ledger, some).why_not == (
        "stage 1 has a checkpoint that was chosen by its language; stage 1 heard 1 of its 1 clips and 1 of its 1 "
        "speakers in validation alone"
    )


def test_a_stage_2_is_judged_by_both_stages(ledger: Ledger, tmp_path: Path) -> None:
    own = opened(write(tmp_path / "own", {"k": (70, {"language": "el", "corpus": "c"})}))
    both = Ledger((part_of(own, "two", 2),), "").with_those_of([ledger])
    said = found(both, opened(write(tmp_path / "test", {"k": (71, {"language": "de", "corpus": "d"})})))
    assert [said.unseen[stage]["language"] for stage in ("stage1", "stage2")] == [False, True]
    assert said.why_not == "stage 1 was trained on its language"


# ---- where the records are silent


def foreign(out: Path, language: str, numbers: range, **facts: Any) -> Path:
    """A tar that is not ours: nobody has decoded it."""
    out.mkdir()
    with tarfile.open(out / "train-000000.tar", "w") as tar:
        for i in numbers:
            told = {"language": language, "speaker": f"s{i}", "label": LABELS[i % 2], "corpus": language, **facts}
            for ending, data in (("flac", audio.encode(pcm(i), 16000, "flac")), ("json", json.dumps(told).encode())):
                member = tarfile.TarInfo(f"k{i}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return out


def test_clips_without_hashes_are_told_and_verify_makes_them(ledger: Ledger, tmp_path: Path) -> None:
    test = foreign(tmp_path / "test", "el", range(80, 83))
    said = found(ledger, opened(test))
    assert said.why_not == said.unknown == "stage 1: 3 clips of the test without a hash (mser verify, or pack it again)"
    assert unseen.shown(said.as_row()) == "unknown" and said.as_row()["zero_shot"] is False
    assert verify(test) == [] and found(ledger, opened(test)).why_not is None

    other = foreign(tmp_path / "other", "sw", range(90, 93))
    unhashed = Ledger((part_of(opened(other), "one", 1),), "")
    assert unhashed.parts[0].unhashed == 3
    assert "3 clips of its training had no hash" in str(found(unhashed, opened(test)).unknown)
    both = "stage 1 heard 3 of its 3 clips and 3 of its 3 speakers"
    assert found(unhashed, opened(other)).leaks == both, "known by their place in the tar"
    assert verify(other) == [] and found(unhashed, opened(other)).leaks == both, "which hashes do not change"


def test_clips_without_speakers_are_told_where_training_had_their_corpus(ledger: Ledger, tmp_path: Path) -> None:
    for corpus, says in (("a", "stage 1: clips of a without a speaker's name"), ("c", None)):
        test = foreign(tmp_path / corpus, "el", range(80, 83), speaker="", corpus=corpus)
        assert verify(test) == [] and found(ledger, opened(test)).unknown == says


def test_an_export_of_an_older_version_is_unknown(tmp_path: Path) -> None:
    run = tiny_exports.stage2(tmp_path / "old")
    known = ledger_of(run / "export")
    assert [(part.stage, part.known) for part in known.parts] == [(2, False), (1, False)]
    test = opened(write(tmp_path / "el", {"k": (1, {"language": "el", "corpus": "c"})}))
    said = found(known, test)
    assert said.unseen["stage2"]["language"] is True, "its card knows languages"
    assert said.unseen["stage2"]["speakers_shared"] == 0 and said.unseen["stage2"]["clips_shared"] is None
    assert unseen.shown(said.as_row()) == "unknown" and "old has kept no ledger" in str(said.why_not)
    test = opened(write(tmp_path / "de", {"k": (1, {"language": "de", "corpus": "made-up"})}))
    assert unseen.shown(found(known, test).as_row()) == "no"
    assert found(known, test).unseen["stage1"]["speakers_shared"] is None
    assert found(Ledger(()), test).why_not == "its ledger is empty"


# ---- what is printed


def given_of(ledger: Ledger, shards: ShardSet) -> report.Answers:
    n = len(shards)
    reference = np.array([LABELS.index(label) for label in shards.column("label")])
    scores = np.eye(2, dtype=np.float32)[reference]
    return report.Answers(np.arange(n), reference, scores, ["de", "fr"], ledger=ledger)


def rows_of(ledger: Ledger, shards: ShardSet) -> list[dict[str, Any]]:
    return [report.as_row(group) for group in report.measure({"stage1": given_of(ledger, shards)}, shards, LABELS)]


def test_what_is_written_and_what_folds_and_comparisons_tell_of_it(ledger: Ledger, tmp_path: Path) -> None:
    clips = {f"el{i}": (100 + i, {"language": "el", "corpus": "c"}) for i in range(3)}
    clips |= {f"ru{i}": (200 + i, {"language": "ru", "corpus": "a"}) for i in range(3)}
    shards = opened(write(tmp_path / "set", clips))
    out = evaluate(tmp_path / "eval", shards, {"stage1": given_of(ledger, shards)}, labels=LABELS)
    leak = "stage 1 heard 3 of its 3 speakers"
    table = (out / "table.txt").read_text()
    assert f"leaks: ru of a: {leak}" in table and "\nzero-shot: no training behind the model had" in table
    found = json.loads((out / "report.json").read_text())
    assert found["ledger"]["models"]["stage1"]["parts"][0]["run"] == "one"
    assert (
        found["ledger"]["notes"] == unseen.notes(found["zero_shot"]) and f"leaks: ru of a: {leak}" in found["warnings"]
    )
    _, notes = of_folders([out])
    assert [note for note in notes if "leaks" in note] == [f"{out}: ru of a leaks: {leak}"]
    fold: Any = SimpleNamespace(number=3, evaluation=SimpleNamespace(out=str(out)))
    assert folds._leaks(SimpleNamespace(folds=[fold])) == [f"fold 3: leaks: ru of a: {leak}"]  # type: ignore[arg-type]


def test_the_table_and_the_name_of_an_evaluation(ledger: Ledger, tmp_path: Path) -> None:
    clips = {f"el{i}": (100 + i, {"language": "el", "corpus": "c"}) for i in range(3)}
    clips |= {f"ru{i}": (200 + i, {"language": "ru", "corpus": "a"}) for i in range(3)}
    clips |= {f"de{i}": (300 + i, {"language": "de", "corpus": "d"}) for i in range(3)}
    rows = rows_of(ledger, opened(write(tmp_path / "set", clips)))
    table = str(report.zero_shot_table(rows)).splitlines()
    assert [line.split()[2:5] for line in table[2:5]] == [["d", "de", "no"], ["a", "ru", "leaks"], ["c", "el", "yes"]]
    assert [line.split()[5:8] for line in table[5:7]] == [["languages", "no", "1.000"], ["languages", "in", "part"]]
    assert max(map(len, table)) <= 120
    assert unseen.leak_lines(rows) == ["leaks: ru of a: stage 1 heard 3 of its 3 speakers"]
    assert unseen.kind(rows) == "Evaluation, zero-shot in el and not in de, ru"
    assert unseen.kind([row for row in rows if row["language"] == "el"]) == "Zero-shot evaluation"
    assert unseen.kind([row for row in rows if row["language"] == "de"]) == "Evaluation, none of it zero-shot"
    silent = {"unseen": {}, "zero_shot": False, "leaks": None, "unknown": "no ledger", "why_not_zero_shot": "no ledger"}
    assert unseen.kind([{"language": "el", **silent}]) == "Evaluation, none of it known to be zero-shot"
    assert unseen.kind([{"language": "el"}]) == "Evaluation", "of an older version"
    assert unseen.notes(rows)[1].startswith("the pretrained encoder openai/whisper-base, as declared: transcribed")
    assert json.loads(json.dumps(rows))[0]["unseen"]["stage1"]["language"] is False


@pytest.mark.parametrize(
    ("name", "language", "labels"),
    [
        ("openai/whisper-large-v3", "el", "unlabelled"),
        ("pypi:whisper-base", "fa", "unlabelled"),
        ("openai/whisper-base.en", "en", "unlabelled"),
        ("audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim", "en", "labelled"),
    ],
)
def test_what_is_declared_of_encoders(name: str, language: str, labels: str) -> None:
    known = declared(name)
    assert known is not None and known.languages is not None and language in known.languages
    assert known.emotions == (labels == "labelled")
    assert declared(f"somebody/{name.rpartition('/')[2]}-emotions") is None, "trained further: another model"


def test_an_encoder_that_was_trained_on_emotions_counts(ledger: Ledger, tmp_path: Path) -> None:
    heard = Ledger(ledger.parts, "audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim")
    for language, says in (("en", "trained on emotions in its language"), ("el", None)):
        test = opened(write(tmp_path / language, {"k": (1000, {"language": language, "corpus": "c"})}))
        why = found(heard, test).why_not
        assert why is None if says is None else says in str(why)


# ---- asked for


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("zero_shot", "de of made-up is not known to be zero-shot: stage 1 was trained on its language"),
        ("unseen_corpus", "not known to be of a corpus never trained on: stage 1 was trained on that corpus"),
        ("unseen_speakers", "not known to be of speakers never trained on: stage 1 heard 1 of them"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_scored(
    asked: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_exports.stage1(tmp_path / "one")
    data = write(tmp_path / "set", {f"k{i}": (i, {"language": "de", "speaker": "s"}) for i in range(4)}, "test")
    Ledger((part_of(opened(data), "one", 1),), "").save(tmp_path / "one" / FILE)
    republish(tmp_path / "one")
    words = ["eval", "demo_eval", f"stage1={tmp_path / 'one'}", "stage2=null", f"data.sets=[{data}]"]
    words += [f"data.labels={LABELS}", f"out={tmp_path / 'eval'}", "tracking.enabled=false"]
    assert cli.main([*words, f"require={asked}"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "eval").exists()


def test_what_can_be_is_not_refused(ledger: Ledger, tmp_path: Path) -> None:
    test = opened(write(tmp_path / "set", {"k": (500, {"language": "el", "corpus": "c"})}))
    for asked in (None, *unseen.REQUIRED):
        unseen.require(asked, {"stage 1": ledger}, test)
    # A clip of training under another corpus's name, and another speaker's.
    known = opened(write(tmp_path / "known", {"k": (3, {"language": "el", "corpus": "c", "speaker": "x"})}))
    for asked in ("unseen_corpus", "unseen_speakers"):
        with pytest.raises(UserError, match="stage 1 heard 1 clip of it"):
            unseen.require(asked, {"stage 1": ledger}, known)
    old = {"stage 1": ledger_of(tiny_exports.stage1(tmp_path / "old") / "export")}
    with pytest.raises(UserError, match="old has kept no ledger"):
        unseen.require("zero_shot", old, test)
