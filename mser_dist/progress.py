"""One look for every progress bar: rate and time left in a terminal, a line now and then in a log file."""

import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


def bar(items: Iterable[Any] | None = None, *, title: str, unit: str, total: int, **options: Any) -> "tqdm[Any]":
    """A tqdm bar on standard error. `options` go to tqdm (initial, disable, leave …)."""
    terminal = sys.stderr.isatty()
    interval = 0.3 if terminal else 20.0  # a log file should not fill with bars
    shown = tqdm(items, desc=title, unit=unit, total=total, mininterval=interval, dynamic_ncols=terminal, **options)
    _shown.add(shown)
    return shown


_shown: "weakref.WeakSet[tqdm[Any]]" = weakref.WeakSet()


def end_bars() -> None:
    """Close every bar, so that what is printed next has a line of its own."""
    for shown in list(_shown):
        shown.close()


class Clock:
    """Clips per second, and the share of time spent waiting for data, since the last reading; without time aside."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.start, self.waited, self.clips = time.monotonic(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around what is none of the steps' time."""
        began = time.monotonic()
        yield
        self.start += time.monotonic() - began

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last reading, and the rates."""
        passed = max(time.monotonic() - self.start, 1e-9)
        rates = {"clips_per_second": self.clips / passed, "data_wait": self.waited / passed}
        self._reset()
        return passed, rates
