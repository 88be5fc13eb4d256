"""`mser check`: what would end a job is in the table before it waits, with its remedy; what is well is not made up."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from mser_dist import config as cfg
from mser_dist.cli import main as cli
from mser_dist.errors import UserError
from mser_dist.jobs import check, check_weights, launch, planned
from mser_dist.jobs.doctor import Check

SMALL = ["data.labels=[happy, sad]", "data.workers=0", "train.global_batch=4", "tracking.enabled=false"]


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def rows(preset: str, *words: str, after: str | None = None, tasks: int = 1) -> dict[str, Check]:
    found = check.check(launch.resolve(preset, list(words)), launch.Resources(tasks_per_node=tasks), after)
    return {row.name: row for row in found}


def test_a_job_that_will_run_has_no_failure(tiny_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, f"data.sets={tiny_set}", "out=runs/x"]
    found = rows("demo_stage1", *words, tasks=2)
    assert {row.status for row in found.values()} == {"ok"}, found
    assert found["ranks"].found.startswith("global batch 4 = 2 ranks × 2 × 1")
    assert "every label occurs" in found["sets"].found and "installed package" in found["text tower"].found
    assert found["memory"].found == "not planned: --gpu h100 plans it"
    assert cli.main(["check", "demo_stage1", *words]) == 0
    said = capsys.readouterr().out
    assert "global_batch: 4" in said, "the resolved config"
    assert cli.main(["check", "demo_stage1", *words, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert not Path("runs").exists(), "nothing is written"


def test_all_that_would_fail_is_told_at_once(tiny_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "data.labels=[hapy, sad]", f"data.sets={tiny_set}", "out=runs/x", "train.global_batch=9"]
    words += ["encoder.pretrained=./no/model", "encoder.arch={}"]
    assert cli.main(["check", "demo_stage1", *words, "--tasks-per-node", "2"]) == 2
    said, error = capsys.readouterr()
    for part in ("does not divide by the world size 2", "'hapy'", "did you mean happy?", "no model folder ./no/model"):
        assert part in " ".join(said.split())
    assert "4 would fail" in said and "-> set train.global_batch=8" in said
    assert len(error.splitlines()) == 1 and error.startswith("mser: error: ")


def test_a_stage_2_without_its_stage_1_and_one_that_waits_for_it(tiny_set: Path) -> None:
    words = [*SMALL, f"data.sets={tiny_set}", "stage1=runs/one", "out=runs/two"]
    alone = rows("demo_stage2", *words)["stage 1"]
    assert alone.status == "fail" and "no such run folder" in alone.found + alone.remedy
    waiting = rows("demo_stage2", *words, after="12")["stage 1"]
    assert waiting.status == "warn" and waiting.remedy.startswith("job 12 has to bring it")
    export = Path("runs/one/export")
    export.mkdir(parents=True)
    (export / "speech.safetensors").write_bytes(b"damaged")
    card = {"stage": 1, "labels": ["happy"], "speech": {}, "format": 3, "files": {"speech.safetensors": "0" * 64}}
    (export / "card.json").write_text(json.dumps(card))
    damaged = rows("demo_stage2", *words)["stage 1"]
    assert damaged.status == "fail" and "the export is damaged" in damaged.found + damaged.remedy
    card["stage"] = 2
    (export / "card.json").write_text(json.dumps(card))
    other = rows("demo_stage2", *words)["stage 1"]
    assert other.status == "fail" and "this is a run of stage 2" in other.found + other.remedy


def test_an_evaluation_is_checked_too(tiny_set: Path) -> None:
    found = rows("demo_eval", f"data.sets={tiny_set}", "data.labels=[happy, sad]", "stage1=runs/a", "stage2=runs/b")
    assert {name for name, row in found.items() if row.status == "fail"} == {"stage 1", "stage 2"}


def safetensors(file: Path, **shapes: list[int]) -> None:
    """A head alone: the weights themselves are not read."""
    head = json.dumps(
        {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    )
    file.write_bytes(struct.pack("<Q", len(head)) + head.encode())


@pytest.fixture
def model() -> Path:
    folder = Path("model")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    safetensors(folder / "one.safetensors", a=[1000, 2000], b=[3])
    safetensors(folder / "two.safetensors", c=[5])
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder.absolute()


def test_a_folder_of_weights_is_whole_or_what_it_lacks_is_named(model: Path) -> None:
    assert check_weights.at_hand(str(model))[0] == "ok"
    assert check_weights.parameters(str(model)) == 2_000_008
    (model / "two.safetensors").unlink()
    status, found, _ = check_weights.at_hand(str(model))
    assert status == "fail" and "lacks two.safetensors of 2 files" in found
    with pytest.raises(UserError, match="no model folder"):
        check_weights.at_hand("./elsewhere")


def test_a_model_of_the_hub_that_was_not_fetched_is_a_failure_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    status, found, remedy = check_weights.at_hand("nobody/no-such-model")
    assert status == "fail" and "HF_HUB_OFFLINE is set" in found and remedy.endswith("hf download nobody/no-such-model")


def test_checkpoints_that_do_not_fit_the_disk(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000,008 weights at 16 bytes, four times: two are kept, the best, and one is being written."""
    config = launch.resolve("demo_stage2", ["stage1=x", f"llm.pretrained={model}", "llm.arch={}", "llm.freeze=false"])
    assert isinstance(config, cfg.Stage2)
    enough: Callable[[], tuple[str, str, str]] = lambda: check._disk(config, planned.Figures())  # noqa: E731
    assert enough()[0] == "ok" and "4 more checkpoints of" in enough()[1]
    free = 4 * 16 * 2_000_008
    for room, status in ((free, "warn"), (free + 1, "ok")):  # it is a bound
        monkeypatch.setattr(check.shutil, "disk_usage", lambda path, room=room: type("", (), {"free": room}))
        assert enough()[0] == status
    one = planned.Figures(checkpoint=free + 1)
    assert check._disk(config, one)[0] == "warn" and "by the plan" in check._disk(config, one)[1]
    assert check._disk(config, planned.Figures(checkpoint=free + 2))[0] == "fail", "not even one"
    for step in (2, 4, 6):  # of a run that goes on, whose checkpoints are there
        Path(config.out, f"checkpoints/step-{step:06d}").mkdir(parents=True)
    assert "; 1 more checkpoint" in check._disk(config, one)[1]


def test_what_is_planned_is_held_against_the_gpu_and_the_time() -> None:
    need = launch.Resources(time="10:00:00")
    assert check._memory(planned.Figures(memory=90, room=80))[0] == "fail"
    assert check._memory(planned.Figures(memory=70, room=80))[0] == "ok"
    assert check._time(need, planned.Figures(seconds=9 * 3600))[0] == "ok"
    status, found, _ = check._time(need, planned.Figures(seconds=30 * 3600))
    assert status == "warn" and "4 starts" in found
