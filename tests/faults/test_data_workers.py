"""Data workers that are killed, stopped or left alone, in real processes."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from mser_dist.errors import UserError
from mser_dist.shards.shard_set import ShardSet
from mser_dist.stream import loader
from mser_dist.stream.examples import Examples
from mser_dist.stream.features import Features
from tests.unit.made_up_set import pcm
from tests.unit.test_loader import LABELS, run, write_folder

pytestmark = pytest.mark.faults

folder = write_folder


@pytest.fixture(autouse=True)
def _others() -> None:
    """Earlier tests may have left a helper of multiprocessing behind, which stays until the end of the process."""
    global _before
    _before = set(psutil.Process().children())


_before: set[psutil.Process] = set()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch looks for dead workers every 5 seconds of waiting: too seldom for a test."""
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


def children() -> list[psutil.Process]:
    """The living processes that this test has started."""
    found = [p for p in psutil.Process().children() if p not in _before]
    return [p for p in found if p.status() != psutil.STATUS_ZOMBIE]


@dataclass(frozen=True)
class Deadly(Features):
    """Kills the process that computes the features of a clip of this length, as a crash in native code would."""

    samples: int = 0

    def __call__(self, wave: np.ndarray) -> np.ndarray:
        if len(wave) == self.samples:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().__call__(wave)


def test_a_worker_that_dies_is_named_with_its_clip(folder: Path) -> None:
    clips = Examples(ShardSet.open(folder), LABELS, Deadly(samples=len(pcm(11))))
    with pytest.raises(UserError, match=r"sample k11: the worker that decoded it died \(signal SIGSEGV\)"):
        list(run(clips, 2))
    assert not children()


def test_within_the_budget_the_workers_start_again(folder: Path) -> None:
    shards = ShardSet.open(folder)
    plain = [step.batches[0]["index"] for step in run(Examples(shards, LABELS, Features()), 0, 4)]
    clips = Examples(shards, LABELS, Deadly(samples=len(pcm(11))), max_bad=1)
    bad = shards.keys.index("k11")
    found = [step.batches[0]["index"] for step in run(clips, 2, 4)]
    for was, now in zip(plain, found, strict=True):
        assert [a for a, b in zip(was, now, strict=True) if a != b] == [bad] * was.count(bad)
    assert not children()


def test_workers_do_nothing_on_signals_and_none_is_left(folder: Path) -> None:
    steps = run(Examples(ShardSet.open(folder), LABELS, Features()), 2, 30)
    first = next(steps)
    workers = children()
    assert len(workers) == 2
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        for worker in workers:
            worker.send_signal(number)
    assert len([first, *steps]) == 30
    psutil.wait_procs(workers, timeout=10)
    assert not children()
    abandoned = run(Examples(ShardSet.open(folder), LABELS, Features()), 2, 30)
    next(abandoned)
    workers = children()
    del abandoned
    psutil.wait_procs(workers, timeout=10)
    assert not children()


def test_a_signal_to_a_worker_that_has_just_been_forked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As when Ctrl-C reaches the whole group while workers start."""
    monkeypatch.setattr(loader, "_start", _start_late)
    stop = threading.Event()

    def send() -> None:
        while not stop.wait(0.02):
            for worker in children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.send_signal(signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        assert len(list(run(Examples(ShardSet.open(folder), LABELS, Features()), 2, 6))) == 6
    finally:
        stop.set()
        sender.join()
    assert "worker died" not in capfd.readouterr().err
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


_start = loader._start


def _start_late(parent: int, worker: int) -> None:
    time.sleep(0.3)
    _start(parent, worker)


def test_workers_die_with_their_parent(folder: Path) -> None:
    script = f"""
        import time
        from mser_dist.stream.features import Features
        from mser_dist.shards.shard_set import ShardSet
        from mser_dist.stream.examples import Examples
        from tests.unit.test_loader import LABELS, run
        steps = run(Examples(ShardSet.open({str(folder)!r}), LABELS, Features()), 2, 30)
        next(steps)
        print("ready", flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len([worker for worker in workers if worker.name() == "pt_data_worker"]) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    _gone, alive = psutil.wait_procs(workers, timeout=10)
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]


def test_a_worker_killed_from_outside_is_replaced(folder: Path) -> None:
    """With a clip in hand or none: as many steps come. Workers that die again and again end the run."""
    clips = Examples(ShardSet.open(folder), LABELS, Features(), max_bad=9)
    expected = [len(step.batches[0]["index"]) for step in run(clips, 0, 30)]
    steps = run(clips, 1, 30)
    found = []
    for number, step in enumerate(steps):
        found.append(len(step.batches[0]["index"]))
        if number in (3, 12):
            children()[0].kill()
    assert found == expected
    assert not children()
    deadly = run(clips, 1, 10_000)
    with pytest.raises(UserError, match=r"data workers died 4 times \(signal SIGKILL\)|worker that decoded it died"):
        for _ in deadly:
            for worker in children():
                worker.kill()


def test_leaving_does_not_wait_for_a_busy_worker(folder: Path) -> None:
    steps = run(Examples(ShardSet.open(folder), LABELS, Slow()), 1)
    began = time.monotonic()
    before = signal.signal(signal.SIGALRM, _leave)
    signal.alarm(1)  # to the process: one raised by a thread would not wake this one, which waits for the worker
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    signal.signal(signal.SIGALRM, before)
    del steps
    assert time.monotonic() - began < 4
    assert not children()


def _leave(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@dataclass(frozen=True)
class Slow(Features):
    def __call__(self, wave: np.ndarray) -> np.ndarray:
        time.sleep(60)
        return super().__call__(wave)
