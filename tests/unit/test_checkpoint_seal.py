import hashlib
import json
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from mser_dist.errors import UserError
from mser_dist.ranks.distributed import World
from mser_dist.runs.folder import claimed, seen_by_all
from mser_dist.state import checkpoint, fork, seal
from mser_dist.state.checkpoint import Checkpoints, publish
from mser_dist.state.seal import read_seal, seal_fault

PART = "rank-00000.safetensors"


@pytest.fixture(autouse=True)
def no_network_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not there is not waited for."""
    monkeypatch.setattr(seal, "LATE", 0.0)


def save(run: Path, step: int, keep: int = 9, ua: float | None = None) -> Path:
    """A published checkpoint with two small files in place of an engine's; validated where `ua` is given."""
    checkpoints = Checkpoints(run, World(), keep)
    staging = checkpoints.folder / f"step-{step:06d}.partial"
    staging.mkdir(parents=True)
    files = {PART: bytes(range(256)) * (step % 7 + 1), "random-00000.safetensors": b"random"}
    for name, data in files.items():
        (staging / name).write_bytes(data)
    sealed = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    publish(staging, sealed, {"step": step, "world_size": 1}, {"world_size": 1})
    if ua is not None:
        checkpoints.note(step, {"ua": ua})
    checkpoints._prune()
    return checkpoints.folder / f"step-{step:06d}"


def choose(run: Path) -> Path | None:
    return Checkpoints(run, World(), 2).choose()


def fault_in(folder: Path) -> str | None:
    sealed, fault = read_seal(folder)
    return fault or seal_fault(folder, sealed)


def test_a_published_checkpoint_is_whole(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    assert fault_in(folder) is None
    sealed = json.loads((folder / "seal.json").read_text())
    assert sealed.keys() == {PART, "random-00000.safetensors", "state.json", "manifest.json"}
    assert json.loads((folder / "state.json").read_text()) == {"step": 3, "world_size": 1}
    assert [path.name for path in folder.parent.iterdir()] == ["step-000003"], "nothing of the staging is left"


def flip(path: Path, at: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda f: (f / PART).write_bytes(b"\0"),
        f"{PART} differs from its seal",
    ),
    "flipped": (lambda f: flip(f / PART), f"{PART} differs from its seal"),
    "missing": (lambda f: (f / "random-00000.safetensors").unlink(), "random-00000.safetensors is missing"),
    "other state": (
        lambda f: (f / "state.json").write_text('{"step": 9, "world_size": 1}'),
        "state.json differs from its seal",
    ),
    "no seal": (lambda f: (f / "seal.json").unlink(), "has no readable seal.json"),
    "cut seal": (
        lambda f: (f / "seal.json").write_bytes((f / "seal.json").read_bytes()[:50]),
        "has no readable seal.json",
    ),
    "seal of zeros": (lambda f: (f / "seal.json").write_bytes(bytes(50)), "has no readable seal.json"),
    "seal of another shape": (lambda f: (f / "seal.json").write_text('{"state.json": 3}'), "has no readable seal.json"),
    "link to nothing": (
        lambda f: (f / "rank-00009.safetensors").symlink_to("none"),
        "rank-00009.safetensors is not in the seal",
    ),
    "seal that is a list": (lambda f: (f / "seal.json").write_text("[]"), "has no readable seal.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_the_one_before_is_taken(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, says = DAMAGES[name]
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    damage(newer)
    fault = fault_in(newer)
    assert fault and fault.startswith("step-000002") and fault.endswith(says)
    assert choose(tmp_path) == older
    assert f"falling back to {older}: step-000002" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["seal.json", PART, "manifest.json"])
def test_a_network_disk_that_shows_a_file_a_moment_later_is_waited_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seal, "LATE", 20.0)
    folder = save(tmp_path, 1)
    hidden = (folder / name).rename(tmp_path / name)
    timer = threading.Timer(0.5, lambda: hidden.rename(folder / name))
    timer.start()
    assert choose(tmp_path) == folder
    timer.join()


def test_each_rank_hashes_the_files_that_it_reads_next() -> None:
    sealed = {f"{kind}-{rank:05d}.safetensors": (1, "") for rank in range(256) for kind in ("rank", "random")}
    sealed |= {"state.json": (1, ""), "manifest.json": (1, "")}
    shared = seal.shares(sealed, 256)
    assert all(
        {f"rank-{r:05d}.safetensors", f"random-{r:05d}.safetensors"} <= share.keys() for r, share in enumerate(shared)
    )
    for ranks in (1, 3, 64, 1000):
        shared = seal.shares(sealed, ranks)
        assert len(shared) == ranks and sorted(name for share in shared for name in share) == sorted(sealed)
        assert max(map(len, shared)) <= len(sealed) / ranks + 3


def test_the_newest_whole_one_is_taken_and_what_was_never_finished_is_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 20)
    assert choose(tmp_path) == newest
    assert not capsys.readouterr().err
    (newest.parent / "step-000030.partial").mkdir()
    (newest.parent / "step-notes").mkdir()
    (newest.parent / "step-000040").write_text("a file")
    assert choose(tmp_path) == newest
    assert "removing step-000030.partial" in capsys.readouterr().err
    assert not (newest.parent / "step-000030.partial").exists()


def test_a_fresh_run_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert choose(tmp_path) is None
    (tmp_path / "checkpoints" / "step-000001.partial").mkdir(parents=True)
    assert choose(tmp_path) is None
    assert "starts from step 0" in capsys.readouterr().err


def test_none_whole_is_an_error_and_never_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(save(tmp_path, step) / PART)
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole \(step-000002.*; step-000001.*\): move"):
        choose(tmp_path)


def test_pruning_keeps_the_newest_by_number_and_the_best(tmp_path: Path) -> None:
    for step, ua in ((999_990, 0.5), (999_991, 0.7), (999_992, 0.7), (999_998, 0.6)):
        save(tmp_path, step, keep=2, ua=ua)
    for step in (999_999, 1_000_000):  # a name of seven digits sorts before one of six
        save(tmp_path, step, keep=2)
    found = [path.name for path in Checkpoints(tmp_path, World(), 2).published()]
    assert found == ["step-999992", "step-999999", "step-1000000"]
    assert choose(tmp_path) == tmp_path / "checkpoints" / "step-1000000"


def test_a_validation_that_comes_after_the_last_save_still_decides_which_is_kept(tmp_path: Path) -> None:
    """As of the last step of a run, which is published and pruned before it is validated."""
    save(tmp_path, 1, keep=1, ua=0.6)
    save(tmp_path, 2, keep=1)
    checkpoints = Checkpoints(tmp_path, World(), keep=1)
    checkpoints._prune()
    assert [path.name for path in checkpoints.published()] == ["step-000001", "step-000002"]
    checkpoints.note(2, {"ua": 0.7})
    checkpoints.finish()
    assert [path.name for path in checkpoints.published()] == ["step-000002"]
    assert Checkpoints(tmp_path, World(), keep=1).noted(2) == {"ua": 0.7}


@pytest.mark.parametrize("text", ["", "[]", '{"1": 3}', '{"x": {"ua": 1}}'])
def test_notes_that_are_damaged_count_as_none(text: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "validations.json").write_text(text)
    assert Checkpoints(tmp_path, World(), 2).noted(1) is None


def test_a_checkpoint_of_another_format_is_refused_by_the_version_that_wrote_it(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    with pytest.raises(UserError, match=r"step-000001 was written by mser_dist 0\.1\.0, and this is .* another out="):
        Checkpoints(tmp_path, World(), 2).resume(Unread())
    assert folder.is_dir(), "nothing is lost"


class Unread:
    """An engine that nothing is loaded into."""

    def collect(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        raise AssertionError

    def restore(self, folder: Path, fork: bool = False) -> None:
        raise AssertionError


def test_publishing_a_step_again_replaces_it(tmp_path: Path) -> None:
    flip(save(tmp_path, 4) / PART)
    assert fault_in(save(tmp_path, 4)) is None


def test_at_least_one_is_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=0)
    save(tmp_path, 2, keep=0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize("name", ["", "step-000001", f"step-000001/{PART}"])
def test_what_others_may_write_to_is_refused(name: str, tmp_path: Path) -> None:
    """The folder of all checkpoints, that of a step, and a file in it."""
    save(tmp_path, 1)
    place = tmp_path / "checkpoints" / name
    mode = place.stat().st_mode & 0o777
    place.chmod(0o777)
    with pytest.raises(
        UserError, match=r"may be written to by everyone \(mode 0777\).*trust_checkpoints=true"
    ) as error:
        choose(tmp_path)
    assert str(place) in str(error.value)
    assert Checkpoints(tmp_path, World(), 2).choose(trust=True)
    place.chmod(mode)
    assert choose(tmp_path)
    if os.geteuid() == 0:
        os.chown(place, 12345, -1)
        with pytest.raises(UserError, match=f"{place} belongs to user 12345"):
            choose(tmp_path)


def test_what_is_damaged_is_never_kept_instead_of_what_is_whole(tmp_path: Path) -> None:
    older, newer = save(tmp_path, 2), save(tmp_path, 10)
    flip(newer / PART)
    checkpoints = Checkpoints(tmp_path, World(), keep=1)
    assert checkpoints.choose() == older
    save(tmp_path, 4)
    checkpoints._prune()
    assert [path.name for path in checkpoints.published()] == ["step-000004", "step-000010"]
    assert choose(tmp_path) == tmp_path / "checkpoints" / "step-000004"


def test_a_folder_with_something_else_in_it_is_not_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "global_step100").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds global_step100 and no checkpoint: move it away"):
        choose(tmp_path)


def test_what_rank_0_cannot_see_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that the nodes do not share."""
    monkeypatch.setattr(checkpoint, "_LATE", 0.1)
    staging = tmp_path / "step-000001.partial"
    staging.mkdir()
    with pytest.raises(OSError, match=r"rank-00001.safetensors is not to be seen by rank 0: out= must be"):
        publish(staging, {"rank-00001.safetensors": (3, "abc")}, {"step": 1}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001.partial"]


@pytest.mark.parametrize(("job", "start", "passes"), [("7", "1", True), ("7", "0", False), ("8", "1", False)])
def test_only_a_later_start_of_the_same_job_passes_a_lock_over(
    job: str, start: str, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of one start are two trainings in one folder."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    held = claimed(tmp_path, patience=0.0)
    with held:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", start)
        refused = nullcontext() if passes else pytest.raises(UserError, match="another process is training in")
        with refused, claimed(tmp_path, patience=0.0):
            pass


def test_a_folder_is_held_by_one_training(tmp_path: Path) -> None:
    held = claimed(tmp_path, patience=0.0)
    with held, pytest.raises(UserError, match="another process is training in"), claimed(tmp_path, patience=0.6):
        pass
    with claimed(tmp_path, patience=0.0):
        seen_by_all(tmp_path)


def test_a_fork_names_a_kept_step_the_best_or_the_newest(tmp_path: Path) -> None:
    run = tmp_path / "a@b"
    for step, ua in ((2, 0.5), (4, 0.9), (6, 0.9), (8, None)):
        save(run, step, ua=ua)
    (run / "checkpoints/step-000010.partial").mkdir()
    for name, step in (("@2", 2), ("@best", 6), ("", 8)):
        assert fork.find(f"{run}{name}").name == f"step-{step:06d}" and fork.run_of(f"{run}{name}") == run
    for name, says in (("@3", "kept no step 3: name one of 2, 4, 6, 8"), ("x@2", "there is no run folder")):
        with pytest.raises(UserError, match=says):
            fork.find(f"{run}{name}")
    flip(run / "checkpoints/step-000002" / PART)
    with pytest.raises(UserError, match=r"train.fork=.*@2: step-000002/.* differs from its seal"):
        fork.load_fork(f"{run}@2", Unread(), World())
    assert (run / "checkpoints/step-000010.partial").is_dir(), "the other run may be writing it"
