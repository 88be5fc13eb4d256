"""How the time of a step is spent, without waiting for the device; a trace of some steps by torch's profiler."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function


class Timer:
    """Seconds of the named parts of steps. On a GPU they are the GPU's own, between events in its queue: measuring
    waits for nothing, and what waits for other ranks there counts. Elsewhere they are seconds of the process.
    """

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._spent: dict[str, float] = {}
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around a part; the profiler's trace shows it by that name."""
        with record_function(f"mser {name}"):
            if self._cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                yield
                end.record()
                self._events.append((name, begin, end))
            else:
                began = time.monotonic()
                yield
                self._add(name, time.monotonic() - began)

    def _add(self, name: str, seconds: float) -> None:
        self._spent[name] = self._spent.get(name, 0.0) + seconds

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last reading. Waits for the last part's end, so it is for logged steps."""
        if self._events:
            self._events[-1][2].synchronize()
        for name, begin, end in self._events:
            self._add(name, begin.elapsed_time(end) / 1000)
        spent, self._spent, self._events = self._spent, {}, []
        return spent


class Trace:
    """The trace of `train.profile_steps` on this rank: ``<folder>/steps_10-12.json``, for chrome://tracing or Perfetto.

    steps: [first, last], or nothing.
    """

    def __init__(self, steps: list[int], folder: Path) -> None:
        self._steps, self._folder = steps, folder
        self._profile: Any = None
        self._first = 0

    def before(self, step: int) -> None:
        """Step `step` begins; the first one may be one that a resumed run goes on with."""
        if self._profile is None and self._steps and self._steps[0] <= step <= self._steps[1]:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile, self._first = profile(activities=kinds), step
            self._profile.start()

    def after(self, step: int) -> None:
        """Step `step` is done."""
        if self._profile is not None and step >= self._steps[1]:
            self.write(step)

    def write(self, step: int) -> None:
        """Write what there is up to this step, if anything."""
        if self._profile is None:
            return
        self._profile.stop()
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"steps_{self._first}-{step}.json"
        partial = path.with_suffix(".partial.json")
        self._profile.export_chrome_trace(str(partial))
        partial.rename(path)
        self._profile = None
