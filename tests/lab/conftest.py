"""The server that `tools/mlflow_server.sh` starts, with PostgreSQL behind it: the tests of tracking, sweeps and resumed
runs once more, against it, and its pages in a real browser.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.browser import Browser, program

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "mlflow_server.sh"


@pytest.fixture(scope="session")
def server() -> Iterator[tuple[str, Path]]:
    """Its address and its folder. Skips, with the line that installs it, where PostgreSQL is missing."""
    folder = Path(tempfile.mkdtemp(prefix="mser-mlflow-"))  # not pytest's own: the paths of sockets are short
    port = str(_free_port())
    env = os.environ | {"PYTHON": sys.executable}
    try:
        words = [str(SCRIPT), "up", "--dir", str(folder), "--port", port]
        done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=env)
        if "apt-get install" in done.stderr or "pip install" in done.stderr:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        yield done.stdout.strip().rpartition("=")[2], folder
    finally:
        subprocess.run([SCRIPT, "down", "--dir", folder], capture_output=True, timeout=120, env=env)
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    from mser_dist.ranks.distributed import free_port

    return int(free_port())


@pytest.fixture
def uri(server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the tests' runs are tracked."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server[0])
    return server[0]


@pytest.fixture
def runs(uri: str, server: tuple[str, Path], tmp_path: Path) -> Path:
    """A folder for runs, with the server's files where a sqlite store would have them."""
    assert uri
    (tmp_path / "mlartifacts").symlink_to(server[1] / "artifacts")
    return tmp_path


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Skips where there is no Chromium."""
    if program() is None:
        pytest.skip("no Chromium: on Debian `apt-get install chromium` brings it")
    opened = Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()
