"""What one process decides between two steps; that several agree is in tests/faults."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mser_dist.ranks.boundary import Boundary, time_to_save
from mser_dist.ranks.distributed import World
from mser_dist.ranks.preempt import Flag, listen
from mser_dist.state.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]


def boundary(tmp_path: Path, ends: float | None = None, rank: int = 0, save_minutes: float = 0.0) -> Boundary:
    return Boundary(Flag(), Checkpoints(tmp_path, World(rank, 2), keep=1), save_minutes, ends, is_main=rank == 0)


def test_nothing_happens_until_something_does(tmp_path: Path) -> None:
    quiet = boundary(tmp_path, ends=time.monotonic() + 3600, save_minutes=60.0)
    quiet.poll()
    assert quiet.stop is None and not quiet.save_due
    quiet.flag.number = 12
    quiet.poll()
    assert quiet.stop == "SIGUSR2"


def test_minutes_count_from_the_last_save_and_on_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    main, other = (boundary(tmp_path, rank=rank, save_minutes=1.0) for rank in (0, 1))
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    for one, due in ((main, True), (other, False)):
        one.poll()
        assert one.save_due is due
    main.saved()
    main.poll()
    assert not main.save_due


def test_it_stops_while_there_is_time_to_save(tmp_path: Path) -> None:
    for left, stops in ((time_to_save(0) + 5, False), (time_to_save(0) - 5, True)):
        short = boundary(tmp_path, ends=time.monotonic() + left)
        short.poll()
        assert (short.stop is not None) is stops
    slow = boundary(tmp_path, ends=time.monotonic() + 100)
    slow.saves.seconds = 70.0
    slow.poll()
    assert slow.stop == "the job's time is almost over"


@pytest.mark.parametrize("written", [True, False])
def test_a_save_under_way_has_to_end_before_the_last_one(
    written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints, "written", property(lambda self: written))
    one = boundary(tmp_path, ends=time.monotonic() + time_to_save(40) + 20)
    one.saves.seconds = 40.0
    one.poll()
    assert (one.stop is None) is written


def test_a_block_that_listens_within_another_shares_its_flag() -> None:
    with listen() as outer:
        with listen() as inner:
            assert inner is outer
        outer.up(15, None)
    assert outer.number == 15


def test_a_signal_is_heard_when_nobody_reads_what_is_said_any_more() -> None:
    """Ctrl-C ends `mser train 2>&1 | tee log` as a whole: the other end of the pipe is gone first."""
    code = (
        "import os, signal, sys\n"
        "from mser_dist.ranks.preempt import listen\n"
        "reader, writer = os.pipe()\n"
        "os.close(reader); os.dup2(writer, 1); os.dup2(writer, 2)\n"
        "with listen() as flag:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('on the way to the save', flush=True); print('and', file=sys.stderr, flush=True)\n"
        "    os._exit(flag.number)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}).returncode == signal.SIGINT
