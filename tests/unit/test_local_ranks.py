import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mser_dist.jobs import local_ranks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_child_left: None) -> Callable[[str], None]:
    """Give every rank a first act: Python runs `sitecustomize` at start, then the rank goes on to its real command."""

    def acting(code: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(f"import os, sys, time\nrank = int(os.environ['RANK'])\n{code}\n")
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")

    return acting


def waited(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_ranks_know_each_other(ranks: Callable[[str], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"]
    ranks(f"open(r'{tmp_path}/env' + str(rank), 'w').write(' '.join(os.environ[name] for name in {names}))")
    assert local_ranks.local(3, ["config", "demo_eval", "batch=7"]) == 0
    found = [(tmp_path / f"env{rank}").read_text().split() for rank in range(3)]
    assert [values[:4] for values in found] == [[str(rank), str(rank), "3", "127.0.0.1"] for rank in range(3)]
    assert len({values[4] for values in found}) == 1 and int(found[0][4]) > 1023
    assert 3 * int(found[0][5]) <= max(3, len(os.sched_getaffinity(0)))
    out, err = capfd.readouterr()
    assert out.count("batch: 7\n") == 1, "only rank 0 writes to the terminal"
    assert not err


@pytest.mark.parametrize("behind", [0, 0.05, 0.1])
def test_the_same_mistake_on_every_rank_is_said_once(
    behind: float, ranks: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    ranks(f"if rank == 0: time.sleep({behind})")  # it is then unspoken, speaking or silent when rank 1 has failed
    assert local_ranks.local(2, ["config", "demo_eval", "btach=7"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("mser: error") and "did you mean batch?" in lines[0]


def test_the_first_failure_ends_the_others(
    ranks: Callable[[str], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Rank 1 goes on to its bad command at once; the others would first sleep for a minute.
    ranks(f"open(r'{tmp_path}/pid' + str(rank), 'w').write(str(os.getpid()))\nif rank != 1: time.sleep(60)")
    began = time.monotonic()
    assert local_ranks.local(3, ["config", "no_such_config"]) == 2
    assert time.monotonic() - began < 30
    error = capfd.readouterr().err
    assert error.startswith("mser: error (rank 1): no config file or preset 'no_such_config'")
    assert error.count("\n") == 1
    for rank in range(3):
        pid = tmp_path / f"pid{rank}"
        assert not pid.exists() or not psutil.pid_exists(int(pid.read_text()))


def test_a_crash_shows_its_traceback(ranks: Callable[[str], None], capfd: pytest.CaptureFixture[str]) -> None:
    ranks("if rank == 0: time.sleep(60)\nos.write(2, b'Traceback: all\\nof it\\nmser: error: x\\n')\nos._exit(7)")
    assert local_ranks.local(2, ["config"]) == 7
    assert capfd.readouterr().err == "Traceback: all\nof it\nmser: error: x\n"


def test_a_killed_rank_ends_as_shells_say(ranks: Callable[[str], None]) -> None:
    ranks("os.kill(os.getpid(), 9) if rank == 1 else time.sleep(60)")
    assert local_ranks.local(2, ["config"]) == 128 + signal.SIGKILL


def test_a_rank_that_ignores_term_is_killed(ranks: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_ranks, "_GRACE", 0.5)
    ranks("import signal\nsignal.signal(15, signal.SIG_IGN)\nif rank == 0: time.sleep(60)\ntime.sleep(0.5)")
    assert local_ranks.local(2, ["config", "no_such_config"]) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ending_the_launcher_ends_the_ranks(
    number: signal.Signals, ranks: Callable[[str], None], tmp_path: Path
) -> None:
    ranks(f"open(r'{tmp_path}/pid' + str(rank), 'w').write(str(os.getpid()))\ntime.sleep(60)")
    files = [tmp_path / f"pid{rank}" for rank in range(2)]
    # -S: the launcher itself runs no `sitecustomize`.
    code = "import sys; from mser_dist.jobs.local_ranks import local; sys.exit(local(2, ['config']))"
    launcher = subprocess.Popen([sys.executable, "-S", "-c", f"import sys; sys.path += {sys.path!r}; {code}"])
    try:
        assert waited(lambda: all(file.exists() and file.read_text() for file in files))
        launcher.send_signal(number)
        launcher.wait(20)
    finally:
        launcher.kill()
    pids = [int(file.read_text()) for file in files]
    assert waited(lambda: not any(psutil.pid_exists(pid) for pid in pids), 5)
    assert launcher.returncode != 0


def test_the_terminal_keeps_its_own_term_handler(no_child_left: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before = signal.getsignal(signal.SIGTERM)
    assert local_ranks.local(1, ["--version"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before
