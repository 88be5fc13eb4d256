"""When a job is started again. `squeue` and `scontrol` are real in tests/slurm; here is what needs none."""

import json
from pathlib import Path

import pytest

from mser_dist.cluster.requeue import requeue
from mser_dist.config import Stage1


@pytest.fixture(autouse=True)
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue: what would be asked of it counts as unknown


def test_three_failures_at_one_step_are_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Stage1(out=str(tmp_path / "run"))
    for checkpoint, code, again in [
        (None, 1, True), (None, 1, True), ("step-000010", 1, True), (None, 139, True), (None, 70, False),
    ]:  # fmt: skip
        if checkpoint:
            (tmp_path / "run/checkpoints" / checkpoint).mkdir(parents=True)
            (tmp_path / "run/checkpoints/step-000020.partial").mkdir()
        assert requeue(code, config) == code
        said = capsys.readouterr().err
        assert ("failed 3 times at step 10 (exit code 70)" in said) is not again, said
    requeue(1, config)
    assert "failed 3 times" in capsys.readouterr().err, "it stays so for this job"
    monkeypatch.setenv("SLURM_JOB_ID", "124")
    requeue(1, config)
    assert "failed 3 times" not in capsys.readouterr().err, "who submits it anew has perhaps mended something"
    rows = [json.loads(line) for line in (tmp_path / "run/failures.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 0, 10, 10, 10, 10, 10]


@pytest.mark.parametrize("code", [0, 2, 75, 138, 140])
def test_what_is_no_failure_does_not_count(code: int, tmp_path: Path) -> None:
    assert requeue(code, Stage1(out=str(tmp_path / "run"))) == code
    assert not (tmp_path / "run").exists()
