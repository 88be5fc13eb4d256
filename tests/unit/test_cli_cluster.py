"""The cluster's verbs on the command line: what they print, and how they end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mser_dist.cli import main as cli
from mser_dist.config.file import load_training, to_yaml

ROOT = Path(__file__).resolve().parents[2]
VERBS = ["check", "submit", "sweep", "sync", "doctor", "requeue"]
WORDS = ["demo_stage1", "data.sets=no/shards", "train.global_batch=8", "tracking.enabled=false"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    assert "--debug" in capsys.readouterr().out


def test_the_parser_imports_neither_submitit_nor_mlflow() -> None:
    code = "import sys, mser_dist.cli.main; mser_dist.cli.main._parser(); print(*sorted(sys.modules))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    loaded = set(done.stdout.split())
    assert "mser_dist.cli.jobs" in loaded and not loaded & {"submitit", "mlflow", "torch", "mser_dist.jobs.launch"}


def test_a_dry_run_shows_what_sbatch_would_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")  # it needs no SLURM
    options = ["--nodes", "2", "--tasks-per-node", "2", "--time", "2:00:00", "--after", "7", "--partition", "gpu"]
    assert (
        cli.main(["submit", *WORDS, *options, "--dry-run", "--slurm", "mem=8G", "--slurm", "exclusive", "seed=3"]) == 0
    )
    text, table = capsys.readouterr()
    for option in ("nodes=2", "ntasks-per-node=2", "time=120", "dependency=afterok:7", "partition=gpu", "mem=8G"):
        assert f"#SBATCH --{option}\n" in text
    assert text.startswith("#!/bin/bash\n") and "#SBATCH --exclusive\n" in text
    assert "job 7 has to bring it" in table and " 0 would fail" in table, "no/shards is not there yet"
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_a_sweep_names_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sweep", *WORDS, "lr=1e-4,3e-4", "out=runs/s", "--parallel", "1", "--dry-run", "seed=0,1"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --array=0-3%1\n" in text and "# runs/s/lr=3e-4_seed=0\n" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["submit", *WORDS, "--nodes", "3", "--dry-run"], "does not divide by the world size 3"),
        (["submit", *WORDS, "train.lrr=1"], "did you mean train.lr?"),
        (["submit", *WORDS, "--time", "soon"], "'soon' is no wall time"),
        (["submit", *WORDS, "--time", "2"], "--signal"),
        (["submit", *WORDS, "--local", "--nodes", "2"], "2 nodes need SLURM"),
        (["sweep", *WORDS, "seed=0"], "nothing to sweep"),
        (["sweep", *WORDS, "seed=0,1", "--parallel", "0"], "--parallel must be 1 or more"),
        (["sync", "no/run"], "no/run is no run folder"),
        (["requeue", "1", "demo_stage1", "nokey=1"], "unknown key nokey"),
    ],
)
def test_mistakes_are_one_line_and_code_2(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("mser: error: ") and says in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_failing_job_is_waited_for_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real local job: its one error line comes back to the terminal that waits. Of two ranks: test_launch.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert cli.main(["submit", *WORDS, "out=run", "--local", "--wait"]) == 2
    told = capfd.readouterr()
    assert told.out.startswith("job ") and "1 × 1 ranks → run" in told.out and "tail -F" in told.out
    assert len(told.err.splitlines()) == 1 and "no/shards: no such data set" in told.err


def test_a_sweep_of_failing_jobs_tells_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert cli.main(["sweep", *WORDS, "seed=0,1", "out=runs", "--local", "--parallel", "2", "--wait"]) == 1
    out = capfd.readouterr().out
    assert out.startswith("2 runs on this machine, 2 at once\n")
    *table, last = out[out.index("run ") :].splitlines()
    assert last == "table: runs/sweep"
    assert [line.split()[0] for line in table[2:]] == ["seed=0", "seed=1"]
    assert all("no such data set" in line for line in table[2:])


def test_sync_sends_each_run_and_says_so(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(prepared, "sent.db")
    for name in ("a", "b"):
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text(to_yaml(load_training("demo_stage1", [f"out={name}"])))
        (run / "log.jsonl").write_text(json.dumps({"step": 1, "seconds": 0.5, "train/loss": 2.5}) + "\n")
    assert cli.main(["sync", "a", "b", "--uri", f"sqlite:///{tmp_path}/sent.db"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("a: 1 of 1 numbers") and lines[1].startswith("b: 1 of 1 numbers")
    client = MlflowClient(f"sqlite:///{tmp_path}/sent.db")
    runs = client.search_runs([client.get_experiment_by_name("mser-demo").experiment_id])
    assert [run.data.metrics["train/loss"] for run in runs] == [2.5, 2.5]


def test_requeue_hands_back_the_code_outside_of_slurm(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["requeue", "75", "demo_stage1", "seed=1"]) == 75
