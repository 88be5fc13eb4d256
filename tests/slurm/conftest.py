"""A real SLURM for the tests of this folder, started once and only if a test wants it."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LAUNCHER_VARIABLES
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "local_slurm.sh"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes with two pretended GPUs each, partitions low and high, accounting.

    Skips, with the line that installs it, where SLURM is missing.
    """
    # Not pytest's own folder: the paths of sockets are short.
    folder = Path(tempfile.mkdtemp(prefix="mser-slurm-"))
    try:
        done = subprocess.run(
            [SCRIPT, "up", "--gpus", "2", "--dir", folder], capture_output=True, text=True, timeout=240
        )
        if "apt-get install" in done.stderr:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        mser = folder / "mser"  # one word, as the job scripts want it; this interpreter and checkout
        mser.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mser_dist "$@"\n')
        mser.chmod(0o755)
        env = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES and not k.startswith("SLURM_")}
        env |= {"SLURM_CONF": str(folder / "slurm.conf"), "MSER": str(mser), "MSER_HOME": str(ROOT)}
        # The check in front of a job is a start more of all imports: the tests that are about it ask for it.
        env |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "MSER_CHECK": "0"}
        env.pop("MLFLOW_TRACKING_URI", None)
        yield Cluster(folder, env)
    finally:
        subprocess.run([SCRIPT, "down", "--dir", folder], capture_output=True, timeout=120)
        shutil.rmtree(folder, ignore_errors=True)  # of a cluster that never was
