"""What several unit tests start from."""

import shutil
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
