"""A disk that fills up while two ranks save: a clear end, and the last whole checkpoint is untouched."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mser_dist.state.seal import read_seal, seal_fault
from tests.tiny_runs import mser, stage1

pytestmark = [pytest.mark.distributed, pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.fixture
def work(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(tiny_set, folder / "shards")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(tmp_path)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted ({mounted.stderr.strip()}): run as root")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.drill("disk-full")
def test_a_full_disk_ends_the_job_and_keeps_the_last_checkpoint(work: Path, small_disk: Path) -> None:
    words = ["train.steps=12", "train.save_every=2", "train.keep=50", "data.val_split=null", "tracking.enabled=false"]
    run = small_disk / "run"
    error = mser(*stage1(str(run), *words), "--nproc", "2", cwd=work, code=2)
    assert "cannot write the checkpoint" in error and "free space" in error and "Traceback" not in error, error
    found = sorted((run / "checkpoints").iterdir())
    assert found and all(not path.name.endswith(".partial") for path in found), "nothing half-written is left"
    assert all(seal_fault(path, read_seal(path)[0]) is None for path in found)
    assert not (run / "export").exists() and not (run / "summary.json").exists()
