import io
import os
import re
import resource
import shutil
import socket
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from mser_dist.errors import UserError
from mser_dist.jobs import doctor
from mser_dist.jobs import doctor_checks as checks
from mser_dist.jobs.doctor import Check, guarded
from mser_dist.ranks.distributed import free_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def no_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of the PATH, empty."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


# ---- the report ------------------------------------------------------------------------------------------------------


def test_a_report_that_cannot_be_written_is_said_before_the_checks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/x\.json cannot be written .*choose another place"):
        doctor.run(tmp_path, json=tmp_path / "nowhere" / "x.json")


@pytest.mark.parametrize(("encoding", "mark"), [("utf-8", "✗ disk"), ("ascii", "fail disk"), ("latin-1", "fail disk")])
def test_marks_need_a_terminal_that_shows_them(encoding: str, mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    doctor.show(Check("disk", "fail", "/läufe/ευρ", "make room"))
    terminal.seek(0)
    first, second = terminal.read().splitlines()
    assert first.startswith(mark) and second.strip() == "-> make room"


def test_a_crash_or_a_hang_of_a_check_is_its_line() -> None:
    def crash() -> checks.Finding:
        raise OSError(5, "Input/output error", "/mnt")

    crashed = guarded("disk", crash)
    assert (crashed.name, crashed.status) == ("disk", "fail") and "/mnt" in crashed.found and crashed.remedy
    release = threading.Event()
    hung = guarded("disk", lambda: ("ok", str(release.wait()), ""), patience=0.1)
    release.set()
    assert hung.status == "fail" and "no answer" in hung.found and hung.remedy


def test_no_password_is_shown() -> None:
    uri = "https://me:hun/ter2@host/x?password=hunter2&token=hunter2&y=1 mysql://me:hunter2@host"
    shown = guarded("mlflow", lambda: ("warn", f"{uri}\nsecond line", uri))
    assert "hunter2" not in shown.found + shown.remedy
    assert shown.found.endswith("host second line") and "y=1" in shown.found


# ---- this machine ----------------------------------------------------------------------------------------------------


def test_packages_below_their_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "madeup-1.0.dist-info"
    info.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))

    def needing(*needs: str) -> checks.Finding:
        text = "".join(f"Requires-Dist: {need}\n" for need in needs)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: madeup\nVersion: 1.0\n{text}")
        return checks.packages("madeup")

    assert needing("torch>=2", "not-there-at-all; extra == 'x'")[0] == "ok"
    status, found, remedy = needing("torch>=999", "not-there-at-all")
    assert status == "fail" and "torch 2" in found and ">=999" in found and "not-there-at-all is missing" in found
    assert "pip install" in remedy
    assert needing("torch>=999; extra == 'x'")[0] == "warn"
    assert checks.packages("never-installed")[0] == "warn"


def test_a_start_from_a_network_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "file_system", lambda path: "nfs4")
    status, found, remedy = checks.start_up("import json")
    assert status == "warn" and "slurm/containers" in remedy
    assert re.match(r"a rank imports \d+ modules from nfs4, in \d+\.\d s here and now: each of N ranks", found)
    status, found, remedy = checks.start_up("import not_there_at_all")
    assert status == "fail" and "not_there_at_all" in found and remedy


def test_offload_needs_a_compiler_and_ninja(no_commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))  # whatever is being compiled on this machine
    status, found, remedy = checks.deepspeed_ops()
    assert status == "warn" and "no compiler c++" in found and "no ninja" in found
    assert ("g++" in remedy and "ninja" in remedy) or "PATH=" in remedy


@pytest.mark.parametrize(("minutes", "status"), [(1, "warn"), (300, "fail")])
def test_a_lock_of_a_compilation_is_named(
    minutes: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - 60 * minutes,) * 2)
    found = checks.deepspeed_ops()
    assert found[0] == status and f"{minutes} min" in found[1] and f"rm {lock}" in found[2]
    lock.unlink()
    assert checks.deepspeed_ops()[0] == "ok"  # the compiler of the machine that runs the tests
    assert list(lock.parent.iterdir()) == []  # and nothing was compiled


def test_threads_and_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("99999", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", wrong)
        assert checks.cores()[0] == "warn", wrong
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        status, found, remedy = checks.cores()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert status == "warn" and "1024 open files" in found and "ulimit -n" in remedy


@pytest.mark.parametrize("variable", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_a_card_that_is_not_there(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "ib77")
    status, found, remedy = checks.network()
    assert status == "fail" and f"{variable}=ib77" in found and "unset" in remedy


def test_cards_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    for said in ("lo", "=lo", "l", "^docker"):  # NCCL takes prefixes, gloo does not
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", said)
        assert checks.network()[0] == "ok", said
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "l")
    assert checks.network()[0] == "fail"


def test_a_folder_for_runs(tmp_path: Path) -> None:
    status, found, _ = doctor.folder(tmp_path / "not" / "there" / "yet")
    assert status == "ok" and str(tmp_path) in found
    assert list(tmp_path.iterdir()) == []
    assert doctor.space(tmp_path / "new", 0, "less")[0] == "ok"
    assert doctor.space(tmp_path / "new", 2**40, "less")[::2] == ("warn", "less")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = [tmp_path / "file", Path("/proc/runs")]  # /proc takes no folder even from root
    if os.geteuid():
        (tmp_path / "read-only").mkdir(mode=0o500)
        places.append(tmp_path / "read-only")
    for place in places:
        status, found, remedy = doctor.folder(place)
        assert status == "fail" and "cannot be written" in found and "--out" in remedy, place


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_memory_is_no_place_for_runs() -> None:
    assert checks.file_system(Path("/dev/shm/x/y")) == "tmpfs"
    status, found, _ = doctor.folder(Path("/dev/shm"))
    assert status == "warn" and "tmpfs" in found


# ---- servers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what the check sets for MLflow's client."""
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "1")


def test_a_dead_mlflow_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking: None) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hunter2@127.0.0.1:{free_port()}")
    found = guarded("mlflow", lambda: checks.mlflow(tmp_path))
    assert found.status == "warn" and "Connection refused" in found.found and "log.jsonl" in found.remedy
    assert "hunter2" not in found.found


def test_a_mute_mlflow_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, never answers
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        status, found, _ = checks.mlflow(tmp_path)
    assert status == "warn" and "timed out" in found


def test_a_damaged_mlflow_file(tmp_path: Path) -> None:
    assert checks.mlflow(tmp_path) == ("ok", f"sqlite:///{tmp_path}/mlflow.db, made by the first run", "")
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    status, found, remedy = checks.mlflow(tmp_path)
    assert status == "fail" and "not a database" in found and "mlflow.db" in remedy


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "hub" / "models--a--b").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert checks.hub()[0] == "ok" and "1 models" in checks.hub()[1]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    status, found, remedy = checks.hub()
    assert status == "warn" and "Connection refused" in found and "HF_HUB_OFFLINE=1" in remedy
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert checks.hub()[0] == "ok"  # an error (501), but there is a way to it


# ---- SLURM -----------------------------------------------------------------------------------------------------------


def test_without_slurm(no_commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.slurm()[0] == "ok"  # a laptop
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # a container inside a job
    status, found, remedy = doctor.slurm()
    assert status == "warn" and "cannot requeue" in found and "munge" in remedy


def test_half_of_slurm(no_commands: Path) -> None:
    for name in ("sbatch", "srun", "scontrol"):
        (no_commands / name).write_text("#!/bin/sh\n")
        (no_commands / name).chmod(0o700)
    status, found, _ = doctor.slurm()
    assert status == "warn" and "no sacct" in found


@pytest.mark.skipif(not shutil.which("scontrol"), reason="no scontrol: apt-get install slurm-client")
def test_slurm_without_its_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ask", partial(doctor._ask, seconds=3))
    conf = tmp_path / "slurm.conf"
    conf.touch()
    monkeypatch.setenv("SLURM_CONF", str(conf))
    for check in (doctor.slurm, doctor.slurm_job, doctor.accounting):
        status, found, remedy = check()
        assert status == "warn" and "Unable to process configuration file" in found and remedy, check
    node = "NodeName=n1 NodeAddr=127.0.0.1\nPartitionName=p Nodes=n1\nAuthType=auth/none\n"
    conf.write_text(f"ClusterName=x\nSlurmctldHost=here(127.0.0.1)\nSlurmctldPort={free_port()}\n{node}")
    assert doctor.slurm()[0] == "warn" and "is DOWN" in doctor.slurm()[1]
    conf.unlink()  # SLURM's commands would wait a minute for it to come back
    status, found, _ = doctor.slurm()
    assert status == "warn" and "no answer from scontrol in 3 s" in found and str(conf) in found
