"""A rank 0 that stands still in a call which keeps Python's lock, while the store's own thread goes on answering."""

import ctypes
import os
import time
from pathlib import Path

import pytest
from torch.multiprocessing.spawn import ProcessExitedException

from mser_dist.ranks.distributed import World
from mser_dist.ranks.watchdog import LOST, Watchdog
from tests.distributed.spawn import run

pytestmark = pytest.mark.distributed


def stand_still(rank: int, said: str) -> None:
    os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), 2)
    with Watchdog(World(rank, 2), silence=3.0, stall=600.0).watch():
        time.sleep(2)
        if rank == 0:
            ctypes.PyDLL(None).sleep(40)
        time.sleep(40)


def test_the_others_notice_a_rank_0_that_stands_still(tmp_path: Path) -> None:
    said = tmp_path / "said"
    said.touch()
    with pytest.raises(ProcessExitedException) as ended:
        run(stand_still, 2, str(said))
    assert (ended.value.error_index, ended.value.exit_code) == (1, LOST)
    assert "rank 0 (127.0.0.1): no answer for 3 s" in said.read_text(encoding="utf-8")
