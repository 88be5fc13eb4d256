"""The GPU suite: `pytest -m gpu`, on 1 to 8 GPUs. What is checked is beside; `tools/gpu_check.py` runs the same."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.gpu import registry, runner


@cache
def machine() -> registry.Machine:
    """By a process that sees the GPUs, which are hidden from this one."""
    if not torch.version.cuda:
        return registry.Machine.of("cuda")
    code = "import json; from tests.gpu.registry import *; print(json.dumps(as_json(Machine.of('cuda'))))"
    done = subprocess.run([sys.executable, "-c", code], env=runner.environment("cuda"), capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return registry.Machine(**{**found, "capability": tuple(found["capability"])})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", registry.checks())
def test_on_gpus(name: str, shared: Path) -> None:
    row = runner.run(registry.checks()[name], machine(), shared)
    if row["status"] == "skipped":
        pytest.skip(row["line"])
    print(row["line"])
    assert row["status"] == "ok", row["line"]
