"""The ledger of a training: made of its set, kept, chained over the runs that it builds on, and read again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mser_dist.config.file import load_training
from mser_dist.errors import UserError
from mser_dist.models.heard import ledger_of
from mser_dist.shards.index import sound
from mser_dist.shards.ledger import FILE, TRAINING, VALIDATION, Ledger, Part, part_of
from mser_dist.shards.shard_set import ShardSet
from mser_dist.training import ledgers
from tests.unit import tiny_exports
from tests.unit.made_up_ledger import LABELS, opened, republish, write, write_trained
from tests.unit.made_up_set import pcm


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_trained(tmp_path_factory.mktemp("trained") / "set")


@pytest.fixture(scope="module")
def ledger(trained: ShardSet) -> Ledger:
    return Ledger((part_of(trained, "one", 1),), "openai/whisper-base")


def test_what_a_set_tells(trained: ShardSet) -> None:
    part = part_of(trained, "one", 1)
    assert (part.languages, part.corpora, part.labels) == (["de", "fr"], ["a", "b"], LABELS)
    assert part.counts == [(c, la, label, 3) for c, la in (("a", "de"), ("b", "fr")) for label in LABELS]
    assert len(part.clips) == 12 == part.total and len(part.texts) == 12
    assert len(part.speakers) == 6, "a speaker is one of a corpus"
    assert {*part.clips.tolist()} == {sound(pcm(i)) for i in range(12)}


def test_a_speaker_is_the_same_in_several_languages(tmp_path: Path) -> None:
    clips = {f"k{i}": (i, {"language": ["de", "fr"][i % 2], "speaker": "s0"}) for i in range(4)}
    assert len(part_of(opened(write(tmp_path / "set", clips)), "one", 1).speakers) == 1


def test_what_is_read_is_what_was_written(ledger: Ledger, trained: ShardSet, tmp_path: Path) -> None:
    two = Ledger((part_of(trained, "two", 2), Part("old", 1, TRAINING, ["it"], [], [], known=False)))
    chained = two.with_those_of([ledger, ledger])
    assert [(part.run, part.stage) for part in chained.parts] == [("two", 2), ("old", 1), ("one", 1)]
    chained.save(tmp_path / FILE)
    again = Ledger.load(tmp_path / FILE)
    assert json.dumps(again.summary()) == json.dumps(chained.summary())
    for one, other in zip(chained.parts, again.parts, strict=True):
        assert one.facts() == other.facts()
        for name in ("clips", "speakers", "texts"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
    assert len(load_file(tmp_path / FILE)) == 4, "what two parts share is there once: clips, speakers, texts, nothing"


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20] ^= 0xFF
    path.write_bytes(data)


def unsorted(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        about = file.metadata()
    save_file({name: values[::-1].copy() for name, values in load_file(path).items()}, path, metadata=about)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: save_file({"x": np.zeros(2)}, path),
        flipped,
        unsorted,
    ],
    ids=["cut", "empty", "gone", "another", "flipped", "unsorted"],
)
def test_a_damaged_ledger_is_refused_in_one_line(damage: Callable[[Path], Any], ledger: Ledger, tmp_path: Path) -> None:
    ledger.save(tmp_path / FILE)
    damage(tmp_path / FILE)
    with pytest.raises(UserError, match=r"ledger.safetensors is damaged .*export the run again") as raised:
        Ledger.load(tmp_path / FILE)
    assert "\n" not in str(raised.value)


def config_of(tmp_path: Path, stage: int, out: str, data: Path, *words: str) -> Any:
    (tmp_path / f"s{stage}.yaml").write_text(f"stage: {stage}\n")
    plain = [f"data.sets=[{data}]", f"data.labels={LABELS}", "data.val_split=null", f"out={tmp_path / out}"]
    return load_training(str(tmp_path / f"s{stage}.yaml"), [*plain, *words])


def test_a_stage_2_holds_what_its_stage_1_heard_and_an_export_alone_knows(
    ledger: Ledger, trained: ShardSet, tmp_path: Path
) -> None:
    """Stage 1 → another by `init_from` → stage 2; then both are deleted, and its export is moved."""
    data = write(tmp_path / "more", {"x": (50, {"language": "it", "corpus": "c"})})
    for name, before in (("first", []), ("second", [f"init_from={tmp_path / 'first'}"])):
        tiny_exports.stage1(tmp_path / name, normalize="none")
        config = config_of(tmp_path, 1, name, data, *before, "encoder.pretrained=openai/whisper-base")
        ledgers.keep(config, trained if name == "first" else opened(data), None)
        republish(tmp_path / name)
    config = config_of(tmp_path, 2, "two", data, f"stage1={tmp_path / 'second'}")
    (tmp_path / "two").mkdir()
    ledgers.keep(config, opened(data), trained)
    tiny_exports.stage2(tmp_path / "two")
    republish(tmp_path / "two")
    onward = config_of(
        tmp_path, 2, "three", data, f"stage1={tmp_path / 'second'}", f"llm.pretrained={tmp_path}/two/export/llm"
    )
    (tmp_path / "three").mkdir()
    ledgers.keep(onward, opened(data), None)
    heard = {(part.run, part.use) for part in Ledger.load(tmp_path / "three" / FILE).parts}
    assert ("two", TRAINING) in heard and ("two", VALIDATION) in heard, "its LLM is that of the other run"
    shutil.rmtree(tmp_path / "first")
    shutil.rmtree(tmp_path / "second")
    (tmp_path / "two/export").rename(tmp_path / "alone")
    known = ledger_of(tmp_path / "alone")
    parts = [(part.run, part.stage, part.use, part.total) for part in known.parts]
    assert parts[:2] == [("two", 2, TRAINING, 1), ("two", 2, VALIDATION, 12)]
    assert parts[2:] == [("second", 1, TRAINING, 1), ("first", 1, TRAINING, 12)]
    assert known.encoder == "openai/whisper-base" and known.parts[3].facts() == ledger.parts[0].facts() | {
        "run": "first"
    }


def test_a_run_that_goes_on_keeps_its_ledger_and_a_damaged_one_is_written_anew(
    trained: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it was forked from is gone by then, and nobody could write its part again."""
    config = config_of(tmp_path, 1, "fork", tmp_path, f"train.fork={tmp_path / 'source'}")
    (tmp_path / "source").mkdir()
    (tmp_path / "fork/checkpoints/step-000002").mkdir(parents=True)
    Ledger((part_of(trained, "source", 1),), "").save(tmp_path / "source" / FILE)
    ledgers.keep(config, trained, None)
    assert [part.run for part in Ledger.load(tmp_path / "fork" / FILE).parts] == ["fork", "source"]
    shutil.rmtree(tmp_path / "source")
    ledgers.keep(config, trained, None)
    assert [part.known for part in Ledger.load(tmp_path / "fork" / FILE).parts] == [True, True]
    (tmp_path / "fork" / FILE).write_bytes(b"damage")
    ledgers.keep(config, trained, None)
    assert [part.known for part in Ledger.load(tmp_path / "fork" / FILE).parts] == [True, False]
    assert "it is written anew" in capsys.readouterr().err
