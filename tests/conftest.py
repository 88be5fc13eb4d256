"""For every test: no model hub, no launcher's variables, reproducible examples; SLURM tests only with SLURM."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

# A shell that starts the tests in the background has Ctrl-C ignored, and so would have every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Read by the Hugging Face libraries when they are imported: a test that would download something fails at once instead.
os.environ["HF_HUB_OFFLINE"] = "1"

# The tests compute on the CPU, as in CI; those of tests/gpu, in processes of their own, on the GPUs that are kept here.
os.environ.setdefault("MSER_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# As `make test` has it. Tests fork processes that have computed: of several threads of OpenMP they would wait for ever.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A test encodes what it needs itself, and leaves nothing in anybody's cache.
os.environ["MSER_FEATURES"] = tempfile.mkdtemp(prefix="mser-test-features-")
atexit.register(shutil.rmtree, os.environ["MSER_FEATURES"], ignore_errors=True)

# The same examples on every run and machine; no deadline, since the first example often pays for an import.
settings.register_profile("mser", derandomize=True, deadline=None)
settings.load_profile("mser")

SLURM_MISSING = "no sbatch: on Debian or Ubuntu `apt-get install slurm-wlm slurmdbd mariadb-server munge` brings SLURM"
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``slurm`` where there is no SLURM."""
    if shutil.which("sbatch"):
        return
    for item in items:
        if item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.skip(reason=SLURM_MISSING))


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic set of shards, made once. Copy it before changing it."""
    from mser_dist.synth.write import write_set
    from tests.tiny_runs import SMALL_SET

    folder = tmp_path_factory.mktemp("tiny") / "shards"
    write_set(folder, SMALL_SET)
    return folder


@pytest.fixture(scope="session")
def finished_stage1(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small set in ``shards`` and an undisturbed stage 1 in ``runs/whole``. Copy it before use.

    Six steps on two ranks, saved every two steps and validated every three; steps 2 and 3 are traced.
    """
    from tests.tiny_runs import TWO, mser, stage1

    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny_set, folder / "shards")
    traced = ["train.profile_steps=2-3", "engine.peak_tflops=0.001"]
    saved = ["train.save_every=2", "train.val_every=3", "train.keep=9"]
    mser(*stage1("runs/whole", *saved, *traced), *TWO, cwd=folder)
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables made, to be copied: that takes MLflow two seconds."""
    from tests.unit.mlflow_runs import start

    folder = tmp_path_factory.mktemp("mlflow")
    start(folder / "prepared").close("FINISHED")
    return folder / "mlflow.db"


@pytest.fixture
def no_child_left() -> Iterator[None]:
    """Fails where a process outlives the test that started it; what earlier tests left is not its own."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    for child in left:
        child.kill()
    assert not left


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder for each test: what lies in the checkout (runs/, data/) is neither read nor written."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(autouse=True)
def no_launcher_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide a surrounding torchrun or SLURM job, and the user's MLflow server, from the code under test."""
    for name in list(os.environ):
        # SLURM_CONF tells where the cluster is, not which rank this is: tests that call sbatch need it.
        if name in LAUNCHER_VARIABLES or (name.startswith("SLURM_") and name != "SLURM_CONF"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
