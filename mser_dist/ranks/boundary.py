"""What the ranks agree on between two steps: to stop, to save, that a save is written.

Nobody hears all the others. A rank tells the job's store when something happens to it (a signal, its part of a save is
written, or cannot be); rank 0 looks, decides, and writes down what it has decided at this poll; the others read that at
the same poll, so that all do the same behind the same step. One request of a rank and one answer of the store, at a
poll or every so many: N ranks are asked at least N × `SPACING` apart. Where steps are longer than that (a quarter of a
second at 64 ranks, 4 s at 1,024) it is every step; where they are shorter, at most every `FARTHEST`. Rank 0 does not
wait for the others: what happens at a rank is acted upon behind the step that it happened in or the one after, and
where not every step is asked about, N × `SPACING` seconds later at most.
"""

import json
import math
import signal
import time
from collections import deque
from typing import NamedTuple, Protocol

from mser_dist.ranks import distributed
from mser_dist.ranks.preempt import Flag
from mser_dist.ranks.store import Store

SPACING = 0.004  # seconds a rank: some hundred times what the store takes to answer one
FARTHEST = 16  # polls from one question to the next: steps may become slow between two of them
_KNOWN = 8  # polls after which their pace is known: before, and where it changes, each is asked about
_KEY = "boundary"


class Saves(Protocol):
    """The saves of a run, as far as the ranks have to agree on them; `state.checkpoint.Checkpoints` has it."""

    seconds: float  # that the last one took

    @property
    def written(self) -> bool: ...

    @property
    def failed(self) -> bool: ...

    def settle(self, ready: bool) -> None: ...

    def finish(self) -> None: ...


class Decision(NamedTuple):
    """What rank 0 has decided at a poll, for all."""

    signal: int = 0  # that some rank has received
    failed: bool = False  # some rank could not write its part of a save
    written: int = 0  # the number of the last save that all ranks have written
    save_due: bool = False
    out_of_time: bool = False
    every: int = 1  # polls to the next decision


class Boundary:
    """The point between two steps. `stop` is the reason to stop, once the ranks have agreed on one.

    ends: `time.monotonic` at which the scheduler ends the job, on rank 0. A step's duration and a save's are taken from
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
        self.every = 1  # polls from one decision to the next
        self._polls, self._next = 0, 1  # the polls so far; the one of the next decision
        self._save, self._told_save = 0, 0  # saves begun; the last one that this rank has written, as it told
        self._told: set[str] = set()
        self._main_side = _MainSide()

    def poll(self) -> None:
        """Agree. Collective; raises `UserError` where a rank could not write its part of a checkpoint."""
        now, store = time.monotonic(), distributed.store()
        self._slowest = max(self._slowest, now - self._last_poll)
        self._main_side.durations.append(now - self._last_poll)
        self._polls += 1
        self.save_due = False
        if store.ranks > 1:
            self._tell(store)
        if self._polls >= self._next:
            self._follow(self._decision(store))
        self._last_poll = time.monotonic()

    def saved(self) -> None:
        """A save has begun."""
        self._last_save = self._last_poll = time.monotonic()
        self._save += 1
        self._main_side.save_began(self._polls)

    def soon(self) -> None:
        """Agree at the next poll: what comes is of another pace. Every rank calls it at the same place."""
        self._next = self._polls + 1
        self._main_side.durations.clear()

    def _tell(self, store: Store) -> None:
        """Say what has happened to this rank since it last said something: mostly nothing, and no message."""
        for name, value in (("signal", self.flag.number), ("failed", int(self.saves.failed))):
            if value and name not in self._told:
                self._told.add(name)
                store.client.set(f"{_KEY}/{name}", str(value))
                store.client.add(f"{_KEY}/said", 1)
        if self.saves.written and self._told_save < self._save:
            self._told_save = self._save
            store.client.add(f"{_KEY}/written/{self._save}", 1)

    def _decision(self, store: Store) -> Decision:
        if store.ranks == 1:
            written = self._save if self.saves.written else 0
            said = Decision(self.flag.number, self.saves.failed, written)
            return said._replace(save_due=self._due(), out_of_time=self._out_of_time(1))
        if store.rank:
            return Decision(*json.loads(store.client.get(f"{_KEY}/{self._polls}")))
        found = self._main_side.look(store, self._save)
        found = found._replace(save_due=self._due(), out_of_time=self._out_of_time(found.every))
        self._main_side.publish(store, self._polls, found)
        return found

    def _follow(self, decision: Decision) -> None:
        self.every = decision.every
        self._next = self._polls + decision.every
        if decision.failed:
            self.saves.finish()  # raises, on every rank
        self.saves.settle(ready=decision.written == self._save)
        self.save_due = decision.save_due
        if decision.signal:
            self.stop = signal.Signals(decision.signal).name
        elif decision.out_of_time:
            self.stop = "the job's time is almost over"

    def _due(self) -> bool:
        return self._main and time.monotonic() - self._last_save > self.save_seconds

    def _out_of_time(self, every: int) -> bool:
        """Whether the steps up to the decision behind the next `every` ones might leave too little time to save."""
        if self.ends is None or not self._main:
            return False
        under_way = 0.0 if self.saves.written else self.saves.seconds  # the last save has to wait for it
        # Two as long as any was; the others go at the pace by which they are so many.
        steps = 2 * self._slowest + (every - 1) * max(self._main_side.durations, default=0.0)
        return self.ends - time.monotonic() < under_way + time_to_save(self.saves.seconds) + steps


class _MainSide:
    """What rank 0 alone does: it looks at what the others have told, and writes decisions down."""

    def __init__(self) -> None:
        self.durations: deque[float] = deque(maxlen=32)  # seconds from one poll to the next
        self._said = 0  # messages that it has looked at
        self._found = Decision()
        self._written = 0
        self._began = 0  # the poll behind which the save under way began
        self._kept: deque[int] = deque()  # polls whose decisions are still in the store

    def save_began(self, polls: int) -> None:
        self._began = polls

    def look(self, store: Store, save: int) -> Decision:
        client = store.client
        if (said := client.add(f"{_KEY}/said", 0)) != self._said:
            self._said = said
            there = {name: client.check([f"{_KEY}/{name}"]) for name in ("signal", "failed")}
            number = int(client.get(f"{_KEY}/signal")) if there["signal"] else 0
            self._found = Decision(number, there["failed"])
        if save > self._written and client.add(f"{_KEY}/written/{save}", 0) == store.ranks:
            self._written = save
            client.delete_key(f"{_KEY}/written/{save}")
            # Who has told so has read all decisions of before that save.
            while self._kept and self._kept[0] <= self._began:
                client.delete_key(f"{_KEY}/{self._kept.popleft()}")
        longest = max(self.durations) if len(self.durations) >= _KNOWN else float("inf")
        every = max(1, math.ceil(store.ranks * SPACING / longest))
        return self._found._replace(written=self._written, every=min(every, FARTHEST))

    def publish(self, store: Store, poll: int, decision: Decision) -> None:
        store.client.set(f"{_KEY}/{poll}", json.dumps(decision))
        self._kept.append(poll)


def time_to_save(seconds: float) -> float:
    """Seconds to set aside for a save that took `seconds` the last time, or that nobody has measured yet (0)."""
    return 15.0 + 1.5 * seconds
