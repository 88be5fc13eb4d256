"""`mser features`: what it says before it begins, what it leaves behind, and what it refuses."""

import os
import signal
from pathlib import Path

import pytest
from torch import Tensor

from mser_dist.cli import main as cli
from mser_dist.models.frozen import FrozenEncoder
from mser_dist.ranks.preempt import SAVED
from tests.tiny_runs import ENCODER, QFORMER

FROZEN = ["encoder.freeze=true", "data.workers=0", ENCODER, *QFORMER]


@pytest.fixture
def words(tiny_set: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return ["features", "demo_stage1", f"data.sets={tiny_set}", "encoder.cache_dir=features", *FROZEN]


def said(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """Standard output, or the error where `code` is not 0."""
    assert cli.main(words) == code
    told = capsys.readouterr()
    return told.err if code else told.out


def test_it_says_how_much_there_is_and_does_it(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = said([*words, "--dry-run"], capsys)
    assert before.startswith("training: 48 clips, 0.4 MiB: 0 are there, 48 to encode\nvalidation: 12 clips")
    assert not list(Path().iterdir()), "a dry run changes nothing"
    part = said([*words, "--part", "1/3"], capsys)
    assert " of them in part 1 of 3" in part and "all of part 1 of 3 is there: features" in part
    assert said(words, capsys).endswith("features: features\n")
    files = sorted(Path("features").rglob("*.features"))
    after = said(words, capsys)
    assert "48 are there, 0 to encode" in after and "12 are there, 0 to encode" in after
    assert sorted(Path("features").rglob("*.features")) == files
    assert "48 clips, 0.4 MiB: 0 are there" in said([*words, "seed=1", "--dry-run"], capsys), (
        "from scratch: another encoder"
    )
    short = said([*words, "train.steps=1", "train.global_batch=8", "data.val_split=null", "--dry-run"], capsys)
    assert short.startswith("training: 8 clips") and "8 are there" in short and "validation" not in short
    assert not Path("runs").exists(), "no run folder is made"


def test_ctrl_c_keeps_what_is_encoded(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, rounds = FrozenEncoder.__call__, []

    def interrupted(self: FrozenEncoder, speech: Tensor, lengths: Tensor) -> list[Tensor]:
        rounds.append(len(lengths))
        if len(rounds) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, speech, lengths)

    monkeypatch.setattr(FrozenEncoder, "__call__", interrupted)
    error = said(words, capsys, SAVED)
    assert "SIGINT: stopped while it encoded the clips; the same command goes on with those that are missing" in error
    assert "16 are there, 32 to encode" in said(words, capsys) and sum(rounds) == 48 + 12


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["encoder.freeze=false"], "set encoder.freeze=true"),
        (["encoder.cache=off"], "encoder.cache=off keeps no features: set encoder.cache=disk"),
        (["encoder.cache=memory"], "encoder.cache=memory keeps them until this command ends: set encoder.cache=disk"),
        (["data.augment.speed=0.1"], "set data.augment.variants"),
        (["encoder.cache_gb=1e-5"], "encoder.cache_gb=1e-05 leaves 0.00: raise it"),
        (["--part", "3/3"], "--part 3/3: give it as I/N"),
        (["--part", "one"], "--part one: give it as I/N"),
        (["--nproc", "0"], "--nproc must be 1 or more"),
        (["data.sets=no/shards"], "no/shards: no such data set"),
    ],
)
def test_what_it_refuses(words: list[str], more: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = said([*words, *more], capsys, 2)
    lines = [line for line in error.splitlines() if line.startswith("mser:")]
    assert len(lines) == 1 and lines[0].startswith("mser: error: ") and says in lines[0]
    assert not list(Path().rglob("*.features"))
