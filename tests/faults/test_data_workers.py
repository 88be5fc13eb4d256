"""Data workers that are killed, stopped or left alone, in real processes."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from mser_dist.errors import UserError
from mser_dist.shards.shard_set import ShardSet
from mser_dist.stream.examples import Examples
from mser_dist.stream.features import Features
from mser_dist.stream.steps import Step
from mser_dist.stream.workers import DeadWorkerError, _settle, answers_ahead
from tests.unit.made_up_set import pcm
from tests.unit.test_loader import LABELS, damage, run, write_folder

pytestmark = pytest.mark.faults

folder = write_folder


def children() -> list[psutil.Process]:
    """The living data workers of this process."""
    return data_workers(psutil.Process())


def data_workers(of: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in of.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            # One that is not named yet is called as this process is, and has its command line.
            if child.status() != psutil.STATUS_ZOMBIE and child.cmdline() == of.cmdline():
                found.append(child)
    return found


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


def test_workers_do_nothing_on_signals_and_none_is_left(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    steps = run(Examples(ShardSet.open(folder), LABELS, Features()), 2, 30)
    first = next(steps)
    workers = children()
    assert len(workers) == 2
    assert handlers == {number: signal.getsignal(number) for number in signal.valid_signals()}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        for worker in workers:
            worker.send_signal(number)
    assert len([first, *steps]) == 30
    assert "worker died" not in capfd.readouterr().err
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
    monkeypatch.setattr("mser_dist.stream.workers._settle", _settle_late)
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


def _settle_late(*args: Any) -> None:
    time.sleep(0.3)
    _settle(*args)


SCRIPT = """
    import atexit, time
    from mser_dist.stream.features import Features
    from mser_dist.shards.shard_set import ShardSet
    from mser_dist.stream.examples import Examples
    from mser_dist.stream.workers import answers_ahead
    from tests.unit.test_loader import LABELS, run
    atexit.register(print, "ends", flush=True)
    steps = run(Examples(ShardSet.open({folder!r}), LABELS, Features()), 2, 30)
    others = run(Examples(ShardSet.open({folder!r}), LABELS, Features()), 1, 30)  # as when validation begins
    busy = answers_ahead([lambda request: time.sleep(600 * request)], range(9), 2)
    next(steps), next(others), next(busy)
    print("ready", flush=True)
"""


@contextlib.contextmanager
def program(folder: Path, then: str) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A program with three streams, and its workers, when all of these run."""
    script = textwrap.dedent(SCRIPT.format(folder=str(folder))) + then
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        found = psutil.Process(process.pid).children(recursive=True)
        assert [worker.name() for worker in found] == ["mser_worker"] * 4
        yield process, found
    _gone, alive = psutil.wait_procs(found, timeout=10)
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]


def test_workers_die_with_their_parent(folder: Path) -> None:
    with program(folder, "time.sleep(60)") as (process, _):
        process.kill()


@pytest.mark.parametrize("then", ["input(); raise KeyError('a bug')", "input()", "input(); sys.exit(3)"])
def test_a_program_that_ends_in_the_middle_of_a_stream_waits_for_nobody(folder: Path, then: str) -> None:
    """Its generators are still there then: nobody has closed them."""
    with program(folder, f"import sys; {then}") as (process, _):
        out, err = process.communicate("\n", timeout=60)
        assert out == "ends\n", "what is to be done at the end is done once, and by no worker"
        assert process.returncode == ("KeyError" in then) + 3 * ("exit" in then)
        assert ("KeyError: 'a bug'" in err) == ("KeyError" in then)
        assert "Exception ignored" not in err


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


def test_a_worker_may_be_killed_at_any_moment() -> None:
    """While it computes, packs, sends or waits: what came before is right, and the rest is a dead worker, at once."""
    draw = random.Random(0)
    dead = 0
    for trial in range(25):
        stream = answers_ahead([_large, _large], range(1000), 2)
        assert next(stream)[0] == 0
        victim = draw.choice(children())
        timer = threading.Timer(draw.uniform(0, 0.02), victim.kill)
        timer.start()
        began = time.monotonic()
        try:
            for number, answer in enumerate(stream, 1):
                assert answer.shape == (100_000,) and (answer == number).all(), trial
        except DeadWorkerError as death:
            dead += 1
            assert str(death) == "signal SIGKILL"
        timer.join()
        assert time.monotonic() - began < 20
        assert not children()
    assert dead > 15


def _large(request: int) -> np.ndarray:
    return np.full(100_000, request)


def test_a_full_dev_shm_is_none_of_their_business(folder: Path) -> None:
    """In a container it has 64 MB, of which NCCL needs some."""
    script = f"""
        from pathlib import Path
        import torch
        from mser_dist.shards.shard_set import ShardSet
        from mser_dist.stream.examples import Examples
        from mser_dist.stream.features import Features
        from mser_dist.stream.workers import answers_ahead
        from tests.unit.test_loader import LABELS, run
        try:
            Path("/dev/shm/full").write_bytes(bytes(1_000_000))
        except OSError:
            pass
        assert len(list(run(Examples(ShardSet.open({str(folder)!r}), LABELS, Features()), 2, 6))) == 6
        assert sum(answer.sum() for answer in answers_ahead([torch.ones] * 2, [200_000] * 9, 2)) == 1_800_000
    """
    own = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64k none /dev/shm || exit 77; exec "$@"', "-"]
    command = [*own, sys.executable, "-c", textwrap.dedent(script)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs unshare (util-linux)")
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip(f"a small /dev/shm cannot be mounted ({done.stderr.strip()}): run as root")
    assert done.returncode == 0, done.stderr


def test_two_streams_at_once(folder: Path) -> None:
    """A validation in the middle of a training: its workers are started and killed beside the others."""
    clips = Examples(ShardSet.open(folder), LABELS, Features())
    expected = [step.batches for step in run(clips, 0, 6)]
    steps = run(clips, 2, 6)
    found = [next(steps).batches]
    assert [step.batches for step in run(clips, 2, 6)] == expected
    assert len(children()) == 2
    found += [step.batches for step in steps]
    assert found == expected
    assert not children()


def test_a_stream_in_another_thread(folder: Path) -> None:
    found: list[Step] = []
    clips = Examples(ShardSet.open(folder), LABELS, Features())
    thread = threading.Thread(target=lambda: found.extend(run(clips, 2, 6)))
    thread.start()
    thread.join()
    assert len(found) == 6
    assert not children()


def test_a_worker_killed_when_idle_is_not_put_down_to_a_clip_it_has_done_with(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = ShardSet.open(folder)
    plain = [step.batches[0]["index"] for step in run(Examples(shards, LABELS, Features()), 0, 9)]
    damage(folder, shards.keys[plain[5][-1]])  # the last thing that it does before it waits
    found = []
    for number, step in enumerate(run(Examples(shards, LABELS, Features(), max_bad=1), 1, 9)):
        found.append(len(step.batches[0]["index"]))
        if number == 3:
            time.sleep(0.5)  # steps 4 and 5 lie ready
            children()[0].kill()
    assert found == [6] * 9
    assert capsys.readouterr().err.count("a data worker died (signal SIGKILL); another takes its place") == 1


def test_leaving_does_not_wait_for_a_busy_worker(folder: Path) -> None:
    steps = run(Examples(ShardSet.open(folder), LABELS, Slow()), 1)
    before = signal.signal(signal.SIGALRM, _leave)
    signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)  # a signal: what a thread raises would not wake one that waits
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    began = time.monotonic()
    signal.signal(signal.SIGALRM, before)
    del steps
    assert time.monotonic() - began < 10
    assert not children()


def _leave(number: int, frame: object) -> None:
    if children():
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise KeyboardInterrupt


@dataclass(frozen=True)
class Slow(Features):
    def __call__(self, wave: np.ndarray) -> np.ndarray:
        time.sleep(60)
        return super().__call__(wave)
