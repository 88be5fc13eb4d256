"""A translation by two processes that is killed, whole, in the middle of it: the same command goes on."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.tiny_runs import ROOT
from tests.unit.made_up_recordings import asked_for, config, run, same, write_set

pytestmark = pytest.mark.faults


def test_killed_and_gone_on_with_it_is_the_same(tmp_path: Path) -> None:
    recordings = write_set(tmp_path / "set", {f"a{i:03d}": "train" for i in range(128)})
    asked = config(tmp_path)
    run(recordings, tmp_path / "undisturbed", asked)
    (tmp_path / "log").unlink()
    words = [f"text.table={asked.text.table}", "speech.backend=command", f"speech.command={asked.speech.command}"]
    words += ["selection.whisper=null", "--to", "de,fr", "--workers", "2"]
    line = [sys.executable, "-m", "mser_dist", "translate", str(recordings), str(tmp_path / "out"), *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = subprocess.Popen(line, env=env, stderr=subprocess.DEVNULL)
    made = tmp_path / "out.made"
    until = time.monotonic() + 120
    while len(list(made.glob("*.tar"))) < 3 and command.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    children = psutil.Process(command.pid).children(recursive=True)
    command.kill()
    command.wait(30)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, "workers, and the programs that they have started, end with it"
    there = len(list(made.glob("*.tar")))
    assert 3 <= there < 8 and not (tmp_path / "out").exists()
    (tmp_path / "log").unlink()
    subprocess.run(line, env=env, check=True, stderr=subprocess.DEVNULL, timeout=120)
    assert len(asked_for(tmp_path)) == 2 * (128 - 16 * there), "what was whole is not made anew"
    assert same(tmp_path / "out", tmp_path / "undisturbed") and not made.exists()
