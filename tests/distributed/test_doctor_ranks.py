"""The doctor's real processes: an all-reduce between two, ranks that die, hang or see another disk."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mser_dist.jobs import doctor
from mser_dist.jobs.doctor import Check
from mser_dist.ranks.distributed import free_port

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
# What rank 1 does as soon as it is in the process group: SIGNAL is a name of one.
ONCE_JOINED = """
import os, signal, sys, threading, time
from pathlib import Path
def watch():
    while not getattr(sys.modules.get("torch.distributed"), "is_initialized", bool)():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGNAL)
signal.signal(signal.SIGUSR1, lambda *_: (Path("asleep").touch(), time.sleep(1000)))
if os.environ.get("RANK") == "1":
    threading.Thread(target=watch, daemon=True).start()
"""


@pytest.fixture
def at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Give every new Python process a first act, as `sitecustomize`."""

    def act(code: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")

    return act


def test_this_machine(tmp_path: Path, no_child_left: None) -> None:
    out, report = tmp_path / "runs", tmp_path / "report.json"
    call = f"run(Path({str(out)!r}), json=Path({str(report)!r}))"
    code = f"from mser_dist.jobs.doctor import run; raise SystemExit({call})"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "HF_TOKEN": "hf_very_secret"}
    ended = subprocess.run(
        [sys.executable, "-c", f"from pathlib import Path; {code}"], env=env, capture_output=True, text=True
    )
    found = json.loads(report.read_text())
    lines = {check["name"]: Check(**check) for check in found["checks"]}
    failed = [check for check in lines.values() if check.status == "fail"]
    assert (ended.returncode, found["ok"]) == ((1, False) if failed else (0, True)), ended.stderr
    expected = "packages gpu attention audio cores memory network hub /dev/shm TMPDIR disk out mlflow slurm all-reduce"
    assert lines.keys() >= {*expected.split(), "deepspeed ops", "start up"}
    for check in lines.values():
        assert (check.remedy == "") == (check.status == "ok"), check
        assert {"ok": "✓", "warn": "!", "fail": "✗"}[check.status] + f" {check.name}" in ended.stdout
    # What this project's tests need to run at all.
    for name in ("packages", "attention", "audio", "out", "mlflow", "all-reduce"):
        assert lines[name].status == "ok", lines[name]
    assert re.search(r"imports [2-6],\d{3} modules from", lines["start up"].found)
    assert "2 ranks" in lines["all-reduce"].found and "MB/s" in lines["all-reduce"].found
    assert "hf_very_secret" not in ended.stdout + report.read_text()
    assert "HF_TOKEN is set" in lines["hub"].found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]  # nothing else was left, not even `out`


@pytest.mark.parametrize("first", ["if os.environ.get('RANK') == '1': os.kill(os.getpid(), 9)", ONCE_JOINED])
def test_a_rank_that_dies(first: str, at_start: Callable[[str], None], no_child_left: None) -> None:
    at_start("import os\n" + first.replace("SIGNAL", "SIGKILL"))
    status, found, remedy = doctor.two_processes()
    assert status == "fail" and "rank 1" in found and "SIGKILL" in found and remedy


def test_a_rank_that_hangs(at_start: Callable[[str], None], no_child_left: None) -> None:
    at_start("import os, time\nif os.environ.get('RANK') == '1': time.sleep(1000)")
    status, found, _ = doctor.two_processes(limit=3)
    assert status == "fail" and "not done after 3 s" in found


def test_a_rank_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, no_child_left: None) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib77")
    status, found, remedy = doctor.two_processes()
    assert status == "fail" and "could not join" in found and "ib77" in found and "GLOO_SOCKET_IFNAME" in remedy


def test_ranks_do_not_outlive_a_killed_doctor(at_start: Callable[[str], None], tmp_path: Path) -> None:
    at_start(ONCE_JOINED.replace("SIGNAL", "SIGUSR1"))  # rank 1 sleeps in mid-exchange, rank 0 waits for it
    code = "from mser_dist.jobs.doctor import two_processes; two_processes()"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "asleep").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ranks = psutil.Process(parent.pid).children()
        assert len(ranks) == 2
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    for rank in alive:
        rank.kill()
    assert not alive


@pytest.mark.parametrize("blind", [False, True])
def test_two_nodes(blind: bool, tmp_path: Path) -> None:
    """Two "nodes" on this machine; the blind one has a file system of its own where the other writes."""
    hide = ["unshare", "--mount", "--map-root-user"] if os.geteuid() else ["unshare", "--mount"]
    hide += ["sh", "-c", f'mount -t tmpfs none {tmp_path} && exec "$@"', "sh"]
    if blind and (not shutil.which("unshare") or subprocess.run([*hide, "true"], capture_output=True).returncode):
        pytest.skip("no right to mount a file system of one's own")
    code = (
        "import sys; from pathlib import Path; from mser_dist.ranks.distributed import discover\n"
        "from mser_dist.jobs import doctor_checks; from mser_dist.jobs.doctor import guarded, job_ranks, show\n"
        "world, here = discover(), [guarded('cores', doctor_checks.cores)]\n"
        f"found = [*job_ranks(world, Path({str(tmp_path)!r}), here)]\n"
        "if world.is_main: [show(check) for check in found]\n"
    )
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank, threads in enumerate(("1", "99999")):
        env = os.environ | place | {"RANK": str(rank), "SLURMD_NODENAME": f"node{rank}", "OMP_NUM_THREADS": threads}
        env |= {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
        command = [*(hide if blind and rank else []), sys.executable, "-c", code]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert said[1] == ""
    assert "✓ all-reduce     gloo, 2 ranks" in said[0]
    assert "! node1: cores" in said[0] and "node0" not in said[0].replace("on node0, node1", "")
    if blind:
        assert f"✗ shared         {tmp_path} is not one folder on node0, node1" in said[0]
    else:
        assert f"✓ shared         {tmp_path} is one folder on all nodes (2)" in said[0]
    assert list(tmp_path.iterdir()) == []
