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


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables made, to be copied: that takes MLflow two seconds."""
    from tests.unit.mlflow_runs import start

    folder = tmp_path_factory.mktemp("mlflow")
    start(folder / "prepared").close("FINISHED")
    return folder / "mlflow.db"
