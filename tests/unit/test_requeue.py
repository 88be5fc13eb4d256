"""When a job is started again. `squeue` and `scontrol` are real in tests/slurm; here is what needs none."""

import json
from pathlib import Path

import pytest

from mser_dist.jobs.requeue import requeue


@pytest.fixture(autouse=True)
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue: what would be asked of it counts as unknown


def test_three_failures_at_one_step_are_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    for checkpoint, code, again in [
        (None, 1, True), (None, 1, True), ("step-000010", 1, True), (None, 75, True), (None, 139, True),
        (None, 70, False),
    ]:  # fmt: skip
        if checkpoint:
            (tmp_path / "run/checkpoints" / checkpoint).mkdir(parents=True)
            (tmp_path / "run/checkpoints/step-000020.partial").mkdir()
        assert requeue(code, out) == code
        said = capsys.readouterr().err
        assert ("exit code 70; failed 3 times at step 10" in said) is not again, said
    requeue(1, out)
    assert "failed 4 times" in capsys.readouterr().err, "it stays so for this job"
    monkeypatch.setenv("SLURM_JOB_ID", "124")
    requeue(1, out)
    assert "failed" not in capsys.readouterr().err, "who submits it anew has perhaps mended something"
    rows = [json.loads(line) for line in (tmp_path / "run/ends.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 0, 10, 10, 10, 10, 10, 10]


def test_ten_stops_at_one_step_are_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ends.jsonl").write_text('{"step": 0, "co\n')  # a line that was cut
    for start in range(1, 11):
        assert requeue([75, 138, 140][start % 3], tmp_path) in (75, 138, 140)
        assert ("10 starts did not get beyond step 0" in capsys.readouterr().err) is (start == 10)


@pytest.mark.parametrize("code", [0, 2])
def test_what_is_done_or_a_mistake_is_not_asked_about(
    code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert requeue(code, tmp_path / "run") == code
    assert not (tmp_path / "run").exists() and not capsys.readouterr().err


def test_a_task_of_an_array_is_asked_about_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "100")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\ncase "$*" in *%A*) echo "100 100_8"; echo "123 100_7";; *) echo PENDING;; esac\n')
    squeue.chmod(0o755)
    requeue(75, tmp_path)
    assert "job 100_7 is PENDING" in capsys.readouterr().err
    squeue.write_text('#!/bin/sh\ncase "$*" in *%A*) echo "123 123";; *) echo PENDING;; esac\n')
    requeue(75, tmp_path)
    assert "job 123 is PENDING" in capsys.readouterr().err, "its variables are those of the task that submitted it"


def test_what_somebody_else_has_decided_is_no_failure_of_this_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """submitit has put the job back in the queue, say, and its rank 0 ended with 255."""
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho PENDING\n")
    squeue.chmod(0o755)
    for _ in range(4):
        assert requeue(255, tmp_path / "run") == 255
    assert "job 123 is PENDING: not started again from here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
