"""A run with parameter groups is lengthened, forked with other groups, and resumed on other numbers of ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mser_dist.cli import main as cli
from tests.tiny_runs import LLM, TWO, lines, losses, mser, stage2

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def rates(run: Path) -> dict[int, tuple[float, float]]:
    """The learning rates by step: of the group of the LLM, and of all others."""
    found = {int(row["step"]): row for row in lines(run) if "train/loss" in row}
    return {step: (row["train/lr_group/llm"], row["train/lr"]) for step, row in found.items()}


def test_groups_lengthening_and_a_fork_on_other_numbers_of_ranks(
    finished_stage1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    shutil.copytree(finished_stage1, work)
    words = [LLM, "train.lr=1e-2", "train.warmup=0", "train.save_every=1", "train.keep=9", "data.val_split=null"]
    first = [*words, "train.schedule=constant", "train.groups=[{match: '^llm', lr: 1e-4}]"]
    said = mser(*stage2("runs/grown", *first, "train.steps=2"), cwd=work)
    assert "^llm" in said and "0.0001" in said, "the table of groups"
    said = mser(*stage2("runs/grown", *first, "train.steps=4"), *TWO, cwd=work)
    assert "the run was of 2 steps, and is of 4 now" in said and "continuing from step 2" in said
    assert rates(work / "runs/grown") == dict.fromkeys((1, 2, 3, 4), (1e-4, 1e-2))
    assert json.loads((work / "runs/grown/summary.json").read_text())["steps"] == 4

    # With other groups, schedule and length: weights, moments and place are those of step 2.
    groups = "train.groups=[{match: '^llm', lr: 1e-3}, {match: projector, freeze: true}]"
    other = [*words, "train.schedule=linear", groups, "train.fork=runs/grown@2"]
    said = mser(*stage2("runs/fork", *other, "train.steps=4"), *TWO, cwd=work)
    assert "a fork of step 2 of runs/grown, at its place in the order of the clips" in said
    assert sorted(losses(work / "runs/fork")) == [3, 4]
    # On as many ranks from the same step: bit for bit.
    assert losses(work / "runs/fork")[3] == losses(work / "runs/grown")[3]
    links = json.loads((work / "runs/fork/mlflow.json").read_text())["links"]
    assert links["mser.fork_run_id"] == str(work / "runs/grown")
    # It resumes on one rank, and is longer.
    mser(*stage2("runs/fork", *other, "train.steps=6"), cwd=work)
    found = rates(work / "runs/fork")
    assert sorted(found) == [3, 4, 5, 6] and all(llm == pytest.approx(0.1 * rest) for llm, rest in found.values())
    # What a step logs is for the next one: of four steps, the last but one, then of six.
    expected = {3: 0.2875, 4: 0.05, 5: 0.2083, 6: 0.05}
    assert {step: rest / 1e-2 for step, (_, rest) in found.items()} == pytest.approx(expected, abs=1e-4)
    frozen = load_file(work / "runs/fork/export/heads.safetensors")["projector.0.weight"]
    kept = load_file(work / "runs/grown/checkpoints/step-000002/rank-00000.safetensors")["master/projector.0.weight"]
    assert torch.equal(frozen.flatten(), kept), "frozen as the other run had it, and not as it was made"

    monkeypatch.chdir(work)
    for more, says in {
        "train.fork=runs/grown@9": "train.fork=runs/grown@9: the run has kept no step 9: name one of 1, 2, 3, 4",
        "train.fork=runs/grown@best": "no kept step was validated; name one of 1, 2, 3, 4",
        "train.fork=runs/none@2": "there is no run folder runs/none",
        "train.fork=runs/grown": "begins behind step 4, and the run is to have 3 in all",
    }.items():
        assert cli.main(stage2("runs/bad", *first, more)) == 2
        error = capsys.readouterr().err
        assert says in error and len(error.splitlines()) == 1, error
    assert cli.main(stage2("runs/grown", *first, "train.steps=3")) == 2
    assert "train.steps=3 is shorter: a run can only be lengthened" in capsys.readouterr().err
