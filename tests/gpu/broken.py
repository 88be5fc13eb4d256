"""Checks that crash, hang, are killed, or find that they cannot run: for the test of what runs them."""

import os
import signal
import time
from pathlib import Path

from mser_dist.ranks import distributed
from tests.gpu.registry import Check, Outcome, Result


def crashes(device: str, folder: Path) -> Result:
    raise ValueError("what broke\nis said")


def hangs(device: str, folder: Path) -> Result:
    (folder / "child").write_text(str(os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "600")), encoding="utf-8")
    time.sleep(600)
    return {}


def dies(device: str, folder: Path) -> Result:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def cannot(device: str, folder: Path) -> Result:
    return {"skipped": "there is no such thing"}


def works(device: str, folder: Path) -> Result:
    return {"rank": distributed.discover().rank, "device": device}


def judge(results: list[Result]) -> Outcome:
    return Outcome([one["rank"] for one in results] == [0, 1], len(results), "both were there")


CHECKS = [
    Check("crashes", "", crashes, judge, cpu=True, alone=True),
    Check("hangs", "", hangs, judge, cpu=True, alone=True, seconds=15),
    Check("dies", "", dies, judge, cpu=True, alone=True),
    Check("cannot", "", cannot, judge, cpu=True, alone=True),
    Check("works", "", works, judge, cpu=True),
]
