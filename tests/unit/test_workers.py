"""Processes that work ahead: order, what a message carries, whose memory it is, errors."""

import contextlib
import gc
import mmap
import os
import random
import resource
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from mser_dist.errors import UserError
from mser_dist.stream.workers import _message, _receive, _send, _Worker, answers_ahead


def echo(request: Any) -> Any:
    return request


def ahead(job: Callable[[Any], Any], requests: Any, count: int = 1, under_way: int = 2) -> Iterator[Any]:
    return answers_ahead([job] * count, requests, under_way)


def through(value: Any) -> Any:
    """A value as it comes back from a worker, to which it went as a request."""
    [found] = ahead(echo, [value])
    return found


# ---- order


def test_answers_come_in_the_order_of_the_requests_from_each_process_in_turn() -> None:
    def slow(request: int) -> tuple[int, int]:
        time.sleep(0.03)
        return request, os.getpid()

    def fast(request: int) -> tuple[int, int]:
        return request, os.getpid()

    for count in (0, 1, 2, 5, 11):
        found = list(answers_ahead([slow, fast, fast], range(count), 2))
        assert [request for request, _ in found] == list(range(count))
        processes = [process for _, process in found]
        assert len(set(processes)) == min(count, 3) and os.getpid() not in processes
        assert processes == (processes[:3] * 4)[:count]


def test_a_bounded_number_of_requests_is_under_way_and_no_size_of_them_waits_for_a_busy_worker() -> None:
    drawn: list[float] = []

    def requests() -> Iterator[bytes]:
        for _ in range(20):
            drawn.append(time.monotonic())
            yield bytes(1_000_000)  # more than a socket takes

    def job(request: bytes) -> int:
        if not done:
            time.sleep(1)
        done.append(1)
        return len(request)

    done: list[int] = []  # of each process

    for answered, answer in enumerate(ahead(job, requests(), 2, 3)):
        assert answer == 1_000_000
        if not answered:
            assert drawn[5] - drawn[0] < 0.5, "the sixth request waited for the first answer"
        assert len(drawn) == min(20, 7 + answered)  # those under way, this one, and the one sent before it is used
        if answered == 8:
            break


def test_a_worker_goes_on_while_its_answer_is_used() -> None:
    stream = ahead(lambda _: time.monotonic(), range(3), under_way=1)
    next(stream)
    received = time.monotonic()
    time.sleep(1)
    assert next(stream) < received + 0.5


# ---- what a message carries

LARGE = torch.arange(30_000)
VALUES: dict[str, Any] = {
    "float32": torch.linspace(0, 1, 20_000).reshape(2, 5, 2000),
    "bfloat16": torch.linspace(0, 1, 20_000, dtype=torch.bfloat16).reshape(2, 10_000),
    "small bfloat16": torch.linspace(0, 1, 7, dtype=torch.bfloat16),
    "float16": LARGE.half(),
    "float8": torch.linspace(0, 1, 9000).to(torch.float8_e4m3fn),
    "complex": torch.complex(LARGE.double(), -LARGE.double()),
    "bool": LARGE % 3 == 0,
    "empty": torch.zeros(3, 0, 5),
    "empty bfloat16": torch.zeros(0, dtype=torch.bfloat16),
    "no dimension": torch.tensor(7),
    "no dimension bfloat16": torch.tensor(0.5, dtype=torch.bfloat16),
    "transposed": LARGE.reshape(100, 300).T,
    "every other": LARGE[::2],
    "expanded": torch.tensor([1.0]).expand(50_000),
    "numpy": np.arange(9000.0).reshape(3, -1),
    "numpy, Fortran's order": np.asfortranarray(np.arange(9000.0).reshape(3, -1)),
    "numpy, empty": np.zeros((2, 0), np.float32),
    "numpy, text": np.array(["größer", "a"] * 2000),
    "numpy, objects": np.array([1, "two", None], dtype=object),
    "nested": {"a": [LARGE, {"b": (torch.tensor(1), None, "größer")}], "c": [], "d": {}, "e": [3, 1.5, True]},
}


def assert_same(found: Any, value: Any) -> None:
    assert type(found) is type(value)
    if isinstance(value, torch.Tensor):
        assert found.dtype == value.dtype and found.shape == value.shape
        assert torch.equal(found, value)
    elif isinstance(value, np.ndarray):
        np.testing.assert_array_equal(found, value, strict=True)
    elif isinstance(value, dict):
        assert list(found) == list(value)
        for key in value:
            assert_same(found[key], value[key])
    elif isinstance(value, (list, tuple)):
        assert len(found) == len(value)
        for a, b in zip(found, value, strict=True):
            assert_same(a, b)
    else:
        assert found == value


@pytest.mark.parametrize("name", VALUES)
def test_it_arrives_as_it_was_sent(name: str) -> None:
    assert_same(through(VALUES[name]), VALUES[name])


@pytest.mark.filterwarnings("error")
def test_tensors_can_be_written_to_and_one_that_comes_twice_is_one() -> None:
    for size in (10, 100_000):
        weight = torch.nn.Parameter(torch.zeros(size))
        first, second = through([weight, weight])
        assert first is second
        first += 1
        assert first.sum() == size and weight.sum() == 0


# ---- memory


def mapped() -> list[range]:
    """Where the messages lie that this process has mapped."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    found = [line.split(maxsplit=1)[0].split("-") for line in lines if "memfd:mser_message" in line]
    return [range(int(start, 16), int(end, 16)) for start, end in found]


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_large_tensors_are_not_copied_and_their_memory_goes_with_the_last_of_them() -> None:
    opened = descriptors()
    assert not mapped()
    batch = through({"speech": torch.ones(100_000), "more": torch.ones(50_000), "labels": torch.ones(8)})
    [place] = mapped()
    assert batch["speech"].data_ptr() in place and batch["more"].data_ptr() in place
    assert batch["speech"].data_ptr() % 64 == 0
    part = batch.pop("more")[10:20]
    del batch["speech"]
    assert mapped() and part.sum() == 10
    del part
    assert not mapped(), "labels keep the memory of all that came with them"
    assert descriptors() == opened
    assert batch["labels"].sum() == 8


def test_a_long_stream_keeps_a_few_answers_in_memory_and_leaves_no_open_file() -> None:
    opened = descriptors()
    for answer in ahead(torch.ones, [50_000] * 50, 2):
        assert answer.sum() == 50_000
        assert len(mapped()) <= 2
    del answer
    assert not mapped()
    assert descriptors() == opened


# ---- errors


def test_a_users_mistake_arrives_as_itself_at_its_turn_and_the_rest_with_its_traceback() -> None:
    class MistakeError(UserError):
        pass

    def job(request: int) -> int:
        if request == 3:
            raise MistakeError("a.tar: it is not there")
        return 10 // (5 - request)

    globals()["MistakeError"] = MistakeError  # where pickle looks for it
    MistakeError.__qualname__ = "MistakeError"
    stream = ahead(job, range(9), 2)
    assert [next(stream) for _ in range(3)] == [2, 2, 3]
    with pytest.raises(MistakeError, match=r"^a\.tar: it is not there$"):
        next(stream)
    with pytest.raises(RuntimeError, match=r"(?s)in job\n.*ZeroDivisionError"):
        list(ahead(job, [5]))


def test_what_cannot_be_sent_is_an_error_and_no_dead_worker() -> None:
    with pytest.raises(RuntimeError, match="pickle"):
        list(ahead(lambda request: lambda: request, [1]))
    with pytest.raises(RuntimeError, match="a worker process failed"):
        list(ahead(lambda request: torch.eye(3).to_sparse(), [1]))


def test_an_error_of_the_requests_is_no_dead_worker() -> None:
    def requests() -> Iterator[int]:
        yield 1
        raise ConnectionResetError("the store")

    with pytest.raises(ConnectionResetError, match="the store"):
        list(ahead(echo, requests()))


def test_too_many_open_files_are_named() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        _send(theirs, _message(1))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                _receive(ours)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# ---- what a process shares with the one that started it


def test_no_random_generator_of_this_process_moves() -> None:
    """A resumed training starts new workers, and must draw the dropout of one that went on."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert len(list(ahead(torch.ones, range(6), 2))) == 6
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]


def sockets(_: Any = None) -> set[str]:
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            found.add(str(link.readlink()))
    return {name for name in found if name.startswith("socket:")}


def test_a_worker_has_no_end_of_a_socket_but_its_own() -> None:
    before = sockets()
    found = [answer - before for answer in ahead(sockets, range(3), 3)]
    assert [len(own) for own in found] == [1, 1, 1]
    assert len(set.union(*found)) == 3


def test_a_worker_that_nobody_can_ask_any_more_ends() -> None:
    first = _Worker(echo, [])
    second = _Worker(echo, [first])
    first.channel.close()
    first.process.join(10)
    assert first.process.exitcode == 0
    second.ask(1)
    assert second.answer() == 1
    second.channel.close()
    second.process.join(10)
    assert second.process.exitcode == 0


def test_a_worker_has_one_thread_for_torch() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert list(ahead(lambda _: torch.get_num_threads(), [1])) == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_worker_does_not_tidy_up_what_is_rubbish_in_this_process() -> None:
    """An abandoned stream, say: tidied up, it kills its own workers."""
    gc.disable()
    try:
        stream = ahead(lambda _: os.getpid(), range(9))
        [process] = {next(stream)}
        cycle: list[Any] = [stream]
        cycle.append(cycle)
        del stream, cycle
        assert list(ahead(lambda _: gc.collect(), range(2))) == [0, 0]
        assert psutil.Process(process).status() == psutil.STATUS_SLEEPING
    finally:
        gc.enable()
        gc.collect()
    assert not psutil.pid_exists(process)


# ---- a fork that stands still


def stands_still(times: int) -> Any:
    """The next `times` forked processes hang within `fork` itself, as with a lock that another thread held."""
    left = np.frombuffer(mmap.mmap(-1, 8), dtype=np.int64)  # shared with the forked ones
    left[0] = times

    def after_fork() -> None:
        if left[0] > 0:
            left[0] -= 1
            time.sleep(1000)

    os.register_at_fork(after_in_child=after_fork)  # for good: it does nothing any more when `times` are over
    return left


def test_a_worker_that_stands_still_in_its_fork_is_forked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mser_dist.stream.workers._PATIENCE", (0.1, 0.1, 30.0))
    left = stands_still(2)
    before = psutil.Process().children()
    assert list(ahead(echo, range(5), count=2)) == list(range(5))
    assert left[0] == 0 and psutil.Process().children() == before, "and what stood still is gone"


def test_workers_that_never_start_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mser_dist.stream.workers._PATIENCE", (0.1, 0.1))
    left = stands_still(2)
    before = psutil.Process().children()
    with pytest.raises(RuntimeError, match="no data worker starts: 2 forked processes stood still at once"):
        list(ahead(echo, range(5)))
    assert left[0] == 0 and psutil.Process().children() == before
