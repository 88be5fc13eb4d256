import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mser_dist import __version__, audio
from mser_dist.cli import main as cli
from mser_dist.cli import runs
from mser_dist.config.file import PRESETS
from mser_dist.errors import UserError
from mser_dist.ranks import distributed
from tests.unit.made_up_set import write_set

VERBS = [
    "demo",
    "train",
    "eval",
    "features",
    "compare",
    "report",
    "config",
    "predict",
    "translate",
    "export",
    "push",
    "synth",
    "pack",
    "plan",
    "inspect",
    "verify",
]
ROOT = Path(__file__).resolve().parents[2]
# Stage 1 asks for little: a tiny encoder, the labels that the made-up set has, and no tracking.
SMALL = ["data.labels=[happy, sad]", "data.workers=0", "train.global_batch=4", "tracking.enabled=false"]


def mser(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A real `python -m mser_dist`; the environment may say how it encodes."""
    whole = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    command, encoding = [sys.executable, "-m", "mser_dist", *words], env.get("PYTHONIOENCODING")
    return subprocess.run(command, capture_output=True, text=True, env=whole, encoding=encoding)


def refused(code: int, error: str, *parts: str) -> None:
    """A mistake of the user: code 2, and a single line."""
    assert code == 2
    lines = error.splitlines()
    assert len(lines) == 1, error
    assert lines[0].startswith("mser: error")
    for part in parts:
        assert part in lines[0]


# ---- light: no torch


def test_the_parser_imports_nothing_heavy() -> None:
    code = "import sys, mser_dist.cli.main; mser_dist.cli.main._parser(); print(*sorted(sys.modules))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    loaded = set(done.stdout.split())
    assert "mser_dist.cli.main" in loaded
    heavy = {
        "torch",
        "numpy",
        "mlflow",
        "transformers",
        "deepspeed",
        "matplotlib",
        "soundfile",
        "webdataset",
        "rich",
        "pyarrow",
    }
    assert not loaded & heavy


def test_help_and_version() -> None:
    done = mser("--help")
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)
    assert mser("--version").stdout.strip() == f"mser {__version__}"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    assert "--debug" in capsys.readouterr().out


def test_a_mistake_answers_without_torch() -> None:
    """All of them: ``test_mistakes.py``."""
    code = "import sys, mser_dist.cli.main as m; print(m.main(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "train", "demo_stage1", "train.globl_batch=3"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["2", "False"]
    refused(2, done.stderr, "did you mean train.global_batch?")


def test_debug_shows_the_traceback() -> None:
    done = mser("train", "no_such.yaml", "--debug")
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr and "UserError" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("mser: error: no config file")


@pytest.mark.parametrize(
    "words",
    [
        ["config", "demo_stage1", "seed=3", "train.lr=1e-4"],
        ["config", "demo_stage1", "seed=3", "--debug", "train.lr=1e-4"],
        ["config", "--debug", "demo_stage1", "seed=3", "train.lr=1e-4"],
    ],
)
def test_options_may_stand_among_the_overrides(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "\nseed: 3\n" in out and "\n  lr: 0.0001\n" in out


def test_config_lists_presets_and_explains_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in listed} == {path.stem for path in PRESETS.glob("*.yaml")}
    assert cli.main(["config", "--keys", "stage2"]) == 0
    assert "llm.lora.rank (int > 0) = 16\n    rank of the adapters\n" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_or_log_that_is_not_utf_8(encoding: str, shards: Path) -> None:
    for words in (["config", "--keys", "stage1"], ["config", "demo_stage1"], ["config"], ["inspect", str(shards)]):
        done = mser(*words, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout and "─" not in done.stdout


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_the_users_to_mend(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(options: object) -> None:
        raise OSError(number, os.strerror(number), "runs/x/log.jsonl")

    monkeypatch.setattr(runs, "_config", full)
    code = cli.main(["config"])
    refused(code, capsys.readouterr().err, "the disk is full", "runs/x/log.jsonl", "free space")


def test_other_system_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(runs, "_config", broken)
    with pytest.raises(OSError, match="Input/output error"):
        cli.main(["config"])


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "_config", interrupted)
    assert cli.main(["config"]) == 130
    assert "continues from the last checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("error", [UserError("it is broken"), KeyboardInterrupt()])
def test_a_message_has_a_line_of_its_own(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error out of a loop leaves its bar open, in the middle of a line."""
    from mser_dist.progress import bar

    def broken(options: object) -> None:
        left = bar(title="some work", unit="clip", total=9)
        left.update()
        raise error

    monkeypatch.setattr(runs, "_config", broken)
    assert cli.main(["config"]) in (2, 130)
    *_, shown, message = capsys.readouterr().err.splitlines()
    assert "some work" in shown and message.startswith("mser: ")


# ---- with the real stages behind it


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("cli") / "set")


@pytest.fixture
def no_group_left() -> Iterator[None]:
    yield
    distributed.shutdown()


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_group_left: None
) -> Run:
    """`mser …` in this process, in an empty folder: (exit code, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str]:
        return cli.main([str(word) for word in words]), capsys.readouterr().err

    return call


def finished_run(folder: Path, stage: int) -> Path:
    """The card that a finished run leaves."""
    (folder / "export").mkdir(parents=True)
    card = {"stage": stage, "labels": ["happy", "sad"], "languages": ["de"], "files": {}, "speech": {"n_mels": 80}}
    (folder / "export" / "card.json").write_text(json.dumps(card))
    return folder


def test_a_missing_set(run: Run, tmp_path: Path) -> None:
    code, error = run("train", "demo_stage1", *SMALL, "data.sets=nowhere", "out=run")
    refused(code, error, "nowhere: no such data set")
    assert not list(tmp_path.iterdir()), "a refused run leaves nothing behind"


def test_a_shard_gone_from_a_set(run: Run, shards: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(shards, tmp_path / "set"))
    (broken / "train-000001.tar").unlink()
    code, error = run("train", "demo_stage1", *SMALL, f"data.sets={broken}", "out=run")
    refused(code, error, "train-000001.tar: the shard is missing")


def test_labels_that_no_clip_has(run: Run, shards: Path) -> None:
    code, error = run("train", "demo_stage1", *SMALL, f"data.sets={shards}", "data.labels=[sad, fear]")
    refused(code, error, "no sample is left", "happy")


def test_an_evaluations_labels_are_checked(run: Run, shards: Path, tmp_path: Path) -> None:
    finished_run(tmp_path / "one", stage=1)
    words = ["eval", "demo_eval", f"data.sets={shards}", "stage1=one", "stage2=null", "out=run"]
    for labels, says in (("[happy,hapyp]", "did you mean happy?"), ("[happy,Angst]", "did you mean fear?")):
        code, error = run(*words, f"data.labels={labels}")
        refused(code, error, "data.labels names", "no clip of the sets has it", says)
    assert not (tmp_path / "run").exists()


def test_packing_onto_a_set_names_the_option(run: Run, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(audio.encode(np.ones(16000, np.int16), 16000, "wav"))
    (tmp_path / "list.csv").write_text("path,emotion,language,speaker,split\na.wav,sad,de,s1,train\n")
    refused(*run("pack", "manifest", "list.csv", shutil.copytree(shards, tmp_path / "set")), "--overwrite")
    assert run("pack", "manifest", "list.csv", "set", "--overwrite")[0] == 0


def test_a_kernel_that_cannot_run(run: Run, shards: Path) -> None:
    code, error = run("train", "demo_stage1", *SMALL, f"data.sets={shards}", "engine.attention=flash_attention_2")
    refused(code, error, "flash_attention_2 cannot run")


def test_a_deepspeed_file_that_contradicts(run: Run, shards: Path) -> None:
    code, error = run("train", "demo_stage1", *SMALL, f"data.sets={shards}", "engine.deepspeed=zero3_bf16")
    refused(code, error, "bf16.enabled=true contradicts engine.dtype=float32")


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_a_stage_1_that_cannot_be_built_on(verb: str, run: Run, shards: Path, tmp_path: Path) -> None:
    config = {"train": "demo_stage2", "eval": "demo_eval"}[verb]
    words = SMALL if verb == "train" else ["data.labels=[happy, sad]", "stage2=null"]
    words = [verb, config, *words, f"data.sets={shards}", "out=run"]
    if verb == "train":
        words.append("data.val_split=null")

    code, error = run(*words, "stage1=nowhere")
    refused(code, error, "stage1=nowhere: there is no such run folder")
    (tmp_path / "begun").mkdir()
    code, error = run(*words, "stage1=begun")
    refused(code, error, "stage1=begun: the run has no finished export", "let it train to its end")
    finished_run(tmp_path / "other", stage=2)
    code, error = run(*words, "stage1=other")
    refused(code, error, "stage1=other: this is a run of stage 2; name a run of stage 1")
    (tmp_path / "other" / "export" / "card.json").write_text('{"stage": 1}')
    code, error = run(*words, "stage1=other")
    refused(code, error, "is not the card of an exported run")


def test_a_world_size_that_the_batch_does_not_divide_by(shards: Path, tmp_path: Path) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    words = [f"data.sets={shards}", f"out={tmp_path / 'run'}", "train.global_batch=64"]
    done = mser("train", "demo_stage1", *SMALL, *words, **place)
    refused(done.returncode, done.stderr, "train.global_batch=64 does not divide by the world size 3", "=63")
    assert not (tmp_path / "run").exists()


def test_a_half_set_environment(run: Run, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    code, error = run("train", "demo_stage1", *SMALL, f"data.sets={shards}")
    refused(code, error, "sets RANK but not WORLD_SIZE")


def test_an_unknown_corpus(run: Run, tmp_path: Path) -> None:
    code, error = run("pack", "emodbb", tmp_path, tmp_path / "out")
    refused(code, error, "emodbb", "emodb")
    assert not (tmp_path / "out").exists()


def test_a_clip_longer_than_pack_takes(run: Run, tmp_path: Path) -> None:
    """The remedy that the error names can be followed."""
    (tmp_path / "long.wav").write_bytes(audio.encode(np.zeros(41 * 16000, np.int16), 16000, "wav"))
    (tmp_path / "list.csv").write_text("path,emotion,language,speaker,split\nlong.wav,sad,de,s1,train\n")
    code, error = run("pack", "manifest", "list.csv", "out")
    refused(code, error.splitlines()[-1], "long.wav: 41.0 s of audio, the limit is 40 s; cut it", "--max-seconds")
    assert run("pack", "manifest", "list.csv", "out", "--max-seconds", 60)[0] == 0


def test_verify(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(shards)]) == 0
    assert "no problem found" in capsys.readouterr().out
    broken = Path(shutil.copytree(shards, tmp_path / "set"))
    (broken / "train-000001.tar").unlink()
    assert cli.main(["verify", str(broken), str(shards)]) == 1
    said = capsys.readouterr()
    assert "train-000001.tar" in said.out and f"{broken}: problems: 1" in said.out
    assert f"{shards}: no problem found" in said.out
    assert "verify: 100%" in said.err
