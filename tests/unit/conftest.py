"""What several unit tests start from."""

import gc
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.made_up_set import write_set


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set, which nobody changes."""
    return write_set(tmp_path_factory.mktemp("finished") / "set")


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "set"))


@pytest.fixture
def runs(prepared: Path, tmp_path: Path) -> Path:
    """A folder for runs, with an MLflow database in it."""
    shutil.copy(prepared, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted ({mounted.stderr.strip()}): run as root")
    yield folder
    gc.collect()  # a store that an error's traceback refers to has files open
    subprocess.run(["umount", folder], check=True)
