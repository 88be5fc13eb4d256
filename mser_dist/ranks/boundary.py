"""What the ranks agree on between two steps, by one small all-reduce: to stop, to save, that a save is written."""

import signal
import time
from typing import Protocol

from mser_dist.ranks import distributed
from mser_dist.ranks.preempt import Flag


class Saves(Protocol):
    """The saves of a run, as far as the ranks have to agree on them; `state.checkpoint.Checkpoints` has it."""

    seconds: float  # that the last one took

    @property
    def written(self) -> bool: ...

    @property
    def failed(self) -> bool: ...

    def settle(self, ready: bool) -> None: ...

    def finish(self) -> None: ...


class Boundary:
    """The point between two steps. `stop` is the reason to stop, once the ranks have agreed on one.

    ends: wall-clock time at which the scheduler ends the job, on rank 0. A step's duration and a save's are taken from
    those so far.
    """

    def __init__(self, flag: Flag, saves: Saves, save_minutes: float, ends: float | None, is_main: bool) -> None:
        self.flag = flag
        self.saves = saves
        self.save_seconds = save_minutes * 60 or float("inf")
        self.ends = ends
        self.stop: str | None = None
        self.save_due = False
        self._last_save = time.monotonic()
        self._last_poll = time.monotonic()
        self._slowest = 0.0  # seconds from one poll to the next
        self._main = is_main

    def poll(self) -> None:
        """Agree. Collective; raises `UserError` where a rank could not write its part of a checkpoint."""
        now = time.monotonic()
        self._slowest = max(self._slowest, now - self._last_poll)
        due = self._main and now - self._last_save > self.save_seconds
        votes = [self.flag.number, not self.saves.written, self.saves.failed, due, self._out_of_time()]
        number, writing, failed, due_now, out_of_time = distributed.most([int(vote) for vote in votes])
        if failed:
            self.saves.finish()  # raises, on every rank
        self.saves.settle(ready=not writing)
        self.save_due = bool(due_now)
        if number:
            self.stop = signal.Signals(number).name
        elif out_of_time:
            self.stop = "the job's time is almost over"
        self._last_poll = time.monotonic()

    def saved(self) -> None:
        """A save has begun."""
        self._last_save = self._last_poll = time.monotonic()

    def _out_of_time(self) -> bool:
        """Whether one more step might leave too little time to save."""
        if self.ends is None or not self._main:
            return False
        under_way = 0.0 if self.saves.written else self.saves.seconds  # the last save has to wait for it
        return self.ends - time.time() < under_way + time_to_save(self.saves.seconds) + 2 * self._slowest


def time_to_save(seconds: float) -> float:
    """Seconds to set aside for a save that took `seconds` the last time, or that nobody has measured yet (0)."""
    return 15.0 + 1.5 * seconds
